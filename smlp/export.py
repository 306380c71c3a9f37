"""ONNX files of networks, fused or not, that ONNX Runtime runs."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from smlp.network import PyramidNetwork

OPSET = 18  # what torch's exporter translates to without a conversion afterwards


def export_onnx(model: nn.Module, images: Tensor, path: str | Path) -> None:
    """Write ``model`` in eval mode as an ONNX file, for any batch size.

    ONNX has no operator for the fused block, so the file holds the plain one, of the same results
    to rounding. ``torch.export`` has one: there a fused model keeps it, and needs nothing of this.

    Args:
        model: a network or any module that maps one tensor to one tensor; it is left as it is.
        images: an example of its input, ``[B, C, H, W]`` with B of at least 2; only B may differ
            later.
        path: the file to write. Input and output are called ``images`` and ``output``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``images`` has not four axes, or a batch of less than 2.
        ImportError: if the exporter is missing, with the command that installs it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
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
    program = torch.onnx.export(
        plain,
        (images,),
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(path)


def without_fused_blocks(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with every fused block replaced by the plain one."""
    plain = copy.deepcopy(model)
    if any(type(module).__module__.startswith("smlp_kernels.") for module in plain.modules()):
        from smlp_kernels import unfuse_model

        unfuse_model(plain)
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
    (output,) = session.run(None, {"images": images.cpu().numpy()})
    with torch.no_grad():
        expected = without_fused_blocks(model).eval()(images).cpu()
    return float((torch.from_numpy(output) - expected).abs().max() / expected.abs().max())


def example(network: PyramidNetwork, batch: int = 2) -> Tensor:
    """Return random images that ``network`` takes, ``[batch, C, H, W]``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, network.in_channels, *network.image_size, generator=generator)
