"""What a table holds is printed as it is."""

import pytest
from rich.table import Table

from daedal.cli.console import table_console


def test_brackets_and_colons_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="models in [cache]")
    table.add_row("daedal[triton]", "[red]llama:fire:")
    table_console().print(table, "a [b] sentence")
    out = capsys.readouterr().out
    assert all(text in out for text in ("models in [cache]", "daedal[triton]", "[red]llama:fire:", "a [b] sentence"))


def test_a_pipe_takes_wide_tables_whole(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_row(*("a cell of thirty characters ..",) * 20)
    table_console().print(table)
    assert any(line.count("a cell of thirty characters ..") == 20 for line in capsys.readouterr().out.splitlines())
