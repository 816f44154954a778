"""Where commands print their tables."""

from rich.console import Console


def table_console() -> Console:
    """Standard output, for tables and sentences. What they hold is plain text: names of models and extras have brackets
    and colons in them. A file or a pipe takes tables whole, however wide they are.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    return console
