"""The fused search of the nearest code, on a GPU or by Triton's interpreter on the CPU.

Run by `test_nearest_triton.py`, in a process of its own: triton reads at its import which it is.
"""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch
from torch import Tensor

from tumorsynth.models import codebook as module
from tumorsynth.models.codebook import Codebook
from tumorsynth.models.nearest_triton import BLOCK_CODES, BLOCK_VOXELS, nearest

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True)
def fused_here(monkeypatch):
    monkeypatch.setattr(module, "fused_on", DEVICE.type)


def drawn(seed: int, shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    latent, codes = torch.randn(shape, generator=rng), torch.randn(size, shape[1], generator=rng)
    return latent.to(DEVICE), codes.to(DEVICE)


def exact(latent: Tensor, codes: Tensor) -> Tensor:
    """Squared distances in float64, (B, d, h, w, size)."""
    away = latent.double().movedim(1, -1)[..., None, :] - codes.double()
    return away.square().sum(-1)


@pytest.mark.parametrize(
    "shape, size, dtype",
    [
        ((1, 8, 4, 4, 4), 256, torch.float32),
        ((3, 8, 3, 5, 7), 2 * BLOCK_CODES + 1, torch.float32),
        ((2, 8, 1, 1, BLOCK_VOXELS + 1), BLOCK_CODES - 1, torch.bfloat16),
        ((2, 8, 1, 1, BLOCK_VOXELS + 1), BLOCK_CODES - 1, torch.float16),
        ((2, 3, 2, 3, 4), 100, torch.float32),
        ((2, 3, 2, 3, 4), 100, torch.bfloat16),
        ((5, 1, 1, 1, 1), 1, torch.float16),
    ],
)
def test_each_voxel_gets_a_nearest_code(shape, size, dtype):
    latent, codes = drawn(size, shape, size)
    latent = latent.to(dtype)
    found = nearest(latent, codes)
    assert found.dtype == torch.int64 and found.shape == (shape[0], *shape[2:])
    far = exact(latent, codes)
    chosen = far.gather(-1, found[..., None])[..., 0]
    torch.testing.assert_close(chosen, far.amin(-1), rtol=0, atol=1e-5)
    assert (found == far.argmin(-1)).float().mean() > 0.99


def test_of_equally_near_codes_the_first_is_taken():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-2, 3, (500, 4), generator=rng).float()  # whole numbers: nothing rounds
    latent = torch.randint(-2, 3, (2, 4, 3, 4, 5), generator=rng).float()
    latent, codes = latent.to(DEVICE), codes.to(DEVICE)
    far = exact(latent, codes)
    first = (far == far.amin(-1, keepdim=True)).int().argmax(-1)  # of ones, argmax is the first
    assert ((far == far.amin(-1, keepdim=True)).sum(-1) > 1).any()
    assert torch.equal(nearest(latent, codes), first)


@pytest.mark.parametrize("blocks", [(32, 64), (64, 16), (16, 1024)])
def test_the_blocks_decide_nothing(blocks):
    latent, codes = drawn(1, (2, 8, 3, 3, 5), 300)
    assert torch.equal(nearest(latent, codes, *blocks), nearest(latent, codes))


def test_any_layout_and_what_is_not_finite():
    latent, codes = drawn(2, (2, 8, 3, 4, 5), 100)
    last = latent.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(nearest(last, codes), nearest(latent, codes))
    latent[0, 0, 0, 0, 0], latent[1, 3] = torch.nan, torch.inf
    found = nearest(latent, codes)
    assert found.min() >= 0 and found.max() < 100 and found[0, 0, 0, 0] == 0
    assert nearest(latent[:0], codes).shape == (0, 3, 4, 5)


def test_a_codebook_takes_it_where_it_may(monkeypatch):
    latent, codes = drawn(3, (2, 8, 3, 4, 5), 200)
    book = Codebook(200, 8).to(DEVICE)
    book.embeddings.copy_(codes)
    expected = book.nearest(latent, tokens_per_chunk=4096)
    calls = []

    def counted(*args, **more):
        calls.append(args)
        return nearest(*args, **more)

    monkeypatch.setattr("tumorsynth.models.nearest_triton.nearest", counted)
    assert torch.equal(book.nearest(latent), expected) and len(calls) == 1
    assert torch.equal(book.nearest(latent, tokens_per_chunk=7), expected) and len(calls) == 1
    assert torch.equal(book.double().nearest(latent.double()), expected) and len(calls) == 1
    monkeypatch.setattr(module, "fused_on", None)
    assert torch.equal(book.float().nearest(latent), expected) and len(calls) == 1


def test_a_failure_is_said_once_and_the_slow_search_goes_on(monkeypatch):
    latent, codes = drawn(4, (1, 8, 2, 2, 2), 50)
    book = Codebook(50, 8).to(DEVICE)
    book.embeddings.copy_(codes)
    expected = book.nearest(latent, tokens_per_chunk=4096)

    def broken(*args):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("tumorsynth.models.nearest_triton.nearest", broken)
    with pytest.warns(UserWarning, match="fused search.*C compiler.*going on with the slower one"):
        assert torch.equal(book.nearest(latent), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(book.nearest(latent), expected)


def test_without_triton_nothing_is_said(monkeypatch):
    latent, _ = drawn(5, (1, 8, 2, 2, 2), 50)
    monkeypatch.setitem(sys.modules, "tumorsynth.models.nearest_triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Codebook(50, 8).to(DEVICE).nearest(latent)
    assert module.fused_on is None


def test_memory_that_does_not_suffice_is_the_callers_to_know(monkeypatch):
    latent, _ = drawn(6, (1, 8, 2, 2, 2), 50)

    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tumorsynth.models.nearest_triton.nearest", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Codebook(50, 8).to(DEVICE).nearest(latent)
    assert module.fused_on == DEVICE.type


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter would take minutes")
def test_the_published_size_on_a_gpu():
    latent, codes = drawn(7, (1, 8, 24, 24, 24), 16384)
    book = Codebook(16384, 8).to(DEVICE)
    book.embeddings.copy_(codes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = book.nearest(latent)
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20
    slow = book.nearest(latent, tokens_per_chunk=4096)
    differ = found != slow
    assert differ.float().mean() < 1e-3  # equally near to rounding
    z = latent.movedim(1, -1)[differ].double()
    far, near = (z - codes[index[differ]].double() for index in (slow, found))
    torch.testing.assert_close(near.square().sum(-1), far.square().sum(-1), rtol=0, atol=1e-5)
