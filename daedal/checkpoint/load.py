"""Fills a model from a checkpoint directory: every parameter found, checked, converted, and nothing left over.

Tensors that need no conversion stay on the memory map. FP8 and FP4 weights are expanded with their scales, in float32,
then rounded once to the model's dtype. The model is built only after all headers are checked (`contents`). With a
format for `weights` they are packed instead, once, and mapped (`packing`).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from daedal.checkpoint.contents import Contents
from daedal.checkpoint.packing import carried, load_packed
from daedal.checkpoint.shards import PLAIN, Shards
from daedal.config import ModelConfig
from daedal.errors import BackendError, CheckpointError, ConfigError
from daedal.mesh import Team
from daedal.model.packing import assign
from daedal.model.shard import Shard
from daedal.model.transformer import Transformer, empty
from daedal.shapes import Slot, drafting, parameters, sharing

Progress = Callable[[int, int], None]


def load(
    directory: Path | str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    mtp: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> Transformer:
    """The model of a checkpoint directory, ready to run.

    device: "auto" takes the accelerator that torch sees, else the CPU; packed weights stay on the CPU. dtype: None
    keeps what the files hold; float32 means full-precision arithmetic, quantised weights expanded exactly. weights:
    "bf16", "int8", "int4", "fp8" or "fp4" packs them for the CPU's kernels, on the first load into the user's cache,
    and computes in bfloat16; together with float32 the packed numbers are expanded. None packs nothing, except what is
    packed on disk. mtp: fill the drafting modules too. progress: called with (done, in all), of parameters, or of bytes
    while weights are packed; a packed model is otherwise there at once. team: the ranks that hold the model together,
    of which each loads its own part, unpacked and without drafting modules.
    """
    directory = Path(directory)
    weights = weights or carried(directory)
    if team is not None:
        _check_shared(weights, mtp=mtp)
    if weights is not None:
        if device != "auto" and resolve_device(device).type != "cpu":
            raise BackendError(
                f"device is {str(device)!r}, packed weights run on the CPU alone: give cpu, or no weights"
            )
        return load_packed(directory, weights, dtype=dtype, mtp=mtp, progress=progress)
    config = ModelConfig.read(directory)
    slots = parameters(config)
    if mtp:
        if not config.num_nextn_predict_layers:
            message = "num_nextn_predict_layers is 0: the checkpoint has no drafting modules, load it without them"
            raise CheckpointError(f"{directory}: {message}")
        slots += drafting(config)
    contents = Contents(Shards(directory), config, slots, drafting=mtp)
    chosen = dtype or contents.plain_dtype(slots[0]) or getattr(torch, config.dtype)
    if chosen not in PLAIN:
        raise ConfigError(f"dtype is {chosen}: give torch.bfloat16, float16, float32 or float64")
    target = resolve_device(device)
    model = empty(config, device="meta", dtype=chosen, drafting=mtp) if team is None else Shard(config, team, chosen)
    for done, (slot, tensor) in enumerate(read_slots(contents, slots, chosen, team)):
        assign(model, slot.name, tensor.to(target), trained=team is None)
        if progress is not None:
            progress(done + 1, len(slots))
    if config.tie_word_embeddings:
        embedding = model.embed_tokens.weight
        model.lm_head.weight = embedding if team is None else _own_tokens(embedding, team)
    return model.eval()


def read_slots(
    contents: Contents, slots: Sequence[Slot], dtype: torch.dtype, team: Team | None = None
) -> Iterator[tuple[Slot, Tensor]]:
    """Each slot with its numbers, one by one, on the CPU, in the dtype that a model of `dtype` keeps it in; of `team`
    this rank's part of each.
    """
    wide = torch.promote_types(dtype, torch.float32)
    for slot in slots:
        place = () if team is None else sharing.place(slot, team.rank, team.size)
        kind = wide if slot.wide else dtype
        yield slot, torch.zeros(slot.shape, dtype=kind) if place is None else contents.read(slot, kind, place)


def _own_tokens(embedding: Tensor, team: Team) -> nn.Parameter:
    """The head of a rank, as a part of the embedding that is tied to it."""
    tokens = sharing.vocabulary(len(embedding), team.rank, team.size)
    return nn.Parameter(embedding.detach()[tokens], requires_grad=False)


def _check_shared(weights: str | None, *, mtp: bool) -> None:
    """What several processes cannot share yet."""
    if weights is not None:
        raise ConfigError(
            f"weights is {weights!r}, and packed weights cannot be shared by several processes: leave them unpacked"
        )
    if mtp:
        raise ConfigError(
            "drafting modules cannot be shared by several processes: draft by lookup or with a model, or load without"
        )


def resolve_device(device: torch.device | str) -> torch.device:
    """The device called so; "auto" is the accelerator where there is one. BackendError where it is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    present = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BackendError(
            f"device is {device!r}, which PyTorch does not know here: give {' or '.join(present)}, or auto (npu needs "
            "torch-npu)"
        ) from error
    if chosen.type not in present:
        raise BackendError(f"device is {str(device)!r}, this machine has {' and '.join(present)}: give one, or auto")
    return chosen
