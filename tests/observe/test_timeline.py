"""The timeline: what is on the page, and that nothing on it can do harm."""

from __future__ import annotations

import asyncio
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest

from lmbridge import Agent, Limits, LLMClient, LLMConnectionError, LLMValidationError, RunResult, ToolCall
from lmbridge.observe import Bar, Row, RunBegun, RunEnded, Timeline, TimelineObserver
from lmbridge.testing import FakeChatClient, ScriptedServer, answer, reply, retry_without_waiting, sse, stall
from tests.gateway.chromium import CHROMIUM, browser_page
from tests.support import MESSAGES, opened, piece

NASTY = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>"\'$title'


class Reader(HTMLParser):
    """Reads the bars of a page, and the names of its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.bars: list[dict[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "button":
            self.bars.append(dict(attrs))

    @property
    def kinds(self) -> list[str]:
        return [bar["class"] for bar in self.bars]


def bar(start: float, end: float, **fields: Any) -> Bar:
    values: dict[str, Any] = {"kind": "tool", "start": start, "end": end, "label": "call"} | fields
    return Bar(**values)


def many_rows(count: int) -> Timeline:
    """Returns the timeline of many runs that overlap."""
    chance = random.Random(1)
    rows = []
    for number in range(count):
        begin = chance.random() * 60
        lengths = [chance.random() * 5 for _ in range(6)]
        edges = [begin + sum(lengths[:place]) for place in range(7)]
        kinds: list[Any] = ["queue", "prompt", "tokens", "tool", "prompt", "tokens"]
        bars = [bar(*edges[place : place + 2], kind=kind, label=kind) for place, kind in enumerate(kinds)]
        rows.append(Row(label=f"run: task {number}", bars=bars, has_failed=number % 100 == 7))
    return Timeline(title=f"{count} runs", rows=rows)


async def run_with_a_call() -> RunResult:
    async def slow(text: str) -> str:
        await asyncio.sleep(0.001)
        return text

    client = FakeChatClient([ToolCall("1", "slow", {"text": NASTY}), NASTY])
    return await Agent(client, tools=[slow]).run("?")


async def test_a_result_shows_its_rounds_and_calls_and_escapes_them(tmp_path: Path) -> None:
    result = await run_with_a_call()
    result.timeline(tmp_path / "run.html")
    page = Reader((tmp_path / "run.html").read_text())
    assert page.kinds == ["reply", "tool", "reply"]
    assert NASTY in page.bars[1]["data-text"]
    assert (page.tags.count("script"), page.tags.count("img")) == (1, 0)


async def test_a_call_from_before_an_interruption_is_shown_after_its_reply() -> None:
    result = await run_with_a_call()
    first, last = result.log
    (record,) = first.tool_calls
    replayed = attrs.evolve(first, started=60.0, reply_seconds=1.0, tool_calls=(attrs.evolve(record, started=0.0),))
    (row,) = attrs.evolve(result, log=(replayed, last)).timeline().rows
    assert [(each.kind, each.start) for each in row.bars[:2]] == [("reply", 60.0), ("tool", 61.0)]


async def test_a_notebook_shows_a_result_in_a_frame() -> None:
    page = Reader((await run_with_a_call())._repr_html_())
    assert page.tags == ["pre", "iframe"]


async def test_a_session_shows_waits_retries_swaps_calls_and_errors(scripted_server: ScriptedServer) -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    observer = TimelineObserver()
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    scripted_server.script(answer("", tool_calls=[call]), reply(503, {}), answer("It is 3."), reply(400, {}))
    options: Any = {"limits": Limits(max_loaded_models=1), "observers": [observer]}
    async with LLMClient(scripted_server.api_base, "m", **options) as client:
        with retry_without_waiting():
            await Agent(client, tools=[add], observers=[observer]).run("What is 1 + 2?")
        with pytest.raises(Exception, match="400"):
            await client.ask("?", model="other")
    rows = {row.label: row for row in observer.timeline().rows}
    run = rows["run: What is 1 + 2?"]
    kinds = [each.kind for each in run.bars if not each.label.startswith(("model", "server", "properties"))]
    assert [kind for kind in kinds if kind in {"tool", "retry"}] == ["tool", "retry"]
    assert {"round", "queue", "prompt", "tokens"} <= set(kinds)
    tool = next(each for each in run.bars if each.kind == "tool")
    assert (tool.label, tool.text) == ("add", 'add({"a": 1, "b": 2})\nresult: 3')
    assert any(each.text.endswith("It is 3.") for each in run.bars if each.kind == "tokens")
    failed = rows["chat completion other"]
    assert (run.has_failed, failed.has_failed) == (False, True)
    assert [each.kind for each in failed.bars] == ["queue", "prompt", "swap", "error"]
    assert all(each.start <= each.end for row in rows.values() for each in row.bars)


async def test_a_whole_reply_is_one_bar_and_a_stream_has_a_bar_for_its_tokens(scripted_server: ScriptedServer) -> None:
    observer = TimelineObserver()
    async with LLMClient(scripted_server.api_base, "m", observers=[observer]) as client:
        scripted_server.script(answer("Hello"), answer("Hello"))
        await client.ask("?")
        async with await client.chat_completion([{"role": "user", "content": "?"}], stream=True) as stream:
            assert [chunk async for chunk in stream]
    plain, streamed = observer.timeline().rows
    assert [each.kind for each in plain.bars] == ["queue", "reply"]
    assert [each.kind for each in streamed.bars] == ["queue", "prompt", "tokens"]
    assert plain.bars[-1].end > plain.bars[-1].start
    assert plain.bars[-1].text.startswith("answer, 1 attempt(s)")


async def test_the_bar_of_a_prompt_has_its_tokens(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "test-model", "owned_by": "llamacpp"}]}))
    scripted_server.on_path("/props", reply(200, {"total_slots": 1}))
    progress = [{**piece(), "prompt_progress": {"processed": each, "total": 721, "cache": 9}} for each in (9, 721)]
    scripted_server.script(sse(*progress, piece("Hello."), piece(finish_reason="stop"), done=True))
    observer = TimelineObserver()
    async with LLMClient(scripted_server.api_base, "test-model", observers=[observer]) as client:
        await Agent(client, observers=[observer]).run("Hi.")
    [row] = observer.timeline().rows
    bars = [bar for bar in row.bars if bar.label == "chat completion test-model"]
    assert [bar.kind for bar in bars] == ["queue", "prompt", "tokens"]
    assert bars[1].text == "721 of 721 tokens, 9 of them from the cache"
    assert "cache" not in bars[2].text


async def test_a_failed_run_is_marked() -> None:
    observer = TimelineObserver()
    with pytest.raises(LLMConnectionError):
        await Agent(FakeChatClient([LLMConnectionError("down")]), observers=[observer]).run("?")
    (row,) = observer.timeline().rows
    assert (row.has_failed, [each.label for each in row.bars]) == (True, ["round 1", "LLMConnectionError"])
    assert row.bars[0].text == "not completed"


async def test_an_observer_of_the_agent_alone_shows_the_rounds_and_calls_of_all_runs() -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    observer = TimelineObserver()
    await Agent(FakeChatClient(["Hello."]), observers=[observer]).run("Say hello.")
    client = FakeChatClient([ToolCall("1", "add", {"a": 1, "b": 2}), "It is 3."])
    await Agent(client, tools=[add], observers=[observer]).run("1 + 2?")
    plain, with_call = observer.timeline().rows
    assert [(each.kind, each.label, each.text) for each in plain.bars] == [("round", "round 1", "Hello.")]
    assert [each.label for each in with_call.bars] == ["add", "round 1", "round 2"]
    tool, first, second = with_call.bars
    assert first.start <= tool.start <= tool.end <= first.end <= second.start < second.end
    page = observer.timeline().html()
    assert "run: Say hello." in page
    # A round is above what happens in it.
    tops = [re.search(r"top:(\d+)px", each["style"]) for each in Reader(page).bars]
    assert [top[1] if top else None for top in tops] == ["0", "18", "0", "0"]


async def test_a_swap_lasts_until_the_reply_begins(scripted_server: ScriptedServer) -> None:
    observer = TimelineObserver()
    limits = Limits(max_loaded_models=1)
    async with LLMClient(scripted_server.api_base, limits=limits, observers=[observer]) as client:
        await client.ask("?", model="a")
        scripted_server.script(stall(after=[piece("Hel")]))
        async with await client.chat_completion(MESSAGES, model="b", stream=True) as stream:
            await anext(stream)
            row = next(each for each in observer.timeline().rows if each.label == "chat completion b")
            swap = next(each for each in row.bars if each.kind == "swap")
            prompt = next(each for each in row.bars if each.kind == "prompt")
    assert (swap.label, swap.end) == ("a -> b", prompt.end)
    assert prompt.end - prompt.start > 0
    assert swap.text.startswith("The server loads the model.")


async def test_a_swap_that_goes_on_is_shown_up_to_now(scripted_server: ScriptedServer) -> None:
    observer = TimelineObserver()
    limits = Limits(max_loaded_models=1)
    async with LLMClient(scripted_server.api_base, limits=limits, observers=[observer]) as client:
        await client.ask("?", model="a")
        scripted_server.script(stall())
        task = asyncio.ensure_future(client.ask("?", model="b"))
        await scripted_server.wait_until(lambda: b'"b"' in scripted_server.requests[-1].body)
        row = next(each for each in observer.timeline().rows if each.label == "chat completion b")
        assert [each.kind for each in row.bars] == ["queue", "prompt", "swap"]
        assert row.bars[1].end == row.bars[2].end
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    row = next(each for each in observer.timeline().rows if each.label == "chat completion b")
    assert [each.kind for each in row.bars] == ["queue", "prompt", "swap"]


async def test_what_a_server_does_not_have_is_no_error(scripted_server: ScriptedServer) -> None:
    observer = TimelineObserver()
    async with LLMClient(scripted_server.api_base, "m", observers=[observer]) as client:
        await Agent(client, observers=[observer]).run("?")
        await client.server_info()
    rows = observer.timeline().rows
    assert len(rows) > 1
    assert not [row.label for row in rows if row.has_failed]
    assert "error" not in {each.kind for row in rows for each in row.bars}
    assert any(each.text.startswith("status 404: the server does not have it") for each in rows[-1].bars)


async def test_what_has_not_ended_is_shown_up_to_now(scripted_server: ScriptedServer) -> None:
    observer = TimelineObserver()
    async with LLMClient(scripted_server.api_base, "m", observers=[observer]) as client, await opened(client):
        (row,) = observer.timeline().rows
        assert row.bars[-1].text == "not ended yet"
    (row,) = observer.timeline().rows
    assert "cancelled" in row.bars[-1].text


async def test_a_round_that_has_not_ended_is_shown_up_to_now() -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    observer = TimelineObserver()
    client = FakeChatClient([ToolCall("1", "wait", {})])
    handle = Agent(client, tools=[wait], observers=[observer]).start("?")
    await begun.wait()
    (row,) = observer.timeline().rows
    assert [(each.label, each.text) for each in row.bars] == [("round 1", "not ended yet")]
    await handle.aclose()
    (row,) = observer.timeline().rows
    assert [(each.label, each.text) for each in row.bars if each.kind == "round"] == [("round 1", "not completed")]


async def test_only_so_many_rows_are_kept() -> None:
    observer = TimelineObserver(max_rows=3)
    for number in range(5):
        await Agent(FakeChatClient(["Hello"]), observers=[observer]).run(f"Task {number}")
    assert [row.label for row in observer.timeline().rows] == ["run: Task 2", "run: Task 3", "run: Task 4"]
    with pytest.raises(LLMValidationError):
        TimelineObserver(max_rows=0)


def test_rows_that_end_later_are_dropped_as_well() -> None:
    observer = TimelineObserver(max_rows=2)
    for number in range(6):
        observer.on_event(run_begun(number))
    assert len(observer.timeline().rows) == 6
    for number in range(6):
        observer.on_event(run_ended(number))
    assert [row.label for row in observer.timeline().rows] == ["run: 4", "run: 5"]
    for number in range(6, 9):
        observer.on_event(run_begun(number))
    assert [row.label for row in observer.timeline().rows] == ["run: 6", "run: 7", "run: 8"]


def run_begun(number: int) -> RunBegun:
    return RunBegun(at=0.0, run_id=f"run {number}", parent_run_id=None, model=None, task=str(number))


def run_ended(number: int) -> RunEnded:
    numbers = {"rounds": 1, "prompt_tokens": 1, "completion_tokens": 1}
    return RunEnded(at=1.0, run_id=f"run {number}", stop_reason="answer", error=None, model=None, **numbers)


def test_bars_that_overlap_are_on_different_lines() -> None:
    rows = [Row(label="row", bars=[bar(0, 2), bar(1, 3), bar(2, 4), bar(2, 2)])]
    page = Reader(Timeline(title="t", rows=rows).html())
    tops = [re.search(r"top:(\d+)px", each["style"]) for each in page.bars]
    assert [int(top[1]) if top else -1 for top in tops] == [0, 18, 0, 36]


def test_of_a_thousand_rows_the_failed_and_the_longest_are_shown_with_totals() -> None:
    page = many_rows(1000).html()
    assert page.count('<div class="row failed">') == 10
    assert page.count("task ") == 2 * 60
    assert "1000 rows, 10 of them failed; 60 rows are shown" in page
    assert page.count("<polygon") == 3
    assert len(page) < 500_000


@pytest.mark.parametrize("rows", [[], [Row(label="empty", bars=[])], [Row(label="moment", bars=[bar(5, 5)])]])
def test_a_page_without_any_time_can_be_made(rows: list[Row]) -> None:
    assert "</html>" in Timeline(title="t", rows=rows).html()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
async def test_a_browser_shows_the_page_and_runs_nothing_that_is_in_a_text(tmp_path: Path) -> None:
    rows = [*many_rows(1000).rows, Row(label=NASTY, bars=[bar(10, 40, text=NASTY, label=NASTY)], has_failed=True)]
    path = Timeline(title=NASTY, rows=rows).write(tmp_path / "many.html")
    result_path = tmp_path / "result.html"
    (await run_with_a_call()).timeline(result_path)
    async with browser_page(tmp_path / "browser") as page:
        await page.resize(1200, 900)
        await page.open(path.as_uri())
        await page.wait_for("document.readyState == 'complete' && document.querySelectorAll('.row').length > 60")
        assert await page.evaluate("document.title") == NASTY
        place = await page.evaluate(
            "[...document.querySelectorAll('button')].findIndex(each => each.title.includes('onerror'))"
        )
        await page.evaluate(f"document.querySelectorAll('button')[{place}].click()")
        assert NASTY in await page.text("#text")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await page.screenshot(tmp_path / "many.png")
        await page.open(result_path.as_uri())
        await page.wait_for("document.querySelectorAll('button').length == 3")
        await page.screenshot(tmp_path / "result.png")
        assert page.errors == []
        assert [url for url in page.urls if not url.startswith("file:")] == []


def test_a_long_text_is_cut() -> None:
    page = Timeline(title="t", rows=[Row(label="r", bars=[bar(0, 1, text="x" * 10_000)])]).html()
    assert "[10000 characters in all]" in page
    assert len(page) < 20_000
