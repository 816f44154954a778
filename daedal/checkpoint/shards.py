"""The safetensors files of a checkpoint directory as one mapping from name to tensor.

Headers are read once; tensors come one by one from the memory map, so that reading a model needs no second copy of it.
The library checks that a header fits its file: sizes, overlaps, gaps, dtypes. What it finds, and what an index promises
but no file holds, is said with the file's name. Knows nothing of models.
"""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from daedal.checkpoint.index import INDEX, SINGLE, promised
from daedal.errors import CheckpointError

PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPES = MappingProxyType(
    {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        "I64": torch.int64,
    }
)


class Shards:
    """Read access to every tensor of a checkpoint. `files`: name of each tensor to the file that holds it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._open: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        expected = promised(directory)
        for file in sorted(set(expected.values())) or [SINGLE]:
            handle = _open(directory / file)
            self._open[file] = handle
            for name in _names(handle):
                if name in self.files:
                    message = f"tensor {name} is in {self.files[name]} and in {file}: fetch the checkpoint again"
                    raise CheckpointError(f"{directory}: {message}")
                self.files[name] = file
        for name, file in expected.items():
            if self.files.get(name) != file:
                message = f"{INDEX} promises {name} in {file}, which does not hold it: fetch the checkpoint again"
                raise CheckpointError(f"{directory}: {message}")

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The element type as stored. CheckpointError for one that no layout has."""
        stored = self._open[self.files[name]].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            message = f"tensor {name} is {stored}: Daedal reads {', '.join(_DTYPES)}"
            raise CheckpointError(f"{self.directory}: {message}; convert the file")
        return _DTYPES[stored]

    def read(self, name: str, place: tuple[int | slice, ...] = ()) -> Tensor:
        """The tensor as stored, on the CPU, mapped and not copied; with `place` a copy of that part of it."""
        file = self.files[name]
        try:
            handle = self._open[file]
            tensor: Tensor = handle.get_slice(name)[place] if place else handle.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
            message = f"tensor {name} in {self.directory / file} cannot be read ({error}): fetch the file again"
            raise CheckpointError(message) from error
        return tensor


def _names(handle: Any) -> list[str]:
    """The library's handle has no types of its own."""
    return list(handle.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}): fetch the file again") from error
