"""`Credentials`: the headers of every request to a server, and the secrets in them, which no error may repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lmbridge._version import __version__
from lmbridge.transport.headers import basic_auth, merge_headers, secret_pattern, secrets_in
from lmbridge.transport.options import own_secrets


class Credentials:
    """The headers of every request to a server, and the secrets in them.

    Args:
        api_key: The key that is sent as a bearer token, or None.
        auth: The user and the password that are sent instead of a key, or None.
        proxy: The URL of the proxy, whose password is a secret as well, or None.
        headers: The headers that the user adds. They replace those of lmbridge that have the same name.

    Attributes:
        headers: The headers of a request without a body.
        json_headers: The headers of a request with a body.
    """

    def __init__(
        self, api_key: str | None, auth: tuple[str, str] | None, proxy: str | None, headers: Mapping[str, str]
    ) -> None:
        self._key_pattern = secret_pattern(own_secrets(api_key, auth, proxy))
        self._header_pattern = secret_pattern(secrets_in(headers))
        own = {"User-Agent": f"lmbridge/{__version__}"}
        if api_key is not None:
            own["Authorization"] = f"Bearer {api_key}"
        elif auth is not None:
            own["Authorization"] = basic_auth(*auth)
        self.headers: Final = merge_headers(own, headers)
        self.json_headers: Final = merge_headers({"Content-Type": "application/json"}, self.headers)

    @property
    def has_key(self) -> bool:
        """Whether requests have a header with a key."""
        return any(name.lower() in ("authorization", "x-api-key") for name in self.headers)

    def redact(self, text: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the text with "[api_key]" in place of the key, which some servers quote in their errors.

        Args:
            text: A text for an error or a log line.
            headers: The headers of one request. Their values are replaced by "[header]".
        """
        if self._key_pattern is not None:
            text = self._key_pattern.sub("[api_key]", text)
        if self._header_pattern is not None:
            text = self._header_pattern.sub("[header]", text)
        if headers and (pattern := secret_pattern(secrets_in(headers))) is not None:
            text = pattern.sub("[header]", text)
        return text
