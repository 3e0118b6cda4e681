"""Devices that do not exist, that lack an operator, or that fail during a call."""

from __future__ import annotations

import os
import re
import threading
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from test_concurrency import SCANS
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth import devices
from tumorsynth.generators import store
from tumorsynth.generators.folder import read_folder

MPS = torch.device("mps")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(devices, "_warned", set())


def lacking(device):
    if device.type != "cpu":
        raise NotImplementedError("The operator 'aten::x' is not implemented for the MPS device.")
    return "done"


def test_a_missing_operator_runs_on_the_cpu_with_one_warning():
    with pytest.warns(UserWarning, match="mps lacks an operator, so this runs on the CPU: .*aten"):
        assert devices.or_on_cpu("this", MPS, lacking) == "done"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.or_on_cpu("this", MPS, lacking) == "done"
    with pytest.warns(UserWarning, match="that runs on the CPU"):
        devices.or_on_cpu("that", MPS, lacking)

    def never(device):
        raise NotImplementedError("nowhere")

    with pytest.raises(NotImplementedError, match="nowhere"):
        devices.or_on_cpu("this", MPS, never)


def test_a_generator_runs_on_the_cpu_if_its_device_lacks_an_operator(monkeypatch):
    """Torch's meta device, which computes nothing, stands in for a real one."""
    monkeypatch.setattr("tumorsynth.generators.store.check_device", lambda device: None)
    expected = ts.SynthesizeTumor(tiny_generator(), size_mm=(3, 7), count=1)(*SCANS[2], seed=0)
    synth = ts.SynthesizeTumor(tiny_generator(), size_mm=(3, 7), count=1, device="meta")
    own = synth.handle.get("cpu")

    def get(device):
        if torch.device(device).type == "cpu":
            return own
        other = tiny_generator().to(device)
        other.change = lambda *crops, **drawn: lacking(MPS)
        return other

    monkeypatch.setattr(synth.handle, "get", get)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # none on meta
    with pytest.warns(UserWarning, match="meta lacks an operator, so the generator runs"):
        found = synth(*SCANS[2], seed=0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("device", ["meta", "vulkan", "cuda:7", "mps", "xpu"])
@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "diffusion"])
def test_an_absent_device_is_a_clear_error(generator, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    synth = ts.SynthesizeTumor(generator, device=device)
    with pytest.raises(ValueError, match=f"device must be one that torch can.*{device}"):
        synth(*SCANS[0], seed=0)


@pytest.mark.parametrize("device", ["gpu", "", 1.5, "cuda:x"])
def test_an_unknown_device_is_a_clear_error(device):
    with pytest.raises(ValueError, match="device must name a torch device"):
        ts.SynthesizeTumor("hu2023", device=device)


def test_a_device_that_fails_during_a_call_changes_nothing(monkeypatch):
    generator = tiny_generator()
    synth = ts.SynthesizeTumor(generator, size_mm=(2, 4), count=3)
    image, label = (x.clone() for x in SCANS[2])
    before = image.clone(), label.clone()
    expected = synth(image, label, seed=5)
    report, params = synth.report, synth.params
    assert sum(r["applied"] for r in report) > 1
    whole, calls = generator.change, []

    def lost(*crops, **drawn):
        calls.append(1)
        if len(calls) == 2:  # after the first tumour was written
            raise RuntimeError("CUDA error: unspecified launch failure")
        return whole(*crops, **drawn)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "change", lost)
        with pytest.raises(RuntimeError, match="CUDA error") as caught:
            synth(image, label, seed=5)
    assert devices.is_lost(caught.value)
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    assert synth.report is report and synth.params is params  # of the last complete call
    again = synth(image, label, seed=5)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


def test_which_errors_mean_a_lost_device():
    assert not devices.is_lost(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not devices.is_lost(ValueError("CUDA error"))
    assert not devices.is_lost(RuntimeError("shapes differ"))
    assert devices.is_lost(RuntimeError("CUDA error: device-side assert triggered"))


@contextmanager
def other_defaults(kind):
    """A program that told torch other defaults; the meta device stands for a GPU."""
    if kind == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(kind)
    try:
        yield
        assert torch.get_default_dtype() == kind or torch.empty(()).device.type == "meta"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "device"], ids=str)
@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "diffusion"])
def test_default_dtype_and_device_do_not_matter(generator, kind):
    image, label = SCANS[2]
    settings = {"size_mm": (3, 7), "count": 1, "contrast_hu": "kidney-arterial", "mass_effect": 0.5}
    plain = ts.SynthesizeTumor(generator, **settings)(image, label, seed=1)
    with other_defaults(kind):
        synth = ts.SynthesizeTumor(generator, **settings)
        again = synth(image, label, seed=1)
        drawn = synth(image, label)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    assert not torch.equal(again[0], image) and drawn[0].dtype == image.dtype


def test_default_dtype_and_device_do_not_reach_the_phantom():
    phantom = ts.make_phantom((6, 6, 6), (4, 4, 4), seed=3)
    with other_defaults("device"):
        assert torch.equal(ts.make_phantom((6, 6, 6), (4, 4, 4), seed=3).image, phantom.image)


@pytest.mark.parametrize("kind", [torch.float64, "device"], ids=str)
def test_default_dtype_and_device_do_not_reach_the_weights(kind):
    with other_defaults(kind):
        read = read_folder(store.bundled_folder() / "liver-early")
    for network in (read.autoencoder, read.denoiser):
        held = [*network.parameters(), *network.buffers()]
        assert {t.device.type for t in held} == {"cpu"}
        assert torch.float64 not in {t.dtype for t in held}


def tf32() -> tuple[object, ...]:
    """The settings by all of their names that this torch has, as far as it tells."""
    found: list[object] = []
    for owner in (torch.backends.cudnn, torch.backends.cuda.matmul):
        for name in ("allow_tf32", "fp32_precision"):
            try:
                found.append(getattr(owner, name, None))
            except RuntimeError:  # a mixture of old and new names, which torch refuses to tell
                found.append("mixed")
    conv = getattr(torch.backends.cudnn, "conv", None)
    return (*found, getattr(conv, "fp32_precision", None))


@pytest.fixture
def restored():
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    for owner in (torch.backends, torch.backends.cudnn):
        if hasattr(owner, "fp32_precision"):
            owner.fp32_precision = "none"
    for owner, found in ((torch.backends.cudnn, cudnn), (torch.backends.cuda.matmul, matmul)):
        owner.allow_tf32 = not found  # through both, or the newer names keep what they were given
        owner.allow_tf32 = found


@pytest.mark.parametrize("kind", ["default", "both on", "both off", "newer", "newest"])
def test_full_float32_ends_and_holds_for_all_threads(restored, kind):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if kind in ("newer", "newest") and not hasattr(cudnn, "conv"):
        pytest.skip("this torch has the older names alone")
    if kind == "newer":
        cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32"
    elif kind == "newest":
        torch.backends.fp32_precision = "tf32"
    elif kind != "default":
        cudnn.allow_tf32 = matmul.allow_tf32 = kind == "both on"
    before, inside = tf32(), threading.Event()

    def off() -> bool:
        if hasattr(cudnn, "conv"):
            return "tf32" not in (cudnn.conv.fp32_precision, matmul.fp32_precision)
        return not (cudnn.allow_tf32 or matmul.allow_tf32)

    def outlasts():
        with devices.full_float32("cuda"):
            inside.set()
            left.wait(60)

    left = threading.Event()
    other = threading.Thread(target=outlasts)
    with pytest.raises(KeyError), devices.full_float32("cuda"):
        assert off()
        other.start()
        assert inside.wait(60)
        raise KeyError
    assert off()  # the other thread is still in it
    left.set()
    other.join()
    assert tf32() == before
    with devices.full_float32("cpu"):
        assert tf32() == before


def test_only_devices_sets_the_rounding_of_float32():
    package = Path(ts.__file__).parent
    names = re.compile("allow_tf32|fp32_precision|matmul_precision|cudnn[.](benchmark|determin)")
    found = {path.name for path in package.rglob("*.py") if names.search(path.read_text())}
    assert found == {"devices.py"}


def test_layers_of_ours_leave_the_setting_of_convolutions_alone(restored):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    before, asked = tf32(), []

    def asks():
        asked.append(devices.asks_for_full_float32())

    with devices.full_float32("cuda", own_layers=True), devices.full_float32("cuda", True):
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        asks()
        other = threading.Thread(target=asks)
        other.start()
        other.join()
        with devices.full_float32("cuda"):  # as for layers of others
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    asks()
    assert asked == [True, False, False] and tf32() == before
    torch.backends.cuda.matmul.allow_tf32 = False
    before = tf32()
    with devices.full_float32("cuda", own_layers=True):
        assert tf32() == before  # PyTorch's default: nothing of the process changes
    with devices.full_float32("cpu", own_layers=True):
        assert not devices.asks_for_full_float32()


@pytest.mark.parametrize("prediction, full", [("noise", True), ("x0", False)])
@pytest.mark.parametrize("whose", ["ours", "third party's", "compiled"])
def test_what_a_network_that_predicts_noise_asks_for(monkeypatch, prediction, full, whose):
    seen, generator = [], tiny_generator(prediction=prediction, codes=8)
    if whose == "third party's":
        inner = generator.denoiser
        generator.denoiser = type("Theirs", (torch.nn.Module,), {"forward": inner.__call__})()
    if whose == "compiled":
        generator.compile(backend="eager")

    @contextmanager
    def watched(kind, own_layers):
        seen.append(own_layers)
        yield

    monkeypatch.setattr("tumorsynth.generators.diffusion.full_float32", watched)
    generator.change(*tiny_crop(), seed=0)
    ours, theirs = whose != "compiled", whose == "ours"
    expected = [ours, *[theirs] * 4, ours]  # hollowed crop, four steps, healthy crop
    assert seen == (expected if full else [])


class FakeTensor:
    """A tensor of the CPU that notes how it is copied to CUDA."""

    def __init__(self, size, log):
        self.size, self.log, self.device = size, log, torch.device("cpu")

    def numel(self):
        return self.size

    def element_size(self):
        return 1

    def copy_(self, other):
        self.log.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.log.append((str(device), non_blocking))


@pytest.mark.parametrize("size, pinned", [(2**16, False), (2**16 + 1, True)])
def test_large_copies_to_cuda_go_through_pinned_memory(monkeypatch, size, pinned):
    log = []

    def empty_like(tensor, pin_memory):
        assert pin_memory
        return FakeTensor(size, log)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    devices.onto(FakeTensor(size, log), torch.device("cuda"))
    assert log == ["pinned"] * pinned + [("cuda", True)]
    log.clear()
    devices.onto(FakeTensor(size, log), torch.device("mps"))
    assert log == [("mps", False)]


def test_deterministic_programs_get_the_workspace_that_cuda_needs(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    try:
        torch.use_deterministic_algorithms(True)
        devices.allow_deterministic_products(cuda)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the program's own
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        devices.allow_deterministic_products(cpu)
        torch.use_deterministic_algorithms(False)
        devices.allow_deterministic_products(cuda)
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        torch.use_deterministic_algorithms(True)
        devices.allow_deterministic_products(cuda)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
