"""How a module holds what is packed: a matrix in the place of a parameter.

Which parameters are packed, and in which format, are facts of `packed`. A packed model computes in bfloat16, stays on
the CPU and is not trained. Knows no file and quantises nothing.
"""

from torch import Tensor, nn

from daedal.errors import ConfigError
from daedal.model.attention_latent import Expansion
from daedal.model.transformer import Transformer
from daedal.ops.packed import Packed
from daedal.packed import WEIGHTS


def check(weights: str) -> None:
    """ConfigError for a format that does not exist."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}: it must be one of {', '.join(WEIGHTS)}, or left out")


def hold(module: nn.Module, name: str, packed: Packed) -> None:
    """Puts a packed matrix where a module had a parameter, or had none: an attribute that torch does not count."""
    module._parameters.pop(name, None)
    if isinstance(module, Expansion):
        module._parameters.pop("weight", None)
    setattr(module, name, packed)


def is_packed(model: Transformer) -> bool:
    return isinstance(model.lm_head.weight, Packed)


def assign(model: Transformer, name: str, value: Tensor | Packed, *, trained: bool = False) -> None:
    """Fills the parameter or buffer called `name`. trained: a parameter that takes gradients."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(value, Packed):
        hold(owner, leaf, value)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=trained))
