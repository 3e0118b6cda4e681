"""The discriminators: shapes, independence of batch-mates, slices; and that they can tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.training.discriminators import PatchDiscriminator, random_slices
from tumorsynth.training.losses import hinge_discriminator_loss


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("width", "layers"), [(4, 1), (6, 2), (8, 3)])
def test_logits_of_patches_and_a_feature_per_layer(dims: int, width: int, layers: int):
    torch.manual_seed(0)
    logits, features = PatchDiscriminator(dims, width, layers)(noise(2, 1, *[16] * dims))
    assert logits.shape == (2, 1, *[16 // 2**layers] * dims)
    assert [f.shape[1] for f in features] == [width * 2**k for k in range(layers + 1)]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_sample_does_not_depend_on_its_batch_mates(dims: int):
    torch.manual_seed(0)
    network = PatchDiscriminator(dims, 8, 2).train()
    batch = noise(3, 1, *[16] * dims)
    logits, features = network(batch)
    batch[1:] = 5 * noise(2, 1, *[16] * dims, seed=1)
    alone, among = network(batch[:1]), network(batch)
    for some in (alone, among):
        torch.testing.assert_close(some[0][:1], logits[:1], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(some[1], features, strict=True):
            torch.testing.assert_close(ours[:1], theirs[:1], rtol=1e-4, atol=1e-5)
    assert not list(network.buffers())  # nothing but weights to save or to keep equal


@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_to_tell_blurred_from_grainy(dims: int):
    torch.manual_seed(0)
    network = PatchDiscriminator(dims, 8, 2)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    for step in range(40):
        real = noise(4, 1, *[16] * dims, seed=step)
        fake = 0.5 * real + 0.5 * pool(real, 3, 1, padding=1)
        loss = hinge_discriminator_loss(network(real)[0], network(fake)[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5


def test_discriminators_name_what_is_wrong():
    with pytest.raises(ValueError, match="dims must be 2"):
        PatchDiscriminator(4)
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        PatchDiscriminator(2, 0)
    with pytest.raises(ValueError, match="at least 8, got .*4, 4"):
        PatchDiscriminator(2, 4, 3)(noise(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"3-D discriminator takes \(B, 1, side, side, side\)"):
        PatchDiscriminator(3, 4, 1)(noise(1, 1, 8, 8))
    with pytest.raises(ValueError, match="cubes"):
        random_slices(noise(1, 1, 8, 8, 4))
    with pytest.raises(ValueError, match="one shape"):
        random_slices(noise(1, 1, 8, 8, 8), noise(2, 1, 8, 8, 8))


def test_slices_are_whole_slices_of_the_three_planes():
    side, count, batch = 6, 5, 3
    index = torch.arange(batch * side**3).reshape(batch, 1, side, side, side)
    (slices,) = random_slices(index, count=count, generator=torch.Generator().manual_seed(0))
    assert slices.shape == (3 * count * batch, 1, side, side)
    drawn = set()
    for k, piece in enumerate(slices):
        plane, sample = k // (count * batch), k % batch
        here = torch.isin(index[sample, 0], piece).nonzero()
        constant = [axis for axis in range(3) if len(here[:, axis].unique()) == 1]
        assert constant == [plane] and len(here) == side**2
        drawn.add((plane, sample, int(here[0, plane])))
    assert len(drawn) > 3 * batch  # samples and draws differ


def test_slices_of_scan_and_reconstruction_are_the_same_ones():
    scan = noise(2, 1, 8, 8, 8)
    recon = (2 * scan).requires_grad_()
    of_scan, of_recon = random_slices(scan, recon, count=2)
    assert torch.equal(2 * of_scan, of_recon)
    of_recon.sum().backward()
    assert recon.grad is not None and 0 < recon.grad.count_nonzero() < recon.numel()
    again = [
        random_slices(scan, count=2, generator=torch.Generator().manual_seed(s))[0]
        for s in (1, 1, 2)
    ]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
