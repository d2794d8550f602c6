"""Notices that a reply of a run names another model than the replies before it."""

from __future__ import annotations

from lmbridge.agent.run_record import RunRecord
from lmbridge.client.served_model import is_same_model
from lmbridge.errors import ModelChangedDuringExecutionError


def check_served_model(record: RunRecord, name: str | None, *, begins_reply: bool, may_change: bool) -> None:
    """Compares the model that a reply names with the one that earlier replies of the run named.

    Args:
        record: Everything that the run has done. It keeps the first name.
        name: The model that the reply names, or None if it names none.
        begins_reply: Whether this is the first name in the reply, so that the named model has written all of it.
        may_change: Whether the names may change, because `model_mismatch` is "ignore".

    Raises:
        ModelChangedDuringExecutionError: The reply names another model.
    """
    first = record.served_model
    if not name or first is None:
        record.served_model = name or first
    elif not (may_change or is_same_model(first, name) or is_same_model(name, first)):
        if begins_reply:
            # Nothing of this reply was written by the model of the run.
            record.begin_reply()
        raise ModelChangedDuringExecutionError(
            f"the run began with model {first!r} and went on with {name!r}",
            first,
            name,
            hint="the server swapped models during the run; pass a model name; see Limits.max_loaded_models",
            context={"operation": "agent run", "model": record.model},
        )
