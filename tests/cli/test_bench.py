"""`lmbridge bench`: what is sent, the numbers, the charts, and the recommendation."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import islice
from pathlib import Path

import pytest

from lmbridge import FoundServer, ServerInfo
from lmbridge.cli import connection
from lmbridge.cli.chart import svg_bars, text_bars
from lmbridge.cli.measuring import Measurement, Sample, make_prompts, recommended_concurrency
from lmbridge.testing import answer, reply
from tests.cli.support import Command
from tests.threaded_server import ThreadedServer


def sample(first: float, seconds: float, tokens: int, prompt: int = 100) -> Sample:
    return Sample(first_token_seconds=first, seconds=seconds, prompt_tokens=prompt, answer_tokens=tokens)


def measurement(concurrency: int, *samples: Sample, seconds: float = 1.0) -> Measurement:
    return Measurement(concurrency=concurrency, samples=samples, seconds=seconds)


def with_throughput(concurrency: int, tokens_per_second: int) -> Measurement:
    return measurement(concurrency, sample(0.1, 1, tokens_per_second))


def test_the_numbers_of_a_measurement() -> None:
    measured = measurement(2, sample(0.5, 2.5, 21), sample(1.5, 3.5, 41), seconds=4.0)
    assert measured.first_token_seconds == 1.0
    assert measured.answer_speed == 15.0
    assert measured.throughput == 15.5
    assert measured.prompt_speed == pytest.approx(2 * (200 + 100 / 1.5) / 2)
    assert measured.as_json()["total_tokens_per_second"] == 15.5


def test_a_speed_is_not_known_if_no_time_was_measured() -> None:
    instant = measurement(2, sample(0, 0, 10), seconds=0.0)
    numbers = instant.as_json()
    assert (numbers["prompt_tokens_per_second"], numbers["total_tokens_per_second"]) == (None, None)
    assert measurement(2, sample(0, 1, 10), sample(0.5, 1, 10)).prompt_speed == 2 * 100 / 0.5
    assert recommended_concurrency([instant]) == 2
    assert recommended_concurrency([instant, with_throughput(4, 10)]) == 4


def test_the_speed_of_an_answer_in_one_piece_is_not_known() -> None:
    assert measurement(1, sample(1, 1, 1)).as_json()["answer_tokens_per_second"] is None


@pytest.mark.parametrize(
    ("throughputs", "best"),
    [({1: 10, 2: 19, 4: 30, 8: 31}, 4), ({1: 10, 2: 20, 4: 40}, 4), ({1: 10, 2: 9, 4: 5}, 1)],
)
def test_the_lowest_concurrency_with_nearly_the_highest_throughput_is_recommended(
    throughputs: dict[int, int], best: int
) -> None:
    assert recommended_concurrency([with_throughput(*each) for each in throughputs.items()]) == best


def test_prompts_differ_from_their_first_word_on_and_are_about_as_long_as_wanted() -> None:
    prompts = list(islice(make_prompts(260), 20))
    assert len({prompt.split()[0] for prompt in prompts}) == 20
    assert {len(prompt.split()) for prompt in prompts} == {201}
    assert prompts == list(islice(make_prompts(260), 20))


def test_bars_have_the_length_of_their_values() -> None:
    assert text_bars([("1", 10), ("16", 20), ("4", 0.5)], 10, "t/s") == [
        " 1 █████      10.0 t/s",
        "16 ██████████ 20.0 t/s",
        " 4 ▎          0.5 t/s",
    ]
    assert text_bars([("1", 0.0)], 3, "") == ["1     0.0"]


def test_the_svg_is_well_formed_and_describes_itself() -> None:
    chart = svg_bars([("1", 10), ("2", 20)], title="a <model>", subtitle="& more", unit="t/s", marked="2")
    root = ET.fromstring(chart)
    names = {"svg": "http://www.w3.org/2000/svg"}
    assert root.findtext("svg:title", namespaces=names) == "a <model>"
    assert root.findtext("svg:desc", namespaces=names) == "1: 10.0 t/s, 2: 20.0 t/s"
    assert [bar.get("class") for bar in root.findall("svg:rect", names)] == ["bar", "bar marked"]


def test_each_concurrency_is_measured_and_one_is_recommended(
    command: Command, server: ThreadedServer, tmp_path: Path
) -> None:
    server.answer(answer("one two three four"))
    chart = tmp_path / "speed.svg"
    status, output, errors = command("bench", "-n", "2,1", "--rounds", "2", "--tokens", "8", "--svg", str(chart))
    assert (status, errors) == (0, "")
    sent = [each.json for each in server.scripted.requests if each.path == "/v1/chat/completions"]
    # One to warm up, two in a row, and twice two at the same time.
    assert len(sent) == 1 + 2 + 4
    assert {each["max_tokens"] for each in sent[1:]} == {8}
    assert len({each["messages"][0]["content"] for each in sent}) == len(sent)
    lines = output.splitlines()
    assert lines[0] == f"test-model on a server at {server.api_base}"
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == ["1", "2", "1", "2"]
    assert any(line.startswith("Set max_concurrency=") for line in lines)
    assert ET.parse(chart).getroot().tag.endswith("svg")


def test_a_server_that_was_found_gets_no_key(server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def discover(**_options: object) -> list[FoundServer]:
        return [FoundServer(api_base=server.api_base, info=ServerInfo(kind="unknown"))]

    monkeypatch.setattr(connection, "discover", discover)
    monkeypatch.setenv("LM_API_TOKEN", "the-key")
    server.answer(answer("one two three four"))
    assert Command()("bench", "-n", "1", "--rounds", "1").status == 0
    assert any(each.path == "/v1/chat/completions" for each in server.scripted.requests)
    assert {each.headers.get("Authorization") for each in server.scripted.requests} == {None}


def test_the_numbers_as_json(command: Command, server: ThreadedServer) -> None:
    server.answer(answer("one two three four"))
    report = json.loads(command("bench", "-n", "1", "--rounds", "1", "--json").output)
    assert report["max_concurrency"] == 1
    assert [each["requests"] for each in report["measurements"]] == [1]


@pytest.mark.parametrize("numbers", ["0", "", "1,two", "-1"])
def test_numbers_that_make_no_sense_are_refused(command: Command, numbers: str) -> None:
    status, _, errors = command("bench", "-n", numbers)
    assert status == 2
    assert "--concurrency takes numbers like 1,2,4" in errors


def test_a_request_that_fails_is_one_error(command: Command, server: ThreadedServer) -> None:
    server.scripted.script(answer("warm"))
    server.answer(reply(400, {"error": "no"}))
    status, output, errors = command("bench", "-n", "3")
    assert (status, output) == (1, "")
    assert errors.count("error: ") == 1
