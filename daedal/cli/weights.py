"""In which format to keep the weights when the user leaves it to us, and the reason in words.

Packed weights pay where native kernels read them; anywhere else they would be expanded at every step, so there the
checkpoint is kept as it is. Published FP8 and FP4 checkpoints keep their numbers. Imports torch when asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from daedal.config import ModelConfig

if TYPE_CHECKING:
    import torch

WeightsName = Literal["auto", "bf16", "int8", "int4", "fp8", "fp4"]

WeightsOption = Annotated[
    WeightsName,
    typer.Option(
        help="Format to keep weights in, packed once for the CPU's kernels; auto keeps published FP8 and FP4, else "
        "takes int8 where this CPU has kernels for it."
    ),
]

# Whose kernels read packed weights about as fast as memory gives them.
LEVELS = ("amx", "avx512", "avx2", "dotprod")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The format chosen, None for the checkpoint's own numbers unpacked, and why."""

    format: str | None
    reason: str

    def __str__(self) -> str:
        return f"weights: {self.format or 'as the checkpoint holds them'} ({self.reason})"


def choose_weights(name: WeightsName, directory: Path, device: "torch.device", *, full_precision: bool) -> Weights:
    """The format that `name` asks for; `auto` depends on the checkpoint and on what this CPU has kernels for.

    full_precision: float32 was asked for, which `auto` does not trade away.
    """
    from daedal.checkpoint.packing import carried

    if name != "auto":
        return Weights(format=name, reason="as asked")
    own = carried(directory)
    if own is not None:
        return Weights(format=own, reason="the checkpoint is packed so")
    if device.type != "cpu":
        return Weights(format=None, reason=f"packing is for CPUs, this is {device.type}")
    if full_precision:
        return Weights(format=None, reason="float32 was asked for")
    published = _published(directory)
    lacking = _lacking(published or "int8")
    if lacking is not None:
        return Weights(format=None, reason=lacking)
    if published is not None:
        return Weights(format=published, reason="as published")
    return Weights(format="int8", reason="this CPU has kernels for it; --weights bf16 keeps the checkpoint's numbers")


def _published(directory: Path) -> str | None:
    config = ModelConfig.read(directory)
    if config.quantization_config is None:
        return None
    return "fp4" if config.expert_dtype == "fp4" else "fp8"


def _lacking(weights: str) -> str | None:
    """Why weights in this format would not run on kernels made for them; None where they would."""
    import torch

    from daedal import ops
    from daedal.ops.backends.cpu import program
    from daedal.ops.packed import Packed
    from daedal.packed import FORMATS, packed_bytes

    absent = program.missing()
    if absent is not None:
        return f"no native kernels: {absent}"
    level = program.native().level
    if level not in LEVELS:
        return f"this CPU's kernels are {level}: packed weights pay from AVX2 or ARM's dot products on"
    rows, columns = 16, FORMATS[weights].group
    data = torch.zeros(packed_bytes(weights, (rows, columns)), dtype=torch.uint8)
    sample = Packed(data, weights, (rows, columns))
    for choice in ops.explain("linear", torch.zeros(1, columns, dtype=torch.bfloat16), sample, None):
        if choice.chosen and choice.backend == "reference":
            return "no fast backend reads packed weights here"
    return None
