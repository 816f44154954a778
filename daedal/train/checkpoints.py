"""Checkpoints to go on from: written while training goes on, whole or not at all, readable on any number of processes.

    DIRECTORY/latest                     the name of the checkpoint to go on from
    DIRECTORY/step-00000100/
        manifest.json                    step, what the run wants to remember, and every file with its size
        shard-….safetensors              each process's parts, by `torch.distributed.checkpoint`

A save copies the state and returns; a thread writes the copy into a hidden folder, flushes it, adds the manifest,
renames the folder, then `latest`, then removes what is older. Killed at any moment, what `latest` names is whole. Parts
say where in their tensor they belong, so any layout reads what another wrote. Files are safetensors and JSON: nothing
in a checkpoint is code. All processes see one directory. Knows no recipe.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from daedal.checkpoint.save import save as save_stock
from daedal.checkpoint.staging import sync
from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.model.transformer import empty
from daedal.train.bounds import whole
from daedal.train.optimizer import Optimizers
from daedal.train.owners import local

FORMAT = "daedal-training-1"
LATEST, MANIFEST = "latest", "manifest.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A whole checkpoint. step: how many were taken. extra: what the run wanted to remember."""

    path: Path
    step: int
    extra: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run in `directory`, of which the newest `keep` stay.

    Where processes form a group, all make theirs at once and call the same methods. Leftovers of a run that was killed
    are removed now; no other run may be writing here.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2):
        self.directory, self.keep = Path(directory), whole("keep", keep, low=1)
        # Its own, since a thread exchanges here what to write while training exchanges gradients.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="daedal-checkpoints")
        self._writing: Future[None] | None = None
        self._step: int | None = None
        self._alike(self._clean)

    @property
    def is_writer(self) -> bool:
        """Whether this process does what one must do for all."""
        return self._group is None or dist.get_rank(self._group) == 0

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, extra: Mapping[str, Any] | None = None) -> None:
        """Copies everything now and writes it in the background. step: how many were taken. extra: for JSON.

        Waits for the save before it, whose CheckpointError it raises. A step that is the latest already is left alone.
        """
        described = json.dumps({"format": FORMAT, "step": step, "extra": extra or {}})
        self.wait()
        if step == self._step:
            return
        snapshot = _Snapshot(_state(model, optimizers))
        self._writing = self._thread.submit(self._write, step, snapshot, described)
        self._step = step

    def wait(self) -> None:
        """Until what was saved is on the disk. CheckpointError where it could not be: what was latest still is."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:
                self._step = None
                raise

    def close(self) -> None:
        """As `wait`, for the last time."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def latest(self) -> Saved | None:
        """None where nothing was saved yet. CheckpointError where what should be there is damaged."""
        return _described(self.directory)

    def load_latest(self, model: nn.Module, optimizers: Optimizers | None = None) -> Saved | None:
        """Fills a model, and what updates it, in place; None where nothing was saved yet.

        The model may be whole, sharded otherwise than the saved one, or a stage of it; so may what updates it.
        """
        self.wait()
        found: Saved | None = self._alike(self.latest)
        if found is not None:
            _read(found.path, model, optimizers, self._group)
            self._step = found.step
        return found

    def _alike(self, work: Any) -> Any:
        """What `work` gives in the first process, for all; its CheckpointError too."""
        outcome: list[Any] = [None, None]
        if self.is_writer:
            try:
                outcome[0] = work()
            except CheckpointError as error:
                outcome[1] = str(error)
            except Exception as error:  # whatever it is, the others wait to be told
                outcome[1] = f"{self.directory} cannot be used for checkpoints ({error}): name another directory"
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
        return outcome[0]

    def _clean(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _write(self, step: int, snapshot: "_Snapshot", described: str) -> None:
        """In the thread, on all processes at once."""
        name = f"step-{step:08d}"
        staging = self.directory / f".{name}.partial"
        try:
            _expect_one_process()
            writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
            save_parts(
                {}, storage_writer=writer, planner=snapshot, process_group=self._group, no_dist=self._group is None
            )
            self._alike(lambda: self._publish(staging, name, described))
        except (Exception, CheckpointException) as error:
            if self.is_writer:
                shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.directory} ({_cause(error)}): free space "
                "or look at the disk; the checkpoint before it is whole, and what to go on from"
            ) from error

    def _publish(self, staging: Path, name: str, described: str) -> None:
        """From files that are written to the checkpoint that `latest` names."""
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        manifest = staging / MANIFEST
        manifest.write_text(json.dumps(json.loads(described) | {"files": files}, indent=1), encoding="utf-8")
        for path in sorted(staging.iterdir()):
            sync(path)
        sync(staging)
        target = self.directory / name
        if target.exists():
            # Not what `latest` names, or it would not be written again.
            shutil.rmtree(target)
        staging.rename(target)
        sync(self.directory)
        self._point(name)
        for old in sorted(self.directory.glob("step-*"))[: -self.keep]:
            if old.name < name:
                shutil.rmtree(old)

    def _point(self, name: str) -> None:
        pointer = self.directory / f".{LATEST}.partial"
        pointer.write_text(name + "\n", encoding="utf-8")
        sync(pointer)
        os.replace(pointer, self.directory / LATEST)
        sync(self.directory)


def export(directory: Path | str, config: ModelConfig, target: Path | str, *, dtype: torch.dtype) -> Saved:
    """Writes the latest checkpoint of a run as a stock one, in `dtype`; one process does so, without a group.

    The weights are read whole into memory, whatever layout wrote them. CheckpointError where there is none.
    """
    found = _described(Path(directory))
    if found is None:
        raise CheckpointError(f"{directory} has no checkpoint: train first, or name the directory of a run")
    names = _tensors(found.path)
    model = empty(config, dtype=dtype, drafting=any(name.startswith(f"{_MODEL}mtp.") for name in names))
    _read(found.path, model, None, None)
    save_stock(model, target)
    return found


class _Snapshot(DefaultSavePlanner):
    """What is to be written, copied to the CPU while the model stands still."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._plan = create_default_local_save_plan(dict(tensors), is_coordinator=False)
        self._copies = {name: local(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def create_local_plan(self) -> SavePlan:
        self.plan = self._plan
        return self._plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


def _state(model: nn.Module, optimizers: Optimizers | None) -> dict[str, Tensor]:
    """Everything that training changes, by name: parameters, buffers (biases of routers, hash tables), moments."""
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for optimizer in optimizers.each if optimizers is not None else ():
        for name, parameter in _named(model, optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = _flat(value)
    return tensors


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter in own]


def _flat(value: Tensor) -> Tensor:
    """Counters have no axis, which files cannot be read in parts of; this shares their memory."""
    return value.view(1) if value.dim() == 0 else value


def _read(path: Path, model: nn.Module, optimizers: Optimizers | None, group: dist.ProcessGroup | None) -> None:
    tensors = _tensors(path)
    for optimizer in optimizers.each if optimizers is not None else ():
        _allocate(model, optimizer, tensors)
    state = _state(model, optimizers)
    _check(path, state, tensors)
    _expect_one_process()
    try:
        with torch.no_grad():
            load_parts(
                {name: tensor.detach() for name, tensor in state.items()},
                storage_reader=HuggingFaceStorageReader(str(path)),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
                no_dist=group is None,
            )
    except (CheckpointException, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({_cause(error)}): go on from another checkpoint") from error


def _allocate(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, TensorStorageMetadata]) -> None:
    """Makes room for the state of every parameter that had one when it was saved, and drops that of others."""
    optimizer.state.clear()
    for name, parameter in _named(model, optimizer):
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum", "master"):
            found = tensors.get(f"{_OPTIMIZER}{key}.{name}")
            if found is None:
                continue
            dtype = found.properties.dtype
            if key == "step":
                optimizer.state[parameter][key] = torch.zeros((), dtype=dtype, device=parameter.device)
            else:
                optimizer.state[parameter][key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _check(path: Path, state: Mapping[str, Tensor], tensors: Mapping[str, TensorStorageMetadata]) -> None:
    for name, tensor in state.items():
        found = tensors.get(name)
        if found is None or found.size != tensor.shape:
            has = "lacks" if found is None else f"has another shape, {tuple(found.size)}, of"
            raise CheckpointError(
                f"{path} {has} {name}, which this model has with shape {tuple(tensor.shape)}: go on with the model "
                "that was saved"
            )


def _tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): go on from another checkpoint") from error
    return {
        name: found for name, found in metadata.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
    }


def _described(directory: Path) -> Saved | None:
    """What `latest` names, its manifest read and its files' sizes checked."""
    pointer = directory / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = directory / name
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, {FORMAT!r} is read")
        for file, size in manifest["files"].items():
            if (path / file).stat().st_size != size:
                raise ValueError(f"{file} has {(path / file).stat().st_size} bytes, the manifest says {size}")
        return Saved(path=path, step=manifest["step"], extra=manifest["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): write the name of another checkpoint of {directory} into {pointer}"
        ) from error


def _expect_one_process() -> None:
    """torch warns on each save and load of a process without a group. (A filter is no matter of threads; taking it back
    would be.)
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _cause(error: BaseException) -> str:
    """The first thing that went wrong, on one line."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
