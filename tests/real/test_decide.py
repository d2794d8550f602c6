"""`decide()` on a real llama.cpp server whose model is an ordinary chat model."""

from __future__ import annotations

import pytest

from lmbridge import Choice, LLMClient, ModelMismatchError, Score, TrueFalse

pytestmark = pytest.mark.real

TONE = Choice("What is the sentiment of the text?", ["positive", "negative"])


async def test_the_server_says_that_a_chat_model_is_not_a_decision_model(client: LLMClient) -> None:
    with pytest.raises(ModelMismatchError, match="is not a decision model") as caught:
        await client.decide("Thank you!", {"tone": TONE}, fallback=False)
    assert caught.value.status == 501


@pytest.mark.slow
async def test_the_fallback_ranks_texts_and_answers_questions_of_each_type(client: LLMClient) -> None:
    friendly = await client.decide("What a great day, thank you!", {"tone": TONE})
    angry = await client.decide("This is awful and I am angry.", {"tone": TONE})
    assert not friendly.calibrated
    assert friendly.answers["tone"].winner == "positive"
    chances = [each.answers["tone"].probabilities["positive"] for each in (friendly, angry)]
    assert chances[0] > chances[1]
    questions = {"money": TrueFalse("Is it about money?"), "urgency": Score("How urgent?", ["low", "high"])}
    answers = (await client.decide({"text": "Pay the invoice today."}, questions)).answers
    assert all(sum(each.probabilities.values()) == pytest.approx(1) for each in answers.values())
