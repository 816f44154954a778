"""Runs decode steps of small models on ARM's native kernels, without ARM: `python -m tests.emulate`.

A recorded step is a list of kernel calls on memory that stays. That memory is written out with the calls, a cross
compiler builds the same sources as `building` does on ARM, and the calls run under an emulator on the same bytes
(tests/replay.cpp). What they leave behind is held to what this machine's plain-vector level leaves: every tensor of
the step, whole numbers exactly. Products and sums are rounded apart, as this machine's are: one more bit in a sum may
move an activation to the next code, and all that follows. What it cannot show: speed, and the order in which another
machine's cores see memory.

Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static).
"""

import argparse
import bisect
import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import daedal
from daedal.checkpoint.save import save
from daedal.infer.cache import page_multiple
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.ops.backends.cpu import program as native_program
from daedal.ops.backends.cpu.building import FLAGS, LEVEL_FLAGS, SOURCES
from daedal.ops.backends.cpu.program import Program, native
from tests.tiny import tiny_model

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
REPLAY = Path(__file__).with_name("replay.cpp")
# Every kind of layer, and every packed format.
STEPS = (
    ("llama", "bf16"),
    ("deepseek_v2", "fp8"),
    ("deepseek_v3", "int4"),
    ("deepseek_v32", "int8"),
    ("deepseek_v4", "fp4"),
    ("deepseek_v4", "int8"),
)
# Of a tensor's largest number: exponentials and logarithms come of another library, and may differ in the last bit.
TOLERANCE = 2e-3


class Memory:
    """A program's words, and the regions of memory that they point into."""

    def __init__(self, program: Program):
        self.words, self.tensors = list(program._words), list(program._kept)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors if t.numel()}
        self.starts = sorted(storages)
        self.sizes = [storages[start] for start in self.starts]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(word, region, offset) for every argument that is an address."""
        at = 0
        while at < len(self.words):
            count = self.words[at + 1]
            for index in range(at + 2, at + 2 + count):
                region = bisect.bisect_right(self.starts, self.words[index]) - 1
                if region >= 0 and self.words[index] < self.starts[region] + self.sizes[region]:
                    yield index, region, self.words[index] - self.starts[region]
            at += 2 + count

    def kernels(self) -> set[int]:
        numbers, at = set(), 0
        while at < len(self.words):
            numbers.add(self.words[at])
            at += 2 + self.words[at + 1]
        return numbers

    def content(self) -> list[bytes]:
        return [ctypes.string_at(start, size) for start, size in zip(self.starts, self.sizes, strict=True)]

    def image(self) -> bytes:
        """What tests/replay.cpp reads."""
        places = [number for place in self.places() for number in place]
        head = [len(self.words), len(self.sizes), len(places) // 3, *self.words, *self.sizes, *places]
        return np.array(head, dtype=np.int64).tobytes() + b"".join(self.content())

    def seen_in(self, tensor: Tensor, regions: Sequence[bytes]) -> Tensor:
        """`tensor` as it stands in other content of the regions."""
        start = tensor.untyped_storage().data_ptr()
        copy = torch.frombuffer(bytearray(regions[self.starts.index(start)]), dtype=tensor.dtype)
        return torch.as_strided(copy, tensor.shape, tensor.stride(), tensor.storage_offset())


def record(family: str, weights: str, folder: Path) -> Program:
    """A decode step of three sequences of a small model, a few steps into their answers."""
    wide = {"moe_intermediate_size": 32} if family.startswith("deepseek") else {}
    directory = folder / f"{family}-{weights}"
    save(tiny_model(family, dtype=torch.bfloat16, **wide), directory)
    model = daedal.load(directory, weights=weights)
    size = -(-4 // page_multiple(model.config)) * page_multiple(model.config)
    engine = Engine(model, page_size=size, max_batch=3)
    for name, length in (("a", 5), ("b", 130), ("c", 23)):
        prompt = torch.randint(3, 300, (length,)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        engine.add(Request(id=name, prompt=tuple(prompt), params=params))
    while engine.has_work:
        engine.step()
    step = engine._runner._recorded._steps[3]
    step._ids_T.add_(1)  # other tokens than memory holds the results of: a call that does nothing shows
    recorded: Program = step._program
    return recorded


def build(folder: Path) -> Path:
    """The replaying program for ARM, all levels in it, linked so that it needs no libraries there."""
    base = [COMPILER, *FLAGS, "-ffp-contract=off", "-fopenmp"]
    levels = {"generic": (), **LEVEL_FLAGS["aarch64"]}
    jobs = [[*base, *flags, f"-DNATIVE_LEVEL={name}", str(SOURCES / "kernels.cpp")] for name, flags in levels.items()]
    jobs.append([*base, *(f"-DNATIVE_HAS_{name}" for name in levels), str(SOURCES / "program.cpp")])
    jobs.append([*base, str(REPLAY)])
    objects = [str(folder / f"{index}.o") for index in range(len(jobs))]
    for job, path in zip(jobs, objects, strict=True):
        subprocess.run([*job, "-c", "-o", path], check=True)
    subprocess.run([*base, "-static", *objects, "-o", str(folder / "replay")], check=True)
    return folder / "replay"


def judge(memory: Memory, ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[int, int, float]:
    """(tensors that differ by more than the tolerance, tensors compared, largest difference in the others)."""
    wrong = compared = 0
    largest = 0.0
    for tensor in memory.tensors:
        if tensor.numel() == 0 or tensor.dtype in (torch.uint8, torch.int8):  # scratch, and weights
            continue
        expected, found = memory.seen_in(tensor, ours), memory.seen_in(tensor, theirs)
        compared += 1
        if not tensor.dtype.is_floating_point:
            wrong += not torch.equal(expected, found)
            continue
        same_gaps = torch.equal(expected.isfinite(), found.isfinite())
        expected, found = (one.double().nan_to_num(0.0, 0.0, 0.0) for one in (expected, found))
        tolerance = max(TOLERANCE, 2.0**-7 if tensor.dtype == torch.bfloat16 else 0.0)
        off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not same_gaps or off > tolerance:
            wrong += 1
        else:
            largest = max(largest, off)
    return wrong, compared, largest


def emulate(replay: Path, memory: Memory, image: Path, level: str, threads: int) -> list[bytes]:
    """The regions as the emulated machine leaves them."""
    result = image.with_suffix(".result")
    subprocess.run([EMULATOR, str(replay), str(image), str(result), level, str(threads)], check=True)
    content, regions = result.read_bytes(), []
    for size in memory.sizes:
        regions.append(content[:size])
        content = content[size:]
    return regions


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for needed in (COMPILER, EMULATOR):
        if shutil.which(needed) is None:
            print(f"{needed} is not here: install g++-aarch64-linux-gnu and qemu-user-static")
            return 2
    torch.manual_seed(0)
    torch.set_num_threads(1)
    failed, called = False, set[int]()
    native().use("generic")
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        replay = build(folder)
        for family, weights in STEPS:
            recorded = record(family, weights, folder)
            memory = Memory(recorded)
            called |= memory.kernels()
            image = folder / f"{family}-{weights}.image"
            image.write_bytes(memory.image())
            before = memory.content()
            recorded.replay()
            ours = memory.content()
            changed, compared, _ = judge(memory, before, ours)
            print(f"{family:12} {weights:4} the step changes {changed} of {compared} tensors", flush=True)
            for level in (*LEVEL_FLAGS["aarch64"], "generic"):
                for threads in (1, 2):
                    wrong, compared, largest = judge(memory, ours, emulate(replay, memory, image, level, threads))
                    failed |= wrong > 0
                    print(
                        f"{family:12} {weights:4} {level:8} threads {threads}: {compared} tensors, {wrong} wrong, "
                        f"the others within {largest:.1e}",
                        flush=True,
                    )
    left = sorted(kernel for kernel, number in native_program.native().kernels.items() if number not in called)
    print("kernels in none of these steps:", ", ".join(left) or "none")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
