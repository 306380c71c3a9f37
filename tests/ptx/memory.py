"""Which memory was written, of every tensor that is made while kernels run on the executor."""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ptx.launch import extent

UNWRITTEN = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
}  # fmt: skip
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # 1st factor
OPERATORS = "smlp_kernels"  # run here, so that what they allocate is seen too
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class WatchedMemory(TorchDispatchMode):
    """Tensors made inside are outputs and full of NaN until they are written; others are inputs.

    Writes of PyTorch's operators are seen here, those of kernels by the executor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[int, np.ndarray] = {}  # by address of the storage
        self.kept: list[Any] = []  # so that no address is used again

    def written(self, tensor: Tensor) -> np.ndarray | None:
        """A byte for each byte from the tensor's first on, 0: never written; None: an input."""
        found = self.maps.get(address_of(tensor))
        return None if found is None else found[offset(tensor) :]

    def unwritten(self, tensor: Tensor) -> int:
        """How many elements of a tensor were never written."""
        if self.written(tensor) is None:
            return 0
        return int((self._elements(tensor) == 0).any(-1).sum())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OPERATORS:
            with self:
                return func.redispatch(CPU, *args, **kwargs)
        name = func._schema.name.rpartition(":")[2]
        result = func(*as_tensor_cores_take(name, args), **kwargs)
        given = {address_of(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            if address_of(tensor) not in given:  # else it is an argument or a view of one
                self._made(tensor.untyped_storage(), name not in UNWRITTEN)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._changed(argument, value)
        for argument in func._schema.arguments:
            self._changed(argument, kwargs.get(argument.name))
        return result

    def _made(self, storage: torch.UntypedStorage, written: bool) -> None:
        if not storage.nbytes():
            return
        self.kept.append(storage)
        self.maps[storage.data_ptr()] = np.full(storage.nbytes(), written, np.uint8)
        if not written:
            ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())  # NaN in every type

    def _changed(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            if self.written(tensor) is not None:
                self._elements(tensor)[...] = 1

    def _elements(self, tensor: Tensor) -> np.ndarray:
        """The map of a tensor's elements [..., bytes of one]."""
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        found = self.maps[address_of(tensor)]
        return np.lib.stride_tricks.as_strided(
            found[offset(tensor) : offset(tensor) + extent(tensor)],
            (*tensor.shape, size),
            (*strides, 1),
        )


def as_tensor_cores_take(name: str, args: tuple) -> tuple:
    """Arguments of PyTorch's products, float32 factors cut off to TF32 where a GPU would do so."""
    first = PRODUCTS.get(name)
    if first is None or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return args
    factors = (to_tf32(a) if a.dtype == torch.float32 else a for a in args[first : first + 2])
    return (*args[:first], *factors, *args[first + 2 :])


def to_tf32(x: Tensor) -> Tensor:
    """Without the 13 low bits of the mantissa, which tensor cores do not read."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def address_of(tensor: Tensor) -> int:
    """Of the first byte of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def offset(tensor: Tensor) -> int:
    """Bytes from the start of a tensor's storage to its first element."""
    return tensor.data_ptr() - address_of(tensor)
