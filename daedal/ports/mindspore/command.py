"""The command of the MindSpore runner: one prompt or one message in, greedy text out.

Needs MindSpore, tokenizers and jinja2, and of Daedal's own dependencies nothing else, so that it runs where there is no
torch. A user's mistake is one sentence on stderr and exit status 2.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from daedal.errors import DaedalError
from daedal.ports.mindspore.runner import DEVICES, DTYPES, Runner
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status."""
    wishes = _parser().parse_args(arguments)
    try:
        _generate(wishes)
    except DaedalError as error:
        print(f"daedal: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m daedal.ports.mindspore",
        description="Run a checkpoint under MindSpore: greedy text with a static cache.",
    )
    parser.add_argument("directory", type=Path, help="a directory that `daedal export --to mindspore` wrote")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="a text to continue")
    text.add_argument("--message", help="a message to answer, in the checkpoint's chat format")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--device", choices=DEVICES, default="CPU", help="default: CPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of weights and cache; on a CPU float32 alone")
    parser.add_argument("--graph", action="store_true", help="compile the steps (graph mode); else PyNative")
    parser.add_argument("--context", type=int, help="positions that the cache has (default: at most 2048)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def _generate(wishes: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(wishes.directory)
    prompt = _prompt(wishes, tokenizer)
    began = time.perf_counter()
    runner = Runner(
        wishes.directory, device=wishes.device, dtype=wishes.dtype, graph=wishes.graph, context=wishes.context
    )
    loaded = time.perf_counter()
    detokenizer = tokenizer.detokenizer()
    ids: list[int] = []
    first = loaded
    for chosen in runner.generate(prompt, max_tokens=wishes.max_tokens, stop=tokenizer.eos_ids):
        first = first if ids else time.perf_counter()
        ids.append(chosen)
        print(detokenizer.push(chosen), end="", flush=True)
    print(detokenizer.finish(), flush=True)
    if wishes.json:
        seconds = {"load": loaded - began, "first_token": first - loaded, "rest": time.perf_counter() - first}
        print(json.dumps({"prompt": prompt, "ids": ids, "text": tokenizer.decode(ids), "seconds": seconds}))


def _prompt(wishes: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if wishes.message is None:
        return tokenizer.encode(wishes.prompt)
    rendered = load_format(wishes.directory).render([{"role": "user", "content": wishes.message}])
    return tokenizer.encode(rendered, add_special_tokens=False)
