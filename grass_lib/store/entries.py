"""JSON values of a manifest: copied, written, hashed, and named in messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from grass_lib.errors import UsageError


def as_json(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of JSON values.

    Raises:
        UsageError: Something else is in it.
    """
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} of a gradient store: {error}; expected JSON values only") from error


def encoded(value: object, indent: int | None = None) -> bytes:
    """JSON: the same bytes for the same value."""
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def sha256_of(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(encoded(value)).hexdigest()


def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested entries by names with dots."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        result.update(flat(f"{path}.", value) if isinstance(value, dict) and value else {path: value})
    return result


def short(value: object) -> str:
    """A value for a message."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
