"""Daedal builds, distils and serves sparse language models of the DeepSeek line, and says what every answer cost.

    model = daedal.load("smollm2-135m")                      # a name, or a checkpoint's directory
    logits_BTV = model.logits(ids_BT)
    engine = daedal.Engine(model)
    outputs = engine.generate([[1, 2, 3]], daedal.SamplingParams(max_tokens=16, temperature=0.0))
    daedal.save(model, "directory")

Importing the package loads nothing heavy: each name brings in its room when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from daedal.infer.engine import Engine
    from daedal.infer.request import Output, Request, SamplingParams
    from daedal.infer.speculative import Speculation
    from daedal.model.transformer import Transformer

__version__ = "0.1.0"

__all__ = ["Engine", "Output", "Request", "SamplingParams", "Speculation", "__version__", "load", "save"]

_HOMES = {
    "Engine": "daedal.infer.engine",
    "Output": "daedal.infer.request",
    "Request": "daedal.infer.request",
    "SamplingParams": "daedal.infer.request",
    "Speculation": "daedal.infer.speculative",
}


def load(
    path: "Path | str",
    device: "torch.device | str" = "auto",
    dtype: "torch.dtype | None" = None,
    weights: str | None = None,
    *,
    mtp: bool = False,
) -> "Transformer":
    """A model with its weights, from a checkpoint's directory or a known name, which is fetched on first use.

    device: "auto" takes an accelerator where there is one. dtype: None keeps the checkpoint's own; torch.float32 means
    full-precision arithmetic, quantised weights dequantised exactly. weights: "bf16", "int8", "int4", "fp8" or "fp4"
    packs them once for the CPU's kernels and maps them ever after; the model then computes in bfloat16 and stays on the
    CPU, or with dtype=torch.float32 holds the packed numbers expanded. mtp: with the model's own drafting modules, for
    speculative decoding. SourceError, CheckpointError or ConfigError says what is wrong with what was named. Needs no
    tokenizer.
    """
    from daedal.checkpoint.load import load as load_directory
    from daedal.checkpoint.sources import resolve

    return load_directory(resolve(path), device=device, dtype=dtype, weights=weights, mtp=mtp)


def save(model: "Transformer", directory: "Path | str", *, layout: str | None = None) -> None:
    """Writes `model` in the dtype it holds, under its family's published names, so that other libraries load it.

    layout: "deepseek" or "transformers" where the two differ (V4); None for the published one.
    """
    from daedal.checkpoint.save import save as save_model

    save_model(model, directory, layout=layout)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'daedal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
