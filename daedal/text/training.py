"""Trains a tokenizer on a stream of texts and writes it as a checkpoint carries it.

Byte-level BPE (Sennrich et al. 2016, on bytes): every text has ids, and decoding them gives back its bytes. Digits come
in groups of three at most, as in DeepSeek-V3's tokenizer; special tokens and the shape of conversations are V3's too,
so that the chat formats of `daedal.text.chat` fit. Knows nothing of where the texts come from.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from daedal.errors import CheckpointError, ConfigError
from daedal.text.encodings.tokens import ASSISTANT, BOS, EOS, USER

SPECIAL = (BOS, EOS, USER, ASSISTANT)
"""Ids 0, 1, 2, 3 of a trained tokenizer."""
SMALLEST = 256 + len(SPECIAL)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{{{{ '{USER}' + message['content'] + '{ASSISTANT}' }}}}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the roles are system, user and assistant') }}{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt and messages[-1]['role'] != 'user' %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def train_tokenizer(
    texts: Iterable[str],
    directory: Path | str,
    *,
    vocab_size: int,
    progress: Callable[[int], None] = lambda chars: None,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `Tokenizer.load` and transformers read, to `directory`.

    vocab_size: ids in all, those of the 256 bytes and of SPECIAL included. progress: called with the characters read so
    far. The same texts in the same order give the same tokenizer. ConfigError where the texts do not hold as many
    different pieces, CheckpointError where the files cannot be written.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"vocab_size is {vocab_size}, bytes and special tokens take {SMALLEST}: ask for more")
    library = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_counted(texts, progress), trainer)
    present = library.get_vocab_size()
    if present < vocab_size:
        raise ConfigError(
            f"vocab_size is {vocab_size}, the texts have pieces for {present} only: give more text, or ask for "
            f"{present}"
        )
    # Put before a text by the library itself, so that every reader of tokenizer.json does the same.
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(Path(directory), {"tokenizer.json": library.to_str(pretty=True), "tokenizer_config.json": _json(config)})


def _untrained() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    return library


def _counted(texts: Iterable[str], progress: Callable[[int], None]) -> Iterator[str]:
    chars = 0
    for text in texts:
        yield text
        chars += len(text)
        progress(chars)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(directory: Path, files: dict[str, str]) -> None:
    """Each file whole or not at all, in order."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            partial = directory / f".{name}.partial"
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(directory / name)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error}): free space or choose another place") from error
