"""Token windows to calibrate with, from text files: pieces spread evenly over each file, the same every time.

Many short pieces say more than one long one. Knows no model.
"""

import lzma
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from daedal.errors import CheckpointError
from daedal.text.tokenizer import Tokenizer

WINDOW = 512
TOKENS = 16_384

_CHARS = 8  # of a text, for each token that is wanted from it: few texts need more


def read_windows(
    paths: Sequence[Path], tokenizer: Tokenizer, *, tokens: int = TOKENS, window: int = WINDOW
) -> list[Tensor]:
    """int64 [T] each, T at most `window`, `tokens` in all where the files have as many; each file gives the same share.

    Files are UTF-8 text, also in .xz. CheckpointError for a file that cannot be read or holds no text.
    """
    count = max(1, tokens // window // len(paths))
    return [ids_T for path in paths for ids_T in _pieces(_text(path), path, tokenizer, count, window)]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the calibration text {path} cannot be read ({error}): give a UTF-8 file") from error
    if not text.strip():
        raise CheckpointError(f"the calibration text {path} is empty: give a file with some thousand words")
    return text


def _pieces(text: str, path: Path, tokenizer: Tokenizer, count: int, window: int) -> list[Tensor]:
    size = window * _CHARS
    last = max(0, len(text) - size)
    starts = sorted({last * index // max(1, count - 1) for index in range(count)}) if last >= size else [0]
    encoded = (tokenizer.encode(text[start : start + size], add_special_tokens=False) for start in starts)
    found = [torch.tensor(ids[:window]) for ids in encoded if ids]
    if not found:
        raise CheckpointError(f"the calibration text {path} has no tokens: give a file with some thousand words")
    return found
