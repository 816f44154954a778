"""A latent that the stock norm leaves alone, in the tensors of a stock DeepSeek-V3 layer.

Stock layers always normalise the latent, and keys and values that come by a low-rank cut do not stand it: their mean is
most of their energy, and dividing every token by its own size shifts all scores. The remedy needs no flag and no bias.
Channel 0 is a linear function of the layer's normed input that is as near to a constant as there is, 100 times as large
as the others together; so every token is divided by nearly the same number, which the gains put back, and channel 0,
after the norm, is exactly constant: the bias of keys and values. What is written has weights of one size, so that
optimisers, which step alike on all of them, can heal it. Knows no text and no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daedal.convert.attention_statistics import LayerStatistics
from daedal.convert.latent import LatentRows
from daedal.convert.rotation import SplitRows

PROMINENCE = 100.0  # of channel 0 beside the root of the energy of all others

_FLOOR = 1e-5  # of the mean energy of inputs, added to every direction


@dataclass(frozen=True, kw_only=True, eq=False)
class StockRows:
    """Of one layer, float64, at the source's softmax scale. query: [H, N, D], not rotated; query_rope: [H, R, D];
    key_rope: [R, D], both half-split. down: [L, D] and gain: [L], of the latent. keys: [H, N, L]; values: [H, V, L].
    output: [D, H V].
    """

    query: Tensor
    query_rope: Tensor
    key_rope: Tensor
    down: Tensor
    gain: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor

    def levelled(self) -> "StockRows":
        """The same function, with factors moved between tensors so that their numbers are about as large as those of
        queries that are not rotated. All factors are powers of two: no bit of a number but its exponent changes.

        Between queries and keys of each frequency, whose pairs share a factor; over all of the latent, which the norm
        divides by; and between gains and what reads the latent, where channel 0 stays as it is.
        """
        wanted = _size(self.query)
        queries, keys = self.query_rope.unflatten(1, (2, -1)), self.key_rope.unflatten(0, (2, -1))
        query_C, key_C = queries.square().mean((0, 1, 3)).sqrt(), keys.square().mean((0, 2)).sqrt()
        rope_C1 = _powers_of_two((query_C / key_C.clamp_min(1e-300)).sqrt()).unsqueeze(1)
        wide = _power_of_two(wanted / _size(self.down[1:]))
        deep = _power_of_two(wanted / _size(torch.cat((self.keys, self.values), 1)[..., 1:]))
        gain_L = self.gain / deep
        gain_L[0] = self.gain[0]

        def read(rows_HNL: Tensor) -> Tensor:
            return torch.cat((rows_HNL[..., :1], rows_HNL[..., 1:] * deep), -1)

        return replace(
            self,
            query_rope=(queries / rope_C1).flatten(1, 2),
            key_rope=(keys * rope_C1).flatten(0, 1),
            down=self.down * wide,
            gain=gain_L,
            keys=read(self.keys),
            values=read(self.values),
        )

    def slots(self, prefix: str) -> Mapping[str, Tensor]:
        """By the names of `shapes.parameters`; prefix: "layers.3.self_attn."."""
        source_dim = self.query.shape[1]
        stretch = math.sqrt((source_dim + len(self.key_rope)) / source_dim)
        query = torch.cat((self.query, _interleaved(self.query_rope)), 1) * stretch
        return {
            f"{prefix}q_proj.weight": query.flatten(0, 1),
            f"{prefix}kv_a_proj_with_mqa.weight": torch.cat((self.down, _interleaved(self.key_rope.unsqueeze(0))[0])),
            f"{prefix}kv_a_layernorm.weight": self.gain,
            f"{prefix}kv_b_proj.weight": torch.cat((self.keys, self.values), 1).flatten(0, 1),
            f"{prefix}o_proj.weight": self.output,
        }


def constant(statistics: LayerStatistics) -> Tensor:
    """u, [D]: u x is nearest to 1 over the inputs, as attention weights them."""
    moment_DD = statistics.attended_XX[:-1, :-1].clone()
    moment_DD.diagonal().add_(_FLOOR * moment_DD.diagonal().mean())
    constant_D: Tensor = torch.linalg.solve(moment_DD, statistics.attended_XX[:-1, -1])
    return constant_D


def unevenness(statistics: LayerStatistics) -> float:
    """The root mean square of u x - 1: how far channel 0 is from constant."""
    moment_XX, u_X = statistics.attended_XX, torch.cat((constant(statistics), torch.tensor([-1.0]).double()))
    return math.sqrt(max(float(u_X @ moment_XX @ u_X), 0.0))


def normed(split: SplitRows, latent: LatentRows, output: Tensor, statistics: LayerStatistics) -> StockRows:
    """The same layer behind the stock norm. output: [D, H V]. Biases of queries and of rotated keys ride on u x."""
    heads, groups = len(split.query_nope), len(split.key_nope)
    moment_XX, constant_D = statistics.attended_XX, constant(statistics)
    # Without their mean the other channels carry less that an uneven divisor could shift.
    mean_L = latent.down @ moment_XX[:-1, -1]
    others_LD = latent.down - torch.outer(mean_L, constant_D)
    energy = float(((others_LD @ moment_XX[:-1, :-1]) * others_LD).sum())
    others_LD = others_LD / math.sqrt(energy)
    down_LD = torch.cat((PROMINENCE * constant_D.unsqueeze(0), others_LD))
    length = math.sqrt((PROMINENCE**2 + 1) / len(down_LD))
    first, rest = _power_of_two(length / PROMINENCE), _power_of_two(length * math.sqrt(len(others_LD)))
    gain_L = torch.full((len(down_LD),), rest, dtype=torch.float64)
    gain_L[0] = first

    def behind(up_NL: Tensor, bias_N: Tensor) -> Tensor:
        """[H, N, L]: what reads the latent after norm and gains."""
        level_N = (bias_N + up_NL @ mean_L) * (length / (PROMINENCE * first))
        whole_NL = torch.cat((level_N.unsqueeze(1), up_NL * (math.sqrt(energy) * length / rest)), 1)
        whole_GNL: Tensor = whole_NL.unflatten(0, (groups, -1))
        return whole_GNL.repeat_interleave(heads // groups, 0)

    def without_bias(rows_X: Tensor) -> Tensor:
        return rows_X[..., :-1] + rows_X[..., -1:] * constant_D

    return StockRows(
        query=without_bias(split.query_nope),
        query_rope=without_bias(split.query_rope),
        key_rope=without_bias(split.key_rope),
        down=down_LD,
        gain=gain_L,
        keys=behind(latent.keys, latent.key_bias),
        values=behind(latent.values, latent.value_bias),
        output=output,
    ).levelled()


def _power_of_two(number: float) -> float:
    """The nearest below: gains that every number format holds exactly. 1 where there is no number."""
    return 2.0 ** math.floor(math.log2(number)) if 0 < number < math.inf else 1.0


def _powers_of_two(numbers: Tensor) -> Tensor:
    return torch.tensor([_power_of_two(number) for number in numbers.tolist()], dtype=numbers.dtype)


def _size(numbers: Tensor) -> float:
    """The root mean square."""
    return float(numbers.square().mean().sqrt())


def _interleaved(rows_HRD: Tensor) -> Tensor:
    """From half-split order to pairs, as stock readers turn them."""
    return torch.stack(rows_HRD.chunk(2, 1), 2).flatten(1, 2)
