"""Memory that code would take on a GPU, counted without one: tensors with shapes and no data, and their live bytes.

`MemoryMeter` counts the storages that are alive, as a GPU's allocator does: weights, gradients, what a backward pass
keeps, and what a layer needs while it computes. `without_data` runs code on PyTorch's fake tensors. They are on the
CPU, because a backward pass on another device needs that device; autocast follows CUDA's rules. Where the code asks for
a value, it gets the one that needs most memory: a mask is true everywhere. Not counted are what a convolution needs
inside its kernel, the context of CUDA, and gaps between blocks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 512  # bytes; CUDA's allocator rounds every tensor up to whole blocks


class MemoryMeter(TorchDispatchMode):
    """Inside the context, counts the bytes of all storages that operations make.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once since the beginning, or since `restart`.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._counted = WeakIdKeyDictionary()

    def restart(self) -> None:
        """From now on, the peak is that of what follows."""
        self.peak = self.live

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it dies; a view shares that of its base."""
        if storage not in self._counted:
            self._counted[storage] = size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


class _WorstCase(TorchDispatchMode):
    """Answers what depends on data: a number is 1, a comparison holds, a mask is true everywhere."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            kind = arguments[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if function in (aten.equal.default, aten.allclose.default):
            return True
        if function is aten.nonzero.default:
            [mask] = arguments
            return mask.new_zeros((mask.numel(), mask.ndim), dtype=torch.long)
        if function is aten.index.Tensor:
            tensor, indices = arguments
            arguments = tensor, [position for index in indices for position in _positions(index)]
        return function(*arguments, **(named or {}))


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """What a mask that is true everywhere chooses, one tensor of positions a dimension; other indices as they are."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_zeros(index.numel(), dtype=torch.long)] * index.ndim


def _ones(tensor: Tensor, **_) -> np.ndarray:
    return np.ones(tuple(tensor.shape), np.float32)


def _in_float32(function: Callable) -> Callable:
    """The function as CUDA's autocast calls it: on float32; a CPU's leaves it in half precision."""

    @wraps(function)
    def wrapped(values, *arguments, **named):
        if torch.is_autocast_enabled("cpu") and values.is_floating_point():
            values = values.float()
        return function(values, *arguments, **named)

    return wrapped


@contextlib.contextmanager
def without_data() -> Iterator[MemoryMeter]:
    """Inside the context tensors have shapes and no data; yields the meter that counts them."""
    with contextlib.ExitStack() as stack:
        for name in ("group_norm", "layer_norm", "softmax", "log_softmax"):
            stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        for name, values in (("numpy", _ones), ("__format__", lambda tensor, form: format(1, form))):  # as `_WorstCase`
            stack.enter_context(mock.patch.object(Tensor, name, values))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        meter = stack.enter_context(MemoryMeter())
        stack.enter_context(_WorstCase())
        yield meter
