"""The errors that a user can put right; the command line prints their message, one sentence, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, where, and what to do."""


class BadInput(UserError, ValueError):
    """An option or a file that cannot be used as it is."""


class CannotWrite(UserError, OSError):
    """A file or a folder of results cannot be written."""
