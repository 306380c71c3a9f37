"""receptive_field and its picture: a cross after one block, everything after two."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPBlock, SparseMLP, receptive_field
from smlp.pictures import draw_receptive_fields


def cross(height: int, width: int, row: int, column: int) -> Tensor:
    reached = torch.zeros(height, width, dtype=torch.bool)
    reached[row] = True
    reached[:, column] = True
    return reached


@pytest.mark.parametrize("position", [None, (0, 6), (8, 2)])
def test_one_block_sees_a_cross_and_two_see_everything(position: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    block = SMLPBlock(9, 7, 5)
    x = torch.randn(2, 5, 9, 7)
    one = receptive_field(block, x, position=position)
    assert torch.equal(one > 0, cross(9, 7, *(position or (4, 3))))
    two = receptive_field(nn.Sequential(block, SMLPBlock(9, 7, 5)), x, position=position)
    assert (two > 0).all()


def test_values_are_the_gradient() -> None:
    """With one channel and hand-set weights the gradient can be written down."""
    block = SMLPBlock(3, 4, 1, dtype=torch.float64)
    state = {name: torch.zeros_like(value) for name, value in block.state_dict().items()}
    state["proj_h.weight"] = torch.arange(9.0).view(3, 3)
    state["proj_w.weight"] = torch.arange(16.0).view(4, 4)
    state["fuse.weight"] = torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1, 1)
    block.load_state_dict(state)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[:, 2] += 2 * torch.tensor([3.0, 4.0, 5.0])  # row 1 of proj_h
    expected[1, :] += 3 * torch.tensor([8.0, 9.0, 10.0, 11.0])  # row 2 of proj_w
    expected[1, 2] += 5
    field = receptive_field(block, torch.randn(2, 1, 3, 4, dtype=torch.float64), seed=3)
    weights = torch.randn(2, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(field, expected * weights.abs().mean())


def test_network_in_training_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    """Batch statistics reach every pixel: in train mode even a 3x3 convolution would."""
    torch.manual_seed(0)
    local = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    local[2].eval()
    field = receptive_field(local, torch.randn(2, 3, 8, 8))
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[3:6, 3:6] = True
    assert torch.equal(field > 0, near)
    assert [module.training for module in local] == [True, True, False]
    assert local[0].num_batches_tracked == 0
    assert all(p.grad is None for p in local.parameters())


def test_patches_of_a_network() -> None:
    """Through a patch stem a pixel of the first stage sees a cross three patches wide."""
    torch.manual_seed(0)
    model = SparseMLP(image_size=28, patch_size=4, d_model=8, depth=(1,), num_classes=2).eval()
    field = receptive_field(lambda x: model.forward_features(x)[0], torch.randn(1, 3, 28, 28))
    reached = torch.zeros(28, 28, dtype=torch.bool)
    reached[8:20] = True  # 3 patches: the depthwise 3x3 comes first
    reached[:, 8:20] = True
    assert torch.equal(field > 0, reached)


def test_inside_no_grad() -> None:
    with torch.no_grad():
        assert receptive_field(SMLPBlock(3, 3, 2), torch.randn(1, 2, 3, 3)).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: receptive_field(nn.Identity(), torch.zeros(1, 2, 3)),
            ValueError,
            "inputs: expected shape [B, C, H, W], got [1, 2, 3]",
        ),
        (
            lambda: receptive_field(nn.Identity(), torch.zeros(0, 2, 3, 3)),
            ValueError,
            "inputs: expected shape [B, C, H, W], got [0, 2, 3, 3]",
        ),
        (
            lambda: receptive_field(nn.Identity(), torch.zeros(1, 2, 3, 3, dtype=torch.int32)),
            TypeError,
            "inputs: expected a floating-point tensor, got torch.int32",
        ),
        (
            lambda: receptive_field(nn.Flatten(), torch.zeros(1, 2, 3, 3)),
            ValueError,
            "model: expected it to return shape [B, C, H, W], got [1, 18]",
        ),
        (
            lambda: receptive_field(lambda x: [x], torch.zeros(1, 2, 3, 3)),
            TypeError,
            "model: expected it to return a tensor, got list",
        ),
        (
            lambda: receptive_field(torch.zeros_like, torch.zeros(1, 2, 3, 3)),
            ValueError,
            "model: expected an output that depends on its input",
        ),
        (
            lambda: receptive_field(nn.Identity(), torch.zeros(1, 2, 3, 4), position=(0.5, 1)),
            TypeError,
            "position: expected (row, column), got (0.5, 1)",
        ),
        (
            lambda: receptive_field(nn.Identity(), torch.zeros(1, 2, 3, 4), position=(3, 0)),
            ValueError,
            "position: expected a pixel inside the output's 3 rows and 4 columns, got (3, 0)",
        ),
        (
            lambda: draw_receptive_fields({}),
            ValueError,
            "fields: expected at least one receptive field, got none",
        ),
        (
            lambda: draw_receptive_fields({"a": torch.zeros(1, 3, 3)}),
            ValueError,
            "fields['a']: expected shape [H, W] and values of at least 0, got shape [1, 3, 3]",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_picture(tmp_path: Path) -> None:
    """Unreached pixels are white in the file, reached ones are not."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    field = torch.zeros(3, 3)
    field[1, 1] = 1.0
    figure = draw_receptive_fields({"one pixel": field}, "title")
    (axis,) = [axis for axis in figure.axes if axis.images]
    assert axis.get_title() == "one pixel\n11% of 3 x 3"
    figure.savefig(tmp_path / "field.png")
    pixels = image.imread(tmp_path / "field.png")[..., :3]
    box = axis.get_window_extent()
    left, top = int(box.x0), pixels.shape[0] - int(box.y1)
    cell = int(box.width / 3)
    colours = [
        [pixels[int(top + cell * (i + 0.5)), int(left + cell * (j + 0.5))] for j in range(3)]
        for i in range(3)
    ]
    white = [[bool((colour == 1).all()) for colour in row] for row in colours]
    assert white == [[True, True, True], [True, False, True], [True, True, True]]
