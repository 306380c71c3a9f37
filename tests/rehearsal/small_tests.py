"""A plugin of pytest's for rehearsals: fewer and smaller cases, and none that takes a GPU."""

from collections import Counter
from typing import Any

import pytest

LARGEST = 8  # of height, width and channels
CASES = 3  # of a test marked gpu; they differ in sizes, which are all made small
NEEDS_A_GPU = {
    "test_out_of_memory_leaves_the_next_call_healthy": "needs memory that has an end",
    "test_logits_are_compared_with_direct_evaluation": "needs kernels, which round otherwise",
    "test_a_missing_package_is_named_first": "has other images here",
}


@pytest.hookimpl(trylast=True)  # when the others' choice is made
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] += 1
        if "gpu" not in item.keywords or seen[name] <= CASES:
            kept.append(item)
        if reason := NEEDS_A_GPU.get(name.rpartition("::")[2]):
            item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = kept
    for module in {item.module for item in items if hasattr(item, "module")}:
        if hasattr(module, "random_arguments"):
            module.random_arguments = smaller(module.random_arguments)


def smaller(random_arguments: Any) -> Any:
    """Arguments of a block that is at most so large."""

    def make(shape: tuple[int, int, int], dtype: Any, batch: int) -> Any:
        return random_arguments(tuple(min(size, LARGEST) for size in shape), dtype, batch)

    return make
