"""`Interpreter`: how the client layer reads the replies of servers, for a transport that only sees bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from lmbridge.transport.retry import Classify

if TYPE_CHECKING:
    from lmbridge.transport.calls import Call, TokenUsage
    from lmbridge.transport.node import FindModels

_LARGEST_ERROR: Final = 100_000
"""A reply with a good status, or an event, is not searched for an error if it has more bytes than this."""


def _never_reports_error(_data: bytes) -> bool:
    return False


def _never_reports_progress(_data: bytes) -> bool:
    return False


def _finds_no_usage(_body: bytes) -> TokenUsage | None:
    return None


def _reports_no_loss(_call: Call, _status: int, _body: bytes) -> None:
    pass


def _never_concerns_server(_status: int, _body: bytes) -> bool:
    return False


@attrs.frozen(kw_only=True)
class Interpreter:
    """Functions of the client layer that interpret what a server says. Many requests share the same ones."""

    classify: Classify
    """Decides from the status, the headers and the body of an error reply whether the request is sent again."""
    reports_error: Callable[[bytes], bool] = _never_reports_error
    """Decides whether the body of a reply, or the data of an event, is an error although the status is good."""
    reports_progress: Callable[[bytes], bool] = _never_reports_progress
    """Decides whether the data of an event only reports the progress of a prompt, and so is not a part of the reply."""
    read_usage: Callable[[bytes], TokenUsage | None] = _finds_no_usage
    """Finds the numbers of tokens in the body of a reply. They go into the log."""
    concerns_server: Callable[[int, bytes], bool] = _never_concerns_server
    """Decides from the status and the body of an error reply whether another server may answer the request, because
    this one does not have the model, for example. It is asked only if there are several servers."""
    report_loss: Callable[[Call, int, bytes], None] = _reports_no_loss
    """Informs the schedule of a server if the status and the body of an error reply show that the server has lost a
    model. It is called if another server gets the request, because then nothing else reads the reply."""
    find_models: FindModels | None = None
    """Asks a server which models it has. It is called only if there are several servers, and not for every request."""

    def is_error(self, data: bytes) -> bool:
        """Returns what `reports_error` does for small data, and False for data that is larger than any error.

        To find out whether data is an error, it has to be decoded, and a large reply would hold up the event loop.

        Args:
            data: The body of a reply with a good status, or the data of an event.
        """
        return len(data) <= _LARGEST_ERROR and self.reports_error(data)
