"""Recipes: what follows from the dial, what may be said instead, and what is refused."""

from dataclasses import fields

import pytest

from daedal import shapes
from daedal.config import ModelConfig
from daedal.cost.count import active_params
from daedal.cost.training import flops_per_token
from daedal.errors import ConfigError
from daedal.train.recipe import FAMILIES, Recipe
from tests.tiny import tiny_config


def config_of(recipe: Recipe) -> ModelConfig:
    return ModelConfig.from_published(recipe.published())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 12, 20, 48])
def test_every_size_is_a_model(family: str, size: int) -> None:
    recipe = Recipe(size=size, family=family)
    config = config_of(recipe)
    plan = recipe.plan(config)
    assert config.model_type == family
    assert (config.hidden_size, config.num_nextn_predict_layers) == (64 * size, 1)
    assert plan.stages[0][1] == 0
    assert plan.stages[-1][2] == plan.steps
    assert all(before[2] == after[1] for before, after in zip(plan.stages, plan.stages[1:], strict=False))
    assert plan.schedule.at(plan.steps - 1) == pytest.approx(0.0)


def test_a_larger_size_is_larger_in_everything_but_the_rate() -> None:
    recipes = [Recipe(size=size) for size in (2, 4, 8, 12)]
    configs = [config_of(recipe) for recipe in recipes]
    plans = [recipe.plan(config) for recipe, config in zip(recipes, configs, strict=True)]
    active = [active_params(config, shapes.parameters(config)) for config in configs]
    for values in (active, [plan.tokens for plan in plans], [plan.flops_per_token for plan in plans]):
        assert values == sorted(set(values))
    assert [plan.rate for plan in plans] == sorted({plan.rate for plan in plans}, reverse=True)
    # GPT-2 small has 124 M parameters, 39 M of them in its embedding.
    assert 80e6 < active[-1] < 160e6


def test_what_is_said_is_what_happens() -> None:
    recipe = Recipe(
        size=4,
        vocabulary=1000,
        width=96,
        layers=3,
        heads=3,
        experts=10,
        active=3,
        expert_width=48,
        context=128,
        rate=1e-3,
        batch=1024,
        tokens=10_240,
        warmup=2,
        mtp=0,
        changes={"kv_lora_rank": 40},
    )
    config = config_of(recipe)
    plan = recipe.plan(config)
    said = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert said == (1024, 96, 3, 3)
    said = (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.kv_lora_rank)
    assert said == (10, 3, 48, 40)
    assert (plan.context, plan.samples, plan.steps, plan.rate, plan.schedule.warmup) == (128, 8, 10, 1e-3, 2)


def test_settings_leave_what_follows_from_size_to_follow_anew() -> None:
    changed = Recipe(size=2, rate=0.1).with_settings({"size": 4})
    assert changed == Recipe(size=4, rate=0.1)
    assert config_of(changed).hidden_size == 256
    assert Recipe(size=2).with_settings({"family": "deepseek_v4"}) == Recipe(size=2, family="deepseek_v4")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 0}, "`size` is 0: it must be a whole number from 1"),
        ({"size": "4"}, "`size` is the text '4'"),
        ({"family": "llama"}, "`family` is 'llama': it must be one of deepseek_v3, deepseek_v4"),
        ({"rate": "1e-3"}, "without quotes"),
        ({"batch": -1}, "`batch` is -1"),
        ({"precision": "fp7"}, "`precision` is 'fp7'"),
        ({"stages": {"sparse": 0.5, "dense": 0.5}}, "in the order dense, warm-up, sparse"),
        ({"stages": {"dense": 0.5}}, "add up to 1"),
        ({"sise": 3}, "a recipe has no 'sise': it has size, text"),
    ],
)
def test_refusals(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Recipe(size=2).with_settings(settings)


def test_a_batch_that_does_not_divide() -> None:
    recipe = Recipe(size=2, context=64, batch=192, tokens=6400)
    plan = recipe.plan(config_of(recipe))
    assert plan.micro_batches(3) == 1
    with pytest.raises(ConfigError, match=r"3 samples does not divide among 2 processes: .* multiple of 128 tokens"):
        plan.micro_batches(2)
    with pytest.raises(ConfigError, match=r"batch is 200 tokens, a sample has 64: .* as 192"):
        recipe.with_settings({"batch": 200}).plan(config_of(recipe))


def test_micro_batches_are_as_few_as_fit() -> None:
    recipe = Recipe(size=2, context=64, batch=64 * 12, micro_tokens=64 * 5, tokens=6400)
    plan = recipe.plan(config_of(recipe))
    assert [plan.micro_batches(count) for count in (1, 2, 4, 12)] == [3, 2, 1, 1]


def test_biases_are_as_fast_as_published_and_faster_where_a_run_is_short_or_its_rate_is_high() -> None:
    def speed(steps: int, rate: float = 2.2e-4, **settings: float) -> float:
        settings["rate"] = rate
        recipe = Recipe(size=2, context=64, batch=64, tokens=64 * steps, **settings)  # type: ignore[arg-type]
        return recipe.plan(config_of(recipe)).bias_speed

    assert speed(10**6) == speed(3000) == 1e-3
    assert speed(300) == speed(300, rate=1e-3) == pytest.approx(1e-2)
    assert speed(3000, rate=1e-2) == speed(300, rate=1e-2) == pytest.approx(3e-2)
    assert speed(1) == 1.0
    assert speed(300, bias_speed=0.0) == 0.0
    with pytest.raises(ConfigError, match=r"`bias_speed` is 2"):
        Recipe(size=2, bias_speed=2.0)


def test_every_field_is_described() -> None:
    described = Recipe.__doc__ or ""
    unsaid = {"size", "text", "family", "width", "layers", "decay", "floor", "clip", "seed", "keep", "vocabulary"}
    plain = {"weight_decay", "mtp_weight", "balance_weight", "decay_share"}
    assert {item.name for item in fields(Recipe) if item.name not in described} <= unsaid | plain


def test_training_flops_are_six_for_each_parameter_met_and_attention() -> None:
    config = tiny_config("deepseek_v3")
    active = active_params(config, shapes.parameters(config))
    heads, widths = config.num_attention_heads, config.head_dim + (config.v_head_dim or 0)
    reads = 3 * heads * widths * (100 + 1) / 2
    assert flops_per_token(config, 100) == round(6 * (active + reads))


def test_training_flops_count_drafting_modules_and_their_turn_at_the_head() -> None:
    plain, drafting = (tiny_config("deepseek_v3", num_nextn_predict_layers=count) for count in (0, 1))
    layer = active_params(drafting, shapes.drafting(drafting))
    head = drafting.vocab_size * drafting.hidden_size
    reads = drafting.num_attention_heads * (drafting.head_dim + (drafting.v_head_dim or 0)) * 33 / 2
    more = flops_per_token(drafting, 32) - flops_per_token(plain, 32)
    assert more == pytest.approx(6 * (layer + head + reads), abs=1)


def test_training_flops_of_compressed_attention_grow_slower_than_the_context() -> None:
    config = tiny_config("deepseek_v4")
    short, long = flops_per_token(config, 128), flops_per_token(config, 1024)
    assert short < long < 2 * short
