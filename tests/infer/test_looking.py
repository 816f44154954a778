"""What experts are used, shown to who asks, and no answer is another because of it."""

from pathlib import Path

import pytest

import daedal
from daedal.checkpoint.save import save
from daedal.infer.engine import Engine
from daedal.infer.looking import STEPS
from daedal.infer.request import Request, SamplingParams
from daedal.infer.stats import ExpertsSeen
from tests.infer.engines import assert_idle, same, speculation
from tests.infer.models import WIDE_EXPERTS, prompts
from tests.infer.test_prefix_engine import model_of
from tests.native import needs_kernels
from tests.private_cache import private_cache
from tests.tiny import tiny_model

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(
    ("kind", "method"), [("latent", None), ("indexed", None), ("compressed", None), ("latent", "mtp")]
)
def test_every_choice_of_some_steps_is_counted(kind: str, method: str | None) -> None:
    model, asked = model_of(kind), prompts(9, 5, seed=8)
    speculate = None if method is None else speculation(method, model)
    expected = Engine(model, speculate=speculate).generate(asked, PARAMS)
    engine = Engine(model, speculate=speculate)
    assert engine.seen() is None
    engine.look()
    for name, prompt in enumerate(asked):
        engine.add(Request(id=str(name), prompt=tuple(prompt), params=PARAMS))
    outputs = {output.request_id: output for output in engine.step()}
    for _ in range(STEPS - 1):
        assert engine.seen() is None
        for output in engine.step():
            outputs[output.request_id].extend(output)
    seen = engine.seen()
    assert seen is not None
    assert engine.seen() is None, "it is given once"
    config = model.config
    assert list(seen.layers) == [place for place, layer in enumerate(config.mlp_layer_types) if layer != "dense"]
    fed = sum(len(prompt) for prompt in asked)
    assert seen.num_tokens >= fed + 2 * (STEPS - 1) - 2 * STEPS * (method is not None)
    for counts in seen.counts:
        assert len(counts) == config.n_routed_experts
        assert sum(counts) == seen.num_tokens * config.num_experts_per_tok
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].extend(output)
    same([outputs["0"], outputs["1"]], expected)
    assert_idle(engine)


def test_a_model_without_experts_says_so_at_once() -> None:
    engine = Engine(tiny_model("llama"))
    engine.look()
    assert engine.seen() == ExpertsSeen()


@needs_kernels
def test_recorded_steps_go_on_after_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(private_cache(tmp_path / "cache")))
    save(tiny_model("deepseek_v3", **WIDE_EXPERTS), tmp_path / "model")
    model = daedal.load(tmp_path / "model", weights="bf16")
    asked = prompts(6, seed=9)
    expected = Engine(model, prefix_caching=False).generate(asked, PARAMS)
    engine = Engine(model, prefix_caching=False)
    engine.generate(asked, PARAMS)  # from now on steps are recorded
    engine.look()
    same(engine.generate(asked, PARAMS), expected)
    assert engine.seen() is not None
    same(engine.generate(asked, PARAMS), expected)
