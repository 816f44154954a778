"""What a device multiplies in a second, measured: the yardstick of model FLOPs utilisation.

A data sheet knows clocks that a shared machine never sees; one large product in the run's own dtype, on the threads
that the run has, is what its matrices could reach at best. Knows no model.
"""

import time

import torch

_SIDE = {"cpu": 2048}
_OTHER_SIDE = 8192


def measured_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """FLOPs per second of the best of several square products in about `seconds`, a multiply-add counting 2."""
    side = _SIDE.get(device.type, _OTHER_SIDE)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(matrix, matrix)
    while time.perf_counter() < end or best == float("inf"):
        _wait(device)
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
