"""The README's table from invented results, and its one line where there are none."""

from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.readme_table import NOTHING, readme_table


def test_table(tmp_path: Path, write_results) -> None:
    gpu_report.conclude(write_results(tmp_path), tmp_path, "a command")
    lines = readme_table(tmp_path).splitlines()
    assert "gpu invented, commit abc; ceilings measured on invented" in lines[0]
    assert "| [128, 384, 14, 14] | 60.0 | 50% | 2.00x (compiled) | - | - | - |" in lines
    assert "| geometric mean |  | 50% | 2.00x |  | - | - |" in lines
    assert any(line.startswith("| forward over best torch: worst | >= 1.10x |") for line in lines)


def test_folder_or_file(tmp_path: Path, write_results) -> None:
    gpu_report.conclude(write_results(tmp_path), tmp_path, "a command")
    assert readme_table(tmp_path / "report.json") == readme_table(tmp_path)
    alone = tmp_path / "elsewhere" / "named.json"  # without the folder's other results
    alone.parent.mkdir()
    alone.write_text((tmp_path / "report.json").read_text())
    lines = readme_table(alone).splitlines()
    assert "| [128, 384, 14, 14] | 60.0 | 50% | 2.00x (compiled) | - | - | - |" in lines
    assert any(
        line.startswith("| forward over best torch: worst | >= 1.10x | 2.00x") for line in lines
    )
    with pytest.raises(ValueError, match="report: expected a folder or a file, found nothing at"):
        readme_table(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_nothing_measured(tmp_path: Path) -> None:
    assert readme_table(tmp_path) == NOTHING
    rehearsal = tmp_path / "report.json"
    rehearsal.write_text('{"environment": {}, "ceilings": null, "rows": []}')
    assert readme_table(tmp_path) == NOTHING


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON of pytest benchmarks or of gpu_report"):
        readme_table(tmp_path)
