"""MindSpore beside what `mindspore_expected.py` recorded: logits, greedy ids, both modes. Needs no torch.

    python benchmarks/mindspore_parity.py /tmp/parity                      # CPU, float32
    python benchmarks/mindspore_parity.py /tmp/parity --device Ascend --dtype bfloat16 --tolerance 0.05

Differences of logits are the largest, divided by the largest logit. Prints a table, and one JSON line last; exit status
1 where a difference is beyond the tolerance or other ids were chosen. Seconds include compiling.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import mindspore
import numpy as np

from daedal.ports.mindspore.runner import DEVICES, DTYPES, Runner

MODES = ("PyNative", "graph")


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold MindSpore's runner against Daedal's own results.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", choices=DEVICES, default="CPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tolerance", type=float, default=1e-5)
    wishes = parser.parse_args()
    rows = [
        compare(path.parent, mode, wishes)
        for path in sorted(wishes.directory.glob("*/expected.npz"))
        for mode in wishes.modes
    ]
    versions = f"MindSpore {mindspore.__version__}, numpy {np.__version__}, {platform.machine()}"
    print(json.dumps({"versions": versions, "command": shlex.join(sys.argv), "rows": rows}))
    return 0 if rows and all(row["agrees"] for row in rows) else 1


def compare(directory: Path, mode: str, wishes: argparse.Namespace) -> dict[str, object]:
    """One model in one mode; prints its line."""
    began = time.perf_counter()
    runner = Runner(directory, device=wishes.device, dtype=wishes.dtype, graph=mode == "graph", context=256)
    furthest, same, ids = 0.0, 0, 0
    with np.load(directory / "expected.npz") as expected:
        prompts = sum(name.startswith("prompt-") for name in expected)
        for index in range(prompts):
            prompt, wanted = expected[f"prompt-{index}"].tolist(), expected[f"logits-{index}"]
            difference = np.abs(runner.logits(prompt) - wanted).max() / np.abs(wanted).max()
            furthest = max(furthest, float(difference))
            greedy = expected[f"greedy-{index}"].tolist()
            stop = runner.config.eos_token_ids
            same += list(runner.generate(prompt, max_tokens=len(greedy), stop=stop)) == greedy
            ids += len(greedy)
    agrees = furthest <= wishes.tolerance and same == prompts
    seconds = time.perf_counter() - began
    line = (
        f"{directory.name:24} {mode:9} logits {furthest:.1e}   texts {same} of {prompts} ({ids} ids)   {seconds:.0f} s"
    )
    print(line, flush=True)
    return {
        "model": directory.name,
        "mode": mode,
        "device": wishes.device,
        "furthest": furthest,
        "texts": prompts,
        "same": same,
        "ids": ids,
        "seconds": seconds,
        "agrees": agrees,
    }


if __name__ == "__main__":
    sys.exit(main())
