"""Writes a checkpoint directory: sharded safetensors or packed weights, config.json, and small files that belong to it.

What a reader trusts is moved into place last: all files are written to a hidden folder of the directory and flushed to
disk, then renamed, weights before the index, the index before config.json. A crash before the renames leaves what was
there, and the folder, which the next write removes. No more than one shard is in memory. Knows nothing of models.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from daedal.checkpoint.index import INDEX, SINGLE
from daedal.checkpoint.packed_files import FOLDER
from daedal.checkpoint.staging import sync
from daedal.config import ModelConfig
from daedal.errors import CheckpointError

SHARD_BYTES = 4 * 2**30
STAGING = ".daedal-partial"  # where files lie until all of them are whole


@dataclass(frozen=True)
class Planned:
    """Tensors that go into one shard together. nbytes: of all of them; make: their names and contents, when due."""

    nbytes: int
    make: Callable[[], Mapping[str, Tensor]]


def published_config(config: ModelConfig) -> dict[str, object]:
    """The contents of config.json; a number format of experts is named only where there is one."""
    published = config.to_published()
    if config.expert_dtype is None:
        published.pop("expert_dtype", None)
    return published


def write_checkpoint(
    directory: Path,
    published: Mapping[str, object],
    plan: Sequence[Planned],
    *,
    shard_bytes: int,
    others: Mapping[str, Path] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Makes `directory` a checkpoint of what is planned, in order, with `published` as its config.json.

    shard_bytes: a file's size at most, unless one entry alone is larger. others: files to copy, by their names there.
    progress: called with (entries done, entries in all). Files of other kinds that lie there are left alone; weights of
    before vanish.
    """
    publish(directory, published, partial(_write_shards, plan, shard_bytes, progress), others=others)


def publish(
    directory: Path,
    published: Mapping[str, object],
    write: Callable[[Path], list[str]],
    *,
    others: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """As `write_checkpoint`, of weights that `write` puts into the folder that it is given; it returns their names, in
    the order in which they are to be moved.
    """
    staging = directory / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        files = [*_copy(staging, others), *write(staging), "config.json"]
        _write_json(staging / "config.json", published)
        _flush(staging, files)
        _move(staging, directory, files)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written ({error}): free space or choose another place") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in (*directory.glob("model*.safetensors*"), *directory.glob(f"{FOLDER}/*")):
        if old.relative_to(directory).as_posix() not in files:
            old.unlink()


def _copy(staging: Path, others: Mapping[str, Path]) -> list[str]:
    for name, other in others.items():
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(other, staging / name)
    return list(others)


def _flush(staging: Path, files: Sequence[str]) -> None:
    """To disk, and readable by whoever may read config.json: the library writes for its owner alone."""
    readable = (staging / "config.json").stat().st_mode
    for file in files:
        (staging / file).chmod(readable)
        sync(staging / file)


def _write_shards(
    plan: Sequence[Planned], shard_bytes: int, progress: Callable[[int, int], None], staging: Path
) -> list[str]:
    shards = _in_shards(plan, shard_bytes)
    files, done = [], 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in shard:
            tensors |= entry.make()
            done += 1
            progress(done, len(plan))
        save_file(tensors, staging / file, metadata={"format": "pt"})
        files.append(file)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in plan)
        _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    return files


def _move(staging: Path, directory: Path, files: Sequence[str]) -> None:
    """Renames all files to where they belong, in order."""
    if INDEX not in files:
        (directory / INDEX).unlink(missing_ok=True)
    for file in files:
        (directory / file).parent.mkdir(exist_ok=True)
        os.replace(staging / file, directory / file)
    sync(directory)


def _in_shards(plan: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for entry in plan:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
