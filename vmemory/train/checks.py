"""Checks that the classes of arguments share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def only_defaults(arguments: Any, reason: str) -> None:
    """Refuse values of fields that exist for other programs' recipes; their help is `reason`.

    Raises:
        ValueError: Such a field has another value than its default.
    """
    for known in fields(arguments):
        if known.metadata.get("help") == reason and getattr(arguments, known.name) != known.default:
            got = getattr(arguments, known.name)
            raise ValueError(f"{known.name}: expected the default {known.default!r}, {reason}, got {got!r}")
