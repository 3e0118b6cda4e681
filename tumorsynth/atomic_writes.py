"""Write files complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside ``path``, then rename it to ``path``.

    A kill at any moment leaves the old file or the new one, never part of one. An OSError names
    ``path``.

    Args:
        path: the file to write or replace.
        write: called with the open temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # left by a dead process of the same id
    try:
        with temporary.open("xb") as file:  # "x": never through a link that somebody put there
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # as for a full disk; an error without a number would lose its words
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to ``target``, complete or not at all."""
    with Path(source).open("rb") as file:
        write_atomic(target, lambda out: shutil.copyfileobj(file, out))
