"""Kernels of other chips in the interpreter, whose chip is 0."""

import contextlib
from collections.abc import Iterator

import pytest

from smlp_kernels.kernels import backward, mix, narrow


@contextlib.contextmanager
def narrow_kernel_here(programs: int) -> Iterator[None]:
    """Blocks of few channels take ``narrow_kernel`` here, too."""
    plans = (mix.mix_plan, backward.backward_plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "ARCHS", (0, *narrow.ARCHS))
        patch.setattr(narrow, "PROGRAMS", programs)
        for cached in plans:
            cached.cache_clear()
        yield
    for cached in plans:
        cached.cache_clear()
