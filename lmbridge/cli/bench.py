"""`lmbridge bench`: how fast the server is with several requests at the same time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lmbridge._tasks import settle
from lmbridge.cli.chart import svg_bars, text_bars
from lmbridge.cli.command_runner import Signals, UsageError, run
from lmbridge.cli.connection import ServerConnection, connect_to_server
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.measuring import Measurement, Workload, make_prompts, measure, recommended_concurrency
from lmbridge.cli.options import ApiBase, Debug, Local, Model, ServerOptions
from lmbridge.cli.terminal import Terminal
from lmbridge.config import Limits

_UNIT: Final = "tokens/s"
_LONGEST_BAR: Final = 50


def bench(
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-n", metavar="N,N,...", help="How many concurrent requests to measure.")
    ] = "1,2,4,8",
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=2, help="The maximum number of tokens of each answer.")
    ] = 64,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=20, help="About how many tokens each prompt has.")
    ] = 256,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="How many requests are sent one after the other.")
    ] = 2,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the chart to this file.")] = None,
    model: Model = None,
    api_base: ApiBase = None,
    local: Local = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Measures the server: time to the first token, speed, and how many requests at a time are worth it.

    All prompts differ from their first word on, so that the server's cache of prompts does not help. The result says
    which max_concurrency to set in a program.
    """
    server = ServerOptions(api_base=api_base, local=local, model=model)
    workload = Workload(prompt_tokens=prompt_tokens, answer_tokens=tokens, rounds=rounds)

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        numbers = _numbers(concurrency)
        async with connect_to_server(server, terminal) as connection:
            measurements = await _measure_all(connection, numbers, workload, terminal)
            _report(measurements, connection, workload, terminal, as_json=as_json)
        if svg is not None:
            await settle(asyncio.to_thread(svg.write_text, _svg(measurements, connection, workload), "utf-8"))
            if terminal.shows_notices:
                terminal.notice(f"the chart is in {svg}")
        return ExitStatus.OK

    run(work, debug=debug)


def _numbers(text: str) -> list[int]:
    """Returns the numbers in a text such as "1,2,4", sorted.

    Raises:
        UsageError: It is not a list of positive integers.
    """
    try:
        numbers = sorted({int(each) for each in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UsageError(f"--concurrency takes numbers like 1,2,4, not {text!r}")
    return numbers


async def _measure_all(
    connection: ServerConnection, numbers: Sequence[int], workload: Workload, terminal: Terminal
) -> list[Measurement]:
    prompts = make_prompts(workload.prompt_tokens)
    measurements = []
    # The client of the connection obeys the limits that the server reports, but the benchmark has to exceed them.
    limits, kind = Limits(max_concurrency=max(numbers)), connection.info.kind
    async with connection.open_separate_client(limits) as client:
        with terminal.waiting("warming up ...") as show:
            await measure(client, kind, 1, Workload(prompt_tokens=20, answer_tokens=2, rounds=1), prompts)
            for number in numbers:
                show(f"{number} at the same time ...")
                measurements.append(await measure(client, kind, number, workload, prompts))
    return measurements


def _report(
    measurements: Sequence[Measurement],
    connection: ServerConnection,
    workload: Workload,
    terminal: Terminal,
    *,
    as_json: bool,
) -> None:
    best = recommended_concurrency(measurements)
    if as_json:
        terminal.json(_as_json(measurements, connection, best), indent=2)
        return
    terminal.line(connection.describe(), "bold")
    terminal.line(_summarize(measurements, workload))
    terminal.line()
    headings = ("at a time", "first token", "one answer", "all answers", "prompts")
    terminal.table(headings, [_row(each) for each in measurements])
    terminal.line()
    terminal.line(f"All answers together, by the number of requests at a time ({_UNIT}):")
    width = max(10, min(_LONGEST_BAR, terminal.width - 30))
    for line in text_bars(_values(measurements), width, ""):
        terminal.line(line)
    terminal.line()
    terminal.line(f"Set max_concurrency={best}: LLMClient(limits=Limits(max_concurrency={best}))", "bold")
    if (slots := connection.info.slots) is not None:
        terminal.line(f"The server works on {slots} requests at the same time; further ones wait in the server.")


def _summarize(measurements: Sequence[Measurement], workload: Workload) -> str:
    prompt = round(sum(each.prompt_tokens for each in measurements[0].samples) / len(measurements[0].samples))
    return f"prompts of {prompt} tokens, answers of up to {workload.answer_tokens}, {workload.rounds} in a row"


def _row(measurement: Measurement) -> tuple[str, ...]:
    return (
        str(measurement.concurrency),
        f"{measurement.first_token_seconds:.2f} s",
        *(
            "" if math.isnan(each) else f"{each:.1f} {_UNIT}"
            for each in (measurement.answer_speed, measurement.throughput, measurement.prompt_speed)
        ),
    )


def _values(measurements: Sequence[Measurement]) -> list[tuple[str, float]]:
    return [(str(each.concurrency), each.throughput) for each in measurements if not math.isnan(each.throughput)]


def _as_json(measurements: Sequence[Measurement], connection: ServerConnection, best: int) -> dict[str, Any]:
    return {
        "api_base": connection.client.api_base,
        "kind": connection.info.kind,
        "model": connection.model,
        "slots": connection.info.slots,
        "measurements": [each.as_json() for each in measurements],
        "max_concurrency": best,
    }


def _svg(measurements: Sequence[Measurement], connection: ServerConnection, workload: Workload) -> str:
    return svg_bars(
        _values(measurements),
        title=f"{connection.model or 'the model'}: tokens per second by requests at a time",
        subtitle=f"{connection.kind_name}; {_summarize(measurements, workload)}",
        unit=_UNIT,
        marked=str(recommended_concurrency(measurements)),
    )
