"""The fused search finds the nearest codes, interpreted and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which comes with torch for CUDA"
)


def run(interpreted: str) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "fused_search.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpreted},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_interpreted():
    run("1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    run("0")
