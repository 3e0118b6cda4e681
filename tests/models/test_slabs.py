"""Running layers by slabs, and only near the tumour: the same results with less memory."""

from __future__ import annotations

import pytest
import torch
from test_speed_paths import Kernels, needs_mkldnn
from tiny import tiny_crop, tiny_generator
from torch import Tensor, nn

import tumorsynth as ts
from tumorsynth.crop_grid import plan_crop
from tumorsynth.geometry import Box, Frame
from tumorsynth.models import slabs
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv import GroupNorm, Linear
from tumorsynth.pipeline.records import PaintRequest

KINDS = {
    "published": {},
    "zeros": {"padding": "zeros", "groups": 4},
    "folded": {"patch": 2, "encoder_widths": (8, 16), "decoder_widths": (16, 8), "inner_blocks": 1},
    "no blocks": {"decoder_blocks": 0, "encoder_blocks": 0},
}
VIEWS = tuple(
    f"aten.{name}"
    for name in ("view", "permute", "slice", "unsqueeze", "select", "lift", "alias", "detach")
)


def autoencoder(kind: str) -> Autoencoder:
    torch.manual_seed(0)
    sizes = {"encoder_widths": (4, 8, 16), "decoder_widths": (16, 16, 8), "codes": 0, "groups": 8}
    sizes["groups"] = 4
    model = Autoencoder(AutoencoderConfig(**{**sizes, **KINDS[kind]})).eval()
    for parameter in model.parameters():  # norms that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def there_and_back(model: Autoencoder, x: Tensor, near=None) -> tuple[Tensor, Tensor]:
    latent = model.encode(x)
    return latent, model.decode(latent, near)


def far(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@needs_mkldnn
@pytest.mark.parametrize("large", [0, 2**40], ids=["slabs", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_slabs_give_the_results_of_the_layers(kind, large, monkeypatch):
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", large)
    monkeypatch.setattr(
        slabs, "MAX_SLAB_VALUES", 3000
    )  # one to three planes: many slabs, the last one less
    model, x = autoencoder(kind), 2 * torch.rand(2, 1, 20, 12, 28) - 1
    before = x.clone()
    with torch.enable_grad():  # PyTorch's own way
        latent, decoded = there_and_back(model.double(), x.double())
    model.float()
    with torch.no_grad():
        found = there_and_back(model, x)
        alone = there_and_back(model, x[1:])
    assert far(found[0], latent) < 1e-5 and far(found[1], decoded) < 1e-5
    assert far(found[1][1:], alone[1]) < 1e-6 and torch.equal(x, before)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reduced = there_and_back(model, x)
    assert reduced[1].dtype == torch.bfloat16
    assert far(reduced[0], latent) < 0.02 and far(reduced[1], decoded) < 0.04


@needs_mkldnn
@pytest.mark.parametrize("large", [0, 2**40], ids=["slabs", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_near_a_tumour_are_those_of_the_whole(kind, large, monkeypatch):
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", large)
    monkeypatch.setattr(slabs, "MAX_SLAB_VALUES", 3000)
    model, latent = autoencoder(kind), torch.randn(2, 8, 6, 4, 8)
    boxes = [
        (slice(8, 12), slice(4, 12), slice(12, 20)),
        (slice(0, 4), slice(0, 8), slice(28, 32)),  # at the faces, where it is padded
        (slice(0, 24), slice(0, 16), slice(0, 32)),
    ]
    with torch.no_grad():
        whole = model.decode(latent)
        for box in boxes:
            found = model.decode(latent, box)
            assert torch.allclose(found, whole[(..., *box)], atol=1e-4 * float(whole.std()))


@needs_mkldnn
def test_only_a_few_tensors_are_as_large_as_the_crop(monkeypatch):
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(slabs, "MAX_SLAB_VALUES", 2**14)
    model, latent = autoencoder("published"), torch.randn(1, 8, 12, 12, 12)
    with torch.no_grad():
        model.decode(latent)
        with Kernels() as seen:
            model.decode(latent)
    assert seen.count("slow_conv") == 0
    # four convolutions, their norms and paddings at 8 channels: none makes a tensor of this size;
    # the two there are were made once, and are views here
    fresh = [n for n, name in zip(seen.made, seen.of, strict=True) if not name.startswith(VIEWS)]
    assert max(fresh) < 8 * 48**3 / 4


def test_training_and_gradients_use_the_plain_layers(monkeypatch):
    monkeypatch.setattr(slabs, "MAX_CACHED_BYTES", 0)
    model, x = autoencoder("published"), torch.rand(1, 1, 8, 8, 8)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_group_norm_with_channels_last_loses_no_digits():
    torch.manual_seed(0)
    ours, theirs = GroupNorm(2, 8), nn.GroupNorm(2, 8).double()
    ours.weight.data.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x = 30 + torch.randn(2, 8, 24, 24, 24)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        found, exact = ours(x), theirs(x.double())
    assert far(found, exact) < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    ours(x.requires_grad_()).sum().backward()
    assert ours.weight.grad is not None


@needs_mkldnn
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_pytorchs_to_rounding_and_calls_onednn(bias):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias), nn.Linear(24, 40, bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 24)
    with torch.no_grad(), Kernels() as seen:
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert ours(x[:0]).shape == (0, 7, 40)
        assert torch.allclose(ours.double()(x.double()), theirs.double()(x.double()))
    assert seen.count("_linear_pointwise") >= 2
    ours.float()(x).sum().backward()
    assert ours.weight.grad is not None


# -- which part of a crop is near ------------------------------------------------------------------

FRAMES = [
    Frame((1.0, 1.0, 1.0)),
    Frame((0.7, 0.8, 3.0), (1, 0, 2), (True, False, True)),
    Frame((2.5, 0.9, 0.4), (2, 0, 1), (False, True, True)),
]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("low", [(0, 0, 0), (14, 20, 9), (30, 33, 15)])
def test_carry_back_reads_only_what_is_near(frame, low):
    torch.manual_seed(0)
    shape, region = (40, 40, 24), Box.at(low, (6, 6, 6))
    grid = plan_crop(frame, shape, region, min_side=32, multiple=4, margin_mm=8.0)
    crop = torch.randn(grid.side, grid.side, grid.side)
    box = grid.near(region)
    alone = torch.zeros_like(crop)
    alone[box.slices] = crop[box.slices]
    assert torch.equal(grid.carry_back(alone, region), grid.carry_back(crop, region))
    for axis in range(3):  # and it is no larger than that: without its faces something is missing
        assert 0 <= box.start[axis] < box.stop[axis] <= grid.side
        assert box.shape[axis] <= 6 * max(frame.spacing) + 8


def test_beyond_what_is_near_nothing_changes():
    generator, (crop, mask) = tiny_generator(), tiny_crop(side=32)
    found = mask[0, 0].nonzero()
    a, b, c = (slice(int(i), int(j) + 1) for i, j in zip(found.amin(0), found.amax(0), strict=True))
    near = (a, b, c)
    whole = generator.change(crop, mask, seed=0)
    part = generator.change(crop, mask, seed=0, near=near)
    assert torch.allclose(part[mask], whole[mask], atol=1e-3)
    assert int((part != 0).sum()) < part.numel() / 2 < int((whole != 0).sum())
    inpainted = generator.inpaint(crop, mask, seed=0, near=near)
    same = (inpainted - crop).abs() < 1e-6
    assert int(same.sum()) > crop.numel() / 2
    assert torch.allclose(inpainted[mask], generator.inpaint(crop, mask, seed=0)[mask], atol=1e-3)


@pytest.mark.parametrize(
    "near",
    [
        (slice(-4, 8), slice(0, 8), slice(0, 8)),
        (slice(0, 64), slice(0, 8), slice(0, 8)),
        (slice(None), slice(0, 8), slice(0, 8)),
        (slice(0, 8), slice(0, 8)),
        (slice(8, 8), slice(0, 8), slice(0, 8)),
    ],
)
def test_a_part_outside_the_crop_is_named(near):
    with pytest.raises(ValueError, match="near must be three slices within the crop"):
        tiny_generator().change(*tiny_crop(side=32), seed=0, near=near)


@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_a_tumour_equals_that_of_the_whole_crop(blend, spacing, monkeypatch):
    generator = tiny_generator()
    image = 110 + 12 * torch.randn(1, 64, 64, 40, generator=torch.Generator().manual_seed(0))
    label = torch.ones(image.shape, dtype=torch.uint8)
    synth = ts.SynthesizeTumor(generator, count=2, size_mm=9.0, blend=blend)
    near, new_label = synth(image, label, spacing=spacing, seed=5)
    whole_crop = property(lambda request: Box.whole(request.crop.shape))
    monkeypatch.setattr(PaintRequest, "needed", whole_crop)
    whole, whole_label = synth(image, label, spacing=spacing, seed=5)
    assert torch.equal(new_label, whole_label) and not torch.equal(near, image)
    assert float((near - whole).abs().max()) < 0.5
