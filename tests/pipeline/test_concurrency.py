"""Threads, forks, workers that die, and many processes that start at once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.generators import store

ROOT = Path(__file__).resolve().parents[2]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def scan(n=20, seed=0):
    g = torch.meshgrid(*[torch.linspace(-1, 1, n)] * 3, indexing="ij")
    organ = (g[0] ** 2 + g[1] ** 2 + g[2] ** 2) < 0.9
    noise = torch.randn(organ.shape, generator=torch.Generator().manual_seed(seed))
    return (torch.where(organ, 110.0, -100.0) + 12 * noise)[None], organ.to(torch.uint8)[None]


SCANS = [scan(n, n) for n in (16, 18, 20)]


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "diffusion"])
def test_one_transform_in_several_threads(generator):
    """Images, labels, reports and params equal those of sequential calls."""
    synth = ts.SynthesizeTumor(generator=generator, size_mm=(3, 7), count=(1, 2))

    def call(k):
        image, label = SCANS[k % 3]
        if k % 2:
            image, label = torch.stack([image] * 2), torch.stack([label] * 2)
        return synth.synthesize(image, label, seed=k)

    expected = [call(k) for k in range(6)]  # each scan alone and in a batch
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(call, [*range(6)] * 2))
    for one, other in zip(expected * 2, found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert one[2:] == other[2:]


def test_an_adapter_in_several_threads():
    """Samples of several sizes, some skipped: no call gets another's report."""
    adapter = Adapter(healthy_only=True, generator="hu2023", size_mm=(3, 7), count=1)

    def call(k):
        image, label = SCANS[k % 3]
        batch = [torch.stack([x] * (1 + k % 4)) for x in (image, label)]
        batch[1][0, 0, 0, 0, 0] = 2  # a tumour
        return adapter(*batch, seed=k)

    expected = [call(k) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [*range(8)] * 2))
    for one, other in zip(expected * 2, found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def in_child(queue, synth, holds_lock):
    torch.set_num_threads(1)  # as torch's DataLoader does in its workers
    image, label = synth(*SCANS[2], seed=1)
    queue.put((float(image.double().sum()), int((label == 2).sum())))


@forks
@pytest.mark.parametrize("held", [False, True])
def test_a_fork_after_use(tmp_path, held):
    """Also while another thread loads a generator: the child must not inherit a held lock."""
    folder = tiny_generator().save(tmp_path / "gen")
    synth = ts.SynthesizeTumor(generator=folder, size_mm=(3, 7))
    image, label = synth(*SCANS[2], seed=1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    free, taken = threading.Event(), threading.Event()

    def hold():
        with store._lock:
            taken.set()
            free.wait(600)

    if held:
        threading.Thread(target=hold, daemon=True).start()
        taken.wait(60)
    child = context.Process(target=in_child, args=(queue, synth, held), daemon=True)
    try:
        child.start()
        assert queue.get(timeout=600) == (float(image.double().sum()), int((label == 2).sum()))
    finally:
        free.set()
        child.kill()


LOST = """
import contextlib, os, signal, time, torch
import tumorsynth as ts
torch.set_num_threads(1)
grid = torch.meshgrid(*[torch.linspace(-1, 1, 24)] * 3, indexing="ij")
label = (sum(g.square() for g in grid) < 0.9).to(torch.uint8)[None]
image = 110 + 12 * torch.randn(label.shape, generator=torch.Generator().manual_seed(0))
synth = ts.SynthesizeTumor("hu2023", size_mm=(3, 7))
expected = synth(image, label, seed=3)

class Scans(torch.utils.data.Dataset):
    def __init__(self, dies_at):
        self.dies_at = dies_at

    def __len__(self):
        return 4

    def __getitem__(self, k):
        if k == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return synth(image, label, seed=k)

def load(dies_at):
    return torch.utils.data.DataLoader(Scans(dies_at), batch_size=None, num_workers=1)

try:
    list(load(2))
except (RuntimeError, ConnectionError, EOFError) as error:  # torch's own, or of a closed socket
    from_worker = not isinstance(error, RuntimeError) or "worker" in str(error)
    if not isinstance(error, RuntimeError):
        with contextlib.suppress(RuntimeError):  # torch's, which the signal may bring only now
            time.sleep(2)
    print(from_worker, all(map(torch.equal, list(load(None))[3], expected)))
"""


@forks
def test_a_worker_that_dies_ends_the_loader_and_not_the_transform():
    """In its own interpreter: torch's handler of lost workers would outlive the test."""
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.stdout == "True True\n", done.stderr


COLD = """
import hashlib, torch
import tumorsynth as ts
torch.set_num_threads(1)
grid = torch.meshgrid(*[torch.linspace(-1, 1, 24)] * 3, indexing="ij")
label = (sum(g.square() for g in grid) < 0.9).to(torch.uint8)[None]
noise = torch.randn(label.shape, generator=torch.Generator().manual_seed(0))
image, label = ts.SynthesizeTumor("liver-early", size_mm=(5, 9))(110 + 12 * noise, label, seed=0)
print(hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_many_processes_at_once_with_nothing_cached(tmp_path):
    """Eight interpreters without cached byte code or weights make the same tumour."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cold")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COLD],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for _ in range(8)
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert {errors for _, errors in said} == {""}
    assert len({out for out, _ in said}) == 1 and len(said[0][0].strip()) == 64


class Seeded(torch.utils.data.Dataset):
    """Scans with tumours, each item by its own number."""

    def __init__(self, synth):
        self.synth = synth

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.synth(*SCANS[index], seed=index)


def test_spawned_workers_of_a_plain_loader():
    """They unpickle the transform with its generator's name, and load the weights themselves."""
    data = Seeded(ts.SynthesizeTumor(count=1, size_mm=(4, 7)))
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for found, (image, label) in zip(loader, map(data.__getitem__, range(2)), strict=True):
        assert torch.equal(found[0], image) and torch.equal(found[1], label)
        assert (label == 2).any()
