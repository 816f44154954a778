"""Which models the MindSpore runner has. Knows neither torch nor MindSpore: what is exported is what will run."""

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.published import DENSE_FAMILIES

RUNS = (*DENSE_FAMILIES, "deepseek_v2", "deepseek_v3")


def check_runs(config: ModelConfig) -> None:
    """ConfigError for a model that the runner does not have."""
    if config.model_type not in RUNS:
        raise ConfigError(
            f"model_type is {config.model_type!r}: the MindSpore runner has {', '.join(RUNS)}; serve this model with "
            "`daedal serve`"
        )
