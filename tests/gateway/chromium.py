"""A real browser for tests, driven over the DevTools protocol, which needs no driver and no other library."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")
"""The program, or None if there is none on this machine."""

_OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Page:
    """One tab.

    Attributes:
        errors: What the page wrote to the console as an error, and its uncaught exceptions.
        urls: The address of each request that the page has made.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.urls: list[str] = []
        self._socket = socket
        self._session = ""
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def read(self) -> None:
        """Reads what the browser sends, until it closes the connection."""
        async for message in self._socket:
            data = json.loads(message.data)
            answer = self._answers.pop(data.get("id"), None)
            if answer is None:
                self._note(data.get("method"), data.get("params", {}))
            elif not answer.done():
                answer.set_result(data)

    def _note(self, method: str, values: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.urls.append(values["request"]["url"])
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in {"error", "assert"}:
            self.errors.append(json.dumps(values["args"]))

    async def send(self, method: str, **values: Any) -> Any:
        """Calls a method of the DevTools protocol and returns its result."""
        number = next(self._ids)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": values, "sessionId": self._session})
        data = await answer
        if "error" in data:
            raise RuntimeError(f"{method}: {data['error']}")
        return data["result"]

    async def attach(self) -> None:
        """Opens the tab."""
        await self._socket.send_json({"id": 0, "method": "Target.createTarget", "params": {"url": "about:blank"}})
        self._answers[0] = answer = asyncio.get_running_loop().create_future()
        target = (await answer)["result"]["targetId"]
        self._answers[0] = answer = asyncio.get_running_loop().create_future()
        values = {"targetId": target, "flatten": True}
        await self._socket.send_json({"id": 0, "method": "Target.attachToTarget", "params": values})
        self._session = (await answer)["result"]["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")

    async def open(self, url: str) -> None:
        """Loads a page. Wait for what it shows with `wait_for`."""
        await self.send("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, which may be a promise."""
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 30.0) -> Any:
        """Waits until a JavaScript expression is true in the page, and returns its value."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.05)
                return value
        except TimeoutError:
            shown = await self.evaluate("document.body.innerText")
            raise AssertionError(f"{expression} was not true within {seconds} s; the page shows:\n{shown}") from None

    async def text(self, selector: str) -> str:
        """Returns the visible text of an element."""
        text: str = await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return text

    async def resize(self, width: int, height: int) -> None:
        """Sets the size of the window."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def prefer(self, **features: str) -> None:
        """Sets media features, for example `prefers_color_scheme="dark"`."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.send("Emulation.setEmulatedMedia", features=listed)

    async def press(self, key: str) -> None:
        """Presses and releases a key."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser_page(folder: Path) -> AsyncIterator[Page]:
    """Starts a browser that keeps its files in this folder, and opens a tab."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *_OPTIONS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        line = ""
        while not line.startswith("DevTools listening on "):
            line = (await process.stderr.readline()).decode()
            assert line, "the browser did not start"
        draining = asyncio.create_task(process.stderr.read())
        address = line.rpartition(" ")[2].strip()
        async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
            page = Page(socket)
            reading = asyncio.create_task(page.read())
            await page.attach()
            yield page
        await reading
        process.kill()
        await draining
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
