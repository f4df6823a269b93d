"""Errors of the user's input, shown as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot be used; the message is shown as it is."""

    exit_code = 1


class Interrupted(UserError):
    """The user pressed Ctrl-C; the message names the saved results."""

    exit_code = 130


@contextmanager
def user_input() -> Iterator[None]:
    """Convert a ValueError within the context to a UserError, because it is about the user's input."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
