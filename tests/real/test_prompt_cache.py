"""A run whose messages only grow at their end, on a real llama.cpp server: most of each prompt is in its cache."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LocalServer
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import asks, calls, generations

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""A template that shows every message in its place. The default one leaves the tools out after the first result."""
ROUNDS = 6


def read(page: int) -> str:
    """Reads a page."""
    return f"Page {page}: " + "the ship sailed on. " * 4


async def sent_by_a_run() -> list[list[dict[str, Any]]]:
    """Returns the messages of each request of a run that calls a tool in every round but the last one."""
    async with ScriptedServer() as server, LLMClient(server.api_base) as client:
        turns = [calls(asks("read", f"c{page}", page=page), text="I read on.") for page in range(ROUNDS - 1)]
        server.script(*turns, answer("Done."))
        await Agent(client, tools=[read], system_prompt="You read a book. " * 4).run("Read it.")
        return [request.json["messages"] for request in generations(server)]


async def evaluated(client: LLMClient, prompts: Sequence[Sequence[dict[str, Any]]], body: dict[str, Any]) -> int:
    """Returns how many tokens of all prompts together the server has evaluated."""
    total = 0
    for messages in prompts:
        reply = await client.chat_completion(messages, max_tokens=1, temperature=0, extra_body=body)
        total += reply["timings"]["prompt_n"]
    return total


@pytest.mark.timeout(240)
async def test_a_run_of_six_rounds_evaluates_each_message_about_once(tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    template = tmp_path / "plain.jinja"
    template.write_text(TEMPLATE)
    prompts = await sent_by_a_run()
    assert len(prompts) == ROUNDS
    server = LocalServer(n_ctx=2048, n_parallel=1, chat_template=template)
    async with server, LLMClient(server.api_base, timeout=200) as client:
        last = (await client.count_tokens(prompts[-1])).tokens
        warm = await evaluated(client, prompts, {"cache_prompt": True, "id_slot": 0})
        cold = await evaluated(client, prompts, {"cache_prompt": False, "id_slot": 0})
    # On 2026-11-29: 238 tokens of the last prompt, 238 evaluated with the cache, and 828 without it.
    assert warm < 1.5 * last < cold


def prompts_of_a_run(word: str, system_prompt: str) -> list[list[dict[str, Any]]]:
    """Returns the messages of each request of a run that gets longer."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": f"What does the book say about the {word}?"},
    ]
    prompts = []
    for page in range(ROUNDS):
        prompts.append(list(messages))
        text = f"Page {page}: " + f"the {word} sailed on. " * 4
        messages += [{"role": "assistant", "content": "I read on."}, {"role": "tool", "content": text}]
    return prompts


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "system_prompts", "at_once"),
    [
        (("ship", "moon"), ("You read about the ship. ", "You read about the moon. "), False),
        (("ship", "moon"), ("You read about the ship. ", "You read about the moon. "), True),
        (("ship", "moon"), ("You read about the book. ", "You read about the book. "), False),
    ],
    ids=["two system prompts", "at the same time", "one system prompt"],
)
async def test_two_runs_keep_their_caches_only_if_their_slots_are_not_pinned(
    tmp_path: Path, words: tuple[str, str], system_prompts: tuple[str, str], at_once: bool
) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    template = tmp_path / "plain.jinja"
    template.write_text(TEMPLATE)
    runs = [prompts_of_a_run(word, prompt * 8) for word, prompt in zip(words, system_prompts, strict=True)]
    totals: dict[bool, int] = {}
    last: list[int] = []
    for is_pinned in (False, True):
        server = LocalServer(n_ctx=2048, n_parallel=2, chat_template=template)
        async with server, LLMClient(server.api_base, timeout=200) as client:
            last = [(await client.count_tokens(run[-1])).tokens for run in runs]
            bodies: list[dict[str, Any]] = [{"id_slot": slot} if is_pinned else {} for slot in range(2)]
            if at_once:
                counts = await asyncio.gather(
                    *(evaluated(client, run, body) for run, body in zip(runs, bodies, strict=True))
                )
                totals[is_pinned] = sum(counts)
            else:
                totals[is_pinned] = 0
                for prompts in zip(*runs, strict=True):
                    for messages, body in zip(prompts, bodies, strict=True):
                        totals[is_pinned] += await evaluated(client, [messages], body)
    # docs/prompt-cache.md has the numbers of 2026-11-30, and says why.
    assert totals[False] < 1.2 * sum(last) < totals[True]
