"""The figures in the README are those of the tables that it links to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Figure(NamedTuple):
    """A row of the table of figures in the README, and where its values come from."""

    begins: str
    """The text with which the row begins, after its first `|`."""
    page: str
    """The page with the table, in `docs/`."""
    section: str
    """The name of the table: it stands between comments with this name."""
    row: str
    """The first cell of the row of that table, without bold type."""
    columns: dict[str, str]
    """The column of the table for each name in the README. The name is empty for lmbridge."""


FIGURES = [
    Figure(
        "[tasks solved](docs/small-models.md#how-many-tasks-are-solved)",
        "small-models.md",
        "solving",
        "all mistakes, three replies in ten",
        {
            "": "lmbridge",
            "Forge": "forge",
            "pydantic-ai": "pydantic-ai",
            "by hand": "by hand, careful",
            "openai-agents": "openai-agents",
            "langchain": "langchain",
        },
    ),
    Figure(
        "[tasks solved](docs/small-models.md#a-model-that-writes-its-calls-as-text)",
        "small-models.md",
        "solving-text",
        "all",
        {"": "lmbridge", "Forge": "forge", "by hand": "by hand, careful"},
    ),
    Figure(
        "[a chunk of a stream]",
        "performance.md",
        "clients",
        "a chunk of a stream, 20 a write",
        {"": "lmbridge", "httpx2 by hand": "httpx2 by hand", "openai-python": "openai-python", "litellm": "litellm"},
    ),
    Figure(
        "[a round of an agent]",
        "performance.md",
        "agents",
        "a round of a run with 1 tool call",
        {"": "lmbridge", "openai-agents": "openai-agents", "pydantic-ai": "pydantic-ai"},
    ),
]


def cells_of(row: str) -> list[str]:
    return [cell.strip().strip("*") for cell in row.strip().strip("|").split("|")]


def read_row(figure: Figure) -> dict[str, str]:
    """Returns the cells of the row that a figure comes from, by the headings of their columns."""
    text = (ROOT / "docs" / figure.page).read_text("utf-8")
    table = text.split(f"<!-- {figure.section}: begin -->")[1].split(f"<!-- {figure.section}: end -->")[0]
    heading, _, *rows = [cells_of(line) for line in table.strip().splitlines()]
    (row,) = (each for each in rows if each[0] == figure.row)
    return dict(zip(heading, row, strict=True))


def as_in_readme(cell: str) -> str:
    """Returns the number of a cell as the README shows it: solved tasks as they are, ratios with two digits or more."""
    number = re.match(r"[\d.]+", cell.replace("*", ""))
    assert number is not None, cell
    value = float(number[0])
    return f"{value:.1f}" if " of " not in cell and value < 10 else f"{value:.0f}"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.section}: {figure.row}")
def test_a_figure_in_the_readme_is_that_of_its_table(figure: Figure) -> None:
    (line,) = (each for each in (ROOT / "README.md").read_text("utf-8").splitlines() if figure.begins in each)
    _, ours, others, _ = cells_of(line)
    row = read_row(figure)
    for name, column in figure.columns.items():
        value = as_in_readme(row[column])
        assert (f"{name} {value}" in others) if name else (ours == value), (name, row[column])


def test_the_seconds_in_the_readme_are_those_of_the_table_of_many_runs() -> None:
    (line,) = (each for each in (ROOT / "README.md").read_text("utf-8").splitlines() if "[24 runs on a server]" in each)
    _, ours, others, _ = cells_of(line)
    rows = [cells_of(each) for each in (ROOT / "docs/concurrency.md").read_text("utf-8").splitlines()]
    last_ends = {each[1]: each[5] for each in rows if each[0] == "4 slots, without a prompt cache"}
    assert ours == last_ends["lmbridge"]
    semaphore = last_ends["openai-agents, semaphore of the slots"]
    assert others == f"openai-agents {semaphore} with a semaphore, {last_ends['openai-agents']} without"
