"""Text to token ids and back, over the `tokenizers` library and the files of a published checkpoint.

`tokenizer.json` says how to cut text; `tokenizer_config.json`, `generation_config.json` and `config.json` say which ids
begin and end one. One BOS at most, and only where the checkpoint asks for it. Knows nothing of chats (see `chat.py`),
models or requests; what a tokenizer is worth in bytes is in `decoding.py`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from daedal.errors import CheckpointError, RequestError
from daedal.text.decoding import ByteDetokenizer, Detokenizer, WindowDetokenizer, read_decoder
from daedal.text.files import parse_object, read_optional, read_text, token_text

MAX_CHARS = 2**22  # about a million tokens of prose
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer.

    library: the loaded tokenizer. decoder: the `decoder` entry of its JSON. bos_id: None where there is none. add_bos:
    whether `encode` begins with it; None leaves that to the library's post-processor. special: ids without text, beside
    those that the library itself calls special.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        decoder: object,
        bos_id: int | None = None,
        add_bos: bool | None = None,
        eos_ids: Iterable[int] = (),
        special: Iterable[int] = (),
    ):
        self._library = library
        # Some published files still carry the truncation or padding of their training run.
        library.no_truncation()
        library.no_padding()
        added = library.get_added_tokens_decoder()
        self._special = frozenset(special) | {id for id, token in added.items() if token.special}
        self._byte_decoder = read_decoder(decoder)
        self._bytes: dict[int, bytes] = {}
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest id; a model's own vocabulary may be padded beyond it."""
        processor_adds = bos_id is not None and library.encode("").ids[:1] == [bos_id]
        self._processor_adds_bos = processor_adds
        self._adds_bos = processor_adds if add_bos is None else add_bos and bos_id is not None

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Reads a checkpoint's directory. CheckpointError where tokenizer.json is missing or broken."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        text = read_text(path)
        spec = parse_object(text, path)
        library = _build(text, path)
        named = read_optional(directory / "tokenizer_config.json")
        ids = {name: _token_id(library, named.get(name)) for name in _NAMED}
        config = read_optional(directory / "config.json")
        generation = read_optional(directory / "generation_config.json")
        eos = _ids(generation, "eos_token_id", directory) or _ids(config, "eos_token_id", directory)
        bos_id = ids["bos_token"]
        if bos_id is None:
            bos_id = next(iter(_ids(config, "bos_token_id", directory)), None)
        add_bos = named.get("add_bos_token")
        return cls(
            library,
            decoder=spec.get("decoder"),
            bos_id=bos_id,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            eos_ids={*eos, *([ids["eos_token"]] if ids["eos_token"] is not None else [])},
            special=[id for id in ids.values() if id is not None],
        )

    def encode(self, text: str, add_special_tokens: bool = True, *, max_chars: int = MAX_CHARS) -> list[int]:
        """Token ids of `text`; names of special tokens in it become their ids.

        add_special_tokens: what the checkpoint puts around a text (its BOS) is put there. RequestError where the text
        is longer than max_chars characters or is not valid Unicode.
        """
        if not isinstance(text, str):
            raise RequestError(f"text is a {type(text).__name__}: give a string")
        if len(text) > max_chars:
            raise RequestError(f"text has {len(text)} characters, at most {max_chars} are tokenised: shorten it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text holds a lone surrogate at character {error.start}, which no UTF-8 text does: remove it"
            ) from error
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library's only class; a vocabulary without its unknown token raises it
            raise RequestError(f"text cannot be tokenised ({error}): the tokenizer has no token for it") from error
        if not add_special_tokens or self.bos_id is None:
            return ids
        if self._processor_adds_bos and not self._adds_bos:
            return ids[1:]
        if self._adds_bos and not self._processor_adds_bos:
            ids = [self.bos_id, *ids]
        # A text that spells the BOS out itself, as rendered chats do, must not get a second one.
        return ids[1:] if self._adds_bos and ids[:2] == [self.bos_id, self.bos_id] else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`: ids beyond the vocabulary are skipped, invalid bytes become U+FFFD.

        Special ids are skipped too, or stand there by name.
        """
        if self._byte_decoder is None:
            shown = self._text_token if skip_special_tokens else self._token
            return self._library_text([id for id in ids if shown(id) is not None])
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        pieces = [detokenizer.push(id) for id in ids]
        return "".join(pieces) + detokenizer.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """For one new text, fed token by token; its pieces add up to `decode` of all ids."""
        shown = self._text_token if skip_special_tokens else self._token
        if self._byte_decoder is None:
            return WindowDetokenizer(self._library_text, shown)
        return ByteDetokenizer(self._byte_decoder, shown)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that this token adds in the middle of a text; b"" for special and unknown ids.

        Where the decoder is not byte-exact, the library's text of the token alone.
        """
        cached = self._bytes.get(id)
        if cached is not None:
            return cached
        token = self._text_token(id)
        if token is None:
            raw = b""
        elif self._byte_decoder is None:
            raw = self._library_text([id]).encode()
        else:
            raw = self._byte_decoder.bytes_of(token)
        if 0 <= id < self.vocab_size:  # ids from outside must not grow the table
            self._bytes[id] = raw
        return raw

    def token_text(self, id: int) -> str:
        """A token to show to people: its text, a special token's name, "" for unknown ids."""
        if id in self._special:
            return self._token(id) or ""
        return self.token_bytes(id).decode("utf-8", errors="replace")

    def is_special(self, id: int) -> bool:
        """Whether the id has no text of its own, though it is in the vocabulary."""
        return id in self._special

    def _token(self, id: int) -> str | None:
        return self._library.id_to_token(id) if 0 <= id < self.vocab_size else None

    def _text_token(self, id: int) -> str | None:
        return None if id in self._special else self._token(id)

    def _library_text(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


def _build(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise CheckpointError(f"{path} is not a tokenizer ({error}): fetch the file again") from error


def _token_id(library: tokenizers.Tokenizer, entry: object) -> int | None:
    name = token_text(entry)
    return library.token_to_id(name) if name is not None else None


def _ids(config: dict[str, object], key: str, directory: Path) -> tuple[int, ...]:
    """An id, a list of ids, or null, as the published files spell `eos_token_id`."""
    value = config.get(key)
    entries = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(entry, bool) or not isinstance(entry, int) or entry < 0 for entry in entries):
        raise CheckpointError(f"{key} in {directory} is {value!r}: it must be an id, a list of ids, or null")
    return tuple(entries)
