"""The scenarios of the conformance suite that are run, those that are not, and the checks that may fail, with reasons.

Scenarios on authorization and on extensions of the protocol are not listed, because lmbridge has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

Role = Literal["client", "server"]

REVISION_2025: Final = "2025-11-25"
REVISION_2026: Final = "2026-07-28"
BOTH_REVISIONS: Final = (REVISION_2025, REVISION_2026)

RUN: Final[Mapping[Role, Mapping[str, Sequence[str]]]] = {
    "client": {
        "initialize": [REVISION_2025],
        "tools_call": BOTH_REVISIONS,
        "sse-retry": [REVISION_2025],
        "elicitation-sep1034-client-defaults": [REVISION_2025],
        "request-metadata": [REVISION_2026],
        "sep-2322-client-request-state": [REVISION_2026],
        "http-standard-headers": [REVISION_2026],
        "http-custom-headers": [REVISION_2026],
        "http-invalid-tool-headers": [REVISION_2026],
        "json-schema-ref-no-deref": [REVISION_2026],
        "json-schema-2020-12-preservation": BOTH_REVISIONS,
    },
    "server": {
        "server-initialize": [REVISION_2025],
        "server-session-lifecycle": [REVISION_2025],
        "server-stateless": [REVISION_2026],
        "ping": [REVISION_2025],
        "tools-list": BOTH_REVISIONS,
        "tools-call-simple-text": BOTH_REVISIONS,
        "tools-call-error": BOTH_REVISIONS,
        "tools-call-with-progress": BOTH_REVISIONS,
        "json-schema-2020-12": BOTH_REVISIONS,
        "server-sse-multiple-streams": BOTH_REVISIONS,
        "dns-rebinding-protection": BOTH_REVISIONS,
        "caching": [REVISION_2026],
        "http-header-validation": [REVISION_2026],
    },
}
"""The scenarios that are run, each with the revisions of the protocol in which it is run."""

_NO_SUCH_TOOL: Final = "it needs a tool of the suite that asks its caller or sends log messages, which ours do not"
_NO_PROMPTS_OR_RESOURCES: Final = "the server has no prompts and no resources"
EXCUSED: Final[Mapping[str, Mapping[str, str]]] = {
    "server-stateless": {
        "ServerRejectsUndeclaredCapability": _NO_SUCH_TOOL,
        "MissingCapabilityHttp400": _NO_SUCH_TOOL,
        "HttpServerNoIndependentRequestsOnStream": _NO_SUCH_TOOL,
        "ServerNoLogWithoutLogLevel": _NO_SUCH_TOOL,
    },
    "caching": {
        "PromptsListCachingHints": _NO_PROMPTS_OR_RESOURCES,
        "ResourcesListCachingHints": _NO_PROMPTS_OR_RESOURCES,
        "ResourcesTemplatesListCachingHints": _NO_PROMPTS_OR_RESOURCES,
    },
}
"""The checks of a scenario that may fail, each with the reason."""

_TEXT_ONLY: Final = "the server's results are text"
_NEVER_ASKS: Final = "the server never sends requests to its client"
NOT_RUN: Final[Mapping[Role, Mapping[str, str]]] = {
    "client": {},
    "server": {
        "logging-set-level": "the server sends no log messages",
        "tools-call-with-logging": "the server sends no log messages",
        "completion-complete": "the server has no prompts or resources whose arguments could be completed",
        "tools-call-image": _TEXT_ONLY,
        "tools-call-audio": _TEXT_ONLY,
        "tools-call-embedded-resource": _TEXT_ONLY,
        "tools-call-mixed-content": _TEXT_ONLY,
        "tools-call-sampling": _NEVER_ASKS,
        "tools-call-elicitation": _NEVER_ASKS,
        "elicitation-sep1034-defaults": _NEVER_ASKS,
        "elicitation-sep1330-enums": _NEVER_ASKS,
        "server-sse-polling": "it resumes a stream on HTTP, and the server is meant for stdio",
        "http-custom-header-server-validation": "no tool sends its arguments in headers as well",
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
            _NO_PROMPTS_OR_RESOURCES,
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
            _NEVER_ASKS,
        ),
    },
}
"""The scenarios that are not run, because they would fail or pass for the wrong reason."""
