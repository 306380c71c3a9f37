"""Files of weights: read without running their code, and searched for the weights of a model."""

import argparse
import contextlib
import io
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

# What training scripts call the averaged weights that they save next to the others: model_ema,
# state_dict_ema, ema_state_dict, params_ema, swa_model, averaged_model and so on.
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "averaging"}
# Parts of names that wrappers of modules (torch.compile, FSDP, activation checkpointing, Fabric)
# put before those of what they wrap, at any depth.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)


def without_wrappers(name: str) -> str:
    """Return the name of an entry as if no module were wrapped."""
    return _WRAPPERS.sub("", name)


# --- finding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """One set of weights in a file.

    Attributes:
        name: where it is in the file, such as ``state_dict_ema``; empty for the top level.
        averaged: whether its name says that it is an average, exponential or stochastic.
        entries: tensors (or whatever is stored in their place) by name.
        others: other entries of the file that look like weights.
    """

    name: str
    averaged: bool
    entries: dict[str, Any]
    others: tuple[str, ...]


def find_weights(content: Mapping[str, Any], known: Iterable[str], wanted: str) -> Weights:
    """Choose a set of weights among those in ``content``.

    Nested mappings and common prefixes of names are treated alike: a set of weights is wherever
    names of the model follow a common prefix.

    Args:
        content: a state dict, or a mapping that contains some.
        known: the names of the model's entries, in every layout.
        wanted: ``"ema"`` for averaged weights, ``"raw"`` for others, ``"auto"`` for averaged ones
            if there are some.

    Raises:
        ValueError: if ``wanted`` is another word, or there is not exactly one such set.
    """
    if wanted not in ("auto", "ema", "raw"):
        raise ValueError(f"weights: expected 'auto', 'ema' or 'raw', got {wanted!r}")
    flat = {without_wrappers(name): value for name, value in _flattened(content)}
    prefixes = _prefixes(flat, set(known))
    averaged = [prefix for prefix in prefixes if _is_averaged(prefix, flat)]
    raw = [prefix for prefix in prefixes if prefix not in averaged]
    # Lightning saves the averaged weights as the state dict, and the trained ones next to it.
    if any(prefix.startswith("current_model_state.") for prefix in raw):
        averaged += [prefix for prefix in raw if prefix.startswith("state_dict.")]
        raw = [prefix for prefix in raw if prefix not in averaged]
    found = {"ema": averaged, "raw": raw, "auto": averaged or raw}[wanted]
    if len(found) != 1:
        names = ", ".join(map(_named, found or averaged + raw))
        kind = {"ema": "averaged ", "raw": "raw "}.get(wanted, "")
        got = f"several: {names}; pass one of them" if found else f"only: {names}"
        raise ValueError(
            f"source: expected one set of {kind}weights (weights={wanted!r}), got {got}"
        )
    (prefix,) = found
    inside = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    entries = {
        name.removeprefix(prefix): _as_tensor(value)
        for name, value in flat.items()
        if name.startswith(prefix) and not name.startswith(inside)
    }
    others = [_named(other) for other in prefixes if other != prefix]
    others += _unreadable(flat, tuple(prefixes))
    return Weights(prefix.rstrip("."), prefix in averaged, entries, tuple(others))


def _flattened(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, nn.Module):
            value = value.state_dict()
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        else:
            yield name, value


def _prefixes(names: Iterable[str], known: set[str]) -> list[str]:
    """The beginnings that are followed by most names of the model, or by nearly as many."""
    matches: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                matches["".join(f"{part}." for part in parts[:start])] += 1
    if not matches:
        return [_common_beginning(names)]
    most = max(matches.values())
    return [prefix for prefix, count in matches.items() if 2 * count > most]


def _common_beginning(names: Iterable[str]) -> str:
    """Guess where the weights are if none of their names is known: below one of the usual keys."""
    for prefix in ("model.", "state_dict.", "model_state_dict.", "module."):
        if any(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _is_averaged(prefix: str, flat: Mapping[str, Any]) -> bool:
    """Whether weights are averaged, by their name or as torch's ``AveragedModel`` counts them."""
    parts = prefix.split(".")[:-1]
    return any(word in _AVERAGED for word in re.split(r"[^a-z]+", prefix.lower())) or any(
        "".join(f"{part}." for part in parts[:depth]) + "n_averaged" in flat
        for depth in range(len(parts) + 1)
    )


def _unreadable(flat: Mapping[str, Any], readable: tuple[str, ...]) -> list[str]:
    """Return what is called averaged and holds tensors, under names that are not the model's."""
    heads = {
        name.partition(".")[0]: None
        for name, value in flat.items()
        if "." in name and hasattr(value, "ndim") and value.ndim and not name.startswith(readable)
    }
    return [f"{head} (not understood)" for head in heads if _is_averaged(f"{head}.", {})]


def _named(prefix: str) -> str:
    return prefix.rstrip(".") or "the top of the source"


def _as_tensor(value: object) -> object:
    # Frameworks without torch tensors save arrays; anything else is reported by its name later.
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):  # of a sharded model
        return value.full_tensor()
    try:
        return torch.as_tensor(value) if hasattr(value, "__array__") else value
    except (TypeError, ValueError):  # of a type that torch does not have
        return value


# --- reading -----------------------------------------------------------------------------------


def read_weights(source: str | os.PathLike[str] | BinaryIO) -> Any:
    """Read a file written by torch.save or safetensors without running code from it.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is another kind of file, is damaged, or holds more than data.
        ModuleNotFoundError: if it needs safetensors, which is not installed.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return _read(file, Path(source))
    if not source.seekable():
        source = io.BytesIO(source.read())
    return _read(source, Path(getattr(source, "name", None) or "the file object"))


def _read(file: BinaryIO, path: Path) -> Any:
    start = file.tell()
    head = file.read(9)
    file.seek(start)
    # Eight bytes of length, then JSON; torch's own begin as a zip archive or with a magic number.
    is_safetensors = path.suffix == ".safetensors" or head[8:] == b"{"
    if is_safetensors:
        try:
            from safetensors.torch import load
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading {path} needs safetensors: pip install safetensors", name=error.name
            ) from error
    try:
        with reading("source", "a file of tensors", path):
            return load(file.read()) if is_safetensors else _read_pickled(file)
    except OSError as error:  # the file was opened, so its bytes are damaged
        raise ValueError(
            f"source: expected a file of tensors, got {path}, which is damaged ({error.strerror})"
        ) from error


def _read_pickled(file: BinaryIO) -> Any:
    # Training scripts save their options, too; a Namespace holds values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def reading(argument: str, expected: str, path: Path) -> Iterator[None]:
    """Turn errors of reading a file, other than an OSError, into a ValueError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # anything, where bytes are damaged
        # without the error's text: torch's advises to load the file unsafely
        refused = isinstance(error, pickle.UnpicklingError) and re.search(
            r"\bGLOBAL ([\w.]+)", str(error)
        )
        if refused:
            why = (
                f"which holds more than data: a {refused[1]}, which could run code. In the program "
                "that wrote the file, save only tensors: torch.save(state_dict, path) with a dict "
                "of tensors, numbers and strings"
            )
        else:
            why = (
                "which cannot be read without running code from it, or is damaged "
                f"({type(error).__name__})"
            )
        raise ValueError(f"{argument}: expected {expected}, got {path}, {why}") from error
