"""lmbridge in a notebook: cells that await, cells that are run again, and nothing that is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.threaded_server import ThreadedServer

ASK = """\
from lmbridge import LLMClient
client = LLMClient({api_base!r})
reply = await client.chat_completion([{{"role": "user", "content": "Say hello."}}])
print(reply["choices"][0]["message"]["content"])"""
STREAM = """\
async with await client.chat_completion([{"role": "user", "content": "Say hello."}], stream=True) as stream:
    async for chunk in stream:
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="")"""
BLOCKING = """\
from lmbridge.sync import LLMClient as BlockingClient
print(BlockingClient({api_base!r}).chat_completion([{{"role": "user", "content": "Say hello."}}])["model"])"""


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    with ThreadedServer() as server:
        yield server


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Proactor")  # of nbclient and its libraries
def test_cells_await_stream_and_can_be_run_again(server: ThreadedServer) -> None:
    ask = ASK.format(api_base=server.api_base)
    sources = [ask, ask, STREAM, BLOCKING.format(api_base=server.api_base)]
    cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []} for source in sources]
    notebook: Any = nbformat.from_dict(  # type: ignore[no-untyped-call]  # nbformat is typed in part
        {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    )
    NotebookClient(notebook, timeout=50, kernel_name="python3").execute()
    outputs = [[output.get("text", output) for output in cell.outputs] for cell in notebook.cells]
    greeting = "Hello from the scripted server."
    assert outputs[:2] == [[f"{greeting}\n"]] * 2
    assert "".join(outputs[2]) == greeting
    assert outputs[3] == ["None\n"] or outputs[3] == ["test-model\n"]
