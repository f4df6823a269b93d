"""What a user can get wrong, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot be used; the message is shown as it is."""

    exit_code = 1


class Interrupted(UserError):
    """Someone pressed Ctrl-C; the message says what was kept."""

    exit_code = 130


@contextmanager
def user_input() -> Iterator[None]:
    """A ValueError inside is about what the user gave, not about this program."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
