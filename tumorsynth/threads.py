"""CPU threads: one for small operators, the program's own number for networks.

Torch's threads spin while they wait for each other at the end of an operator. Beside another busy
program each wait can last a time slice of the scheduler, and thousands of small operators add up.

``torch.set_num_threads`` acts on the whole process, including the threads of the program around.
The OpenMP that torch loaded keeps one number per thread, and so does MKL. Without access to them
everything runs on the threads that torch has.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = {"win32": ("libiomp5md.dll",), "darwin": ("libtorch_cpu.dylib",)}
_OPENMP, _MKL = "omp_set_num_threads", "MKL_Set_Num_Threads_Local"


class _Outside(threading.local):
    """This thread's numbers outside of `one_thread`, of torch and of MKL; 0 if there is none."""

    threads = 0
    mkl = 0


_outside = _Outside()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run operators of this thread on one CPU thread, except within `own_threads`.

    Restores the number at the end, also after an exception. Other threads keep theirs.
    """
    set_openmp, set_mkl = _setters()
    now = torch.get_num_threads()  # in a new thread, torch sets its number with this call
    if set_openmp is None or (now == 1 and not _outside.threads):
        yield
        return
    outermost = not _outside.threads
    set_openmp(1)
    mkl = set_mkl(1)
    if outermost:
        _outside.threads, _outside.mkl = now, mkl
    try:
        yield
    finally:
        if outermost:
            _outside.threads = 0
        set_openmp(now)
        set_mkl(mkl)


@contextmanager
def own_threads() -> Iterator[None]:
    """Run operators on as many threads within `one_thread` as outside of it."""
    set_openmp, set_mkl = _setters()
    if set_openmp is None or not _outside.threads:
        yield
        return
    now = torch.get_num_threads()
    set_openmp(_outside.threads)
    mkl = set_mkl(_outside.mkl)
    try:
        yield
    finally:
        set_openmp(now)
        set_mkl(mkl)


def waits_busily() -> bool:
    """Return whether waiting threads spin, which takes processor time from other programs.

    OpenMP reads the variable once, when torch loads.
    """
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() != "passive"


@cache
def _setters() -> tuple[Any, Any]:
    """Return the functions that set this thread's number in OpenMP and in MKL.

    The first is None without a known OpenMP. The second returns MKL's number so far.
    """
    for library in _libraries():
        set_openmp = getattr(library, _OPENMP, None)
        if set_openmp is not None and _is_torchs(set_openmp):
            return set_openmp, getattr(library, _MKL, lambda number: 0)
    return None, None


def _libraries() -> Iterator[ctypes.CDLL]:
    """Yield torch's own libraries, through which symbols of the linked ones are found too."""
    folder = Path(torch.__file__).parent / "lib"
    for name in _LIBRARIES.get(sys.platform, ("libtorch_cpu.so",)):
        try:
            yield ctypes.CDLL(str(folder / name))
        except OSError:
            continue


def _is_torchs(set_openmp: Any) -> bool:
    """Return whether torch uses this OpenMP; the process may have loaded another one too."""
    now = torch.get_num_threads()
    try:
        set_openmp(now + 1)
        return torch.get_num_threads() == now + 1
    finally:
        set_openmp(now)
