"""Each example runs as a program, as a user would run it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply

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


async def run(example: str, *args: str, **env: str) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", str(EXAMPLES / example), *args),
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
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
    outcome = await run("quickstart.py", LMBRIDGE_API_BASE=scripted_server.api_base, DEFAULT_MODEL="gemma-3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "gemma-3-4b: " in outcome.output


ANSWERING = [
    "agent_events.py",
    "cancellation.py",
    "folder_agent.py",
    "quickstart.py",
    "streaming.py",
    "structured_output.py",
    "tools.py",
]


# Examples that start MCP servers take seconds, for the same handling of errors.
STARTING_SERVERS = [pytest.param(each, marks=pytest.mark.slow) for each in ("mcp_one_server.py", "mcp_server.py")]


@pytest.mark.parametrize("example", [*ANSWERING, "pool.py", "switching.py", *STARTING_SERVERS])
async def test_an_error_is_printed_as_one_line(example: str, scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(400, {"error": "no such thing"})
    outcome = await run(example, "--api-base", scripted_server.api_base)
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


async def test_pydantic_extraction_prints_each_review_and_each_failure(scripted_server: ScriptedServer) -> None:
    review = '{"author": "%s", "stars": %s, "mood": "glad", "complaints": []}'
    complaint = '{"author": "Eve", "stars": 2, "mood": "angry", "complaints": [{"about": "price", "words": "Dear."}]}'

    async def answer_by_text(exchange: Exchange) -> None:
        text = exchange.request.json["messages"][1]["content"]
        replies = {"Ada": review % ("Ada", 5), "Bob": review % ("Bob", 9), "Eve": complaint}
        await answer(replies[text])(exchange)

    scripted_server.default = answer_by_text
    outcome = await run("pydantic_extraction.py", "--api-base", scripted_server.api_base, "Ada", "Bob", "Eve")
    assert (outcome.status, outcome.errors) == (0, "")
    first, failed, *others = outcome.output.splitlines()
    assert first == "Ada: 5 of 5, glad"
    assert "the answer is not a valid Review: $.stars: input should be less than or equal to 5" in failed
    assert others == ["Eve: 2 of 5, angry", "- price: Dear."]
    assert scripted_server.max_in_flight <= 2


async def test_pydantic_extraction_takes_twenty_texts_a_few_at_a_time(scripted_server: ScriptedServer) -> None:
    async def answer_by_text(exchange: Exchange) -> None:
        author = exchange.request.json["messages"][1]["content"]
        await answer(f'{{"author": "{author}", "stars": 5, "mood": "glad", "complaints": []}}')(exchange)

    scripted_server.default = answer_by_text
    authors = [f"Author {number}" for number in range(20)]
    outcome = await run("pydantic_extraction.py", "--api-base", scripted_server.api_base, *authors)
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.splitlines() == [f"{author}: 5 of 5, glad" for author in authors]
    assert scripted_server.max_in_flight == 2


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_pydantic_extraction_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("pydantic_extraction.py")
    assert outcome.status == 0, outcome.errors
    assert " of 5, " in outcome.output


def tool_call(name: str, arguments: str, number: int = 1) -> dict[str, object]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


async def test_tools_prints_each_call_and_its_result(scripted_server: ScriptedServer) -> None:
    points = '{"latitudes": [48.40, 59.91], "longitudes": [9.99, 10.75]}'
    scripted_server.script(
        answer("", tool_calls=[tool_call("position", '{"city": "Ulm"}'), tool_call("position", '{"city": "Rome"}', 2)]),
        answer("", tool_calls=[tool_call("distance", points, 3)]),
        answer("", tool_calls=[tool_call("round", '{"value": 1281, "step": 10}', 4)]),
        answer("About 1280 km."),
    )
    outcome = await run("tools.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "How far?")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "{'city': 'Ulm'}) -> [48.4,9.99]\n" in outcome.output
    assert "-> the city 'Rome' is unknown; known cities: oslo, ulm, vienna\n" in outcome.output
    assert "-> 1281 km\n" in outcome.output
    assert "-> 1280" in outcome.output
    assert outcome.output.endswith("\n\nAbout 1280 km.\n\nstop: 4 rounds, 4 calls\n")


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
    [("tools.py", 0), ("agent_events.py", 0), ("folder_agent.py", 0), ("cancellation.py", 5), ("switching.py", 5)],
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


async def test_mcp_several_servers_continues_without_the_server_that_fails(scripted_server: ScriptedServer) -> None:
    scripted_server.script(asks_the_time(), answer(FOX))
    outcome = await run("mcp_several_servers.py", "--api-base", scripted_server.api_base, "--model", "m", "What now?")
    assert outcome.status == 0
    assert outcome.errors.startswith("the run continues without MCP server 'calendar': ")
    assert len(outcome.errors.splitlines()) == 1
    shown, raised, went_on = outcome.output.split("== ")
    assert shown == "servers: time, git, calendar\n> What now?\n"
    assert raised.startswith("raise\n-- calendar: MCP server 'calendar' could not be started: ")
    assert "continue\n-- time: get_current_time({'timezone': 'Europe/Berlin'}) -> {" in went_on
    assert went_on.endswith(f"}}\n{FOX}\n-- stop, without calendar\n")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize("example", ["mcp_one_server.py", "mcp_several_servers.py"])
async def test_mcp_examples_run_on_the_embedded_server(example: str) -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run(example)
    assert outcome.status == 0, outcome.errors
    # Which of the two tools this small model calls, and with which zone, differs between processors.
    assert re.search(r"(get_current|convert)_time\(\{'\w+': .*\) -> \S", outcome.output), outcome.output


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
    outcome = await run(
        "embeddings_search.py", "--api-base", scripted_server.api_base, "--top", "2", "Which cat?", str(notes)
    )
    assert (outcome.status, outcome.errors) == (0, "")
    head, first, second = outcome.output.split("\n\n")
    assert head == "> Which cat?  (4 passages)"
    assert first == "1.000  animals.md:1\n  # Animals The cat of a cat is a cat."
    assert "  deep/money.txt:3\n  The cat has its price. price price" in second
    assert second.endswith("...\n")


async def test_embeddings_search_prints_an_error_as_one_line(scripted_server: ScriptedServer, notes: Path) -> None:
    scripted_server.default = reply(501, {"error": "This server does not support embeddings."})
    command = ("embeddings_search.py", "--api-base", scripted_server.api_base, "Which cat?")
    outcome = await run(*command, str(notes))
    assert outcome.status == 1
    assert outcome.errors.startswith(f"embeddings_search: embeddings at {scripted_server.api_base}/embeddings: ")
    assert len(outcome.errors.splitlines()) == 1
    outcome = await run(*command, str(notes / "nothing"))
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


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
async def test_embeddings_search_runs_on_the_embedded_server(notes: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("embeddings_search.py", "A price is a price.", str(notes))
    assert outcome.status == 0, outcome.errors
    assert outcome.output.startswith("> A price is a price.  (4 passages)\n\n1.000  deep/money.txt:1\n")
    assert len(outcome.output.split("\n\n")) == 4


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
