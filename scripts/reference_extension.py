"""An extension of griffe, with which mkdocstrings reads attrs classes and docstrings in the style of this project."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import attrs
import griffe

_CODE = re.compile(r"^(?P<indent> *)(?P<text>\S.*)::\n\n(?P<code>(?:(?P=indent) {4}.*\n|\n)+)", re.MULTILINE)
_PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")


def _with_fences(docstring: str) -> str:
    """Returns a docstring in which code that follows `::` stands between fences, with its language."""

    def fenced(found: re.Match[str]) -> str:
        indent, code = found["indent"], found["code"]
        lines = "\n".join(line[4:] for line in code.rstrip("\n").splitlines())
        return f"{indent}{found['text']}:\n\n{indent}```python\n{lines}\n{indent}```\n\n"

    return _CODE.sub(fenced, f"{docstring}\n").rstrip("\n")


def _with_links(docstring: str) -> str:
    """Returns a docstring whose mentions of pages are links to them, from a page of the reference."""
    return _PAGE.sub(lambda found: f"[{found[1].replace('-', ' ')}](../{found[1]}.md)", docstring)


class ReferenceExtension(griffe.Extension):
    """Reads the constructors of attrs classes, and turns docstrings into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _with_links(_with_fences(obj.docstring.value))

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Adds the constructors of the attrs classes that a module exports."""
        for module in _modules(pkg):
            for name in module.exports or ():
                exported = module.members[str(name)]
                found = exported.final_target if isinstance(exported, griffe.Alias) else exported
                if isinstance(found, griffe.Class) and "__init__" not in found.members:
                    _add_constructor(found)


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from _modules(member)


def _add_constructor(cls: griffe.Class) -> None:
    """Adds the constructor of an attrs class, and takes the calls of `attrs.field` from its fields."""
    try:
        loaded: Any = getattr(importlib.import_module(cls.module.path), cls.name)
    except ImportError:
        # The module adapts lmbridge to another framework, which need not be installed. It has no attrs classes.
        return
    if not attrs.has(loaded):
        return
    parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
    for field in attrs.fields(loaded):
        member = cls.all_members.get(field.name)
        annotation = member.annotation if isinstance(member, griffe.Attribute) else None
        if isinstance(member, griffe.Attribute):
            member.value = None
        if field.init:
            kind = griffe.ParameterKind.keyword_only if field.kw_only else griffe.ParameterKind.positional_or_keyword
            parameters.append(
                griffe.Parameter(field.alias or field.name, annotation=annotation, kind=kind, default=_default(field))
            )
    cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def _default(field: attrs.Attribute[Any]) -> str | None:
    if field.default is attrs.NOTHING:
        return None
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]  # a class, declared as a function
        made = getattr(field.default, "factory", None)
        return f"{made.__name__}()" if made in (list, dict, set, tuple) else "..."
    return repr(field.default)
