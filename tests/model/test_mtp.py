"""The drafting modules: V3's against transformers, V4's against its equations written out token by token.

V3.2's module is V3's around a layer with an indexer. Where both agree in one pass, chunks and withdrawn drafts over the
cache must not change a thing; the modules' slots are those of the layers after the last.
"""

import math
from collections.abc import Callable, Iterable
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from daedal import shapes
from daedal.infer.cache import REWIND, PagedCache, PagedView
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer, empty
from tests.model.feeding import Feeder
from tests.model.oracles import TOLERANCE, our_names, random_ids, randomise, v3_pair, v32_pair
from tests.tiny import tiny_model

MODULES = 2


def with_drafts(oracle: nn.Module, model: Transformer, seed: int) -> tuple[MtpModel, Transformer]:
    """transformers' modules for the oracle, random, and our model with their weights."""
    oracle.config.num_mtp_layers = MODULES
    oracle.config.mtp_layer_types = ["full_attention"] * MODULES
    oracle.config.mtp_mlp_layer_types = ["sparse"] * MODULES
    modules = MtpModel(oracle, MODULES).float().eval()
    randomise(modules.layers, seed, oracle.config.n_routed_experts)
    ours = empty(model.config.replace(num_nextn_predict_layers=MODULES), drafting=True)
    drafts = {
        "mtp." + name.replace(".mtp_block.", ".").replace(".post_norm.", ".norm."): tensor
        for name, tensor in modules.layers.state_dict().items()
    }
    ours.load_state_dict(our_names(oracle) | drafts, strict=True)
    return modules, ours


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(("make", "seed"), [(v3_pair, 0), (v3_pair, 1), (v32_pair, 4)])
def test_v3s_modules_equal_the_oracles(make: Callable[[int], tuple[nn.Module, Transformer]], seed: int) -> None:
    """Module k gets what its forerunner carries at a position and the token k + 1 places on; the backbone's is normed.
    transformers counts the positions of the latter, we of the former: rotation knows only distances.
    """
    oracle, model = make(seed)
    modules, model = with_drafts(oracle, model, seed + 1)
    ids_1T = random_ids(seed, 1, 90)
    length = 90 - MODULES
    with torch.no_grad():
        theirs = oracle.model(ids_1T[:, :length], use_cache=False).last_hidden_state
        ours = model.states(RaggedBatch.rectangular(ids_1T[:, :length]))
        for module in range(MODULES):
            next_1T = ids_1T[:, module + 1 :][:, :length]
            positions = torch.arange(module + 1, module + 1 + length).unsqueeze(0)
            theirs = modules.forward_layer(module, theirs, positions, None, input_ids=next_1T)
            ours = model.draft(module, RaggedBatch.rectangular(next_1T), ours)
            wanted = oracle.lm_head(theirs[0])
            assert wanted.std() > 0.3
            got = model.head(model.finish_draft(module, ours))
            torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


class WrittenOut:
    """V4's module in float64 as its equations stand, one token at a time; weights by their names in the module."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.mtp[0].state_dict().items()}

    def states(self, before_TMD: Tensor, embedded_TD: Tensor) -> Tensor:
        enter, carry = self.weights["e_proj.weight"], self.weights["h_proj.weight"]
        streams = [
            torch.stack([enter @ self.norm(embedded, "enorm") + carry @ self.norm(x, "hnorm") for x in before])
            for before, embedded in zip(before_TMD, embedded_TD, strict=True)
        ]
        inputs, mixes = zip(*(self.collapse(x_MD, "attn_hc") for x_MD in streams), strict=True)
        outputs = self.attend([self.norm(x, "input_layernorm") for x in inputs])
        streams = [self.expand(y, *pair) for y, pair in zip(outputs, zip(streams, mixes, strict=True), strict=True)]
        inputs, mixes = zip(*(self.collapse(x_MD, "ffn_hc") for x_MD in streams), strict=True)
        outputs = [self.experts(self.norm(x, "post_attention_layernorm")) for x in inputs]
        return torch.stack(
            [self.expand(y, *pair) for y, pair in zip(outputs, zip(streams, mixes, strict=True), strict=True)]
        )

    def finish(self, x_MD: Tensor) -> Tensor:
        flat = self.unit(x_MD.flatten())
        mix = self.weights["hc_head.hc_fn"] @ flat * self.weights["hc_head.hc_scale"] + self.weights["hc_head.hc_base"]
        return self.norm((torch.sigmoid(mix) + self.config.hc_eps) @ x_MD, "norm")

    def unit(self, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.config.rms_norm_eps).sqrt()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.unit(x) * self.weights[f"{name}.weight"]

    def collapse(self, x_MD: Tensor, name: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        streams, eps = x_MD.shape[0], self.config.hc_eps
        mix = self.weights[f"{name}.fn"] @ self.unit(x_MD.flatten())
        base, (first, second, third) = self.weights[f"{name}.base"], self.weights[f"{name}.scale"]
        pre = torch.sigmoid(first * mix[:streams] + base[:streams]) + eps
        post = 2 * torch.sigmoid(second * mix[streams : 2 * streams] + base[streams : 2 * streams])
        comb = (third * mix[2 * streams :] + base[2 * streams :]).view(streams, streams).softmax(1) + eps
        for turn in range(2 * self.config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(turn % 2, keepdim=True) + eps)
        return pre @ x_MD, (post, comb)

    def expand(self, y_D: Tensor, x_MD: Tensor, mix: tuple[Tensor, Tensor]) -> Tensor:
        post, comb = mix
        streams = range(x_MD.shape[0])
        return torch.stack([post[k] * y_D + sum(comb[j, k] * x_MD[j] for j in streams) for k in streams])

    def turned(self, x: Tensor, position: int) -> Tensor:
        """The last numbers of a head in pairs, plain, on the base of layers without entries."""
        plain, half = x.shape[0] - self.config.rope_dim, self.config.rope_dim // 2
        x = x.clone()
        for index in range(half):
            angle = position * self.config.rope_parameters.rope_theta ** (-index / half)
            a, b = x[plain + 2 * index].item(), x[plain + 2 * index + 1].item()
            x[plain + 2 * index] = a * math.cos(angle) - b * math.sin(angle)
            x[plain + 2 * index + 1] = a * math.sin(angle) + b * math.cos(angle)
        return x

    def attend(self, inputs: list[Tensor]) -> list[Tensor]:
        config, w = self.config, self.weights
        rows = [
            self.turned(self.norm(w["self_attn.kv_proj.weight"] @ x, "self_attn.kv_norm"), position)
            for position, x in enumerate(inputs)
        ]
        outputs = []
        for position, x in enumerate(inputs):
            query = w["self_attn.q_b_proj.weight"] @ self.norm(w["self_attn.q_a_proj.weight"] @ x, "self_attn.q_a_norm")
            seen = rows[max(0, position - config.sliding_window + 1) : position + 1]
            heads = []
            for head, q in enumerate(query.view(config.num_attention_heads, -1)):
                q = self.turned(self.unit(q), position)
                scores = [math.exp((q @ row).item() / math.sqrt(config.head_dim)) for row in seen]
                total = sum(scores) + math.exp(w["self_attn.sinks"][head].item())
                mixed = sum(score / total * row for score, row in zip(scores, seen, strict=True))
                heads.append(self.turned(mixed, -position))
            groups = torch.stack(heads).view(config.o_groups, -1)
            narrow = w["self_attn.o_a_proj.weight"].view(config.o_groups, config.o_lora_rank, -1)
            together = torch.cat([matrix @ group for matrix, group in zip(narrow, groups, strict=True)])
            outputs.append(w["self_attn.o_b_proj.weight"] @ together)
        return outputs

    def experts(self, x: Tensor) -> Tensor:
        config, w = self.config, self.weights
        scores = torch.log1p((w["mlp.gate.weight"] @ x).exp()).sqrt()
        steered = (scores + w["mlp.gate.e_score_correction_bias"]).tolist()
        chosen = sorted(range(len(steered)), key=lambda expert: -steered[expert])[: config.num_experts_per_tok]
        shared = [w[f"mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")]
        y = self.gated(x, *shared)
        for expert in chosen:
            gate, up = w["mlp.experts.gate_up_proj"][expert].chunk(2)
            share = config.routed_scaling_factor * scores[expert] / scores[chosen].sum()
            y = y + share * self.gated(x, gate, up, w["mlp.experts.down_proj"][expert])
        return y

    def gated(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        opened, carried = (gate @ x).clamp(max=limit), (up @ x).clamp(-limit, limit)
        return down @ (opened / (1 + (-opened).exp()) * carried)


def test_v4s_module_is_its_equations() -> None:
    model = tiny_model("deepseek_v4", seed=3, drafting=True, swiglu_limit=0.3, hc_eps=1e-3).double()
    before_TMD, next_ids = torch.randn(21, 4, 48).double(), random_ids(3, 21).tolist()
    with torch.no_grad():
        got_TMD = model.draft(0, RaggedBatch.of([next_ids]), before_TMD)
        written = WrittenOut(model)
        wanted_TMD = written.states(before_TMD, model.embed_tokens.weight[next_ids])
        finished_TD = torch.stack([written.finish(x_MD) for x_MD in wanted_TMD])
        # Our angles and router are float32 whatever the model.
        torch.testing.assert_close(got_TMD, wanted_TMD, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.finish_draft(0, got_TMD), finished_TD, rtol=0, atol=1e-5)


def _all_logits(model: Transformer, ids: list[int], length: int) -> Tensor:
    """[modules + 1, length, V]: of the backbone and of each module, in one pass without a cache."""
    states = model.states(RaggedBatch.of([ids[:length]]))
    logits = [model.head(model.finish(states))]
    for module in range(MODULES):
        states = model.draft(module, RaggedBatch.of([ids[module + 1 :][:length]]), states)
        logits.append(model.head(model.finish_draft(module, states)))
    return torch.stack(logits)


def _module(model: Transformer, module: int, states: Iterable[Tensor]) -> Callable[[RaggedBatch, PagedView], Tensor]:
    return lambda batch, view: model.draft(module, batch, torch.cat(list(states)), view)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_modules_that_follow_in_chunks_and_draft_ahead_equal_one_pass(family: str) -> None:
    """As in serving: the backbone takes a chunk and drafts behind it, which are withdrawn; each module follows over the
    chunk with its own past, then drafts a few tokens further, whose rows it writes again later.
    """
    model = tiny_model(family, seed=1, drafting=True, num_nextn_predict_layers=MODULES)
    lengths, wrong = (145, 20, 3), random_ids(9, REWIND).tolist()
    ids = [random_ids(seed, length + MODULES).tolist() for seed, length in enumerate(lengths)]
    with torch.no_grad():
        wanted = [_all_logits(model, one, length) for one, length in zip(ids, lengths, strict=True)]
    feeder = Feeder(model, [length + REWIND for length in lengths], drafting=True)
    for sizes in cycle([(1, 5, 30), (30, 1, 5), (5, 30, 1)]):
        pasts = list(feeder.pasts)
        ends = [min(past + size, length) for past, size, length in zip(pasts, sizes, lengths, strict=True)]
        going = [name for name in range(3) if ends[name] > pasts[name]]
        if not going:
            break
        drafts = wrong[: sizes[0] % REWIND]
        fed = {name: ids[name][pasts[name] : ends[name]] + drafts for name in going}
        states = {name: rows[: ends[name] - pasts[name]] for name, rows in feeder.step(fed, model.states).items()}
        for name, rows in states.items():
            right_TV = wanted[name][0][pasts[name] : ends[name]]
            torch.testing.assert_close(model.head(model.finish(rows)), right_TV, rtol=0, atol=TOLERANCE)
        for module in range(MODULES):
            feeder.pasts[:] = pasts
            following = {name: ids[name][pasts[name] + module + 1 : ends[name] + module + 1] for name in going}
            states = feeder.step(following, _module(model, module, states.values()))
            for name, rows in states.items():
                right_TV = wanted[name][module + 1][pasts[name] : ends[name]]
                got_TV = model.head(model.finish_draft(module, rows))
                torch.testing.assert_close(got_TV, right_TV, rtol=0, atol=TOLERANCE)
            ahead = {name: rows[-1:] for name, rows in states.items()}
            for token in wrong[: REWIND - module]:
                ahead = feeder.step({name: [token] for name in going}, _module(model, module, ahead.values()))
        feeder.pasts[:] = ends
    feeder.assert_nothing_else_was_touched()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_a_module_keeps_what_its_layer_reads_in_slots_of_its_own(family: str) -> None:
    """V4's modules have a window and nothing else, whatever the layers before them are."""
    config = tiny_model(family, num_nextn_predict_layers=MODULES).config
    backbone, everything = shapes.cache(config), shapes.cache(config, drafting=True)
    added = [slot for slot in everything if slot not in backbone]
    layers = [config.num_hidden_layers + module for module in range(MODULES)]
    assert sorted({slot.layer for slot in added}) == layers
    names = {"deepseek_v3": ["latent"], "deepseek_v32": ["latent", "index_key"], "deepseek_v4": ["window"]}
    assert [slot.name for slot in added] == names[family] * MODULES
    cache = PagedCache(config, num_pages=1, page_size=128, dtype=torch.float32)
    model = tiny_model(family, drafting=True, num_nextn_predict_layers=MODULES)
    batch = RaggedBatch.of([[5]])
    with torch.no_grad(), pytest.raises(ValueError, match=f"layer {layers[0]} stores"):
        model.draft(0, batch, model.states(batch), cache.view([(0,)], [0], [1]))
