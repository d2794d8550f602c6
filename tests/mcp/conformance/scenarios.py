"""Which scenarios of the conformance suite apply to us, which do not and why, and what each may leave undone.

The suite knows more: those on authorization are not listed here, for there is no OAuth, and neither are extensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

Role = Literal["client", "server"]

OLD: Final = "2025-11-25"
NEW: Final = "2026-07-28"
BOTH: Final = (OLD, NEW)

RUN: Final[Mapping[Role, Mapping[str, Sequence[str]]]] = {
    "client": {
        "initialize": [OLD],
        "tools_call": BOTH,
        "sse-retry": [OLD],
        "request-metadata": [NEW],
        "sep-2322-client-request-state": [NEW],
        "http-standard-headers": [NEW],
        "http-custom-headers": [NEW],
        "http-invalid-tool-headers": [NEW],
        "json-schema-ref-no-deref": [NEW],
        "json-schema-2020-12-preservation": BOTH,
    },
    "server": {
        "server-initialize": [OLD],
        "server-session-lifecycle": [OLD],
        "server-stateless": [NEW],
        "ping": [OLD],
        "tools-list": BOTH,
        "tools-call-simple-text": BOTH,
        "tools-call-error": BOTH,
        "tools-call-with-progress": BOTH,
        "json-schema-2020-12": BOTH,
        "server-sse-multiple-streams": BOTH,
        "dns-rebinding-protection": BOTH,
        "caching": [NEW],
        "http-header-validation": [NEW],
    },
}
"""Scenarios, and the revisions of the protocol in which they are run."""

_ASKS: Final = "it needs a client that puts a server's questions to a person (elicitation), which ours does not"
_FIXTURE: Final = "it needs a tool of the suite's that asks back or logs, which none of ours does"
_ABSENT: Final = "there are no prompts and no resources"
EXCUSED: Final[Mapping[str, Mapping[str, str]]] = {
    "sep-2322-client-request-state": {
        "sep-2322-client-request-state-echoed": _ASKS,
        "sep-2322-client-jsonrpc-id-different": _ASKS,
        "sep-2322-client-no-state-omitted": _ASKS,
    },
    "server-stateless": {
        "ServerRejectsUndeclaredCapability": _FIXTURE,
        "MissingCapabilityHttp400": _FIXTURE,
        "HttpServerNoIndependentRequestsOnStream": _FIXTURE,
        "ServerNoLogWithoutLogLevel": _FIXTURE,
    },
    "caching": {
        "PromptsListCachingHints": _ABSENT,
        "ResourcesListCachingHints": _ABSENT,
        "ResourcesTemplatesListCachingHints": _ABSENT,
    },
}
"""Checks of a scenario that fail, by their names, and why that is right."""

_CONTENT: Final = "answers are text"
_NEVER: Final = "the server never asks its client for anything"
NOT_RUN: Final[Mapping[Role, Mapping[str, str]]] = {
    "client": {"elicitation-sep1034-client-defaults": _ASKS},
    "server": {
        "logging-set-level": "the server sends no log messages",
        "tools-call-with-logging": "the server sends no log messages",
        "completion-complete": "there are no prompts and resources whose arguments could be completed",
        "tools-call-image": _CONTENT,
        "tools-call-audio": _CONTENT,
        "tools-call-embedded-resource": _CONTENT,
        "tools-call-mixed-content": _CONTENT,
        "tools-call-sampling": _NEVER,
        "tools-call-elicitation": _NEVER,
        "elicitation-sep1034-defaults": _NEVER,
        "elicitation-sep1330-enums": _NEVER,
        "server-sse-polling": "resuming a stream on HTTP; the server is one for stdio",
        "http-custom-header-server-validation": "no tool has its arguments mirrored into headers",
        **dict.fromkeys(
            [
                "resources-list",
                "resources-read-text",
                "resources-read-binary",
                "resources-templates-read",
                "resources-subscribe",
                "resources-unsubscribe",
                "sep-2164-resource-not-found",
                "prompts-list",
                "prompts-get-simple",
                "prompts-get-with-args",
                "prompts-get-embedded-resource",
                "prompts-get-with-image",
            ],
            _ABSENT,
        ),
        **dict.fromkeys(
            [
                "input-required-result-basic-elicitation",
                "input-required-result-basic-sampling",
                "input-required-result-basic-list-roots",
                "input-required-result-request-state",
                "input-required-result-multiple-input-requests",
                "input-required-result-multi-round",
                "input-required-result-missing-input-response",
                "input-required-result-non-tool-request",
                "input-required-result-result-type",
                "input-required-result-unsupported-methods",
                "input-required-result-tampered-state",
                "input-required-result-capability-check",
                "input-required-result-ignore-extra-params",
                "input-required-result-validate-input",
            ],
            _NEVER,
        ),
    },
}
"""Scenarios that would fail, or pass for the wrong reason."""
