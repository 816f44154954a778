"""Which parts of a model compute in which arithmetic while it is trained: one declared thing per tensor role.

Only the products of linear layers and experts are ever rounded. Embedding, head, norms, routers, indexers, compressors
and residual mixing are not, as published (V3, section 3.3; V4, section 3.4): what they decide does not average out.
Attention itself, sums, gradients of weights and the weights that the optimiser changes keep the model's dtype. Not
rounded either is the absorbed form of latent attention, which multiplies by parts of `kv_b_proj` (in training, V3.2's
chosen rows alone). Knows no number format: `ops.arithmetic` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from daedal import shapes
from daedal.errors import ConfigError
from daedal.model.linear import GroupedLinear, Linear
from daedal.model.moe import Experts
from daedal.model.packing import is_packed
from daedal.model.transformer import Transformer
from daedal.ops.arithmetic import ARITHMETICS

QUANTISABLE = ("attention", "dense_mlp", "routed_expert", "shared_expert", "draft")
_CACHE = ("cache", "state")
_PRODUCTS = (Linear, GroupedLinear, Experts)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """roles: from a role of `shapes.ROLES` to the name of an arithmetic; those left out keep the model's dtype.

    ConfigError for roles that are unknown or never quantised, and for arithmetics that do not exist.
    """

    name: str
    roles: Mapping[str, str]

    def __post_init__(self) -> None:
        for role, arithmetic in self.roles.items():
            if role not in shapes.ROLES:
                raise ConfigError(f"role {role!r} is unknown: it must be one of {', '.join(QUANTISABLE)}")
            if role not in QUANTISABLE:
                raise ConfigError(
                    f"role {role!r} is given {arithmetic!r}, but is never quantised: only {', '.join(QUANTISABLE)} are"
                )
            if arithmetic not in ARITHMETICS:
                raise ConfigError(
                    f"role {role!r} is given {arithmetic!r}, no arithmetic: use one of {', '.join(ARITHMETICS)}"
                )
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))

    def describe(self) -> str:
        """A line for each role that has parameters: what its activations, weights and gradients are rounded to."""
        rows = [("role", "arithmetic", "activations", "weights", "gradients")]
        for role in (role for role in shapes.ROLES if role not in _CACHE):
            found = ARITHMETICS.get(self.roles.get(role, ""))
            if found is None:
                rows.append((role, "-", "-", "-", "-"))
                continue
            stored = "" if found.stored is None else f"{found.stored}, then "
            turned = "" if found.turned is None else f"turned by {found.turned}, "
            weights = f"{turned}{stored}{found.weights}"
            rows.append((role, found.name, f"{turned}{found.activations}", weights, f"{turned}{found.gradients}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def _everywhere(name: str) -> Precision:
    return Precision(name=name, roles=dict.fromkeys(QUANTISABLE, name))


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {name: _everywhere(name) for name in ("bf16", "fp8", "mxfp8", "int8", "w8a8", "w8a8-turned", "hif8")}
    # As V4: experts will be shipped in FP4, and everything is multiplied in FP8.
    | {"fp4": Precision(name="fp4", roles=dict.fromkeys(QUANTISABLE, "fp8") | {"routed_expert": "fp4"})}
)


def preset(name: str) -> Precision:
    """ConfigError for a name that is no preset."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision is {name!r}: it must be one of {', '.join(PRECISIONS)}, or a Precision of roles")
    return PRECISIONS[name]


def apply(model: Transformer, precision: Precision) -> None:
    """Sets the arithmetic of each module by the role of its parameters, also back to none where a role has none.

    ConfigError for a model whose weights are packed.
    """
    if is_packed(model):
        raise ConfigError("the model's weights are packed, which are not trained: load it without `weights`")
    slots = shapes.parameters(model.config) + (shapes.drafting(model.config) if len(model.mtp) else [])
    for slot in slots:
        if slot.role not in QUANTISABLE:
            continue
        owner = model.get_submodule(slot.name.rpartition(".")[0])
        if isinstance(owner, _PRODUCTS):
            owner.arithmetic = ARITHMETICS.get(precision.roles.get(slot.role, ""))
        else:
            assert len(slot.shape) == 1, f"{slot.name} is a matrix that no module multiplies by in an arithmetic"
