"""A plugin of pytest's for rehearsals: smaller tensors, and nothing that takes kernels or a GPU."""

from typing import Any

import pytest

LARGEST = 8  # of height, width and channels
NEEDS_A_GPU = {
    "test_out_of_memory_leaves_the_next_call_healthy": "needs memory that has an end",
    "test_swap_difference_is_that_of_direct_evaluation": "needs kernels, which round otherwise",
    "test_without_the_images_package_it_says_so": "has other images here",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.name.partition("[")[0]
        if name in NEEDS_A_GPU:
            item.add_marker(pytest.mark.skip(reason=NEEDS_A_GPU[name]))
    for module in {item.module for item in items if hasattr(item, "module")}:
        if hasattr(module, "random_arguments"):
            module.random_arguments = smaller(module.random_arguments)


def smaller(random_arguments: Any) -> Any:
    """Arguments of a block that is at most so large."""

    def make(shape: tuple[int, int, int], dtype: Any, batch: int) -> Any:
        return random_arguments(tuple(min(size, LARGEST) for size in shape), dtype, batch)

    return make
