"""The layers of a network one by one, and the picture of its feature maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from smlp import SMLPNet, SparseMLP
from smlp.features import UpToLayer, layers, receptive_fields
from smlp.network import PyramidNetwork
from smlp.pictures import draw_feature_maps

Image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra's matplotlib")


def test_layers_follow_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 16, 8)
    paper = SMLPNet((16, 8), 2, 1, 3, d_model=4, depth=(2, 1)).eval()
    port = SparseMLP((16, 8), 2, 1, 3, d_model=4, depth=(2, 1)).eval()
    assert layers(paper) == [paper.stages[0][1], paper.stages[0][2], paper.stages[1][1]]
    assert layers(port) == [*port.layers[0].model, *port.layers[1].model]
    with torch.no_grad():
        first = port.layers[0].model[0](port.patcher(x))
        assert torch.equal(UpToLayer(port, 1)(x), first)
        for network in (paper, port):
            one, two = network.forward_features(x)
            assert torch.equal(UpToLayer(network, 2)(x), one)
            assert torch.equal(UpToLayer(network, 3)(x), two)


def test_only_our_networks_have_layers() -> None:
    with pytest.raises(TypeError, match="network: expected a SparseMLP or an SMLPNet, got Linear"):
        layers(nn.Linear(2, 2))  # type: ignore[arg-type]
    network = SparseMLP(4, 1, 1, 3, d_model=4, depth=(2, 1))
    for depth in (0, 4, 1.5):
        with pytest.raises(ValueError, match=f"depth: expected 1 to 3 layers, got {depth}"):
            UpToLayer(network, depth)


@pytest.mark.parametrize("build", [SMLPNet, SparseMLP])
def test_one_layer_sees_a_cross_of_three_patches_and_two_see_everything(
    build: type[PyramidNetwork],
) -> None:
    torch.manual_seed(0)
    network = build((20, 30), 2, 1, 3, d_model=6, depth=(2,))  # type: ignore[call-arg]
    fields = receptive_fields(network, torch.randn(2, 1, 20, 30), [1, 2])
    expected = torch.zeros(20, 30, dtype=torch.bool)
    # The pixel (5, 7) of the 10 x 15 map; the depthwise convolution adds a patch on either side.
    expected[2 * 4 : 2 * 7] = True
    expected[:, 2 * 6 : 2 * 9] = True
    assert torch.equal(fields[1] > 0, expected)
    assert (fields[2] > 0).all()


def test_the_picture_shows_the_channels_that_vary_most(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the demo extra")
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 3.0, 0.0, 1.0])[:, None, None]
    maps = torch.randn(4, 5, 7) * scale + torch.tensor([0.0, 0.0, 50.0, 0.0])[:, None, None]
    image = torch.rand(3, 20, 28)
    figure = draw_feature_maps(image, {"stage 1": maps, "stage 2": maps[:1]}, channels=3, title="T")
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert len(shown) == 1 + 3 + 1
    np.testing.assert_array_equal(shown[0], image.permute(1, 2, 0).numpy())
    for picture, channel in zip(shown[1:], (1, 3, 0, 0), strict=True):
        np.testing.assert_array_equal(picture, maps[channel].numpy())
    assert [axis.get_xlabel() for axis in figure.axes[1:4]] == [f"channel {i}" for i in (1, 3, 0)]
    assert figure.axes[4].get_ylabel() == "stage 2"
    figure.savefig(tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as written:
        assert written.size == tuple(int(150 * inches) for inches in figure.get_size_inches())


def test_many_maps_of_a_stage_fill_several_rows() -> None:
    image, maps = torch.rand(1, 8, 8), torch.randn(30, 2, 2)
    figure = draw_feature_maps(image, {"a": maps, "b": maps[:14]}, channels=26)
    cells = [axis.get_subplotspec() for axis in figure.axes[1:]]
    places = [(cell.rowspan.start, cell.colspan.start) for cell in cells if cell is not None]
    # 26 in rows of 12, the other stage in rows of its own
    rows = [(0, 12), (1, 12), (2, 2), (3, 12), (4, 2)]
    assert places == [(row, 1 + column) for row, count in rows for column in range(count)]
    assert max(figure.get_size_inches()) < 20


def test_pictures_of_the_wrong_shape_are_refused_by_name() -> None:
    maps, image = torch.zeros(2, 4, 4), torch.zeros(1, 8, 8)
    with pytest.raises(
        ValueError, match=r"image: expected shape \[1 or 3, H, W\], got \[2, 8, 8\]"
    ):
        draw_feature_maps(torch.zeros(2, 8, 8), {"a": maps})
    with pytest.raises(
        ValueError, match=r"stages\['a'\]: expected shape \[C, h, w\], got \[4, 4\]"
    ):
        draw_feature_maps(image, {"a": maps[0]})
    for stages, channels in (({}, 3), ({"a": maps}, 0)):
        with pytest.raises(ValueError, match="stages, channels: expected at least one of each"):
            draw_feature_maps(image, stages, channels=channels)
