"""CPU threads: one for small operators, the program's own number for networks.

Torch's threads spin while they wait for each other at the end of an operator. Beside another busy
program each wait can last a time slice of the scheduler, and thousands of small operators add up.

``torch.set_num_threads`` is the process's and would reach the threads of the program around. The
OpenMP that torch loaded keeps one number per thread, and so does MKL; where neither can be asked,
all runs on the threads that torch has.
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
    """This thread's numbers outside of `one_thread`: torch's, MKL's own; 0 for none."""

    threads = 0
    mkl = 0


_outside = _Outside()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run operators of this thread on one CPU thread, but for networks in `own_threads`.

    The number is restored at the end, also after an exception. Other threads keep theirs.
    """
    set_openmp, set_mkl = _setters()
    now = torch.get_num_threads()  # also has torch set the number of a new thread, once
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
    """Within `one_thread`: run operators of this thread on as many threads as outside of it."""
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
    """Whether threads that wait for each other take processor time from other programs; OpenMP
    reads the variable once, when torch is loaded."""
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() != "passive"


@cache
def _setters() -> tuple[Any, Any]:
    """Functions that set this thread's number in OpenMP, None where there is none, and in MKL,
    which returns its number so far."""
    for library in _libraries():
        set_openmp = getattr(library, _OPENMP, None)
        if set_openmp is not None and _is_torchs(set_openmp):
            return set_openmp, getattr(library, _MKL, lambda number: 0)
    return None, None


def _libraries() -> Iterator[ctypes.CDLL]:
    """Torch's own libraries: a symbol is looked up in what they were linked with as well."""
    folder = Path(torch.__file__).parent / "lib"
    for name in _LIBRARIES.get(sys.platform, ("libtorch_cpu.so",)):
        try:
            yield ctypes.CDLL(str(folder / name))
        except OSError:
            continue


def _is_torchs(set_openmp: Any) -> bool:
    """Whether torch counts the threads of this OpenMP; another one may be loaded beside it."""
    now = torch.get_num_threads()
    try:
        set_openmp(now + 1)
        return torch.get_num_threads() == now + 1
    finally:
        set_openmp(now)
