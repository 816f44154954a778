"""Backend `triton`: one set of kernels in Triton's language for GPUs of NVIDIA and AMD, some for Huawei's chips too.

Serving's ops, and of training's those that have gradients here: norms, rotation, gated units, attention over rows side
by side, routing, experts, and products in eight bits. Without Triton, without its compiler for the chip that is here,
or without a chip the backend is absent, and says why; where Triton is there and does not load, importing the ops fails
and says what to do. `kernels/` holds device code alone, the files beside it start it.
"""

import os
import shutil
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from daedal.errors import BackendError
from daedal.ops.backends.triton.supports import BACKEND, COMPILERS, INTERPRETED, PREDICATES
from daedal.ops.registry import REGISTRY

_DEVICES = {"cuda": "amd" if torch.version.hip else "nvidia", "npu": "huawei"}  # makers by torch's name of the device
_ADAPTER = "torch_npu"
_PACKAGES = {"huawei": "triton-ascend"}
_REMEDY = "pip install --force-reinstall 'daedal[triton]'"
_REMEDIES = {"huawei": "pip install --force-reinstall triton-ascend, and source the set_env.sh of CANN"}
_LAST_STEP = "bishengir-compile"  # which triton-ascend calls, and does not bring


def missing() -> str | None:
    """Why the kernels cannot run here; None where they can. Does not import Triton."""
    found = find_spec("triton")
    if found is None:
        return "Triton is not installed: pip install 'daedal[triton]', or triton-ascend for a chip of Huawei's"
    if INTERPRETED:
        return None
    maker = _maker()
    if maker is None:
        return "no GPU of NVIDIA or AMD and no chip of Huawei's is here, and TRITON_INTERPRET is not 1"
    compilers = [Path(place) / "backends" / COMPILERS[maker] for place in found.submodule_search_locations or ()]
    if not any(place.is_dir() for place in compilers):
        package = _PACKAGES.get(maker, "triton")
        return f"the Triton that is installed compiles for another maker's chips: pip install {package} in its place"
    return None


def _maker() -> str | None:
    """Whose chip is here, as profiles call it."""
    if torch.cuda.is_available():
        return _DEVICES["cuda"]
    if find_spec(_ADAPTER) is not None:
        with suppress(ImportError, AttributeError, OSError, RuntimeError):  # backend `npu` says what is amiss with it
            import_module(_ADAPTER)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None else _DEVICES.get(accelerator.type)


def _check_last_step() -> None:
    """FileNotFoundError where kernels could be read and not compiled."""
    if INTERPRETED or _maker() != "huawei" or os.environ.get("TRITON_NPU_COMPILER_PATH"):
        return
    if shutil.which(_LAST_STEP) is None:
        raise FileNotFoundError(f"{_LAST_STEP} of CANN is not on the PATH")


if (_why := missing()) is not None:
    REGISTRY.absent(BACKEND, _why, PREDICATES)
else:
    try:
        _check_last_step()
        from daedal.ops.backends.triton import attention as _attention  # noqa: F401
        from daedal.ops.backends.triton import compress as _compress  # noqa: F401
        from daedal.ops.backends.triton import elementwise as _elementwise  # noqa: F401
        from daedal.ops.backends.triton import experts as _experts  # noqa: F401
        from daedal.ops.backends.triton import scaled as _scaled  # noqa: F401
        from daedal.ops.backends.triton import sparse as _sparse  # noqa: F401
        from daedal.ops.backends.triton import streams as _streams  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend {BACKEND!r} is present but does not load ({type(error).__name__}: {error}): reinstall it with "
            f"{_REMEDIES.get(_maker() or '', _REMEDY)}, or uninstall triton"
        ) from error
