"""Holds Daedal's calls of the ops of Huawei's chips to what the published torch_npu declares, without installing it.

    pip download torch-npu==2.13.0 --no-deps -d DIR
    python tools/npu_schemas.py DIR/torch_npu-2.13.0-*.whl

The package is read as data: declarations from its library, functions of shapes from its Python. Three proofs: the
declarations that tests use (`tests/silicon/npu_schemas.toml`) agree with the package's; every op of backend `npu` runs
on tensors without numbers, through the package's own declarations and functions of shapes, with results of the right
shapes and types; calls that are planted wrong are refused. Ends with status 1 where one of them fails. What a chip
computes is not proved.
"""

import argparse
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from daedal.ops import silicon
from daedal.ops.arithmetic import MXFP8, W8A8
from daedal.ops.backends.npu import attention, elementwise, experts, scaled, sparse, vendor
from daedal.ops.rows import FlatRows, PagedRows, Pages
from tests.silicon import vendor_schemas

META = torch.device("meta")
SHAPES = "op_plugin/meta/_meta_registrations.py"
# Types that torch_npu numbers beyond PyTorch's own.
NUMBERED = {
    "int4": 285,
    "hifloat8": 290,
    "float8_e5m2": 291,
    "float8_e4m3fn": 292,
    "float8_e8m0fnu": 293,
    "float4_e2m1fn_x2": 296,
    "float4_e1m2fn_x2": 297,
}


def declared(wheel: zipfile.ZipFile) -> dict[str, Any]:
    """By name each declaration in the package's library, parsed."""
    (library,) = (name for name in wheel.namelist() if name.endswith("/libtorch_npu.so"))
    found: dict[str, Any] = {}
    for text in re.findall(rb"(?<![\w.])(npu_\w+\([ -~]*\) -> [ -~]+)", wheel.read(library)):
        try:
            schema = torch._C.parse_schema(text.decode())
        except RuntimeError:
            continue
        found.setdefault(schema.name, schema)
    return found


def differences(told: list[str], name: str, real: Any) -> list[str]:
    """Where a declaration of the tests differs from the package's."""
    mine = torch._C.parse_schema(vendor_schemas.schema(name, told))
    theirs = {argument.name: (place, argument) for place, argument in enumerate(real.arguments)}
    wrong = []
    for place, argument in enumerate(mine.arguments):
        if argument.name not in theirs:
            wrong.append(f"{argument.name} is no argument of it")
            continue
        their_place, other = theirs[argument.name]
        for what, ours, published in (
            ("type", str(argument.type), str(other.type)),
            ("default", argument.default_value, other.default_value),
            ("kind", argument.kwarg_only, other.kwarg_only),
            ("place", argument.kwarg_only or place, other.kwarg_only or their_place),
        ):
            if ours != published:
                wrong.append(f"{argument.name} has {what} {published}, not {ours}")
    named = {argument.name for argument in mine.arguments}
    wrong += [f"{a.name} must be given" for a in real.arguments if not a.has_default_value() and a.name not in named]
    if len(mine.returns) != len(real.returns):
        wrong.append(f"it returns {len(real.returns)} values, not {len(mine.returns)}")
    return wrong


class _Anything:
    """Stands for what the package's shapes ask of a chip."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ""


@contextmanager
def _adapter() -> Iterator[None]:
    """Modules of the names that the package's functions of shapes import; none of the package's own runs."""
    made = {name: types.ModuleType(name) for name in ("", ".utils", ".utils._error_code", ".npu", ".npu.utils")}
    made[".npu._backends"] = types.ModuleType("backends")
    package: Any = made[""]
    for name, number in NUMBERED.items():
        setattr(package, name, number)
    package.npu, package._C, package.get_npu_format = _Anything(), _Anything(), lambda *args: 2
    codes: Any = made[".utils._error_code"]
    codes.ErrCode, codes.ops_error = _Anything(), lambda code: ""
    for name in ("get_cann_version", "get_soc_version"):
        setattr(made[".npu.utils"], name, lambda *args, **kwargs: "8.5.0")
        setattr(made[".npu._backends"], name, lambda *args, **kwargs: 250)
    modules = {f"torch_npu{name}": module for name, module in made.items()}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def shape_functions(source: str, names: set[str]) -> set[str]:
    """Registers the package's own for ops of these names; those that it has one for."""
    found: set[str] = set()
    real = torch.library.impl

    def impl(library: Any, name: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            if name in names and name not in found:
                real(library, name, *args, **kwargs)(function)
                found.add(name)
            return function

        return add

    torch.library.impl = impl  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shapes.py"
            path.write_text(source, encoding="utf-8")
            spec = spec_from_file_location("shapes", path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(module_from_spec(spec))
    finally:
        torch.library.impl = real
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the backend and the shapes and types of what must come back."""

    name: str
    run: Callable[[], Any]
    shapes: list[tuple[int, ...]]
    types: tuple[torch.dtype, ...] = (torch.bfloat16,)


def _of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _wide(*shape: int) -> Tensor:
    return _of(*shape, dtype=torch.float32)


STARTS, PASTS, LENGTHS = (0, 1, 4), (4095, 61), (4096, 64)
"""Of two sequences: one brings a token to a long past, one three."""
ENDS = (0, LENGTHS[0], sum(LENGTHS))


def cases() -> Iterator[Case]:
    """At the sizes of V3 and V3.2."""
    yield from _elementwise()
    yield from _attention()
    yield from _sparse()
    yield from _experts()


def _elementwise() -> Iterator[Case]:
    x, angles = _of(4, 7168), _wide(4, 32)
    yield Case(name="rms_norm", run=lambda: elementwise.rms_norm(x, _of(7168), 1e-6), shapes=[(4, 7168)])
    yield Case(
        name="rotary",
        run=lambda: elementwise.rotary(_of(4, 129, 64), angles, angles, interleaved=True),
        shapes=[(4, 129, 64)],
    )
    for limit in (None, 10.0):
        yield Case(
            name=f"swiglu, limit {limit}",
            run=lambda limit=limit: elementwise.swiglu(x, x, limit=limit),  # type: ignore[misc]
            shapes=[(4, 7168)],
        )


def _pages() -> Pages:
    return Pages(((*range(32),), (40,)), LENGTHS, 128)


def _attention() -> Iterator[Case]:
    latents = {"on pages": PagedRows(_of(64, 128, 576), _pages()), "side by side": FlatRows(_of(ENDS[-1], 576), ENDS)}
    for where, rows in latents.items():
        yield Case(
            name=f"attention, latents {where}",
            run=lambda rows=rows: attention.attention(_of(4, 128, 576), STARTS, rows, 512, scale=0.07),  # type: ignore[misc]
            shapes=[(4, 128, 512)],
        )
    own = [FlatRows(_of(ENDS[-1], 128, size), ENDS) for size in (192, 128)]
    yield Case(
        name="attention, heads of their own",
        run=lambda: attention.attention(_of(4, 128, 192), STARTS, *own, scale=0.07),
        shapes=[(4, 128, 128)],
    )
    grouped = [PagedRows(_of(64, 128, 8, 128), _pages()) for _ in range(2)]
    yield Case(
        name="attention, grouped heads on pages",
        run=lambda: attention.attention(_of(4, 32, 128), STARTS, *grouped, scale=0.07),
        shapes=[(4, 32, 128)],
    )


def _sparse() -> Iterator[Case]:
    keys = {"on pages": PagedRows(_of(64, 128, 128), _pages()), "side by side": FlatRows(_of(ENDS[-1], 128), ENDS)}
    for where, rows in keys.items():
        yield Case(
            name=f"choose_entries, keys {where}",
            run=lambda rows=rows: sparse.choose_entries(  # type: ignore[misc]
                _of(4, 64, 128), _wide(4, 64), STARTS, PASTS, rows, count=2048, rate=1
            ),
            shapes=[(4, 2048)],
            types=(torch.int64,),
        )
    latents = PagedRows(_of(64, 128, 576), _pages())
    for what, count in (("chosen rows copied", 8), ("whole sequences copied", 2048)):
        chosen = torch.empty((4, count), dtype=torch.int64, device=META)
        yield Case(
            name=f"sparse_attention, {what}",
            run=lambda chosen=chosen: sparse.sparse_attention(  # type: ignore[misc]
                _of(4, 128, 576), STARTS, PASTS, latents, chosen, None, None, value_dim=512, scale=0.07, rate=1, span=0
            ),
            shapes=[(4, 128, 512)],
        )


def _experts() -> Iterator[Case]:
    x, ids, weights = _of(4, 7168), torch.empty((4, 8), dtype=torch.int64, device=META), _wide(4, 8)
    matrices = _of(16, 4096, 7168), _of(16, 7168, 2048)
    settings: dict[str, Any] = {"num_active": 8, "n_group": 8, "topk_group": 4, "scale": 2.5, "given_TA": None}
    for scoring, method in (("sigmoid", "noaux_tc"), ("softmax", "group_limited_greedy")):
        yield Case(
            name=f"route, {scoring}",
            run=lambda scoring=scoring, method=method: experts.route(  # type: ignore[misc]
                _wide(4, 256), None, scoring=scoring, method=method, normalise=scoring == "sigmoid", **settings
            ),
            shapes=[(4, 8), (4, 8)],
            types=(torch.int64, torch.float32),
        )
    yield Case(name="experts", run=lambda: experts.experts(x, ids, weights, *matrices, limit=None), shapes=[(4, 7168)])
    for arithmetic in (W8A8, MXFP8):
        yield Case(
            name=f"scaled_linear, {arithmetic.name}",
            run=lambda kind=arithmetic: scaled.scaled_linear(x, matrices[0][0], kind),  # type: ignore[misc]
            shapes=[(4, 4096)],
        )
    yield Case(
        name="scaled_experts, w8a8",
        run=lambda: scaled.scaled_experts(x, ids, weights, *matrices, W8A8, limit=None),
        shapes=[(4, 7168)],
    )


def wrong_calls() -> dict[str, Callable[[], Any]]:
    """What must be refused, by what is wrong with it."""
    ops, x = torch.ops.npu, _of(4, 64)
    return {
        "an argument of another name": lambda: ops.npu_rms_norm(x, _of(64), eps=1e-6),
        "an argument of another type": lambda: ops.npu_rotary_mul(x, x, x, 1),
        "one argument too few": lambda: ops.npu_moe_init_routing_v2(x),
        "a bias of two axes": lambda: ops.npu_moe_gating_top_k(_wide(4, 64), 2, bias=_wide(1, 64)),
        "matrices that do not meet": lambda: ops.npu_quant_matmul(
            _of(4, 64, dtype=torch.int8), _of(32, 8, dtype=torch.int8), _wide(8), pertoken_scale=_wide(4),
            output_dtype=torch.bfloat16,
        ),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    failures = 0

    def say(what: str, wrong: str | None) -> None:
        nonlocal failures
        failures += wrong is not None
        print(f"{'ok   ' if wrong is None else 'WRONG'} {what}{'' if wrong is None else ': ' + wrong}")

    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        real = declared(wheel)
        source = next(name for name in wheel.namelist() if name.endswith(SHAPES))
        text = wheel.read(source).decode("utf-8")
    print(f"{len(real)} declarations in the package")
    for name, told in vendor_schemas.read().items():
        wrong = ["the package has none of that name"] if name not in real else differences(told, name, real[name])
        say(f"declaration of {name}", "; ".join(wrong) or None)
    library = torch.library.Library("npu", "DEF")
    for declaration in real.values():
        library.define(str(declaration))
    with _adapter():
        known = shape_functions(text, set(vendor.NAMES))
        without = sorted(set(vendor.NAMES) - known)
        print(f"functions of shapes for {len(known)} of {len(vendor.NAMES)}, none for {', '.join(without) or 'none'}")
        _run_all(say)
    return 1 if failures else 0


def _run_all(say: Callable[[str, str | None], None]) -> None:
    for chip in ("ascend-910b", "ascend-910c", "ascend-950"):
        with silicon.assumed(silicon.read(chip)), torch.inference_mode():
            for case in cases():
                try:
                    found = case.run()
                    results = found if isinstance(found, tuple) else (found,)
                    told = [tuple(x.shape) for x in results], tuple(x.dtype for x in results)
                    wrong = None if told == (case.shapes, case.types) else f"came back as {told}"
                # A call that breaks its declaration, or has no function of shapes: said, and the run fails by it.
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                say(f"{chip}: {case.name}", wrong)
    for what, run in wrong_calls().items():
        try:
            run()
            say(f"refused: {what}", "it was accepted")
        except (RuntimeError, TypeError) as error:
            say(f"refused: {what} ({str(error).strip().splitlines()[0][:90]})", None)


if __name__ == "__main__":
    sys.exit(main())
