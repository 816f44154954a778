"""One model on two processes, token for token as on one: heads and widths divided, experts dealt out, latents whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daedal import shapes
from daedal.checkpoint.load import load
from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.infer.engine import Engine
from daedal.infer.following import dismiss, follow
from daedal.infer.request import Output, SamplingParams
from daedal.infer.speculative import Speculation
from daedal.mesh import Team, TeamLost
from daedal.model.shard import Shard
from daedal.model.transformer import Transformer
from daedal.shapes import sharing
from tests.infer.engines import paged
from tests.infer.models import near, prompts, tiny
from tests.tiny import tiny_config, tiny_model
from tests.train.processes import run

RANKS = 2
# Rows of every kind of rank-0 message: prompts longer than a chunk, one beginning shared, drawn and greedy answers.
LENGTHS = (23, 30, 11)
DRAWN = SamplingParams(max_tokens=7, temperature=0.8, seed=3, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)


def models() -> dict[str, Transformer]:
    """Of every family; sizes that two processes can share, a vocabulary that they cannot halve."""
    return {
        "dense": tiny("dense"),
        "tied": tiny("dense", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        "deepseek_v2": tiny_model("deepseek_v2", max_position_embeddings=64, vocab_size=97),
        "latent": tiny("latent"),
        "indexed": tiny("indexed"),
        "compressed": tiny("compressed"),
    }


def answers(model: Transformer) -> list[Output]:
    """With little room: requests are put back and read again, a beginning is found, drafts are tried."""
    given = prompts(*LENGTHS)
    engine = paged(model, 56, max_batch=3, max_step_tokens=16)
    outputs = engine.generate([*given, [*given[0][:20], 1, 2]], [DRAWN, GREEDY, GREEDY, DRAWN])
    assert engine.stats().num_preemptions or engine.stats().prefix_hits_total
    engine = paged(model, 200, max_batch=1, speculate=Speculation(method="lookup", draft_tokens=3))
    return outputs + engine.generate([[5, 6, 7, 5, 6, 7, 5, 6]], GREEDY)


def numbers(outputs: Sequence[Output]) -> dict[str, Tensor]:
    found = {f"ids.{place}": torch.tensor(output.ids) for place, output in enumerate(outputs)}
    for place, output in enumerate(outputs):
        if output.logprobs is not None:
            found[f"logprobs.{place}"] = torch.tensor([entry.logprob for entry in output.logprobs])
    return found


def shared_answers(rank: int, directories: Mapping[str, str]) -> dict[str, Tensor]:
    team, found = Team(), {}
    for name, directory in directories.items():
        model = load(directory, team=team)
        assert isinstance(model, Shard)
        if rank:
            follow(model)
        else:
            found |= {f"{name}.{key}": value for key, value in numbers(answers(model)).items()}
            dismiss(team)
        found |= {f"{name}.here.{key}": value.detach() for key, value in model.named_parameters()}
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[dict[str, Tensor]]]:
    root = tmp_path_factory.mktemp("shared")
    directories = {name: root / name for name in models()}
    for name, model in models().items():
        save(model, directories[name])
    return directories, run(shared_answers, RANKS, {name: str(path) for name, path in directories.items()})


@pytest.mark.parametrize("kind", models())
def test_two_processes_give_the_tokens_of_one(
    kind: str, shared: tuple[dict[str, Path], list[dict[str, Tensor]]]
) -> None:
    directories, (leader, _) = shared
    expected = numbers(answers(load(directories[kind])))
    assert len(expected) > 5
    for name, value in expected.items():
        found = leader[f"{kind}.{name}"]
        if name.startswith("ids"):
            assert found.tolist() == value.tolist(), name
        else:
            torch.testing.assert_close(found, value, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", models())
def test_each_process_has_its_part_and_the_parts_make_the_whole(
    kind: str, shared: tuple[dict[str, Path], list[dict[str, Tensor]]]
) -> None:
    directories, ranks = shared
    whole = load(directories[kind])
    divided = 0
    for slot in shapes.parameters(whole.config):
        if slot.role in ("hash_table", "router_bias"):
            continue
        expected = whole.get_parameter(slot.name)
        for rank, found in enumerate(ranks):
            here = found[f"{kind}.here.{slot.name}"]
            place = sharing.place(slot, rank, RANKS)
            assert tuple(here.shape) == sharing.shape(slot, rank, RANKS)
            assert torch.equal(here, torch.zeros_like(expected) if place is None else expected[place]), slot.name
            divided += here.numel() < expected.numel()
        if slot.role in ("routed_expert", "dense_mlp", "shared_expert") and slot.name.endswith(("weight", "proj")):
            assert sum(found[f"{kind}.here.{slot.name}"].numel() for found in ranks) == expected.numel()
    assert divided > 5


def shared_logits(rank: int, directory: str) -> dict[str, Tensor]:
    return {"logits": load(directory, dtype=torch.float32, team=Team()).logits(torch.arange(1, 13).view(2, 6))}


def test_a_quantised_checkpoint_is_shared_as_it_stands(tmp_path: Path) -> None:
    """FP8 matrices whose parts do not end with their blocks of scales, and three processes."""
    save(tiny_model("deepseek_v3", n_group=1, topk_group=1, moe_intermediate_size=36), tmp_path / "whole")
    quantize(tmp_path / "whole", tmp_path / "fp8", to="fp8")
    expected = load(tmp_path / "fp8", dtype=torch.float32).logits(torch.arange(1, 13).view(2, 6))
    for found in run(shared_logits, 3, str(tmp_path / "fp8")):
        torch.testing.assert_close(found["logits"], expected, atol=1e-4, rtol=1e-4)


def failing(rank: int, directory: str) -> dict[str, Tensor]:
    """A step fails on rank 0 alone: neither rank may go on as if nothing had happened."""
    team = Team()
    model = load(directory, team=team)
    assert isinstance(model, Shard)
    if rank:
        with pytest.raises(TeamLost, match="rank 1 of 2 cannot go on"):
            follow(model)
        return {}
    engine = Engine(model, cache_bytes=10**6)
    engine.generate([[1, 2, 3]], GREEDY)

    def broken(*given: object) -> None:
        raise ZeroDivisionError("a defect")

    model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(TeamLost, match="a step failed on rank 0 of the model's 2 processes: a defect"):
        engine.generate([[1, 2, 3]], GREEDY)
    return {}


def test_a_step_that_fails_in_one_process_ends_them_all(tmp_path: Path) -> None:
    save(tiny("latent"), tmp_path)
    run(failing, RANKS, str(tmp_path), dying=0)


@pytest.mark.parametrize(
    ("family", "changes", "size", "named"),
    [
        ("llama", {}, 4, "num_attention_heads is 6"),
        ("llama", {"num_attention_heads": 8}, 4, "num_key_value_heads is 2"),
        ("deepseek_v4", {"num_attention_heads": 8, "o_groups": 2}, 4, "o_groups is 2"),
        ("deepseek_v3", {"n_routed_experts": 9, "n_group": 1, "topk_group": 1}, 2, "n_routed_experts is 9"),
        ("llama", {"intermediate_size": 71}, 2, "intermediate_size is 71"),
        ("llama", {}, 0, "give a whole number from 1 to 256"),
    ],
)
def test_models_that_so_many_cannot_share_are_refused(
    family: str, changes: dict[str, int], size: int, named: str
) -> None:
    config: ModelConfig = tiny_config(family, **changes)
    with pytest.raises(ConfigError, match=named):
        sharing.check(config, size)


def drafted(rank: int, directory: str) -> dict[str, Tensor]:
    """A draft model stays whole on rank 0; packed weights and drafting modules are refused."""
    team = Team()
    for refused in ({"weights": "int8"}, {"mtp": True}):
        with pytest.raises(ConfigError, match="cannot be shared by several processes"):
            load(directory, team=team, **refused)
    model = load(directory, team=team)
    assert isinstance(model, Shard)
    if rank:
        with pytest.raises(ConfigError, match="an engine belongs to rank 0"):
            Engine(model, cache_bytes=10**6)
        follow(model)
        return {}
    speculate = Speculation(method="model", draft_model=near(tiny("latent")), draft_tokens=3)
    engine = Engine(model, cache_bytes=10**6, speculate=speculate)
    outputs = engine.generate(prompts(*LENGTHS), GREEDY)
    assert engine.stats().num_accepted_total > 0
    dismiss(team)
    return numbers(outputs)


def test_a_model_drafts_for_one_that_is_shared(tmp_path: Path) -> None:
    save(tiny("latent"), tmp_path)
    expected = numbers(Engine(load(tmp_path), cache_bytes=10**6).generate(prompts(*LENGTHS), GREEDY))
    found, _ = run(drafted, RANKS, str(tmp_path))
    assert {name: value.tolist() for name, value in found.items() if name.startswith("ids")} == {
        name: value.tolist() for name, value in expected.items() if name.startswith("ids")
    }
