"""Rows as mixtures of a few known rows: what conversion makes of queries, each turned and mixed within its frequencies.

The few are found greedily, each time the row that what is left looks most like, and all weights are fitted again
(orthogonal matching pursuit: Pati, Rezaiifar and Krishnaprasad 1993); no head or frequency need be known. Mixing is
done in one order, number by number, so that it gives the same bits on any machine. Knows no checkpoint.
"""

import torch
from torch import Tensor

_RIDGE = 1e-6  # of a row's own square, so that rows that are alike do no harm


def pursue(wanted_NM: Tensor, known_KM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """places_NC, int32, and weights_NC, bfloat16, of `count` known rows for each wanted one."""
    wanted_NM, known_KM = wanted_NM.float(), known_KM.float()
    alike_KK, right_NK = known_KM @ known_KM.T, wanted_NM @ known_KM.T
    length_K = alike_KK.diagonal().sqrt().clamp_min(1e-20)
    left_NK, free_NK = right_NK, torch.ones_like(right_NK, dtype=torch.bool)
    places_NC = torch.empty(len(wanted_NM), 0, dtype=torch.int64)
    weights_NC = torch.empty(len(wanted_NM), 0)
    for _ in range(min(count, len(known_KM))):
        next_N1 = (left_NK / length_K).abs().where(free_NK, -1.0).argmax(-1, keepdim=True)
        free_NK.scatter_(1, next_N1, False)
        places_NC = torch.cat((places_NC, next_N1), 1)
        alike_NCK = alike_KK[places_NC]
        alike_NCC = alike_NCK.gather(2, places_NC.unsqueeze(1).expand(-1, places_NC.shape[1], -1))
        alike_NCC = alike_NCC + torch.diag_embed(_RIDGE * alike_NCC.diagonal(dim1=1, dim2=2) + 1e-20)
        weights_NC = torch.linalg.solve(alike_NCC, right_NK.gather(1, places_NC))
        left_NK = right_NK - torch.einsum("nc,nck->nk", weights_NC, alike_NCK)
    return places_NC.int(), weights_NC.bfloat16()


def mixed(known_KM: Tensor, places_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """[N, M] float32: the rows that stand at `places_NC`, by their weights."""
    found_NM = torch.zeros(len(places_NC), known_KM.shape[1])
    for places_N, weights_N in zip(places_NC.unbind(1), weights_NC.float().unbind(1), strict=True):
        part_NM = known_KM[places_N.long()].float() * weights_N.unsqueeze(-1)
        found_NM = found_NM + part_NM
    return found_NM
