"""Helpers that the tests of configuration files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmbridge.mcp import McpConfig, load_config


def load(tmp_path: Path, document: Any) -> McpConfig:
    """Writes a document, or its text, to a file and loads the file."""
    path = tmp_path / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_config(path)
