"""Warn once for each transform, also where worker processes share it."""

from __future__ import annotations

import mmap
import sys
import warnings
from pathlib import Path
from typing import Any

_OURS = str(Path(__file__).parent)


class Once:
    """A warning that is given once; every transform has one of its own for each kind of warning.

    Processes that are forked from this one, as a loader's workers, share it. A copy or a pickle
    remembers whether the warning was given.

    Examples:
        >>> warning = Once()
        >>> warning.give("spacing must be given, ...")
        >>> warning.give("spacing must be given, ...")  # says nothing
    """

    def __init__(self, given: bool = False) -> None:
        self._page = mmap.mmap(-1, 1)  # shared memory, which a fork does not copy
        self._page[0] = given

    @property
    def given(self) -> bool:
        """Whether the warning was given."""
        return bool(self._page[0])

    def first(self) -> bool:
        """Return whether the warning was not given yet; it counts as given from now on."""
        first = not self.given
        self._page[0] = True
        return first

    def give(self, message: str, category: type[Warning] = UserWarning) -> None:
        """Warn, unless that was done before."""
        if not self.first():
            return
        # without a registry: Python's own would show equal words of two transforms only once
        warnings.warn_explicit(message, category, *_caller())

    def __reduce__(self) -> tuple[Any, ...]:
        return Once, (self.given,)


def _caller() -> tuple[str, int]:
    """Return the file and line that called tumorsynth, for the warning to show."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _is_inside(file: str) -> bool:
    """Return whether a file belongs to tumorsynth, or to the decorators that lie between."""
    return file.startswith(_OURS) or "torch" in Path(file).parts or file.endswith("contextlib.py")
