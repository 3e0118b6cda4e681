"""Contrast by organ and phase: hypo-, iso- and hyperattenuating tumours, rims, necrotic cores.

The named priors are assumptions from what radiology textbooks say of such tumours, not fitted to
scans: no annotated tumours of these phases were at hand, but for six of one enhanced liver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.contrast import FLOOR_HU, SCALES, core, grown
from tumorsynth.appearance.noise import MARGIN
from tumorsynth.devices import onto
from tumorsynth.geometry import box_around

Range = tuple[float, float]
CROSS = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))


@dataclass(frozen=True)
class ContrastPrior:
    """What ``contrast_hu=`` draws for each tumour. HU are against the tissue around it.

    hypo, iso, hyper: ranges of the contrast, and how often each is drawn (``shares``, of any sum).
    rim, rim_share: HU of a rim at the outline above the rest, and how many tumours have one.
    core_hu, core_share: HU of a necrotic middle against the rest (negative is darker), and how many
        of the tumours of at least ``core_from_mm`` have one.
    reference_hu: the tissue for which these hold; all are scaled with the tissue's own level, 0.3
        to 1.5 times. None leaves them.
    floor_hu: solid tissue is not made darker than this (fluid); None: no floor.

    contrast_hu is of the whole tumour, less its outermost voxels; rim and core leave that mean.
    Raises ValueError for ranges and shares that are none.
    """

    name: str = "custom"
    hypo: Range = (-50.0, -20.0)
    iso: Range = (-8.0, 8.0)
    hyper: Range = (10.0, 35.0)
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0)
    rim: Range = (8.0, 25.0)
    rim_share: float = 0.0
    core_hu: Range = (-35.0, -15.0)
    core_share: float = 0.0
    core_from_mm: float = 30.0
    reference_hu: float | None = None
    floor_hu: float | None = FLOOR_HU

    def __post_init__(self) -> None:
        for name in ("hypo", "iso", "hyper", "rim", "core_hu"):
            pair = getattr(self, name)
            if len(pair) != 2 or not -1500 <= pair[0] <= pair[1] <= 1500:
                raise ValueError(
                    f"{name} must be (low, high) in HU, the lower first, got {pair!r}; pass for "
                    "example hypo=(-50, -20)"
                )
        if len(self.shares) != 3 or min(self.shares) < 0 or not 0 < sum(self.shares) < math.inf:
            raise ValueError(
                f"shares must be three numbers of at least 0, not all 0, got {self.shares!r}; "
                "pass for example (0.85, 0.1, 0.05) of darker, alike and brighter tumours"
            )
        for name in ("rim_share", "core_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)!r}; pass 0 for none"
                )

    def draw(
        self, seed: int, diameter_mm: float, level_hu: float
    ) -> tuple[float, tuple[float, float]]:
        """(contrast, (rim, core)) in HU for one tumour in tissue of this level; rim or core is 0
        where the tumour has none."""
        # a stream of its own: the seed's first draws are the noise
        stream = torch.Generator().manual_seed(seed ^ 0x7072696F)
        kind, place, has_rim, rim, has_core, middle = torch.rand(
            6, generator=stream, dtype=torch.float32
        ).tolist()
        bounds = torch.tensor(self.shares, dtype=torch.float64).cumsum(0) / sum(self.shares)
        low, high = (self.hypo, self.iso, self.hyper)[int((bounds <= kind).sum().clamp(max=2))]
        scale = 1.0
        if self.reference_hu is not None:
            scale = min(max(level_hu / self.reference_hu, SCALES[0]), SCALES[1])
        contrast = scale * (low + (high - low) * place)
        if self.floor_hu is not None:  # tissue that is darker already keeps its level
            contrast = max(contrast, min(self.floor_hu - level_hu, 0.0))
        rim_hu = scale * (self.rim[0] + (self.rim[1] - self.rim[0]) * rim)
        low, high = self.core_hu
        core_hu = scale * (low + (high - low) * middle)
        large = diameter_mm >= self.core_from_mm
        return contrast, (
            rim_hu if has_rim < self.rim_share else 0.0,
            core_hu if large and has_core < self.core_share else 0.0,
        )


def get_contrast_prior(name: str) -> ContrastPrior:
    """The prior of this name, "liver-arterial" for example; an organ alone is its portal phase."""
    known = CONTRAST_PRIORS.get(name) or CONTRAST_PRIORS.get(f"{name}-portal")
    if known is None:
        raise ValueError(
            f"a contrast prior must be one of {', '.join(sorted(CONTRAST_PRIORS))}, got {name!r}; "
            "or pass HU, (low, high), or a tumorsynth.appearance.contrast_priors.ContrastPrior"
        )
    return known


def structured(
    change: Tensor, tumor_mask: Tensor, structure: tuple[float, float], seed: int
) -> Tensor:
    """A change with a rim and a core added, the mean of the tumour's core left as it is.

    change: (X, Y, Z) in HU, 1 mm voxels. tumor_mask: bool. structure: HU of rim and core. The rim
    is 2 to 3 mm wide inside the outline; the core has an uneven border, drawn from the seed.
    """
    if structure == (0.0, 0.0):
        return change
    box = box_around(tumor_mask, MARGIN)
    if box is None:
        return change
    change = change.clone()
    change[box] += _structure(tumor_mask[box], structure, seed)
    return change


def _structure(mask: Tensor, structure: tuple[float, float], seed: int) -> Tensor:
    """What `structured` adds, around the tumour."""
    rim_hu, core_hu = structure
    depth = _depth(mask)
    added = rim_hu * torch.exp(-0.5 * ((depth - 1.5) / 1.0).square())
    if core_hu != 0:
        stream = torch.Generator().manual_seed(seed ^ 0x636F7265)
        rough = gaussian_filter(
            torch.randn(mask.shape, generator=stream, dtype=torch.float32), [3.0] * 3
        )
        rough = onto(rough / rough.std(), mask.device)
        within = depth / depth.max() - 0.5 + 0.12 * rough
        added = added + core_hu * torch.sigmoid(within / 0.06)
    added = gaussian_filter(added * mask, [0.7] * 3)
    # what the rest gives up so that the mean stays, soft at the outline as the change itself is
    soft = gaussian_filter(mask.to(added.dtype), [1.0] * 3)
    inside = core(mask[None, None])[0, 0]
    return added - soft * (added[inside].mean() / soft[inside].mean())


def _depth(mask: Tensor) -> Tensor:
    """Voxels from the outline, 0 outside: how often a tumour can be peeled, up to 24 times."""
    outside, depth = (~mask).float()[None, None], torch.zeros_like(mask, dtype=torch.float32)
    for layer in range(24):
        depth += 1 - outside[0, 0]
        # cubes and diamonds in turn come close to balls
        crossed = [F.max_pool3d(outside, kernel, 1, padding) for kernel, padding in CROSS]
        outside = grown(outside, 1) if layer % 2 else torch.stack(crossed).amax(0)
        if bool(outside.all()):
            break
    return depth


_LIVER = ContrastPrior(
    "liver-portal",
    hypo=(-60.0, -20.0),
    iso=(-8.0, 8.0),
    hyper=(10.0, 35.0),
    shares=(0.85, 0.1, 0.05),
    rim_share=0.15,
    core_share=0.5,
    reference_hu=110.0,
)
_KIDNEY = ContrastPrior(
    "kidney-portal",
    hypo=(-110.0, -40.0),
    iso=(-12.0, 12.0),
    hyper=(10.0, 35.0),
    shares=(0.95, 0.05, 0.0),
    rim_share=0.1,
    core_share=0.5,
    reference_hu=170.0,
)
_PANCREAS = replace(
    _LIVER,
    name="pancreas-portal",
    hypo=(-50.0, -15.0),
    hyper=(10.0, 40.0),
    rim_share=0.05,
    core_share=0.3,
    reference_hu=95.0,
)
CONTRAST_PRIORS: dict[str, ContrastPrior] = {
    prior.name: prior
    for prior in (
        _LIVER,
        replace(
            _LIVER,
            name="liver-arterial",
            hypo=(-40.0, -12.0),
            hyper=(15.0, 50.0),
            shares=(0.5, 0.15, 0.35),
            rim=(10.0, 35.0),
            rim_share=0.25,
            reference_hu=70.0,
        ),
        replace(
            _LIVER,
            name="liver-unenhanced",
            hypo=(-25.0, -8.0),
            shares=(0.8, 0.2, 0.0),
            rim_share=0.0,
            core_hu=(-15.0, -6.0),
            reference_hu=55.0,
        ),
        _KIDNEY,
        replace(
            _KIDNEY,
            name="kidney-arterial",
            hypo=(-70.0, -20.0),
            hyper=(10.0, 50.0),
            shares=(0.65, 0.1, 0.25),
            reference_hu=130.0,
        ),
        replace(
            _KIDNEY,
            name="kidney-unenhanced",
            hypo=(-12.0, -5.0),
            iso=(-5.0, 8.0),
            hyper=(8.0, 25.0),
            shares=(0.3, 0.5, 0.2),
            rim_share=0.0,
            core_hu=(-12.0, -5.0),
            reference_hu=33.0,
        ),
        _PANCREAS,
        replace(
            _PANCREAS,
            name="pancreas-arterial",
            hypo=(-60.0, -20.0),
            hyper=(20.0, 60.0),
            shares=(0.85, 0.05, 0.1),
            reference_hu=105.0,
        ),
        replace(
            _PANCREAS,
            name="pancreas-unenhanced",
            hypo=(-12.0, -4.0),
            iso=(-5.0, 5.0),
            shares=(0.5, 0.5, 0.0),
            rim_share=0.0,
            core_hu=(-12.0, -5.0),
            reference_hu=40.0,
        ),
    )
}
