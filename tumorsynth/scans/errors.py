"""What an error means for the user: the words, the exit code, and whether the run can continue."""

from __future__ import annotations

import errno

# full or read-only disks: every later scan would fail, too
FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_fatal(error: BaseException) -> bool:
    """Whether every later scan would fail with the same error."""
    return isinstance(error, OSError) and error.errno in FATAL_ERRNOS


def is_expected(error: BaseException) -> bool:
    """Whether the input or the machine is at fault, rather than this code."""
    return isinstance(error, (ValueError, TypeError, OSError, ImportError))


def exit_code(error: BaseException) -> int:
    """2 if the command or its input is at fault, 1 if the machine or this code is."""
    return 2 if is_expected(error) and not is_fatal(error) else 1


def describe_error(error: BaseException) -> str:
    """Describe an error in one line."""
    words = " ".join(str(error).split())
    if is_expected(error) and words:
        return words
    return f"unexpected {type(error).__name__}: {words} (--debug shows where)"
