"""Losses of stage 1 (paper 3.1): reconstruction, perceptual, codebook, adversarial.

Volumes are (B, 1, D, H, W) in [-1, 1]; a difference of 1 is 212.5 HU in the default window.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERCEPTUAL = ("none", "gradient", "monai")
WINDOW_PIXELS = 7  # side of the windows of local statistics
WINDOW_STRIDE = 3  # pixels between windows; every third is enough, and faster on a CPU
SCALES = 3  # 1, 2 and 4 mm at the generator's 1 mm
MIN_SD = 0.04  # added to a window's standard deviation: 8.5 HU, so that noise-free areas stay small
STRUCTURE_WEIGHT = 0.1
_RADIMAGENET = "RadImageNet-ResNet50_notop.pth"
_SNAPSHOT = "models--MONAI--checkpoints/snapshots/*/"
# MONAI's networks for 2-D slices: packages and files in torch's hub folder that each needs
PERCEPTUAL_NETWORKS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "radimagenet_resnet50": (
        ("monai", "huggingface_hub"),
        # its code, and its weights in one of two places
        (
            ("Project-MONAI_perceptual-models_main/hubconf.py",),
            (_RADIMAGENET, _SNAPSHOT + _RADIMAGENET),
        ),
    ),
    "alex": (("monai", "lpips", "torchvision"), (("checkpoints/alexnet-owt-*",),)),
    "vgg": (("monai", "lpips", "torchvision"), (("checkpoints/vgg16-*",),)),
    "squeeze": (("monai", "lpips", "torchvision"), (("checkpoints/squeezenet1_1-*",),)),
    "resnet50": (("monai", "torchvision"), (("checkpoints/resnet50-*",),)),
}


class ReconstructionLoss(nn.Module):
    """Mean absolute ("l1", the default) or squared ("l2") difference over all voxels.

    The paper uses L1, which keeps edges: its minimum is the median of the volumes that share a
    latent, so that a voxel becomes one tissue or the other; with L2 it becomes the mean of both.
    Either alone removes noise that the latent cannot hold.

    Args:
        kind: "l1" or "l2".

    Raises:
        ValueError: for another kind.
    """

    def __init__(self, kind: str = "l1"):
        super().__init__()
        if kind not in ("l1", "l2"):
            raise ValueError(f'a reconstruction loss must be "l1" or "l2", got {kind!r}')
        self.kind = kind

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        difference = recon.float() - target.float()
        return difference.abs().mean() if self.kind == "l1" else difference.square().mean()


def slice_perceptual(
    kind: str = "gradient", network: str = "radimagenet_resnet50", weights: Path | None = None
) -> nn.Module:
    """Build a module (recon, target) -> loss over the 2-D slices of all three planes.

    Args:
        kind: "none" for zero; "gradient" for `SliceGradient`, which needs no weights; "monai" for
            ``monai.losses.PerceptualLoss`` on a random half of the slices (from the global random
            state).
        network: one of PERCEPTUAL_NETWORKS, for "monai". Its weights must already be in torch's hub
            folder: nothing is downloaded.
        weights: a file of weights, for "resnet50".

    Raises:
        ValueError: for another kind or network.
        ImportError: for a missing package.
        FileNotFoundError: for missing weights.
    """
    if kind == "none":
        return _Zero()
    if kind == "gradient":
        return SliceGradient()
    if kind == "monai":
        return _MonaiPerceptual(network, weights)
    raise ValueError(f"a perceptual loss must be one of {', '.join(PERCEPTUAL)}, got {kind!r}")


class SliceGradient(nn.Module):
    """Compare edges and texture of slices, as the first layers of a network would.

    For the slices of each plane at 1, 2 and 4 mm (2x2 averages), the sum of three mean absolute
    differences between reconstruction and scan:

    * edges: finite differences along both axes of the slice;
    * texture: standard deviation in windows of 7 x 7 pixels. It depends on the strength of noise
      and not on its pattern: sharp noise of another pattern costs less than a blurred copy;
    * structure, weighted by 0.1: local contrast ``(v - mean) / (sd + 8.5 HU)`` in the middle of a
      window, which weighs a faint vessel like a bone.

    The loss is float32, zero for equal volumes and never negative.
    """

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        if recon.shape != target.shape or recon.ndim != 5:
            raise ValueError(
                "reconstruction and target must have one shape (B, C, D, H, W), got "
                f"{tuple(recon.shape)} and {tuple(target.shape)}"
            )
        total = recon.new_zeros((), dtype=torch.float32)
        with torch.autocast(
            recon.device.type, enabled=False
        ):  # differences of nearly equal numbers
            for axis in (2, 3, 4):
                a, b = (_slices(v.float(), axis) for v in (recon, target))
                for scale in range(SCALES):
                    if scale:
                        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
                    if min(a.shape[2:]) < WINDOW_PIXELS:
                        break
                    total = total + _slice_difference(a, b)
        return total / (3 * SCALES)


def _slices(volume: Tensor, axis: int) -> Tensor:
    """All slices of (B, C, D, H, W) across one axis: (B n C, 1, h, w)."""
    slices = volume.movedim(axis, 1)
    return slices.reshape(-1, 1, *slices.shape[-2:])


def _slice_difference(a: Tensor, b: Tensor) -> Tensor:
    difference = a - b
    edges = (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()) / 2
    (contrast_a, sd_a), (contrast_b, sd_b) = _local_statistics(a), _local_statistics(b)
    structure = (contrast_a - contrast_b).abs().mean()
    return edges + (sd_a - sd_b).abs().mean() + STRUCTURE_WEIGHT * structure


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised contrast of the middle, and standard deviation, of each window."""
    mean = F.avg_pool2d(x, WINDOW_PIXELS, WINDOW_STRIDE)
    first = WINDOW_PIXELS // 2
    middle = x[..., first::WINDOW_STRIDE, first::WINDOW_STRIDE]
    middle = middle[..., : mean.shape[2], : mean.shape[3]]
    # for values of about [-1, 1] the difference of squares is exact to 1e-6
    squares = F.avg_pool2d(x.square(), WINDOW_PIXELS, WINDOW_STRIDE)
    variance = (squares - mean.square()).clamp_min(0)
    sd = (variance + 1e-6).sqrt()  # the root's slope is infinite at 0
    return (middle - mean) / (sd + MIN_SD), sd


class _Zero(nn.Module):
    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        return recon.new_zeros((), dtype=torch.float32)


class _MonaiPerceptual(nn.Module):
    def __init__(self, network: str, weights: Path | None):
        super().__init__()
        _check_monai(network, weights)
        from monai.losses import PerceptualLoss

        self.unit = network in ("radimagenet_resnet50", "resnet50")  # these expect [0, 1]
        self.loss = PerceptualLoss(
            spatial_dims=3,
            network_type=network,
            is_fake_3d=True,
            pretrained_path=None if weights is None else str(weights),
        )
        self.loss.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> _MonaiPerceptual:
        return super().train(False)  # neither its weights nor its batch statistics change

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        if self.unit:
            recon, target = (recon + 1) / 2, (target + 1) / 2
        return self.loss(recon, target)


def _check_monai(network: str, weights: Path | None) -> None:
    """Raise unless all that MONAI would import or download is present."""
    if network not in PERCEPTUAL_NETWORKS:
        raise ValueError(
            f"the perceptual network must be one of {', '.join(PERCEPTUAL_NETWORKS)}, got "
            f"{network!r}"
        )
    if weights is not None and network != "resnet50":
        raise ValueError(
            f'a file of weights is for network "resnet50" alone, got network {network!r}; put its '
            "weights into torch's hub folder"
        )
    packages, files = PERCEPTUAL_NETWORKS[network]
    alternative = 'or use the perceptual loss "gradient", which needs none'
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        raise ImportError(
            f'the perceptual network "{network}" needs {" and ".join(absent)}; '
            f"pip install {' '.join(absent)}, {alternative}"
        )
    hub = Path(torch.hub.get_dir())
    missing = [
        str(hub / names[0]) for names in files if not any(any(hub.glob(name)) for name in names)
    ]
    if weights is not None:
        missing = [] if Path(weights).is_file() else [str(weights)]
    if missing:
        raise FileNotFoundError(
            f'the perceptual network "{network}" lacks {" and ".join(missing)}; '
            f"let monai.losses.PerceptualLoss download it once, {alternative}"
        )


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the mean of ``relu(1 - real)`` and ``relu(1 + fake)``: 1 at chance, 0 at best."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return ``-mean(logits)`` of reconstructions."""
    return -fake_logits.mean()


def feature_matching(real_features: Sequence[Tensor], fake_features: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of the L1 between a discriminator's features (VQGAN; paper 3.1).

    Args:
        real_features: of the scan, layer by layer; they are detached.
        fake_features: of its reconstruction.

    Raises:
        ValueError: for different numbers of layers.
    """
    if len(real_features) != len(fake_features) or not real_features:
        raise ValueError(
            "feature matching needs the same layers of both, got "
            f"{len(real_features)} of the real and {len(fake_features)} of the fake"
        )
    layers = [
        F.l1_loss(fake.float(), real.detach().float())
        for real, fake in zip(real_features, fake_features, strict=True)
    ]
    return torch.stack(layers).mean()


def commitment(latent: Tensor, quantised: Tensor) -> Tensor:
    """Return the mean squared distance of the encoder's output to its codes, which are detached.

    `Codebook` updates the codes by a moving average, so that no other codebook loss is needed.
    """
    return F.mse_loss(latent.float(), quantised.detach().float())
