"""Parts of a file in memory on huge pages.

A mapped file lies on pages of 4 KB, at each of which the processor looks up an address anew and its prefetcher stops;
weights that stream through every step are read a fifth faster from pages of 2 MB (docs/log.md). Linux gives those to
anonymous memory only, so the parts are copied, which takes a third of a second per gigabyte and counts as memory of the
process. Knows nothing of what the parts are.
"""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = 2 << 20
_LINE = 64
_SHARE = 0.6  # of the memory that is available: beyond it the file stays mapped, and the system may drop it


def copied(path: Path, parts: Sequence[tuple[int, int]]) -> list[Tensor] | None:
    """uint8 copies of parts (offset, nbytes) of a file, side by side on huge pages.

    None where the system has none or too little memory for a copy. Raises OSError.
    """
    starts, total = [], 0
    for _, nbytes in parts:
        starts.append(total)
        total += -(-nbytes // _LINE) * _LINE
    if total < _HUGE or not _has_room(total):
        return None
    # Private: memory that processes could share obeys another switch, which is off as a rule.
    memory = mmap.mmap(-1, -(-total // _HUGE) * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    with path.open("rb") as file, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        jobs = [
            pool.submit(_fill, file.fileno(), memoryview(memory)[start : start + nbytes], offset)
            for (offset, nbytes), start in zip(parts, starts, strict=True)
        ]
        for job in jobs:
            job.result()
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return [whole[start : start + nbytes] for (_, nbytes), start in zip(parts, starts, strict=True)]


def _has_room(nbytes: int) -> bool:
    try:
        switch = _SWITCH.read_text(encoding="ascii")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return "[never]" not in switch and nbytes <= available * _SHARE


def _fill(descriptor: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends {len(memory) - done} bytes early")
        done += count
