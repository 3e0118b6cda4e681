"""Stage 1's losses: their values, what they ask for, and where their gradients go."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.training.losses import (
    PERCEPTUAL,
    ReconstructionLoss,
    commitment,
    feature_matching,
    hinge_discriminator_loss,
    hinge_generator_loss,
    slice_perceptual,
)


def scan(seed: int = 0, side: int = 32, noise: float = 0.06) -> Tensor:
    """Smooth tissue with an edge, and noise of about 13 HU: (2, 1, side, side, side)."""
    rng = torch.Generator().manual_seed(seed)
    shape = (2, 1, side, side, side)
    tissue = torch.zeros(shape)
    tissue[..., side // 3 :, :] = 0.3
    return tissue + noise * torch.randn(shape, generator=rng)


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool3d(F.pad(x, (1,) * 6, mode="replicate"), 3, 1)


def test_reconstruction_is_the_mean_difference():
    recon, target = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 2.0, 0.0])
    assert ReconstructionLoss()(recon, target) == pytest.approx(4 / 3)
    assert ReconstructionLoss("l2")(recon, target) == pytest.approx(10 / 3)
    half = ReconstructionLoss()(recon.bfloat16(), target)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="l1.*l2.*got 'l3'"):
        ReconstructionLoss("l3")


def test_gradient_perceptual_is_zero_for_equals_with_a_finite_slope():
    loss, target = slice_perceptual(), scan()
    recon = target.clone().requires_grad_()
    value = loss(recon, target)
    value.backward()
    assert value == 0
    assert recon.grad is not None and torch.isfinite(recon.grad).all()
    flat = torch.zeros(1, 1, 16, 16, 16, requires_grad=True)  # no contrast at all: air
    loss(flat, torch.zeros_like(flat)).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_gradient_perceptual_does_not_mind_brightness():
    target = scan()
    shifted, noisy = target + 0.1, target + 0.1 * torch.randn(target.shape)
    loss = slice_perceptual()
    assert loss(shifted, target) < 1e-3 < 1e-2 < loss(noisy, target)


def test_gradient_perceptual_treats_the_three_planes_alike():
    loss, a, b = slice_perceptual(), scan(0), scan(1)
    expected = loss(a, b)
    for axes in ((0, 1, 3, 4, 2), (0, 1, 2, 4, 3)):
        torch.testing.assert_close(loss(a.permute(axes), b.permute(axes)), expected)


def test_gradient_perceptual_asks_for_texture_more_than_l1_does():
    # L1 prefers a blurred copy to one with a grain of its own by far; perception much less
    target, other = scan(0), scan(1)
    ratio = {
        name: float(loss(blurred(target), target) / loss(other, target))
        for name, loss in (("l1", ReconstructionLoss()), ("gradient", slice_perceptual()))
    }
    assert ratio["l1"] < 0.75
    assert ratio["gradient"] > 1.2 * ratio["l1"]


def test_gradient_perceptual_grows_with_blur_and_with_noise():
    loss, target = slice_perceptual(), scan()
    blur = [loss(target.lerp(blurred(target), amount), target) for amount in (0.0, 0.3, 0.6, 1.0)]
    noise = [loss(target + s * torch.randn(target.shape), target) for s in (0.0, 0.02, 0.05, 0.1)]
    assert blur == sorted(blur) and noise == sorted(noise)


def test_gradient_perceptual_is_computed_in_float32():
    loss, recon, target = slice_perceptual(), scan(0), scan(1)
    expected = loss(recon, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(recon, target), expected)
    assert loss(recon.bfloat16(), target).dtype == torch.float32


def test_perceptual_none_is_zero():
    assert slice_perceptual("none")(scan(0), scan(1)) == 0


def test_perceptual_names_what_is_wrong():
    with pytest.raises(ValueError, match=", ".join(PERCEPTUAL)):
        slice_perceptual("lpips")
    with pytest.raises(ValueError, match="radimagenet_resnet50.*got 'resnet'"):
        slice_perceptual("monai", "resnet")
    with pytest.raises(ValueError, match='file of weights is for network "resnet50" alone'):
        slice_perceptual("monai", "vgg", Path("vgg.pth"))
    with pytest.raises(ValueError, match="one shape"):
        slice_perceptual()(scan()[:1], scan())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    yield tmp_path
    torch.hub.set_dir(before)


def test_monai_without_its_weights_names_the_files_and_the_way_out(hub: Path):
    if find_spec("monai") is None or find_spec("huggingface_hub") is None:
        pytest.skip("needs monai and huggingface_hub")
    with pytest.raises(FileNotFoundError, match='RadImageNet-ResNet50_notop.pth.*"gradient"'):
        slice_perceptual("monai")


def test_monai_without_its_packages_names_them(hub: Path):
    if find_spec("lpips") is not None:
        pytest.skip("needs lpips not to be installed")
    with pytest.raises(ImportError, match="lpips.*pip install.*lpips"):
        slice_perceptual("monai", "vgg")


def test_monai_runs_on_a_network_at_hand_and_leaves_it_alone(hub: Path):
    pytest.importorskip("monai")
    pytest.importorskip("huggingface_hub")
    # torch's hub folder as MONAI's own first use leaves it, around a network of one layer
    repo = hub / "Project-MONAI_perceptual-models_main"
    repo.mkdir()
    (repo / "hubconf.py").write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "def radimagenet_resnet50(verbose=False, cache_dir=None):\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))\n"
        f"    file = Path({str(hub)!r}) / 'RadImageNet-ResNet50_notop.pth'\n"
        "    net.load_state_dict(torch.load(file, weights_only=True))\n"
        "    return net\n"
    )
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net.state_dict(), hub / "RadImageNet-ResNet50_notop.pth")
    loss = slice_perceptual("monai").train()
    target, recon = scan(0, side=16), scan(1, side=16).requires_grad_()
    value = loss(recon, target)
    value.backward()
    assert value > 0 and recon.grad is not None and recon.grad.abs().max() > 0
    assert loss(target, target) == pytest.approx(0, abs=1e-6)
    assert torch.equal(target, scan(0, side=16))  # MONAI shifts its input in place
    assert not any(p.requires_grad for p in loss.parameters())
    for name, value in net.state_dict().items():  # no batch statistics were taken up
        assert any(k.endswith(name) and torch.equal(v, value) for k, v in loss.state_dict().items())


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator_loss(real, fake) == pytest.approx((0.25 + 0.5) / 2)
    ignorant = torch.zeros(4)
    assert hinge_discriminator_loss(ignorant, ignorant) == 1
    logits = torch.tensor([-1.0, 4.0], requires_grad=True)
    hinge_generator_loss(logits).backward()
    assert logits.grad is not None and (logits.grad < 0).all()  # up is better, however sure


def test_feature_matching_pulls_the_reconstruction_alone():
    real = [torch.ones(2, 3, requires_grad=True), torch.zeros(1, 4, requires_grad=True)]
    fake = [torch.zeros(2, 3, requires_grad=True), torch.full((1, 4), 3.0, requires_grad=True)]
    value = feature_matching(real, fake)
    assert value.item() == pytest.approx((1 + 3) / 2)  # by layer, however many numbers each has
    value.backward()
    assert all(r.grad is None for r in real)
    assert all(f.grad is not None for f in fake)
    assert feature_matching(real, real) == 0
    with pytest.raises(ValueError, match="2 of the real and 1 of the fake"):
        feature_matching(real, fake[:1])


def test_commitment_pulls_the_latent_alone():
    latent = torch.tensor([1.0, 2.0], requires_grad=True)
    codes = torch.tensor([0.0, 4.0], requires_grad=True)
    value = commitment(latent, codes)
    value.backward()
    assert value.item() == pytest.approx(2.5)
    assert codes.grad is None and latent.grad is not None
    assert torch.equal(latent.grad.sign(), torch.tensor([1.0, -1.0]))
    assert commitment(latent, latent) == 0
