"""Datasets on disk: whole or absent, made once, every byte accounted for, and fit for the model or refused."""

import errno
import itertools
import json
import math
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from daedal.errors import DataError
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer
from daedal.text.training import EOS, train_tokenizer
from daedal.train.batches import Batches, bits_per_byte
from daedal.train.dataset import Dataset
from daedal.train.documents import Document, Source, read_documents
from daedal.train.encoding import Encoded, Encoder, Vocabulary, tokenizer_digest
from daedal.train.manifest import read_manifest
from daedal.train.sampling import Sampler
from daedal.train.shards import Written, prepare, write_shards

TEXT = "the quick brown fox 狐狸 jumps over the lazy dog über Füchse 🦊 and the fox's den 12345"


def plain(size: int = 16, bos_id: int | None = None) -> Vocabulary:
    lengths = np.arange(size, dtype=np.uint32)
    return Vocabulary(size=size, eos_id=1, bos_id=bos_id, digest="plain", bytes_per_token_V=lengths)


def documents(count: int, *, size: int = 16, seed: int = 0) -> Iterator[Encoded]:
    random = np.random.default_rng(seed)
    for index in range(count):
        ids_T = random.integers(2, size, random.integers(1, 40))
        yield Encoded.of_ids(ids_T, source=f"source {index % 3}", licence="CC0" if index % 3 else "MIT", index=index)


def stories(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(TEXT.split(), random.integers(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(stories(200), directory, vocab_size=290)
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *stories(300)]))
    return path


def test_what_was_written_is_read_whatever_the_shards(tmp_path: Path) -> None:
    for size in (16, 2**16 + 1):
        given = list(documents(50, size=size))
        for number, tokens_per_shard in enumerate((1, 100, 10**6)):
            directory = tmp_path / f"{size}-{number}"
            write_shards(given, plain(size, bos_id=0), directory, tokens_per_shard=tokens_per_shard)
            dataset = Dataset.open(directory, verify=True)
            for index, document in enumerate(given):
                read = dataset.read(index, 0, int(dataset.lengths_N[index]))
                assert read.tolist() == [0, *document.ids_T.tolist(), 1]
                assert dataset.origin(index).source == document.source
                assert dataset.read(index, 1, 1).tolist() == document.ids_T[:1].tolist()
            assert len(dataset) == 50
            assert dataset.num_tokens == sum(len(document.ids_T) + 2 for document in given)
            shards = dataset.manifest.shards
            assert all(shard.tokens <= tokens_per_shard or shard.documents == 1 for shard in shards)
            assert (len(shards) == 1) == (tokens_per_shard == 10**6)


def test_the_manifest_names_sources_and_licences_of_each_shard(tmp_path: Path) -> None:
    write_shards(documents(3), plain(), tmp_path / "data", tokens_per_shard=1)
    entries = json.loads((tmp_path / "data" / "manifest.json").read_text())["shards"]
    assert [entry["licences"] for entry in entries] == [["MIT"], ["CC0"], ["CC0"]]
    assert [entry["sources"] for entry in entries] == [["source 0"], ["source 1"], ["source 2"]]


def test_bits_per_byte_are_exact_on_text_of_many_bytes(tmp_path: Path, tokenizer: Path, corpus: Path) -> None:
    """A model that finds all ids equally likely: its bits per byte are counted here from the texts themselves."""
    manifest = prepare([corpus], tokenizer, tmp_path / "data")
    texts = [document.text for document in read_documents([corpus])][1:]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert num_bytes > sum(map(len, texts))
    assert (manifest.total("bytes"), manifest.empty_documents, manifest.exact_bytes) == (num_bytes, 1, True)
    dataset = Dataset.open(tmp_path / "data")
    steps = [batch for step in Batches(Sampler(dataset, context=64, epochs=1), global_batch=4) for batch in step]
    # The tokenizer's BOS is the first input of each document, so that every byte of it is predicted.
    assert sum(batch.num_bytes for batch in steps) == num_bytes == dataset.num_bytes
    reader = Tokenizer.load(tokenizer)
    targets = sum(len(reader.encode(text, add_special_tokens=False)) + 1 for text in texts)
    assert sum(batch.num_targets for batch in steps) == targets
    nats = targets * math.log(290)
    assert bits_per_byte(nats, num_bytes) == pytest.approx(targets * math.log2(290) / num_bytes, rel=1e-12)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_names_of_special_tokens_in_a_document_are_text(tokenizer: Path) -> None:
    encoder = Encoder.load(tokenizer)
    reader = Tokenizer.load(tokenizer)
    names = "<s>".join(reader.token_text(id) for id in range(4))
    (encoded,) = encoder.encode([Document(text=names, source="", licence="", index=0)])
    assert min(encoded.ids_T) > 3
    assert reader.decode(encoded.ids_T.tolist()) == names
    assert (encoder.vocabulary.bos_id, encoder.vocabulary.eos_id) == (reader.bos_id, min(reader.eos_ids))


CHAT = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def talking(tokenizer: Path, directory: Path, template: str | None) -> Path:
    """A copy that writes conversations so, or not at all."""
    shutil.copytree(tokenizer, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_conversation_is_written_as_the_server_writes_it(tokenizer: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so."}]
    directory = talking(tokenizer, tmp_path / "tokenizer", CHAT)
    reader = Tokenizer.load(directory)
    assert reader.bos_id is not None
    source = tmp_path / "talk.jsonl"
    named = f"plain {reader.token_text(reader.bos_id)}"
    source.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"text": named}) + "\n")
    prepare([source], directory, tmp_path / "shards")
    dataset = Dataset.open(tmp_path / "shards")
    read = [dataset.read(index, 0, length).tolist() for index, length in enumerate(dataset.lengths_N.tolist())]
    rendered = load_format(directory).render(talk, add_generation_prompt=False)
    assert read[0] == reader.encode(rendered, add_special_tokens=False)
    assert read[0].count(reader.bos_id) == 2
    assert read[1].count(reader.bos_id) == 1  # what begins the document; the name of the token in it is text
    other = talking(tokenizer, tmp_path / "other", CHAT.replace(": ", " says "))
    with pytest.raises(DataError, match=r"differs in the input '0 talk\.jsonl'"):
        prepare([source], other, tmp_path / "shards")


@pytest.mark.parametrize(
    ("message", "template", "told"),
    [
        ({"role": "user", "content": EOS}, CHAT, "which is a special token"),
        ({"role": "user"}, CHAT, "a message that is not one"),
        ({"role": "user", "content": 3}, CHAT, "int as 'content'"),
        ({"role": "user", "content": "a"}, None, "no chat format"),
        ({"role": "user", "content": "a"}, "{{ raise_exception('no') }}", "cannot be written as a conversation"),
    ],
)
def test_conversations_that_cannot_be_written_are_named(
    tokenizer: Path, tmp_path: Path, message: dict[str, object], template: str | None, told: str
) -> None:
    directory = talking(tokenizer, tmp_path / "tokenizer", template)
    source = tmp_path / "talk.jsonl"
    source.write_text(json.dumps({"messages": [message]}) + "\n")
    with pytest.raises(DataError, match=told):
        prepare([source], directory, tmp_path / "shards")


def test_held_out_documents_do_not_depend_on_order(tmp_path: Path) -> None:
    given = list(documents(2000))
    found = []
    for name, order in (("a", given), ("b", given[::-1])):
        write_shards(order, plain(), tmp_path / name, validation=0.1)
        dataset = Dataset.open(tmp_path / name, split="validation")
        lengths = dataset.lengths_N.tolist()
        found.append({dataset.read(index, 0, length).tobytes() for index, length in enumerate(lengths)})
        assert len(Dataset.open(tmp_path / name)) + len(dataset) == 2000
    assert found[0] == found[1]
    assert 140 < len(found[0]) < 260


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt(), DataError("bad row")], ids=repr)
def test_a_writer_that_is_stopped_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def stopping() -> Iterator[Encoded]:
        yield from documents(20)
        raise error

    with pytest.raises(type(error)):
        write_shards(stopping(), plain(), tmp_path / "data", tokens_per_shard=50, inputs={})
    assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]
    # What a killed one left is cleared away by the next.
    (tmp_path / ".data.1.partial").mkdir()
    (tmp_path / ".data.1.partial" / "train-00000.tokens").write_bytes(b"half")
    write_shards(documents(20), plain(), tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_the_same_inputs_are_tokenised_once(tmp_path: Path, tokenizer: Path, corpus: Path) -> None:
    first = prepare(corpus, tokenizer, tmp_path / "data", validation=0.1)
    stamp = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert (
        prepare(str(corpus), tokenizer, tmp_path / "data", validation=0.1) == first == read_manifest(tmp_path / "data")
    )
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"differs in validation: name another place"):
        prepare(corpus, tokenizer, tmp_path / "data", validation=0.2)
    with pytest.raises(DataError, match=r"differs in the input '0 corpus.jsonl'"):
        prepare(Source(path=corpus, licence="MIT"), tokenizer, tmp_path / "data", validation=0.1)
    with pytest.raises(DataError, match="cannot be told whether of these documents"):
        write_shards(iter(()), plain(), tmp_path / "data")


def test_of_two_writers_one_waits_and_finds_it_done(tmp_path: Path) -> None:
    second_waits, results = threading.Event(), []

    def slow() -> Iterator[Encoded]:
        assert second_waits.wait(60)
        yield from documents(20)

    def never() -> Iterator[Encoded]:
        raise AssertionError("the documents were asked for twice")
        yield

    def first() -> None:
        results.append(write_shards(slow(), plain(), tmp_path / "data", inputs={"a": "1"}, waiting=second_waits.set))

    def second() -> None:
        results.append(write_shards(never(), plain(), tmp_path / "data", inputs={"a": "1"}, waiting=second_waits.set))

    writer = threading.Thread(target=first)
    writer.start()
    while not list(tmp_path.glob(".data.*.partial")):
        assert writer.is_alive()
    second()
    writer.join()
    assert results[0] == results[1]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[Written] = []
    manifest = write_shards(documents(9), plain(), tmp_path / "data", progress=told.append)
    assert [written.documents for written in told] == list(range(1, 10))
    assert told[-1].tokens == manifest.total("tokens")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there is no document with a token in it"),
        ([np.array([3, 16])], {}, "text, document 0, has the id 16, the vocabulary has 16 ids"),
        ([np.array([3, -1])], {}, "text, document 0, has the id -1"),
        ([np.array([3])], {"validation": 1.0}, "the validation fraction is 1.0"),
        ([np.array([3])], {"tokens_per_shard": 0}, "tokens_per_shard is 0"),
    ],
)
def test_bad_datasets_are_not_written(
    tmp_path: Path, given: list[np.ndarray], options: dict[str, float], message: str
) -> None:
    encoded = [Encoded.of_ids(ids_T, source="text", licence="", index=0) for ids_T in given]
    with pytest.raises(DataError, match=message):
        write_shards(encoded, plain(), tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("…")
    with pytest.raises(DataError, match="letters exists and is not a tokenised dataset"):
        write_shards(documents(3), plain(), tmp_path / "letters")
    assert (tmp_path / "letters" / "love.txt").exists()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(DataError, match="file"):
            write_shards(documents(3), plain(), place)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DataError, match=r"the disk of .*data holds no more \(File too large\).*: free some space"):
            write_shards(documents(400), plain(), tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]


def test_documents_that_cannot_be_read_are_not_a_full_disk(tmp_path: Path) -> None:
    def refused() -> Iterator[Encoded]:
        yield from itertools.islice(documents(9), 3)
        raise OSError(errno.ENOSPC, "no space for the cache of the source")

    with pytest.raises(DataError, match=r"the documents cannot be read .*cache of the source"):
        write_shards(refused(), plain(), tmp_path / "data")


def test_damaged_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a tokenised dataset, manifest.json is missing"):
        Dataset.open(tmp_path)
    directory = tmp_path / "data"
    write_shards(documents(9), plain(), directory)
    with pytest.raises(DataError, match="has no validation documents"):
        Dataset.open(directory, split="validation")
    tokens, manifest = directory / "train-00000.tokens", directory / "manifest.json"
    whole, text = tokens.read_bytes(), manifest.read_text()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"has {len(whole) - 2} bytes, the manifest says {len(whole)}"):
        Dataset.open(directory)
    tokens.write_bytes(whole[:-2] + b"\5\5")
    Dataset.open(directory)
    with pytest.raises(DataError, match="not what the manifest names by SHA-256"):
        Dataset.open(directory, verify=True)
    tokens.unlink()
    with pytest.raises(DataError, match=r"train-00000.tokens is missing"):
        Dataset.open(directory)
    for broken, message in (
        (text.replace("daedal-tokens-1", "daedal-tokens-9"), "has the format 'daedal-tokens-9'"),
        (text.replace('"eos_id"', '"eos"'), "is not a manifest"),
        (text[:99], "is not a manifest"),
    ):
        manifest.write_text(broken)
        with pytest.raises(DataError, match=message):
            Dataset.open(directory)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Path, corpus: Path) -> None:
    prepare([corpus], tokenizer, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    dataset.check(vocab_size=290, tokenizer_digest=tokenizer_digest(tokenizer))
    dataset.check(vocab_size=320)
    with pytest.raises(DataError, match=r"the model has a vocabulary of 289 ids, .* was tokenised with 290"):
        dataset.check(vocab_size=289)
    train_tokenizer(stories(20), tmp_path / "other", vocab_size=290)
    with pytest.raises(DataError, match="tokenise with the model's tokenizer"):
        dataset.check(vocab_size=290, tokenizer_digest=tokenizer_digest(tmp_path / "other"))
    # Another layout of the same file is the same tokenizer.
    (tmp_path / "same").mkdir()
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps({**spec, "truncation": None}))
    assert tokenizer_digest(tmp_path / "same") == tokenizer_digest(tokenizer)
