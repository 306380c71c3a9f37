"""The tables' numbers against hand arithmetic on invented rows."""

import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import tables, write


@pytest.fixture
def rows(row) -> list[dict]:
    return [
        *(row("small-14", who, us) for who, us in (("eager_nchw", 300.0), ("fused", 60.0))),
        row("small-14", "compiled", 150.0),
        *(row("base-7", who, us) for who, us in (("eager_nchw", 120.0), ("fused", 120.0))),
        row("base-7", "compiled", 150.0),
    ]


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"| {start}"))
    return [text.strip() for text in line.split("|")[1:-1]]


def test_table(rows: list[dict]) -> None:
    lines = tables(rows)
    head = "**inference, bf16, channels_last** (GPU microseconds; samples spread by 1.2% at most)"
    assert lines[0] == head
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # columns line up
    assert cells(lines, "[B")[:5] == ["[B, C, H, W]", "eager_nchw", "compiled", "fused", "floor"]
    size = "[128, 384, 14, 14]"
    assert cells(lines, "small") == [
        *(f"small-14 {size}", "300.0", "150.0", "60.0", "30.0", "50%", "2.50x (compiled)")
    ]
    assert cells(lines, "base")[-2:] == ["25%", "1.00x (eager_nchw)"]
    # sqrt(0.5 * 0.25) = 0.354, sqrt(2.5 * 1) = 1.58
    assert cells(lines, "geometric")[-2:] == ["35%, 25%", "1.58x, 1.00x"]


def test_means_are_those_of_the_stages(rows: list[dict], row) -> None:
    """What is no stage has a table after theirs, and each pass has its own."""
    others = [row("square-64", "fused", 3000.0), row("small-14", "fused", 99.0, "fwd+bwd")]
    lines = tables([*others, *rows])
    titles = [line.partition("**")[2].partition("**")[0] for line in lines if "**" in line]
    assert titles == [
        "inference, bf16, channels_last, other shapes",
        "inference, bf16, channels_last",
        "fwd+bwd, bf16, channels_last",
    ]
    assert tables(rows)[1:] == lines[lines.index(tables(rows)[0]) + 1 :][: len(tables(rows)) - 1]


def test_only_columns_that_hold_something(rows: list[dict], row) -> None:
    lines = tables([one for one in rows if one["provider"] != "fused"])
    assert cells(lines, "[B") == ["[B, C, H, W]", "eager_nchw", "compiled", "floor"]
    assert not any("geometric" in line for line in lines)
    lines = tables([row("small-14", "fused", 60.0), row("base-7", "eager_nchw", 9.0)])
    assert cells(lines, "base")[1:] == ["9.0", "-", "30.0", "-"]
    assert tables([]) == []


def test_other_quantities_have_no_floor(rows: list[dict]) -> None:
    lines = tables(rows, "host_us")
    assert lines[0].endswith("(host microseconds)")
    assert cells(lines, "small")[1:] == ["50.0", "50.0", "50.0"]
    assert tables(rows, "kept_mb") == []  # nothing has it


def test_page_and_picture(rows: list[dict], tmp_path: Path) -> None:
    page, picture = write(tmp_path / "out", ["one", "two"], rows, "a GPU")
    assert page.read_text() == "one\ntwo\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert write(tmp_path / "none", ["one"], [], "") == [tmp_path / "none" / "report.md"]


def test_the_picture_shows_shares_of_every_provider(
    rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda _: None)
    report.draw(rows, "a GPU", tmp_path / "a.png")
    (axis,) = plt.gcf().axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axis.containers}
    plt.close("all")
    assert heights["fused"] == pytest.approx([50, 25])
    assert heights["eager_nchw"] == pytest.approx([10, 25]) and len(heights) == 3


def test_without_matplotlib_the_page_is_written(
    rows: list[dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write(tmp_path, ["one"], rows, "") == [tmp_path / "report.md"]
    assert "no picture: import of matplotlib halted" in capsys.readouterr().out
