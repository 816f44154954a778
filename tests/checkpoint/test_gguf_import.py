"""GGUF to a published checkpoint: exact weights in the right order, the same tokenizer, clear refusals."""

import json
import struct
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from daedal.checkpoint.gguf_header import read_gguf
from daedal.checkpoint.gguf_import import import_gguf
from daedal.errors import CheckpointError
from daedal.text.chat import ChatTemplate
from daedal.text.tokenizer import Tokenizer
from tests.tiny_gguf import HEADS, HIDDEN, KV_HEADS, TEMPLATE, Tensors, write_gguf

UINT8, STRING, ARRAY = 0, 8, 9  # types of GGUF's values
TEXTS = [
    "Hello world",
    "12345 and 3.14, x=22;y=7",
    "  12  34\n\n\t 5 ٣٤٥ ²³",
    "don't I'LL we've",
    "日本語 Füchse 🎉👩‍👩‍👧 \u200b",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x  # ok\r\n",
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensors]:
    directory = tmp_path_factory.mktemp("imported")
    source = tmp_path_factory.mktemp("source") / "model.gguf"
    tensors = write_gguf(source)
    import_gguf(source, directory)
    return source, directory, tensors


def test_weights_equal_what_transformers_reads_from_the_same_file(imported: tuple[Path, Path, Tensors]) -> None:
    source, directory, tensors = imported
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = load_file(directory / "model.safetensors")
    assert len(ours) == len(tensors)
    state = theirs.state_dict()
    assert set(state) - set(ours) == {"lm_head.weight"}
    for name, weight in ours.items():
        assert numpy.array_equal(weight, state[name].numpy()), name
    # And the checkpoint as a whole is one that transformers loads without a word.
    again, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(7)[None]
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_query_and_key_rows_go_back_to_halves(imported: tuple[Path, Path, Tensors]) -> None:
    _, directory, tensors = imported
    ours = load_file(directory / "model.safetensors")
    for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
        interleaved = tensors[f"blk.1.attn_{kind}.weight"].reshape(heads, -1, HIDDEN)
        halves = ours[f"model.layers.1.self_attn.{kind}_proj.weight"].reshape(heads, -1, HIDDEN)
        assert numpy.array_equal(halves[:, : halves.shape[1] // 2], interleaved[:, ::2])
        assert numpy.array_equal(halves[:, halves.shape[1] // 2 :], interleaved[:, 1::2])


def test_config_tokenizer_and_template_come_along(imported: tuple[Path, Path, Tensors]) -> None:
    _, directory, _ = imported
    config = json.loads((directory / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 50000.0
    assert config["tie_word_embeddings"] is True
    assert config["head_dim"] == HIDDEN // HEADS
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0})
    assert tokenizer.decode(tokenizer.encode("x ab<tool><eos>12")) == "x ab<tool>12"
    assert tokenizer.encode("12") == [tokenizer.encode("1")[0], tokenizer.encode("2")[0]]
    assert ChatTemplate.load(directory).source == TEMPLATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma3"}, "holds a 'gemma3' model, only 'llama' is read"),
        ({"pre": "llama-bpe"}, "cut as 'llama-bpe'"),
        ({"extra_tensor": "rope_freqs.weight"}, "'rope_freqs.weight' of the GGUF file is not one of a Llama model"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "model.gguf", tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    whole = source.read_bytes()
    for damaged in (b"", b"GGUF", whole[:200], whole[: len(whole) // 2], b"PK" + whole[2:]):
        source.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            import_gguf(source, tmp_path)


def test_a_tensor_whose_shape_was_changed_is_refused(tmp_path: Path) -> None:
    """Found by fuzzing: a dimension of 0 in what is packed."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_gate.weight"
    dims = data.index(name) + len(name) + 4  # behind their number, which has four bytes
    data[dims + 8 : dims + 16] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_gate.weight' of .* has shape .* cannot be read"):
        import_gguf(path, tmp_path)


@pytest.mark.parametrize(
    ("key", "kind", "count"),
    [
        (b"tokenizer.ggml.token_type", UINT8, 2**40),
        (b"tokenizer.ggml.token_type", UINT8, 2**64 - 1),
        (b"tokenizer.ggml.tokens", UINT8, 2**40),
        (b"tokenizer.ggml.tokens", STRING, 2**40),
        (b"tokenizer.ggml.tokens", ARRAY, 2**40),
    ],
)
def test_an_array_longer_than_its_file_is_not_read(tmp_path: Path, key: bytes, kind: int, count: int) -> None:
    """Found by fuzzing: gguf reads value after value beyond the end of the file, for as long as the count says."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    inner = data.index(key) + len(key) + 4  # behind the type of the value, which has four bytes
    data[inner : inner + 12] = struct.pack("<IQ", kind, count)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        import_gguf(path, tmp_path)


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A small file could else become any number of large weights."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    for name in (b"blk.0.ffn_gate.weight", b"blk.0.ffn_up.weight"):
        dims = data.index(name) + len(name) + 4
        data[dims : dims + 16] = struct.pack("<QQ", HIDDEN, 800)
        data[dims + 20 : dims + 28] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors claim"):
        import_gguf(path, tmp_path)


def test_a_file_of_the_other_byte_order_is_walked_alike(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", numpy.ones((2, 4), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(tmp_path / "model.gguf")
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert [tensor.shape.tolist() for tensor in tensors] == [[4, 2]]


def test_the_default_models_ids_equal_those_of_transformers(smollm2: Path) -> None:
    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    backend = theirs.backend_tokenizer
    # Cut as the model was trained: digits one by one, then GPT-2's pattern over bytes.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        detokenizer = ours.detokenizer()
        assert "".join([detokenizer.push(id) for id in ids]) + detokenizer.finish() == ours.decode(ids)
    assert ours.decode(ours.encode("1234 🎉")) == "1234 🎉"
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, 49152)
    # Known ids of the published tokenizer: words keep their space, digits stand alone.
    assert [ours.token_bytes(id) for id in ours.encode(" the 42")] == [b" the", b" ", b"4", b"2"]
