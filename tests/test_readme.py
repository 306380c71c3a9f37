"""The documents: their Python runs, what they name exists, their picture is what is recorded."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs import passes

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md")))
}
ALL = "\n".join(TEXTS.values())
MAKEFILE = (ROOT / "Makefile").read_text()
FOLDERS = ("smlp", "smlp_kernels", "tests", "benchmarks", "docs", "examples", "tools")
FILES = [f"/{path.relative_to(ROOT)}" for name in FOLDERS for path in (ROOT / name).rglob("*.py")]


def python_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)


SWAP = python_of("README.md")[0]
*NETWORKS, AFTER_TRAINING = python_of("docs/networks.md")


@pytest.mark.parametrize("block", [SWAP, *NETWORKS], ids=lambda block: block.splitlines()[1])
def test_python(block: str) -> None:
    exec(compile(block, "a document", "exec"), {})


def test_from_data_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs the demo extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from smlp.cli import main

    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^smlp .*$", TEXTS["docs/networks.md"], re.M)
    assert len(commands) == 5
    for command in commands:
        _, *arguments = shlex.split(command, comments=True)
        short = ["--epochs", "2", "--no-progress"] if arguments[0] == "train" else []
        assert main([*arguments, *short]) == 0, command
    exec(compile(AFTER_TRAINING, "docs/networks.md", "exec"), {})
    assert {"digits.onnx", "larger.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_swapping_takes_ten_lines() -> None:
    assert "fuse_model(model)" in SWAP
    assert len(SWAP.splitlines()) <= 10


def test_commands_exist() -> None:
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"[`\n]make .*", ALL))))
    assert {"demo", "test", "lint", "gpu-day"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), f"make {target}"
    modules = set(re.findall(r"python -m ([a-z_.]+)", ALL))
    assert {"smlp_kernels.env_report", "tools.aot_report"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), f"python -m {module}"


def test_smlp_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from smlp.cli import main

    named = set(re.findall(r"(?:`|^)smlp ([a-z]+)", ALL, re.M))
    assert {"train", "info", "fields", "features", "ablations", "export"} <= named
    assert {"evaluate", "predict"} <= named
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"usage: smlp {command}" in capsys.readouterr().out


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        linked = (ROOT / name).parent / path if path else ROOT / name
        assert linked.exists(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, target


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name: str) -> None:
    for file in re.findall(r"`([\w/]+\.py)[`:]", TEXTS[name]):
        assert any(known.endswith(f"/{file}") for known in FILES), file


def test_names_of_the_api_exist() -> None:
    named = set(re.findall(r"`((?:smlp|smlp_kernels)\.[\w.]+)", TEXTS["README.md"]))
    assert {"smlp.SMLPBlock", "smlp_kernels.table.add_row"} <= named
    # in a process of its own: here, other tests have imported more than these two
    code = f"import smlp, smlp_kernels; print({', '.join(sorted(named))})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_picture_shows_what_eager_pytorch_does() -> None:
    steps = passes.recorded_steps()
    assert passes.drawing(steps) == passes.PICTURE.read_text(), "python -m docs.passes"
    assert f"![{passes.passes(steps)} passes " in TEXTS["README.md"]


def test_extras_are_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`.*?`) \|", TEXTS["docs/networks.md"], re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(project["optional-dependencies"])


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", TEXTS["CHANGELOG.md"], re.M)
