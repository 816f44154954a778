"""What a model made of another has of it: the very numbers, under the same name or dealt out to experts, or near ones.

Found by comparing numbers, tensor by tensor and row by row, whatever the way from the one to the other was. Near are a
tensor that was trained on a little, queries that are mixtures of the original's, and the last matrix of an expert that
was fitted again. Knows names of dense models and of their experts, and no more.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daedal.checkpoint.row_mixtures import mixed, pursue
from daedal.checkpoint.shards import Shards

# A matrix of an expert, and the dense one that it may be a part of.
_OF_EXPERT = re.compile(r"(.*\.mlp\.)(?:experts\.\d+|shared_experts)\.((?:gate|up|down)_proj\.weight)")
_MIXED = 6  # rows that one is a mixture of: two of each frequency, and frequencies may be folded


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A tensor of the original, and which of its rows (axis 0) or columns (axis 1), int32; None is all."""

    source: str
    axis: int = 0
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Mixtures of the rows of a tensor of the original, see `row_mixtures`."""

    source: str
    places: Tensor
    weights: Tensor


class Original:
    """The checkpoint that a model was made of. Rows looked through last are remembered, since experts come in a row."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._places: dict[tuple[str, torch.dtype], dict[bytes, int]] = {}

    def find(self, name: str, tensor: Tensor) -> Place | None:
        """Where the original has the very same numbers; None where it has not."""
        alike = name in self._shards and self._shards.shape(name) == tuple(tensor.shape)
        if alike and _same(self._shards.read(name).to(tensor.dtype), tensor):
            return Place(source=name)
        match = _OF_EXPERT.fullmatch(name)
        if match is None or (source := match[1] + match[2]) not in self._shards:
            return None
        axis = int(match[2].startswith("down"))
        places = self._of(source, tensor.dtype, axis)
        found = [places.get(row) for row in _rows(tensor, axis)]
        if None in found:
            return None
        return Place(source=source, axis=axis, order=torch.tensor(found, dtype=torch.int32))

    def close(self, name: str, tensor: Tensor, model: Shards) -> Place | Mixture | None:
        """Where the original has numbers that are near: under the same name, as they are or in mixtures of rows; or of
        an expert's last matrix, the columns of the neurons that its first has.
        """
        if name in self._shards and self._shards.shape(name)[1:] == tuple(tensor.shape[1:]) != ():
            source = self._shards.read(name)
            if source.shape == tensor.shape:
                return Place(source=name) if _near(tensor, source) else None
            places, weights = pursue(tensor, source, _MIXED)
            near = _near(tensor, mixed(source, places, weights))
            return Mixture(source=name, places=places, weights=weights) if near else None
        match = _OF_EXPERT.fullmatch(name)
        if match is None or not match[2].startswith("down"):
            return None
        first = name.replace("down_proj", "gate_proj")
        rows = self.find(first, model.read(first))
        if rows is None or rows.order is None:
            return None
        found = replace(rows, source=match[1] + match[2], axis=1)
        return found if _near(tensor, self._shards.read(found.source).index_select(1, rows.order)) else None

    def _of(self, source: str, dtype: torch.dtype, axis: int) -> dict[bytes, int]:
        key = (source, dtype)
        if key not in self._places:
            owner = source.rsplit(".", 2)[0]
            self._places = {known: rows for known, rows in self._places.items() if known[0].startswith(f"{owner}.")}
            rows = _rows(self._shards.read(source).to(dtype), axis)
            self._places[key] = {row: place for place, row in enumerate(rows)}
        return self._places[key]


def _near(tensor: Tensor, other: Tensor) -> bool:
    """Whether the way from the other is worth less than the tensor itself: half its size, a bit for each number."""
    apart, size = (float(torch.linalg.vector_norm(vector.float())) for vector in (tensor - other, tensor))
    return apart < size / 2


def _rows(tensor: Tensor, axis: int) -> list[bytes]:
    """The bytes of each row, or column."""
    along = tensor if axis == 0 else tensor.T
    return [row.tobytes() for row in along.contiguous().view(torch.uint8).numpy()]


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)))
