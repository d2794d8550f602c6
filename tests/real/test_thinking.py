"""A model that does not stop thinking, on a real llama.cpp server.

SmolLM2 does not think by itself. The template makes it, unless the request switches thinking off.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lmbridge import Agent, LLMClient, LocalServer

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


async def test_a_run_gets_an_answer_from_a_model_that_would_think_for_ever(tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    template = tmp_path / "thinking.jinja"
    template.write_text(TEMPLATE)
    async with LocalServer(n_ctx=2048, chat_template=template) as server, LLMClient(server.api_base) as client:
        result = await Agent(client, max_tokens=12, temperature=0).run("What is the capital of France?")
    [nudge] = result.log[0].nudges
    assert nudge.kind in ("only_reasoning", "cut_reasoning")
    assert nudge.without_thinking
    assert result.text.strip()
    assert not result.reasoning
