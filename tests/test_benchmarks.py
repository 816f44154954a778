"""The parts of the benchmarks that could lie: what is written for a peer, and what a ratio is made of. No timing."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import daedal
from daedal.checkpoint.save import save
from daedal.config import ModelConfig
from daedal.cost.count import active_params
from daedal.model.transformer import empty, initialise
from daedal.shapes import parameters
from daedal.train.precision import apply, preset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "vocab_size": 1100,
    "max_position_embeddings": 512,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    yield importlib.import_module
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def checkpoint(bench: Any, tmp_path: Path) -> Path:
    published = bench("decode").MODEL_A | TINY
    directory = tmp_path / "tiny"
    save(initialise(empty(ModelConfig.from_published(published), dtype=torch.bfloat16), seed=0), directory)
    return directory


def test_gguf_holds_every_parameter_once_and_keys_transposed(bench: Any, checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writing, target = bench("gguf_writing"), tmp_path / "tiny.gguf"
    writing.write_bf16(checkpoint, target)
    model = daedal.load(checkpoint, device="cpu")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    biases = sum(tensor.n_elements for name, tensor in tensors.items() if name.endswith("exp_probs_b.bias"))
    assert sum(tensor.n_elements for tensor in tensors.values()) - biases == sum(
        parameter.numel() for parameter in model.parameters()
    )
    expansion = model.layers[0].self_attn.kv_b_proj.weight.detach().float().unflatten(0, (2, -1))
    stored = tensors["blk.0.attn_k_b.weight"]
    keys = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(keys, expansion[:, :32].transpose(1, 2))
    assert writing.active_bytes(target, batch=10**6) == pytest.approx(
        sum(tensor.n_bytes for tensor in tensors.values()) - tensors["token_embd.weight"].n_bytes
    )


def test_engine_side_holds_the_context_it_is_asked_for(bench: Any, checkpoint: Path) -> None:
    sides = bench("peer_sides")
    side = sides.Daedal(checkpoint, "plain", 1)
    side.prefill(sides.PROMPT)
    assert not side.engine.has_work
    side.start(2, 40, sides.PROMPT)
    for _ in range(3):
        assert len(sides.decode(side, seconds=60.0)) == sides.STEPS - 1
    assert side.steps <= side.drift + sides.STEPS
    assert side.kv_bytes_per_token() == 2 * (32 + 16) * 2
    assert side.active_bytes(1) < side.active_bytes(2) < sum(tensor.nbytes for tensor in side.model.parameters())


def test_ratios_are_taken_within_a_round(bench: Any) -> None:
    found = bench("peers").ratios({"daedal": [2.0, 12.0], "llama.cpp": [1.0, 4.0]})
    assert found == {"ratio to llama.cpp": [2.0, 3.0]}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_random_packed_weights_load(bench: Any, tmp_path: Path, checkpoint: Path, weights: str) -> None:
    config = ModelConfig.read(checkpoint)
    directory = tmp_path / "packed"
    directory.mkdir()
    bench("peer_models").write_random_packed(directory, config, weights)
    side = bench("peer_sides").Daedal(directory, weights, 1)
    assert torch.isfinite(side.model.logits(torch.tensor([[1, 2, 3]]))).all()


def test_quality_compares_checkpoints_that_were_made_of_the_model(bench: Any, checkpoint: Path) -> None:
    quality = bench("quality")
    parts = [torch.arange(1, 33).unsqueeze(0)]
    found = quality.compare(checkpoint, [], dict([quality.named(f"as it was={checkpoint}")]), parts)
    for rows in found.values():
        assert rows["as it was"] == rows["unpacked"]
    with pytest.raises(argparse.ArgumentTypeError, match="no NAME=PATH"):
        quality.named(str(checkpoint))


def test_silicon_quality_measures_the_arithmetic_that_it_names(bench: Any, checkpoint: Path) -> None:
    silicon = bench("silicon_quality")
    parts = [torch.arange(1, 33).unsqueeze(0)]
    found = silicon.compare(daedal.load(checkpoint, device="cpu"), ["w8a8", "int8, groups of 32"], parts)
    assert found["bf16"].divergence == 0 < found["int8, groups of 32"].divergence < found["w8a8"].divergence
    model = daedal.load(checkpoint, device="cpu")
    apply(model, preset("w8a8"))
    logs = list(silicon.log_probabilities(model, parts, "by the preset"))
    assert found["w8a8"].perplexity == pytest.approx(silicon.perplexity(parts, logs))
    rounded = {module for module in model.modules() if getattr(module, "arithmetic", None) is not None}
    assert silicon.compute_in(model, silicon.FP8) == len(rounded) > 0
    assert all(module.arithmetic is silicon.FP8 for module in rounded)
    assert all(name == used.name for name, used in silicon.ARITHMETICS.items())


def test_families_of_one_size_are_alike_in_what_a_token_meets(bench: Any, tmp_path: Path) -> None:
    intelligence = bench("cost_of_intelligence")
    options = argparse.Namespace(
        out=tmp_path, vocabulary=1024, context=256, batch=4096, tokens=500_000, rate=8e-3, seed=0
    )
    for size in (2, 3, 4):
        configs = {
            family: ModelConfig.from_published(intelligence.recipe(family, size, options).published())
            for family in intelligence.FAMILIES
        }
        assert [config.model_type for config in configs.values()] == ["llama", "deepseek_v3", "deepseek_v3"]
        assert [config.n_routed_experts for config in configs.values()] == [0, 0, 8]
        active = [active_params(config, parameters(config)) for config in configs.values()]
        assert max(active) / min(active) < 1.03


def test_load_counts_what_came_in_time_and_times_every_answer(bench: Any) -> None:
    """Answers that ended later give times but no rate; those that never ended are told apart."""
    seen = [
        {"asked": 0.0, "events": [1.0, 2.0, 4.0], "reason": "length", "tokens": 3, "ended": 4.0},
        {"asked": 1.0, "events": [4.0, 11.0], "reason": "length", "tokens": None, "ended": 11.0},
        {"asked": 2.0, "events": [], "reason": None, "tokens": None, "ended": 12.0},
    ]
    told = bench("load").told(seen, 10.0)
    assert (told["answers"], told["failed"], told["tokens_an_answer"]) == (2, 1, 2.5)
    assert told["requests_per_second"] == pytest.approx(0.1)
    assert told["tokens_per_second"] == pytest.approx(0.4)
    assert (told["first_p50"], told["first_p99"]) == (1.0, 3.0)
    assert (told["between_p50"], told["between_p99"]) == (2.0, 7.0)
    assert (told["per_token_p50"], told["per_token_p99"]) == (1.5, 7.0)


def test_a_soak_sees_memory_that_grows(bench: Any) -> None:
    soak = bench("soak")

    def samples(per_minute: float) -> list[Any]:
        rest = {"engine_mb": 1.0, "front_files": 1, "engine_files": 1, "kv_bytes_used": 0, "running": 0, "requests": 0}
        return [soak.Sample(minutes=m, front_mb=200 + (50 if m < 5 else per_minute * m), **rest) for m in range(30)]

    assert soak.growth(samples(0.0), "front_mb", 5.0)["mb_per_hour"] == pytest.approx(0.0, abs=1e-6)
    assert soak.growth(samples(0.5), "front_mb", 5.0)["mb_per_hour"] == pytest.approx(30.0)


def test_gradients_of_ops_are_counted_and_compared(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "24", "--length", "10", "--shrink", "64", "--experts", "8", "--rounds", "1", "--warm", "0"]
    bench("op_gradients").main(["--device", "cpu", *sizes])
    rows = {row["op"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    # 24 tokens to all 8 experts of 112 x 32; 55 + 55 + 10 pairs of tokens, two heads of 192 and 128 numbers.
    for op, flops in (("experts", 6 * 24 * 8 * 112 * 32), ("attention", 2 * 2 * (192 + 128) * 120)):
        assert rows[op]["forward_flops_per_s"] * rows[op]["forward_s"] == pytest.approx(flops)
        assert rows[op]["backward_flops_per_s"] * rows[op]["backward_s"] == pytest.approx(2 * flops)
        assert rows[op]["apart"] < 0.05
