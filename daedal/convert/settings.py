"""What a conversion is to make: widths of the latent and of the rotated part, experts; and the config that follows.

Knows no text and no file.
"""

from dataclasses import dataclass

from torch import Tensor

from daedal.config import ModelConfig
from daedal.convert.dense import check_source, kept_frequencies
from daedal.convert.experts import ExpertSettings
from daedal.convert.latent import METHODS, Method
from daedal.errors import ConfigError
from daedal.rope import rope_to_published

# Of the source's config.json; whatever else it says belongs to its own kind of attention.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "hidden_act", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """kv_dims: numbers that the cache keeps for each token and layer. rope_dims: of these rotated, as many as a head of
    the source has or a half or a quarter. method: of the rank cut, see `latent`. experts: None leaves feed-forward
    parts dense. seed: of the labels that calibration draws.
    """

    kv_dims: int
    rope_dims: int
    method: Method = "fisher"
    experts: ExpertSettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"the method is {self.method!r}: give {' or '.join(METHODS)}")
        if self.latent < 2:
            raise ConfigError(
                f"kv dims are {self.kv_dims}, {self.rope_dims} of them rotated: a latent needs 2 besides, give more kv "
                "dims or fewer rope dims"
            )

    @classmethod
    def of_student(cls, student: ModelConfig, source: ModelConfig, experts: ExpertSettings | None) -> "Settings":
        """Those of a latent form of `source` that is to get experts. ConfigError where it is none."""
        if student.kv_lora_rank is None or "sparse" in student.mlp_layer_types:
            raise ConfigError(
                f"the student is {student.model_type} and has {student.mlp_layer_types.count('sparse')} layers of "
                "experts: it must have latent attention and none, as `daedal convert` without --experts makes it"
            )
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
            mine, its = getattr(student, name), getattr(source, name)
            if mine != its:
                raise ConfigError(f"`{name}` of the student is {mine}, of the source {its}: name what it was made of")
        return cls(kv_dims=student.kv_lora_rank + student.rope_dim, rope_dims=student.rope_dim, experts=experts)

    @property
    def latent(self) -> int:
        """Channels of the latent, the constant one included."""
        return self.kv_dims - self.rope_dims

    def check(self, source: ModelConfig) -> None:
        """ConfigError where `source` cannot be converted so."""
        check_source(source)
        kept_frequencies(source, self.rope_dims)
        kept = 2 * source.num_key_value_heads * source.head_dim
        if self.kv_dims > kept:
            raise ConfigError(f"kv dims are {self.kv_dims}, the source keeps {kept}: give at most as many")
        if self.experts is not None:
            self.experts.config_fields(source.intermediate_size, source.num_hidden_layers)


def frequencies(source: ModelConfig, settings: Settings) -> Tensor:
    """[R / 2] float32, of the rotated part."""
    return kept_frequencies(source, settings.rope_dims)


def stock_config(source: ModelConfig, settings: Settings) -> ModelConfig:
    """The DeepSeek-V3 configuration with dense feed-forward parts; it says nothing that stock readers do not know."""
    published = {name: source.published[name] for name in _CARRIED if name in source.published}
    published |= {
        "model_type": "deepseek_v3",
        "vocab_size": source.vocab_size,
        "hidden_size": source.hidden_size,
        "intermediate_size": source.intermediate_size,
        "num_hidden_layers": source.num_hidden_layers,
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": source.num_attention_heads,
        "max_position_embeddings": source.max_position_embeddings,
        "rms_norm_eps": source.rms_norm_eps,
        "tie_word_embeddings": source.tie_word_embeddings,
        "attention_bias": False,
        "rope_parameters": rope_to_published(source.rope_parameters),
        "rope_theta": source.rope_parameters.rope_theta,
        "rope_interleave": True,
        "q_lora_rank": None,
        "kv_lora_rank": settings.latent,
        "qk_nope_head_dim": source.head_dim,
        "qk_rope_head_dim": settings.rope_dims,
        "v_head_dim": source.head_dim,
        "first_k_dense_replace": source.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "dtype": source.dtype,
    }
    return ModelConfig.from_published(published)
