"""Writes the blocking classes of `lmbridge.sync` from the source of the asynchronous ones.

    python scripts/generate_sync.py            writes _client.py, _journal.py, _agent.py and _mcp.py in lmbridge/sync
    python scripts/generate_sync.py --check    exits with 1 if they are not up to date

A generated method has the signature and the docstring of the asynchronous method, without `async` and `await`, and its
body hands the call to the background loop. Descriptors that wrap methods at run time would be shorter, but editors and
type checkers could not see through them, and tracebacks through generated code are easier to read.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = ROOT / "lmbridge" / "sync"


class ClassSpec(NamedTuple):
    """The description of a blocking class to generate."""

    module: str
    """The module of the asynchronous class."""
    name: str
    """The name of both classes."""
    kind: str
    """The name of the base class in _wrap.py: "Owner", "Stream" or "Wrapper"."""


CLASSES_OF_FILE: Final = {
    "_client": [
        ClassSpec("lmbridge.client.chat_stream", "ChatStream", "Stream"),
        ClassSpec("lmbridge.client.text_completions", "TextStream", "Stream"),
        ClassSpec("lmbridge.client.responses", "ResponseStream", "Stream"),
        ClassSpec("lmbridge.client.lmstudio", "LMStudio", "Wrapper"),
        ClassSpec("lmbridge.client.client_models", "Models", "Wrapper"),
        ClassSpec("lmbridge.client.raw_responses", "RawResponses", "Wrapper"),
        ClassSpec("lmbridge.client.llm", "LLMClient", "Owner"),
        ClassSpec("lmbridge.client.pool", "LLMClientPool", "Owner"),
    ],
    "_journal": [ClassSpec("lmbridge.agent.journal.journal", "Journal", "Wrapper")],
    "_agent": [
        ClassSpec("lmbridge.agent.runs", "RunStream", "Stream"),
        ClassSpec("lmbridge.agent.runs", "RunHandle", "Wrapper"),
        ClassSpec("lmbridge.agent.agent", "Agent", "Wrapper"),
    ],
    "_mcp": [ClassSpec("lmbridge.mcp.dynamic", "DynamicAutonomousAgent", "Owner")],
}
FILE_OF_CLASS: Final = {spec.name: file for file, specs in CLASSES_OF_FILE.items() for spec in specs}
BLOCKING_ALTERNATIVES: Final = {"ChatClient": "LLMClient", "ChatClientPool": "LLMClientPool", "AnyJournal": "Journal"}
"""The blocking class that is accepted in place of an object that follows an asynchronous protocol."""
OMITTED_METHODS: Final = {"aclose", "asend", "athrow", "close", "collect", "wait_begun"}
KEPT_DECORATORS: Final = ("overload", "property", "classmethod")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The source of a module: its classes, and where each name in it comes from."""

    _read: dict[str, Module] = {}  # noqa: RUF012 - a cache

    def __init__(self, name: str) -> None:
        self.name = name
        self.tree = ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text())
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                self.imports |= {each.asname or each.name: (node.module, each.name) for each in node.names}
            elif isinstance(node, ast.Import):
                self.imports |= {each.asname or each.name: (each.name, "") for each in node.names}

    @classmethod
    def named(cls, name: str) -> Module:
        if name not in cls._read:
            cls._read[name] = cls(name)
        return cls._read[name]

    def import_line(self, name: str) -> str | None:
        """Returns the import statement for a name that annotations of this module use, or None for a builtin."""
        if name in self.imports:
            module, original = self.imports[name]
            if not original:
                return f"import {module}" + (f" as {name}" if name != module else "")
            return f"from {module} import {original}" + (f" as {name}" if name != original else "")
        defined = {target.id for node in self.tree.body for target in _targets(node)} | set(self.classes)
        return f"from {self.name} import {name}" if name in defined else None


def _targets(node: ast.stmt) -> Iterator[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target for target in targets if isinstance(target, ast.Name))


class AnnotationTranslator(ast.NodeTransformer):
    """Translates an annotation of an asynchronous class for the blocking class."""

    def __init__(self, type_variables: dict[str, ast.expr]) -> None:
        self._type_variables = type_variables

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str) and node.value.isidentifier() and node.value[0].isupper():
            # The type of `NodeTransformer.visit` is Any, and it returns the node that stands for the name.
            return self.visit(ast.Name(node.value))  # type: ignore[no-any-return]
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "AbstractAsyncContextManager":
            return ast.Name("AbstractContextManager")
        if node.id == "StreamedText":
            return ast.Subscript(ast.Name("Iterator"), ast.Name("str"))
        if node.id in BLOCKING_ALTERNATIVES:
            return ast.BinOp(ast.Name(BLOCKING_ALTERNATIVES[node.id]), ast.BitOr(), node)
        return self._type_variables.get(node.id, node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "Literal":
            return node
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in ("AsyncGenerator", "AsyncIterator"):
            item = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            return ast.Subscript(ast.Name("Iterator"), item)
        return node


class FileWriter:
    """Generates the source of one file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._typing_imports: set[str] = set()
        self._spec_module = Module.named(CLASSES_OF_FILE[file][0].module)
        self._runtime_imports: set[str] = {"from typing import TYPE_CHECKING, Any, overload"}

    def write(self) -> str:
        body = "\n\n\n".join(self._class_source(spec) for spec in CLASSES_OF_FILE[self._file])
        runtime, typing = (
            "\n".join(sorted(self._runtime_imports)),
            "\n".join(f"    {each}" for each in sorted(self._typing_imports - self._runtime_imports)),
        )
        return (
            '"""Blocking classes, generated by scripts/generate_sync.py: edit the script instead."""\n\n'
            f"from __future__ import annotations\n\n{runtime}\n\nif TYPE_CHECKING:\n    pass\n{typing}\n\n{body}\n"
        )

    def _class_source(self, spec: ClassSpec) -> str:
        module = Module.named(spec.module)
        node = module.classes[spec.name]
        self._spec_module = module
        item = ""
        functions: list[tuple[Module, Function, dict[str, ast.expr]]] = []
        for owner, base, variables in _class_with_bases(module, node):
            if spec.kind == "Stream" and not item and (found := _item_type(base, variables)) is not None:
                item = f"[{self._annotation(found, owner, variables)}]"
                # The arguments of a base class are evaluated at run time, unlike annotations.
                self._runtime_imports |= {line for line in [self._import_line(item[1:-1], owner)] if line}
            known = {function.name for _, function, _ in functions}
            functions += [(owner, each, variables) for each in _functions(base) if each.name not in known]
        self._runtime_imports.add(f"from lmbridge.sync._wrap import {spec.kind}")
        generic = ""
        for parent in node.bases:
            if ast.unparse(parent).startswith("Generic["):
                generic = f", {ast.unparse(parent)}"
                names = [part.id for part in ast.walk(parent) if isinstance(part, ast.Name)]
                self._runtime_imports |= {line for line in map(module.import_line, names) if line}
        lines = [f"class {spec.name}({spec.kind}{item}{generic}):"]
        if docstring := ast.get_docstring(node):
            lines.append(_indented(_blocking_docstring(docstring)))
        lines.append(f'    wraps = "{spec.module}:{spec.name}"')
        lines += [self._method(owner, each, variables, spec) for owner, each, variables in functions]
        return "\n\n".join(lines)

    def _method(self, owner: Module, node: Function, variables: dict[str, ast.expr], spec: ClassSpec) -> str:
        decorators = [ast.unparse(each) for each in node.decorator_list]
        is_manager = "asynccontextmanager" in decorators
        kept = [each for each in decorators if each in KEPT_DECORATORS or each.endswith(".setter")]
        arguments = ast.unparse(self._arguments(node.args, owner, variables))
        returns = "None" if node.returns is None else self._annotation(node.returns, owner, variables)
        if is_manager:
            returns = f"AbstractContextManager[{returns.removeprefix('Iterator[')}"
            self._typing_imports.add("from contextlib import AbstractContextManager")
        head = "".join(f"@{each}\n" for each in kept) + f"def {node.name}({arguments}) -> {returns}:"
        if "overload" in kept:
            return _indented(f"{head} ...")
        body = ""
        if docstring := ast.get_docstring(node):
            body += f"{_blocking_docstring(docstring)}\n"
        return _indented(
            f"{head}\n{_indented(body + self._method_body(node, returns, kept, spec, is_manager=is_manager))}"
        )

    def _method_body(self, node: Function, returns: str, kept: list[str], spec: ClassSpec, *, is_manager: bool) -> str:
        call = f"({', '.join(_call_arguments(node.args))})"
        if "unwrap(" in call:
            self._runtime_imports.add("from lmbridge.sync._wrap import unwrap")
        if node.name == "__init__":
            self._runtime_imports.add(f"import {spec.module} as {_alias(spec)}")
            return f"self._set_wrapped({_alias(spec)}.{spec.name}{call})"
        target = f"self.wrapped.{node.name}"
        waiting = "self._await"
        if "classmethod" in kept:
            self._runtime_imports.add(f"import {spec.module} as {_alias(spec)}")
            target, waiting = f"{_alias(spec)}.{spec.name}.{node.name}", "cls._await"
        if any(each.endswith(".setter") for each in kept):
            return f'self._call(lambda: setattr(self.wrapped, "{node.name}", {node.args.args[1].arg}))'
        if is_manager:
            self._runtime_imports.add("from lmbridge.sync._wrap import entered")
            return f"return entered(lambda: {target}{call})"
        if "property" in kept:
            expression = f"self._call(lambda: {target})"
        elif isinstance(node, ast.AsyncFunctionDef):
            expression = f"{waiting}(lambda: {target}{call})"
        else:
            expression = f"self._call(lambda: {target}{call})"
        expression = re.sub(r"lambda: ([\w.]+)\(\)\)$", r"\1)", expression)
        if returns == "None":
            return expression
        return f"result: {returns} = {expression}\nreturn result"

    def _arguments(self, arguments: ast.arguments, owner: Module, variables: dict[str, ast.expr]) -> ast.arguments:
        for each in _all_arguments(arguments):
            if each.annotation is not None:
                each.annotation = ast.parse(self._annotation(each.annotation, owner, variables), mode="eval").body
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            for name in (part.id for part in ast.walk(default) if isinstance(part, ast.Name)):
                if line := owner.import_line(name):
                    self._runtime_imports.add(line)
        return arguments

    def _annotation(self, node: ast.expr, owner: Module, variables: dict[str, ast.expr]) -> str:
        copied = ast.parse(ast.unparse(node), mode="eval").body
        translated = AnnotationTranslator(variables).visit(copied)
        for name in (part.id for part in ast.walk(translated) if isinstance(part, ast.Name)):
            self._import(name, owner)
        return ast.unparse(translated)

    def _import(self, name: str, owner: Module) -> None:
        if name in FILE_OF_CLASS:
            if FILE_OF_CLASS[name] != self._file:
                self._typing_imports.add(f"from lmbridge.sync.{FILE_OF_CLASS[name]} import {name}")
        elif name == "AbstractContextManager":
            self._typing_imports.add("from contextlib import AbstractContextManager")
        elif name == "Iterator":
            self._typing_imports.add("from collections.abc import Iterator")
        elif name != "Any" and (line := self._import_line(name, owner)):
            self._typing_imports.add(line)

    def _import_line(self, name: str, owner: Module) -> str | None:
        # A type variable of a base class may stand for a type that only the module of the derived class knows.
        return owner.import_line(name) or self._spec_module.import_line(name)


def _alias(spec: ClassSpec) -> str:
    """Returns the name under which a generated file imports the module of an asynchronous class."""
    return f"_{spec.module.rpartition('.')[2]}"


def _class_with_bases(
    module: Module, node: ast.ClassDef, variables: dict[str, ast.expr] | None = None
) -> Iterator[tuple[Module, ast.ClassDef, dict[str, ast.expr]]]:
    """Yields a class and its bases within lmbridge, each with the types that its type variables stand for."""
    yield module, node, variables or {}
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(name, ast.Name):
            continue
        home = module if name.id in module.classes else None
        if home is None and module.imports.get(name.id, ("", ""))[0].startswith("lmbridge."):
            home = Module.named(module.imports[name.id][0])
        if home is None or name.id not in home.classes:
            continue
        parent = home.classes[name.id]
        given = _arguments_of(base)
        known = variables or {}
        given = [known.get(ast.unparse(each), each) for each in given]
        yield from _class_with_bases(home, parent, dict(zip(_type_variables(parent), given, strict=False)))


def _arguments_of(base: ast.expr) -> list[ast.expr]:
    """Returns the types in the brackets of a base class."""
    if not isinstance(base, ast.Subscript):
        return []
    return base.slice.elts if isinstance(base.slice, ast.Tuple) else [base.slice]


def _type_variables(node: ast.ClassDef) -> list[str]:
    """Returns the type variables of a class, in order: those of `Generic[...]`, else those of its bases."""
    subscripts = [base for base in node.bases if isinstance(base, ast.Subscript)]
    subscripts.sort(key=lambda base: ast.unparse(base.value) != "Generic")
    names = [part.id for base in subscripts for part in ast.walk(base.slice) if isinstance(part, ast.Name)]
    return [name for name in dict.fromkeys(names) if name.startswith("_")]


def _item_type(node: ast.ClassDef, variables: dict[str, ast.expr]) -> ast.expr | None:
    """Returns the type of the items of an asynchronous stream: the first argument of its base `AsyncGenerator[...]`."""
    for base in node.bases:
        if isinstance(base, ast.Subscript) and ast.unparse(base.value) == "AsyncGenerator":
            item = _arguments_of(base)[0]
            return variables.get(ast.unparse(item), item)
    return None


def _functions(node: ast.ClassDef) -> list[Function]:
    return [
        each
        for each in node.body
        if isinstance(each, Function)
        and each.name not in OMITTED_METHODS
        and (not each.name.startswith("_") or (each.name == "__init__" and node.name in PUBLIC_CONSTRUCTORS))
    ]


PUBLIC_CONSTRUCTORS: Final = {"LLMClient", "LLMClientPool", "Agent", "DynamicAutonomousAgent", "Journal"}


def _all_arguments(arguments: ast.arguments) -> Iterable[ast.arg]:
    yield from [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    yield from filter(None, [arguments.vararg, arguments.kwarg])


def _call_arguments(arguments: ast.arguments) -> list[str]:
    """Returns the arguments of the call to the asynchronous method. Blocking objects among them are unwrapped."""
    taken = [_argument_expression(each) for each in [*arguments.posonlyargs, *arguments.args][1:]]
    taken += [f"{each.arg}={_argument_expression(each)}" for each in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        taken.append(f"**{arguments.kwarg.arg}")
    return taken


def _argument_expression(argument: ast.arg) -> str:
    names = set() if argument.annotation is None else set(re.findall(r"\w+", ast.unparse(argument.annotation)))
    return f"unwrap({argument.arg})" if names & ({*FILE_OF_CLASS, *BLOCKING_ALTERNATIVES}) else argument.arg


def _blocking_docstring(text: str) -> str:
    """Returns the docstring for a blocking class or function, made from that of the asynchronous one."""
    text = re.sub(r"\basync (with|for|def)\b", r"\1", text)
    text = re.sub(r"\bawait (?=[\w(])", "", text)
    return f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.rstrip("\n").split("\n"))


def _format_with_ruff(source: str) -> str:
    options = ["--quiet", "--stdin-filename", str(FOLDER / "_generated.py")]
    for command in (["check", "--fix", "--exit-zero"], ["format"]):
        done = subprocess.run(  # noqa: S603 - ruff, from this environment
            [Path(sys.executable).parent / "ruff", *command, *options, "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        )
        source = done.stdout
    return source


def main() -> int:
    """Writes the files, or checks that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for file in CLASSES_OF_FILE:
        source, path = _format_with_ruff(FileWriter(file).write()), FOLDER / f"{file}.py"
        if not path.exists() or path.read_text() != source:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(source)
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
