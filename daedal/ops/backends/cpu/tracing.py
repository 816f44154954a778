"""Records a whole forward pass as one program of native kernels.

The model runs once, as it is written, on tensors that will hold the inputs of every later step. Native ops add their
calls to the program. What PyTorch computes in between is watched: plain operations on recorded tensors (sums, copies,
gathers) become native calls too; what depends on no input is a constant and stays as it came out; views need nothing,
since all memory stays where it is. Anything else raises `Unrecordable`, so a program is complete or does not exist.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from daedal.ops.backends.cpu.elementwise import binary, concatenate, convert, gather, peaks, scatter, unary
from daedal.ops.backends.cpu.program import Program, recording
from daedal.ops.rows import Unrecordable

_EMPTY = ("empty", "empty_strided", "new_empty", "empty_like")
# Views that torch does not mark as such.
_VIEWS = ("_unsafe_view", "_reshape_alias", "lift_fresh", "detach_")


@contextmanager
def trace(program: Program, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Inside this context everything that is computed from `inputs` is recorded in `program`.

    Memory made by `torch.empty` inside it belongs to the step as well: kernels write it. Raises Unrecordable.
    """
    for tensor in inputs:
        program.keep(tensor)
    with recording(program), _Watch(program, {_memory(tensor) for tensor in inputs}):
        yield


class _Watch(TorchDispatchMode):
    """Sees every operation of PyTorch. live: the memory that differs from step to step, by address."""

    def __init__(self, program: Program, live: set[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._program = program
        self._live = live
        self._constant: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """By default a mode imports the compiler of torch on first use: seconds, and 90 MB, for nothing here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            split = func.decompose(*args, **kwargs)
        if split is not NotImplemented:
            return split
        result = self._lower(func, args, kwargs)
        for tensor in _tensors(result):
            self._program.keep(tensor)
        return result

    def _lower(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in _VIEWS:
            return func(*args, **kwargs)
        operands = {_memory(tensor) for tensor in _tensors((args, tuple(kwargs.values())))}
        if name in _EMPTY:
            result = func(*args, **kwargs)
            self._live.add(_memory(result))
        elif operands & self._live:
            lower = _LOWERED.get(name)
            if lower is None:
                raise Unrecordable(f"{func} has no native form")
            result = lower(*args, **kwargs)
            self._live.update(_memory(tensor) for tensor in _tensors(result))
        elif func._schema.is_mutable and _memory(args[0]) not in self._constant:
            raise Unrecordable(f"{func} changes memory that is no part of the step")
        else:
            result = func(*args, **kwargs)
            self._constant.update(_memory(tensor) for tensor in _tensors(result))
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _sum(sign: str) -> Callable[..., Tensor]:
    def lowered(x: Tensor, y: Tensor | float, *, alpha: float = 1) -> Tensor:
        if alpha != 1:
            raise Unrecordable(f"{sign} with alpha={alpha} has no native form")
        return binary(sign, x, y)

    return lowered


def _clone(x: Tensor, *, memory_format: Any = None) -> Tensor:
    return convert(x, x.dtype)


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
    return convert(x, dtype or x.dtype)


def _embedding(table: Tensor, index: Tensor, *others: Any) -> Tensor:
    return gather(table, index)


def _index_select(table: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim != 0:
        raise Unrecordable("index_select along another axis than the first has no native form")
    return gather(table, index)


def _index(table: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    (index, *others) = indices
    if others or index is None or index.dtype != torch.int64:
        raise Unrecordable("indexing by anything but one int64 tensor has no native form")
    return gather(table, index)


def _index_copy(table: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    if dim != 0:
        raise Unrecordable("index_copy_ along another axis than the first has no native form")
    scatter(table, index, rows)
    return table


def _max(x: Tensor, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if dim not in (-1, x.dim() - 1) or keepdim:
        raise Unrecordable("a maximum along any axis but the last has no native form")
    return peaks(x)


_LOWERED: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = MappingProxyType(
    {
        "add": _sum("add"),
        "sub": _sum("sub"),
        "mul": lambda x, y: binary("mul", x, y),
        "div": lambda x, y: binary("div", x, y),
        "cos": lambda x: unary("cos", x),
        "sin": lambda x: unary("sin", x),
        "neg": lambda x: unary("neg", x),
        "sigmoid": lambda x: unary("sigmoid", x),
        "clone": _clone,
        "_to_copy": _to_copy,
        "max": _max,
        "cat": lambda parts, dim=0: concatenate(parts, dim),
        "embedding": _embedding,
        "index_select": _index_select,
        "index": _index,
        "index_copy_": _index_copy,
    }
)
