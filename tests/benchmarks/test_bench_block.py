"""``pytest benchmarks`` itself on a machine without a GPU: one screen, JSON, no interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import ROOT


def test_rehearsal(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={target}"]
    command += ["--shapes=rehearsal-7", "--dtypes=fp32", "--passes=inference,fwd"]
    # pytest-benchmark switches itself off where pytest-xdist's variables are seen
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    child = subprocess.run(
        command,
        cwd=ROOT,
        env={**env, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-2000:]
    lines = child.stdout.splitlines()
    assert len(lines) < 30 and "NOT performance results" in child.stdout
    assert "  shapes     rehearsal-7" in lines and "  layouts    channels_last" in lines
    assert "  fused needs an NVIDIA GPU" in lines and "Here, 10 benchmarks ran" in child.stdout
    assert lines[-1] == f"written: {target}"
    run = json.loads(target.read_text())
    timed = {entry["extra_info"]["provider"] for entry in run["benchmarks"]}
    assert timed == {"eager_nchw", "eager_nhwc", "handwritten"}
    assert run["is_performance"] is False and run["ceilings"] is None
    assert run["machine_info"]["smlp"]["torch"]


def test_an_unknown_shape_is_named() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--shapes=huge", "-q"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode != 0 and "shapes: expected one of" in child.stdout
