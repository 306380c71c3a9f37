"""Image files as networks take them: every mode and bit depth, upright, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smlp.images import image_files, load_image, read_image

Image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra's matplotlib")


def test_an_image_of_the_right_size_is_taken_pixel_by_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    colour = load_image(tmp_path / "colour.png", 3, (4, 6))
    assert torch.equal(colour, torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1))
    grey = load_image(tmp_path / "colour.png", 1, (4, 6))
    luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
    torch.testing.assert_close(
        grey[0], torch.einsum("chw,c->hw", colour, luma), atol=0.5 / 255 + 1e-3, rtol=0
    )


def test_a_wide_image_is_cut_at_its_sides(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 6:18] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png", 1, (4, 4)).min() == 1


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"image: expected an image file, got .*text\.png"):
        load_image(tmp_path / "text.png", 3, (4, 4))
    with pytest.raises(ValueError, match=r"image: expected an image file, .* No such file"):
        load_image(tmp_path / "none.png", 3, (4, 4))
    with pytest.raises(ValueError, match="image: expected a network of 1 or 3 input channels, got"):
        load_image(tmp_path / "text.png", 4, (4, 4))


RAMP = np.linspace(0, 1, 24).reshape(4, 6)


def whole(top: int, dtype: type) -> np.ndarray[Any, Any]:
    return (RAMP * top).round().astype(dtype)


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        pytest.param(whole(255, np.uint8), "grey.png", id="8 bits"),
        pytest.param(whole(2**16 - 1, np.uint16), "deep.png", id="16-bit PNG"),
        pytest.param(whole(2**16 - 1, np.uint16), "deep.pgm", id="16-bit PGM"),
        pytest.param(whole(2**16 - 1, np.uint16), "deep.tif", id="16-bit TIFF"),
        pytest.param(whole(2**31 - 1, np.int32), "deeper.tif", id="32-bit TIFF"),
        pytest.param(RAMP.astype(np.float32), "float.tif", id="float TIFF"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_scaled_from_the_range_of_their_type(
    pixels: np.ndarray[Any, Any], name: str, channels: int, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    image = load_image(tmp_path / name, channels, (4, 6))
    expected = torch.from_numpy(RAMP).float().expand(channels, 4, 6)
    torch.testing.assert_close(image, expected, atol=0.51 / 255, rtol=0)


def test_big_endian_pixels_are_scaled_too(tmp_path: Path) -> None:
    header = b"II*\0\x08\0\0\0"  # a TIFF written out: Pillow itself only writes its own byte order
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 122), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 4)]
    entries = b"".join(
        tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + count.to_bytes(4, "big")
        + (value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big"))
        for tag, kind, count, value in tags
    )  # fmt: skip
    header = b"MM\0*\0\0\0\x08" + len(tags).to_bytes(2, "big") + entries + bytes(4)
    assert len(header) == 122
    (tmp_path / "big.tif").write_bytes(header + np.array([0, 32768], ">u2").tobytes())
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    image = load_image(tmp_path / "big.tif", 1, (1, 2))
    torch.testing.assert_close(image[0, 0], torch.tensor([0.0, 0.5]), atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.array([[0.0, 255.0]], np.float32), r"float32 pixels go from 0\.0 to 255\.0, not .* 1"),
        (np.array([[0.0, np.nan]], np.float32), "float32 pixels go from nan to nan"),
        (np.array([[-5, 7]], np.int32), "int32 pixels go from -5 to 7, not from 0 to 65535"),
    ],
)
def test_pixels_outside_of_it_are_refused(
    pixels: np.ndarray[Any, Any], reason: str, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "odd.tif")
    with pytest.raises(
        ValueError, match=rf"image: expected an image file, got .*odd\.tif: .*{reason}"
    ):
        read_image(tmp_path / "odd.tif", 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_grey_or_colour(mode: str, tmp_path: Path) -> None:
    name = tmp_path / ("image.png" if mode not in ("CMYK", "YCbCr") else "image.jpg")
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(name, quality=100)
    for channels in (1, 3):
        image = load_image(name, channels, (2, 3))
        torch.testing.assert_close(image, torch.ones(channels, 2, 3), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_set_upright(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((2, 3), np.uint8)
    upright[0, 0], upright[0, 2] = 255, 128
    # How a camera stores it, by the EXIF standard: where row 0 and column 0 of the file lie.
    stored = {
        1: upright,
        2: upright[:, ::-1],  # row 0 at the top, column 0 at the right
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,  # row 0 at the left, column 0 at the top
        6: upright.T[::-1],  # row 0 at the right, column 0 at the top
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],  # row 0 at the left, column 0 at the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "photo.png", 1)), upright)


@pytest.mark.parametrize("name", ["whole.jpg", "whole.png", "whole.tif"])
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=rf"image: expected an image file, got .*{name}: "
    ) as error:
        read_image(tmp_path / name, 3)
    assert "\n" not in str(error.value)


def test_the_centre_alone_can_be_cut_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 1, (14, 14), crop=0.875)  # 14 of 16 rows
    assert torch.equal(image[0], torch.from_numpy(pixels[1:15, 5:19] / np.float32(255)))


def test_hidden_files_and_those_of_other_kinds_are_no_images(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a.png", "._a.png", ".cache/1.png", "notes.txt", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == [tmp_path / "a.png", tmp_path / "b" / "2.JPG"]
    with pytest.raises(OSError, match=r"No such file or directory: .*none"):
        image_files(tmp_path / "none")


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    for name in ("all/a", "all/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    for link, target in (("a/self", "."), ("a/other", "../b"), ("b/other", "../a"), ("c", "b")):
        (tmp_path / "all" / link).symlink_to(target)
    (tmp_path / "all" / "d").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(tmp_path / "all") for path in image_files(tmp_path / "all")]
    assert found == [Path("a/1.png"), Path("a/other/1.png"), Path("d/1.png")]
