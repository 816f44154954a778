"""A trained tokenizer: exact on any text, the same to every reader, and V3's in its conversations."""

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from daedal.errors import CheckpointError, ConfigError, TemplateError
from daedal.text.chat import load_format
from daedal.text.encodings.formats import V3
from daedal.text.encodings.tokens import ASSISTANT, BOS, EOS, USER
from daedal.text.tokenizer import Tokenizer
from daedal.text.training import SMALLEST, train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog 0123456789", "Füchse, 狐狸, 🦊 and the the fox's den\n\n\t x"] * 3
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "The fox."},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    train_tokenizer(iter(TEXTS), directory, vocab_size=300)
    return directory


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_and_its_bytes_are_counted(directory: Path, text: str) -> None:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(id) for id in ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_it_has_the_size_and_the_tokens_that_were_asked_for(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == 300
    assert [tokenizer.token_text(id) for id in range(4)] == [BOS, EOS, USER, ASSISTANT]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1})
    assert tokenizer.encode("the fox")[0] == 0
    assert len(tokenizer.encode("the quick", add_special_tokens=False)) < len("the quick")
    digits = tokenizer.encode("0123456789", add_special_tokens=False)
    assert max(len(tokenizer.token_bytes(id)) for id in digits) <= 3


def test_transformers_reads_the_same(directory: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    for text in (*TEXTS, "", "new 12345 wörds"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)
    rendered = theirs.apply_chat_template(CHAT, tokenize=False)
    assert rendered == load_format(directory).render(CHAT, add_generation_prompt=False)


@pytest.mark.parametrize("chat", [CHAT, CHAT[:2], CHAT[1:] * 2, CHAT[1:2]])
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_are_those_of_v3(directory: Path, chat: list[dict[str, str]], prompt: bool) -> None:
    rendered = load_format(directory).render(chat, add_generation_prompt=prompt)
    assert rendered == V3.render(chat, add_generation_prompt=prompt)
    ids = Tokenizer.load(directory).encode(rendered)
    assert ids.count(0) == 1
    with pytest.raises(TemplateError, match="roles are system, user and assistant"):
        load_format(directory).render([{"role": "tool", "content": "9"}])


def test_the_same_texts_give_the_same_files(directory: Path, tmp_path: Path) -> None:
    told: list[int] = []
    train_tokenizer(TEXTS, tmp_path / "again", vocab_size=300, progress=told.append)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert told[-1] == sum(map(len, TEXTS))


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size is 100, bytes and special tokens take {SMALLEST}"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=100)
    with pytest.raises(ConfigError, match="the texts have pieces for 260 only"):
        train_tokenizer([], tmp_path, vocab_size=300)
    assert not list(tmp_path.iterdir())

    def failing() -> object:
        yield "some"
        raise CheckpointError("a text that cannot be read")

    with pytest.raises(CheckpointError, match="a text that cannot be read"):
        train_tokenizer(failing(), tmp_path, vocab_size=300)


def test_a_full_disk_leaves_what_was_there(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=280)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            train_tokenizer(TEXTS, tmp_path, vocab_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Tokenizer.load(tmp_path).vocab_size == 280
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == EOS
