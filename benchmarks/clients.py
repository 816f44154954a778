"""Whether common clients work unchanged: openai, anthropic, litellm, langchain-openai, llm and a real `daedal serve`.

    python -m venv CLIENTS && CLIENTS/bin/pip install openai anthropic litellm mcp langchain-openai llm
    python -m tests.serve.deepseek DIR --format deepseek-v3.2     # a small random model that thinks and calls tools
    python benchmarks/clients.py DIR --python CLIENTS/bin/python --chat-format deepseek-v3.2

The clients run in an environment of their own, as they bring much along. What each is asked is in `client_checks.py`.
What else is given goes to `daedal serve`. Prints a table, and one JSON line last; status 1 where a check fails.
"""

import argparse
import json
import subprocess
from pathlib import Path

from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from served import serving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--python", required=True, help="of an environment with the clients")
    chosen, options = parser.parse_known_args()
    with serving(chosen.model, *options) as (server, _):
        name = str(server.stats()["model"])
        checks = str(Path(__file__).with_name("client_checks.py"))
        done = subprocess.run(
            [chosen.python, checks, server.address, name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    told = json.loads(done.stdout.splitlines()[-1])
    table = Table("client", "check", "outcome", title=f"Clients of daedal serve {chosen.model}")
    for client, checks_of in told.items():
        for check, outcome in checks_of.items():
            table.add_row(client, check, outcome)
    Console().print(table)
    print(json.dumps({"clients": told, **circumstances()}))
    outcomes = [outcome for checks_of in told.values() for check, outcome in checks_of.items() if check != "version"]
    return 0 if outcomes and all(outcome == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
