"""In which number format to compute when the user leaves it to us, and the reason in words.

bfloat16 halves what is read from memory, but on a processor that does not multiply it natively it is slower than
float32. Knows nothing of models; imports torch when asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "bfloat16", "float32"]

# What torch calls the instructions that multiply bfloat16, on x86 and on Arm.
NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The format chosen, and why."""

    dtype: "torch.dtype"
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}: {self.reason}"


def choose_dtype(name: DtypeName, device: "torch.device") -> Precision:
    """The format that `name` asks for; `auto` depends on what `device` multiplies natively."""
    import torch

    if name != "auto":
        return Precision(dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[name], reason="as asked")
    if device.type == "cpu":
        return _for_cpu(cpu_capabilities())
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision(dtype=torch.float32, reason="this GPU does not multiply bfloat16 natively")
    return Precision(dtype=torch.bfloat16, reason=f"{device.type} multiplies it natively")


def cpu_capabilities() -> Mapping[str, object] | None:
    """What the CPU can do, by torch's names; None where torch is too old to tell (before 2.11)."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    return None if ask is None else ask()


def _for_cpu(capabilities: Mapping[str, object] | None) -> Precision:
    import torch

    if capabilities is None:
        return Precision(dtype=torch.float32, reason=f"torch {torch.__version__} cannot tell what the CPU multiplies")
    native = [name for name in NATIVE_BFLOAT16 if capabilities.get(name)]
    if native:
        return Precision(dtype=torch.bfloat16, reason=f"the CPU multiplies it natively ({', '.join(native)})")
    return Precision(dtype=torch.float32, reason="the CPU does not multiply bfloat16 natively")
