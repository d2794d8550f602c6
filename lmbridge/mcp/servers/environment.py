"""Chooses the environment variables of a stdio server, and finds those that it may have needed but did not get.

A server gets the variables of its entry, and from this process only those that are listed here. The alternative, to
pass on everything, would give each server the keys of all other services. The list begins with the variables that the
official SDKs pass on. Proxies and CA bundles are added, because in many companies `npx` and `uvx` cannot download
anything without them, and the server cannot reach the network afterwards. These variables describe the way to the
network and the certificates to trust, and are rarely secret. The exception is a password in the URL of a proxy, which
is removed from what errors quote.

Package indexes (`npm_config_registry`, `PIP_INDEX_URL`, `UV_INDEX_URL`) are not passed on: their URLs often contain a
token, and `~/.npmrc`, `pip.conf` and `uv.toml` work without a variable. If the start of a server fails, the error names
those of the missing variables that may be the reason.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePath
from typing import Final
from urllib.parse import unquote, urlsplit

from lmbridge.mcp.config.server_spec import ServerSpec

_SDK_VARIABLES: Final = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
"""The variables that the official MCP SDKs pass on to servers."""
_PROXY_VARIABLES: Final = tuple(
    name for upper in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for name in (upper, upper.lower())
)
_CERTIFICATE_VARIABLES: Final = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "npm_config_cafile",
    "NPM_CONFIG_CAFILE",
)
INHERITED_VARIABLES: Final = (*_SDK_VARIABLES, *_PROXY_VARIABLES, *_CERTIFICATE_VARIABLES)
"""The variables of this process that every stdio server gets, if they are set."""

_NODE_VARIABLES: Final = r"(?:npm_config|yarn|bun|nvm|volta|fnm)_.+|npm_token|node_auth_token|node_options"
_RUNNER_VARIABLES: Final = {
    **dict.fromkeys(("npx", "npm", "pnpm", "pnpx", "yarn", "bun", "bunx"), _NODE_VARIABLES),
    **dict.fromkeys(("uv", "uvx"), r"uv_.+"),
    "pipx": r"(?:pipx|pip)_.+",
    **dict.fromkeys(("docker", "podman"), r"docker_.+|container_host"),
    "deno": r"deno_.+",
}
"""The variables that change how a package runner downloads and starts a package, and from where."""
_LOADER_VARIABLES: Final = ("PYTHONPATH", "NODE_PATH", "LD_LIBRARY_PATH")
"""Variables without which a program may not find its own modules."""
_COMMON_WORDS: Final = frozenset(
    {
        *("server", "servers", "mcp", "modelcontextprotocol", "model", "context", "protocol", "stdio", "lmbridge"),
        *("node", "python", "package", "latest", "index", "main", "dist", "build", "import", "sys", "print"),
        *("home", "user", "path", "file", "http", "https", "local"),
    }
)
"""Words that are too common to show that a variable belongs to a command, even if both contain them."""
_MOST_NAMED: Final = 8
"""The maximum number of missing variables that an error names."""


def base_environment() -> dict[str, str]:
    """Returns the few variables of this process's environment that every server gets."""
    values = {name: os.environ.get(name, "") for name in INHERITED_VARIABLES}
    # A value that begins with () is a function that a shell exported; the official SDKs leave those out as well.
    return {name: value for name, value in values.items() if value and not value.startswith("()")}


def missing_variables(spec: ServerSpec, stderr: str) -> list[str]:
    """Returns the names of variables of this process that a server did not get and that it may have needed.

    These are, in this order: the variables that the server's stderr mentions; those whose first word is in the server's
    name or command line, such as GITHUB_TOKEN for `server-github`; if a package runner starts the server, those that
    the runner reads; and the search paths of modules.
    """
    passed = {*base_environment(), *spec.env}
    missing = [name for name in os.environ if name not in passed]
    # The folders of a path say nothing about what the program does.
    parts = [PurePath(part).name if part.startswith("/") else part for part in (spec.command, *spec.args)]
    words = set(re.findall(r"[a-z]{3,}", " ".join((spec.name, *parts)).lower())) - _COMMON_WORDS
    mentioned = set(re.findall(r"\w+", stderr))
    runner_variable = re.compile(_RUNNER_VARIABLES.get(PurePath(spec.command).stem, "(?!)"), re.IGNORECASE)
    ranked = [
        *(name for name in missing if name in mentioned and "_" in name),
        *(name for name in missing if "_" in name and name.partition("_")[0].lower() in words),
        *(name for name in missing if runner_variable.fullmatch(name)),
        *(name for name in missing if name in _LOADER_VARIABLES),
    ]
    return list(dict.fromkeys(ranked))[:_MOST_NAMED]


def redact_proxy_passwords(text: str) -> str:
    """Returns a text with `***` in place of the passwords in the URLs of proxies."""
    for name in _PROXY_VARIABLES:
        url = os.environ.get(name, "")
        try:
            password = urlsplit(url if "//" in url else f"//{url}").password
        except ValueError:
            continue
        for secret in {password, unquote(password)} if password else ():
            text = text.replace(secret, "***")
    return text
