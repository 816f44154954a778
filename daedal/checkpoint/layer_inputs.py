"""What the matrices of one layer are fed: sums of x x^T over tokens, taken while the layer runs.

Matrices that read the same input share one sum. The expansion of latent attention is read through the norm before it,
since its absorbed form has no input of its own. Of routed experts the layer's tokens are kept instead of sums: each
expert's are worked out from those that reached it, when asked for, so that there is never one per expert. A token
counts there with its expert's weight for it, as its error does in what the layer gives. Knows no format and no file.
"""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.model.attention_latent import Expansion
from daedal.model.linear import GroupedLinear, Linear
from daedal.model.moe import Experts


class LayerInputs:
    """Watches a layer inside a `with` block; names are those of parameters below the layer."""

    def __init__(self, layer: nn.Module, wanted: Iterable[str]):
        self._layer, self._wanted = layer, frozenset(wanted)
        self._sums: dict[str, Tensor] = {}
        self._owners: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._routed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for path, module in self._layer.named_modules():
            name = f"{path}.weight"
            if isinstance(module, Experts):
                self._hooks.append(module.register_forward_pre_hook(self._keep(path)))
            elif name not in self._wanted:
                continue
            elif isinstance(module, Expansion):
                norm = self._layer.get_submodule(f"{path.rpartition('.')[0]}.kv_a_layernorm")
                self._hooks.append(norm.register_forward_hook(lambda _, __, out, name=name: self._add(name, out)))
            elif isinstance(module, Linear | GroupedLinear):
                self._hooks.append(module.register_forward_pre_hook(self._watch(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def owner(self, name: str) -> str:
        """The matrix whose sum is also that of `name`."""
        return self._owners[name]

    def moments(self, name: str) -> Tensor:
        """[1, K, K]; of a grouped matrix [G, K, K]."""
        return self._sums[self._owners[name]]

    def watched(self, name: str) -> bool:
        return name in self._owners

    def of_expert(self, path: str, expert: int) -> tuple[Tensor, Tensor]:
        """x_TD, the tokens that reached an expert of the module at `path`, and its weight for each."""
        found = []
        for x_TD, ids_TA, weights_TA in self._routed[path]:
            weight_T = (weights_TA * (ids_TA == expert)).sum(-1)
            reached_t = (ids_TA == expert).any(-1).nonzero().squeeze(-1)
            found.append((x_TD[reached_t], weight_T[reached_t]))
        return torch.cat([x for x, _ in found]), torch.cat([weight for _, weight in found])

    def _keep(self, path: str) -> Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], None]:
        def keep(module: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
            self._routed.setdefault(path, []).append(given)

        return keep

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, given: self._add(name, given[0])

    def _add(self, name: str, x_TK: Tensor) -> None:
        if self._last is not None and self._last[0] is x_TK:
            self._owners[name] = self._last[1]
            return
        self._last, self._owners[name] = (x_TK, name), name
        x_GTK = x_TK.unsqueeze(0) if x_TK.dim() == 2 else x_TK.transpose(0, 1)
        sum_GKK = torch.bmm(x_GTK.transpose(1, 2), x_GTK)
        self._sums[name] = self._sums[name] + sum_GKK if name in self._sums else sum_GKK


def gated(x_TD: Tensor, gate_up_FD: Tensor, limit: float | None) -> Tensor:
    """[T, F]: what an expert's last matrix reads. gate_up_FD: [2F, D], gate rows first."""
    gate_TF, up_TF = ops.linear(x_TD, gate_up_FD).chunk(2, -1)
    return ops.swiglu(gate_TF, up_TF, limit=limit)
