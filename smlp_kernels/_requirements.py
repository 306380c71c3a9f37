"""Requirements of the kernels, checked before imports that would fail with less clear errors."""

import importlib
import logging
import os
import re
import tempfile
from pathlib import Path

MINIMUM = {"torch": (2, 11), "triton": (3, 6)}

logger = logging.getLogger("smlp_kernels")
logger.addHandler(logging.NullHandler())


def require_versions() -> None:
    """Raise an ImportError that names package, version found and version needed."""
    for package, minimum in MINIMUM.items():
        cause = None
        try:
            # a folder that happens to have the package's name imports too, and has no version
            found = importlib.import_module(package).__version__
            if release(found) >= minimum:
                continue
            problem = f"found {found}"
        except (ImportError, AttributeError) as error:
            problem, cause = f"which cannot be imported ({error})", error
        raise ImportError(
            f"smlp_kernels needs {package} >= {'.'.join(map(str, minimum))}, {problem}; "
            "the package smlp works without it"
        ) from cause


def release(text: str) -> tuple[int, ...]:
    """Major and minor of a version such as 2.13.0+cpu or 3.6.0.post1."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def require_cache_folder() -> tempfile.TemporaryDirectory | None:
    """Give Triton another folder to compile into if its own cannot be written.

    Otherwise Triton stops at the first launch, as in a container with a read-only home, or with the
    home of a user other than the one it runs as.

    Returns:
        The folder, which lives as long as this object, or None if Triton's own will do.
    """
    from triton import knobs

    folder = Path(knobs.cache.dir)
    if _can_be_made(folder):
        return None
    try:
        replacement = tempfile.TemporaryDirectory(prefix="smlp-triton-")
    except OSError as error:  # nothing can be written anywhere: the rest of the package still works
        logger.warning(
            "Triton's cache folder %s cannot be written, nor can another be made (%s): set "
            "TRITON_CACHE_DIR to a folder that can, or no kernel will run.",
            folder,
            error,
        )
        return None
    os.environ["TRITON_CACHE_DIR"] = replacement.name  # in child processes too
    logger.warning(
        "Triton's cache folder %s cannot be written; kernels are compiled into %s, for this "
        "process only. TRITON_CACHE_DIR names another folder.",
        folder,
        replacement.name,
    )
    return replacement


def _can_be_made(folder: Path) -> bool:
    """Whether the folder can be written to, or made where it does not exist yet."""
    if folder.parts[:1] == ("~",):  # there is no home; a folder of this name would be made here
        return False
    # os.path.exists, as Path.exists raises below a folder that may not be entered
    existing = next((p for p in (folder, *folder.parents) if os.path.exists(p)), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
