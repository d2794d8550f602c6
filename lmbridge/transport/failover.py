"""`Delivery`: the path of one request through several servers, until one of them answers or none is left to try.

Which requests may be sent to another server, and which of them count as retries:

- A request that a server has certainly not seen, because no connection was made, goes on to the next server that has
  not been tried. So does a request that only this server refuses: it does not have the model, cannot load it, does not
  accept the key, or does not have the response that is to be continued. Neither case counts as a retry.
- A request whose connection broke before the first event of its answer, or that failed with a temporary error, goes on
  as well if it may be sent again at all. It counts as a retry, and all servers share `max_retries`.
- If every server was tried, the request waits as it would with one server, and is sent again.
- Once an answer has begun, its request is never sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lmbridge.transport.calls import Reply
from lmbridge.transport.decompression import decompressed_beginning
from lmbridge.transport.failover_interface import MovedToAnotherServer
from lmbridge.transport.forwarding import ForwardedResponse
from lmbridge.transport.node import Node, with_model
from lmbridge.transport.prefix import SentConversation
from lmbridge.transport.retry import MAX_RETRIES, REFUSED_BEFORE_WORK, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmbridge.transport.calls import Call, Request
    from lmbridge.transport.events import EventStream
    from lmbridge.transport.http_interface import ConnectionFailed

_REFUSED_KEY: Final = (401, 403)


class Delivery:
    """The servers that a request has been given to, and the decision whether another one gets it.

    It is the `Failover` of the request, whose docstrings describe `attempts`, `retries`, `seconds` and `tried`.

    Args:
        nodes: All servers.
        request: The request.
        conversation: The conversation that the request continues, by which its server is recognized.
    """

    def __init__(self, nodes: Sequence[Node], request: Request, conversation: SentConversation) -> None:
        self.request: Final = request
        """The request."""
        self.conversation: Final = conversation
        """The conversation that the request continues, by which its server is recognized."""
        self.attempts: int = 0
        self.retries: int = 0
        self.seconds: float = 0.0
        self.tried: list[str] = []
        self._nodes = nodes
        self._failed: set[Node] = set()
        # The servers that may have the model, judged when the first server was chosen; None before that.
        self._listing: list[Node] | None = None
        self._node = nodes[0]

    def candidates(self) -> list[Node]:
        """Returns the servers that may have the model, without those that have failed in this round of attempts.

        If all of them have failed, it returns them again. If no server listed the model, it returns all servers: one of
        them may have the model nevertheless, and if none has it, the user gets the error of a server.
        """
        with_it = self._with_model()
        return [node for node in with_it if node not in self._failed] or with_it

    def _with_model(self) -> list[Node]:
        with_it = with_model(self._nodes, self.request.model)
        if self._listing is None:
            self._listing = with_it
        if not self._listing:
            return list(self._nodes)
        # Even if all these servers turn out not to have the model, those that did not list it are not asked.
        return with_it or self._listing

    def begin_at(self, node: Node) -> None:
        """Records that a server gets the request."""
        self._node = node

    # The servers' answers

    def on_admission(self, call: Call) -> None:
        """Moves the request on if its server has failed while it was waiting."""
        if self._node.is_down and self._has_alternative(call):
            self._note("failed while the request was waiting for a permit")
            self._move(call)

    def on_failure(self, call: Call, failure: ConnectionFailed, reason: str) -> None:
        """Moves the request on after an attempt without a reply, if it may be sent again."""
        self._note(reason)
        if failure.blames_server:
            self._node.note_failure(call.deadline_timer.time(), reason)
        if failure.unsent:
            # Even if every server is down, each gets an attempt, because one of them may work again.
            if self._has_alternative(call, may_be_down=True):
                self._move(call)
        elif failure.verdict is not Verdict.RETRY or not call.request.repeatable:
            return
        if not self._has_budget(call):
            return
        if self._has_alternative(call):
            self._move(call, is_retry=True)
        # No other server is left to try. After a wait, all servers are candidates again, because any may work by then.
        if failure.verdict is Verdict.RETRY and (wait := call.wait_before_next(Verdict.RETRY, None)) is not None:
            self._failed.clear()
            self._move(call, wait=wait)

    def on_error_reply(self, call: Call, reply: Reply) -> None:
        """Moves the request on after a temporary error, if it may be sent again.

        While the server is loading the model, the request moves on only to a server that has loaded it.
        """
        verdict = call.request.interpreter.classify(reply.status, reply.headers, reply.plain_body)
        if verdict is Verdict.POLL:
            if self._has_alternative(call, state="loaded"):
                self._note(f"status {reply.status}, loading")
                self._move(call)
        elif verdict is Verdict.RETRY:
            self._note(f"status {reply.status}")
            if reply.status >= 500:
                self._node.note_failure(call.deadline_timer.time(), f"status {reply.status}")
            may_repeat = call.request.repeatable or reply.status in REFUSED_BEFORE_WORK
            if may_repeat and self._has_budget(call) and self._has_alternative(call):
                self._move(call, is_retry=True)

    def on_answer(self, call: Call, answer: Reply | EventStream | ForwardedResponse) -> None:
        """Moves the request on if an answer shows that this server cannot serve the request, while another one may."""
        status, body = answer.status, whole_body(answer)
        if body is None or not self._is_refusal(status, body):
            if status < 500:
                self._node.note_success()
            return
        self._note(f"status {status}")
        if status in _REFUSED_KEY:
            self._node.note_failure(call.deadline_timer.time(), f"status {status}, which refuses the key")
        else:
            self._node.note_success()
            if self.request.interpreter.concerns_server(status, body):
                self._node.refuse(self.request.model)
        may_repeat = self.request.repeatable or status < 500 or status in REFUSED_BEFORE_WORK
        if may_repeat and self._has_alternative(call):
            self.request.interpreter.report_loss(call, status, body)
            self._move(call)

    def _is_refusal(self, status: int, body: bytes) -> bool:
        """Returns whether an answer is an error that concerns this server and not the request."""
        if status < 400 and not self.request.interpreter.is_error(body):
            return False
        if self.conversation.previous_response_id is not None and status in (400, 404):
            return True
        return self.request.interpreter.concerns_server(status, body)

    # Moving

    def _has_alternative(self, call: Call, state: str | None = None, *, may_be_down: bool = False) -> bool:
        """Returns whether there is another server for the request: it works, has not failed, and may have the model.

        Args:
            call: The call at the current server.
            state: The state that the model must have on the other server. By default, any state but "missing" will do.
            may_be_down: Whether a server that is down counts as well.
        """
        if call.deadline_timer.time() >= call.total_deadline:
            return False
        if self._listing and not with_model(self._nodes, self.request.model):
            return False
        return any(
            not ((node.is_down and not may_be_down) or node in self._failed or node is self._node)
            and (state is None or node.state_of(self.request.model) == state)
            for node in self._with_model()
        )

    def _has_budget(self, call: Call) -> bool:
        return call.retries < min(self.request.max_retries, MAX_RETRIES)

    def _note(self, reason: str) -> None:
        self.tried.append(f"{self._node.transport.api_base}: {reason}")

    def _move(self, call: Call, *, is_retry: bool = False, wait: float = 0.0) -> None:
        """Takes the request away from the current server.

        Raises:
            MovedToAnotherServer: Always. The pool catches it, and chooses the next server.
        """
        self._failed.add(self._node)
        self.attempts = call.attempts
        self.retries = call.retries + is_retry
        self.seconds = call.seconds + wait
        raise MovedToAnotherServer(wait)


def whole_body(answer: Reply | EventStream | ForwardedResponse) -> bytes | None:
    """Returns the body of an answer, or None if the body has not arrived completely.

    If a forwarded stream begins with an event that reports an error of the server, the result is the data of that
    event. A body that is still compressed is decompressed; if it is large, only its beginning is returned.
    """
    if isinstance(answer, Reply):
        return answer.plain_body
    if isinstance(answer, ForwardedResponse) and answer.error_event is not None:
        return answer.error_event
    if isinstance(answer, ForwardedResponse) and answer.whole_body is not None:
        return decompressed_beginning(answer.whole_body, answer.headers.get("Content-Encoding"))
    return None
