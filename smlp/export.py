"""ONNX files of networks, plain, fused or folded, that ONNX Runtime runs."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smlp.network import PyramidNetwork, require_module, unwrapped

OPSET = 18  # what torch's exporter translates to without a conversion afterwards


def export_onnx(model: nn.Module, images: Tensor, path: str | Path) -> None:
    """Write ``model`` in eval mode as an ONNX file, for any batch size.

    ONNX has no operator for the fused block, so the file holds the plain one, whose results are the
    same to rounding; a folded block stays folded. With ``torch.export`` itself this is not needed:
    it keeps fused blocks.

    Args:
        model: a network or any module that maps one tensor to one tensor, or to a list of them; it
            is not changed. It may be wrapped, as for :func:`smlp.load_checkpoint`.
        images: an example of its input, ``[B, C, H, W]`` with B of at least 2; only B may differ
            later.
        path: the file to write. Input and output are called ``images`` and ``output``; several
            outputs ``output_0`` and so on.

    Raises:
        TypeError: if ``model`` is not a module, or ``images`` not a tensor.
        ValueError: if ``images`` does not have four axes, or its batch is less than 2.
        ImportError: if the exporter is missing, with the command that installs it.
    """
    require_module(model)
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4 or images.shape[0] < 2:  # torch.export takes an axis of 1 for a constant
        raise ValueError(
            f"images: expected shape [B, C, H, W] with B of at least 2, got {list(images.shape)}"
        )
    try:
        import onnxscript  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exporting to ONNX needs onnxscript: pip install onnx onnxscript"
        ) from error
    plain = without_fused_blocks(model).eval()
    count = len(_outputs(plain, images))
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    program = torch.onnx.export(
        plain,
        (images,),
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(path)


def without_fused_blocks(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which every fused or folded block runs on PyTorch.

    Such a block's class names, in its attribute ``plain_class``, the class with the same parameters
    and results but without kernels. Subclasses do not inherit it: they may do something else.
    """
    plain = copy.deepcopy(unwrapped(model))
    for module in plain.modules():
        module.__class__ = vars(type(module)).get("plain_class", type(module))
    return plain


def largest_difference(path: str | Path, model: nn.Module, images: Tensor) -> float:
    """Run an ONNX file with ONNX Runtime on the CPU and compare it with the model in eval mode.

    Args:
        path: what :func:`export_onnx` wrote.
        model: the same model.
        images: ``[B, C, H, W]`` of any B.

    Returns:
        The largest absolute difference of the outputs, relative to the largest output.

    Raises:
        ImportError: if ONNX Runtime is missing, with the command that installs it.
    """
    try:
        import onnxruntime  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("running ONNX needs onnxruntime: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = map(torch.from_numpy, session.run(None, {"images": images.cpu().numpy()}))
    expected = [y.cpu() for y in _outputs(without_fused_blocks(model).eval(), images)]
    difference = max(
        (one - other).abs().max().item() for one, other in zip(outputs, expected, strict=True)
    )
    return difference / (max(y.abs().max().item() for y in expected) or 1.0)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(model(images))


def example(network: PyramidNetwork, batch: int = 2) -> Tensor:
    """Return random images that ``network`` takes, ``[batch, C, H, W]``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, network.in_channels, *network.image_size, generator=generator)
