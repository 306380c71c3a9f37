"""sMLPNet written again from the paper's description, channels last: an oracle for checkpoints."""

import torch
from torch import Tensor

State = dict[str, Tensor]


def normalise(x: Tensor, mean: Tensor, var: Tensor, state: State, name: str) -> Tensor:
    return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(x: Tensor, state: State, name: str) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return normalise(x, mean, var, state, name)


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return normalise(x, mean, (x - mean).square().mean(-1, keepdim=True), state, name)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def patches(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution without overlap; x [B, H, W, C], weight [C', C, k, k]."""
    batch, height, width, channels = x.shape
    rows, columns = weight.shape[2:]
    cells = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return torch.einsum("bhiwjc,ocij->bhwo", cells, weight)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, zeros outside; x [B, H, W, C], weight [C, 1, 3, 3]."""
    height, width = x.shape[1:3]
    out = torch.zeros_like(x)
    for h in range(height):
        for w in range(width):
            for i in range(3):
                for j in range(3):
                    row, column = h + i - 1, w + j - 1
                    if 0 <= row < height and 0 <= column < width:
                        out[:, h, w] += x[:, row, column] * weight[:, 0, i, j]
    return out


def paper_network(images: Tensor, state: State, depth: tuple[int, ...]) -> Tensor:
    """Logits of the paper's network in eval mode, of images [B, C, H, W]."""
    x = images.permute(0, 2, 3, 1)
    number = 0
    for stage, layers in enumerate(depth):
        x = patches(x, state[f"to_patch_embedding.{stage}.0.weight"])
        for _ in range(layers):
            name = f"token_mix.{number}"
            y = gelu(batch_norm(x, state, f"{name}.0.conv_merge.BN"))
            y = depthwise(y, state[f"{name}.0.conv_merge.Conv.weight"])
            y = gelu(batch_norm(y, state, f"{name}.1.BN"))
            along_w = torch.einsum("wk,bhkc->bhwc", state[f"{name}.1.proj_h.weight"][:, :, 0, 0], y)
            along_w = along_w + state[f"{name}.1.proj_h.bias"][:, None]
            along_h = torch.einsum("hk,bkwc->bhwc", state[f"{name}.1.proh_w.weight"][:, :, 0, 0], y)
            along_h = along_h + state[f"{name}.1.proh_w.bias"][:, None, None]
            y = torch.cat([y, along_w, along_h], -1)
            x = x + y @ state[f"{name}.1.fuse.weight"][:, :, 0, 0].T
            name = f"channel_mix.{number}"
            y = layer_norm(x, state, f"{name}.1")
            y = gelu(y @ state[f"{name}.2.net.0.weight"].T + state[f"{name}.2.net.0.bias"])
            x = x + y @ state[f"{name}.2.net.3.weight"].T + state[f"{name}.2.net.3.bias"]
            number += 1
    x = batch_norm(x, state, "batch_norm").mean((1, 2))
    return x @ state["mlp_head.0.weight"].T + state["mlp_head.0.bias"]


def paper_state(
    height: int, width: int, patch: int, inputs: int, classes: int, model: int,
    depth: tuple[int, ...], expansion: int,
) -> State:  # fmt: skip
    """Random weights under the names and shapes that the paper's code saves."""
    torch.manual_seed(2)
    state: State = {}

    def put(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, dtype=torch.float64) / 2 + (len(shape) == 1)
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], dtype=torch.float64) / 2

    def put_batch_norm(name: str, channels: int) -> None:
        put(name, channels)
        state[f"{name}.running_mean"] = torch.randn(channels, dtype=torch.float64)
        state[f"{name}.running_var"] = torch.rand(channels, dtype=torch.float64) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(11)

    number, c = 0, model
    for stage, layers in enumerate(depth):
        c, h, w = model << stage, (height // patch) >> stage, (width // patch) >> stage
        before, step = (inputs, patch) if stage == 0 else (c // 2, 2)
        put(f"to_patch_embedding.{stage}.0", c, before, step, step, bias=False)
        for _ in range(layers):
            put_batch_norm(f"token_mix.{number}.0.conv_merge.BN", c)
            put(f"token_mix.{number}.0.conv_merge.Conv", c, 1, 3, 3, bias=False)
            put_batch_norm(f"token_mix.{number}.1.BN", c)
            put(f"token_mix.{number}.1.proj_h", w, w, 1, 1)
            put(f"token_mix.{number}.1.proh_w", h, h, 1, 1)
            put(f"token_mix.{number}.1.fuse", c, 3 * c, 1, 1, bias=False)
            put(f"channel_mix.{number}.1", c)
            put(f"channel_mix.{number}.2.net.0", expansion * c, c)
            put(f"channel_mix.{number}.2.net.3", c, expansion * c)
            number += 1
    put_batch_norm("batch_norm", c)
    put("mlp_head.0", classes, c)
    return state
