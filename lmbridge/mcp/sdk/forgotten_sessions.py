"""Recognizes answers of a server that may have forgotten the session.

Whether a server has forgotten a session is not guessed from the words of its answer. According to the protocol, the
status 404 without a JSON-RPC error means that it has. After any other refusal that may have this reason, lmbridge sends
a `ping` to find out. If the status reports success, the server has accepted the request. In that case, a ping is sent
only if the error in the answer mentions an unknown session.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from lmbridge._jsonrpc_ids import is_answer, read_id
from lmbridge.mcp.jsonrpc import METHOD_NOT_FOUND

SESSION_STATUSES: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
"""The statuses with which servers refuse a ping in a session that they do not know."""
_SESSION_NOT_FOUND: Final = -32001
"""The code that servers use for a session that they do not know."""
_SESSION_WORDS: Final = re.compile("session|initiali[sz]ed", re.IGNORECASE)
"""Words in the error of a refused request that may mean that the server does not know the session."""
_UNKNOWN_SESSION: Final = re.compile(
    r"\b(?:no|unknown|invalid|expired|missing)\b.{0,30}\bsession"
    r"|\b(?:not |un)initiali[sz]ed"
    r"|\bsession.{0,60}\b(?:(?:not|n't) (?:found|valid|known|exist|recogni[sz]ed|active)|no longer|unknown|invalid"
    r"|expired|terminated|missing|required)\b",
    re.IGNORECASE | re.DOTALL,
)
"""Words in an error which say that the server does not know the session."""
_TIMED_OUT: Final = re.compile("timed?[ -]?out", re.IGNORECASE)
"""Words in errors that have the code of an unknown session but report a timeout. Some servers use it for both."""


def is_suspicious(found: tuple[Any, Mapping[str, Any]] | None, request_id: Any, status: int) -> bool:
    """Returns whether the refusal of a request may mean that the server does not know the session.

    A server that does not know the session refuses a request before it reads the request's id. So an error whose id is
    not that of the request is suspicious, whatever it says.

    Args:
        found: The id and the error in the body of the refusal, or None.
        request_id: The id of the request.
        status: The HTTP status.
    """
    if found is None:
        return status in SESSION_STATUSES
    answered_id, error = found
    is_own = read_id(answered_id) == read_id(request_id)
    return not is_own or error["code"] == _SESSION_NOT_FOUND or _SESSION_WORDS.search(error["message"]) is not None


def names_unknown_session(error: Any) -> bool:
    """Returns whether an error says in its code or its words that the server does not know the session."""
    words = error_words(error)
    code = error.get("code") if isinstance(error, dict) else None
    is_code = code == _SESSION_NOT_FOUND and _TIMED_OUT.search(words) is None
    return is_code or _UNKNOWN_SESSION.search(words) is not None


def error_words(error: Any) -> str:
    """Returns the message of an error, or the whole error as text if it is not an object."""
    return str(error.get("message", "") if isinstance(error, dict) else error)


def shows_forgotten(values: list[Any], ping_id: int) -> bool | None:
    """Returns whether the answer to a ping shows that the server has forgotten the session; None if it does not say."""
    for value in values:
        if isinstance(value, dict) and is_answer(value):
            error = value.get("error")
            is_known = error is None or (isinstance(error, dict) and error.get("code") == METHOD_NOT_FOUND)
            if is_known and read_id(value.get("id")) == ping_id:
                return False
            if error is not None and names_unknown_session(error):
                return True
    return None
