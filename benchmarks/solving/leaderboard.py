"""A sample of the Berkeley Function Calling Leaderboard, version 4: simple calls, a choice of functions, and no call.

The data (Apache-2.0, https://github.com/ShishirPatil/gorilla/tree/main/berkeley-function-call-leaderboard) is a part of
the package `bfcl-eval`, which is installed without its many dependencies and never imported. The leaderboard looks at
the calls of one reply. Here an agent may go on, so all its calls have to be right.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.solving.real_tasks import RealTask, Tool

CATEGORIES: Final = {
    "BFCL v4, simple": "simple_python",
    "BFCL v4, multiple": "multiple",
    "BFCL v4, irrelevance": "irrelevance",
}
"""The titles of the groups, and the names of the categories in the files of the package."""
_TYPES: Final[Mapping[str, type]] = {"string": str, "integer": int, "float": float, "boolean": bool}

Entry = Mapping[str, Any]


def is_available() -> bool:
    """Returns whether the package with the data is installed."""
    return importlib.util.find_spec("bfcl_eval") is not None


def make_leaderboard_tasks(per_group: int) -> list[RealTask]:
    """Makes `per_group` tasks of each category, evenly spread over it; none if the package is not installed."""
    if not is_available():
        return []
    return [
        _make_task(group, entry, wanted)
        for group, category in CATEGORIES.items()
        for entry, wanted in _sample(_read_entries(category), per_group)
    ]


def _sample(entries: Sequence[Any], count: int) -> list[Any]:
    return [entries[number * len(entries) // count] for number in range(count)]


def _read_entries(category: str) -> list[tuple[Entry, Entry]]:
    """Returns the tasks of a category whose parameters are plain values, each with its right call."""
    spec = importlib.util.find_spec("bfcl_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"
    file = f"BFCL_v4_{category}.json"
    entries = _read_lines(folder / file)
    answers = folder / "possible_answer" / file
    wanted = {each["id"]: each["ground_truth"][0] for each in _read_lines(answers)} if answers.exists() else {}
    return [(each, wanted.get(each["id"], {})) for each in entries if all(map(_is_plain, each["function"]))]


def _read_lines(path: Path) -> list[Entry]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _is_plain(function: Entry) -> bool:
    parameters = function["parameters"]["properties"]
    return all(each["type"] in _TYPES and name.isidentifier() for name, each in parameters.items())


def _make_task(group: str, entry: Entry, wanted: Entry) -> RealTask:
    return RealTask(
        group,
        entry["question"][0][-1]["content"],
        lambda task: [_make_tool(task, function) for function in entry["function"]],
        partial(_is_right, wanted),
    )


def _is_right(wanted: Entry, task: RealTask, _answer: str) -> bool:
    """Returns whether all calls are the right one, or none was made if none is right."""
    if not wanted:
        return not task.calls
    ((name, allowed),) = wanted.items()
    return bool(task.calls) and all(
        called == _tool_name(name) and _fits(arguments, allowed) for called, arguments in task.calls
    )


def _fits(arguments: Entry, allowed: Mapping[str, Sequence[Any]]) -> bool:
    """Returns whether each argument has an allowed value. An empty text among them means that it may be left out."""
    return arguments.keys() <= allowed.keys() and all(
        any(_is_same(arguments[name], value) for value in values) if name in arguments else "" in values
        for name, values in allowed.items()
    )


def _is_same(value: Any, allowed: Any) -> bool:
    if isinstance(value, str) and isinstance(allowed, str):
        return value.strip().lower() == allowed.strip().lower()
    # In Python, True equals 1.
    return value is allowed if isinstance(value, bool) or isinstance(allowed, bool) else bool(value == allowed)


def _tool_name(name: str) -> str:
    return name.replace(".", "_")


def _make_tool(task: RealTask, function: Entry) -> Tool:
    """Returns a function with the signature and the documentation of an entry, which records its calls."""
    parameters, required = function["parameters"]["properties"], function["parameters"].get("required", [])
    name = _tool_name(function["name"])

    def tool(**arguments: Any) -> str:
        task.calls.append((name, {key: value for key, value in arguments.items() if value is not None}))
        return "done"

    # Parameters with a default follow the others.
    order = sorted(parameters, key=lambda each: each not in required)
    types: dict[str, Any] = {
        each: _TYPES[parameters[each]["type"]] if each in required else _TYPES[parameters[each]["type"]] | None
        for each in order
    }
    tool.__name__ = tool.__qualname__ = name
    tool.__doc__ = _documentation(function, parameters)
    tool.__annotations__ = {**types, "return": str}
    tool.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # `inspect.signature` reads it
        [
            inspect.Parameter(
                each,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if each in required else None,
                annotation=types[each],
            )
            for each in order
        ],
        return_annotation=str,
    )
    made: Callable[..., str] = tool
    return made


def _documentation(function: Entry, parameters: Mapping[str, Entry]) -> str:
    lines = [f"    {name}: {each.get('description', '')}" for name, each in parameters.items()]
    return "\n".join([function["description"], "", "Args:", *lines]) if lines else str(function["description"])
