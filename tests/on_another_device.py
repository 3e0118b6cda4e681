"""Tumours on a pretended device. Run by `test_other_device.py`, in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from another_device import DEVICE, Pretended, Pretending, copies, waits
from tiny import tiny_crop, tiny_generator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tumorsynth as ts
from tumorsynth.appearance.contrast import ContrastConfig
from tumorsynth.appearance.tissue import SOFT_TISSUE
from tumorsynth.commands.timing import crop_and_mask, patch_and_label
from tumorsynth.devices import full_float32, onto
from tumorsynth.generators.sampling import draw_noise
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.models.unet import FactorizedUNet, UNetConfig
from tumorsynth.monai import BatchSynthesizeTumord

PHANTOM = ts.make_phantom(spacing=(3.0, 3.0, 4.0), shape=(64, 64, 32))


@pytest.fixture(autouse=True)
def pretending():
    with Pretending():
        yield


def test_the_device_is_told_apart_from_the_cpu():
    there = torch.ones(3, device=DEVICE)
    assert (there + 1).sum().item() == 6 and there.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


@pytest.mark.parametrize(("codes", "contrast_hu"), [(0, None), (32, -30.0)])
def test_a_generator_paints_the_cpus_tumour(codes, contrast_hu):
    generator = tiny_generator(codes=codes)
    crop, mask = tiny_crop(2)
    expected = [
        paint(crop, mask, seed=1, contrast_hu=contrast_hu)
        for paint in (generator.change, generator.inpaint)
    ]
    generator.to(DEVICE)
    for paint, want in zip((generator.change, generator.inpaint), expected, strict=True):
        made = paint(crop.to(DEVICE), mask.to(DEVICE), seed=1, contrast_hu=contrast_hu)
        assert made.device == DEVICE
        torch.testing.assert_close(made.cpu(), want, atol=1e-4, rtol=0)


class Elsewhere(TorchDispatchMode):
    """Operators that made something on the CPU, or asked for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        here = any(isinstance(t, torch.Tensor) and t.device != DEVICE for t in tree_leaves(out))
        if here or "_local_scalar" in str(func):
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("which", ["encoder", "decoder", "published denoiser", "conv denoiser"])
def test_a_network_makes_and_asks_nothing_beside_the_device(which):
    """As a CUDA graph needs it."""
    latent, cond, t = torch.randn(2, 8, 4, 8, 8), torch.randn(2, 9, 4, 8, 8), torch.tensor([3, 3])
    small = {"dim": 8, "multipliers": (1, 2), "groups": 4, "heads": 2, "head_dim": 8}
    autoencoder = Autoencoder(AutoencoderConfig(1, (8, 8), (8, 8), groups=4, codes=16))
    network, inputs = {
        "encoder": (autoencoder.encoder, (torch.randn(2, 1, 8, 8, 8),)),
        "decoder": (autoencoder.decoder, (latent,)),
        "published denoiser": (
            FactorizedUNet(UNetConfig(rotary_dim=8, **small)),
            (latent, t, cond),
        ),
        "conv denoiser": (ConvUNet(ConvUNetConfig((8, 16), 1, groups=4)), (latent, t, cond)),
    }[which]
    network.requires_grad_(False)
    want = network(*inputs)
    network.to(DEVICE)
    inputs = [x.to(DEVICE) for x in inputs]
    with torch.no_grad(), Elsewhere() as seen:
        found = network(*inputs)
    assert seen.names == []
    torch.testing.assert_close(found.cpu(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("generator", "settings"),
    [
        ("tiny", {"gate": True}),
        ("hu2023", {"mass_effect": 0.5, "size_mm": 25}),
        ("hu2023", {"intensity": ts.Scaled(-175, 250, 0, 1)}),
        *(
            pytest.param(generator, settings, marks=pytest.mark.slow)
            for generator in ("tiny", "hu2023")
            for settings in (
                {"blend": "difftumor"},
                {"contrast_hu": "liver-portal", "size_mm": 30},
                {"size_mm": "kidney", "organ_labels": (3, 4)},
                {"merge": True, "count": 4},
            )
        ),
    ],
)
def test_a_whole_call_is_the_cpus(generator, settings):
    settings = {"organ_labels": 1, "tumor_label": 20, "count": 2, "size_mm": 12, **settings}
    image, label = PHANTOM.image, PHANTOM.label
    if "intensity" in settings:
        image = ((image + 175) / 425).clamp(0, 1)
    generator = tiny_generator() if generator == "tiny" else generator
    want = ts.SynthesizeTumor(generator, **settings)(image, label, spacing=PHANTOM.spacing, seed=3)
    if not isinstance(generator, str):
        generator.to(DEVICE)
    synth = ts.SynthesizeTumor(generator, **settings)
    image, label = image.to(DEVICE), label.to(DEVICE)
    made = synth(image, label, spacing=PHANTOM.spacing, seed=3)
    assert made[0].device == made[1].device == DEVICE
    assert torch.equal(made[1].cpu(), want[1])
    torch.testing.assert_close(made[0].cpu(), want[0], atol=0.05, rtol=0)
    assert any(record["applied"] for record in synth.report)
    replayed = synth(image, label, spacing=PHANTOM.spacing, params=synth.params)
    assert torch.equal(replayed[0].cpu(), made[0].cpu())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("generator", "settings"),
    [
        ("tiny", {}),
        ("tiny", {"contrast_hu": -30.0, "gate": True}),
        ("tiny", {"contrast": None, "blend": "difftumor", "codes": 16}),
        ("tiny", {"codes": 8, "contrast_hu": "liver-portal", "size_mm": 40, "bulge": 0.3}),
        ("tiny", {"codes": 8, "contrast_hu": -30.0, "mass_effect": 0.5, "size_mm": 25}),
        ("hu2023", {"mass_effect": 0.5, "size_mm": 25, "gate": True}),
        ("hu2023", {"size_mm": "kidney", "organ_labels": (3, 4), "bulge": True}),
    ],
)
def test_a_call_runs_where_torch_is_to_be_deterministic_and_waits_for_no_copy(
    deterministic, generator, settings
):
    """CUDA has no deterministic kernel of some operators, which raise there and not on a CPU."""
    image, label = PHANTOM.image.to(DEVICE), PHANTOM.label.to(DEVICE)
    own = {"contrast": ContrastConfig(), "codes": 0}
    own |= {name: settings[name] for name in own if name in settings}
    made = {"size_mm": 12, "count": 2, "tumor_label": 20, "organ_labels": 1}
    made |= {name: value for name, value in settings.items() if name not in own}
    if generator == "tiny":
        generator = tiny_generator(**own).to(DEVICE)
    synth = ts.SynthesizeTumor(generator, **made)
    copies.clear()
    synth(image, label, spacing=PHANTOM.spacing, seed=3)
    assert any(record["applied"] or record.get("scores") for record in synth.report)
    assert not copies


@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_gradients_of_our_networks_exist_there_too(deterministic, network):
    autoencoder = Autoencoder(AutoencoderConfig(1, (8, 8), (8, 8), groups=4, codes=16)).to(DEVICE)
    x = {"encoder": torch.randn(1, 1, 8, 8, 8), "decoder": torch.randn(1, 8, 4, 4, 4)}[network]
    getattr(autoencoder, network)(x.to(DEVICE)).square().sum().backward()


class Convolutions(TorchDispatchMode):
    """The operators of convolutions, and whether they may round to TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.seen.append(not (str(func).startswith("aten._convolution.") and not args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_networks_before_a_step_that_grows_errors_ask_for_full_float32(monkeypatch, prediction):
    monkeypatch.setattr(
        "tumorsynth.generators.diffusion.full_float32",
        lambda kind, own_layers: full_float32("cuda", own_layers),
    )
    generator, (crop, mask) = tiny_generator(prediction=prediction, codes=16), tiny_crop()
    want = generator.change(crop, mask, seed=0)
    generator.to(DEVICE)
    rounds, inner = {}, generator.run_network

    def watched(network, *inputs, **how):
        with Convolutions() as convolutions:
            out = inner(network, *inputs, **how)
        called = getattr(network, "__self__", network)
        rounds.setdefault(type(called).__name__, set()).update(convolutions.seen)
        return out

    monkeypatch.setattr(generator, "run_network", watched)
    made = generator.change(crop.to(DEVICE), mask.to(DEVICE), seed=0)
    torch.testing.assert_close(made.cpu(), want, atol=1e-4, rtol=0)
    exact = {prediction != "noise"}
    assert rounds == {"Autoencoder": exact, "ConvUNet": exact, "Decoder": {True}}


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x.nanmedian(0),
        lambda x: x.median(0),
        lambda x: x.kthvalue(2),
        lambda x: x.cumsum(0),
        lambda x: x.histc(),
        lambda x: torch.bincount(x.long(), x),
        lambda x: x.put_(torch.tensor([1], device=DEVICE), x[:1]),
        lambda x: x.scatter_reduce(0, x.long(), x, "prod"),
    ],
)
def test_operators_without_a_deterministic_kernel_are_seen(deterministic, operator):
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        operator(torch.arange(4.0, device=DEVICE))


def test_operators_with_a_deterministic_kernel_run(deterministic):
    x = torch.arange(4.0, device=DEVICE)
    x[x > 1] = 5.0
    for made in (x.nanmedian(), x.sort().values, x.long().cumsum(0), torch.bincount(x.long())):
        assert made.device == DEVICE


class Launches(TorchDispatchMode):
    """Operators on the device that compute something, and are no views: about its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        there = any(isinstance(x, Pretended) for x in tree_leaves((args, kwargs, out)))
        self.count += there and not view
        return out


@pytest.mark.parametrize(
    ("batch", "most"),
    [(1, 760), pytest.param(8, 4000, marks=pytest.mark.slow)],
)
def test_what_a_call_costs(batch, most):
    """Operators outside of the networks, which a GPU waits for the CPU to name, and what the CPU
    waits for. The networks' 460 (encoder and decoder twice, four steps) are one batch's."""
    generator = copy.deepcopy(ts.load_generator("liver-early"))
    generator.precision = "float32"
    image, label = patch_and_label(96, batch, device=DEVICE)
    synth = ts.SynthesizeTumor(generator.to(DEVICE), count=1, size_mm=18.0)
    in_networks, inner = [], generator.run_network

    def run_network(*inputs, **how):
        before = seen.count
        out = inner(*inputs, **how)
        in_networks.append(seen.count - before)
        return out

    generator.run_network = run_network
    for seed in (1, 0):  # the first call keeps what is loaded once
        in_networks.clear()
        waits.clear()
        with Launches() as seen:
            synth(image, label, spacing=1.0, seed=seed)
    assert sum(record["applied"] for record in synth.report) == batch
    assert sum(in_networks) <= 460 and len(in_networks) == 8
    assert 0.9 * most < seen.count - sum(in_networks) <= most
    assert waits.total() <= 8, waits  # whatever the batch is


@pytest.mark.parametrize(
    ("batch", "settings"),
    [
        (2, {}),
        (8, {"organ_labels": 16}),  # none in this part of the body
        # seed 4 draws no rim, which waits
        pytest.param(4, {"merge": True, "contrast_hu": "liver-portal"}, marks=pytest.mark.slow),
        pytest.param(4, {"count": 3, "size_mm": 8}, marks=pytest.mark.slow),  # above 8 crops
    ],
)
def test_a_batch_waits_as_often_as_one_of_its_samples(batch, settings):
    settings = {"organ_labels": 1, "tumor_label": 20, "count": 2, "size_mm": 12, **settings}
    counts, generator = [], tiny_generator().to(DEVICE)
    generator.card = {"name": "tiny", "tissue_range": SOFT_TISSUE.to_card()}
    synth = ts.SynthesizeTumor(generator, **settings)
    for size in (1, 1, batch):  # the first call keeps what is loaded once
        image, label = (torch.stack([x] * size).to(DEVICE) for x in (PHANTOM.image, PHANTOM.label))
        waits.clear()
        synth(image, label, spacing=PHANTOM.spacing, seed=[4] * size)
        counts.append(waits.total())
    assert 0 < counts[1] == counts[2], (counts, waits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(made, marks=pytest.mark.slow)
            for made in ({"mass_effect": 0.5}, {"bulge": 0.3}, {"gate": True})
        ),
    ],
)
def test_samples_of_a_batch_are_those_of_a_cpu(settings):
    """They go on side by side there, each at its own stage: one has no organ, one no room."""
    settings = {"organ_labels": 1, "tumor_label": 20, "count": 2, "size_mm": (8, 16), **settings}
    image, label = (torch.stack([x] * 4) for x in (PHANTOM.image, PHANTOM.label))
    label[1] = 0
    label[2, :, 30:] = 0
    image[3, :, :, :30] = torch.nan
    found = []
    for device in ("cpu", DEVICE):
        generator = tiny_generator().to(device)
        generator.card = {"name": "tiny", "tissue_range": SOFT_TISSUE.to_card()}
        synth = ts.SynthesizeTumor(generator, **settings)
        made = synth(image.to(device), label.to(device), spacing=PHANTOM.spacing, seed=5)
        tumors = [entry["tumors"] for entry in synth.params]
        found.append((*(x.cpu() for x in made), tumors, [r["applied"] for r in synth.report]))
    here, there = found
    assert sum(here[3]) >= 2 and here[2:] == there[2:] and torch.equal(here[1], there[1])
    torch.testing.assert_close(there[0], here[0], atol=0.05, rtol=0, equal_nan=True)


def test_how_many_operators_a_step_costs():
    generator = copy.deepcopy(ts.load_generator("liver-early"))
    generator.precision = "float32"
    generator.to(DEVICE)
    crop, mask = crop_and_mask(64, 1, DEVICE)
    with torch.no_grad(), Launches() as seen:
        latent = generator.encode_volume(crop)
        t = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        cond = generator.condition(crop, mask, torch.full((1,), -30.0, device=DEVICE))
        before = seen.count
        generator.denoiser(latent, t, cond)
    assert seen.count - before <= 95


def test_waits_are_seen():
    there = torch.arange(4.0, device=DEVICE)
    for ask in (
        lambda: float(there[0]),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there[there > 1],
        lambda: there.nonzero(),
        lambda: torch.empty(4).copy_(there),
        lambda: bool((there > 1).any()),
    ):
        waits.clear()
        ask()
        assert waits == {"test": 1}
    waits.clear()
    there[torch.tensor([1, 2]).to(DEVICE)].add(1).sum()
    assert not waits


def test_copies_that_are_waited_for_are_seen():
    copies.clear()
    onto(torch.ones(3), DEVICE)
    torch.ones(3, device=DEVICE).cpu()
    assert not copies
    draw_noise((2, 2), 1, [torch.Generator()], DEVICE)
    assert copies == {"draw_noise": 1}


def test_the_generator_may_be_elsewhere_than_the_image():
    image, label = PHANTOM.image, PHANTOM.label
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20, device=DEVICE)
    made, _ = synth(image, label, spacing=PHANTOM.spacing, seed=1)
    assert made.device.type == "cpu" and not torch.equal(made, image)
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20, device="cpu")
    back, _ = synth(image.to(DEVICE), label.to(DEVICE), spacing=PHANTOM.spacing, seed=1)
    assert back.device == DEVICE and torch.equal(back.cpu(), made)


def test_a_batch_of_monais():
    batch = {
        "image": torch.stack([PHANTOM.image] * 2).to(DEVICE),
        "label": torch.stack([PHANTOM.label] * 2).to(DEVICE),
    }
    transform = BatchSynthesizeTumord(
        "image", "label", generator="hu2023", organ_labels=1, tumor_label=20, spacing=(3, 3, 4)
    )
    transform.set_random_state(0)
    made = transform(batch)
    assert made["image"].device == DEVICE
    assert not torch.equal(made["image"].cpu(), batch["image"].cpu())
