"""Finds changes of the public API since the last release that break programs, and that the changelog does not mention.

    python scripts/api_changes.py          since the last release
    python scripts/api_changes.py v0.2.0   since a commit, a branch or a tag

The last release is the commit that changed lmbridge/_version.py last. A change is mentioned if the section Unreleased
of CHANGELOG.md has the name of what it changes, such as `Limits.max_wait`. It needs the history of git, and griffe.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent
MODULES = (
    "fleet",
    "gateway",
    "interop.langchain",
    "interop.openai",
    "interop.openai_agents",
    "interop.pydantic_ai",
    "mcp",
    "observe",
    "sync",
    "testing",
    "types",
)


def last_release() -> str:
    """Returns the commit of the last release."""
    command = ["git", "log", "-1", "--format=%H", "--", "lmbridge/_version.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - a fixed command
    return done.stdout.strip()


def _has_module(package: griffe.Object | griffe.Alias, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return child in (package[parent] if parent in package.members else package).members


def public_names(package: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Yields the paths of the public names, without those of their members."""
    for module in (package, *(package[name] for name in MODULES if _has_module(package, name))):
        for name in module.exports or ():
            yield f"{module.path}.{name}"


def breaking_changes(old: griffe.Object | griffe.Alias, new: griffe.Object | griffe.Alias) -> Iterator[tuple[str, str]]:
    """Yields the name of each thing whose change breaks programs, and what has changed."""
    before, after = set(public_names(old)), set(public_names(new))
    for path in sorted(before - after):
        yield path.rpartition(".")[2], f"{path}: no longer exported"
    for path in sorted(before & after):
        inner = path.partition(".")[2]
        one, other = (package[inner] for package in (old, new))
        one, other = (each.final_target if isinstance(each, griffe.Alias) else each for each in (one, other))
        for change in griffe.find_breaking_changes(one, other):
            name = change.obj.path.removeprefix(f"{change.obj.module.path}.")
            if not any(part.startswith("_") and part != "__init__" for part in name.split(".")):
                yield name.removesuffix(".__init__"), change.explain(griffe.ExplanationStyle.ONE_LINE)


def main() -> None:
    """Prints the changes that are not mentioned, and fails if there are any."""
    unreleased = (ROOT / "CHANGELOG.md").read_text().partition("## [Unreleased]")[2].partition("\n## ")[0]
    release = sys.argv[1] if len(sys.argv) > 1 else last_release()
    old = griffe.load_git("lmbridge", ref=release, repo=ROOT, resolve_aliases=True, resolve_external=False)
    new = griffe.load("lmbridge", search_paths=[ROOT], resolve_aliases=True, resolve_external=False)
    changes = dict.fromkeys(breaking_changes(old, new))
    forgotten = [text for name, text in changes if not re.search(rf"\b{re.escape(name)}\b", unreleased)]
    print(f"public API since {release[:8]}: {len(changes)} breaking changes, {len(forgotten)} not in the changelog")
    if forgotten:
        print(*forgotten, "Mention each of them in CHANGELOG.md, under Unreleased.", sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
