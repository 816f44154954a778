"""An `npu` device in Python: PyTorch's slot for other makers' devices, with the CPU's arithmetic behind it.

It runs what a model runs on a real one, refuses what a chip of the profile lacks (number formats, float64), refuses to
mix devices, and counts what waits for the host. It proves device words, formats and waits; it knows nothing of speed,
of streams and of what the chip's units round. A process has it for good, so tests start processes of their own
(`process.py`). Built on `torch.library` and `torch.utils.backend_registration`, whose hook for Python is experimental.
"""

import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from daedal.ops.silicon import Profile

KIND = "npu"
MEMORY_BYTES = 64 << 30
# Ops that end in a read by the host, whatever the device. Those of a mask or of counts have results of unknown size.
READS_BACK = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    # No kernel of torch_npu's own: PyTorch's stand-in reads the boundaries of the groups.
    "aten::_grouped_mm",
}
# Views that are only a mark on a tensor, which is not seen behind another one: the numbers are made instead.
MARKS = {
    "aten::_conj": torch.ops.aten._conj_physical.default,
    "aten::_neg_view": torch.ops.aten.neg.default,
}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


@dataclass
class Log:
    """waits: how often the host waited, by the op. sent: tensors that came from the host. calls: ops by name."""

    waits: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.waits.clear()
        self.calls.clear()
        self.sent = 0


class NpuTensor(torch.Tensor):
    """A tensor whose numbers lie in `raw`, on the CPU, where nothing but the device's ops reaches them."""

    raw: Tensor
    owner: "Device"  # the one of this process

    @staticmethod
    def __new__(cls, raw: Tensor) -> "NpuTensor":
        made: NpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(KIND, 0),
            requires_grad=False,
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.owner.run(op, args, kwargs or {})

    def tolist(self) -> Any:
        self.owner.log.waits["tolist"] += 1
        return self.raw.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor of the device has no NumPy array: copy it to the CPU first")

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"npu({self.raw!r})"


class Device:
    """The device of a chip. vendor: by name what stands in for the maker's own ops, plain functions on CPU tensors."""

    def __init__(self, profile: Profile):
        self.log = Log()
        self.vendor: dict[str, Callable[..., Any]] = {}
        self.become(profile)

    def become(self, profile: Profile) -> None:
        """From now on another chip's, as far as the types that it lacks."""
        self.profile = profile
        self._lacking = set() if profile.doubles else {torch.float64, torch.complex128}
        if not any(form.startswith("float8") for form in profile.formats):
            self._lacking |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}

    def hold(self, raw: Tensor, name: str) -> NpuTensor:
        """RuntimeError where the chip lacks the numbers' type."""
        if raw.dtype in self._lacking:
            raise RuntimeError(f"{name}: {self.profile.name} has no {raw.dtype}")
        return NpuTensor(raw)

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """An op of PyTorch, or one of the maker's, on tensors of which one at least lies here."""
        # A view of a tensor that was made before inference mode began must not belong to it.
        with torch.inference_mode(False), torch.no_grad():
            return self._run(op, args, kwargs)

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        name = op.name()
        self.log.calls[name] += 1
        if name in COPIES:
            return self._copy(name, op, args, kwargs)
        self._count(name, args)
        held = _Unwrapped(name)
        raw_args = [held.open(x) for x in args]
        raw_kwargs = {key: held.open(x) for key, x in kwargs.items()}
        held.check()
        function = MARKS.get(name, op)
        if name.startswith("npu::"):
            function = self.vendor[name.removeprefix("npu::")]
            raw_args, raw_kwargs = _with_defaults(op, raw_args, raw_kwargs)
        return self._close(function(*raw_args, **raw_kwargs), held, name)

    def _close(self, found: Any, held: "_Unwrapped", name: str) -> Any:
        if isinstance(found, list | tuple):
            return [self._close(x, held, name) for x in found]
        if not isinstance(found, Tensor) or isinstance(found, NpuTensor):
            return found
        mine = held.known.get(id(found))
        return self.hold(found, name) if mine is None else mine

    def _count(self, name: str, args: Any) -> None:
        masks = "index" in name and len(args) > 1 and isinstance(args[1], list | tuple)
        by_mask = masks and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in READS_BACK or by_mask:
            self.log.waits[name] += 1

    def _copy(self, name: str, op: Any, args: Any, kwargs: Any) -> Any:
        if name == "aten::_to_copy":
            (source,) = args
            wanted = torch.device(kwargs.get("device") or source.device)
            there = isinstance(source, NpuTensor)
            found = op(source.raw if there else source, **{**kwargs, "device": "cpu", "pin_memory": None})
            self._moved(there, wanted.type == KIND, name)
            return self.hold(found, name) if wanted.type == KIND else found
        return self.copied(args[1], args[0]) if name == "aten::copy_" else self.copied(args[0], args[1])

    def copied(self, source: Tensor, target: Tensor) -> Tensor:
        """`target`, once it holds the numbers of `source`; either may lie here."""
        self._moved(isinstance(source, NpuTensor), isinstance(target, NpuTensor), "aten::copy_")
        raw = [x.raw if isinstance(x, NpuTensor) else x for x in (target, source)]
        raw[0].copy_(raw[1])
        return target

    def _moved(self, from_here: bool, to_here: bool, name: str) -> None:
        if from_here and not to_here:
            self.log.waits[f"{name} to the host"] += 1
        self.log.sent += to_here and not from_here


def _with_defaults(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Every argument of the declaration; PyTorch leaves out those that equal their default."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    positional, named = [], {}
    for argument in op._schema.arguments:
        value = given.get(argument.name, argument.default_value)
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    return positional, named


class _Unwrapped:
    """The numbers behind an op's arguments, and to whom they belong. Scalars of the CPU may join, as PyTorch has it."""

    def __init__(self, name: str):
        self._name = name
        self.known: dict[int, NpuTensor] = {}
        self._foreign: list[tuple[int, ...]] = []

    def open(self, x: Any) -> Any:
        if isinstance(x, NpuTensor):
            self.known[id(x.raw)] = x
            return x.raw
        if isinstance(x, list | tuple):
            return [self.open(one) for one in x]
        if isinstance(x, Tensor) and x.dim():
            self._foreign.append(tuple(x.shape))
        if isinstance(x, torch.device) and x.type == KIND:
            return torch.device("cpu")
        return x

    def check(self) -> None:
        if self.known and self._foreign:
            raise RuntimeError(f"{self._name}: tensors of the CPU, {self._foreign}, beside tensors of the device")


def install(profile: Profile) -> Device:
    """Gives this process the device; once and for good."""
    device = NpuTensor.owner = Device(profile)
    _setup_privateuseone_for_python_backend(KIND, backend_module=_module(profile))
    torch.__future__.set_swap_module_params_on_conversion(False)
    # Of a device in Python, PyTorch has no allocator to ask.
    torch.accelerator.get_memory_info = lambda *args: (MEMORY_BYTES, MEMORY_BYTES)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: device.run(op, args, kwargs), "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")

    def made(name: str, allocate: Callable[..., Tensor]) -> None:
        def empty(*sizes: Any, dtype: torch.dtype | None = None, **ignored: Any) -> NpuTensor:
            return device.hold(allocate(*sizes, dtype=dtype or torch.get_default_dtype()), name)

        aten.impl(name, empty, "PrivateUse1")

    # `torch.tensor` copies below Python's dispatch, where only what is registered for the device is found.
    aten.impl("_copy_from", lambda source, target, *rest: device.copied(source, target), "PrivateUse1")
    made("empty.memory_format", torch.empty)
    made("empty_strided", torch.empty_strided)
    device.libraries = [everything, aten]  # type: ignore[attr-defined]
    return device


def _module(profile: Profile) -> types.ModuleType:
    """What PyTorch and Daedal ask of `torch.npu`."""
    module = types.ModuleType("torch.npu")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
        "get_device_properties": types.SimpleNamespace(name=profile.target, total_memory=MEMORY_BYTES),
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *args, answer=answer: answer)
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache"):
        setattr(module, name, lambda *args: None)
    module.get_rng_state = lambda *args: torch.get_rng_state()  # type: ignore[attr-defined]
    module.set_rng_state = lambda state, *args: torch.set_rng_state(state)  # type: ignore[attr-defined]
    return module
