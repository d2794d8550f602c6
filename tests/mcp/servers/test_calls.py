"""Calls of tools: their results, their errors, and what happens when a call is cancelled or times out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmbridge import ToolError
from lmbridge.mcp import (
    McpText,
)
from tests.mcp.conftest import MakeHub
from tests.mcp.servers.test_results import PNG
from tests.mcp.support import function_of, wait_for_notes


async def test_a_text_result_reaches_the_model_verbatim(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools(["a"])
    result = await function_of(lease, "echo")(text=" verbatim\n")
    assert result == " verbatim\n"
    assert isinstance(result, McpText)
    assert result.result["content"] == [{"type": "text", "text": " verbatim\n"}]


async def test_the_text_parts_of_a_result_are_joined_by_newlines(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    assert await function_of(lease, "parts")() == "one\ntwo"


async def test_a_tool_that_fails_raises_the_text_of_the_server_and_keeps_the_result(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    with pytest.raises(ToolError, match=r"^no such file: a.txt$") as caught:
        await function_of(lease, "fails")()
    assert caught.value.context["result"]["isError"] is True


async def test_the_images_of_a_failure_are_kept_for_the_model(make_hub: MakeHub) -> None:
    picture = {"type": "image", "data": PNG, "mimeType": "image/png"}
    lease = await make_hub({"a": {"failure_parts": [picture]}}).tools()
    with pytest.raises(ToolError, match=r"^no such file: a.txt\n\[image image/png") as caught:
        await function_of(lease, "fails")()
    assert [part["image_url"]["url"] for part in caught.value.images] == [f"data:image/png;base64,{PNG}"]


async def test_a_protocol_error_is_a_tool_error_and_the_session_stays_open(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="-32602: bad arguments"):
        await function_of(lease, "refuses")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_a_result_that_is_nested_deeply_reaches_the_model(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"deep_at": ["count"]}}).tools()
    assert (await function_of(lease, "count")()).count('{"a":') == 300
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_arguments_that_cannot_be_sent_are_a_tool_error_and_the_session_stays_open(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="the arguments cannot be sent"):
        await function_of(lease, "echo")(text="half \ud83d of an emoji")
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_the_server_is_notified_of_a_cancelled_call(make_hub: MakeHub, notes: Path) -> None:
    lease = await make_hub({"a": {"notes": str(notes), "noted": ["sleep"]}}).tools()
    call = asyncio.create_task(function_of(lease, "sleep")())
    await wait_for_notes(notes)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert (await wait_for_notes(notes, 2))[1].startswith("cancelled ")
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_a_call_that_times_out_is_a_tool_error_and_the_server_is_notified(make_hub: MakeHub, notes: Path) -> None:
    lease = await make_hub({"a": {"notes": str(notes)}}).tools(call_timeout=0.1)
    with pytest.raises(ToolError, match=r"did not answer within 0.1 seconds; the call was cancelled"):
        await function_of(lease, "sleep")()
    assert (await wait_for_notes(notes))[0].startswith("cancelled ")


async def test_progress_extends_the_limit_of_a_call(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"tools": ["work"], "reports": 9, "pause": 0.2}}).tools(call_timeout=1.5)
    assert await function_of(lease, "work")() == "worked"


async def test_a_call_that_stops_reporting_progress_times_out(make_hub: MakeHub, notes: Path) -> None:
    options = {"tools": ["work"], "reports": 2, "pause": 0.01, "hangs": True, "notes": str(notes)}
    lease = await make_hub({"a": options}).tools(call_timeout=1.5)
    with pytest.raises(ToolError, match=r"'a' reported no progress for 1.5 seconds; the call was cancelled"):
        await function_of(lease, "work")()
    assert (await wait_for_notes(notes))[0].startswith("cancelled ")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"callTimeout": 0.2}, "did not answer within 2 seconds, although it reported progress"),
        ({"callTimeout": 5, "maxCallTimeout": 0.2}, "did not answer within 0.2 seconds, although it reported"),
        ({"toolTimeouts": {"wo*": 0.2}}, "did not answer within 2 seconds, although it reported progress"),
    ],
)
async def test_progress_cannot_extend_a_call_for_ever(
    make_hub: MakeHub, limits: Mapping[str, Any], reason: str
) -> None:
    lease = await make_hub({"a": {"tools": ["work"], "reports": -1, "pause": 0.001, "lmbridge": limits}}).tools()
    with pytest.raises(ToolError, match=reason):
        await function_of(lease, "work")()


async def test_a_tool_can_have_its_own_limit(make_hub: MakeHub) -> None:
    limits = {"callTimeout": 60, "toolTimeouts": {"sle*": 0.05}}
    lease = await make_hub({"a": {"lmbridge": limits}}).tools(call_timeout=70)
    with pytest.raises(ToolError, match=r"did not answer within 0.05 seconds"):
        await function_of(lease, "sleep")()
    assert await function_of(lease, "echo")(text="on") == "on"
