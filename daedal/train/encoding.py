"""From documents to ids, many at once, with what a dataset must remember of the tokenizer that made them.

Names of special tokens in a document are text like any other: only the dataset's writer puts a token there that begins
or ends a document, and the tokenizer's chat format those of a conversation, as the server writes it. Tokens that were
added to a tokenizer without being called special keep their ids, as they do in DeepSeek's. Knows nothing of files of
ids (see `shards.py`).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from daedal.errors import DataError, TemplateError
from daedal.text.chat import ChatFormat, TemplateFormat, load_format
from daedal.text.files import parse_object, read_optional, read_text, token_text
from daedal.text.tokenizer import Tokenizer
from daedal.train.documents import Document

_BATCH_DOCUMENTS = 512
_BATCH_CHARS = 2**22
_DECIDES_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """What ids of a dataset mean.

    size: one more than the highest id. bos_id, eos_id: written where a document begins (None: nothing) and ends.
    digest: of what the tokenizer makes of text. bytes_per_token_V: uint32, bytes of text that each id stands for.
    """

    size: int
    eos_id: int
    bos_id: int | None = None
    digest: str
    bytes_per_token_V: npt.NDArray[np.uint32]

    def __post_init__(self) -> None:
        for name, id in (("eos_id", self.eos_id), ("bos_id", self.bos_id)):
            if id is not None and not 0 <= id < self.size:
                raise DataError(f"{name} is {id}, the vocabulary has {self.size} ids: give one of them")
        if len(self.bytes_per_token_V) != self.size:
            given = len(self.bytes_per_token_V)
            raise DataError(f"bytes_per_token_V has {given} entries, the vocabulary {self.size}: give one for each id")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Encoded:
    """One document as ids_T, without the ids that begin and end it. num_bytes: of its text; digest: 8 bytes of its
    contents' hash, the same for the same text wherever it stands."""

    ids_T: npt.NDArray[np.int64]
    num_bytes: int
    digest: bytes
    source: str
    licence: str
    index: int

    @classmethod
    def of_ids(cls, ids_T: npt.NDArray[np.int64], *, source: str, licence: str, index: int) -> "Encoded":
        """A document that never was text."""
        digest = hashlib.blake2b(np.ascontiguousarray(ids_T, dtype="<i8").tobytes(), digest_size=8).digest()
        return cls(ids_T=ids_T, num_bytes=0, digest=digest, source=source, licence=licence, index=index)


class Encoder:
    """A checkpoint's tokenizer as the writer of a dataset uses it. chat: how its conversations are written, if at all;
    names: of its special tokens, which no message may hold."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        chat: ChatFormat | None = None,
        names: Sequence[str] = (),
    ):
        self.vocabulary = vocabulary
        self._library = library
        self._chat, self._names = chat, names
        library.no_truncation()
        library.no_padding()

    @classmethod
    def load(cls, directory: Path | str) -> "Encoder":
        """Reads tokenizer.json and tokenizer_config.json. A BOS is written where the tokenizer puts one before a text.

        CheckpointError where a file is missing or broken, DataError where no token is named that ends a document.
        """
        directory = Path(directory)
        tokenizer = Tokenizer.load(directory)
        library = tokenizers.Tokenizer.from_str(read_text(directory / "tokenizer.json"))
        lengths = [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
        vocabulary = Vocabulary(
            size=tokenizer.vocab_size,
            eos_id=_eos_id(tokenizer, library, directory),
            bos_id=tokenizer.bos_id if tokenizer.encode("")[:1] == [tokenizer.bos_id] else None,
            digest=tokenizer_digest(directory),
            bytes_per_token_V=np.array(lengths, dtype=np.uint32),
        )
        added = library.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special]
        return cls(library, vocabulary, chat=_chat_format(directory), names=names)

    @property
    def chat_digest(self) -> str:
        """Decides how a conversation is written; "" where none can be."""
        if self._chat is None:
            return ""
        source = self._chat.template.source if isinstance(self._chat, TemplateFormat) else self._chat.name
        return hashlib.sha256(source.encode()).hexdigest()

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The documents in order; the library cuts many of them at once, in as many threads as it has."""
        batch: list[Document] = []
        chars, talk = 0, False
        for document in documents:
            if batch and (len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS or talk != _is_talk(document)):
                yield from self._encode(batch)
                batch, chars = [], 0
            talk = _is_talk(document)
            batch.append(document)
            chars += len(document.text)
        yield from self._encode(batch)

    def _encode(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """All of them texts, or all of them conversations."""
        if not documents:
            return
        talk = _is_talk(documents[0])
        written = [self._written(document) if talk else document.text for document in documents]
        self._library.encode_special_tokens = not talk
        try:
            encodings = self._library.encode_batch_fast(written, add_special_tokens=False)
        except Exception as error:  # the library's only class; a vocabulary without its unknown token raises it
            first = documents[0]
            raise DataError(
                f"{first.source}, document {first.index} or one of the next {len(documents)}, cannot be tokenised "
                f"({error}): the tokenizer has no token for it, choose one that knows every byte"
            ) from error
        for document, text, encoding in zip(documents, written, encodings, strict=True):
            ids_T = np.array(encoding.ids, dtype=np.int64)
            yield Encoded(
                ids_T=self._unframed(ids_T) if talk else ids_T,
                num_bytes=len(text.encode()),
                digest=hashlib.blake2b(text.encode(), digest_size=8).digest(),
                source=document.source,
                licence=document.licence,
                index=document.index,
            )

    def _written(self, document: Document) -> str:
        """The conversation in the tokenizer's chat format, names of special tokens and all."""
        place = f"{document.source}, document {document.index},"
        if self._chat is None:
            raise DataError(
                f"{place} is a conversation, and the tokenizer has no chat format: give it a chat_template.jinja, or "
                "write the conversation as text"
            )
        assert document.messages is not None
        for message in document.messages:
            for name in self._names:
                if name in message["content"]:
                    raise DataError(f"{place} says {name!r}, which is a special token: remove it from the message")
        try:
            return self._chat.render(document.messages, add_generation_prompt=False).rstrip()
        except TemplateError as error:
            raise DataError(f"{place} cannot be written as a conversation: {error}") from error

    def _unframed(self, ids_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Without the tokens that a dataset's writer puts around every document."""
        start = int(len(ids_T) > 0 and self.vocabulary.bos_id is not None and ids_T[0] == self.vocabulary.bos_id)
        end = len(ids_T) - int(len(ids_T) > start and ids_T[-1] == self.vocabulary.eos_id)
        return ids_T[start:end]


def _is_talk(document: Document) -> bool:
    return document.messages is not None


def _chat_format(directory: Path) -> ChatFormat | None:
    try:
        return load_format(directory)
    except TemplateError:
        return None  # said where the first conversation comes


def tokenizer_digest(directory: Path | str) -> str:
    """SHA-256 of the parts of tokenizer.json that decide which ids a text becomes, however the file is laid out."""
    path = Path(directory) / "tokenizer.json"
    spec = parse_object(read_text(path), path)
    parts = json.dumps([spec.get(part) for part in _DECIDES_IDS], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(parts.encode()).hexdigest()


def _eos_id(tokenizer: Tokenizer, library: tokenizers.Tokenizer, directory: Path) -> int:
    name = token_text(read_optional(directory / "tokenizer_config.json").get("eos_token"))
    named = library.token_to_id(name) if name is not None else None
    if named is not None:
        return named
    if len(tokenizer.eos_ids) != 1:
        raise DataError(
            f"{directory} names {len(tokenizer.eos_ids)} tokens that end a text, one is needed: give eos_token in "
            f"tokenizer_config.json"
        )
    return next(iter(tokenizer.eos_ids))
