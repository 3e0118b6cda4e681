"""How far a tumour lies above or below the tissue around it: measured, drawn, and set.

Volumes here are (B, 1, X, Y, Z) in HU with 1 mm voxels. Contrast is the mean of a tumour's core
minus the median of the tissue 2 to 6 mm away from it. Nothing waits for a GPU.

Contrast is measured in two more places, each for what it has. This one steers a painted crop of the
1 mm grid, where no organ's label is at hand, and stays within the crop. `gate.measure` judges the
tumour as written, at any spacing, against the organ's label 2 to 8 mm away. `tumor_statistics` of
the training reports, on the same shell, what figures of annotated tumours are compared with. In an
even organ the three agree to within the noise; near vessels and other organs the shells differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.arguments import any_bool
from tumorsynth.devices import on_cpu, onto
from tumorsynth.geometry import box_around

NEAR_MM, FAR_MM = 2, 6  # where the tissue around a tumour is measured
ENOUGH = 50  # voxels of it
ALIKE_HU = 50.0  # noise and all, of tissue that is like other tissue
CORE = 20  # voxels that a tumour without its outermost layer needs, to be measured there
KERNEL_SUM = 1 + 2 * math.exp(-0.5) + 2 * math.exp(-2)
FLOOR_HU = 10.0  # fluid: solid tissue does not become darker than this
SCALES = 0.3, 1.5  # of the contrast with the tissue's own level


@dataclass(frozen=True)
class ContrastConfig:
    """What a generator knows about contrast.

    low, high: HU; drawn uniformly for a tumour for which none is asked.
    reference_hu: the tissue for which low and high hold. They are scaled with the tissue's own
        level, so that a tumour in an unenhanced organ is fainter; None leaves them.
    tissue: HU that may be the tissue around; fat, air and bone next to it are not measured.
    even: inside, the denoiser's tumours vary more over a few mm than real ones; blended, they take
        the scan's own variation instead (`tumorsynth.appearance.noise`).
    """

    low: float = -55.0
    high: float = -20.0
    reference_hu: float | None = 110.0
    tissue: tuple[float, float] = (20.0, 220.0)
    even: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tissue", tuple(float(hu) for hu in self.tissue))
        numbers = [self.low, self.high, *self.tissue, self.reference_hu or 1.0]
        fine = len(self.tissue) == 2 and all(math.isfinite(n) for n in numbers)
        if not (fine and self.low <= self.high and self.tissue[0] < self.tissue[1]):
            raise ValueError(f"contrast needs finite low <= high and tissue low < high, got {self}")


def check_contrast(contrast_hu: float | Sequence[float] | None) -> tuple[float, float] | None:
    """(low, high) of a ``contrast_hu`` argument: None, a number, or (low, high)."""
    if contrast_hu is None:
        return None
    try:
        if isinstance(contrast_hu, str):
            raise TypeError("letters")
        values = [float(contrast_hu)] * 2 if isinstance(contrast_hu, Real) else list(contrast_hu)  # type: ignore[arg-type]
        low, high = (float(v) for v in values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -1500 <= low <= high <= 1500 or any_bool(contrast_hu):
        raise ValueError(
            "contrast_hu must be HU above (or, negative, below) the tissue around the tumour, a "
            "number or (low, high) with -1500 <= low <= high <= 1500, the darker first, got "
            f"{contrast_hu!r}; pass for example "
            "(-50, -20), or None for the generator's own"
        )
    return low, high


def level_around(hu: Tensor, tumor_mask: Tensor, tissue: tuple[float, float]) -> Tensor:
    """(B,): median HU of the tissue around each tumour; of all that is there where none is."""
    box = _around(tumor_mask, FAR_MM + 1)
    hu, tumor_mask = hu[box], tumor_mask[box]
    mask = tumor_mask.to(hu.dtype)
    shell = (grown(mask, FAR_MM) > 0) & ~(grown(mask, NEAR_MM) > 0)
    for wider in (~tumor_mask, torch.ones_like(tumor_mask)):
        shell = torch.where(_count(shell) > 0, shell, wider)
    fits = shell & (hu > tissue[0]) & (hu < tissue[1])
    fits = torch.where(_count(fits) >= ENOUGH, fits, shell)
    return torch.where(fits, hu, torch.nan).flatten(1).nanmedian(1).values


def own_level(healthy: Tensor, tumor_mask: Tensor) -> Tensor:
    """(B,): median of the tissue around each tumour that is like what the tumour replaces, or of
    that itself where there is too little: an asked contrast is to what can be seen there, in a
    bright kidney, in a fatty pancreas or in the renal sinus."""
    box = _around(tumor_mask, FAR_MM + 1)
    healthy, tumor_mask = healthy[box], tumor_mask[box]
    inside = torch.where(tumor_mask, healthy, torch.nan).flatten(1).nanmedian(1).values
    mask = tumor_mask.to(healthy.dtype)
    shell = (grown(mask, FAR_MM) > 0) & ~(grown(mask, NEAR_MM) > 0)
    alike = shell & ((healthy - inside[:, None, None, None, None]).abs() < ALIKE_HU)
    around = torch.where(alike, healthy, torch.nan).flatten(1).nanmedian(1).values
    return torch.where(_count(alike).flatten() >= ENOUGH, around, inside)


def core(tumor_mask: Tensor) -> Tensor:
    """The tumour without its outermost voxels, or the whole of a small one: bool, same shape."""
    eroded = ~(grown((~tumor_mask).float(), 1) > 0)
    return torch.where(_count(eroded) >= CORE, eroded, tumor_mask)


def contrast_of(hu: Tensor, tumor_mask: Tensor, level: Tensor) -> Tensor:
    """(B,): mean of each tumour's core minus the level around it."""
    box = _around(tumor_mask, 2)
    hu, tumor_mask = hu[box], tumor_mask[box]
    inside = core(tumor_mask).to(hu.dtype)
    return (hu * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1) - level


def draw_contrast(config: ContrastConfig, level: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """(B,) HU for tissue of these levels; the middle of the range without seeds."""
    # a stream of its own: the seed's first draws are the noise
    shares = [
        float(torch.rand((), generator=stream, dtype=torch.float32))
        for stream in (torch.Generator().manual_seed(seed ^ 0x636F6E74) for seed in seeds or [])
    ]
    share = onto(torch.tensor(shares or [0.5], dtype=level.dtype), level.device)
    drawn = config.low + (config.high - config.low) * share.expand(level.shape)
    if config.reference_hu is None:
        return drawn
    drawn = drawn * (level / config.reference_hu).clamp(*SCALES)
    return torch.maximum(drawn, (FLOOR_HU - level).clamp(max=0.0))


def shift(hu: Tensor, tumor_mask: Tensor, level: Tensor, wanted: Tensor) -> Tensor:
    """What to add to each painted volume so that its tumour has the wanted contrast, in HU.

    As soft at the outline as what generators paint: half there. Anything wider would show beside
    their edge as a rim, bright in a kidney, where they paint too dark by tens of HU.
    """
    box = _around(tumor_mask, 3)  # further than what is soft
    change, hu, tumor_mask = torch.zeros_like(hu), hu[box], tumor_mask[box]
    off = wanted - contrast_of(hu, tumor_mask, level)
    soft = tumor_mask.to(hu.dtype)
    for axis in (2, 3, 4):
        soft = _softened(soft, axis)
    inside = core(tumor_mask).to(hu.dtype)
    share = (soft * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    change[box] = soft * (off / share.clamp(min=0.1))[:, None, None, None, None]
    return change


def _around(tumor_mask: Tensor, margin: int) -> tuple[slice, ...]:
    """The part of (B, 1, X, Y, Z) that holds the tumours and ``margin`` voxels around them; all of
    it on a GPU, which would have to be waited for, and where a sample has none."""
    if not on_cpu(tumor_mask) or not bool(tumor_mask.flatten(1).any(1).all()):
        return (slice(None),) * 5
    box = box_around(tumor_mask.flatten(0, 1).any(0), margin)
    assert box is not None
    return (slice(None), slice(None), *box)


def _softened(volume: Tensor, axis: int) -> Tensor:
    """Filtered along an axis with a Gaussian of a voxel, two voxels wide, nothing beyond."""
    at = torch.arange(volume.shape[axis], device=volume.device, dtype=volume.dtype)
    far = (at[:, None] - at).square()
    kernel = torch.where(far <= 4, torch.exp(-0.5 * far), 0.0) / KERNEL_SUM
    return torch.movedim(torch.tensordot(kernel, volume, dims=([1], [axis])), 0, axis)


def grown(mask: Tensor, by: int) -> Tensor:
    """A box dilation: one axis at a time costs a tenth of all three at once."""
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * by + 1, by
        mask = F.max_pool3d(mask, kernel, stride=1, padding=padding)
    return mask


def _count(mask: Tensor) -> Tensor:
    return mask.flatten(1).sum(1)[:, None, None, None, None]
