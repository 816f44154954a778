"""Every Triton kernel at the sizes of DeepSeek's models, as the scripts compile them that have no chip.

Sizes are those of V3 (7168 wide, 256 experts, latents of 512 + 64) and V4 (512, 64 index heads), in bfloat16. Needs
Triton of any maker; compiles nothing itself.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daedal.ops.backends.triton import spaces
from daedal.ops.backends.triton.kernels import (
    attention,
    attention_gradients,
    compress,
    elementwise,
    experts,
    routing,
    scaled,
    sparse,
    streams,
)
from daedal.ops.backends.triton.spaces import Space

FLOATS = ("eps", "norm_eps", "scale", "limit")
SCHEDULE = ("num_warps", "num_stages")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at some sizes. pointers: element types by argument; what is left over is a whole number, or in `FLOATS`.

    native: another set of pointers for chips that multiply e4m3 as it is. on_chip: compiled for chips whose sums lie
    beside the core, too. too_large: constants with which it must not fit there.
    """

    name: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    space: Space = ({"num_warps": 4},)
    native: Mapping[str, str] = field(default_factory=dict)
    on_chip: bool = False
    too_large: Mapping[str, int] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    """Every kernel, at sizes of V3 (7168 wide, 256 experts, latents of 512 + 64) and V4 (512, 64 index heads)."""
    yield from _elementwise()
    yield from _streams()
    yield from _eight_bits()
    yield from _mixture()
    yield from _attention()
    yield from _sparse()
    yield from _compress()


def _elementwise() -> Iterator[Case]:
    rows = {"x": "bf16", "weight": "bf16", "y": "bf16", "inverse": "fp32", "cos": "fp32", "sin": "fp32"}
    rows |= {"gate": "bf16", "up": "bf16", "grad": "bf16", "grad_x": "bf16", "partial": "fp32"}
    rows |= {"grad_gate": "bf16", "grad_up": "bf16"}
    norm = {"WEIGHTED": True, "BLOCK": 8192}
    turn = {"PAIRS": 32, "INTERLEAVED": True, "BACK": False, "HEADS": 8, "BLOCK": 32}
    gates = {"LIMITED": True, "BLOCK": 1024}
    for name, kernel, constants, space in (
        ("rms_norm", elementwise.rms_norm, {**norm, "KEPT": True}, spaces.ROWS),
        ("rms_norm, gradient", elementwise.rms_norm_backward, norm, spaces.ROWS),
        ("rotary", elementwise.rotate, turn, ({"num_warps": 4},)),
        ("swiglu", elementwise.swiglu, gates, ({"num_warps": 4},)),
        ("swiglu, gradient", elementwise.swiglu_backward, gates, ({"num_warps": 4},)),
    ):
        yield Case(name=name, kernel=kernel, pointers=rows, constants=constants, space=space)


def _streams() -> Iterator[Case]:
    rows = {"streams": "bf16", "mixes": "fp32", "base": "fp32", "scale": "fp32", "post": "fp32", "comb": "fp32"}
    rows |= {"x": "bf16", "y": "bf16", "result": "bf16"}
    four = {"STREAMS": 4, "BLOCK": 1024}
    mixed, wide = {**four, "ITERATIONS": 20, "SLOTS": 4}, {"BLOCK": 65536}
    for name, kernel, constants, too_large in (
        ("hyper_collapse", streams.collapse, {**mixed, "FULL": True}, wide),
        ("hyper_head", streams.collapse, {**mixed, "FULL": False}, {}),
        ("hyper_expand", streams.expand, four, wide),
    ):
        yield Case(name=name, kernel=kernel, pointers=rows, constants=constants, on_chip=True, too_large=too_large)


def _eight_bits() -> Iterator[Case]:
    types = {"left": "bf16", "left_scales": "fp32", "right": "bf16", "right_scales": "fp32", "result": "bf16"}
    types |= {"x": "bf16", "codes": "bf16", "scales": "fp32"}
    native = {**types, "left": "fp8e4nv", "right": "fp8e4nv", "codes": "fp8e4nv"}
    whole = {**types, "left": "i8", "right": "i8", "codes": "i8"}
    rounding = {"GROUP": 128, "LARGEST": 448.0, "POWER_OF_TWO": True, "INTEGER": False}
    tiles, blocks = {"ROWS": 16, "SHARED": False}, {"ROWS": 128, "SHARED": True}
    eights = {"ROWS": 32, "GROUP": 32, "SHARED": True, "LARGEST": 127.0, "POWER_OF_TWO": False, "INTEGER": True}
    for name, kernel, pointers, chosen, constants, space in (
        ("round, 1 x 128", scaled.quantise, types, native, {**rounding, **tiles}, ({"num_warps": 4},)),
        ("round, 128 x 128", scaled.quantise, types, native, {**rounding, **blocks}, ({"num_warps": 4},)),
        ("round, int8", scaled.quantise, whole, whole, eights, ({"num_warps": 4},)),
        ("scaled_linear, e4m3", scaled.multiply, types, native, {"GROUP": 128, "INTEGER": False}, spaces.MULTIPLY),
        ("scaled_linear, mx", scaled.multiply, types, native, {"GROUP": 32, "INTEGER": False}, spaces.MULTIPLY),
        ("scaled_linear, int8", scaled.multiply, whole, whole, {"GROUP": 32, "INTEGER": True}, spaces.MULTIPLY),
    ):
        constants = constants if kernel is scaled.quantise else {**constants, "BM": 128}
        yield Case(name=name, kernel=kernel, pointers=pointers, native=chosen, constants=constants, space=space)


def _mixture() -> Iterator[Case]:
    routed = {"SCORING": 1, "BIASED": True, "GROUPS": 8, "KEPT": 4, "PAIRS": True, "ACTIVE": 8, "NORMALISED": True}
    types = {"logits": "fp32", "bias": "fp32", "ids": "i64", "weights": "fp32"}
    v4 = {**routed, "SCORING": 2, "GROUPS": 1, "KEPT": 1, "PAIRS": True, "ACTIVE": 6}
    for name, constants in (("route, V3", {**routed, "BLOCK": 256}), ("route, V4", {**v4, "BLOCK": 512})):
        constants = {**constants, "SLOTS": 8}
        yield Case(name=name, kernel=routing.route, pointers=types, constants=constants, on_chip=True)
    yield from _experts()


def _experts() -> Iterator[Case]:
    rows = {"x": "bf16", "tokens": "i64", "tiles": "i32", "weight": "bf16", "hidden": "bf16", "result": "fp32"}
    rows |= {"kept": "bf16"}
    down = {"GATHERED": False, "TRANSPOSED": False}
    for block in (16, 128):
        for name, kernel, constants in (
            ("up", experts.gate_up, {"LIMITED": True, "KEPT": False}),
            ("up, kept", experts.gate_up, {"LIMITED": True, "KEPT": True}),
            ("down", experts.multiply, down),
            ("gradient of hidden", experts.multiply, {"GATHERED": True, "TRANSPOSED": True}),
            ("gradient of rows", experts.multiply, {**down, "TRANSPOSED": True}),
        ):
            yield Case(
                name=f"experts, {name}, {block}",
                kernel=kernel,
                pointers=rows,
                constants={**constants, "BM": block},
                space=spaces.EXPERTS,
            )
    whole = {"left": "bf16", "right": "bf16", "tokens": "i64", "bounds": "i32", "result": "bf16"}
    for name, gathered in (("up", False), ("down", True)):
        yield Case(
            name=f"experts, gradient of {name}",
            kernel=experts.weight_gradient,
            pointers=whole,
            constants={"LEFT_GATHERED": gathered},
            space=spaces.WEIGHT_GRADIENT,
        )
    unit = {"grad_hidden": "fp32", "weights": "fp32", "choices": "i64", "grad_kept": "bf16", "grad_weights": "fp32"}
    yield Case(
        name="experts, gradient of units",
        kernel=experts.unit_backward,
        pointers={**rows, **unit},
        constants={"LIMITED": True, "BLOCK": 1024},
    )
    summed = {"rows": "fp32", "places": "i64", "weights": "fp32", "y": "bf16"}
    for name, weighted in (("sum", True), ("gradient of sum", False)):
        sizes = {"WEIGHTED": weighted, "ACTIVE": 8, "BLOCK": 1024}
        yield Case(name=f"experts, {name}", kernel=experts.gather_sum, pointers=summed, constants=sizes)


def _attention() -> Iterator[Case]:
    types = {"q": "bf16", "keys": "bf16", "values": "bf16", "out": "fp32", "logs": "fp32"}
    types |= {"tiles": "i32", "starts": "i32", "lengths": "i32", "places": "i32"}
    latent = {"SHARED": True, "HEADS": 128, "PART_A": 512, "PART_B": 64, "VALUE": 512}
    latent |= {"BLOCK_A": 512, "BLOCK_B": 64, "BLOCK_V": 512}
    heads = {"SHARED": False, "HEADS": 1, "PART_A": 128, "PART_B": 64, "VALUE": 128}
    heads |= {"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_V": 128}
    for name, shape, kind, split in (
        ("attention, latent, on pages", latent, 1, True),
        ("attention, by heads", heads, 0, False),
    ):
        for block in (16, 64):
            constants = {**shape, "KIND": kind, "LOGGED": split, "BM": block}
            yield Case(
                name=f"{name}, {block}",
                kernel=attention.attend,
                pointers=types if split else {**types, "out": "bf16"},
                constants=constants,
                space=spaces.ATTENTION,
            )
    types |= {"out": "bf16", "grad": "bf16", "deltas": "fp32"}
    types |= {"grad_q": "bf16", "grad_keys": "bf16", "grad_values": "bf16"}
    heads = {name: value for name, value in heads.items() if name != "SHARED"}
    for name, kernel in (
        ("queries", attention_gradients.query_gradient),
        ("keys", attention_gradients.key_gradients),
    ):
        for block in (16, 64):
            yield Case(
                name=f"attention, gradient of {name}, {block}",
                kernel=kernel,
                pointers=types,
                constants={**heads, "BLOCK": block},
                space=spaces.ATTENTION_GRADIENTS,
            )
    merged = {"parts": "fp32", "logs": "fp32", "sinks": "fp32", "out": "bf16"}
    constants = {"SINKS": True, "VALUE": 512, "BLOCK_S": 64, "BLOCK_V": 512}
    yield Case(name="attention, merge", kernel=attention.merge, pointers=merged, constants=constants, on_chip=True)


def _sparse() -> Iterator[Case]:
    types = {"q": "bf16", "out": "fp32", "logs": "fp32", "sequences": "i32", "positions": "i32", "entries": "bf16"}
    types |= {"entry_places": "i32", "chosen": "i64", "window": "bf16", "window_places": "i32", "window_firsts": "i32"}
    types |= {"weights": "fp32", "scores": "fp32", "seen": "i32", "keys": "bf16", "places": "i32"}
    v3 = {"WINDOW": False, "WINDOW_KIND": 0, "PART_A": 512, "PART_B": 64, "BLOCK_A": 512, "BLOCK_B": 64}
    v4 = {"WINDOW": True, "WINDOW_KIND": 2, "PART_A": 512, "PART_B": 0, "BLOCK_A": 512, "BLOCK_B": 16}
    both = {"ENTRIES": True, "ENTRY_KIND": 1}
    for name, shape, chosen in (
        ("sparse_attention, V3.2", v3, True),
        ("sparse_attention, V4 chosen", v4, True),
        ("sparse_attention, V4 all", v4, False),
    ):
        for block in (16, 64):
            yield Case(
                name=f"{name}, {block}",
                kernel=sparse.attend_sparse,
                pointers=types,
                constants={**shape, **both, "CHOSEN": chosen, "BM": block},
                space=spaces.ATTENTION,
                on_chip=block == 16,
                too_large={"BM": 128, "BN": 128} if block == 16 else {},
            )
    scores = {"KIND": 1, "BLOCK_I": 64, "BLOCK_K": 128, "BN": 64}
    for name, kernel, constants, too_large in (
        ("choose_entries, scores", sparse.score_entries, scores, {"BN": 4096}),
        ("choose_entries, best", sparse.take_best, {"BLOCK": 1024}, {"BLOCK": 32768}),
    ):
        yield Case(name=name, kernel=kernel, pointers=types, constants=constants, on_chip=True, too_large=too_large)


def _compress() -> Iterator[Case]:
    types = {name: "fp32" for name in ("kv", "gate", "bias", "cos", "sin", "ring")} | {"weight": "bf16"}
    types |= {name: "i32" for name in ("groups", "starts", "pasts", "states", "table", "kept")} | {"entries": "bf16"}
    few = {"RATE": 4, "REACH": 8, "WIDTH": 1024, "DIM": 512, "BLOCK": 256}
    many = {"RATE": 128, "REACH": 128, "WIDTH": 512, "DIM": 512, "BLOCK": 256}
    for name, kernel, constants, too_large in (
        ("pool_groups, 4 tokens", compress.pool, few, {"BLOCK": 8192}),
        ("pool_groups, 128 tokens", compress.pool, many, {}),
        ("pool_groups, what is kept", compress.keep, {"WIDTH": 1024, "BLOCK": 1024}, {}),
    ):
        yield Case(name=name, kernel=kernel, pointers=types, constants=constants, on_chip=True, too_large=too_large)


def arguments(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """The type of each argument of a kernel, in its order, as Triton spells it."""
    kinds = {name: "fp32" if name in FLOATS else "i32" for name in kernel.arg_names}
    kinds |= {name: f"*{kind}" for name, kind in pointers.items() if name in kinds}
    return kinds | {name: "constexpr" for name in kinds if name in constants}
