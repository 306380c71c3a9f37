"""What the fused block has to reach, and whether a report's numbers do.

A target that nothing was measured for is neither reached nor missed. Where only some of the shapes
were measured, or torch.compile is missing among the competitors, the verdict says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import DEMO, GROWTH, STAGES
from benchmarks.summary import geometric_mean

Row = dict[str, Any]
Result = Callable[[str], dict[str, Any] | None]  # of a measurement by name; None: not measured

DRAM_SHAPES = tuple(
    shape for shape in STAGES if shape.name in ("small-56", "small-28")
)  # x and y of the larger stages do not fit the L2


@dataclass(frozen=True)
class Target:
    """A number that must be reached.

    Attributes:
        name: what is measured.
        must: the bound.
        at_most: whether the bound is the largest value allowed, else the smallest.
        form: format of bound and value, such as ``"{:.0%}"``.
    """

    name: str
    must: float
    at_most: bool = False
    form: str = "{:.2f}x"

    def required(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.form.format(self.must)}"

    def judge(self, value: float | None, remark: str = "") -> "Verdict":
        if value is None:
            return Verdict(self, None, remark or "not measured")
        return Verdict(self, value, remark)


@dataclass(frozen=True)
class Verdict:
    """A target, the value that was measured (None: none was), and what to know about it."""

    target: Target
    value: float | None
    remark: str = ""

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        if self.target.at_most:
            return self.value <= self.target.must
        return self.value >= self.target.must

    @property
    def word(self) -> str:
        return {True: "pass", False: "MISS", None: "-"}[self.passed]

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, requirement, value, verdict and remark, as text."""
        value = "-" if self.value is None else self.target.form.format(self.value)
        return self.target.name, self.target.required(), value, self.word, self.remark


def verdicts(rows: Sequence[Row], result: Result) -> list[Verdict]:
    """Every target against a report.

    Args:
        rows: of the block, as from :func:`benchmarks.rows.make_row`.
        result: what any other measurement recorded, by its name.
    """
    return [
        _tests(result),
        *_of_shapes(rows, "inference", "share_of_floor", "forward, share of floor", (0.42, 0.30)),
        *_of_shapes(rows, "inference", "over_best_torch", "forward over best torch", (1.8, 1.1)),
        *_of_shapes(rows, "fwd+bwd", "share_of_floor", "fwd+bwd, share of floor", (0.30, 0.22)),
        *_of_shapes(rows, "fwd+bwd", "over_best_torch", "fwd+bwd over best torch", (1.5, 1.05)),
        *_of_shapes(
            rows, "inference", "over_best_torch", "forward over best torch, tf32", (1.5,), "tf32"
        ),
        *_of_shapes(
            rows,
            "inference",
            "over_best_torch",
            "forward over best torch, nchw",
            (1.7,),
            layout="nchw",
        ),
        *_dram(result),
        *_memory(result),
        _host(result),
        *_first_call(result),
        *_network(result),
        _growth(rows),
        _demo(rows),
    ]


def _fused(rows: Sequence[Row], pass_: str, dtype: str, layout: str) -> dict[str, Row]:
    """Rows of the fused block by shape."""
    wanted = {"provider": "fused", "pass": pass_, "dtype": dtype, "layout": layout}
    return {row["shape"]: row for row in rows if wanted.items() <= row.items()}


def _of_shapes(
    rows: Sequence[Row],
    pass_: str,
    key: str,
    name: str,
    bounds: tuple[float, ...],
    dtype: str = "bf16",
    layout: str = "channels_last",
) -> list[Verdict]:
    """Geometric mean and, if a second bound is given, worst of ``key`` over the stage shapes."""
    found = _fused(rows, pass_, dtype, layout)
    found = {s.name: found[s.name] for s in STAGES if found.get(s.name, {}).get(key) is not None}
    form = "{:.0%}" if key == "share_of_floor" else "{:.2f}x"
    values = {name: row[key] for name, row in found.items()}
    remarks = []
    if 0 < len(values) < len(STAGES):
        remarks.append(f"{len(values)} of {len(STAGES)} shapes")
    if key == "over_best_torch" and values:
        bare = [n for n, row in found.items() if "compiled" not in row.get("speedup_over", {})]
        if bare:
            remarks.append(f"without torch.compile on {len(bare)} of {len(values)}")
    mean = Target(f"{name}: geometric mean", bounds[0], form=form)
    made = [
        mean.judge(geometric_mean(list(values.values())) if values else None, "; ".join(remarks))
    ]
    for bound in bounds[1:]:
        worst = min(values, key=values.__getitem__, default=None)
        target = Target(f"{name}: worst", bound, form=form)
        at = [worst] if worst else []
        made.append(target.judge(values[worst] if worst else None, "; ".join([*at, *remarks])))
    return made


def _tests(result: Result) -> Verdict:
    target = Target("tests on the GPU that fail", 0, at_most=True, form="{:.0f}")
    found = result("tests on the GPU")
    if not found:
        return target.judge(None)
    remark = f"{found['passed']} passed, {found['skipped']} skipped"
    if found.get("skips"):
        remark += "; NOT RUN: " + ", ".join(found["skips"])
    if not found["passed"]:  # nothing failed, for nothing ran
        return target.judge(None, remark)
    return target.judge(len(found["failures"]), remark)


def _dram(result: Result) -> list[Verdict]:
    made = []
    for shape in DRAM_SHAPES:
        target = Target(f"DRAM bytes over x + weights + y, {shape}", 1.3, at_most=True)
        found = result(f"DRAM bytes {shape.name}")
        made.append(target.judge(found and found["over_ideal"]))
    return made


def _memory(result: Result) -> list[Verdict]:
    made = []
    for key, name, must in (
        ("kept", "memory kept for backward over eager's", 1 / 3),
        ("peak", "peak memory of fwd+bwd over eager's", 1 / 2),
    ):
        ratios = {
            shape.name: found["fused"][key] / found["eager_nhwc"][key]
            for shape in STAGES
            if (found := result(f"memory {shape.name}"))
        }
        worst = max(ratios, key=ratios.__getitem__, default=None)
        target = Target(f"{name}: worst", must, at_most=True, form="{:.2f}")
        made.append(target.judge(ratios[worst] if worst else None, worst or ""))
    return made


def _host(result: Result) -> Verdict:
    target = Target("host time of a forward beyond an empty Function", 30.0, True, "{:.0f} us")
    found = result("host time")
    return target.judge(found and found["fused"]["inference"] - found["empty_function"])


def _first_call(result: Result) -> list[Verdict]:
    found = result("first call") or {}
    made = []
    for state, must in (("warm", 1.0), ("cold", 10.0)):
        seconds = found.get(state)
        target = Target(f"first forward of a process, {state} cache", must, True, "{:.1f} s")
        remark = (
            f"import {seconds['import']:.1f} s before, "
            f"first backward {seconds['first backward']:.1f} s after it"
            if seconds
            else ""
        )
        made.append(target.judge(seconds and seconds["first forward"], remark))
    return made


def _network(result: Result) -> list[Verdict]:
    made = []
    for measurement, name, must in (
        ("network", "training step of SparseMLP, fused over plain, eager", 1.3),
        ("network compiled", "training step of SparseMLP, fused over plain, both compiled", 1.1),
    ):
        found = result(measurement)
        remark = f"logits differ by {found['logits_difference']:.1e}" if found else ""
        made.append(Target(name, must).judge(found and found["training"]["speedup"], remark))
    return made


def _growth(rows: Sequence[Row]) -> Verdict:
    """How much more the time grows with H = W, at a fixed number of pixels, than the floor does."""
    target = Target("growth of time over growth of floor, C = 96, H = W to 224", 1.5, True)
    found = _fused(rows, "inference", "bf16", "channels_last")
    if any(shape.name not in found for shape in GROWTH):
        return target.judge(None)
    shares = {shape.height: found[shape.name]["share_of_floor"] for shape in GROWTH}
    smallest = shares[min(shares)]
    worst = max(shares, key=lambda side: smallest / shares[side])
    return target.judge(smallest / shares[worst], f"from {min(shares)} to {worst}")


def _demo(rows: Sequence[Row]) -> Verdict:
    row = _fused(rows, "inference", "fp32", "nchw").get(DEMO.name, {})
    return Target(f"forward over best torch, {DEMO}, fp32", 1.5).judge(row.get("over_best_torch"))


def lines(judged: Sequence[Verdict]) -> list[str]:
    """A text table."""
    texts = [("target", "must", "measured", "", "remark"), *(one.cells() for one in judged)]
    widths = [max(len(text[column]) for text in texts) for column in range(4)]
    return [
        "  ".join([*(t.ljust(w) for t, w in zip(text, widths, strict=False)), text[4]]).rstrip()
        for text in texts
    ]


def markdown(judged: Sequence[Verdict]) -> list[str]:
    """A Markdown table."""
    head = ["| target | must | measured | verdict | remark |", "|---|---|---|---|---|"]
    return head + [f"| {' | '.join(one.cells())} |" for one in judged]
