"""A training run in one dial: `size`, from which width, depth, experts, rate, batch and horizon follow.

size is the number of layers; a layer is 64 x size wide, so that 12 is about GPT-2 small, with experts. Every number
that follows can be given instead. The rules, and which of them are published, measured or guessed, are in
docs/training.md. A recipe is a Python file that says `recipe = Recipe(size=..., text=...)`. Knows no tensors, no
processes and no files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from daedal.config import ModelConfig
from daedal.cost.training import flops_per_token
from daedal.errors import ConfigError
from daedal.train.bounds import number, whole
from daedal.train.objective import STAGES
from daedal.train.precision import PRECISIONS
from daedal.train.schedule import V4_WARMUP, Schedule

FAMILIES = ("deepseek_v3", "deepseek_v4")
PLAIN = ("float32", "bfloat16")
LARGEST = 48
_TOKENS_PER_PARAMETER = 20  # Chinchilla (arXiv 2203.15556)
_PUBLISHED_BIAS_SPEED = 1e-3  # V3, section 4.2; V4
_BIAS_REACH = 3.0  # score, which is what biases are added to: peak speed x steps of a short run
_BIAS_LEAD = 3.0  # score of a step over the peak rate: what keeps biases ahead of routers
_STAGES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {"deepseek_v3": {"dense": 1.0}, "deepseek_v4": {"dense": 0.2, "warm-up": 0.02, "sparse": 0.78}}
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is. None: it follows from `size`.

    text: files or directories of documents, `column` of JSON lines and Parquet. validation: the share of documents that
    is held out. tokenizer: a directory with tokenizer.json; None trains one on the text. heads, experts, active,
    expert_width: of attention, and of each layer's routed experts. context: tokens of a sample. rate: the peak learning
    rate. batch: tokens of an optimiser step, over all processes. tokens: of the whole run. warmup: steps. bias_speed:
    how far a step at the peak rate moves an expert's correction bias; it falls as the rate does. precision: "bfloat16",
    "float32", a preset of `train.precision`, or "auto" for what the device multiplies best. stages: shares of the run,
    see `objective.Pretraining`. mtp: drafting modules. expert_processes: that share the experts of a layer.
    pipeline_stages: that layers are cut into. micro_tokens: of one forward pass at most.
    recompute: layers keep their inputs only. evaluate_every, save_every: steps. evaluate_tokens: of the held-out text,
    while the run goes on. changes: further fields of config.json, as published. saved_dtype: of the finished model.
    prompt: what the finished model is to continue, "" for nothing.
    """

    size: int
    text: tuple[str, ...] = ()
    column: str = "text"
    validation: float = 0.01
    tokenizer: str | None = None
    family: str = "deepseek_v3"
    vocabulary: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    experts: int | None = None
    active: int | None = None
    expert_width: int | None = None
    context: int | None = None
    rate: float | None = None
    batch: int | None = None
    tokens: int | None = None
    warmup: int | None = None
    decay: str = "linear"
    decay_share: float = 1.0
    floor: float = 0.0
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_speed: float | None = None
    mtp: int = 1
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    precision: str = "auto"
    stages: Mapping[str, float] | None = None
    expert_processes: int = 1
    pipeline_stages: int = 1
    micro_tokens: int = 2**14
    recompute: bool = False
    evaluate_every: int | None = None
    evaluate_tokens: int = 2**15
    save_every: int | None = None
    keep: int = 2
    seed: int = 0
    saved_dtype: str = "bfloat16"
    prompt: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = (self.text,) if isinstance(self.text, str) else tuple(str(path) for path in self.text)
        object.__setattr__(self, "text", text)
        whole("size", self.size, low=1, high=LARGEST)
        _choice("family", self.family, FAMILIES)
        _choice("precision", self.precision, ("auto", *PLAIN, *(name for name in PRECISIONS if name != "bf16")))
        _choice("saved_dtype", self.saved_dtype, PLAIN)
        for name in _COUNTS:
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low=1)
        for name, high in (("mtp", 8), ("warmup", 2**53), ("seed", 2**53)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low=0, high=high)
        if self.rate is not None:
            number("rate", self.rate, low=0.0, high=1e3, above=True)
        if self.bias_speed is not None:
            number("bias_speed", self.bias_speed, low=0.0, high=1.0)
        number("validation", self.validation, low=0.0, high=0.5)
        number("decay_share", self.decay_share, low=0.0, high=1.0, above=True)
        for name in ("mtp_weight", "balance_weight", "weight_decay"):
            number(name, getattr(self, name), low=0.0, high=1e6)
        object.__setattr__(self, "stages", _checked_stages(self.stages or _STAGES[self.family]))
        object.__setattr__(self, "changes", MappingProxyType(dict(self.changes)))

    def with_settings(self, settings: Mapping[str, object]) -> "Recipe":
        """The recipe with other values, what follows from `size` following anew. ConfigError for unknown names."""
        known = [item.name for item in fields(self)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"a recipe has no {name!r}: it has {', '.join(known)}")
        given: dict[str, Any] = dict(settings)
        if "family" in given and "stages" not in given:
            given["stages"] = None
        return replace(self, **given)

    def published(self, *, vocabulary: int | None = None, bos_id: int | None = 0, eos_id: int = 1) -> dict[str, Any]:
        """config.json of the model. vocabulary: ids of a given tokenizer; the rows are a multiple of 64."""
        size, width, layers = self.size, self.width or 64 * self.size, self.layers or max(self.size, 2)
        experts, active = self.experts or _experts(size), self.active or _active(size)
        shared = 1
        each = self.expert_width or _round(8 / 3 * width / (active + shared), 32)
        ids = self.vocabulary or vocabulary or _vocabulary(size)
        result = {
            "model_type": self.family,
            "vocab_size": -(-ids // 64) * 64,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads or max(size, 2),
            "max_position_embeddings": self.sample_tokens,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "initializer_range": round(0.5 / math.sqrt(width), 4),
            "tie_word_embeddings": False,
            "n_routed_experts": experts,
            "n_shared_experts": shared,
            "num_experts_per_tok": active,
            "moe_intermediate_size": each,
            "num_nextn_predict_layers": self.mtp,
            "torch_dtype": self.saved_dtype,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
        }
        own = _v3(width, each * (active + shared), active) if self.family == "deepseek_v3" else self._v4(result)
        return result | own | dict(self.changes)

    def _v4(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """As V4-Flash in proportion. Heavily compressed layers need a context of several of their 128 tokens."""
        width, heads, layers = known["hidden_size"], known["num_attention_heads"], known["num_hidden_layers"]
        kinds = (4, 128) if self.sample_tokens >= 1024 else (4, 0)
        ratios = [0, *(kinds[layer % 2] for layer in range(layers - 1))]
        return {
            "head_dim": 64,
            "num_key_value_heads": 1,
            "qk_rope_head_dim": 32,
            "q_lora_rank": width // 2,
            "o_groups": 2 if heads % 2 == 0 else 1,
            "o_lora_rank": width // 2,
            "sliding_window": max(self.sample_tokens // 4, 8),
            "index_n_heads": 4,
            "index_head_dim": 32,
            "index_topk": max(self.sample_tokens // 16, 4),
            "compress_ratios": ratios + [0] * self.mtp,
            "compress_rope_theta": 160000.0,
            "num_hash_layers": 1 if layers > 2 else 0,
            "hc_mult": 4 if self.size >= 8 else 2,
            "hc_sinkhorn_iters": 20 if self.size >= 8 else 4,
            "hc_eps": 1e-6,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "rope_scaling": None,
        }

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample: the context."""
        return self.context or (256 if self.size <= 4 else 512 if self.size <= 8 else 1024)

    def plan(self, config: ModelConfig) -> "Plan":
        """Everything in numbers, for the model that `published` describes."""
        context = self.sample_tokens
        flops = flops_per_token(config, context)
        tokens = self.tokens or _TOKENS_PER_PARAMETER * flops // 6
        compute = float(flops) * tokens
        samples = max(1, self.batch // context) if self.batch else _power_of_two(_best_batch(compute) / context)
        if self.batch and self.batch % context:
            raise ConfigError(
                f"batch is {self.batch} tokens, a sample has {context}: give a multiple of the context, as "
                f"{samples * context}"
            )
        steps = max(1, tokens // (samples * context))
        warmup = min(V4_WARMUP, steps // 20) if self.warmup is None else self.warmup
        rate = self.rate or _best_rate(compute)
        return Plan(
            context=context,
            samples=samples,
            micro_samples=max(1, self.micro_tokens // context),
            steps=steps,
            rate=rate,
            bias_speed=best_bias_speed(steps, rate) if self.bias_speed is None else self.bias_speed,
            schedule=self._schedule(steps, warmup),
            flops_per_token=flops,
            evaluate_every=self.evaluate_every or max(1, steps // 8),
            save_every=self.save_every or max(1, steps // 4),
            stages=_boundaries(self.stages or {}, steps),
        )

    def _schedule(self, steps: int, warmup: int) -> Schedule:
        decay_steps = min(math.ceil(self.decay_share * steps), steps - min(warmup, steps))
        constant = self.decay == "constant"
        return Schedule(
            steps=steps,
            warmup=warmup,
            decay=self.decay,  # type: ignore[arg-type]  # checked there
            decay_steps=None if constant else decay_steps,
            floor=self.floor,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run in numbers. samples: of an optimiser step, over all processes. micro_samples: of one forward pass at most.

    stages: (name, first step, the step after its last), in order; each step is in one.
    """

    context: int
    samples: int
    micro_samples: int
    steps: int
    rate: float
    bias_speed: float
    schedule: Schedule
    flops_per_token: int
    evaluate_every: int
    save_every: int
    stages: tuple[tuple[str, int, int], ...]

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.samples * self.context

    def micro_batches(self, processes: int) -> int:
        """Forward passes of one process in a step: as few as `micro_samples` allows. ConfigError if none divides."""
        if self.samples % processes:
            raise ConfigError(
                f"a batch of {self.samples} samples does not divide among {processes} processes: give a `batch` of a "
                f"multiple of {processes * self.context} tokens"
            )
        share = self.samples // processes
        return next(
            count for count in range(1, share + 1) if share % count == 0 and share // count <= self.micro_samples
        )


_COUNTS = (
    "vocabulary",
    "width",
    "layers",
    "heads",
    "experts",
    "active",
    "expert_width",
    "context",
    "batch",
    "tokens",
    "expert_processes",
    "pipeline_stages",
    "micro_tokens",
    "evaluate_every",
    "evaluate_tokens",
    "save_every",
    "keep",
)


def _v3(width: int, dense_width: int, active: int) -> dict[str, Any]:
    """As V2-Lite in proportion, with V3's router. Keys and values of a head are equally wide, which attention likes."""
    return {
        "intermediate_size": dense_width,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": max(width // 4, 32),
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": round(math.sqrt(active), 1),
        "rope_scaling": None,
    }


def _experts(size: int) -> int:
    return 8 if size <= 4 else 16 if size <= 6 else 32 if size <= 8 else 64


def _active(size: int) -> int:
    return 2 if size <= 4 else 4 if size <= 8 else 6


def _vocabulary(size: int) -> int:
    return min(2**15, 1024 << size // 2)


def _best_rate(compute: float) -> float:
    """The peak rate that DeepSeek LLM fitted (arXiv 2401.02954, section 3.1), to two digits."""
    return float(f"{0.3118 * compute**-0.1250:.2g}")


def _best_batch(compute: float) -> float:
    """Tokens of a step, from the same fit."""
    return 0.2920 * math.pow(compute, 0.3271)


def best_bias_speed(steps: int, rate: float) -> float:
    """V3's 0.001, or what a short or hot run needs: biases have to get past the spread of the scores, a few tenths, in
    its first tenth, and be as fast as routers that learn at the peak `rate` (docs/training.md has the measurements).
    """
    return max(_PUBLISHED_BIAS_SPEED, min(1.0, max(_BIAS_REACH / steps, _BIAS_LEAD * rate)))


def _power_of_two(value: float) -> int:
    return 1 << max(0, round(math.log2(max(value, 1.0))))


def _round(value: float, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}: it must be one of {', '.join(allowed)}")


def _checked_stages(stages: Mapping[str, float]) -> Mapping[str, float]:
    for name, share in stages.items():
        if name not in STAGES:
            raise ConfigError(f"`stages` has {name!r}: it must be of {', '.join(STAGES)}")
        number(f"stages[{name!r}]", share, low=0.0, high=1.0, above=True)
    if list(stages) != [name for name in STAGES if name in stages] or not math.isclose(sum(stages.values()), 1.0):
        raise ConfigError(f"`stages` is {dict(stages)}: give shares that add up to 1, in the order {', '.join(STAGES)}")
    return MappingProxyType(dict(stages))


def _boundaries(stages: Mapping[str, float], steps: int) -> tuple[tuple[str, int, int], ...]:
    found, done, first = [], 0.0, 0
    for name, share in stages.items():
        done += share
        last = min(steps, round(done * steps))
        if last > first:
            found.append((name, first, last))
            first = last
    return tuple(found)
