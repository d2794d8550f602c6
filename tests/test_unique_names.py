"""A name of a class or a function means one thing in the whole package, so that grep finds it and a reader knows it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parent.parent / "lmbridge"
ADAPTERS: Final = ("LMBridgeModel",)
"""The model of lmbridge for another framework has the same name in each of them."""
ENTRY_POINTS: Final = ("main", "serve", "__getattr__")
"""What a program begins with has the same name in each of them, as the hooks of Python have."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yields the path and the syntax tree of each module that is not generated."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if not (path.parent.name == "sync" and path.name.startswith("_") and path.stem not in ("__init__", "_wrap")):
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def where_defined(*kinds: type[ast.stmt]) -> dict[str, set[str]]:
    """Returns the modules that define each name of these kinds at their top."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, tree in modules():
        for node in tree.body:
            if isinstance(node, kinds) and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name].add(module)
    return found


def test_no_two_classes_have_the_same_name_even_if_one_is_private() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for name, places in where_defined(ast.ClassDef).items():
        if name not in ADAPTERS:
            found[name.lstrip("_")] |= {f"{place}:{name}" for place in places}
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


@pytest.mark.parametrize(("is_private", "most"), [(False, 1), (True, 2)])
def test_no_two_public_functions_and_no_three_private_ones_have_the_same_name(is_private: bool, most: int) -> None:
    found = where_defined(ast.FunctionDef, ast.AsyncFunctionDef)
    names = {name for name in found if name.startswith("_") == is_private and name not in ENTRY_POINTS}
    assert {name: found[name] for name in names if len(found[name]) > most} == {}
