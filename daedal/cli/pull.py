"""`daedal pull`: fetch a model by name into the cache, with a progress bar. Knows nothing of where models come from."""

from typing import Annotated

import typer

from daedal.cli.fetching import pull_shown


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known name, or a hub repository as OWNER/NAME.")],
) -> None:
    """Fetch a model, check it, keep it in the cache, and print where it is."""
    print(pull_shown(name))
