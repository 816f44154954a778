"""Which files of a checkpoint directory hold which tensors, as its index says.

Opens no weights, knows neither models nor torch: other frameworks' runners find their files by it too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from daedal.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def promised(directory: Path) -> Mapping[str, str]:
    """Tensor name to file, from the index; empty for a checkpoint of one file. CheckpointError where neither is there,
    the index is none, or a file that it names is missing.
    """
    path = directory / INDEX
    if not path.exists():
        if not (directory / SINGLE).exists():
            message = f"{directory} has neither {SINGLE} nor {INDEX}: give a directory with safetensors weights"
            raise CheckpointError(message)
        return MappingProxyType({})
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and Path(file).name == file for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index ({error!r}): fetch the file again") from error
    if not plain or not weight_map:
        raise CheckpointError(f"{path} must map tensor names to plain file names: fetch the file again")
    for file in sorted(set(weight_map.values())):
        if not (directory / file).exists():
            raise CheckpointError(f"{directory} lacks {file}, which {INDEX} names: fetch the missing shard")
    return MappingProxyType(dict(weight_map))


def weight_files(directory: Path) -> list[str]:
    """The files that hold the weights, by name. CheckpointError as `promised`."""
    return sorted(set(promised(directory).values())) or [SINGLE]
