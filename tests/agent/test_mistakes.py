"""A run solves its task whichever mistake of the benchmark a model makes, if it obeys a clear message about it."""

from __future__ import annotations

import pytest

from benchmarks.solving.mistakes import MISTAKES, Mistake
from benchmarks.solving.model import FallibleModel
from benchmarks.solving.tasks import make_task
from lmbridge import Agent, LLMClient
from lmbridge.testing import ScriptedServer


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=[each.name for each in MISTAKES])
async def test_a_mistake_in_each_reply_loses_no_task(
    scripted_server: ScriptedServer, client: LLMClient, mistake: Mistake
) -> None:
    model = FallibleModel(1.0, [], seed=1)
    model.mistakes = [mistake]
    scripted_server.default = model
    task = make_task(7)
    result = await Agent(client, tools=task.tools()).run(task.prompt)
    assert task.is_solved(result.text)
    assert model.made[task.number]
    assert model.invalid_histories == {}
