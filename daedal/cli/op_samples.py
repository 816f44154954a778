"""One decode step's tensors for every op, so that `daedal doctor` can ask which backend would run them.

Small, but with the proportions of a latent-attention model, because backends choose by dtype, device and shape. The
values mean nothing. Imports torch when asked.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]

TOKENS, HIDDEN, HEADS, LATENT, ROTATED, EXPERTS, ACTIVE, WIDTH = 2, 256, 4, 128, 64, 8, 2, 128


def samples(device: "torch.device", dtype: "torch.dtype") -> dict[str, Call]:
    """Arguments and keyword arguments by the name of the op."""
    import torch

    from daedal.ops import FlatRows

    def zeros(*shape: int, of: "torch.dtype" = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    x_TD, angles_TC = zeros(TOKENS, HIDDEN), zeros(TOKENS, ROTATED // 2, of=torch.float32)
    latents = FlatRows(zeros(TOKENS, LATENT + ROTATED), tuple(range(TOKENS + 1)))
    logits_TE = zeros(TOKENS, EXPERTS, of=torch.float32)
    ids_TA = torch.arange(ACTIVE, device=device).expand(TOKENS, ACTIVE)
    routing = {"scoring": "sigmoid", "method": "noaux_tc", "num_active": ACTIVE, "n_group": 2, "topk_group": 1}
    return {
        "rms_norm": ((x_TD, zeros(HIDDEN), 1e-6), {}),
        "linear": ((x_TD, zeros(WIDTH, HIDDEN), None), {}),
        "rotary": ((zeros(TOKENS, HEADS, ROTATED), angles_TC, angles_TC), {"interleaved": True}),
        "swiglu": ((zeros(TOKENS, WIDTH), zeros(TOKENS, WIDTH)), {}),
        "attention": ((zeros(TOKENS, HEADS, LATENT + ROTATED), latents.starts, latents, LATENT), {"scale": 0.1}),
        "route": ((logits_TE, zeros(EXPERTS, of=torch.float32)), {**routing, "normalise": True, "scale": 1.0}),
        "experts": (
            (
                x_TD,
                ids_TA,
                zeros(TOKENS, ACTIVE, of=torch.float32),
                zeros(EXPERTS, 2 * WIDTH, HIDDEN),
                zeros(EXPERTS, HIDDEN, WIDTH),
            ),
            {},
        ),
    }
