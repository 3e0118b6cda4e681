"""For which tissue a generator is: `TissueRange`, and how the tissue around a tumour compares.

A generator paints what it learned: a lung generator adds 700 HU, which makes bone of an effusion.
Its card says under ``tissue_range`` where it may paint. The tissue is measured in averages over
4 mm, so that a noisy scan and a smooth one of the same patient are judged alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.arguments import format_beside, is_bool
from tumorsynth.intensity import Intensity

CARD_KEY = "tissue_range"
SHELL_MM = 6.0  # around a tumour, whose tissue counts with that under it
SAMPLE_MM = 2.0  # between the voxels that are looked at, in a finer grid
AVERAGE_MM = 4.0  # side of the cubes whose averages are compared
TENTH = 0.1  # of the averages, that may lie beyond either end of ``local_hu``
AIR_HU = -1000.0  # compact tissue below this is air or padding, also in a lung
MAX_HU = 4000.0  # of a range's ends


@dataclass(frozen=True)
class TissueRange:
    """For which tissue a generator is, in HU. Pairs are (low, high).

    Args:
        level_hu: the median of the tissue around a tumour lies within.
        local_hu: evenness. At most a tenth of the tissue, in averages over 4 mm, lies below and at
            most a tenth above; so that a tumour is not painted half into another tissue.
        voxel_hu: voxels of the organ's label beyond are padding, gas, metal: no place for a tumour.

    Raises:
        ValueError: unless ``voxel_hu`` holds ``local_hu``, which holds ``level_hu``, all finite.
    """

    level_hu: tuple[float, float]
    local_hu: tuple[float, float]
    voxel_hu: tuple[float, float]

    def __post_init__(self) -> None:
        for field in fields(self):
            pair = getattr(self, field.name)
            if not _is_pair(pair):
                raise ValueError(
                    f"{field.name} of a card's {CARD_KEY} must be (low, high) in HU within "
                    f"{MAX_HU:g}, got {pair!r}; correct the card"
                )
            object.__setattr__(self, field.name, (float(pair[0]), float(pair[1])))
        lows, highs = zip(self.voxel_hu, self.local_hu, self.level_hu, strict=True)
        if list(lows) != sorted(lows) or list(highs) != sorted(highs, reverse=True):
            raise ValueError(
                f"a card's {CARD_KEY} must have voxel_hu around local_hu around level_hu, got "
                f"{asdict(self)}; correct the card"
            )

    @classmethod
    def of_card(cls, card: Mapping[str, Any]) -> TissueRange | None:
        """Return the range in a generator's card; None if the card has none.

        Raises:
            ValueError: for an entry that is no range.
        """
        entry = card.get(CARD_KEY)
        if entry is None:
            return None
        names = [field.name for field in fields(cls)]
        if not isinstance(entry, Mapping) or sorted(entry) != sorted(names):
            raise ValueError(
                f"a card's {CARD_KEY} must hold {', '.join(names)}, got {str(entry)[:80]}; "
                "correct the card, or remove the entry"
            )
        return cls(**entry)

    def to_card(self) -> dict[str, list[float]]:
        """Return the entry of a card."""
        return {name: list(pair) for name, pair in asdict(self).items()}

    def voxel_range(self, intensity: Intensity) -> tuple[float, float]:
        """Return ``voxel_hu`` in the image's scale.

        A scale that clips between ``voxel_hu`` and ``local_hu`` shows padding, gas and metal as its
        ends, which then are outside as well; but not where air is next to tissue, as in a lung.
        """
        low, high = self.voxel_hu
        if intensity.limits is not None:
            darkest, brightest = (_to_hu(intensity, end) for end in intensity.limits)
            if AIR_HU < low < darkest < self.local_hu[0]:
                low = darkest + 1
            if self.local_hu[1] < brightest < high:
                high = brightest - 1
        offset, unit = _to_hu(intensity, 0.0), intensity.hu_per_unit
        return (low - offset) / unit, (high - offset) / unit

    def holds_all(self, hu: Tensor) -> bool:
        """Whether all values but NaN lie within ``level_hu``, so that `objection` has none."""
        low, high = self.level_hu
        darkest, brightest = hu.nan_to_num(low, math.inf, -math.inf).aminmax()
        return bool(darkest >= low) and bool(brightest <= high)

    def objection(self, tissue: Tissue, generator: str) -> str | None:
        """Return why a generator is not for a tissue, or None.

        Args:
            tissue: around a tumour.
            generator: its name, for the message.
        """
        (level_low, level_high), (low, high) = self.level_hu, self.local_hu
        if (
            level_low <= tissue.level_hu <= level_high
            and low <= tissue.dark_hu
            and tissue.bright_hu <= high
        ):
            return None
        level = format_beside(tissue.level_hu, self.level_hu, ".0f")
        dark = format_beside(tissue.dark_hu, self.local_hu, ".0f")
        bright = format_beside(tissue.bright_hu, self.local_hu, ".0f")
        return (
            f"the tissue around a tumour must be such as {generator} is for (median "
            f"{level_low:g} to {level_high:g} HU, most of it {low:g} to {high:g} HU), got median "
            f"{level} HU, most of it {dark} to {bright} HU; first check that the image is a CT in "
            "HU: MR, a changed sign, an offset and other scales look like this (intensity=). Then "
            "check organ_labels and the generator. Only if all are right, paint there all the same "
            "with contrast_hu= or any_tissue=True (--any-tissue)"
        )


class Tissue(NamedTuple):
    """Tissue in averages over `AVERAGE_MM`: their median, and what a tenth lies below and above."""

    level_hu: float
    dark_hu: float
    bright_hu: float


def measure_averages(hu: Tensor, spacing: Sequence[float]) -> Tissue | None:
    """Measure the tissue of an organ's part.

    Args:
        hu: (X, Y, Z), on the CPU; NaN where it does not count.
        spacing: mm per voxel.

    Returns:
        The tissue; None if nothing counts.
    """
    counted = hu.isfinite()
    kernel = [
        min(n, max(1, math.ceil(AVERAGE_MM / s))) for n, s in zip(hu.shape, spacing, strict=True)
    ]
    both = torch.stack([hu.nan_to_num(0.0, 0.0, 0.0), counted.to(hu.dtype)])[None]
    sums, counts = F.avg_pool3d(both, kernel, ceil_mode=True)[0]
    most = float(counts.max())
    if most == 0:
        return None
    averages = (sums / counts)[counts >= 0.5 * most].sort().values
    dark, level, bright = (
        float(averages[round(share * (len(averages) - 1))]) for share in (TENTH, 0.5, 1 - TENTH)
    )
    return Tissue(level, dark, bright)


def holds_air(hu: Tensor, tumor_mask: Tensor) -> bool:
    """Whether a tumour holds compact air or padding: voxels of 3x3x3 that are all below AIR_HU.

    Noise alone makes single voxels of a lung that dark.

    Args:
        hu: (X, Y, Z), on the CPU.
        tumor_mask: bool, same shape.
    """
    air = hu <= AIR_HU
    if not bool((air & tumor_mask).any()):
        return False
    compact = -F.max_pool3d(-air[None].to(torch.float32), 3, stride=1, padding=1)
    opened = F.max_pool3d(compact, 3, stride=1, padding=1)[0] > 0
    return bool((opened & tumor_mask).any())


def _to_hu(intensity: Intensity, value: float) -> float:
    return float(intensity.to_hu(torch.tensor(value, dtype=torch.float64)))


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(end, Real) and not is_bool(end) for end in pair)
        and -MAX_HU <= pair[0] < pair[1] <= MAX_HU
    )


# Abdominal organs, in which early tumours look alike (Chen et al., CVPR 2024, whose window ends at
# 250 HU): from a liver with steatosis (unenhanced livers have 59 +- 11 HU, Boyce et al., AJR 2010,
# steatotic ones less) or a pancreas with fat between its lobules to an arterial kidney's cortex
SOFT_TISSUE = TissueRange((-30.0, 250.0), (-110.0, 310.0), (-250.0, 700.0))
