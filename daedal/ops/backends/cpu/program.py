"""Calls of native kernels, run at once or kept to be run again.

A call is a list of 64-bit words: the kernel's number, how many arguments, then each argument: a tensor's address, an
integer, or the bits of a float. Running an op is running a program of one call. While a `Program` records, every call
is kept with the tensors that it names; replaying it runs all of them in one parallel region, on the same memory. Knows
no kernel's meaning.
"""

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from daedal.ops.backends.cpu.building import Unavailable, is_pending, library
from daedal.places import cache_directory

Argument = Tensor | int | float | None

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2, torch.int32: 3, torch.bool: 4}
LEVELS = ("amx", "avx512", "avx2", "dotprod", "generic")


class Native:
    """The compiled library, loaded."""

    def __init__(self, path: Path):
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"the compiled kernels cannot be loaded ({error}): delete {path}") from error
        self._library.daedal_level.restype = ctypes.c_char_p
        self._library.daedal_kernel.restype = ctypes.c_char_p
        self._library.daedal_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._library.daedal_run.restype = None
        self.kernels: dict[str, int] = {}
        while name := self._library.daedal_kernel(len(self.kernels)):
            self.kernels[name.decode()] = len(self.kernels)

    @property
    def level(self) -> str:
        """The instruction set in use: one of LEVELS."""
        name: bytes = self._library.daedal_level()
        return name.decode()

    def use(self, level: str | None) -> bool:
        """Chooses an instruction set, None the best; whether this CPU has it."""
        done: int = self._library.daedal_use(None if level is None else level.encode())
        return done == 0

    def run(self, words: "ctypes.Array[ctypes.c_int64]", threads: int | None = None) -> None:
        """threads: None for all of torch's."""
        self._library.daedal_run(ctypes.addressof(words), len(words), threads or torch.get_num_threads())


def _cache() -> Path:
    return cache_directory() / "native"


def pending() -> bool:
    """Whether the first use of a kernel will compile them all, which takes about a minute."""
    return is_pending(_cache())


@cache
def _load() -> Native | Unavailable:
    try:
        return Native(library(_cache()))
    except Unavailable as error:
        return error


def native() -> Native:
    """The library, compiled on the first call on a machine. Raises Unavailable."""
    found = _load()
    if isinstance(found, Unavailable):
        raise found
    return found


def missing() -> str | None:
    """Why there are no native kernels here; None where there are."""
    found = _load()
    return str(found) if isinstance(found, Unavailable) else None


class Program:
    """Calls in order, and the tensors whose memory they name."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._kept: list[Tensor] = []
        self._compiled: ctypes.Array[ctypes.c_int64] | None = None

    def add(self, words: list[int], tensors: list[Tensor]) -> None:
        self._words.extend(words)
        self._kept.extend(tensors)
        self._compiled = None

    def keep(self, tensor: Tensor) -> None:
        """Holds a tensor's memory for as long as the program lives."""
        self._kept.append(tensor)

    def replay(self) -> None:
        """Runs every call again, in one parallel region."""
        if self._compiled is None:
            self._compiled = (ctypes.c_int64 * len(self._words))(*self._words)
        native().run(self._compiled)


_recording: ContextVar[Program | None] = ContextVar("recording", default=None)


@contextmanager
def recording(program: Program) -> Iterator[Program]:
    """Every call inside the block is also added to `program`."""
    token = _recording.set(program)
    try:
        yield program
    finally:
        _recording.reset(token)


def recorder() -> Program | None:
    """The program that records, if one does."""
    return _recording.get()


def call(kernel: str, *arguments: Argument) -> None:
    """Runs one kernel on all of torch's threads. Tensors are passed by address: their shapes and strides are the
    caller's to pass, and to have checked.
    """
    library = native()
    words = [library.kernels[kernel], len(arguments)]
    tensors = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            words.append(argument.data_ptr())
            tensors.append(argument)
        elif isinstance(argument, float):
            words.append(_bits(argument))
        else:
            words.append(0 if argument is None else argument)
    library.run((ctypes.c_int64 * len(words))(*words))
    program = _recording.get()
    if program is not None:
        program.add(words, tensors)


@lru_cache
def _bits(value: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)
