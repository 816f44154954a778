"""Makes `.venv` and installs the project into it, once: `python3 tools/venv.py [--extra dev]`.

A stamp holds the hash of what decides the outcome (pyproject.toml, constraints.txt, the interpreter) and the extras
that are in; while it fits, a call does nothing. An interrupted installation leaves no stamp and is done again.
Runs on the user's own interpreter, so it uses the standard library only, and knows nothing of the package inside.
"""

from __future__ import annotations  # an old interpreter must get as far as the sentence that refuses it

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

OLDEST = (3, 11)
PROBE_SECONDS = 3.0
# What a server imports: loaded once at the end, which proves the installation and writes the bytecode that is needed.
FIRST_USE = "import daedal.serve.server, daedal.checkpoint.load, daedal.checkpoint.sources"


def fingerprint(root: Path) -> str:
    """A hash that changes when an installation made from `root` by this interpreter would come out differently."""
    digest = hashlib.sha256(f"{sys.version} {platform.machine()} {root}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def installed_extras(stamp: Path, wanted_fingerprint: str) -> set[str] | None:
    """The extras that the environment has, or None where there is no environment or an outdated one."""
    try:
        record = json.loads(stamp.read_text())
        return set(record["extras"]) if record["fingerprint"] == wanted_fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether `url` answers in time; name resolution counts, hence the thread."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as reply:
                answers.append(reply.status == 200)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def torch_index_options(url: str) -> list[str]:
    """pip's options for the index of CPU builds of torch: on Linux the ordinary build brings gigabytes of CUDA.

    An index out of reach would make pip retry for minutes, so it is asked first and left out if it is silent.
    """
    if not url or sys.platform != "linux":
        return []
    if reachable(url):
        return ["--extra-index-url", url]
    say(f"{url} is out of reach: torch comes from the configured package index, with CUDA where that has it")
    return []


def other_python(environment: Path) -> str | None:
    """The version of the Python that made an environment, where that is not this one: what one has installed the other
    cannot import.
    """
    try:
        lines = (environment / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return None
    fields = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    version = fields.get("version")
    return None if version == platform.python_version() else version


def install(root: Path, extras: set[str], torch_index: str) -> None:
    """Creates the environment where it is missing and installs the project, pinned and editable, with `extras`."""
    environment = root / ".venv"
    python = environment / "bin" / "python"
    stamp = environment / "stamp.json"
    stamp.unlink(missing_ok=True)
    say(f"setting up {environment} for: {', '.join(sorted(extras))}")
    made_by = other_python(environment)
    if made_by is not None:
        say(f"{environment} was made by Python {made_by}: it is made anew by {platform.python_version()}")
    clear = [] if made_by is None else ["--clear"]
    subprocess.run([sys.executable, "-m", "venv", *clear, str(environment)], check=True)
    # --no-compile: bytecode of what is never imported costs half a minute.
    command = [str(python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    command += ["--constraint", str(root / "constraints.txt"), *torch_index_options(torch_index)]
    command += ["--editable", f"{root}[{','.join(sorted(extras))}]"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([str(python), "-c", FIRST_USE], check=True, cwd=root, env=environ)
    stamp.write_text(json.dumps({"fingerprint": fingerprint(root), "extras": sorted(extras)}))


def say(sentence: str) -> None:
    """One line for people; stdout stays free for what the started program prints."""
    print(sentence, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs what is missing. Returns an exit status; pip prints its own errors."""
    parser = argparse.ArgumentParser(description="Make .venv and install the project with its pinned dependencies.")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml; may be repeated")
    parser.add_argument("--torch-index", default="", metavar="URL", help="index with CPU builds of torch, for Linux")
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST:
        say(f"this is Python {platform.python_version()}, 3.11 or newer is needed: try `make PYTHON=python3.11 ...`")
        return 2
    root = Path(__file__).resolve().parent.parent
    wanted = set(options.extra)
    present = installed_extras(root / ".venv" / "stamp.json", fingerprint(root))
    if present is not None and wanted <= present:
        return 0
    try:
        install(root, wanted | (present or set()), options.torch_index)
    except subprocess.CalledProcessError as error:
        say(f"setting up .venv failed (exit status {error.returncode}): see the lines above, then try again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
