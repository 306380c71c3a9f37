"""Launching the kernels: what each is called with, from which tile, on which device."""

import contextlib
import functools
import logging
import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from smlp_kernels.configs import MixConfig, WeightGradConfig, mix_config, weight_grad_config
from smlp_kernels.kernels.mix import mix_kernel
from smlp_kernels.kernels.weight_grad import fuse_grad_kernel, proj_grad_kernel

logger = logging.getLogger(__name__)

INT32_MAX = 2**31 - 1
PLANS = 1024  # kept per process: one for each combination of shapes, strides and types
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # fixed when the kernels are imported


class Plan(NamedTuple):
    """All of a launch but the tensors: what depends on their shapes, strides and types alone."""

    kernel: Any
    programs: int
    integers: tuple[int, ...]  # arguments after the tensors, in the kernel's order
    constants: dict[str, Any]  # tl.constexpr arguments
    num_warps: int
    num_stages: int


class Call(NamedTuple):
    """A kernel and what it is launched with; the same for a launch and for compiling ahead."""

    plan: Plan
    tensors: tuple[Tensor | None, ...]

    def launch(self, device_of: Tensor) -> None:
        """Run on the device of a tensor: Triton itself would take the current device."""
        kernel, programs, integers, constants, num_warps, num_stages = self.plan
        with on_device_of(device_of):
            kernel[(programs,)](
                *self.tensors, *integers, **constants, num_warps=num_warps, num_stages=num_stages
            )

    def run(self, device_of: Tensor) -> None:
        """:meth:`launch`; where the chip has not the memory for it, with a shorter pipeline.

        Shipped tiles fit the chips that they were compiled for; this is for others.
        """
        try:
            self.launch(device_of)
        except triton.OutOfResources as error:
            stages = self.plan.num_stages - 1
            if stages == 0:
                raise
            warn_once(f"{self.plan.kernel.__name__} runs with num_stages={stages}: {error}")
            self._replace(plan=self.plan._replace(num_stages=stages)).run(device_of)

    def compile(self, device_of: Tensor) -> None:
        """Compile what :meth:`launch` runs; the call's tensors may be on the meta device."""
        kernel, programs, integers, constants, num_warps, num_stages = self.plan
        with on_device_of(device_of):
            kernel.warmup(
                *self.tensors,
                *integers,
                **constants,
                grid=(programs,),
                num_warps=num_warps,
                num_stages=num_stages,
            )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process did before."""
    logger.warning(message)


def weight_grad_calls(
    dy: Tensor,
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    fuse: Tensor,
    need_proj_h: bool,
    need_proj_w: bool,
    need_fuse: bool,
    arch: int,
    config: WeightGradConfig | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Call]]:
    """Partial sums of the gradients of proj_h, proj_w and fuse, and the calls that write them."""
    batch, channels, height, width = x.shape
    weights = [weight.to(x.dtype) for weight in (proj_h, proj_w, fuse)]
    bias_h, bias_w = both_biases(bias_h, bias_w, x)
    config = config or weight_grad_config(
        channels,
        x.dtype,
        arch,
        input_precision(x.dtype),
        channels_last=x.stride(1) == 1 and dy.stride(1) == 1,
    )
    # tiles to share out: more partial results than these would be empty
    tiles = config.tiles(batch, height, width)
    tiles = tiles if x.numel() else 0

    def partial(splits: int, size: int) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty((min(splits, tiles), size), dtype=dtype)

    partial_h = partial(config.proj_splits, height * (height + 1) if need_proj_h else 0)
    partial_w = partial(config.proj_splits, width * (width + 1) if need_proj_w else 0)
    partial_fuse = partial(
        config.fuse_splits(channels), channels * (3 * channels + 1) if need_fuse else 0
    )
    calls = []
    if tiles and (need_proj_h or need_proj_w):
        calls.append(proj_grad_call(config, dy, x, weights[2], partial_h, partial_w))
    if tiles and need_fuse:
        calls.append(
            fuse_grad_call(config, dy, x, weights[0], bias_h, weights[1], bias_w, partial_fuse)
        )
    return (partial_h, partial_w, partial_fuse), calls


def dense(bias: Tensor | None) -> Tensor | None:
    """The kernels take biases without strides; gradients in their place may be expanded."""
    return None if bias is None else bias.contiguous()


def both_biases(
    bias_h: Tensor | None, bias_w: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Both biases dense and of one type, or neither: one body of the kernel serves both axes."""
    given = bias_w if bias_h is None else bias_h
    if given is None:
        return None, None
    bias_h = given.new_zeros(x.shape[2]) if bias_h is None else bias_h
    bias_w = given.new_zeros(x.shape[3]) if bias_w is None else bias_w
    return dense(bias_h), dense(bias_w.to(bias_h.dtype))


def mix_call(
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    fuse: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transposed: bool,
    arch: int,
    config: MixConfig | None = None,
) -> Call:
    """The call of ``mix_kernel`` that writes ``y``; all weights in the type of ``x``."""
    plan = mix_plan(
        x.shape,
        x.stride(),
        y.stride(),
        (*proj_h.stride(), *proj_w.stride(), *fuse_strides(fuse)),
        (bias_h is not None, bias_w is not None),
        None if bias is None else bias.stride(),
        x.dtype,
        input_precision(x.dtype),
        transposed,
        arch,
        config,
    )
    return Call(plan, (x, proj_h, bias_h, proj_w, bias_w, fuse, bias, y))


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    weight_strides: tuple[int, ...],
    has_bias: tuple[bool, bool],
    bias_strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    precision: str,
    transposed: bool,
    arch: int,
    config: MixConfig | None,
) -> Plan:
    """The plan of :func:`mix_call`; without a ``config`` the one for this size and chip."""
    batch, channels, height, width = shape
    channels_last = x_strides[1] == 1
    config = config or mix_config(height, width, channels, dtype, arch, precision, channels_last)
    h_out, h_in, w_out, w_in, f_branch, f_out, f_in = weight_strides
    if transposed:
        h_out, h_in, w_out, w_in, f_out, f_in = h_in, h_out, w_in, w_out, f_in, f_out
    index_64 = any(needs_index_64(shape, s, config.images) for s in (x_strides, y_strides))
    return Plan(
        mix_kernel,
        config.programs(batch, height, width, channels),
        (
            *(batch, *x_strides, *y_strides, h_out, h_in, w_out, w_in, f_branch, f_out, f_in),
            *(*(bias_strides or ()), 0, 0, 0)[:3],  # one stride, three, or no bias at all
        ),
        {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "IMAGES": config.images,
            "TILE_H": config.tile_h,
            "TILE_W": config.tile_w,
            "STEP_H": config.step_h,
            "STEP_W": config.step_w,
            "BLOCK_C": config.block_c,
            "BLOCK_N": config.block_n,
            "BLOCK_H": config.block_h,
            "BLOCK_W": config.block_w,
            "WHOLE": config.holds_images(height, width),
            "HAS_BIAS_H": has_bias[0],
            "HAS_BIAS_W": has_bias[1],
            "HAS_BIAS": bias_strides is not None,
            "BIAS_MAP": bias_strides is not None and len(bias_strides) == 3,
            "CHANNELS_LAST": channels_last,
            "INDEX_64": index_64,
            "PRECISION": precision,
        },
        config.num_warps,
        config.num_stages,
    )


def proj_grad_call(
    config: WeightGradConfig,
    dy: Tensor,
    x: Tensor,
    fuse: Tensor,
    partial_h: Tensor,
    partial_w: Tensor,
) -> Call:
    """The call of ``proj_grad_kernel``; a partial result of no columns is not computed."""
    batch, _, height, width = x.shape
    splits = partial_h.shape[0]
    blocks_h, blocks_w = config.proj_blocks(height, width)
    programs_h = splits * blocks_h if partial_h.shape[1] else 0
    programs_w = splits * blocks_w if partial_w.shape[1] else 0
    plan = Plan(
        proj_grad_kernel,
        programs_h + programs_w,
        (splits, programs_h, batch, *dy.stride(), *x.stride(), *fuse_strides(fuse)),
        {
            **weight_grad_constants(config, dy, x),
            "BLOCK_O": config.proj_block_o,
            "BLOCK_C": config.proj_block_c,
        },
        config.num_warps,
        config.num_stages,
    )
    return Call(plan, (dy, x, fuse, partial_h, partial_w))


def fuse_grad_call(
    config: WeightGradConfig,
    dy: Tensor,
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    partial: Tensor,
) -> Call:
    """The call of ``fuse_grad_kernel``."""
    batch, channels = x.shape[:2]
    splits = partial.shape[0]
    plan = Plan(
        fuse_grad_kernel,
        3 * splits * config.fuse_tiles(channels),
        (splits, batch, *dy.stride(), *x.stride(), *proj_h.stride(), *proj_w.stride()),
        {
            **weight_grad_constants(config, dy, x),
            "BLOCK_O": config.fuse_block_o,
            "BLOCK_C": config.fuse_block_c,
            "HAS_BIAS": bias_h is not None,
        },
        config.num_warps,
        config.num_stages,
    )
    return Call(plan, (dy, x, proj_h, bias_h, proj_w, bias_w, partial))


def weight_grad_constants(config: WeightGradConfig, dy: Tensor, x: Tensor) -> dict[str, Any]:
    """Constants that both weight-gradient kernels take."""
    _, channels, height, width = x.shape
    positions = config.positions(height, width)
    return {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "LINES": config.rows // positions,
        "POSITIONS": positions,
        "INDEX_64": any(needs_index_64(t.shape, t.stride(), 1) for t in (x, dy)),
        "PRECISION": input_precision(x.dtype),
    }


def fuse_strides(fuse: Tensor) -> tuple[int, int, int]:
    """Strides of ``fuse`` [C, 3C] or [C, 3C, 1, 1] along branch, output and input channel."""
    return fuse.shape[0] * fuse.stride(1), fuse.stride(0), fuse.stride(1)


def input_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own float32-matmul setting says."""
    # not allow_tf32: reading it raises once the setting was made through the newer names
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def needs_index_64(shape: torch.Size, strides: tuple[int, ...], images: int) -> bool:
    """Whether offsets inside a tile of ``images`` images [B, C, H, W] exceed 31 bits."""
    sizes = (min(images, shape[0]), *shape[1:])
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return last > INT32_MAX


def arch_of(x: Tensor) -> int:
    """Ten times the compute capability; 0 in the interpreter, which has the rule for every chip."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, at no cost where it is."""
    if not x.is_cuda:
        if INTERPRETED:
            return contextlib.nullcontext()
        raise ValueError(
            f"x: expected a CUDA tensor, got one on {x.device}; on other devices the kernels run "
            "only in Triton's interpreter (set TRITON_INTERPRET=1 before they are imported)"
        )
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
