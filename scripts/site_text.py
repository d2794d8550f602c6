"""Adds the pages as Markdown, llms.txt and llms-full.txt to a built site, for programs that read it.

MkDocs calls `on_post_build` as a hook. Zensical has no hooks, so its session runs `python scripts/site_text.py FOLDER`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_MARK = re.compile(r"^<!-- .* -->\n", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(?:.*\n)+?---\n+")
_TITLE = re.compile(r"\A# (.+)\n+")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_SENTENCE = re.compile(r"(?<=[.:])\s")


class Page(NamedTuple):
    """A page of the documentation, and the section of the navigation that lists it."""

    section: str
    title: str
    path: str
    text: str

    @property
    def is_generated(self) -> bool:
        """Whether its text comes from docstrings, so that only the site has it."""
        return "\n::: " in self.text

    @property
    def url(self) -> str:
        return self.path.removesuffix(".md") + "/" if self.is_generated else self.path

    @property
    def summary(self) -> str:
        """The first sentence of the page, without its links."""
        paragraph = _TITLE.sub("", self.text).partition("\n\n")[0].replace("\n", " ")
        sentence = _SENTENCE.split(_LINK.sub(r"\1", paragraph))[0].rstrip(":.")
        return "" if self.is_generated or sentence.startswith(("<", "!", "#", "|", "`")) else f": {sentence}."


def pages_of_navigation() -> Iterator[Page]:
    """Yields the pages in the order of the navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    section = ""
    for line in navigation.splitlines():
        if found := re.match(r"^  - ([^:]+):", line):
            section = found[1]
        if found := re.search(r"- (?:[^:]+: )?(\S+\.md)$", line):
            text = _FRONT_MATTER.sub("", _MARK.sub("", (DOCS / found[1]).read_text()))
            title = _TITLE.match(text)
            yield Page(section, title[1] if title else found[1], found[1], text)


def write_texts(site: Path) -> None:
    """Writes the Markdown of each page, the list of them, and all of them as one text."""
    index = ["# lmbridge", "> An async Python SDK for language models that run on your own machine."]
    whole = []
    section = None
    for page in pages_of_navigation():
        if page.section != section:
            index.append(f"\n## {page.section}\n")
            section = page.section
        index.append(f"- [{page.title}]({page.url}){page.summary}")
        if not page.is_generated:
            (site / page.path).parent.mkdir(parents=True, exist_ok=True)
            (site / page.path).write_text(page.text)
            whole.append(page.text)
    (site / "llms.txt").write_text("\n".join(index) + "\n")
    (site / "llms-full.txt").write_text("\n".join(whole))


def on_post_build(config: Mapping[str, Any]) -> None:
    """Writes the texts. MkDocs calls this function when it has built the site."""
    write_texts(Path(config["site_dir"]))


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
