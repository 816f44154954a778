"""Backend `triton`: one set of kernels in Triton's language for the GPUs of NVIDIA and AMD.

Serving's ops, and of training's those that have gradients here: norms, rotation, gated units, routing, and products in
eight bits. Without Triton or without a GPU the backend is absent, and says why; where Triton is there and does not
load, importing the ops fails and says what to do. `kernels/` holds device code alone, the files beside it start it.
"""

from importlib.util import find_spec

import torch

from daedal.errors import BackendError
from daedal.ops.backends.triton.supports import BACKEND, INTERPRETED, PREDICATES
from daedal.ops.registry import REGISTRY


def missing() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'daedal[triton]'"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "no GPU of NVIDIA or AMD is here, and TRITON_INTERPRET is not 1"
    return None


if (_why := missing()) is not None:
    REGISTRY.absent(BACKEND, _why, PREDICATES)
else:
    try:
        from daedal.ops.backends.triton import attention as _attention  # noqa: F401
        from daedal.ops.backends.triton import elementwise as _elementwise  # noqa: F401
        from daedal.ops.backends.triton import experts as _experts  # noqa: F401
        from daedal.ops.backends.triton import scaled as _scaled  # noqa: F401
        from daedal.ops.backends.triton import sparse as _sparse  # noqa: F401
        from daedal.ops.backends.triton import streams as _streams  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend {BACKEND!r} is present but does not load ({type(error).__name__}: {error}): reinstall it with "
            "pip install --force-reinstall 'daedal[triton]', or uninstall triton"
        ) from error
