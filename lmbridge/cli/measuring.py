"""Measures how fast a server is with several requests at the same time, for `lmbridge bench`."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge._tasks import run_together
from lmbridge.client import LLMClient
from lmbridge.client.reasoning import ReasoningSplitter
from lmbridge.client.server_info import ServerKind

_WORDS: Final = ("amber", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket")
_TOKENS_OF_WORD: Final = 1.3
"""About how many tokens a word of the prompts has, with the tokenizers of common models."""
_TASK: Final = "Write a long story in which each of these words occurs:"
_GOOD_ENOUGH: Final = 0.95
"""A lower concurrency is preferred if it reaches this share of the highest throughput."""
_IGNORES_EOS: Final[frozenset[ServerKind]] = frozenset({"llama.cpp", "vllm"})
"""The servers with a parameter that makes them generate beyond the end of an answer, so that all answers have the same
length."""


@attrs.frozen(kw_only=True)
class Workload:
    """How long the prompts and the answers are, and how many requests are sent."""

    prompt_tokens: int
    """About how many tokens each prompt has."""
    answer_tokens: int
    """The maximum number of tokens of each answer."""
    rounds: int
    """How many requests each of the concurrent clients sends, one after the other."""


@attrs.frozen(kw_only=True)
class Sample:
    """The measurements of one request."""

    first_token_seconds: float
    """The seconds until the first piece of the answer."""
    seconds: float
    """The seconds until the end of the answer."""
    prompt_tokens: int
    """The tokens of the prompt, as the server counted them."""
    answer_tokens: int
    """The tokens of the answer, as the server counted them."""

    @property
    def tokens_per_second(self) -> float:
        """How fast the answer was written; NaN if that cannot be measured."""
        writing = self.seconds - self.first_token_seconds
        return (self.answer_tokens - 1) / writing if writing > 0 and self.answer_tokens > 1 else math.nan


@attrs.frozen(kw_only=True)
class Measurement:
    """The measurements for one number of concurrent requests."""

    concurrency: int
    """The number of requests at the same time."""
    samples: tuple[Sample, ...]
    """The requests."""
    seconds: float
    """How long all of them took together, in seconds."""

    @property
    def first_token_seconds(self) -> float:
        """The median time to the first token."""
        return statistics.median(each.first_token_seconds for each in self.samples)

    @property
    def answer_speed(self) -> float:
        """The median speed of one answer, in tokens per second; NaN if it cannot be measured."""
        speeds = [each.tokens_per_second for each in self.samples if not math.isnan(each.tokens_per_second)]
        return statistics.median(speeds) if speeds else math.nan

    @property
    def throughput(self) -> float:
        """The tokens per second of all answers together; NaN if it cannot be measured."""
        return sum(each.answer_tokens for each in self.samples) / self.seconds if self.seconds > 0 else math.nan

    @property
    def prompt_speed(self) -> float:
        """How many prompt tokens the server processes per second, for all requests in flight together.

        The time until the first token of an answer is taken as the time that its prompt needed. The speed is NaN if
        that time cannot be measured.
        """
        # The clock may be too coarse for a fast answer.
        timed = [each for each in self.samples if each.first_token_seconds > 0]
        speeds = [each.prompt_tokens / each.first_token_seconds for each in timed]
        return statistics.median(speeds) * self.concurrency if speeds else math.nan

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers for `--json`; what could not be measured is None."""
        numbers = {
            "first_token_seconds": self.first_token_seconds,
            "answer_tokens_per_second": self.answer_speed,
            "total_tokens_per_second": self.throughput,
            "prompt_tokens_per_second": self.prompt_speed,
        }
        measured = {name: None if math.isnan(each) else round(each, 3) for name, each in numbers.items()}
        return {"concurrency": self.concurrency, "requests": len(self.samples), **measured}


async def measure(
    client: LLMClient, kind: ServerKind, concurrency: int, workload: Workload, prompts: Iterator[str]
) -> Measurement:
    """Sends requests, a fixed number of them at the same time, and measures them.

    Args:
        client: A client whose limits allow that many requests at the same time.
        kind: The kind of the server.
        concurrency: The number of requests at the same time.
        workload: The lengths of the prompts and answers, and the number of rounds.
        prompts: Prompts. Each is used only once.

    Raises:
        LLMError: A request failed.
    """
    samples: list[Sample] = []

    async def ask_in_turn() -> None:
        samples.extend(
            [await _ask(client, kind, next(prompts), workload.answer_tokens) for _ in range(workload.rounds)]
        )

    started = time.monotonic()
    await run_together(ask_in_turn() for _ in range(concurrency))
    return Measurement(concurrency=concurrency, samples=tuple(samples), seconds=time.monotonic() - started)


async def _ask(client: LLMClient, kind: ServerKind, prompt: str, answer_tokens: int) -> Sample:
    params: dict[str, Any] = {"max_tokens": answer_tokens, "stream_options": {"include_usage": True}, "temperature": 0}
    if kind in _IGNORES_EOS:
        params["ignore_eos"] = True
    splitter, pieces, first = ReasoningSplitter(), 0, None
    started = time.monotonic()
    async with client.stream_chat([{"role": "user", "content": prompt}], **params) as stream:
        async for chunk in stream:
            if splitter.feed(chunk):
                pieces += 1
                first = first or time.monotonic()
        ended = time.monotonic()
        usage: Mapping[str, Any] = (stream.partial or {"usage": None}).get("usage") or {}
    return Sample(
        first_token_seconds=(first or ended) - started,
        seconds=ended - started,
        prompt_tokens=usage.get("prompt_tokens") or round(len(prompt.split()) * _TOKENS_OF_WORD),
        # If the server does not count the tokens of a stream, each piece is taken for one token.
        answer_tokens=usage.get("completion_tokens") or pieces,
    )


def make_prompts(tokens: int, seed: int = 0) -> Iterator[str]:
    """Yields prompts of about equal length. They differ from the first word on, so that no cache helps."""
    chosen = random.Random(seed)
    words = max(1, round(tokens / _TOKENS_OF_WORD) - len(_TASK.split()))
    for number in itertools.count(1):
        yield f"{number}. {_TASK} {' '.join(chosen.choices(_WORDS, k=words))}"


def recommended_concurrency(measurements: Sequence[Measurement]) -> int:
    """Returns the lowest concurrency that has nearly the highest throughput. A higher one only makes answers slower."""
    measured = [each for each in measurements if not math.isnan(each.throughput)]
    best = max((each.throughput for each in measured), default=0.0)
    good = [each for each in measured if each.throughput >= best * _GOOD_ENOUGH] or measurements
    return min(each.concurrency for each in good)
