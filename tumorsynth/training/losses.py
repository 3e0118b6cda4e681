"""Losses of stage 1 (paper 3.1): reconstruction, perception of slices, codebook, adversary.

Volumes are (B, 1, D, H, W) in [-1, 1], where 1 is 212.5 HU: an L1 of 0.05 is 10.6 HU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERCEPTUAL = ("none", "gradient", "monai")
WINDOW, STRIDE = 7, 3  # pixels, of the local statistics: every third window, for a CPU's sake
SCALES = 3  # 1, 2 and 4 mm at the generator's 1 mm
# Local contrasts are divided by sd + FLOOR: 8.5 HU, so that noise-free areas are not blown up.
FLOOR = 0.04
_RADIMAGENET = "RadImageNet-ResNet50_notop.pth"
_SNAPSHOT = "models--MONAI--checkpoints/snapshots/*/"
# MONAI's networks for 2-D slices: the packages they need, and what they need in torch's hub folder
NETWORKS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
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

    L1 is the paper's and keeps edges: its minimum is the median of what a latent may stand for, so
    a voxel of one tissue or the other comes out as one of them, where L2 gives the mean of both.
    Either alone removes the noise that does not fit through the latent.
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
    """A module (recon, target) -> loss over the 2-D slices of all three planes.

    "none": zero. "gradient": :class:`SliceGradient`, which needs no weights.
    "monai": ``monai.losses.PerceptualLoss`` on half of the slices (random ones, from the global
    random state) with one of NETWORKS, whose weights must be in torch's hub folder already: nothing
    is downloaded here. ``weights`` is a file for "resnet50".

    Raises ValueError for another kind or network, ImportError for a package that is missing,
    FileNotFoundError for weights that are.
    """
    if kind == "none":
        return _Zero()
    if kind == "gradient":
        return SliceGradient()
    if kind == "monai":
        return _MonaiPerceptual(network, weights)
    raise ValueError(f"a perceptual loss must be one of {', '.join(PERCEPTUAL)}, got {kind!r}")


class SliceGradient(nn.Module):
    """What a network's first layers would see of a slice, without a network: edges and texture.

    For the slices of each plane at 1, 2 and 4 mm (2x2 averages), the sum of three mean absolute
    differences between reconstruction and scan:

    * edges: the finite differences along both axes of the slice;
    * texture: the standard deviation in windows of 7 x 7 pixels. It does not ask where a grain is,
      only how strong it is, and so is the one term here to which a blurred copy is worse than a
      sharp one with grain of its own;
    * structure, a tenth: the local contrast ``(v - mean) / (sd + 8.5 HU)`` of a window's
      middle, in which a faint vessel counts as much as a bone.

    Zero for equal volumes and never negative. float32 whatever the input's type.

    Measured (400 steps of fine-tuning the light autoencoder, one run each, on the liver of a scan
    kept out): beside L1, with weights of 1 and 4, the error stayed at 10.0 HU and the noise that
    comes through rose from 6.5 to 7.1 and 7.3 HU of the scan's 11.8; a CPU's step took 14 to 17 %
    longer.
    """

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        if recon.shape != target.shape or recon.ndim != 5:
            raise ValueError(
                "reconstruction and target must have one shape (B, C, D, H, W), got "
                f"{tuple(recon.shape)} and {tuple(target.shape)}"
            )
        total = recon.new_zeros((), dtype=torch.float32)
        with torch.autocast(recon.device.type, enabled=False):  # differences of near-equal numbers
            for axis in (2, 3, 4):
                a, b = (_slices(v.float(), axis) for v in (recon, target))
                for scale in range(SCALES):
                    if scale:
                        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
                    if min(a.shape[2:]) < WINDOW:
                        break
                    total = total + _slice_difference(a, b)
        return total / (3 * SCALES)


def _slices(volume: Tensor, axis: int) -> Tensor:
    """(B, C, D, H, W) -> (B n C, 1, h, w): all slices across one axis."""
    slices = volume.movedim(axis, 1)
    return slices.reshape(-1, 1, *slices.shape[-2:])


def _slice_difference(a: Tensor, b: Tensor) -> Tensor:
    d = a - b
    edges = (d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()) / 2
    (contrast_a, sd_a), (contrast_b, sd_b) = _local(a), _local(b)
    return edges + (sd_a - sd_b).abs().mean() + 0.1 * (contrast_a - contrast_b).abs().mean()


def _local(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised contrast of the middles, and standard deviation, of windows inside the slice."""
    mean = F.avg_pool2d(x, WINDOW, STRIDE)
    middle = x[..., WINDOW // 2 :: STRIDE, WINDOW // 2 :: STRIDE]
    middle = middle[..., : mean.shape[2], : mean.shape[3]]
    # squares about 0 lose no more than 1e-6 here: values are within [-1, 1] or little beyond
    variance = (F.avg_pool2d(x.square(), WINDOW, STRIDE) - mean.square()).clamp_min(0)
    sd = (variance + 1e-6).sqrt()  # the root's slope is infinite at 0
    return (middle - mean) / (sd + FLOOR), sd


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
        return super().train(False)  # a judge does not learn, nor do its batch statistics

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        if self.unit:
            recon, target = (recon + 1) / 2, (target + 1) / 2
        return self.loss(recon, target)


def _check_monai(network: str, weights: Path | None) -> None:
    """Everything MONAI would import or download is here already, or an error says what is not."""
    if network not in NETWORKS:
        raise ValueError(
            f"the perceptual network must be one of {', '.join(NETWORKS)}, got {network!r}"
        )
    if weights is not None and network != "resnet50":
        raise ValueError(
            f'a file of weights is for network "resnet50" alone, got network {network!r}; put the '
            "others' weights where torch.hub keeps them"
        )
    packages, files = NETWORKS[network]
    other = 'or use the perceptual loss "gradient", which needs none'
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        raise ImportError(
            f'the perceptual network "{network}" needs {" and ".join(absent)}; '
            f"pip install {' '.join(absent)}, {other}"
        )
    hub = Path(torch.hub.get_dir())
    missing = [
        str(hub / names[0]) for names in files if not any(any(hub.glob(name)) for name in names)
    ]
    if weights is not None:
        missing = [] if Path(weights).is_file() else [str(weights)]
    if missing:
        raise FileNotFoundError(
            f'the perceptual network "{network}" is not at hand: {" and ".join(missing)} missing; '
            f"let monai.losses.PerceptualLoss download it once, {other}"
        )


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean of ``relu(1 - real)`` and ``relu(1 + fake)``: 1 for one that knows nothing, best 0."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """``-mean(logits)`` of reconstructions, whose gradient must reach them."""
    return -fake_logits.mean()


def feature_matching(real_features: Sequence[Tensor], fake_features: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the L1 between a discriminator's features; the real ones are detached.

    Of scan and reconstruction, layer by layer (VQGAN; paper 3.1).
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
    """Mean squared distance of the encoder's output to its codes, which are detached.

    The codes follow by moving average (`Codebook`), so this is the one codebook loss. 0 for a
    continuous latent.
    """
    return F.mse_loss(latent.float(), quantised.detach().float())
