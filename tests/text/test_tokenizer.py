"""Tokenizers of every decoder family: exact bytes, whole characters while streaming, one BOS at most, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from daedal.errors import CheckpointError, RequestError
from daedal.text.encodings.tokens import BAR
from daedal.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog 0123456789",
    "Füchse, 狐狸, лисы, 🦊🦊 and the the fox's den\n\n\t  x",
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def byte_level() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken("two words", normalized=False), AddedToken("日本", normalized=False)])
    return library


def byte_fallback() -> tokenizers.Tokenizer:
    """SentencePiece's kind: a mark for the space, one put first, `<0xE2>` for bytes outside the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é"]
    vocabulary = {token: id for id, token in enumerate(words)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return library


def metaspace() -> tokenizers.Tokenizer:
    words = ["<unk>", "▁", "▁▁", "▁a", "b", "c▁"]
    library = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(words)}, []))
    library.decoder = decoders.Metaspace()
    return library


def word_level() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "bc": 1, "[UNK]": 2, "é": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


def word_piece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "play", "##ing", "##s", ".", "'", "don", "t"]
    vocabulary = {token: id for id, token in enumerate(words)}
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    return library


def wrap(library: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(library, decoder=json.loads(library.to_str())["decoder"])


def pushed(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return "".join([detokenizer.push(id) for id in ids]) + detokenizer.finish()


BYTE_LEVEL, BYTE_FALLBACK = wrap(byte_level()), wrap(byte_fallback())


@given(UNICODE)
def test_streaming_gives_the_text_back_and_bytes_add_up(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = BYTE_LEVEL.detokenizer()
    pieces = [detokenizer.push(id) for id in ids]
    if not any(name in text for name in ("<s>", "</s>", "<pad>")):
        # No piece waits for the end: every character is out with its last byte.
        assert ("".join(pieces), detokenizer.finish()) == (text, "")
        assert b"".join(BYTE_LEVEL.token_bytes(id) for id in ids) == text.encode()
        assert BYTE_LEVEL.decode(ids) == text


@given(UNICODE)
def test_bytes_outside_a_sentencepiece_vocabulary_come_back(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    if "▁" not in text and not any(name in text for name in ("<unk>", "<s>", "</s>", "<0x")):
        assert pushed(BYTE_FALLBACK, ids) == BYTE_FALLBACK.decode(ids) == text
        assert b"".join(BYTE_FALLBACK.token_bytes(id) for id in ids).decode().removeprefix(" ") == text


def with_special(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    names = (f"<{BAR}end▁of▁text{BAR}>", "[END]")
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    return library


@pytest.mark.parametrize("skip", [True, False], ids=["hidden", "visible"])
@pytest.mark.parametrize("build", [byte_level, metaspace, word_level, word_piece])
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(
    build: Callable[[], tokenizers.Tokenizer], skip: bool, data: st.DataObject
) -> None:
    library = with_special(build())
    tokenizer = wrap(library)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12))
    expected = library.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert pushed(tokenizer, ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("skip", [True, False], ids=["hidden", "visible"])
def test_sentencepiece_ids_decode_as_the_library_decodes_them_where_bytes_are_valid(skip: bool) -> None:
    library = byte_fallback()
    for ids in ([3 + 0xE2, 3 + 0x82, 3 + 0xAC, 262, 1, 261], [259, 259, 262], [3 + 0x20, 260], [2, 259, 260]):
        decoded = BYTE_FALLBACK.decode(ids, skip_special_tokens=skip)
        assert decoded == library.decode(ids, skip_special_tokens=skip)
        assert pushed(BYTE_FALLBACK, ids, skip_special_tokens=skip) == decoded


def test_an_unfinished_character_waits_and_only_invalid_bytes_are_replaced() -> None:
    fox = [3 + byte for byte in "🦊".encode()]
    detokenizer = BYTE_FALLBACK.detokenizer()
    assert [detokenizer.push(id) for id in [*fox[:2], 1, *fox[2:]]] == ["", "", "", "", "🦊"]  # id 1 is special
    assert [detokenizer.push(id) for id in [fox[0], 260]] == ["", "�a"]
    assert (detokenizer.push(fox[0]), detokenizer.finish(), detokenizer.finish()) == ("", "�", "")


def test_special_and_unknown_ids_have_no_text_but_special_ones_a_name() -> None:
    eos = BYTE_LEVEL.encode("</s>", add_special_tokens=False)
    assert len(eos) == 1
    half = BYTE_LEVEL.encode("é", add_special_tokens=False)[:1]
    visible = BYTE_LEVEL.detokenizer(skip_special_tokens=False)
    assert [visible.push(id) for id in (*eos, *half, *eos)] == ["</s>", "", "\N{REPLACEMENT CHARACTER}</s>"]
    assert (BYTE_LEVEL.token_bytes(eos[0]), BYTE_LEVEL.token_text(eos[0])) == (b"", "</s>")
    for unknown in (BYTE_LEVEL.vocab_size, 10**9, -1):
        assert (BYTE_LEVEL.token_bytes(unknown), BYTE_LEVEL.token_text(unknown)) == (b"", "")
        assert BYTE_LEVEL.decode([unknown]) == pushed(BYTE_LEVEL, [unknown]) == ""


def save(directory: Path, library: tokenizers.Tokenizer, **files: object) -> Path:
    library.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_one_bos_and_only_where_the_checkpoint_asks(
    tmp_path: Path, processor: bool, add_bos_token: bool | None
) -> None:
    library = byte_level()
    bos = library.token_to_id("<s>")
    if processor:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    config = {"bos_token": {"content": "<s>"}} | ({} if add_bos_token is None else {"add_bos_token": add_bos_token})
    tokenizer = Tokenizer.load(save(tmp_path, library, tokenizer_config=config))
    plain = tokenizer.encode("the fox", add_special_tokens=False)
    wanted = processor if add_bos_token is None else add_bos_token
    assert bos not in plain
    assert tokenizer.encode("the fox") == ([bos] if wanted else []) + plain
    assert tokenizer.encode("<s>the fox") == [bos, *plain]
    assert tokenizer.encode("<s>the fox", add_special_tokens=False) == [bos, *plain]


def test_ids_that_end_a_text_come_from_all_files(tmp_path: Path) -> None:
    library = byte_level()
    eos = library.token_to_id("</s>")
    save(tmp_path, library, tokenizer_config={"eos_token": "</s>"}, config={"eos_token_id": 7, "bos_token_id": 0})
    assert Tokenizer.load(tmp_path).eos_ids == {7, eos}
    assert Tokenizer.load(tmp_path).bos_id == 0
    save(tmp_path, library, generation_config={"eos_token_id": [8, 9]}, config={"eos_token_id": None})
    assert Tokenizer.load(tmp_path).eos_ids == {8, 9, eos}
    save(tmp_path, library, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(CheckpointError, match="must be an id, a list of ids, or null"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(max_length=2)
    library.enable_padding(length=64)
    tokenizer = Tokenizer.load(save(tmp_path, library))
    assert tokenizer.decode(tokenizer.encode("the lazy dog jumps")) == "the lazy dog jumps"
    assert len(tokenizer.encode("x")) == 1


def test_texts_that_cannot_be_tokenised_are_refused() -> None:
    with pytest.raises(RequestError, match=r"text has 11 characters, at most 10 are tokenised: shorten it"):
        BYTE_LEVEL.encode("hello world", max_chars=10)
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        BYTE_LEVEL.encode("ab\ud800")
    with pytest.raises(RequestError, match="NoneType"):
        BYTE_LEVEL.encode(None)  # type: ignore[arg-type]
    missing_unknown = wrap(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    with pytest.raises(RequestError, match="cannot be tokenised"):
        missing_unknown.encode("b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json is missing"),
        (b"", "not valid JSON"),
        (b'{"model"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "an object is needed"),
        (b"{}", "is not a tokenizer"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}', "is not a tokenizer"),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_broken_files_end_in_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (*CORPUS, "", " ", "<s>x</s>", "two words 日本"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
