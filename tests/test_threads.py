"""The number of CPU threads within a call, around it, and in other threads of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import tumorsynth as ts
from tumorsynth import synthesizer, threads
from tumorsynth.commands.timing import patch_and_label
from tumorsynth.pipeline import paint
from tumorsynth.threads import one_thread, own_threads

pytestmark = pytest.mark.skipif(
    threads._setters()[0] is None, reason="needs the OpenMP that torch counts its threads in"
)


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_the_old_number_outside():
    with one_thread():
        assert torch.get_num_threads() == 1
        with own_threads():
            assert torch.get_num_threads() == 3
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_an_exception_restores_the_number():
    with pytest.raises(ZeroDivisionError), one_thread(), own_threads():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3
    with own_threads():  # the failed one has left nothing behind
        torch.set_num_threads(2)
    assert torch.get_num_threads() == 2


def test_other_threads_keep_their_number():
    inside, seen = threading.Barrier(2, timeout=60), []

    def other() -> None:
        seen.append(torch.get_num_threads())
        inside.wait()  # the main thread enters one_thread here
        inside.wait()
        seen.append(torch.get_num_threads())
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        inside.wait()

    beside = threading.Thread(target=other)
    beside.start()
    inside.wait()
    with one_thread():
        inside.wait()
        inside.wait()
        assert torch.get_num_threads() == 1
    beside.join()
    assert seen == [3, 3, 3]


def test_without_a_known_openmp_nothing_changes(monkeypatch):
    monkeypatch.setattr(threads, "_setters", lambda: (None, None))
    with one_thread():
        assert torch.get_num_threads() == 3


def _counts(monkeypatch, generator, **settings):
    """Thread numbers of a call: while placing, in a network, and afterwards."""
    seen = {}
    image, label = patch_and_label(48)
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=10, **settings)
    place_samples = synthesizer.place_samples

    def place(*given):
        seen["placing"] = torch.get_num_threads()
        return place_samples(*given)

    monkeypatch.setattr(synthesizer, "place_samples", place)
    encode = generator.encode_volume

    def network(volume):
        seen["network"] = torch.get_num_threads()
        return encode(volume)

    monkeypatch.setattr(generator, "encode_volume", network)
    _, _ = synth(image, label, spacing=1.0, seed=0)
    return {**seen, "after": torch.get_num_threads()}


@pytest.mark.parametrize(
    ("policy", "most_work", "network"),
    [(None, 1e18, 1), (None, 0.0, 3), ("PASSIVE", 1e18, 3)],
)
def test_networks_get_threads_if_these_help(monkeypatch, policy, most_work, network):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(paint, "ONE_THREAD_WORK", most_work)
    generator = ts.load_generator("liver-early")
    seen = _counts(monkeypatch, generator)
    assert seen == {"placing": 1, "network": network, "after": 3}


def test_phantom_is_the_same_for_any_number_of_threads():
    three = ts.make_phantom(spacing=(6.0, 6.0, 6.0))
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    one = ts.make_phantom(spacing=(6.0, 6.0, 6.0))
    assert torch.equal(three.image, one.image) and torch.equal(three.label, one.label)


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_the_command_line_waits_passively_by_default(given, found):
    code = (
        "import os, sys; from tumorsynth.commands.main import main;"
        "sys.argv = ['tumorsynth', '--version'];"
        "main(); assert 'torch' not in sys.modules; print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {name: value for name, value in os.environ.items() if name not in names}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**env, **given}, capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1] == found, ran.stderr
