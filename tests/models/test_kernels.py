"""Tests of what the libraries can do, and of the fallback to float32 without bfloat16."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_slabs import KINDS, autoencoder, far, there_and_back
from test_speed_paths import needs_bfloat16, needs_mkldnn
from tiny import tiny_crop, tiny_generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth.generators import precision
from tumorsynth.models import conv, kernels, slabs
from tumorsynth.models.conv import Linear
from tumorsynth.models.unet import FactorizedUNet, UNetConfig

ROOT = Path(__file__).resolve().parents[2]
LIMITS = (*kernels.ONEDNN_LIMITS, kernels.TORCH_LIMIT)
SMALLEST = 2.0**-126  # normal float32: bfloat16 instructions take what is below for 0


@pytest.fixture
def emulates(monkeypatch):
    """A CPU whose libraries accept bfloat16 but only emulate it."""
    monkeypatch.setattr(kernels, "_multiplies_bfloat16", lambda: False)
    precision._warn_of_float32.cache_clear()


class Products(TorchDispatchMode):
    """The formats that convolutions and matrix products computed in."""

    def __init__(self, operators: tuple[str, ...] = ("convolution", "linear", "addmm", "aten.mm")):
        super().__init__()
        self.operators = operators
        self.dtypes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(part in str(func) for part in self.operators):
            dtype = args[0].dtype
            self.dtypes[dtype] = self.dtypes.get(dtype, 0) + 1
        return func(*args, **(kwargs or {}))


# -- asking the library ----------------------------------------------------------------------------


def a_library(monkeypatch, bfloat16: str) -> None:
    """A library on a processor with AVX512 that does this with bfloat16."""

    def convolve(real):
        def run(x: Tensor, weight: Tensor, *rest):
            if x.dtype != torch.bfloat16:
                return real(x, weight, *rest)
            if bfloat16 == "refuses":
                raise RuntimeError("mkldnn_convolution: bf16 path needs the cpu support avx512bw")
            x = x.float()
            if bfloat16 == "multiplies":
                x = torch.where(x.abs() < SMALLEST, 0, x)
            return real(x, weight.float(), *rest).bfloat16()

        return run

    def transposed(x, w, *rest):
        return nn.functional.conv3d(x, w)  # any real kernel does

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(
        torch, "mkldnn_convolution", convolve(lambda x, w, *rest: nn.functional.conv3d(x, w))
    )
    monkeypatch.setattr(kernels.F, "conv_transpose3d", convolve(transposed))


@pytest.mark.parametrize(
    "bfloat16, answer", [("multiplies", True), ("emulates", False), ("refuses", False)]
)
def test_the_library_shows_whether_it_multiplies_in_bfloat16(monkeypatch, bfloat16, answer):
    a_library(monkeypatch, bfloat16)
    assert kernels._multiplies_bfloat16.__wrapped__() is answer


def test_a_transposed_convolution_that_is_emulated_is_enough_for_no(monkeypatch):
    a_library(monkeypatch, "multiplies")
    plain = nn.functional.conv3d
    monkeypatch.setattr(
        kernels.F, "conv_transpose3d", lambda x, w: plain(x.float(), w.float()).to(x.dtype)
    )
    assert kernels._multiplies_bfloat16.__wrapped__() is False


@pytest.mark.parametrize("flushes", [False, True])
def test_the_callers_settings_neither_change_the_answer_nor_are_changed(flushes):
    def flushed() -> bool:
        return float(torch.tensor([1e-30]).mul(1e-10)) == 0

    expected = kernels._multiplies_bfloat16.__wrapped__()
    if not torch.set_flush_denormal(flushes):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels._multiplies_bfloat16.__wrapped__() is expected
            assert kernels.onednn_convolves.__wrapped__() is kernels.onednn_convolves()
        assert flushed() is flushes
    finally:
        torch.set_flush_denormal(False)


def test_a_processor_without_avx512_computes_no_bfloat16(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    for capability in ("AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert kernels._multiplies_bfloat16.__wrapped__() is False


def test_the_library_is_tried_once(monkeypatch):
    monkeypatch.setattr(kernels, "uses_onednn", lambda: True)
    first = kernels.cpu_computes_bfloat16()
    before = kernels._multiplies_bfloat16.cache_info()
    assert kernels.cpu_computes_bfloat16() is first
    after = kernels._multiplies_bfloat16.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize(
    ("intel", "amx", "limit", "gains"),
    [
        (False, False, None, True),
        (True, False, None, False),
        (True, True, None, True),
        (True, True, "AVX512_CORE_BF16", False),
        (True, True, "AVX512_CORE_AMX", True),
        (True, True, "DEFAULT", True),
    ],
)
def test_intel_gains_from_bfloat16_by_amx_alone(monkeypatch, intel, amx, limit, gains):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(kernels, "cpu_computes_bfloat16", lambda: True)
    monkeypatch.setattr(kernels, "_is_intel", lambda: intel)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    kernels._uses_amx.cache_clear()
    assert kernels.cpu_gains_from_bfloat16() is gains
    kernels._uses_amx.cache_clear()
    monkeypatch.setattr(kernels, "cpu_computes_bfloat16", lambda: False)
    assert not kernels.cpu_gains_from_bfloat16()


def test_the_isa_names_capability_limits_and_bfloat16(monkeypatch):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(kernels, "uses_onednn", lambda: True)
    monkeypatch.setattr(kernels, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(kernels, "_is_intel", lambda: False)
    assert kernels.cpu_isa() == "AVX512, bfloat16"
    monkeypatch.setattr(kernels, "_is_intel", lambda: True)
    monkeypatch.setattr(kernels, "_uses_amx", lambda: False)
    assert kernels.cpu_isa() == "AVX512, bfloat16 slower than float32"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(kernels, "_multiplies_bfloat16", lambda: False)
    assert kernels.cpu_isa() == (
        "AVX512, convolutions up to AVX2 (ONEDNN_MAX_CPU_ISA), no bfloat16"
    )
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "foo")  # ignored by oneDNN
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "AVX2")  # ignored by PyTorch, which wants avx2
    assert kernels.cpu_isa() == "AVX512, no bfloat16"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert kernels.cpu_isa() == (
        "AVX2 (ATEN_CPU_CAPABILITY), convolutions not limited, no bfloat16"
    )
    monkeypatch.setattr(kernels, "uses_onednn", lambda: False)
    assert kernels.cpu_isa().endswith(", no oneDNN, no bfloat16")


# -- float32 in its place --------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "noise"])
def test_requested_bfloat16_becomes_float32_with_one_warning(emulates, prediction):
    generator, (crop, mask) = tiny_generator(prediction=prediction), tiny_crop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "auto" says nothing
        auto = generator.change(crop, mask, seed=0)
    generator.precision = "float32"
    exact = generator.change(crop, mask, seed=0)
    generator.precision = "bfloat16"
    with pytest.warns(UserWarning, match="precision is 'bfloat16', which this CPU only") as said:
        found = generator.change(crop, mask, seed=0)
        another = generator.with_sampler()
        again = another.change(crop, mask, seed=0)
    assert another.precision == "bfloat16"
    assert len(said) == 1 and "set generator.precision = 'auto'" in str(said[0].message)
    assert torch.equal(auto, exact) and torch.equal(found, exact) and torch.equal(again, exact)


def test_without_onednn_bfloat16_is_float32(monkeypatch):
    precision._warn_of_float32.cache_clear()
    generator, (crop, mask) = tiny_generator(prediction="x0"), tiny_crop()
    with torch.backends.mkldnn.flags(enabled=False):
        exact = generator.change(crop, mask, seed=0)
        generator.precision = "bfloat16"
        with pytest.warns(UserWarning, match="no oneDNN, no bfloat16"):
            assert torch.equal(generator.change(crop, mask, seed=0), exact)


@pytest.mark.parametrize("large", [0, 2**40], ids=["slabs", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_callers_bfloat16_is_computed_in_float32_and_rounded(emulates, kind, large, monkeypatch):
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", large)
    monkeypatch.setattr(slabs, "MAX_SLAB_VALUES", 3000)
    model, x = autoencoder(kind), 2 * torch.rand(1, 1, 20, 12, 28) - 1
    near = (slice(4, 12), slice(4, 8), slice(8, 16))
    with torch.no_grad():
        exact = there_and_back(model, x)
        with torch.autocast("cpu", torch.bfloat16), Products() as seen:
            latent = model.encode(x)
            decoded = model.decode(exact[0])
            part = model.decode(exact[0], near)
    assert set(seen.dtypes) == {torch.float32}
    assert latent.dtype == decoded.dtype == part.dtype == torch.bfloat16
    assert far(latent, exact[0]) < 0.01 and far(decoded, exact[1]) < 0.02
    assert far(part, exact[1][(..., *near)]) < 0.02


def test_training_under_bfloat16_multiplies_in_float32(emulates):
    model, x = autoencoder("published"), torch.rand(1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), Products() as seen:
        there_and_back(model, x)[1].float().square().mean().backward()
    assert seen.dtypes.pop(torch.float32) and not seen.dtypes
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_a_denoiser_in_bfloat16(emulates, dtype):
    """Of float32 weights under autocast, and of bfloat16 weights without."""
    torch.manual_seed(0)
    model = FactorizedUNet(UNetConfig(dim=8, heads=2, multipliers=(1, 2))).eval()
    x, cond = torch.randn(1, 8, 4, 8, 8), torch.randn(1, 9, 4, 8, 8)
    reduced = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    with torch.no_grad():
        exact = model(x, 1, cond)
        model.to(dtype)
        with reduced, Products(("convolution",)) as seen:
            found = model(x.to(dtype), 1, cond.to(dtype))
    assert set(seen.dtypes) == {torch.float32}
    assert found.dtype == torch.bfloat16 and far(found, exact) < 0.05


@pytest.mark.parametrize("grad", [False, True])
def test_a_linear_layer_in_bfloat16(emulates, grad):
    layer, x = Linear(24, 40), torch.randn(3, 7, 24)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad), Products() as seen:
        found = layer(x)
    assert set(seen.dtypes) == {torch.float32} and found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    assert layer.double()(x.double()).dtype == torch.float64


# -- without oneDNN's own kernels ------------------------------------------------------------------


def test_layers_fall_back_to_pytorch_where_onednn_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("could not create a primitive descriptor")

    generator, (crop, mask) = tiny_generator(codes=16), tiny_crop()
    generator.precision = "float32"
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", 0)
    expected = generator.change(crop, mask, seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mkldnn_convolution", refuse)
        patched.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse, raising=False)
        answers = [kernels.onednn_convolves.__wrapped__(), kernels.onednn_has_linear.__wrapped__()]
        assert answers == [False, False]
        patched.setattr(conv, "onednn_convolves", lambda: False)
        patched.setattr(conv, "onednn_has_linear", lambda: False)
        found = generator.change(crop, mask, seed=0)
    assert torch.allclose(found, expected, atol=1e-4)


# -- real limits, each in a process of its own -----------------------------------------------------

LIMITED = """
import sys, warnings
sys.path[:0] = {folders!r}
import torch
from test_slabs import autoencoder, far, there_and_back
from tiny import tiny_crop, tiny_generator
from tumorsynth.models import kernels, slabs

assert not kernels.cpu_computes_bfloat16(), kernels.cpu_isa()
print(kernels.cpu_isa())
slabs.MAX_CACHED_BYTES, slabs.MAX_SLAB_VALUES = 0, 3000
model, x = autoencoder("published"), torch.rand(1, 1, 16, 16, 16)
with torch.no_grad():
    exact = there_and_back(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = there_and_back(model, x)
    assert far(reduced[1], exact[1]) < 0.04 and reduced[1].dtype == torch.bfloat16
generator, made = tiny_generator(prediction="x0"), {{}}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for generator.precision in ("auto", "float32", "bfloat16", "bfloat16"):
        made[generator.precision] = generator.change(*tiny_crop(), seed=0)
ours = [str(w.message) for w in said if "precision is 'bfloat16'" in str(w.message)]
assert len(ours) == 1, ours
assert torch.equal(made["auto"], made["float32"])
assert torch.equal(made["bfloat16"], made["float32"])
"""


@needs_mkldnn
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="these limits are of x86"
)
@pytest.mark.parametrize(
    "limits",
    [
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},  # refuses bfloat16
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # emulates it, where there is AVX512
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    ],
    ids=lambda limits: "-".join(limits.values()),
)
def test_under_a_limit_of_the_libraries(limits):
    unlimited = {k: v for k, v in os.environ.items() if k not in LIMITS}
    here = Path(__file__).parent
    code = LIMITED.format(folders=[str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=unlimited | limits,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert f"up to {limits['ONEDNN_MAX_CPU_ISA']} (ONEDNN_MAX_CPU_ISA)" in done.stdout
    assert ("(ATEN_CPU_CAPABILITY)" in done.stdout) == ("ATEN_CPU_CAPABILITY" in limits)


@needs_bfloat16
@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_a_limit_of_pytorch_alone_leaves_the_convolutions_their_bfloat16(limit):
    code = "from tumorsynth.models import kernels; print(kernels.cpu_computes_bfloat16())"
    unlimited = {k: v for k, v in os.environ.items() if k not in LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**unlimited, "ATEN_CPU_CAPABILITY": limit, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


@needs_bfloat16
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_processor_with_bfloat16_computes_in_it(precision):
    """By default where that is faster, and wherever it is asked for."""
    generator, (crop, mask) = tiny_generator(prediction="x0"), tiny_crop()
    generator.precision = precision
    with Products() as seen:
        generator.change(crop, mask, seed=0)
    reduced = seen.dtypes.get(torch.bfloat16, 0) > seen.dtypes.get(torch.float32, 0)
    assert reduced == (precision == "bfloat16" or kernels.cpu_gains_from_bfloat16())
