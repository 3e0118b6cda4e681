"""The fast paths on a CPU: the same numbers, the kernels asked for, no layout that loses digits.

Guarded by counting kernels, not by the clock.
"""

from __future__ import annotations

import copy
import tracemalloc
import warnings

import pytest
import torch
from tiny import tiny_crop, tiny_generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth.generators.diffusion import Generator
from tumorsynth.models import attention
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.codebook import Codebook
from tumorsynth.models.conv import Conv3d, cpu_layout, pad_replicate
from tumorsynth.models.kernels import (
    cpu_computes_bfloat16,
    cpu_isa,
    onednn_convolves,
    uses_onednn,
)
from tumorsynth.models.unet import FactorizedUNet, UNetConfig
from tumorsynth.pipeline.paint import GPU_BATCH, Painter
from tumorsynth.placement.organ import organ_box
from tumorsynth.synthesizer import SynthesizeTumor

needs_mkldnn = pytest.mark.skipif(
    not (uses_onednn() and onednn_convolves()), reason="this PyTorch lacks oneDNN's convolutions"
)
needs_bfloat16 = pytest.mark.skipif(
    not cpu_computes_bfloat16(), reason=f"this CPU does not compute in bfloat16 ({cpu_isa()})"
)


class Kernels(TorchDispatchMode):
    """Names of the operators that ran, and how many elements each tensor has that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []
        self.of: list[str] = []  # by which operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.made.append(tensor.numel())
                self.of.append(str(func))
        return out

    @property
    def largest(self) -> int:
        return max(self.made)

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


def test_a_convolution_is_pytorchs_to_rounding_with_its_gradient_and_its_state():
    torch.manual_seed(0)
    ours, theirs = Conv3d(5, 7, 3, padding=1), nn.Conv3d(5, 7, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 8, 9, 10)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert torch.allclose(ours.double()(x.double()), theirs.double()(x.double()))
    ours.float()(x).square().mean().backward()
    theirs.float()(x).square().mean().backward()
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-6)


@needs_mkldnn
@pytest.mark.parametrize("kernel, stride", [(3, 1), (4, 2), (1, 1), ((1, 3, 3), 1)])
def test_convolutions_without_gradients_go_to_onednn(kernel, stride):
    layer, x = Conv3d(4, 4, kernel, stride), torch.randn(1, 4, 8, 8, 8)
    with torch.no_grad(), Kernels() as seen:
        layer(x)
    assert seen.count("mkldnn_convolution") == 1 and seen.count("slow_conv") == 0
    with Kernels() as seen:  # where gradients are needed PyTorch decides
        layer(x)
    assert seen.count("mkldnn_convolution") == 0
    enabled = torch.backends.mkldnn.enabled
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), Kernels() as seen:
        layer(x)
    assert seen.count("mkldnn_convolution") == 0 and torch.backends.mkldnn.enabled == enabled


@needs_mkldnn
def test_channels_last_without_gradients_and_contiguous_with():
    x = torch.randn(1, 4, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        assert cpu_layout(x.contiguous()).is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):  # a training run
        assert cpu_layout(x.requires_grad_()).is_contiguous()


@pytest.mark.parametrize("by", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_replicated_faces_are_pytorchs_and_keep_format_and_layout(by, layout):
    x = torch.randn(2, 5, 3, 4, 5).to(torch.bfloat16).contiguous(memory_format=layout)
    expected = nn.functional.pad(x.float(), (by,) * 6, mode="replicate")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Kernels() as seen:
        found = pad_replicate(x, by)
    assert torch.equal(found.float(), expected)
    assert found.dtype == x.dtype and found.is_contiguous(memory_format=layout)
    assert seen.count("replication_pad") == seen.count("_to_copy") == 0
    x.requires_grad_()  # training: PyTorch's own, which has a gradient
    pad_replicate(x, by).sum().backward()
    assert float(x.grad.float().sum()) == expected.numel()


def test_a_codebook_costs_the_decoder_no_digits():
    """The codes' vectors come channels last, for which GroupNorm is far less exact."""
    torch.manual_seed(0)
    config = AutoencoderConfig(
        encoder_widths=(4, 4), decoder_widths=(4, 4), codes=16, groups=2, decoder_blocks=1
    )
    model = Autoencoder(config).eval().requires_grad_(False)
    model.decoder.levels[0][0].convt.bias += 30.0  # a mean far from 0 is what it is bad at
    latent = torch.randn(1, 8, 24, 24, 24)
    with torch.no_grad():
        exact = model.double().decode(latent.double())
        found = model.float().decode(latent)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-4


def test_attention_in_chunks_gives_the_same_results_with_less_memory(monkeypatch):
    torch.manual_seed(0)
    config = UNetConfig(dim=8, heads=2, multipliers=(1, 2))
    model = FactorizedUNet(config).eval().requires_grad_(False)
    x, cond = torch.randn(1, 8, 8, 16, 16), torch.randn(1, 9, 8, 16, 16)

    def run(chunk: int) -> tuple[Tensor, int]:
        monkeypatch.setattr(attention, "CHUNK_BYTES", chunk)
        with torch.no_grad(), Kernels() as seen:
            return model(x, 1, cond), seen.largest

    (whole, most), (parts, least) = run(2**40), run(2**15)
    assert torch.allclose(parts, whole, atol=1e-5)
    # one slice of q, k and v at the least; the first convolution's input is what is left
    assert most == 3 * 64 * 8 * 16 * 16 and least <= max(2**16, 25 * 8 * 16 * 16)


@pytest.mark.parametrize("size", [16384, 200, 7, 1])
def test_the_nearest_code_is_the_argmin_in_chunks_that_fit_a_cache(size):
    torch.manual_seed(0)
    codebook, latent = Codebook(size, 8), torch.randn(2, 8, 5, 6, 7)
    with Kernels() as seen:
        found = codebook.nearest(latent)
    tokens = latent.movedim(1, -1).reshape(-1, 8)
    assert torch.equal(found.flatten(), torch.cdist(tokens, codebook.embeddings).argmin(1))
    assert seen.largest <= max(2**19, 16 * size) and seen.count("one_hot") == 0


def test_equal_codes_give_the_first_of_them():
    codebook = Codebook(256, 3)
    codebook.embeddings.zero_()
    codebook.embeddings[:100] = 5.0
    assert codebook.nearest(torch.zeros(1, 3, 2, 2, 2)).unique().tolist() == [100]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factorized", "conv"])
def test_each_network_is_one_graph_for_torch_compile(kind):
    """Nothing of ours compiles; who does so gets no breaks and the same numbers."""
    torch.manual_seed(0)
    generator, (crop, mask) = tiny_generator(codes=32), tiny_crop()
    if kind == "factorized":
        unet_config = UNetConfig(dim=8, heads=2, multipliers=(1, 2))
        generator = Generator(generator.autoencoder, FactorizedUNet(unet_config))
    expected = generator.change(crop, mask, seed=0)
    with torch.random.fork_rng():
        torch._dynamo.reset()
        for network in (generator.autoencoder.encoder, generator.autoencoder.decoder):
            network.compile(backend="eager", fullgraph=True, dynamic=False)
        generator.denoiser.compile(backend="eager", fullgraph=True, dynamic=False)
        found = generator.change(crop, mask, seed=0)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5) and graphs >= 3
    again = copy.deepcopy(generator).change(crop, mask, seed=0)  # a copy is as it was before
    assert torch.equal(again, expected)


def test_an_organ_is_searched_in_slabs(monkeypatch):
    """Memory as large as the label was nine tenths of the time."""
    monkeypatch.setattr("tumorsynth.placement.organ.SLAB_VOXELS", 2**12)
    label = torch.zeros(40, 32, 48, dtype=torch.uint8)
    label[10:20, 5:9, 30:40] = 1
    organ_box(label, (1, 2))  # what the first call alone takes does not count
    for given in (label, label.permute(2, 1, 0), label.bool()):
        tracemalloc.start()
        assert organ_box(given, (1, 2)) is not None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # two planes of 32 x 48 at a time, each compared with either value in memory of its own
        assert peak < 4 * 2**12 < label.numel() / 3


# -- precision ------------------------------------------------------------------------------------


def dtypes(generator: Generator, monkeypatch, flags: bool) -> dict[str, torch.dtype]:
    """In which format the last layers of encoder, denoiser and decoder answer."""
    monkeypatch.setattr("tumorsynth.generators.precision.cpu_computes_bfloat16", lambda: flags)
    monkeypatch.setattr("tumorsynth.generators.precision.cpu_gains_from_bfloat16", lambda: flags)
    seen: dict[str, torch.dtype] = {}
    parts = {
        "encode": generator.autoencoder.encoder,
        "denoise": generator.denoiser,
        "decode": generator.autoencoder.decoder,
    }
    hooks = [
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.dtype}))
        for name, part in parts.items()
    ]
    crop, mask = tiny_crop()
    change = generator.change(crop, mask, seed=0)
    for hook in hooks:
        hook.remove()
    assert change.dtype == torch.float32
    return seen


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "prediction, precision, flags, expected",
    [
        ("x0", "auto", True, (BF16, BF16, BF16)),
        ("v", "auto", True, (BF16, BF16, BF16)),
        ("noise", "auto", True, (F32, F32, F32)),  # published generators stay exact
        ("x0", "auto", False, (F32, F32, F32)),
        ("x0", "float32", True, (F32, F32, F32)),
        ("noise", "bfloat16", True, (F32, F32, BF16)),
    ],
)
def test_the_dtype_that_each_network_computes_in(
    monkeypatch, prediction, precision, flags, expected
):
    generator = tiny_generator(prediction=prediction)
    generator.precision = precision
    seen = dtypes(generator, monkeypatch, flags)
    assert (seen["encode"], seen["denoise"], seen["decode"]) == expected
    assert generator.with_sampler(crop_size=40).precision == precision


@pytest.mark.parametrize("codes", [0, 16])
def test_bfloat16_is_the_decoders_alone_where_noise_is_predicted(monkeypatch, codes):
    """The first of four steps multiplies errors by 263, and codes lie close together."""
    monkeypatch.setattr("tumorsynth.generators.precision.cpu_computes_bfloat16", lambda: True)
    exact, fast = (tiny_generator(prediction="noise", codes=codes) for _ in range(2))
    exact.precision, fast.precision = "float32", "bfloat16"
    seen: dict[str, list[object]] = {"encoder": [], "denoiser": [], "decoder": [], "latent": []}
    networks = (fast.autoencoder.encoder, fast.denoiser, fast.autoencoder.decoder)
    for network, name in zip(networks, seen, strict=False):
        network.register_forward_hook(
            lambda module, inputs, out, name=name: seen[name].append(out.dtype)
        )
    for generator in (exact, fast):
        generator.autoencoder.decoder.register_forward_pre_hook(
            lambda module, inputs: seen["latent"].append(inputs[0])
        )
        generator.change(*tiny_crop(), seed=0)
    assert seen["encoder"] == [F32] * 2 and seen["denoiser"] == [F32] * 4
    assert seen["decoder"] == [BF16] * 2
    for latent, other in zip(seen["latent"][:2], seen["latent"][2:], strict=True):
        assert torch.equal(latent, other)


def test_a_callers_autocast_does_not_change_a_tumour():
    generator = tiny_generator()
    crop, mask = tiny_crop()
    alone = generator.change(crop, mask, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator.change(crop, mask, seed=0), alone)


def test_an_unknown_precision_is_named():
    generator = tiny_generator()
    generator.precision = "half"
    with pytest.raises(ValueError, match="precision must be one of .*half"):
        generator.change(*tiny_crop(), seed=0)


@needs_bfloat16
def test_bfloat16_is_repeatable_and_close_where_the_shipped_generator_is():
    import tumorsynth as ts

    generator = ts.load_generator("liver-early").with_sampler()  # a view of its own: precision
    crop, mask = tiny_crop(side=32)
    generator.precision = "float32"
    exact = generator.change(crop, mask, seed=1)
    generator.precision = "bfloat16"
    fast = generator.change(crop, mask, seed=1)
    assert torch.equal(generator.change(crop, mask, seed=1), fast)
    low, high = generator.window
    hu = (fast - exact)[mask] * (high - low)
    assert 0 < float(hu.square().mean().sqrt()) < 3 and abs(float(hu.mean())) < 1.5


@needs_mkldnn
def test_the_budget_of_one_tumour():
    """Two encodes, four steps, two decodes; no slow kernel, no one-hot, nothing huge."""
    generator = tiny_generator(codes=32)
    crop, mask = tiny_crop()
    generator.change(crop, mask, seed=0)
    with Kernels() as seen:
        generator.change(crop, mask, seed=0)

    def convolutions(network: nn.Module) -> int:
        return sum(isinstance(m, nn.Conv3d) for m in network.modules())

    auto, steps = generator.autoencoder, generator.sampler.steps
    expected = 2 * convolutions(auto) + steps * convolutions(generator.denoiser)
    assert seen.count("mkldnn_convolution") == expected
    assert seen.count("slow_conv") == seen.count("one_hot") == 0
    assert seen.largest <= 8 * crop.numel()


# -- what a GPU would wait for, and what it does where its memory ends ----------------------------


class Waits(TorchDispatchMode):
    """Operators whose answer, or its size, the program waits for.

    Not counted: float64 numbers, which are the noise schedule's and stay on the CPU.
    """

    KINDS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind in str(func) for kind in self.KINDS) and args[0].dtype != torch.float64:
            self.names.append(str(func))
        indices = args[1] if str(func).startswith("aten.index.") else ()
        self.names += [
            "index by a mask" for i in indices if i is not None and i.dtype is torch.bool
        ]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("codes", [0, 32])
@pytest.mark.parametrize("contrast_hu", [None, -30.0])
def test_nothing_waits_for_the_device_while_a_tumour_is_painted(codes, contrast_hu, monkeypatch):
    for module in ("contrast", "surroundings"):
        monkeypatch.setattr(f"tumorsynth.appearance.{module}.on_cpu", lambda tensor: False)
    generator, (crop, mask) = tiny_generator(codes=codes), tiny_crop(batch=2)
    with Waits() as seen:
        generator.change(crop, mask, seed=0, contrast_hu=contrast_hu)
        generator.inpaint(crop, mask, seed=0, contrast_hu=contrast_hu)
    assert seen.names == []
    with Waits() as seen:  # it would be seen
        assert float(crop.sum()) and crop[mask].numel()
    assert len(seen.names) == 2


def patch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = 110 + 12 * torch.randn(1, 64, 64, 64, generator=rng)
    return image, torch.ones(image.shape, dtype=torch.uint8)


def test_full_gpu_memory_halves_the_batch_with_one_warning(monkeypatch):
    monkeypatch.setattr(Painter, "_batch_size", lambda self, device: self.batch_limit)
    generator, batches = tiny_generator(), []
    image, label = patch()
    make = dict(count=7, size_mm=5.0, gap_mm=1.0, contrast_hu=-60.0)  # painted once each
    expected = SynthesizeTumor(generator, **make)(image, label, spacing=1.0, seed=3)
    inner = generator.change

    def change(crop, mask, **kwargs):
        batches.append(len(crop))
        if len(crop) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return inner(crop, mask, **kwargs)

    generator.change = change
    synth = SynthesizeTumor(generator, **make)
    with pytest.warns(UserWarning, match="does not hold 7 crops at once: going on with 3") as said:
        found = synth(image, label, spacing=1.0, seed=3)
    assert len(said) == 1 and batches == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], atol=1e-2)
    batches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synth(image, label, spacing=1.0, seed=3)  # it remembers
    assert set(batches) == {1} and SynthesizeTumor(generator).painter.batch_limit == GPU_BATCH


def test_a_single_crop_that_does_not_fit_is_an_error(monkeypatch):
    generator = tiny_generator()

    def change(crop, mask, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    generator.change = change
    with pytest.raises(torch.cuda.OutOfMemoryError):
        SynthesizeTumor(generator, count=1, size_mm=8.0)(*patch(), spacing=1.0, seed=0)
