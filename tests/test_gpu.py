"""The checks of benchmarks/gpu/gpu_checks.py: all on a GPU, and on the CPU that they run at all."""

from __future__ import annotations

import pytest
import torch

gpu_checks = pytest.importorskip(
    "benchmarks.gpu.gpu_checks", reason="needs the benchmarks beside the tests"
)
NAMES = [check.__name__ for check in gpu_checks.CHECKS]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name):
    getattr(gpu_checks, name)(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("name", [name for name in NAMES if "compiled" not in name])
def test_the_check_runs(name):
    getattr(gpu_checks, name)(torch.device("cpu"))
