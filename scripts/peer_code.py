"""Writes the code for other libraries in docs/from-*.md to a folder, as programs that a type checker can read.

    python scripts/peer_code.py FOLDER

The blocks of a page are one program, because they continue each other. `nox -s migrations` checks all of them.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
# The pages write messages as plain dicts and keys as strings. The libraries accept that, but their types do not.
_RULES = "# pyright: reportArgumentType=false, reportCallIssue=false"


def main(folder: Path) -> None:
    """Writes a file for each page."""
    for page in sorted(DOCS.glob("from-*.md")):
        blocks = re.findall(r"^<!-- peer -->\n```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        code = textwrap.indent("\n".join(blocks), "    ")
        name = page.stem.removeprefix("from-").replace("-", "_")
        (folder / f"coming_from_{name}.py").write_text(f"{_RULES}\n\nasync def main() -> None:\n{code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
