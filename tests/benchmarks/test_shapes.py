"""The twelve stage shapes are the published networks', and selection is by name."""

import pytest

from benchmarks.shapes import BY_NAME, STAGES, Shape, select


def test_stages_are_the_published_widths_at_batch_128() -> None:
    published = {
        "tiny": {56: 80, 28: 160, 14: 320, 7: 640},
        "small": {56: 96, 28: 192, 14: 384, 7: 768},
        "base": {56: 112, 28: 224, 14: 448, 7: 896},
    }
    expected = {
        f"{model}-{side}": (128, width, side, side)
        for model, stages in published.items()
        for side, width in stages.items()
    }
    assert {s.name: (s.batch, s.channels, s.height, s.width) for s in STAGES} == expected


def test_the_number_of_elements() -> None:
    assert Shape("odd", 2, 3, 5, 7).elements == 2 * 3 * 5 * 7


def test_selection_by_group_and_name_keeps_order_and_drops_repeats() -> None:
    assert [s.name for s in select(["base-14", "base"])] == [
        "base-14",
        "base-56",
        "base-28",
        "base-7",
    ]
    assert select(["demo-224"]) == (BY_NAME["demo-224"],)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"shapes: expected one of .*stages.*got 'huge'"):
        select(["huge"])


def test_empty_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        Shape("none", 1, 0, 7, 7)
