"""The status page in a real browser: what it shows, for whom, and what it must never do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge import Limits, LLMClient, collect
from lmbridge.gateway import Gateway
from lmbridge.gateway.status_page import load_status_page
from lmbridge.testing import ScriptedServer, answer, reply
from tests.gateway.accessibility import BARRIERS, LOW_CONTRAST
from tests.gateway.chromium import CHROMIUM, Page, browser_page
from tests.support import MESSAGES

PAGE: Final = load_status_page()
SOURCE: Final = PAGE.body.decode()
A: Final = "http://127.0.0.1:1234/v1"
B: Final = "http://10.0.0.7:8080/v1"

HOSTILE: Final = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>\'"&lt;'

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"),
]


def server(url: str = A, **values: Any) -> dict[str, Any]:
    limits = {"max_concurrency": 4, "max_loaded_models": 1}
    return {
        "url": url, "healthy": True, "limits": limits, "in_flight": 0, "queued": 0, "swaps": 0, "retries": 0, **values
    }  # fmt: skip


def model(name: str | None, **values: Any) -> dict[str, Any]:
    return {"name": name, "server": A, "state": "loaded", "in_flight": 0, "queued": 0, **values}


def request(number: int, **values: Any) -> dict[str, Any]:
    """Returns a request that waits, or one in flight if it has a server."""
    place = {"streaming": True, "chunks": 7, "bytes": 2100} if "server" in values else {"place": number}
    return {
        "id": f"r{number}",
        "model": "qwen3-4b",
        "endpoint": "/v1/chat/completions",
        "priority": "normal",
        "client": "127.0.0.1",
        "age": 3.0,
        **place,
        **values,
    }


def status(**values: Any) -> dict[str, Any]:
    """Returns what /status.json answers if nothing happens at a gateway."""
    return {
        "version": "1.2.3",
        "uptime": 75.0,
        "draining": False,
        "servers": [server()],
        "models": [],
        "in_flight": [],
        "waiting": [],
        "rates": {"tokens_per_second": None, "requests_per_minute": 0.0},
        "swaps": [],
        "finished": [],
        **values,
    }


def busy(name: str = "qwen3-4b", client: str = "127.0.0.1", url: str = A) -> dict[str, Any]:
    """Returns a status with something in every part of the page."""
    return status(
        servers=[server(url, in_flight=1, queued=1, swaps=1), server(B, healthy=False)],
        models=[
            model(name, server=url, in_flight=1),
            model("gemma-3-4b", server=url, state="draining", queued=1),
            *(model(f"{name}-{number}", server=url, state="cold") for number in range(9)),
            model("phi", server=B, state="loading"),
        ],
        in_flight=[request(1, model=name, client=client, server=url), request(2, server=B, streaming=False)],
        waiting=[request(1, model="gemma-3-4b", priority="interactive"), request(2, model=name, client=client)],
        rates={"tokens_per_second": 41.5, "requests_per_minute": 12.0},
        swaps=[{"at": 30.0, "server": url, "from": "gemma-3-4b", "to": name}],
        finished=[
            {"id": f"f{number}", "model": name, "endpoint": "/v1/embeddings", "status": code, "seconds": 1.5,
             "queued_seconds": 0.2, "tokens": tokens, "at": 4.0}
            for number, (code, tokens) in enumerate([(200, 48), (503, None), (499, None)])
        ],
    )  # fmt: skip


def many() -> dict[str, Any]:
    """Returns a status with a thousand requests in flight, and as many that wait."""
    clients = [f"10.0.{number % 3}.{number % 40}" for number in range(1000)]
    return status(
        in_flight=[request(number, client=client, server=A) for number, client in enumerate(clients)],
        waiting=[request(number, client=client) for number, client in enumerate(clients, 1)],
    )


class StatusServer:
    """Serves the page under its strict policy, and a status that a test sets."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = status()
        self.key = ""
        self.code = 200
        self.polls = 0
        self.origin = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/status", self._page)
        app.router.add_get("/status.json", self._json)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(body=PAGE.body, headers=PAGE.headers)

    async def _json(self, incoming: web.Request) -> web.Response:
        self.polls += 1
        if self.key and incoming.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.json_response(self.status, status=self.code)


@pytest_asyncio.fixture
async def served() -> AsyncIterator[StatusServer]:
    serving = StatusServer()
    runner = await serving.start()
    yield serving
    await runner.cleanup()


@pytest_asyncio.fixture
async def page(served: StatusServer, tmp_path: Path) -> AsyncIterator[Page]:
    """Opens a browser. Whatever a test does, the page asks nobody else for anything, and its scripts do not fail."""
    async with browser_page(tmp_path) as opened:
        yield opened
    assert [url for url in opened.urls if not url.startswith((served.origin, "data:"))] == []
    assert [error for error in opened.errors if "Failed to load resource" not in error] == []


async def show(page: Page, served: StatusServer, value: dict[str, Any] | None = None) -> None:
    """Opens the page and waits until it shows a status."""
    if value is not None:
        served.status = value
    await page.open(f"{served.origin}/status")
    await page.wait_for("document.querySelector('#content')?.hidden === false")


def test_the_page_is_one_file_without_external_assets_inline_attributes_or_markup_from_data() -> None:
    assert len(re.findall(r"<style>", SOURCE)) == len(re.findall(r"<script>", SOURCE)) == 1
    assert set(re.findall(r"https?://[^\"'\s)`]+", SOURCE)) <= {"http://www.w3.org/2000/svg"}
    forbidden = r"\s(?:style|on\w+)=|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write"
    assert re.findall(forbidden, SOURCE) == []


def test_the_policy_lets_a_browser_run_the_script_of_the_page_alone() -> None:
    policy = PAGE.headers["Content-Security-Policy"]
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]{44}'; script-src 'sha256-[\w+/=]{44}'; connect-src 'self';"
        r" img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        policy,
    )


class TestInABrowser:
    pytestmark = in_a_browser

    async def test_a_gateway_is_shown_at_work(self, scripted_server: ScriptedServer, tmp_path: Path) -> None:
        gate = asyncio.Event()
        scripted_server.default = answer("", chunks=["The quick", " brown fox"], gate=gate)
        scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "model-a"}, {"id": HOSTILE}]}))
        limits = Limits(max_concurrency=1, max_loaded_models=1)

        async def ask(client: LLMClient, model: str) -> None:
            await collect(await client.chat_completion(MESSAGES, model=model, stream=True))

        async with (
            Gateway(upstreams=[scripted_server.api_base], limits=limits) as gateway,
            browser_page(tmp_path) as page,
            LLMClient(gateway.api_base) as client,
            asyncio.TaskGroup() as tasks,
        ):
            origin = gateway.origin
            await page.open(f"{origin}/status")
            await page.wait_for("document.querySelector('#content')?.hidden === false")
            tasks.create_task(ask(client, "model-a"))
            await page.wait_for("document.querySelectorAll('#flight tbody tr').length === 1")
            for _ in range(2):
                tasks.create_task(ask(client, HOSTILE))
            await page.wait_for("document.querySelectorAll('#waiting tbody tr').length === 2")
            assert HOSTILE in await page.text("#waiting")
            assert (await page.text("#flight tbody tr")).startswith("model-a\tchat/completions\tnormal\t127.0.0.1")
            gate.set()
            await page.wait_for("document.querySelectorAll('#finished tbody tr').length === 3")
            await page.wait_for("document.querySelectorAll('#swaps tbody tr').length === 1")
            assert (await page.text("#n-swaps")).strip() == "1"
            assert await page.text("#waiting-empty")
            assert HOSTILE in await page.text("#servers")
            assert await page.evaluate("window.hit === undefined")
            assert await page.evaluate(LOW_CONTRAST) == []
        assert page.errors == []
        assert [url for url in page.urls if not url.startswith((origin, "data:"))] == []

    async def test_everything_of_a_status_is_shown(self, page: Page, served: StatusServer) -> None:
        await show(page, served, busy())
        servers = await page.text("#servers")
        assert A in servers
        assert "1 of 4 slots in use" in servers
        assert "holds 1 model at a time · 1 waiting · 1 swap · 0 retries" in servers
        assert "9 models not loaded" in servers
        assert "The server does not answer." in servers
        for state in ("loaded", "draining", "loading"):
            assert state in servers
        assert (await page.text("#flight tbody tr")).split("\t") == [
            "qwen3-4b", "chat/completions", "normal", "127.0.0.1", "3.0 s", "7 chunks, 2 kB"
        ]  # fmt: skip
        assert "not streamed" in await page.text("#flight")
        assert "interactive" in await page.text("#waiting tbody tr")
        numbers = (await page.text(".numbers")).split("\n")
        assert [text for text in numbers if text] == [
            "In flight", "2 of 8 slots", "Waiting", "2 up to 3.0 s", "Tokens per second", "41.5",
            "Requests per minute", "12", "Swaps", "1", "Retries", "0",
        ]  # fmt: skip
        assert await page.evaluate("[...document.querySelectorAll('.lane svg[role=img] .bar')].length") == 2
        assert "503" in await page.text("#finished")
        assert "1.2.3 · up for 1 min 15 s" in await page.text("header")
        assert await page.evaluate("document.title") == "2 in flight, 2 waiting · lmbridge gateway"
        served.status = busy() | {"in_flight": [request(1, server=A, chunks=1)]}
        await page.wait_for("document.querySelector('#flight').innerText.includes('1 chunk, 2 kB')")

    async def test_the_page_follows_the_gateway(self, page: Page, served: StatusServer) -> None:
        await show(page, served)
        assert "Nothing is being generated" in await page.text("#flight-empty")
        served.status = busy()
        await page.wait_for("document.querySelectorAll('#flight tbody tr').length === 2")
        # A row stays the same element, so that a selection in it survives.
        await page.evaluate("window.row = document.querySelector('#flight tbody tr')")
        served.status = busy() | {"in_flight": [request(1, server=A, chunks=9)]}
        await page.wait_for("document.querySelector('#flight').innerText.includes('9 chunks')")
        assert await page.evaluate("window.row === document.querySelector('#flight tbody tr')")
        served.status = status(draining=True)
        await page.wait_for("document.querySelector('#state').textContent === 'draining'")
        assert "refuses new ones" in await page.text("#notice")

    async def test_empty_parts_say_what_to_do(self, page: Page, served: StatusServer) -> None:
        await show(page, served)
        assert f"Point a program at {served.origin}/v1 to see it here" in await page.text("#flight-empty")
        assert "The server lists no models. Load one there" in await page.text("#servers")
        assert "No swap so far." in await page.text("#swaps-empty")
        assert not await page.evaluate("[...document.querySelectorAll('table')].some((each) => each.checkVisibility())")

    async def test_hostile_names_are_text(self, page: Page, served: StatusServer) -> None:
        bad = HOSTILE
        value = busy(name=bad, client=bad, url=f"http://a/{bad}")
        value["finished"][0] |= {"endpoint": bad, "status": bad}
        value["waiting"][0] |= {"priority": bad, "id": bad, "endpoint": bad}
        value |= {"version": bad}
        await show(page, served, value)
        await page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        for part in ("#servers", "#flight", "#waiting", "#finished", "#swaps", "#lanes", "#about"):
            assert bad in await page.text(part), part
        assert await page.evaluate("window.hit === undefined")
        assert await page.evaluate("document.querySelectorAll('main img, main script').length") == 0

    async def test_a_script_that_is_not_of_the_page_never_runs(self, page: Page, served: StatusServer) -> None:
        await show(page, served)
        image = "<img src=data: onerror=window.hit=1>"
        await page.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{image}')")
        script = "Object.assign(document.createElement('script'), {text: 'window.hit=1'})"
        await page.evaluate(f"void document.body.append({script})")
        await page.evaluate("new Promise((done) => setTimeout(done, 100))")
        assert await page.evaluate("window.hit === undefined")
        # The browser reports what it has blocked.
        assert any("Content Security Policy" in error for error in page.errors)
        page.errors.clear()

    @pytest.mark.parametrize("width", [320, 375, 768, 1280])
    async def test_no_width_needs_horizontal_scrolling(self, page: Page, served: StatusServer, width: int) -> None:
        await page.resize(width, 800)
        endless = busy(name="endless-name" * 30, client="c" * 200, url="http://" + "host" * 60)
        for value in (status(), busy(), many(), endless):
            await show(page, served, value)
            await page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            scroll, client = await page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert scroll <= client
            # Nothing is cut off at the right side either, but the names of lanes, which end in an ellipsis.
            outside = await page.evaluate(
                "[...document.querySelectorAll('main *')].filter((each) => each.checkVisibility()"
                " && !each.closest('thead, .lane, .skip') && each.getBoundingClientRect().right > innerWidth)"
                ".map((each) => each.outerHTML.slice(0, 80))"
            )
            assert outside == []

    @pytest.mark.parametrize("width", [375, 1180])
    @pytest.mark.parametrize("taller", ["servers", "waiting"])
    async def test_the_parts_of_the_page_never_touch(
        self, page: Page, served: StatusServer, width: int, taller: str
    ) -> None:
        """The space below the two columns used to be that of the right one, even if the left one was longer."""
        await page.resize(width, 1400)
        value = busy()
        if taller == "servers":
            value["models"] += [model(f"model-{number}") for number in range(12)]
        else:
            value["waiting"] = [request(number) for number in range(1, 20)]
        await show(page, served, value)
        bottom, top = await page.evaluate(
            "[Math.max(...[...document.querySelectorAll('.columns .panel')].map((each) => each.getBoundingClientRect()"
            ".bottom)), document.querySelector('section[aria-labelledby=h-swaps]').getBoundingClientRect().top]"
        )
        assert top - bottom >= 12

    async def test_a_thousand_requests_share_a_few_rows(self, page: Page, served: StatusServer) -> None:
        await show(page, served, many())
        assert await page.evaluate("document.querySelectorAll('#waiting tbody tr, #flight tbody tr').length") == 50
        assert await page.evaluate("document.querySelectorAll('*').length") < 2000
        note = await page.text("#waiting-note")
        shown = await page.evaluate(
            "[...document.querySelectorAll('#waiting td.count')].reduce((sum, each) => sum + Number(each.innerText), 0)"
        )
        assert note == f"1,000 requests; equal ones share a row with the highest age; {1000 - shown} more are not shown"
        assert (await page.text("#n-waiting")).startswith("1,000")
        # The next answer is shown as well.
        served.status = status(waiting=[request(1)])
        await page.wait_for("document.querySelectorAll('#waiting tbody tr').length === 1")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_each_text_has_contrast_in_both_schemes(self, page: Page, served: StatusServer, scheme: str) -> None:
        await page.prefer(prefers_color_scheme=scheme)
        for value in (busy(), status(draining=True)):
            await show(page, served, value)
            await page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            assert await page.evaluate(LOW_CONTRAST) == []
        red = await page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (red > 200) is (scheme == "light")

    async def test_a_lost_connection_is_shown_until_it_is_back(self, page: Page, served: StatusServer) -> None:
        await show(page, served, busy())
        served.code = 500
        await page.wait_for("document.querySelector('#state').textContent === 'connection lost'")
        notice = await page.text("[role=status]")
        assert notice.startswith("Connection lost: the gateway answered with status 500. What is shown is from ")
        assert "qwen3-4b" in await page.text("#flight")
        served.code = 200
        await page.wait_for("document.querySelector('#state').textContent === 'live'")
        assert await page.text("[role=status]") == ""

    async def test_a_gateway_that_is_gone_is_shown(self, page: Page, tmp_path: Path) -> None:
        serving = StatusServer()
        runner = await serving.start()
        async with browser_page(tmp_path / "own") as own:
            await show(own, serving)
            await runner.cleanup()
            await own.wait_for("document.querySelector('#notice').innerText.includes('the gateway cannot be reached')")
        assert page.errors == []

    async def test_a_hidden_page_asks_nothing(self, page: Page, served: StatusServer) -> None:
        await show(page, served)
        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        await page.evaluate((hide % "true") + "document.dispatchEvent(new Event('visibilitychange'))")
        # The poll that was under way ends; after that there is none in the time of two.
        await page.evaluate("new Promise((done) => setTimeout(done, 300))")
        before = served.polls
        await page.evaluate("new Promise((done) => setTimeout(done, 2200))")
        assert served.polls == before
        await page.evaluate((hide % "false") + "document.dispatchEvent(new Event('visibilitychange'))")
        served.status = busy()
        await page.wait_for("document.querySelectorAll('#flight tbody tr').length === 2")

    async def test_the_key_is_asked_for_and_kept_for_the_tab_alone(self, page: Page, served: StatusServer) -> None:
        served.key = "secret"
        await page.open(f"{served.origin}/status")
        await page.wait_for("document.querySelector('#unlock')?.hidden === false")
        for key, state in (("wrong", "locked"), ("secret", "live")):
            await page.send("Input.insertText", text=key)
            await page.press("Enter")
            await page.wait_for(f"document.querySelector('#state').textContent === {json.dumps(state)}")
            if state == "locked":
                await page.wait_for("document.querySelector('#notice').innerText.includes('refused this key')")
        assert await page.evaluate("[localStorage.length, location.search]") == [0, ""]

    async def test_it_can_be_read_and_used_without_eyes_and_mouse(self, page: Page, served: StatusServer) -> None:
        await show(page, served, busy())
        assert await page.evaluate(BARRIERS) == []
        focused = []
        for _ in range(6):
            await page.press("Tab")
            focused.append(await page.evaluate("document.activeElement.textContent.trim()"))
        assert focused[0] == "Skip to the content"
        assert "9 models not loaded" in focused
        assert "The swaps as a table" in focused
        await page.evaluate("document.querySelector('#timeline summary').focus()")
        await page.press("Enter")
        await page.wait_for("document.querySelector('#timeline details').open")
        # An open part stays open, and the focus stays where it is, when the next answer is shown.
        served.status = busy() | {"uptime": 99.0}
        await page.wait_for("document.querySelector('#about').textContent.includes('1 min 39 s')")
        assert await page.evaluate(
            "document.querySelector('#timeline details').open && document.activeElement.tagName === 'SUMMARY'"
        )

    async def test_nothing_moves_for_those_who_prefer_that(self, page: Page, served: StatusServer) -> None:
        await page.prefer(prefers_reduced_motion="no-preference")
        await show(page, served, busy())
        assert await page.evaluate("document.getAnimations().length") == 1
        await page.prefer(prefers_reduced_motion="reduce")
        assert await page.evaluate("document.getAnimations().length") == 0
