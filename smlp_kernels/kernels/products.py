"""PyTorch's products: sums over pixels, and axes that no tile holds."""

import torch
from torch import Tensor

from smlp_kernels.kernels.axis import Axes
from smlp_kernels.kernels.rows import Chunk
from smlp_kernels.launch import cdiv

TILES = 160  # of the products over pixels: a constant, so that sums do not depend on the chip


def run_by_products(
    axes: Axes, chunk: Chunk, along_h: bool, tensors: tuple[Tensor | None, ...]
) -> None:
    """What ``axes_kernel`` does with these tensors along an axis that no tile holds."""
    g, x, dx, *along = tensors
    proj, bias, partial = along[:3] if along_h else along[3:]
    g, first = g[: chunk.pixels], not chunk.first
    channels, height, width = axes.size
    needed = axes.needed

    def positions(images: Tensor) -> Tensor:
        """[B, C, H, W] as a view [positions, images, lines of an image, channels]."""
        return images.permute((2, 0, 3, 1) if along_h else (3, 0, 2, 1))

    def part(start: int) -> Tensor:
        """The same of some columns of g."""
        images = g[:, start : start + channels].unflatten(0, (-1, height, width))
        return positions(images.movedim(3, 1))

    branch, identity = part(0 if along_h else channels), part(2 * channels)
    out = g.new_empty(len(proj), branch[0].numel())
    if needed.x or partial is not None:
        g_lines = branch.flatten(1)  # [positions, all lines and channels]
    if needed.x:
        torch.addmm(identity.flatten(1), proj.t(), g_lines, out=out)
        (identity if along_h else positions(dx)).copy_(out.view_as(identity))
    if x is None:
        return
    x = positions(x)
    if partial is not None:
        size = len(proj)
        grad, bias_grad = partial.view(size + 1, size).split((size, 1))
        add_products(grad[None], g_lines[None], x.flatten(1).t()[None], first)
        sums = g_lines.sum(1, dtype=partial.dtype)
        bias_grad.copy_(sums if first else bias_grad + sums)
    if needed.fuse:
        if bias is None:
            torch.mm(proj, x.flatten(1), out=out)
        else:
            torch.addmm(bias.to(g.dtype)[:, None], proj, x.flatten(1), out=out)
        branch.copy_(out.view_as(branch))
        if not along_h:
            identity.copy_(x)
            g[:, 3 * channels :] = 1


def add_products(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total[i] (+)= left[i] @ right[i], added up in the type of ``total`` throughout."""
    multiply, add = torch.bmm, torch.baddbmm
    if len(total) == 1:  # for cuBLAS this need not be a batch
        multiply, add = torch.mm, torch.addmm
        total, left, right = total[0], left[0], right[0]
    if left.dtype == total.dtype or not left.is_cuda:  # only CUDA has products of mixed types
        left, right = left.to(total.dtype), right.to(total.dtype)
        add(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        multiply(left, right, out_dtype=total.dtype, out=total)
    else:
        add(total, left, right, out_dtype=total.dtype, out=total)


def parts_of(channels: int, columns: int, pixels: int) -> int:
    """How many products a sum over pixels is split into: a divisor of ``pixels``.

    Enough to give a current GPU sufficient tiles of 128 x 128, few enough that adding their results
    is cheap: cuBLAS itself splits small products badly (H200: 24 us instead of 16).
    """
    tiles = cdiv(channels, 128) * cdiv(columns, 128)
    return next(n for n in range(max(1, TILES // tiles), 0, -1) if pixels % n == 0)
