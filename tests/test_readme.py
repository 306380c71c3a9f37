"""The README's Python runs as it stands, and the commands it names exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


@pytest.mark.parametrize("block", BLOCKS[:-1], ids=lambda block: block.splitlines()[1])
def test_python(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_from_data_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs the demo extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from smlp.cli import main

    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^smlp .*$", README, re.M)
    assert len(commands) == 5
    for command in commands:
        _, *arguments = shlex.split(command, comments=True)
        short = ["--epochs", "2", "--no-progress"] if arguments[0] == "train" else []
        assert main([*arguments, *short]) == 0, command
    exec(compile(BLOCKS[-1], "README.md", "exec"), {})
    assert {"digits.onnx", "larger.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_swapping_takes_ten_lines() -> None:
    assert "fuse_model(model)" in BLOCKS[0]
    assert len(BLOCKS[0].splitlines()) <= 10


def test_commands_exist() -> None:
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test", "bench", "gpu-report", "lint"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), f"make {target}"
    modules = set(re.findall(r"python -m ([a-z_.]+)", README))
    assert {"smlp_kernels.env_report", "smlp_kernels.aot_report"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), f"python -m {module}"


def test_smlp_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from smlp.cli import main

    named = set(re.findall(r"(?:`|^)smlp ([a-z]+)", README, re.M))
    assert {"train", "info", "fields", "features", "ablations", "export"} <= named
    assert {"evaluate", "predict"} <= named
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"usage: smlp {command}" in capsys.readouterr().out
