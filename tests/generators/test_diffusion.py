"""The diffusion generator: seeds, axes, conditioning, errors."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_crop, tiny_generator

from tumorsynth.generators.config import SamplerConfig, build, config_of
from tumorsynth.generators.diffusion import Generator
from tumorsynth.random_streams import per_sample_seeds

GENERATOR = tiny_generator()


def test_inpaint_and_change_are_finite_and_in_scale():
    crop, mask = tiny_crop(2)
    made = GENERATOR.inpaint(crop, mask, seed=3)
    assert made.shape == crop.shape and made.dtype == torch.float32
    assert made.min() >= 0 and made.max() <= 1 and made.std() > 0
    change = GENERATOR.change(crop, mask, seed=3)
    assert change.isfinite().all() and change.abs().max() <= 1
    assert not made.requires_grad and not made.is_inference()


def test_change_is_inpaint_minus_the_decoded_healthy_crop():
    crop, mask = tiny_crop()
    axes, back = (0, 1, 4, 2, 3), (0, 1, 3, 4, 2)
    healthy = GENERATOR.autoencoder(crop.permute(axes) * 2 - 1).permute(back)
    expected = GENERATOR.inpaint(crop, mask, seed=5) - ((healthy + 1) / 2).clamp(0, 1)
    assert torch.allclose(GENERATOR.change(crop, mask, seed=5), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["inpaint", "change"])
def test_a_seed_decides_alone(method):
    crop, mask = tiny_crop(3)
    run = getattr(GENERATOR, method)
    state = torch.random.get_rng_state()
    first = run(crop, mask, seed=[7, 8, 9])
    assert torch.equal(run(crop, mask, seed=7), first)  # an int counts up
    assert not torch.equal(run(crop, mask, seed=[7, 8, 10])[2], first[2])
    assert torch.equal(state, torch.random.get_rng_state())
    for b in range(3):  # alone or among others: the same to rounding
        alone = run(crop[b : b + 1], mask[b : b + 1], seed=[7 + b])
        assert torch.allclose(alone[0], first[b], atol=1e-4)
    mixed = run(crop[[2, 0]], mask[[2, 0]], seed=[9, 7])
    assert torch.allclose(mixed, first[[2, 0]], atol=1e-4)


def test_noise_may_be_given():
    crop, mask = tiny_crop(2)
    draws = [
        torch.randn(5, 8, 8, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (11, 12)
    ]
    noise = torch.stack(draws, dim=1)
    made = GENERATOR.inpaint(crop, mask, noise=noise)
    assert torch.equal(made, GENERATOR.inpaint(crop, mask, seed=[11, 12]))


def test_without_a_seed_torchs_generator_decides():
    crop, mask = tiny_crop()
    torch.manual_seed(1)
    first, second = (GENERATOR.inpaint(crop, mask) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(GENERATOR.inpaint(crop, mask), first)
    assert not torch.equal(first, second)


def test_the_networks_see_z_x_y():
    crop = torch.rand(1, 1, 16, 24, 32)
    mask = torch.zeros_like(crop, dtype=torch.bool)
    mask[0, 0, 4:8, 8:16, 20:28] = True
    cond = GENERATOR.condition(crop, mask)
    assert cond.shape == (1, 9, 8, 4, 6)
    hollow = (crop * 2 - 1).masked_fill(mask, 0).permute(0, 1, 4, 2, 3)
    latent = GENERATOR.autoencoder.normalize(GENERATOR.autoencoder.encode(hollow))
    assert torch.allclose(cond[:, :8], latent, atol=1e-6)
    expected = torch.full((8, 4, 6), -1.0)
    expected[5:7, 1:2, 2:4] = 1
    assert torch.equal(cond[0, 8], expected)
    assert GENERATOR.inpaint(crop, mask, seed=0).shape == crop.shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(0, 15)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
def test_no_tumour_vanishes_at_latent_resolution(low, size):
    mask = torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool)
    mask[(0, 0, *(slice(a, a + n) for a, n in zip(low, size, strict=True)))] = True
    latent_mask = GENERATOR.condition(torch.rand(1, 1, 16, 16, 16), mask)[0, 8]
    assert set(latent_mask.unique().tolist()) == {-1.0, 1.0}
    published = F.interpolate(mask.float(), size=(4, 4, 4))[0, 0].permute(2, 0, 1) * 2 - 1
    if (published > 0).any():
        assert torch.equal(latent_mask, published)
    else:  # only cells that hold some of it
        share = F.interpolate(mask.float(), size=(4, 4, 4), mode="area")[0, 0].permute(2, 0, 1)
        assert (share[latent_mask > 0] > 0).all()
    area = GENERATOR.with_sampler(mask_conditioning="area")
    latent_mask = area.condition(torch.rand(1, 1, 16, 16, 16), mask)[0, 8]
    assert (latent_mask + 1).sum() / 2 * 64 == pytest.approx(float(mask.sum()), rel=1e-4)


def test_missed_masks_do_not_depend_on_the_batch():
    crop, mask = tiny_crop(2)
    mask = mask.clone()
    mask[1] = False
    mask[1, 0, 5, 6, 7] = True
    together = GENERATOR.condition(crop, mask)[:, 8]
    for b in range(2):
        alone = GENERATOR.condition(crop[b : b + 1], mask[b : b + 1])[0, 8]
        assert torch.equal(together[b], alone)


def test_an_empty_mask_is_no_error():
    crop, mask = tiny_crop()
    assert GENERATOR.inpaint(crop, mask & False, seed=0).isfinite().all()


def test_other_samplers_of_the_same_networks():
    crop, mask = tiny_crop()
    ddim = GENERATOR.with_sampler(method="ddim", timesteps=20, steps=5, clamp=None)
    assert ddim.autoencoder is GENERATOR.autoencoder and ddim.denoiser is GENERATOR.denoiser
    assert ddim.name == GENERATOR.name and ddim.schedule.timesteps == 20
    made = ddim.inpaint(crop, mask, seed=1)
    assert made.isfinite().all() and torch.equal(made, ddim.inpaint(crop, mask, seed=1))
    assert not torch.equal(made, GENERATOR.inpaint(crop, mask, seed=1))
    for prediction in ("x0", "v"):
        other = GENERATOR.with_sampler(prediction=prediction)
        assert other.inpaint(crop, mask, seed=1).isfinite().all()
    assert GENERATOR.sampler == SamplerConfig(crop_size=32, crop_multiple=8)  # left as it was


def test_sample_takes_a_torch_generator():
    crop, mask = tiny_crop()
    cond = GENERATOR.condition(crop, mask)
    latent = GENERATOR.sample(cond, torch.Generator().manual_seed(4))
    assert latent.shape == (1, 8, 8, 8, 8)
    noise = torch.randn(5, 8, 8, 8, 8, generator=torch.Generator().manual_seed(4))[:, None]
    assert torch.equal(latent, GENERATOR.sample(cond, noise))
    two = GENERATOR.sample(cond.expand(2, -1, -1, -1, -1), torch.Generator().manual_seed(4))
    assert torch.allclose(two[0], latent[0], atol=1e-5) and not torch.allclose(two[0], two[1])


def test_its_networks_are_frozen_and_in_evaluation_mode():
    for network in (GENERATOR.autoencoder, GENERATOR.denoiser):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crop", "mask"),
    [((1, 1, 32, 32, 32), (1, 1, 32, 32, 16)), ((1, 32, 32, 32), (1, 32, 32, 32)),
     ((32, 32, 32), (32, 32, 32)), ((1, 2, 32, 32, 32), (1, 2, 32, 32, 32)),
     ((2, 1, 32, 32, 32), (1, 1, 32, 32, 32))],
)  # fmt: skip
def test_wrong_shapes_are_named(crop, mask):
    with pytest.raises(ValueError, match="crop and tumor_mask must") as error:
        GENERATOR.inpaint(torch.rand(crop), torch.zeros(mask, dtype=torch.bool), seed=0)
    assert str(crop) in str(error.value)


def test_a_crop_that_does_not_fold_is_named():
    with pytest.raises(ValueError, match="multiples of 4"):
        GENERATOR.inpaint(torch.rand(1, 1, 32, 32, 30), torch.ones(1, 1, 32, 32, 30).bool(), seed=0)


@pytest.mark.parametrize(
    "noise", [(4, 1, 8, 8, 8, 8), (5, 2, 8, 8, 8, 8), (5, 1, 8, 8, 8, 4), (8, 8, 8)]
)
def test_noise_of_a_wrong_shape_is_named(noise):
    crop, mask = tiny_crop()
    with pytest.raises(ValueError, match="noise"):
        GENERATOR.inpaint(crop, mask, noise=torch.randn(noise))


@pytest.mark.parametrize(
    "seed", [-1, 2**63, [1], [1, 2, 3], [1, -2], 1.5, "7", "77", [1.0, 2.0], [None, 1], {}]
)
def test_invalid_seeds_are_named(seed):
    with pytest.raises(ValueError, match="seed must be one non-negative int") as error:
        per_sample_seeds(seed, 2)
    assert repr(seed) in str(error.value)


def test_seeds_of_numpy_and_torch_count_as_ints():
    numpy = pytest.importorskip("numpy")
    for one in (5, numpy.int64(5), numpy.uint8(5), torch.tensor(5)):
        assert per_sample_seeds(one, 3) == [5, 6, 7]
    for many in ([1, 2], (1, 2), numpy.array([1, 2]), torch.tensor([1, 2]), range(1, 3)):
        assert per_sample_seeds(many, 2) == [1, 2]
    assert all(type(s) is int for s in per_sample_seeds(torch.tensor([1, 2]), 2))
    assert per_sample_seeds(2**63 - 1, 1) == [2**63 - 1]


@pytest.mark.parametrize(
    "fields",
    [{"method": "euler"}, {"prediction": "score"}, {"mask_conditioning": "cubic"}, {"steps": 5},
     {"steps": 0}, {"method": "ddim", "timesteps": 200, "steps": 60}, {"crop_size": 100},
     {"crop_size": 0}, {"crop_multiple": 0}, {"crop_multiple": -8}],
)  # fmt: skip
def test_invalid_samplers_are_named(fields):
    with pytest.raises(ValueError, match="must be"):
        SamplerConfig(**fields)


# -- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [0, 32])
def test_config_survives_json(codes):
    generator = tiny_generator(codes=codes, method="ddim", timesteps=20, steps=5)
    config = config_of(generator.autoencoder, generator.denoiser, generator.sampler)
    autoencoder, denoiser, sampler = build(json.loads(json.dumps(config)))
    assert autoencoder.config == generator.autoencoder.config
    assert denoiser.config == generator.denoiser.config
    assert sampler == generator.sampler
    assert config_of(autoencoder, denoiser, sampler) == config


def _without(config, key):
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [lambda c: _without(c, "sampler"), lambda c: _without(c, "denoiser"), lambda c: {},
     lambda c: [], lambda c: None,
     lambda c: {**c, "denoiser": {**c["denoiser"], "type": "mlp"}},
     lambda c: {**c, "denoiser": _without(c["denoiser"], "type")},
     lambda c: {**c, "denoiser": "conv"},
     lambda c: {**c, "autoencoder": {**c["autoencoder"], "dropout": 0.1}},
     lambda c: {**c, "autoencoder": {**c["autoencoder"], "padding": "mirror"}},
     lambda c: {**c, "sampler": {**c["sampler"], "steps": 5}},
     lambda c: {**c, "sampler": {**c["sampler"], "eta": 1}}],
)  # fmt: skip
def test_configs_of_no_generator_are_refused(change):
    with pytest.raises(ValueError):
        build(change(config_of(GENERATOR.autoencoder, GENERATOR.denoiser, GENERATOR.sampler)))


def test_a_denoiser_of_ones_own_cannot_be_saved(tmp_path):
    own = Generator(GENERATOR.autoencoder, torch.nn.Identity())
    with pytest.raises(TypeError, match="factorized or conv, got Identity"):
        own.save(tmp_path)


def test_a_default_dtype_does_not_change_a_tumour():
    generator, (crop, mask) = tiny_generator(), tiny_crop()
    expected = generator.change(crop, mask, seed=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.allclose(generator.change(crop, mask, seed=1), expected, atol=1e-4)
    finally:
        torch.set_default_dtype(before)
