"""Predicted times of the shipped kernels, from counted work and the rates of a chip::

    python -m benchmarks.model [--shapes stages] [--dtype bf16] [--pass inference] [--chip H200]

A prediction is the largest of a launch's terms (see :mod:`benchmarks.traffic`), each its total over
the whole chip's rate; a pass adds up its launches. Programs run one on each SM at a time, as the
registers of the shipped tiles for sm_90 leave room for no second, so that all terms but that of
DRAM grow by what the last wave leaves idle. Nothing is charged for latency, fill or launch gaps, so
measurements are expected to lie above; which term is largest says what to change first. Compare
tiles with :func:`predict`, whose configuration may be any.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from benchmarks import shapes
from benchmarks.roofline import PASSES, Ceilings, floor_us
from benchmarks.shapes import DTYPES, LAYOUTS, Shape
from benchmarks.summary import geometric_mean
from benchmarks.traffic import (
    Work,
    fuse_grad_work,
    mix_work,
    proj_grad_work,
    project_work,
    sums_work,
)
from smlp_kernels.configs import (
    MixConfig,
    ProjectConfig,
    WeightGradConfig,
    has_long_axis,
    mix_config,
    project_config,
    weight_grad_config,
)

ARCH = 90


@dataclass(frozen=True)
class Chip:
    """Rates of a whole chip, per second.

    Attributes:
        sms: how many there are.
        dram: bytes, of a large copy.
        l2: bytes between L2 and all SMs.
        shared: bytes of all SMs' shared memory.
        matrix: flops of large products by dtype name; wgmma reaches this.
        mma: what mma.sync reaches of ``matrix``.
        instructions: warp instructions of all schedulers.
    """

    sms: int
    dram: float
    l2: float
    shared: float
    matrix: dict[str, float]
    mma: float
    instructions: float

    def with_ceilings(self, ceilings: Ceilings) -> "Chip":
        """The same chip with the rates that were measured in their place."""
        matrix = {**self.matrix, **ceilings.gemm_flops_per_s}
        return replace(self, dram=ceilings.copy_bytes_per_s, matrix=matrix)


_SMS, _HERTZ = 132, 1.755e9  # SXM; the clock is that of a long matrix product, below the boost
# Datasheet of the H200: 4.8 TB/s, 989 TFLOP/s bf16 and fp16, 495 tf32, 67 fp32 without tensor
# cores. Large copies reach about 0.9 of the former and large products 0.8 of the latter. L2: H100s
# were measured at 5.5 to 7 TB/s. Shared memory: 128 bytes per clock and SM; instructions: 4 per
# clock and SM. mma.sync: 62.9 % of the peak on average (arXiv 2402.13499).
H200 = Chip(
    sms=_SMS,
    dram=0.9 * 4.8e12,
    l2=5.5e12,
    shared=128 * _SMS * _HERTZ,
    matrix={"bf16": 0.8 * 989e12, "fp16": 0.8 * 989e12, "tf32": 0.8 * 495e12, "fp32": 0.8 * 67e12},
    mma=0.629,
    instructions=4 * _SMS * _HERTZ,
)
# The same chip with less memory: 3.35 TB/s.
H100 = replace(H200, dram=0.9 * 3.35e12)
CHIPS = {"H200": H200, "H100": H100}


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one launch by term, in :attr:`terms`; or of several, one after the other."""

    name: str
    terms: dict[str, float]

    @property
    def us(self) -> float:
        return self.terms[self.bound]

    @property
    def bound(self) -> str:
        """The term that takes longest."""
        return max(self.terms, key=self.terms.__getitem__)


def time_of(name: str, work: Work, programs: int, dtype: str, chip: Chip) -> Prediction:
    """What each part of the chip needs for ``work``, shared out among ``programs``.

    Raises:
        ValueError: for a dtype that ``chip`` has no rate for.
    """
    if dtype not in chip.matrix:
        raise ValueError(f"dtype: expected one of {', '.join(chip.matrix)}, got {dtype!r}")
    matrix = chip.matrix[dtype]
    # IEEE float32 has no matrix instructions, so no slower kind of them either
    mma = matrix if dtype == "fp32" else chip.mma * matrix
    waves = programs / chip.sms
    idle = ceil(waves) / waves
    seconds = {
        "DRAM": work.dram / chip.dram,
        "L2": idle * work.l2 / chip.l2,
        "shared memory": idle * work.shared / chip.shared,
        "tensor cores": idle * (work.wgmma / matrix + work.mma / mma),
        "issue slots": idle * work.instructions / chip.instructions,
    }
    return Prediction(name, {term: 1e6 * value for term, value in seconds.items()})


def predict(
    shape: Shape,
    dtype: str,
    config: MixConfig | ProjectConfig | WeightGradConfig,
    *,
    layout: str = "channels_last",
    chip: Chip = H200,
) -> list[Prediction]:
    """The launches that ``config`` is for: one, or the two weight-gradient kernels and the sums.

    Args:
        shape: of the input.
        dtype: a name in :data:`benchmarks.shapes.DTYPES`.
        config: shipped or a candidate.
        layout: of x and y; the weight gradients' traffic is counted for channels_last.
        chip: the rates.
    """
    batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
    if isinstance(config, MixConfig):
        programs = config.programs(batch, height, width, channels)
        launches = [("mix", mix_work(shape, dtype, config, layout), programs)]
    elif isinstance(config, ProjectConfig):
        programs = config.programs(batch, height, width, channels)
        launches = [("projection along H", project_work(shape, dtype, config, layout), programs)]
    else:
        proj_programs = config.proj_splits * sum(config.proj_blocks(height, width))
        fuse_programs = 3 * config.fuse_tiles(channels) * config.fuse_splits(channels)
        launches = [
            ("projection gradients", proj_grad_work(shape, dtype, config), proj_programs),
            ("fuse gradient", fuse_grad_work(shape, dtype, config), fuse_programs),
            # small programs, of which an SM runs many at a time: no last wave to speak of
            ("sums of both", sums_work(shape, dtype, config), chip.sms),
        ]
    return [time_of(name, work, programs, dtype, chip) for name, work, programs in launches]


def forward_configs(
    shape: Shape, dtype: str, arch: int = ARCH, layout: str = "channels_last"
) -> list[MixConfig | ProjectConfig]:
    """What a forward is launched with on a chip of compute capability ``arch`` / 10, in order."""
    height, width = shape.height, shape.width
    what = (height, width, shape.channels, DTYPES[dtype], arch, *_how(dtype, layout))
    return [*([project_config(*what)] if has_long_axis(height, width) else []), mix_config(*what)]


def weight_config(
    shape: Shape, dtype: str, arch: int = ARCH, layout: str = "channels_last"
) -> WeightGradConfig:
    """What the weights' gradients are launched with."""
    return weight_grad_config(shape.channels, DTYPES[dtype], arch, *_how(dtype, layout))


def _how(dtype: str, layout: str) -> tuple[str, bool]:
    """Precision of float32 products, and whether channels come last."""
    return "tf32" if dtype == "tf32" else "ieee", layout == "channels_last"


def predict_pass(
    shape: Shape,
    pass_: str,
    dtype: str,
    *,
    layout: str = "channels_last",
    chip: Chip = H200,
) -> list[Prediction]:
    """The launches of one of :data:`benchmarks.roofline.PASSES` as configured for sm_90."""
    if pass_ not in PASSES:
        raise ValueError(f"pass_: expected one of {', '.join(PASSES)}, got {pass_!r}")
    tiles = forward_configs(shape, dtype, layout=layout)
    forward = [p for tile in tiles for p in predict(shape, dtype, tile, layout=layout, chip=chip)]
    if pass_ in ("inference", "fwd"):
        return forward
    weights = weight_config(shape, dtype, layout=layout)
    backward = [*forward, *predict(shape, dtype, weights, chip=chip)]  # dx is a mix as well
    return backward if pass_ == "bwd" else [*forward, *backward]


def predicted_us(predictions: Sequence[Prediction]) -> float:
    """The time of launches one after the other."""
    return sum(prediction.us for prediction in predictions)


def main_bound(predictions: Sequence[Prediction]) -> str:
    """What binds the longest launch."""
    return max(predictions, key=lambda prediction: prediction.us).bound


def table(
    chosen: Sequence[Shape], pass_: str, dtype: str, layout: str, name: str = "H200"
) -> list[str]:
    """One line per launch with every term, one per shape with the sum and the floor, and shares."""
    chip = CHIPS[name]
    ceilings = Ceilings(chip.dram, chip.matrix, "the model's chip")
    terms = ("DRAM", "L2", "shared memory", "tensor cores", "issue slots")
    lines = [
        f"PREDICTIONS of a model, not measurements: {pass_}, {dtype}, {layout}, {name}; us",
        f"{'shape':<14} {'launch':<21} " + " ".join(f"{term:>13}" for term in terms) + "    total",
    ]
    shares = []
    for shape in chosen:
        found = predict_pass(shape, pass_, dtype, layout=layout, chip=chip)
        for launch in found:
            cells = " ".join(f"{launch.terms[term]:>13.1f}" for term in terms)
            lines.append(f"{shape.name:<14} {launch.name:<21} {cells} {launch.us:>8.1f}")
        total, floor = predicted_us(found), floor_us(shape, pass_, dtype, ceilings)
        shares.append(floor / total)
        lines.append(
            f"{shape.name:<14} {total:.1f} us, {floor / total:.0%} of a floor of {floor:.1f} us; "
            f"bound by {main_bound(found)}"
        )
    lines.append(
        f"share of the floor: geometric mean {geometric_mean(shares):.0%}, worst {min(shares):.0%}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="stages", help="comma-separated names or groups")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--layout", default="channels_last", choices=list(LAYOUTS))
    parser.add_argument("--pass", dest="pass_", default="inference", choices=PASSES)
    parser.add_argument("--chip", default="H200", choices=list(CHIPS))
    arguments = parser.parse_args()
    try:
        chosen = shapes.select(arguments.shapes.split(","))
    except ValueError as reason:
        raise SystemExit(str(reason)) from None
    print(
        "\n".join(table(chosen, arguments.pass_, arguments.dtype, arguments.layout, arguments.chip))
    )


if __name__ == "__main__":
    main()
