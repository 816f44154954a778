"""`daedal`: its verbs, and what they have in common: one sentence for a user's mistake, never a traceback.

Exit statuses: 0 done, 2 the user's mistake, 130 interrupted; 1 with a traceback is a defect of ours. DAEDAL_LOG sets
the level of the log on stderr; at `debug` a mistake shows its traceback too. Knows nothing of models.
"""

import logging
import os
import sys
from collections.abc import Sequence

import typer

from daedal.cli import (
    batch,
    bench,
    chat,
    convert,
    cost,
    distill,
    doctor,
    export,
    grounding,
    provenance,
    pull,
    quantize,
    report,
    serve,
    train,
    version,
)
from daedal.cli import eval as evaluation
from daedal.errors import ConfigError, DaedalError

LOG_LEVELS = ("debug", "info", "warning", "error")

app = typer.Typer(
    help="Builds, distils and serves sparse language models, and says what every answer cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="serve")(serve.command)
app.command(name="chat")(chat.command)
app.command(name="batch")(batch.command)
app.command(name="pull")(pull.command)
app.command(name="quantize")(quantize.command)
app.command(name="export")(export.command)
app.command(name="train")(train.command)
app.command(name="convert")(convert.command)
app.command(name="distill")(distill.command)
app.command(name="eval")(evaluation.command)
app.command(name="grounding")(grounding.command)
app.command(name="provenance")(provenance.command)
app.command(name="cost")(cost.command)
app.command(name="bench")(bench.command)
app.command(name="report")(report.command)
app.command(name="doctor")(doctor.command)
app.command(name="version")(version.command)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; an empty one asks for help."""
    try:
        configure_logging(os.environ.get("DAEDAL_LOG", ""))
        status = app(args=list(arguments) or ["--help"], prog_name="daedal", standalone_mode=False)
        sys.stdout.flush()
        return status or 0
    except DaedalError as error:
        logging.getLogger(__name__).debug("the mistake came from here", exc_info=error)
        return _mistake(str(error))
    except typer.TyperException as error:
        return _mistake(f"{error.format_message().rstrip('.')}: see `daedal --help`")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has left; what is still buffered must not raise once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def configure_logging(level: str) -> None:
    """Sends the log to stderr from `level` on; empty means `warning`. ConfigError for a level that does not exist."""
    chosen = level.lower() or "warning"
    if chosen not in LOG_LEVELS:
        raise ConfigError(f"DAEDAL_LOG is {level!r}: it must be one of {', '.join(LOG_LEVELS)}, or unset")
    logging.basicConfig(
        level=chosen.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True
    )


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def _mistake(sentence: str) -> int:
    print(f"daedal: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
