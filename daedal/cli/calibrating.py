"""The text that `daedal quantize --calibrate` rounds for: files, or what the model itself writes.

Text of its own needs no data: sequences begin with a token drawn evenly from the vocabulary and go on as the model
draws them, past every end. The same model and seed write the same text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daedal.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SELF = "self"
_SEED = 0
_TOGETHER = 16  # sequences

Progress = Callable[[int, int], None]


def windows(directory: Path, given: Sequence[str], tokens: int, progress: Progress) -> "list[Tensor]":
    """int64 [T] each. progress: of tokens that the model has written."""
    from daedal.checkpoint.calibration_text import read_windows
    from daedal.text.tokenizer import Tokenizer

    if SELF in given:
        if len(given) > 1:
            raise ConfigError(f"--calibrate has {SELF} and files: give either {SELF} or files")
        return _own_text(directory, tokens, progress)
    return read_windows([Path(name) for name in given], Tokenizer.load(directory), tokens=tokens)


def _own_text(directory: Path, tokens: int, progress: Progress) -> "list[Tensor]":
    import torch

    from daedal.checkpoint.calibration_text import WINDOW
    from daedal.checkpoint.load import load
    from daedal.infer.engine import Engine
    from daedal.infer.request import SamplingParams

    model = load(directory)
    window = min(WINDOW, model.config.max_position_embeddings)
    count = max(1, tokens // window)
    generator = torch.Generator().manual_seed(_SEED)
    firsts = torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
    engine = Engine(model, max_batch=_TOGETHER, max_context=window)
    found: list[Tensor] = []
    for start in range(0, count, _TOGETHER):
        progress(start, count)
        prompts = [[first] for first in firsts[start : start + _TOGETHER]]
        params = [
            SamplingParams(max_tokens=window - 1, temperature=1.0, seed=_SEED + start + index, ignore_eos=True)
            for index in range(len(prompts))
        ]
        outputs = engine.generate(prompts, params)
        found += [torch.tensor([*prompt, *output.ids]) for prompt, output in zip(prompts, outputs, strict=True)]
    progress(count, count)
    return found
