from __future__ import annotations

import gc
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from tumorsynth.phantom import Phantom

ROOT = Path(__file__).resolve().parent.parent
# A worker takes a file at a time: these take minutes, and would otherwise be the last to start.
LONG_FILES = (
    "test_examples.py",
    "test_other_device.py",
    "test_training_resume.py",
    "test_collection.py",
    "test_training_cli.py",
    "test_gpu_session.py",
    "test_docs.py",
    "test_cli.py",
    "test_training_denoiser.py",
    "test_training_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first (with `--no-loadscope-reorder`)."""
    order = {name: k for k, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """Take all that is imported out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Give every test the same random numbers, alone and in any order.

    A transform without a seed would skip a faint tumour, or find no room, in some runs only.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if "monai.transforms" in sys.modules:  # all transforms without a state of their own share one
        sys.modules["monai.transforms"].Randomizable.R.seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference fixtures beside the repository, or a skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared, which is not there")
    return folder


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """A coarse phantom, made once for all tests: copy before changing it in place."""
    from phantoms import shared_phantom

    return shared_phantom((3.0, 3.0, 3.0))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measuring that ends a training, most of the time of a short one; for tests of the
    training itself."""
    from tumorsynth.training import autoencoder, denoiser

    for stage, name in ((autoencoder, "autoencoder"), (denoiser, "generator")):
        monkeypatch.setattr(stage, f"{name}_metrics", lambda *_: {})
