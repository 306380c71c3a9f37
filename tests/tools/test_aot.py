"""Every shipped configuration, compiled for every chip it is shipped for; no chip is needed.

Compiling has to happen outside of Triton's interpreter, which this process may be in: one run of
``python -m tools.aot_report`` compiles everything, and each case is a test of its rows. Without
``--complete`` it compiles one shape of each kind for two chips.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest

from tools import aot_report
from tools.aot import (
    SHARED_MEMORY,
    TENSOR_MEMORY_COLUMNS,
    Resources,
    loop_instructions,
)
from tools.aot_report import Case, shipped_cases

NAMES = {
    "forward, along H", "forward, along W", "forward, axes", "forward, layout",
    "forward, narrow along H", "forward, narrow along W",
    "backward, along H", "backward, along W", "backward, layout", "backward, sums",
    "backward, narrow along H", "backward, narrow along W",
}  # fmt: skip
# https://docs.nvidia.com/cuda/cuda-c-programming-guide, maximum shared memory of a thread block
LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


QUICK_ARCHS = (80, 90)
QUICK = shipped_cases(QUICK_ARCHS, quick=True)


@pytest.fixture(scope="module")
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot_report", "--json", str(path)]
    if not request.config.getoption("--complete"):
        command += ["--quick", "--arch", *map(str, QUICK_ARCHS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not path.exists():
        pytest.fail(f"{' '.join(command)} wrote nothing:\n{result.stdout}\n{result.stderr}")
    by_case = defaultdict(list)
    for row in json.loads(path.read_text()):
        by_case[Case(**{name: row[name] for name in Case.__dataclass_fields__})].append(row)
    return by_case


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK else pytest.mark.complete)
        for case in shipped_cases()
    ],
    ids=str,
)
def test_shipped(case: Case, rows: dict[Case, list[dict[str, Any]]]) -> None:
    kernels = {row["kernel"] for row in rows[case]}
    assert {"backward, sums"} <= kernels <= NAMES
    for row in rows[case]:
        assert row["shared"] <= LIMIT_KIB[case.arch] * 1024, row
        assert row["tensor_memory"] <= 512, row
        assert row["loop_spills"] <= (48 if "backward, narrow" in row["kernel"] else 0), row
        assert not row["serialized"], row
        assert row["registers"] <= 255, row
        assert row["loop_stores"] >= 0 and row["loop_loads"] >= 0, row
        assert not row["problems"], row
        if row["kernel"].endswith(("sums", "layout")):
            assert row["spills"] == 0 and not row["matrix"], row
        elif case.dtype in ("bf16", "fp16", "tf32"):
            assert row["matrix"], f"no tensor cores: {row}"
        if case.dtype == "fp32":
            assert not row["matrix"], f"IEEE float32 is not computed on tensor cores: {row}"


def test_every_chip_and_type_is_covered() -> None:
    cases = shipped_cases()
    assert set(QUICK) < set(cases)
    assert {case.arch for case in cases} == set(LIMIT_KIB) == set(SHARED_MEMORY)
    for arch in LIMIT_KIB:
        types = {case.dtype for case in cases if case.arch == arch}
        assert types == {"bf16", "fp16", "tf32", "fp32", "fp64"}
        assert {case.channels_last for case in cases if case.arch == arch} == {True, False}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared": 99 * 1024 + 1}, "shared memory 101377 of 101376 bytes"),
        ({"tensor_memory": TENSOR_MEMORY_COLUMNS + 1}, "tensor memory 513 of 512 columns"),
        ({"loop_spills": 2}, "2 local-memory instructions in loops"),
        ({"serialized": True}, "wgmma serialized"),
        *[
            (
                {"instructions": Counter({"LDG": 8, name: 1})},
                f"asynchronous copies ({name}), whose pipeline may overwrite what a pending wgmma "
                "still reads (triton-lang/triton#6691)",
            )
            for name in ("LDGSTS", "UTMALDG", "UBLKCP")
        ],
    ],
)
def test_problems_are_named(change: dict[str, Any], problem: str) -> None:
    healthy: dict[str, Any] = dict(
        registers=128, spills=16, loop_spills=0, loop_stores=8, loop_loads=8, shared=99 * 1024,
        tensor_memory=512, serialized=False, instructions=Counter(LDG=8),
    )  # fmt: skip
    assert Resources(**healthy).problems(86) == []
    assert Resources(**healthy | {"loop_spills": 2}, loop_spills_allowed=2).problems(86) == []
    assert Resources(**healthy | change).problems(86) == [problem]


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STS.128 [R2], R4 ;
.L_x_2:
        /*0020*/                   STS [R2+0x10], R4 ;
.L_x_1:
        /*0030*/              @!P0 LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R2], [R6.64] ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   LDS R5, [R2] ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4) ;
"""


def test_instructions_in_loops() -> None:
    found = loop_instructions(SASS)
    # in the nested loops, each once; STS.128 comes before them, LDS after
    assert found["STS"] == found["LDSM"] == found["STL"] == found["LDGSTS"] == 1
    assert found["LDS"] == 0 and found["MOV"] == 0
    # the three branches of the loops, and what ends a program: a branch to itself
    assert found["BRA"] == 4


ROW: dict[str, Any] = dict(
    kernel="forward", height=14, width=12, channels=384, dtype="bf16", channels_last=True,
    arch=90, registers=248, spills=16, loop_spills=2, loop_stores=4, loop_loads=35,
    shared=88 * 1024, tensor_memory=0, serialized=False, matrix={"HGMMA": 6, "HMMA": 16},
    instructions=4000, warps=8, programs=768, problems=["2 local-memory instructions in loops"],
)  # fmt: skip


def test_rows_as_a_person_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = ROW | {"problems": [], "matrix": {}, "channels_last": False}
    assert aot_report.cells_of(ROW) == {
        "chip": "sm_90",
        "block": "14x12 C 384",
        "type": "bf16",
        "layout": "NHWC",
        "kernel": "forward",
        "registers": "248",
        "spilled, in loops": "16 B, 2",
        "shared memory": "88 KiB",
        "its stores, loads in loops": "4, 35",
        "matrix instructions": "HGMMA 6 HMMA 16",
        "problems": "2 local-memory instructions in loops",
    }
    good = aot_report.cells_of(healthy)
    assert good["layout"] == "NCHW"
    assert (good["matrix instructions"], good["problems"]) == ("none", "")
    monkeypatch.setattr(aot_report, "compile_cases", lambda cases: iter([ROW, healthy]))
    assert aot_report.main([]) == 1
    *_, empty, summary = capsys.readouterr().out.splitlines()
    assert (empty, summary) == ("", "2 kernels, 1 of them not to be shipped")
    monkeypatch.setattr(aot_report, "compile_cases", lambda cases: iter([healthy]))
    assert aot_report.main([]) == 0


def test_plain_lines_are_aligned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ROW | {"channels": 2048, "kernel": "backward along H", "loop_loads": 137}
    monkeypatch.setattr(aot_report, "compile_cases", lambda cases: iter([ROW, other]))
    aot_report.main([])
    header, *lines, _, _ = capsys.readouterr().out.splitlines()
    for column, value in (
        ("kernel", "forward|back"),
        ("registers", "248"),
        ("problems", "2 local"),
    ):
        assert all(re.match(value, line[header.index(column) :]) for line in lines)
