"""An outside referee: LLMock breaks an API and judges its clients, of which lmbridge is one.

`nox -s referee` installs LLMock and the clients in the versions that the table of docs/reliability.md names, and
`make test-slow` runs it. If the table is no longer what LLMock says, the test prints the one that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pytest

from lmbridge import LLMClient, LLMError, Timeouts

llmock: Any = pytest.importorskip("llmock.testing", reason="nox -s referee installs llmock")
scenarios: Any = pytest.importorskip("llmock.scenarios")
handles: Any = pytest.importorskip("llmock.pytest_plugin")
openai: Any = pytest.importorskip("openai")
pydantic_ai: Any = pytest.importorskip("pydantic_ai", reason="nox -s referee installs pydantic-ai")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    # What uvicorn and the other libraries deprecate is not ours.
    pytest.mark.filterwarnings("default"),
]

PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
MODEL: Final = "gpt-4o-mini"
QUESTION: Final = "Say hello in at least ten words."
MESSAGES: Final = [{"role": "user", "content": QUESTION}]
IDLE: Final = 1.0
"""The seconds after which each client gives up a stream that sends nothing."""
PAUSE: Final = 0.3
"""The seconds after which the program asks again. LLMock must have seen by then that the client has left."""

Ask = Callable[[str, bool], Awaitable[str]]


async def ask_lmbridge(base_url: str, is_stream: bool) -> str:
    async with LLMClient(base_url, MODEL, api_key="key", timeout=Timeouts(idle=IDLE)) as client:
        if not is_stream:
            return await client.ask(QUESTION)
        async with client.stream_chat(MESSAGES) as stream:
            return "".join([text async for text in stream.text()])


@asynccontextmanager
async def openai_client(base_url: str, is_stream: bool) -> AsyncIterator[Any]:
    # Its only limit for the time between two chunks is that of a read, which for a plain reply is the whole wait.
    timeout = IDLE if is_stream else 60.0
    async with openai.AsyncOpenAI(base_url=base_url, api_key="key", timeout=timeout) as client:
        yield client


async def ask_openai(base_url: str, is_stream: bool) -> str:
    async with openai_client(base_url, is_stream) as client:
        create = client.chat.completions.create
        if not is_stream:
            return str((await create(model=MODEL, messages=MESSAGES)).choices[0].message.content)
        chunks = [chunk async for chunk in await create(model=MODEL, messages=MESSAGES, stream=True)]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def ask_pydantic_ai(base_url: str, is_stream: bool) -> str:
    models: Any = pytest.importorskip("pydantic_ai.models.openai")
    providers: Any = pytest.importorskip("pydantic_ai.providers.openai")
    async with openai_client(base_url, is_stream) as client:
        provider = providers.OpenAIProvider(openai_client=client)
        agent = pydantic_ai.Agent(models.OpenAIChatModel(MODEL, provider=provider))
        if not is_stream:
            return str((await agent.run(QUESTION)).output)
        async with agent.run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True, debounce_by=None)])


CLIENTS: Final[dict[str, tuple[Ask, type[Exception]]]] = {
    "lmbridge": (ask_lmbridge, LLMError),
    "openai": (ask_openai, openai.OpenAIError),
    "pydantic-ai": (ask_pydantic_ai, pydantic_ai.exceptions.AgentRunError),
}
"""How to ask each client, and the base class of its errors."""


def fail(status: int, **options: Any) -> Any:
    # Only the completions fail, and not what a client may ask about the server.
    return scenarios.Fail(status, match=scenarios.Match(path="/v1/chat/completions"), **options)


def break_stream(kind: str, **options: Any) -> Any:
    return scenarios.StreamFault(kind, after_chunks=3, **options)


FAULTS: Final[dict[str, tuple[bool, Any]]] = {
    "429 twice, `Retry-After: 1`": (False, fail(429, retry_after=1, times=2)),
    "500 once": (False, fail(500)),
    "503 once, with `Retry-After`": (False, fail(503)),
    "500 always": (False, fail(500, times=None)),
    "400 always": (False, fail(400, times=None)),
    "401 always": (False, fail(401, times=None)),
    "404 always": (False, fail(404, times=None)),
    "422 always": (False, fail(422, times=None)),
    "stream: 429 twice before it": (True, fail(429, retry_after=1, times=2)),
    "stream: connection dropped": (True, break_stream("disconnect")),
    "stream: ends without a finish reason": (True, break_stream("truncate")),
    "stream: a chunk that is not JSON": (True, break_stream("malformed")),
    "stream: nothing for 3 s": (True, break_stream("stall", stall_seconds=3)),
}
"""What LLMock does, and whether the request is for a stream."""

# LLMock takes two waits for a constant interval if the second one is hardly longer than the first. With full jitter,
# this happens in a quarter of all cases, and the intervals are anything but constant.
NOT_COUNTED: Final = {("lmbridge", "no_backoff")}


@pytest.fixture(scope="module")
def referee() -> Iterator[Any]:
    with llmock.LLMockServer() as server:
        yield handles.LLMock(server)


async def ask_as_a_program_does(ask: Ask, own_error: type[Exception], base_url: str, is_stream: bool) -> list[str]:
    """Asks, and asks once more if a stream has failed, because only the program can do that. Returns what it saw."""
    seen: list[str] = []
    for attempt in range(2 if is_stream else 1):
        await asyncio.sleep(PAUSE * attempt)
        try:
            assert await ask(base_url, is_stream)
        except own_error as error:
            seen.append(f"`{type(error).__name__}`")
        except Exception as error:  # noqa: BLE001 - the test is about which exceptions there are
            # A program that handles the errors of its library does not expect this one.
            return [*seen, f"raw `{type(error).__name__}`"]
        else:
            return [*seen, "answer"]
    return seen


async def judge(referee: Any, name: str, fault: str) -> tuple[str, Any]:
    """Returns what the program saw, and LLMock's verdict."""
    is_stream, behaviour = FAULTS[fault]
    # The chunks are some time apart, so the server sees when a client leaves.
    referee.reset().pace(20).add(behaviour)
    seen = await ask_as_a_program_does(*CLIENTS[name], referee.base_url("openai"), is_stream)
    return ", ".join(seen), referee.verdict()


@pytest.mark.parametrize("fault", FAULTS)
async def test_lmbridge_is_resilient(referee: Any, fault: str) -> None:
    _, verdict = await judge(referee, "lmbridge", fault)
    referee.assert_resilient()
    warnings = [finding.code for finding in verdict.warnings if ("lmbridge", finding.code) not in NOT_COUNTED]
    assert warnings == [], verdict.render()


async def test_the_table_is_what_the_referee_says(referee: Any) -> None:
    columns = [
        f"LLMock {version('llmock')}",
        "lmbridge",
        f"openai {version('openai')}",
        f"pydantic-ai {version('pydantic-ai-slim')}",
    ]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |"]
    for fault in FAULTS:
        cells = [fault]
        for name in CLIENTS:
            seen, verdict = await judge(referee, name, fault)
            codes = [
                f"**{'FAIL' if finding.severity == 'error' else 'WARN'}** `{finding.code}`"
                for finding in verdict.findings
                if (name, finding.code) not in NOT_COUNTED
            ]
            cells.append("; ".join([seen, *(codes or ["pass"])]))
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(), f"the table is now:\n\n{table}"
