from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from lmbridge import LLMClient, LLMValidationError, image_part
from lmbridge.testing import ScriptedServer
from tests.support import replaced

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(range(256))
GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"
WEBP = b"RIFF\x1a\x00\x00\x00WEBPVP8L\x0d\x00\x00\x00"


def data_url(data: bytes, label: str) -> str:
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


def part(data: bytes, label: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, label)}}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (JPEG, "image/jpeg"),
        (GIF, "image/gif"),
        (replaced(GIF, b"89a", b"87a"), "image/gif"),
        (WEBP, "image/webp"),
        (replaced(WEBP, b"\x1a", b"\n"), "image/webp"),
    ],
)
def test_an_image_from_any_source_becomes_a_data_url(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    sources: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), data_url(data, kind)]
    assert [image_part(source) for source in sources] == [part(data, kind)] * 6


def test_the_format_is_recognized_by_the_bytes_and_not_by_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(JPEG)
    assert image_part(path) == part(JPEG, "image/jpeg")
    assert image_part(data_url(JPEG, "image/png")) == part(JPEG, "image/jpeg")
    assert image_part(data_url(JPEG, "image/jpg")) == part(JPEG, "image/jpeg")
    assert image_part(data_url(WEBP, "image/png")) == part(WEBP, "image/webp")
    assert image_part(data_url(PNG, "image/gif")) == part(PNG, "image/png")
    assert image_part(replaced(data_url(PNG, "IMAGE/PNG"), "data:", "DATA:")) == part(PNG, "image/png")


@pytest.mark.parametrize("data", [b"GIF88a", WEBP[:11], b"RIFF\x1a\x00\x00\x00WAVEfmt ", PNG[:4], b"\x00" + PNG])
def test_other_image_formats_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path, data_url(data, "image/png")):
        with pytest.raises(LLMValidationError, match=r"begins with .*, which is not a PNG, JPEG, GIF or WebP; con"):
            image_part(source)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00", "a HEIC"),
        (b"\x00\x00\x00\x1cftypavif\x00", "an AVIF"),
        (b"BM" + bytes(60), "a BMP"),
        (b"II*\x00\x08\x00", "a TIFF"),
        (b"MM\x00*\x00\x08", "a TIFF"),
        (b"\x00\x00\x01\x00\x01\x00", "an ICO"),
        (b'<?xml version="1.0"?>\n<!-- A picture. -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG"),
        (b"<svg/>", "an SVG"),
        (b"%PDF-1.7\n", "a PDF"),
    ],
)
def test_the_error_names_the_format_that_servers_do_not_read(data: bytes, name: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^the image is {name}, not a PNG, JPEG, GIF or WebP; convert it"):
        image_part(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", str(tmp_path / "missing.png")):
        with pytest.raises(LLMValidationError, match=r"cannot read the image '.*missing\.png': No such file") as caught:
            image_part(path)
        assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(LLMValidationError, match=r"Is a directory|Permission denied"):
        image_part(tmp_path)


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_urls_are_not_fetched(url: str) -> None:
    with pytest.raises(LLMValidationError, match=r"the image is a URL, '.*'; fetch it first"):
        image_part(url)


@pytest.mark.parametrize(
    ("source", "expected_text"),
    [
        (b"", "the image is empty; give a path"),
        ("", "the image is an empty string"),
        ("a\0b.png", "cannot read the image 'a\\\\x00b.png': embedded null byte"),
        (base64.b64encode(PNG * 100).decode(), "cannot read the image 'iVBOR.*\\.\\.\\.': File name too long"),
        (None, "the image must be a path, bytes or a data URL, not None"),
        (3, "the image must be .*, not int"),
        ("data:image/avif;base64,AAAA", "labelled 'image/avif', which is not a PNG, JPEG, GIF or WebP; convert"),
        ("data:text/plain,hello", "labelled 'text/plain'"),
        ("data:", "labelled ''"),
        ("data:image/png,iVBORw0KGgo=", "the data URL is not base64; give"),
        ("data:image/png;base64,AAA", "the data URL is not valid base64: Incorrect padding"),
        ("data:image/png;base64,iVBO Rw0K", "the data URL is not valid base64"),
        ("data:image/png;base64,", "the image is empty"),
    ],
)
def test_a_source_that_is_not_an_image_is_refused_with_a_hint(source: Any, expected_text: str) -> None:
    with pytest.raises(LLMValidationError, match=expected_text) as caught:
        image_part(source)
    assert caught.value.hint
    assert len(str(caught.value)) < 500


async def test_a_thread_can_read_the_file_for_an_event_loop(
    tmp_path: Path, scripted_server: ScriptedServer, client: LLMClient
) -> None:
    path = tmp_path / "picture.png"
    await asyncio.to_thread(path.write_bytes, PNG)
    shown = await asyncio.to_thread(image_part, path)
    await client.chat_completion([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, shown]}])
    (request,) = scripted_server.requests
    assert request.json["messages"][0]["content"][1] == part(PNG, "image/png")
