"""Measures how long the embedded server works on a token, for the simulation in `scale.py`.

    python -m benchmarks.service_times

It counts the CPU time of the server's process, which runs on one thread, because the time by the clock depends on what
else the machine is doing. It needs Linux.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any, Final

from lmbridge import Limits, LLMClient, LocalServer

SLOTS: Final = 4
_PROMPTS: Final = 8
_WORDS: Final = 250
_ANSWER_TOKENS: Final = 64
_VOCABULARY: Final = ["river", "stone", "amber", "lantern", "copper", "willow", "harbor", "meadow", "thunder", "velvet"]


def _cpu_seconds() -> float:
    """Returns the CPU time of the child processes, of which the server is the only one."""
    lists = [task.joinpath("children").read_text().split() for task in Path("/proc/self/task").iterdir()]
    # The fields after the name of the program, which is in parentheses: the 12th and 13th are user and system time.
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pids in lists for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


async def _work(client: LLMClient, prompts: list[str], max_tokens: int) -> tuple[float, int, int]:
    """Returns the CPU seconds of some requests that are sent at once, and the tokens that were read and generated."""
    before = _cpu_seconds()
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    # Nothing ends the answer before its last token.
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
    replies = await asyncio.gather(*(client.chat_completion(each, **options) for each in messages))
    timings: list[dict[str, Any]] = [{**reply}["timings"] for reply in replies]
    tokens = [sum(int(each[name]) for each in timings) for name in ("prompt_n", "predicted_n")]
    return _cpu_seconds() - before, tokens[0], tokens[1]


async def measure() -> tuple[float, float]:
    """Returns the tokens of prompts, and those of answers, that a server with all slots busy handles in a second."""
    draw = random.Random(2026)
    prompts = [f"{number}: {' '.join(draw.choices(_VOCABULARY, k=_WORDS))}" for number in range(_PROMPTS)]
    async with LocalServer(n_ctx=4096 * SLOTS, n_parallel=SLOTS, threads=1) as server:
        limits = Limits(max_concurrency=SLOTS)
        async with LLMClient(server.api_base, server.model, limits=limits, timeout=None) as client:
            await _work(client, ["Hello."], 1)
            reading, read, _ = await _work(client, prompts, 1)
            # The prompts from above are in the cache now, so other ones are sent, which are short.
            both, short, generated = await _work(client, [f"{number}." for number in range(SLOTS)], _ANSWER_TOKENS)
    speed = read / reading
    return speed, generated / (both - short / speed)


def main() -> None:
    prompts, answers = asyncio.run(measure())
    print(f"{prompts:.0f} tokens of prompts, {answers:.0f} tokens of answers a second of CPU time, {SLOTS} slots")


if __name__ == "__main__":
    main()
