"""`python -m daedal.ports.mindspore`: says in one sentence where MindSpore is not installed, else runs `command`."""

import sys

try:
    from daedal.ports.mindspore.command import run
except ModuleNotFoundError as error:
    if error.name not in ("mindspore", "numpy", "tokenizers", "jinja2"):
        raise
    print(
        f"daedal: {error.name} is not installed: in an environment of its own, `pip install mindspore 'numpy<2' "
        "tokenizers jinja2`, and Daedal without its dependencies, `pip install --no-deps daedal`",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
