"""A CUDA graph without a GPU: the operators of a capture, called again with the same tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_capturing: list["CUDAGraph"] = []


class CUDAGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] | None = None

    def replay(self) -> None:
        """Call every operator, and write what it returns where the capture's result lies."""
        if self.calls is None or is_capturing():
            raise RuntimeError("CUDAGraph.replay: expected a graph after its capture")
        with torch.no_grad():
            for operator, arguments, options, outputs in self.calls:
                again = tree_leaves(operator(*arguments, **options))
                for output, value in zip(outputs, again, strict=True):
                    if isinstance(output, Tensor) and output.data_ptr() != value.data_ptr():
                        output.detach().copy_(value)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self._graph.calls is not None:
            self._graph.calls.append((func, args, kwargs, tree_leaves(outputs)))
        return outputs


@contextmanager
def capture(graph: CUDAGraph) -> Iterator[None]:
    """Record what is called inside into ``graph``."""
    if is_capturing() or graph.calls is not None:
        raise RuntimeError("CUDAGraph: expected a new graph, and no other capture")
    graph.calls = []
    _capturing.append(graph)
    try:
        with _Recorder(graph):
            yield
    finally:
        _capturing.pop()


def is_capturing() -> bool:
    return bool(_capturing)
