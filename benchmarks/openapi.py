"""Schemathesis over the server's own OpenAPI document: bodies that fit, bodies that do not, every method and status.

    python -m venv API && API/bin/pip install schemathesis
    python -m tests.serve.deepseek DIR --format deepseek-v3.2     # a small random model that thinks and calls tools
    python benchmarks/openapi.py DIR --schemathesis API/bin/schemathesis --chat-format deepseek-v3.2

All of its checks and phases, by `schemathesis.toml`. What else is given goes to `daedal serve`. Prints what it prints,
and one JSON line last; status 1 where it finds anything.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

from circumstances import circumstances
from served import serving

CONTEXT = 256  # tokens: what fits its schema is answered, and answers may fill the context


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--examples", type=int, default=100, help="of each operation, at most, in each phase")
    parser.add_argument("--seed", type=int, default=1)
    chosen, options = parser.parse_known_args()
    config = Path(__file__).with_name("schemathesis.toml")
    with serving(chosen.model, "--max-context", str(CONTEXT), *options) as (server, _):
        start = time.monotonic()
        command = [chosen.schemathesis, "--config-file", str(config), "run", f"{server.address}/openapi.json"]
        command += ["--max-examples", str(chosen.examples), "--seed", str(chosen.seed), "--continue-on-failure"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds, logged = time.monotonic() - start, server.logged()
    print(done.stdout)
    statuses: dict[str, int] = {}
    for line in logged:
        statuses[str(line["status"])] = statuses.get(str(line["status"]), 0) + 1
    told = {"status": done.returncode, "seconds": seconds, "requests": len(logged), "answers": statuses}
    print(json.dumps({**told, **circumstances()}))
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
