"""How much work a single step of the event loop does while an MCP server sends very much; see `tests.step_meter`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from lmbridge import MCPError, ToolError
from lmbridge.mcp import McpHub
from lmbridge.transport.interception import link_makers
from tests.step_meter import StepMeter, assert_work_stays_equal, divide_into_short_slices

short_slices = pytest.fixture(autouse=True)(divide_into_short_slices)

TOOL: Final = {"name": "read", "inputSchema": {"type": "object"}}
HANDSHAKE: Final = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "s", "version": "1"},
}


class InProcessLink:
    """A link to a server that answers each request with a result that was given, at once."""

    pid = last_stderr_at = None
    stderr_excerpt = stderr_tail = ""

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def start(self) -> None: ...

    async def end(self, *, patience: float | None = None) -> None:
        self._messages.put_nowait(None)

    async def receive(self) -> dict[str, Any] | None:
        return await self._messages.get()

    async def send(self, message: bytes) -> None:
        request = msgspec.json.decode(message)
        if "id" in request:
            result = self._results[request["method"]]
            self._messages.put_nowait({"jsonrpc": "2.0", "id": request["id"], "result": result})


def largest_step(results: Callable[[int], dict[str, Any]], path: Path, size: int, *, lists: bool = False) -> int:
    """Returns the number of lines in the largest step while a server lists its tools, or while a tool is called."""

    async def measure() -> int:
        link_makers.append(lambda *_: InProcessLink(answers))
        meter, hub = StepMeter(), McpHub(path)
        try:
            tool = None if lists else (await hub.tools()).tools[0]
            with meter.measuring():
                # This step has begun before the meter. The next one is the first that it counts.
                await asyncio.sleep(0)
                with suppress(ToolError, MCPError):
                    result = await (hub.tools() if tool is None else tool.function())
                    # An agent reads the images, too.
                    getattr(result, "image_parts", None)
                await asyncio.sleep(0)
        finally:
            link_makers.pop()
            await hub.close()
        return meter.most_lines

    path.write_text(json.dumps({"mcpServers": {"s": {"command": "unused"}}}))
    answers = {"initialize": HANDSHAKE, "tools/list": {"tools": [TOOL]}, **results(size)}
    return asyncio.run(measure())


def call(**result: Any) -> dict[str, Any]:
    return {"tools/call": result}


PICTURE: Final = {"type": "image", "data": "AA==", "mimeType": "image/png"}
NO_TEXT: Final = {"type": "text", "text": 1}


@pytest.mark.parametrize(
    "results",
    [
        lambda size: call(content=[{"type": "text", "text": "a"}] * size),
        lambda size: call(content=[{"type": "text", "text": "a"}] * size, isError=True),
        lambda size: call(content=[{"type": "text", "text": ""}] * size, structuredContent={"a": 1}),
        lambda size: call(content=[1] * size),
        lambda size: call(content=[None] * size),
        lambda size: call(content=[NO_TEXT] * size),
        lambda size: call(content=[{}] * size),
        lambda size: call(content=[PICTURE] * size),
        lambda size: call(**{str(number): number for number in range(size)}),
        lambda size: {"tools/call": [{"type": "text", "text": "a"}] * size},
    ],
    ids=[
        "texts", "error", "empty texts", "numbers", "nulls", "numbers as texts", "no types", "images", "fields", "list",
    ],
)  # fmt: skip
def test_the_steps_for_a_result_do_not_grow_with_its_blocks(
    results: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    assert_work_stays_equal(partial(largest_step, results, tmp_path / "mcp.json"), 2_000)


@pytest.mark.parametrize("as_object", [False, True])
def test_the_steps_for_a_list_with_too_many_tools_do_not_grow_with_it(as_object: bool, tmp_path: Path) -> None:
    def results(size: int) -> dict[str, Any]:
        tools = {f"t{number}": {"name": f"t{number}"} for number in range(size)}
        return {"tools/list": {"tools": tools if as_object else list(tools.values())}}

    assert_work_stays_equal(partial(largest_step, results, tmp_path / "mcp.json", lists=True), 6_000)
