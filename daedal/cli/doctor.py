"""`daedal doctor`: what silicon is here, which implementation of each op was chosen and why, and where things are kept.

Reports and changes nothing. Why a backend declines is the backend's own sentence, read through `ops.explain`. What
was chosen for each op is run once beside the reference, and a wrong result ends the command.
"""

import json
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from daedal import __version__
from daedal.cli.console import table_console
from daedal.cli.op_samples import samples
from daedal.cli.precision import choose_dtype, cpu_capabilities
from daedal.cli.silicon_plan import OpChoice, Silicon, described, show_ops, show_plan, show_silicon
from daedal.cli.units import in_bytes

if TYPE_CHECKING:
    import torch

VARIABLES = {
    "DAEDAL_CACHE": "where fetched models are kept",
    "DAEDAL_OPS": "forces one backend for every op",
    "DAEDAL_LOG": "level of the log: debug, info, warning, error",
}
NOTABLE_FEATURES = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "bf16",
    "sve",
    "sme",
)

SEED = 1  # of the self-check's numbers

NATIVE_LEVELS = {
    "amx": "AVX-512 with bfloat16, VNNI and the matrix unit (AMX)",
    "avx512": "AVX-512 with bfloat16 and VNNI; without a matrix unit prompts are read several times slower",
    "avx2": "AVX2; packed weights are read nearly as fast as with AVX-512, prompts several times slower than with AMX",
    "dotprod": "NEON with dot products; checked under an emulator only, its speed is not known",
    "generic": "what the compiler makes of plain vectors (NEON on ARM); several times slower than AVX-512",
}


class Checked(TypedDict):
    """The backend that runs an op, and its largest error as a share of the result's largest number."""

    op: str
    backend: str
    error: float


class Diagnosis(TypedDict):
    """What `--json` prints."""

    daedal: str
    python: str
    platform: str
    torch: str
    threads: int
    devices: list[str]
    device: str
    dtype: str
    dtype_reason: str
    cpu_features: list[str]
    native_kernels: str
    silicon: Silicon
    ops: list[OpChoice]
    checked: list[Checked]
    variables: dict[str, str | None]
    cache: str
    cache_free_bytes: int
    models: list[str]
    packages: dict[str, str | None]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="CHIP", help="Plan for a chip that is not here: h200, mi300x, ascend-910c.")
    ] = None,
) -> None:
    """Say what this machine has, and what Daedal chose for it."""
    if profile is not None:
        return show_plan(profile, table_console(), as_json=as_json)
    found = diagnose()
    _show(found, table_console())
    if as_json:
        print(json.dumps(found))


def diagnose() -> Diagnosis:
    """Looks at the machine; BackendError where DAEDAL_OPS forces what is not here."""
    import torch

    from daedal.checkpoint.load import resolve_device
    from daedal.ops import silicon
    from daedal.places import cache_directory

    device = resolve_device("auto")
    precision = choose_dtype("auto", device)
    capabilities = cpu_capabilities() or {}
    cache = cache_directory()
    return Diagnosis(
        daedal=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        devices=_devices(),
        device=str(device),
        dtype=str(precision.dtype).removeprefix("torch."),
        dtype_reason=precision.reason,
        cpu_features=[name for name in NOTABLE_FEATURES if capabilities.get(name)],
        native_kernels=_native_kernels(),
        silicon=described(silicon.of(device)),
        ops=op_choices(device, precision.dtype),
        checked=self_check(device, precision.dtype),
        variables={name: os.environ.get(name) for name in VARIABLES},
        cache=str(cache),
        cache_free_bytes=_free_bytes(cache),
        models=sorted(path.parent.name for path in cache.glob("models/*/config.json")),
        packages=_packages(),
    )


def op_choices(device: "torch.device", dtype: "torch.dtype") -> list[OpChoice]:
    """For every op and backend: whether a decode step would run on it, and the reason. On a CPU with native kernels
    weights are packed, as `serve` packs them.
    """
    import torch

    from daedal import ops

    choices: list[OpChoice] = []
    with torch.no_grad():
        for op, (arguments, keywords) in samples(device, dtype, _weights(device)).items():
            for choice in ops.explain(op, *arguments, **keywords):
                choices.append(OpChoice(op=op, backend=choice.backend, chosen=choice.chosen, reason=choice.reason))
    return choices


def self_check(device: "torch.device", dtype: "torch.dtype") -> list[Checked]:
    """Runs every op once as a decode step would, and on the reference; BackendError where a result is wrong."""
    import torch

    from daedal.ops.self_check import check

    checked: list[Checked] = []
    with torch.no_grad():
        for op in samples(device, dtype):
            backend, error = check(op, lambda op=op: samples(device, dtype, _weights(device), SEED)[op])  # type: ignore[misc]
            checked.append(Checked(op=op, backend=backend, error=error))
    return checked


def _weights(device: "torch.device") -> str | None:
    """The format of weights in which `serve` holds them there."""
    from daedal.ops.backends.cpu.program import missing

    return "int8" if device.type == "cpu" and missing() is None else None


def _native_kernels() -> str:
    """One line: what they run on here, or what is missing and what that costs."""
    from daedal.ops.backends.cpu.program import missing, native

    if reason := missing():
        return f"absent: {reason}. PyTorch runs everything, and expands packed weights at every use"
    return NATIVE_LEVELS[native().level]


def _devices() -> list[str]:
    import torch

    cpu = f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return [cpu]
    return [cpu, *(_accelerator(accelerator.type, index) for index in range(torch.accelerator.device_count()))]


def _accelerator(kind: str, index: int) -> str:
    import torch

    ask = getattr(getattr(torch, kind, None), "get_device_properties", None)
    if ask is None:
        return f"{kind}:{index}"
    properties = ask(index)
    return f"{kind}:{index}: {properties.name}, {in_bytes(properties.total_memory)}"


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _packages() -> dict[str, str | None]:
    """Version of every package that Daedal may use, None for one that is absent; empty in a bare source tree."""
    try:
        requirements = [item for item in metadata.requires("daedal") or [] if not item.endswith('extra == "dev"')]
    except metadata.PackageNotFoundError:
        return {}
    names = {re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0] for requirement in requirements} - {"daedal"}
    return {name: _version(name) for name in sorted(names)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _show(found: Diagnosis, console: Console) -> None:
    _pairs(
        console,
        "machine",
        [
            ("daedal", f"{found['daedal']} on Python {found['python']}, {found['platform']}"),
            ("torch", f"{found['torch']}, {found['threads']} threads"),
            *(("device", device) for device in found["devices"]),
            ("CPU features", ", ".join(found["cpu_features"]) or "none that matter here"),
            ("native kernels", found["native_kernels"]),
            ("chosen", f"{found['device']} in {found['dtype']}: {found['dtype_reason']}"),
        ],
    )
    show_silicon(found["silicon"], console)
    show_ops("ops, for a decode step", found["ops"], console)
    worst = max(found["checked"], key=lambda one: one["error"])
    console.print(
        f"  self-check: {len(found['checked'])} ops agree with the reference; the largest error is "
        f"{worst['error']:.2g} of a result's largest number ({worst['op']} on {worst['backend']})\n"
    )
    _pairs(
        console,
        "variables",
        [(f"{name} ({VARIABLES[name]})", value or "unset") for name, value in found["variables"].items()],
    )
    _pairs(
        console,
        "cache",
        [
            ("directory", f"{found['cache']}, {in_bytes(found['cache_free_bytes'])} free"),
            ("models", ", ".join(found["models"]) or "none yet"),
        ],
    )
    if found["packages"]:
        _pairs(console, "packages", [(name, version or "absent") for name, version in found["packages"].items()])


def _pairs(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
