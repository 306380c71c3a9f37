"""Targets of the fused block, and whether a report's numbers reach them.

A target that nothing was measured for is neither reached nor missed. Where only some of the shapes
were measured, or torch.compile is missing among the competitors, the verdict says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from benchmarks.shapes import BY_NAME, DEMO, GROWTH, STAGES
from smlp.tables import markdown_table

Result = Callable[[str], dict[str, Any] | None]  # of a measurement by name; None: not measured

# x and y of the larger stages do not fit the L2
DRAM_SHAPES = BY_NAME["small-28"], BY_NAME["small-56"]


@dataclass(frozen=True)
class Target:
    """A number that must be reached, and what was measured.

    Attributes:
        name: what is measured.
        must: the bound.
        value: what was measured; None: nothing was.
        remark: what to know about the value.
        at_most: whether the bound is the largest value allowed, else the smallest.
        form: format of bound and value, such as ``"{:.0%}"``.
    """

    name: str
    must: float
    value: float | None
    remark: str = ""
    at_most: bool = False
    form: str = "{:.2f}x"

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.must if self.at_most else self.value >= self.must

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, requirement, value, verdict and remark, as text."""
        required = f"{'<=' if self.at_most else '>='} {self.form.format(self.must)}"
        value = "-" if self.value is None else self.form.format(self.value)
        verdict = {True: "pass", False: "MISS", None: "-"}[self.passed]
        remark = self.remark or ("not measured" if self.value is None else "")
        return self.name, required, value, verdict, remark


def verdicts(rows: Sequence[dict[str, Any]], result: Result) -> list[Target]:
    """Every target against a report.

    Args:
        rows: of the block, as from :func:`benchmarks.rows.make_row`.
        result: what any other measurement recorded, by its name.
    """
    share, ratio = "share_of_floor", "over_best_torch"
    return [
        _tests(result),
        *_of_shapes(rows, "inference", share, "forward, share of floor", (0.42, 0.30)),
        *_of_shapes(rows, "inference", ratio, "forward over best torch", (1.8, 1.1)),
        *_of_shapes(rows, "fwd+bwd", share, "fwd+bwd, share of floor", (0.30, 0.22)),
        *_of_shapes(rows, "fwd+bwd", ratio, "fwd+bwd over best torch", (1.5, 1.05)),
        *_of_shapes(rows, "inference", ratio, "forward over best torch, tf32", (1.5,), "tf32"),
        *_of_shapes(
            rows, "inference", ratio, "forward over best torch, nchw", (1.7,), layout="nchw"
        ),
        *_dram(result),
        *_memory(result),
        _host(result),
        *_first_call(result),
        *_network(result),
        _growth(rows),
        _demo(rows),
    ]


def _fused(
    rows: Sequence[dict[str, Any]], pass_: str, dtype: str, layout: str
) -> dict[str, dict[str, Any]]:
    """Rows of the fused block by shape."""
    wanted = {"provider": "fused", "pass": pass_, "dtype": dtype, "layout": layout}
    return {row["shape"]: row for row in rows if wanted.items() <= row.items()}


def _of_shapes(
    rows: Sequence[dict[str, Any]],
    pass_: str,
    key: str,
    name: str,
    bounds: tuple[float, ...],
    dtype: str = "bf16",
    layout: str = "channels_last",
) -> list[Target]:
    """Geometric mean and, if a second bound is given, worst of ``key`` over the stage shapes."""
    found = _fused(rows, pass_, dtype, layout)
    found = {s.name: found[s.name] for s in STAGES if found.get(s.name, {}).get(key) is not None}
    form = "{:.0%}" if key == "share_of_floor" else "{:.2f}x"
    values = {name: row[key] for name, row in found.items()}
    remarks = []
    if 0 < len(values) < len(STAGES):
        remarks.append(f"{len(values)} of {len(STAGES)} shapes")
    bare = [n for n, row in found.items() if "compiled" not in row.get("speedup_over", {})]
    if key == "over_best_torch" and bare:
        remarks.append(f"without torch.compile on {len(bare)} of {len(values)}")
    mean = geometric_mean(values.values()) if values else None
    made = [Target(f"{name}: geometric mean", bounds[0], mean, "; ".join(remarks), form=form)]
    for bound in bounds[1:]:
        worst = min(values, key=values.__getitem__, default="")
        remark = "; ".join([worst, *remarks])
        made.append(Target(f"{name}: worst", bound, values.get(worst), remark, form=form))
    return made


def _tests(result: Result) -> Target:
    found, value, remark = result("tests on the GPU"), None, ""
    if found:
        remark = f"{found['passed']} passed, {found['skipped']} skipped"
        if found.get("skips"):
            remark += "; NOT RUN: " + ", ".join(found["skips"])
        if found["passed"]:  # else nothing failed because nothing ran
            value = len(found["failures"])
    return Target("tests on the GPU that fail", 0, value, remark, at_most=True, form="{:.0f}")


def _dram(result: Result) -> list[Target]:
    made = []
    for shape in DRAM_SHAPES:
        found = result(f"DRAM bytes {shape.name}")
        name = f"DRAM bytes over x + weights + y, {shape}"
        made.append(Target(name, 1.3, found and found["over_ideal"], at_most=True))
    return made


def _memory(result: Result) -> list[Target]:
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
        worst = max(ratios, key=ratios.__getitem__, default="")
        made.append(Target(f"{name}: worst", must, ratios.get(worst), worst, True, "{:.2f}"))
    return made


def _host(result: Result) -> Target:
    found = result("host time")
    value = found and found["fused"]["inference"] - found["empty_function"]
    name = "host time of a forward beyond an empty Function"
    return Target(name, 30.0, value, at_most=True, form="{:.0f} us")


def _first_call(result: Result) -> list[Target]:
    found = result("first call") or {}
    made = []
    for state, must in (("warm", 1.0), ("cold", 10.0)):
        seconds = found.get(state)
        remark = (
            f"import {seconds['import']:.1f} s before, "
            f"first backward {seconds['first backward']:.1f} s after it"
            if seconds
            else ""
        )
        name = f"first forward of a process, {state} cache"
        value = seconds and seconds["first forward"]
        made.append(Target(name, must, value, remark, at_most=True, form="{:.1f} s"))
    return made


def _network(result: Result) -> list[Target]:
    made = []
    for measurement, how, must in (
        ("network", "eager", 1.3),
        ("network compiled", "both compiled", 1.1),
    ):
        found = result(measurement)
        remark = f"logits differ by {found['logits_difference']:.1e}" if found else ""
        name = f"training step of SparseMLP, fused over plain, {how}"
        made.append(Target(name, must, found and found["training"]["speedup"], remark))
    return made


def _growth(rows: Sequence[dict[str, Any]]) -> Target:
    """How much more the time grows with H = W, at a fixed number of pixels, than the floor does."""
    value, remark = None, ""
    found = _fused(rows, "inference", "bf16", "channels_last")
    if all(shape.name in found for shape in GROWTH):
        shares = {shape.height: found[shape.name]["share_of_floor"] for shape in GROWTH}
        smallest, worst = min(shares), min(shares, key=shares.__getitem__)
        value, remark = shares[smallest] / shares[worst], f"from {smallest} to {worst}"
    name = "growth of time over growth of floor, C = 96, H = W to 224"
    return Target(name, 1.5, value, remark, at_most=True)


def _demo(rows: Sequence[dict[str, Any]]) -> Target:
    row = _fused(rows, "inference", "fp32", "nchw").get(DEMO.name, {})
    return Target(f"forward over best torch, {DEMO}, fp32", 1.5, row.get("over_best_torch"))


def table(judged: Sequence[Target]) -> list[str]:
    """The targets as a Markdown table."""
    head = ("target", "must", "measured", "verdict", "remark")
    return markdown_table(head, [one.cells() for one in judged])
