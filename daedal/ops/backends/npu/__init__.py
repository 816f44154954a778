"""Backend `npu`: the fused ops that Huawei ships for its chips, through PyTorch's adapter torch_npu.

Which op takes what is in `supports.py`, and differs from chip to chip by capability: eight-bit products are INT8 where
there is no FP8, and MXFP8 where there is. Without torch_npu or without a chip the backend is absent, and says why;
where torch_npu is there and does not load, or lacks an op that is called, importing the ops fails and says what to do.
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from daedal.errors import BackendError
from daedal.ops.backends.npu.supports import BACKEND, PREDICATES
from daedal.ops.backends.npu.vendor import NAMES
from daedal.ops.registry import REGISTRY

_ADAPTER = "torch_npu"


def _present() -> bool:
    """Loads the adapter; whether a chip is here. AttributeError where an op is lacking that would be called."""
    import_module(_ADAPTER)
    if not torch.get_device_module("npu").is_available():
        return False
    lacking = [name for name in NAMES if not hasattr(torch.ops.npu, name)]
    if lacking:
        raise AttributeError(f"it lacks {', '.join(lacking)}")
    return True


if find_spec(_ADAPTER) is None:
    REGISTRY.absent(BACKEND, "torch_npu is not installed: pip install torch-npu of PyTorch's own version", PREDICATES)
else:
    try:
        _here = _present()
        if _here:
            from daedal.ops.backends.npu import attention as _attention  # noqa: F401
            from daedal.ops.backends.npu import elementwise as _elementwise  # noqa: F401
            from daedal.ops.backends.npu import experts as _experts  # noqa: F401
            from daedal.ops.backends.npu import scaled as _scaled  # noqa: F401
            from daedal.ops.backends.npu import sparse as _sparse  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend {BACKEND!r} is present but does not load ({type(error).__name__}: {error}): install CANN and the "
            f"torch-npu that fits PyTorch {torch.__version__}, or uninstall torch-npu"
        ) from error
    if not _here:
        REGISTRY.absent(BACKEND, "torch_npu finds no chip", PREDICATES)
