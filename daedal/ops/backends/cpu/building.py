"""Compiles the native kernels on first use and keeps the result in the user's cache.

The sources come with the package; one library holds them once for each instruction set that the compiler knows, and
picks one when it is loaded. Its name is a hash of sources, compiler and flags, so an upgrade compiles anew and two
processes never disturb each other. Without a compiler there is no native backend, and `Unavailable` says why.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

SOURCES = Path(__file__).resolve().parents[2] / "native"

_X86: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "avx512": (
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512vnni",
            "-mavx512bf16",
            "-mavx512vbmi",
            "-mfma",
            "-mf16c",
            "-mprefer-vector-width=512",
        ),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
    }
)
_ARM: Mapping[str, tuple[str, ...]] = MappingProxyType({"dotprod": ("-march=armv8.2-a+dotprod",)})

# Flags of each level beyond the baseline, by machine; the library checks when it is loaded that the CPU has them.
LEVEL_FLAGS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


class Unavailable(Exception):
    """The native kernels cannot be built or loaded here; the message says why and what helps."""


def library(cache: Path) -> Path:
    """The compiled library, built if it is not there yet. Raises Unavailable."""
    command = compiler()
    if command is None:
        raise Unavailable("no C++ compiler was found: install one (Debian: apt install g++)")
    target = _target(cache, command)
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = _build(command, Path(scratch))
            built.replace(target)
    return target


def is_pending(cache: Path) -> bool:
    """Whether `library` would compile first, which takes about a minute."""
    command = compiler()
    return command is not None and not _target(cache, command).exists()


def compiler() -> str | None:
    """The C++ compiler that kernels are built with, None where there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _target(cache: Path, compiler: str) -> Path:
    return cache / f"kernels-{_fingerprint(compiler)}.so"


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, check=False).stdout
    digest.update(version + platform.machine().encode() + repr((FLAGS, _levels())).encode())
    return digest.hexdigest()[:16]


def _levels() -> dict[str, tuple[str, ...]]:
    return {"generic": (), **LEVEL_FLAGS.get(platform.machine().lower(), {})}


def _build(compiler: str, scratch: Path) -> Path:
    """Compiles every level that the compiler knows, side by side, and links them."""
    base = [*compiler.split(), *FLAGS]
    if _compiles([*base, "-fopenmp"], scratch):
        base.append("-fopenmp")
    levels = {name: flags for name, flags in _levels().items() if not flags or _compiles([*base, *flags], scratch)}
    jobs = [
        [*base, *flags, f"-DNATIVE_LEVEL={name}", "-c", str(SOURCES / "kernels.cpp")] for name, flags in levels.items()
    ]
    jobs.append([*base, *(f"-DNATIVE_HAS_{name}" for name in levels), "-c", str(SOURCES / "program.cpp")])
    objects = [scratch / f"{index}.o" for index in range(len(jobs))]
    running = [
        subprocess.Popen([*job, "-o", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for job, path in zip(jobs, objects, strict=True)
    ]
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            raise Unavailable(f"{compiler} failed on the kernels: {output.decode(errors='replace').strip()[-2000:]}")
    linked = scratch / "kernels.so"
    _check(subprocess.run([*base, "-shared", *map(str, objects), "-o", str(linked)], capture_output=True, check=False))
    return linked


def _compiles(command: list[str], scratch: Path) -> bool:
    probe = scratch / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    arguments = [*command, "-c", str(probe), "-o", str(scratch / "probe.o")]
    return subprocess.run(arguments, capture_output=True, check=False).returncode == 0


def _check(done: "subprocess.CompletedProcess[bytes]") -> None:
    if done.returncode:
        raise Unavailable(f"linking the kernels failed: {done.stderr.decode(errors='replace').strip()[-2000:]}")
