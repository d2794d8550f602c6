"""Each example runs as a program, as a user would run it."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import nbformat
import pytest
import pytest_asyncio
from nbclient import NotebookClient
from yarl import URL

from lmbridge import LocalServer
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, sse
from tests.programs.test_web_frameworks import serving

EXAMPLES = Path(__file__).parent.parent / "examples"
FOX = "The quick brown fox jumps over the lazy dog."


class Outcome(NamedTuple):
    status: int
    pieces: list[str]
    """The parts of its output, as they arrived."""
    errors: str

    @property
    def output(self) -> str:
        return "".join(self.pieces)


async def run(example: str, *args: str, typed: str = "", **env: str) -> Outcome:
    """Runs an example with what a user types, and returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", str(EXAMPLES / example), *args),
        env=os.environ | env,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(typed.encode())
    process.stdin.close()
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    pieces = [piece.decode() async for piece in _read_pieces(process.stdout)]
    return Outcome(await process.wait(), pieces, (await errors).decode())


async def _read_pieces(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await stream.read(65536):
        yield piece


async def test_quickstart_streams_from_the_server_of_its_options(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    outcome = await run(
        "quickstart.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "What does the fox do?"
    )
    assert (outcome.status, outcome.errors) == (0, "")
    question, text, summary = outcome.output.split("\n\n")
    assert question == "> What does the fox do?"
    assert text == FOX
    assert summary.startswith("qwen3-4b: 9 tokens in ")
    (request,) = scripted_server.requests
    assert request.json["messages"] == [{"role": "user", "content": "What does the fox do?"}]


async def test_quickstart_prints_each_chunk_when_it_arrives(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer(FOX, gate=gate)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "quickstart.py"),
        "--api-base",
        scripted_server.api_base,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert (await process.stdout.readuntil(b"The")).endswith(b"\n\nThe")
    gate.set()
    assert (await process.stdout.read()).startswith(b" quick brown")
    assert await process.wait() == 0


async def test_quickstart_uses_the_server_of_the_environment(scripted_server: ScriptedServer) -> None:
    outcome = await run("quickstart.py", LMBRIDGE_API_BASE=scripted_server.api_base, LMBRIDGE_MODEL="gemma-3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "gemma-3-4b: " in outcome.output


ANSWERING = [
    "agent_events.py",
    "cancellation.py",
    "folder_agent.py",
    "long_run.py",
    "quickstart.py",
    "streaming.py",
    "structured_output.py",
    "tool_search.py",
    "tools.py",
]


# Examples that start MCP servers take seconds, for the same handling of errors.
STARTING_SERVERS = [pytest.param(each, marks=pytest.mark.slow) for each in ("mcp_one_server.py", "mcp_server.py")]


@pytest.mark.slow
@pytest.mark.parametrize("example", [*ANSWERING, "pool.py", "switching.py", *STARTING_SERVERS])
async def test_an_error_is_printed_as_one_line(example: str, scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(400, {"error": "no such thing"})
    outcome = await run(example, LMBRIDGE_API_BASE=scripted_server.api_base)
    assert outcome.status == 1
    assert outcome.errors.startswith(f"{example.removesuffix('.py')}: chat completion at {scripted_server.api_base}")
    assert len(outcome.errors.splitlines()) == 1


async def test_streaming_runs_all_its_sections(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(f"{FOX} " * 10)
    outcome = await run("streaming.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.count("\n== ") == 5
    assert len(scripted_server.requests) == 12
    assert scripted_server.max_in_flight <= 2


async def test_streaming_stops_endless_streams(scripted_server: ScriptedServer) -> None:
    endless = asyncio.Event()
    long = answer("", chunks=[f"{FOX} " * 5, FOX], gate=endless)
    scripted_server.script(long, answer(FOX, gate=endless), answer(FOX, gate=endless))
    outcome = await run("streaming.py", "--api-base", scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    assert "-- stopped after 3 characters" in outcome.output
    assert "the reply did not end within 1 s" in outcome.output
    assert "-- .partial has 3 characters" in outcome.output
    assert "-- left" in outcome.output
    assert scripted_server.aborts == scripted_server.requests[:3]


async def test_triage_sorts_a_folder_of_mails(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "parcel.eml").write_text("Subject: Parcel\n\nWhere is it?\n")
    (tmp_path / "picture.png").write_bytes(b"")
    answers = {
        "team": {"probabilities": {"billing": 0.1, "shipping": 0.8, "technical": 0.1}, "confidence": 0.7},
        "urgency": {"probabilities": {"0": 0.4, "1": 0.3, "2": 0.3}, "confidence": 0.1},
        "angry": {"noul": 0.25},
    }
    scripted_server.on_path("/v1/systemone", reply(200, {"model": "openjev", "answers": answers}))
    outcome = await run("triage_mails.py", str(tmp_path), "--api-base", scripted_server.api_base, "--model", "openjev")
    assert (outcome.status, outcome.errors) == (0, "")
    line, summary = outcome.output.splitlines()
    assert line.split() == ["parcel.eml", "shipping", "can", "wait", "angry", "25%", "<-", "please", "look"]
    assert summary == "mails: 1, sorted by a decision model"
    assert scripted_server.requests[0].json["state"] == "Parcel\n\nWhere is it?\n"


async def test_long_document_shows_the_progress_of_its_prompt(scripted_server: ScriptedServer) -> None:
    progress = {"processed": 465, "total": 721, "cache": 209, "time_ms": 5}
    start = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}], "prompt_progress": progress}
    end = {"choices": [{"index": 0, "delta": {"content": "Fair."}, "finish_reason": "stop"}]}
    scripted_server.script(sse(start, end, done=True))
    outcome = await run("long_document.py", "--api-base", scripted_server.api_base)
    assert (outcome.status, outcome.output) == (0, "Fair.\n")
    assert f"[{'#' * 15}{'.' * 15}] 465 of 721 tokens, 209 of them from the cache" in outcome.errors
    assert "the document has about" in outcome.errors
    assert scripted_server.requests[-1].json["return_progress"] is True


async def test_pool_asks_every_question_within_the_size_of_the_pool(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    outcome = await run(
        "pool.py", "--api-base", scripted_server.api_base, "--models", "qwen3-4b", "gemma-3-4b", "--size", "3"
    )
    assert (outcome.status, outcome.errors) == (0, "")
    lines = outcome.output.splitlines()
    assert len(lines) == 12
    assert all(line.endswith(f": {FOX}") for line in lines)
    assert lines[0].startswith("[3 of 3 in use, 9 waiting] ")
    models = Counter(request.json["model"] for request in scripted_server.requests)
    assert models == {"qwen3-4b": 6, "gemma-3-4b": 6}
    assert scripted_server.max_in_flight <= 3


async def test_several_servers_share_the_questions(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    async with ScriptedServer() as other:
        other.default = answer(FOX)
        urls = (scripted_server.api_base, other.api_base)
        outcome = await run("several_servers.py", *urls, "--model", "test-model")
        assert (outcome.status, outcome.errors) == (0, "")
        lines = outcome.output.splitlines()
        assert [line.partition(": ")[2] for line in lines[:8]] == [FOX] * 8
        assert lines[8:] == [f"{url}: available" for url in urls]
        asked = [sum(request.method == "POST" for request in each.requests) for each in (scripted_server, other)]
        assert asked == [4, 4]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(240)
async def test_several_servers_run_on_embedded_servers_one_of_which_is_stopped() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("several_servers.py")
    assert outcome.status == 0, outcome.errors
    lines = outcome.output.splitlines()
    assert sum(": " in line and not line.startswith("http") for line in lines) == 16
    assert [line.rpartition(": ")[2] for line in lines if line.startswith("http")] == ["available"] * 2 + [
        "failed",
        "available",
    ]


async def test_gateway_lets_an_urgent_question_pass_a_batch_job(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    outcome = await run("gateway.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    head, *lines = outcome.output.splitlines()
    assert re.fullmatch(r"status page: http://127\.0\.0\.1:\d+/status", head)
    assert len(lines) == 5
    assert all(line.endswith(f"? {FOX}") for line in lines)
    # At most one request was there before the question.
    assert [line.startswith("interactive") for line in lines].index(True) <= 1
    assert scripted_server.max_in_flight == 1


async def test_gateway_prints_an_error_as_one_line(scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(400, {"error": "no such thing"})
    outcome = await run("gateway.py", "--api-base", scripted_server.api_base)
    assert outcome.status == 1
    assert outcome.errors.startswith("gateway: chat completion at http://127.0.0.1:")
    assert len(outcome.errors.splitlines()) == 1


async def test_structured_output_prints_the_instance(scripted_server: ScriptedServer) -> None:
    trip = '{"passenger": "Ada", "city": "Oslo", "seats": %s}'
    wrong, right = (f'{{"transport": "train", "trips": [{trip % seats}]}}' for seats in ("0", "2"))
    scripted_server.script(answer(wrong), answer(right))
    outcome = await run("structured_output.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "Oslo!")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output == "> Oslo!\n\nby train\n- Ada to Oslo, seats: 2\n"
    assert len(scripted_server.requests) == 2


async def test_structured_output_prints_an_answer_that_is_still_wrong_after_a_correction(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.default = answer('{"transport": "ship"}')
    outcome = await run("structured_output.py", "--api-base", scripted_server.api_base)
    assert outcome.status == 1
    assert "the answer is not a valid Booking: $.transport: " in outcome.errors
    assert outcome.errors.endswith('\nthe answer was: {"transport": "ship"}\n')


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
async def test_structured_output_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("structured_output.py")
    assert outcome.status == 0, outcome.errors
    assert "\nby " in outcome.output
    assert "\n- " in outcome.output


def write_files(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


async def test_pydantic_extraction_prints_each_review_and_each_failure(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    review = '{"author": "%s", "stars": %s, "mood": "glad", "complaints": ["price"]}'

    async def answer_by_text(exchange: Exchange) -> None:
        author = exchange.request.json["messages"][1]["content"]
        await answer(review % (author, 9 if author == "Bob" else 5))(exchange)

    scripted_server.default = answer_by_text
    folder = write_files(tmp_path, {f"{number:02}.txt": f"Author {number}" for number in range(20)} | {"20.txt": "Bob"})
    outcome = await run("pydantic_extraction.py", str(folder), LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    *reviews, failed = outcome.output.splitlines()
    assert reviews[7] == '07.txt: {"author":"Author 7","stars":5,"mood":"glad","complaints":["price"]}'
    assert failed.startswith("20.txt: ")
    assert "the answer is not a valid Review: $.stars: input should be less than or equal to 5" in failed
    assert scripted_server.max_in_flight == 2


def tool_call(name: str, arguments: str, number: int = 1) -> dict[str, object]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


async def test_tools_prints_each_call_and_its_result(scripted_server: ScriptedServer) -> None:
    points = '{"latitudes": [48.40, 59.91], "longitudes": [9.99, 10.75]}'
    scripted_server.script(
        answer("", tool_calls=[tool_call("position", '{"city": "Ulm"}'), tool_call("position", '{"city": "Rome"}', 2)]),
        answer("", tool_calls=[tool_call("distance", points, 3)]),
        answer("1281 km."),
    )
    outcome = await run("tools.py", "How far?", LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    assert "{'city': 'Ulm'}) -> [48.4,9.99]\n" in outcome.output
    assert "-> the city 'Rome' is unknown; known cities: oslo, ulm, vienna\n" in outcome.output
    assert "-> 1281 km\n" in outcome.output
    assert outcome.output.endswith("\n\n1281 km.\n\nstop: 3 rounds, 3 calls\n")


async def test_tool_search_finds_the_tool_and_calls_it(scripted_server: ScriptedServer) -> None:
    scripted_server.script(
        answer("", tool_calls=[tool_call("find_tools", '{"query": "convert feet to inches"}')]),
        answer("", tool_calls=[tool_call("feet_to_inches", '{"amount": 2}', 2)]),
        answer("24 inches."),
    )
    outcome = await run("tool_search.py", "--api-base", scripted_server.api_base, "--model", "m", "2 feet in inches?")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "- feet_to_inches: Converts a length from feet to inches.\n" in outcome.output
    assert outcome.output.endswith("-> 24.0\n\n24 inches.\n\nstop: 3 rounds, 30 tools\n")
    tools = [len(request.json["tools"]) for request in scripted_server.requests if request.method == "POST"]
    assert tools[0] < tools[1] == tools[2] < 30


async def test_folder_agent_reads_only_files_of_the_folder(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "sea.md").write_text("# Sea\n\nThe sea is wet.\n")
    (tmp_path / "secret.txt").write_text("the secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    scripted_server.script(
        answer("", tool_calls=[tool_call("list_files", "{}"), tool_call("search", '{"text": "WET"}', 2)]),
        answer("", tool_calls=[tool_call("read_file", '{"name": "sea.md"}', 3)]),
        answer("", tool_calls=[tool_call("read_file", '{"name": "../secret.txt"}', 4)]),
        answer("", tool_calls=[tool_call("read_file", '{"name": "link.txt"}', 5)]),
        answer("It is **wet**, says sea.md."),
    )
    command = ("folder_agent.py", "--api-base", scripted_server.api_base, "--model", "m", "Is it wet?", str(folder))
    outcome = await run(*command, COLUMNS="200")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "list_files(): 15 characters\n" in outcome.output
    assert "read_file('../secret.txt'): there is no file '../secret.txt'; list_files() lists them" in outcome.output
    assert "It is wet, says sea.md." in outcome.output
    assert "stop: 5 rounds, " in outcome.output
    results = [
        message["content"] for message in scripted_server.requests[-1].json["messages"] if message["role"] == "tool"
    ]
    assert results[:3] == ['["sea.md (23)"]', '["sea.md:3: The sea is wet."]', "# Sea\n\nThe sea is wet.\n"]
    assert "the secret" not in str(results)


async def test_a_long_run_shows_how_it_makes_room(scripted_server: ScriptedServer) -> None:
    models = {"data": [{"id": "qwen3-4b", "owned_by": "vllm", "max_model_len": 8192}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    pages = iter(range(1, 41))

    async def read_or_answer(exchange: Exchange) -> None:
        tokens = len(exchange.request.body) // 3
        usage = {"prompt_tokens": tokens, "completion_tokens": 9, "total_tokens": tokens + 9}
        if exchange.request.json.get("tool_choice") == "none":
            await answer("The winner is Ada.", usage=usage)(exchange)
        elif (number := next(pages, None)) is not None:
            call = tool_call("read_page", f'{{"number": {number}}}', number)
            await answer("", tool_calls=[call], usage=usage)(exchange)
        else:
            await answer("It is Ada.", usage=usage)(exchange)

    scripted_server.default = read_or_answer
    outcome = await run("long_run.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.count("read_page: 3") == 40
    assert "[shorten: " in outcome.output
    assert "[summarize: " in outcome.output
    assert "[notes: The winner is Ada.]" in outcome.output
    assert outcome.output.endswith("It is Ada.\n\n41 rounds, 82 messages in the result\n")


async def test_timeline_writes_a_page_with_a_row_for_each_agent(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    page = tmp_path / "session.html"
    outcome = await run("timeline.py", str(page), "--api-base", scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.endswith(f"written: {page}\n")
    assert page.read_text().count("run: How many people live in") >= 3


async def test_observer_adds_up_tokens_and_calls_beside_the_log(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("count_people", '{"city": "Oslo"}')]), answer(FOX))
    outcome = await run("observer.py", LMBRIDGE_API_BASE=scripted_server.api_base, LMBRIDGE_MODEL="qwen3-4b")
    assert outcome.status == 0, outcome.errors
    lines = outcome.output.splitlines()
    assert lines[0] == FOX
    assert {"    2 chat completion", "    1 calls of count_people", "    2 prompt tokens"} <= set(lines)
    assert re.fullmatch(r" 0\.\d\d seconds in the queue", lines[-1])
    assert outcome.errors.count("/chat/completions model=qwen3-4b 200 in ") == 2


async def test_tracing_prints_the_spans_of_a_run(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("count_people", '{"city": "Oslo"}')]), answer(FOX))
    outcome = await run("tracing.py", LMBRIDGE_API_BASE=scripted_server.api_base, LMBRIDGE_MODEL="qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    names = re.sub(r" \(\d+\.\d\d s\)", "", outcome.output)
    assert names == f"{FOX}\ninvoke_agent\n  chat qwen3-4b\n  execute_tool count_people\n  chat qwen3-4b\n"


# It starts pytest twice, which takes a while on a busy machine.
@pytest.mark.timeout(240)
async def test_agent_tests_need_a_server_only_once(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    example = tmp_path / "agent_tests.py"
    example.write_text((EXAMPLES / "agent_tests.py").read_text())
    for options, api_base in ((["--lmbridge-record"], scripted_server.api_base), ([], "http://127.0.0.1:9/v1")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path)),
            *(str(example), *options),
            env=os.environ | {"LMBRIDGE_API_BASE": api_base},
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
        assert process.returncode == 0, printed.decode()
        assert b"3 passed" in printed
    assert len(scripted_server.requests) == 1


async def test_agent_events_draws_no_status_line_in_a_file(
    scripted_server: ScriptedServer,
) -> None:
    calls = [tool_call("count_people", '{"city": "Ulm"}'), tool_call("count_people", '{"city": "Paris"}', 2)]
    scripted_server.script(answer("", tool_calls=calls), answer(FOX))
    outcome = await run("agent_events.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "+ count_people: 130,000\n" in outcome.output
    assert "x count_people: KeyError: 'paris'\n" in outcome.output
    assert f"{FOX}\n\nstop after 2 rounds, " in outcome.output


async def test_agent_events_draws_its_status_line_on_a_terminal(scripted_server: ScriptedServer) -> None:
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    scripted_server.script(answer("", tool_calls=[tool_call("count_people", '{"city": "Ulm"}')]), answer(FOX))
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(EXAMPLES / "agent_events.py"), "--api-base", scripted_server.api_base),
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    output, _ = await process.communicate()
    drawn = await asyncio.to_thread(os.read, ours, 65536)
    os.close(ours)
    assert process.returncode == 0, drawn
    assert b"running: count_people (" in drawn
    assert b"+ count_people: 130,000" in output


async def test_cancellation_stops_every_run_on_the_server(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX, gate=asyncio.Event())
    outcome = await run("cancellation.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output == (
        "== by_handle\n-- stopped; 1 messages to continue from\n"
        "== by_time\n-- cancelled after 3 characters\n"
        "== by_a_sibling\n-- the power is out; the run: cancelled\n"
        "== by_leaving\n-- left\n"
        "== by_budget\n-- budget after 3 characters\n"
    )
    assert len(scripted_server.aborts) == 5


@pytest.mark.slow
async def test_switching_shows_the_effect_of_each_policy(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(f"{FOX} " * 50, pace=0.002)
    command = ("switching.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "--other", "gemma-3-4b")
    outcome = await run(*command)
    assert (outcome.status, outcome.errors) == (0, "")
    whole, cut = "completed (stop)", "stopped by a change of model: qwen3-4b -> gemma-3-4b"
    assert outcome.output == (
        f"== isolate\nfirst run: {whole}\nsecond run: {whole}\n"
        f"== reject\nfirst run: {whole}\nsecond run: {cut}\n"
        f"== cancel\nfirst run: {cut}\nsecond run: {whole}\n"
        f"== drain\nfirst run: {whole}\nsecond run: {whole}\n"
        f"== switch_model\nfirst run: {whole}\nthe agent's model: gemma-3-4b\n"
    )


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("example", "sections"),
    [
        ("agent_events.py", 0),
        ("folder_agent.py", 0),
        ("cancellation.py", 5),
        ("switching.py", 5),
        ("tool_search.py", 0),
    ],
)
async def test_agent_examples_run_on_the_embedded_server(example: str, sections: int) -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run(example)
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.count("== ") >= sections


def asks_the_time() -> Behaviour:
    """Returns the behaviour of a model that calls a tool for the time in Berlin."""
    function = {"name": "get_current_time", "arguments": '{"timezone": "Europe/Berlin"}'}
    return answer("", tool_calls=[{"id": "call_1", "type": "function", "function": function}])


async def test_mcp_one_server_shows_calls_and_the_answer(scripted_server: ScriptedServer) -> None:
    scripted_server.script(asks_the_time(), answer(FOX))
    outcome = await run("mcp_one_server.py", "--api-base", scripted_server.api_base, "--model", "m", "What now?")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.startswith(
        "servers: time\n> What now?\n\nget_current_time({'timezone': 'Europe/Berlin'}) -> {"
    )
    assert outcome.output.endswith(f"}}\n\n{FOX}\n\nstop: 2 rounds, 1 calls\n")


@pytest.mark.slow
async def test_mcp_several_servers_continues_without_the_server_that_fails(scripted_server: ScriptedServer) -> None:
    scripted_server.script(asks_the_time(), answer(FOX))
    outcome = await run("mcp_several_servers.py", "What now?", LMBRIDGE_API_BASE=scripted_server.api_base)
    assert outcome.status == 0
    assert outcome.errors.startswith("the run continues without MCP server 'calendar': ")
    assert len(outcome.errors.splitlines()) == 1
    shown, went_on = outcome.output.split("-- time: ")
    assert shown == "servers: time, git, calendar\n> What now?\n"
    assert went_on.startswith("get_current_time({'timezone': 'Europe/Berlin'}) -> {")
    assert went_on.endswith(f"}}\n{FOX}\n-- stop, without calendar\n")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
async def test_mcp_one_server_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("mcp_one_server.py")
    assert outcome.status == 0, outcome.errors
    # Which of the two tools this small model calls, and with which zone, differs between processors.
    assert re.search(r"(get_current|convert)_time\(\{'\w+': .*\) -> \S", outcome.output), outcome.output


@pytest.mark.slow
async def test_mcp_server_lists_its_tools_and_shows_progress(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    outcome = await run("mcp_server.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "What now?")
    assert (outcome.status, outcome.errors) == (0, "")
    tools, question, text, summary = outcome.output.split("\n\n")
    assert len(tools.splitlines()) == 10
    assert "chat_completion: Asks a local language model for an answer.\n" in tools
    assert question == "> What now?"
    assert text.startswith(".. 1: started\n")
    assert text.endswith(FOX)
    assert summary == "qwen3-4b: stop\n"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
async def test_mcp_server_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("mcp_server.py")
    assert (outcome.status, outcome.errors) == (0, "")
    assert ": the model is answering: " in outcome.output
    assert "\nsmollm2-135m-instruct: " in outcome.output


async def embed_by_words(exchange: Exchange) -> None:
    """Answers with embeddings whose components count certain words in a text."""
    words = ("cat", "price", "sea")
    vectors = [[text.lower().count(word) + 0.01 for word in words] for text in exchange.request.json["input"]]
    data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    await reply(200, {"object": "list", "data": data, "model": exchange.model})(exchange)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with text files."""
    (tmp_path / "animals.md").write_text("# Animals\n\nThe cat of a cat is a cat.\n\n## At sea\n\nThere is the sea.\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "money.txt").write_text("A price is a price.\n\nThe cat has its price.\n" + "price " * 200)
    (tmp_path / "code.py").write_text("cat = 1")
    return tmp_path


async def test_embeddings_search_prints_the_nearest_passages(scripted_server: ScriptedServer, notes: Path) -> None:
    scripted_server.on_path("/v1/embeddings", embed_by_words)
    outcome = await run("embeddings_search.py", "Which cat?", str(notes), LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    first, second, _third = outcome.output.removesuffix("\n\n").split("\n\n")
    assert first == "1.000  animals.md:1\n  # Animals The cat of a cat is a cat."
    assert "  deep/money.txt:3\n  The cat has its price. price price" in second
    assert second.endswith("...")


async def test_embeddings_search_prints_an_error_as_one_line(scripted_server: ScriptedServer, notes: Path) -> None:
    scripted_server.default = reply(501, {"error": "This server does not support embeddings."})
    env = {"LMBRIDGE_API_BASE": scripted_server.api_base}
    outcome = await run("embeddings_search.py", "Which cat?", str(notes), **env)
    assert outcome.status == 1
    assert outcome.errors.startswith(f"embeddings_search: embeddings at {scripted_server.api_base}/embeddings: ")
    assert len(outcome.errors.splitlines()) == 1
    outcome = await run("embeddings_search.py", "Which cat?", str(notes / "nothing"), **env)
    assert outcome.status == 1
    assert outcome.errors.startswith("embeddings_search: no .md or .txt files with text in ")


@pytest.mark.real
@pytest.mark.timeout(180)
async def test_quickstart_streams_from_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("quickstart.py")
    assert outcome.status == 0, outcome.errors
    _, _, text = outcome.output.partition("\n\n")
    text, _, summary = text.rpartition("\n\n")
    assert len(text.split()) > 10
    assert summary.startswith("smollm2-135m-instruct: ")
    assert len(outcome.pieces) > 5


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
async def test_streaming_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("streaming.py")
    assert outcome.status == 0, outcome.errors
    assert outcome.output.count("\n== ") == 5


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("example", "lines"), [("gateway.py", 6), ("pool.py", 12)])
async def test_an_example_runs_on_the_embedded_server(example: str, lines: int) -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run(example)
    assert outcome.status == 0, outcome.errors
    assert len(outcome.output.splitlines()) == lines


async def test_the_blocking_script_prints_a_summary_of_each_file(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    files = [tmp_path / f"{name}.txt" for name in ("a", "b", "c")]
    for file in files:
        file.write_text(FOX)
    scripted_server.default = answer("It is about a fox.")
    outcome = await run("sync_script.py", "--api-base", scripted_server.api_base, *map(str, files))
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output == "".join(f"{file.name}: It is about a fox.\n" for file in files)


async def test_an_example_whose_package_is_missing_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError")
    outcome = await run("folder_agent.py", "What is this?", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert (outcome.status, outcome.errors) == (1, "this example needs rich: pip install rich\n")


async def test_nightly_batch_goes_on_where_it_was(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    for name in ("fox", "sea", "sun"):
        (tmp_path / f"{name}.txt").write_text(f"About the {name}.")

    async def fail_for_the_sea(exchange: Exchange) -> None:
        text = exchange.request.json["messages"][0]["content"]
        await (reply(400, {"error": "no"}) if "sea" in text else answer(FOX))(exchange)

    scripted_server.default = fail_for_the_sea
    outcome = await run("nightly_batch.py", str(tmp_path), LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, sorted(outcome.output.splitlines())) == (
        1,
        ["fox.txt: 44 characters", "sun.txt: 44 characters"],
    )
    assert outcome.errors.startswith("sea.txt: ")
    before = len(scripted_server.requests)
    scripted_server.default = answer("Wet.")
    outcome = await run("nightly_batch.py", str(tmp_path), LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    asked = [request for request in scripted_server.requests[before:] if request.method == "POST"]
    assert len(asked) == 1
    assert {path.name: path.read_text() for path in tmp_path.glob("*.summary")} == {
        "fox.summary": FOX,
        "sea.summary": "Wet.",
        "sun.summary": FOX,
    }


async def test_nightly_batch_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    outcome = await run("nightly_batch.py", str(tmp_path))
    assert (outcome.status, outcome.output) == (1, "")
    assert outcome.errors == f"nightly_batch: there is no file whose name ends with .txt in {tmp_path}\n"


@pytest.mark.slow
async def test_resumed_run_posts_no_letter_twice(scripted_server: ScriptedServer) -> None:
    names = ["Ada", "Bob", "Eve"]

    async def post(exchange: Exchange) -> None:
        results = sum(message["role"] == "tool" for message in exchange.request.json["messages"])
        if results < len(names):
            call = tool_call("post_letter", f'{{"name": "{names[results]}"}}', results)
            await answer("", tool_calls=[call])(exchange)
        else:
            await answer("Done.")(exchange)

    scripted_server.default = post
    outcome = await run("resumed_run.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    first, _, second = outcome.output.partition("the second process\n")
    assert first.splitlines() == [
        "the first process",
        "  posted a letter to Ada",
        "  posted a letter to Bob",
        "  was killed",
    ]
    posted, ada, bob, eve, text = second.splitlines()
    assert (posted, ada) == ("  posted a letter to Eve", "  {'name': 'Ada'}: posted to Ada")
    assert bob.startswith("  {'name': 'Bob'}: No result: the program was interrupted")
    assert "may have happened" in bob
    assert (eve, text) == ("  {'name': 'Eve'}: posted to Eve", "  answer: Done.")


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_ray_fleet_asks_every_question(scripted_server: ScriptedServer) -> None:
    pytest.importorskip("ray", reason="needs lmbridge[ray]")
    scripted_server.default = answer("It is even.")
    # A busy machine needs more than the 30 seconds that Ray waits, and does not let it wait for all others.
    env = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}
    outcome = await run("ray_fleet.py", "--api-base", scripted_server.api_base, "--questions", "8", **env)
    assert outcome.status == 0, outcome.errors
    assert sorted(outcome.output.splitlines()) == [f"What is {n} plus {n}? It is even." for n in range(8)]


async def test_find_servers_asks_each_server_that_it_finds(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    port = scripted_server.origin.rpartition(":")[2]
    outcome = await run("find_servers.py", "What does the fox do?", "--ports", port, "--timeout", "30")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output == f"unknown at {scripted_server.api_base}: {FOX}\n"


async def test_chat_remembers_the_conversation(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("Hello, Ada."), answer("Ada."))
    outcome = await run(
        "chat.py", typed="I am Ada.\nWho am I?\n", LMBRIDGE_API_BASE=scripted_server.api_base, LMBRIDGE_MODEL="m"
    )
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output == "> Hello, Ada.\n> Ada.\n> \n"
    messages = scripted_server.requests[-1].json["messages"]
    assert [each["content"] for each in messages[1:]] == ["I am Ada.", "Hello, Ada.", "Who am I?"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
async def test_chat_stops_an_answer_and_goes_on(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", chunks=["Once upon"], gate=asyncio.Event()), answer("Yes."))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "chat.py"),
        env=os.environ | {"LMBRIDGE_API_BASE": scripted_server.api_base},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"A story!\n")
    await process.stdout.readuntil(b"Once upon")
    process.send_signal(signal.SIGINT)
    await process.stdout.readuntil(b" [stopped]\n")
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    output, _ = await process.communicate(b"Still there?\n")
    assert output == b"> Yes.\n> \n"
    assert process.returncode == 0


async def make_repository(folder: Path, files: int) -> Path:
    """Returns a git repository whose last commit has changed so many files."""
    script = (
        "git init -q && touch base && git add . && git commit -qm base"
        f" && for n in $(seq 1 {files}); do echo 'print(1 / 0)' > file$n.py; done && git add . && git commit -qm files"
    )
    identity = {f"GIT_{who}_{what}": "ada@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    process = await asyncio.create_subprocess_exec("sh", "-c", script, cwd=folder, env=os.environ | identity)
    assert await process.wait() == 0
    return folder


async def test_code_review_reviews_each_file_and_twenty_at_a_time(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    everyone = asyncio.Event()
    asked = 0

    async def review(exchange: Exchange) -> None:
        nonlocal asked
        asked += 1
        if asked == 20:
            everyone.set()
        await everyone.wait()
        await answer('{"severity": "serious", "comment": "It divides by zero."}')(exchange)

    scripted_server.default = review
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "m", "owned_by": "llamacpp"}]}))
    scripted_server.on_path("/props", reply(200, {"total_slots": 20}))
    folder = await make_repository(tmp_path, 25)
    outcome = await run("code_review.py", str(folder), LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    found = "Review(severity='serious', comment='It divides by zero.')"
    assert sorted(outcome.output.splitlines()) == sorted(f"file{number}.py: {found}" for number in range(1, 26))
    assert scripted_server.max_in_flight == 20


async def test_approval_deletes_what_the_user_allows(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"old.tmp": "", "photo.jpg": ""})
    calls = [
        tool_call("delete_file", f'{{"name": "{name}"}}', number)
        for number, name in enumerate(("old.tmp", "photo.jpg"))
    ]
    scripted_server.script(answer("", tool_calls=calls), answer("I deleted old.tmp."))
    outcome = await run("approval.py", str(folder), typed="y\nI like it.\n", LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.endswith("I deleted old.tmp.\n")
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]
    results = [each["content"] for each in scripted_server.requests[-1].json["messages"] if each["role"] == "tool"]
    assert results[0] == "deleted old.tmp"
    assert "I like it." in results[1]


async def test_web_endpoint_stops_the_model_when_the_browser_leaves(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.default = answer("", chunks=["Once", " upon"], gate=asyncio.Event())
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    module = runpy.run_path(str(EXAMPLES / "web_endpoint.py"))
    async with serving(module["app"]) as origin, aiohttp.ClientSession() as browser:
        async with browser.get(f"{origin}/ask", params={"question": "A story?"}) as page:
            assert await page.content.readexactly(4) == b"Once"
            assert not scripted_server.aborts
            page.close()
        await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
        scripted_server.default = reply(400, {"error": "no"})
        async with browser.get(f"{origin}/ask", params={"question": "A story?"}) as page:
            assert page.status == 502
            assert "chat completion at" in await page.text()


async def test_gateway_openai_lets_the_urgent_question_pass(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    scripted_server.on_path("/v1/models", reply(200, {"object": "list", "data": [{"id": "m", "object": "model"}]}))
    outcome = await run("gateway_openai.py", LMBRIDGE_API_BASE=scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    head, *lines = outcome.output.splitlines()
    assert head.startswith("status page: http://127.0.0.1:")
    assert len(lines) == 5
    assert all(line.endswith(f"? {FOX}") for line in lines)
    assert scripted_server.max_in_flight == 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[dict[str, str]]:
    """The environment of an example that uses an embedded server."""
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    async with LocalServer(n_ctx=8192, n_parallel=2, embeddings=True) as server:
        yield {"LMBRIDGE_API_BASE": server.api_base, "LMBRIDGE_MODEL": server.model}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "example",
    [
        "approval.py",
        "chat.py",
        "code_review.py",
        "embeddings_search.py",
        "find_servers.py",
        "gateway_openai.py",
        "mcp_several_servers.py",
        "nightly_batch.py",
        "observer.py",
        "pydantic_extraction.py",
        "sync_script.py",
        "tools.py",
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_short_example_runs_on_the_embedded_server(
    example: str, embedded: dict[str, str], tmp_path: Path
) -> None:
    write_files(tmp_path, {"a.txt": "The lamp is bright. Five stars. -- Ada", "b.txt": "It broke. 1/5. -- Grace"})
    arguments = {
        "approval.py": [str(tmp_path)],
        "code_review.py": [str(await make_repository(tmp_path, 1))] if example == "code_review.py" else [],
        "embeddings_search.py": ["Which lamp is bright?", str(tmp_path)],
        "find_servers.py": ["--ports", str(URL(embedded["LMBRIDGE_API_BASE"]).port)],
        "nightly_batch.py": [str(tmp_path)],
        "pydantic_extraction.py": [str(tmp_path)],
        "sync_script.py": [str(tmp_path / "a.txt")],
    }
    typed = {"approval.py": "y\n" * 20, "chat.py": "Say hello.\n"}
    outcome = await run(example, *arguments.get(example, []), typed=typed.get(example, ""), **embedded)
    # The model is too small to do its task, but the program has to work.
    assert outcome.status == 0, outcome.errors
    assert outcome.output.strip()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_scope="module")
async def test_web_endpoint_streams_an_answer_of_the_embedded_server(
    embedded: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", embedded["LMBRIDGE_API_BASE"])
    module = runpy.run_path(str(EXAMPLES / "web_endpoint.py"))
    async with (
        serving(module["app"]) as origin,
        aiohttp.ClientSession() as browser,
        browser.get(f"{origin}/ask", params={"question": "Say hello."}) as page,
    ):
        assert page.status == 200
        assert (await page.text()).strip()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Proactor")  # of nbclient and its libraries
def test_the_cells_of_the_notebook_run_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    # nbformat declares no types.
    notebook: Any = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] for cell in (code[0], code[-1]))
    assert all(cell.outputs for cell in code[1:-1])


def test_the_index_lists_every_example_and_the_short_ones_are_short() -> None:
    index = (EXAMPLES / "README.md").read_text()
    short, longer = (re.findall(r"^\| \[(\S+)\]\(\1\) ", part, re.MULTILINE) for part in index.split("Longer ones"))
    assert sorted(short + longer) == sorted(path.name for path in EXAMPLES.glob("*.[ip]*y*"))
    assert len(short) >= 12
    assert [name for name in short if len((EXAMPLES / name).read_text().splitlines()) >= 60 and ".py" in name] == []
