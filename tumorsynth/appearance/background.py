"""Background fill: even tissue where a tumour will be, before the tumour is painted.

Other tissue would show through a tumour, or make a generator paint something else: the fat that an
exophytic tumour grows into, the vessels of a lung, the fat that an organ's label covers. Inside the
tumour's outline it becomes even tissue of the organ's level, with the scan's noise.

Generators also soften a tumour's edge on its inside, which towards other tissue would leave a rind
of the organ's level. They are therefore shown a tumour that extends EXTENSION_MM into other tissue,
and what they paint beyond the outline is cut off, as sharply as the scan is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tumorsynth.appearance.blend import feather
from tumorsynth.appearance.local_noise import separate_noise
from tumorsynth.appearance.noise import grain_of_subvoxels, masked_median, unit_noise
from tumorsynth.devices import onto
from tumorsynth.fetching import Task
from tumorsynth.geometry import Floats3, Frame, Ints3, Rows3
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.types import TumorParams
from tumorsynth.random_streams import substream
from tumorsynth.subvoxels import ONE, average_subvoxels, refine_frame, repeat_voxels

MIN_LUNG_HU = -1050.0  # no tissue is below; other scales than HU may be
EXTENSION_MM = 3.0  # generators soften a tumour's edge up to this far inside
MAX_FAT_HU = -20.0  # an organ's voxels below this are fat that its label covers
MIN_SOFT_TISSUE_HU = 30.0  # level of an organ that is not fat itself
MAX_FAT_SHARE = 0.02  # of a tumour, that noise alone may make look like fat
MAX_LUNG_HU = -400.0  # tissue below this level is lung
ORGAN_EDGE_MM = 1.0  # width of an organ's surface that is half fat
CHEST_WALL_GAP_MM = 2.0  # lung that its label leaves out before the chest wall
SIGNAL_RATIO = 1.5  # for `separate_noise`; low, since traces of an edge show and noise is redrawn
MAX_NOISE_STRUCTURE = 0.1  # share of structure up to which a voxel shows noise alone
MAX_SHARE_OUTSIDE_WINDOW = 0.5  # of an organ's voxels, whose differences a generator cannot see


@dataclass(frozen=True)
class BackgroundFill:
    """Even tissue where a tumour will be, for a part of the sample.

    Args:
        change_hu: (X, Y, Z), what makes even tissue within the tumour's outline.
        generator_change_hu: the same within the outline that the generator is shown.
        generator_mask: bool, the tumour that the generator is shown, on subvoxels.
        other_tissue: bool (X, Y, Z), tissue that is not the organ's.
        weight: of the generator's change in ``other_tissue``, on subvoxels.
        keep_brighter: whether tissue brighter than the tumour stays in ``other_tissue``.
    """

    change_hu: Tensor
    generator_change_hu: Tensor
    generator_mask: Tensor
    other_tissue: Tensor
    weight: Tensor
    keep_brighter: bool


@dataclass(frozen=True)
class TissueAround:
    """The tissue that a tumour will be painted in.

    Args:
        organ: bool (X, Y, Z).
        level_hu: median of the organ; 0 without an organ.
        share_outside_window: share of the organ's voxels beyond the generator's window.
        fat_share: share of the tumour's voxels that are fat under the organ's label.
        outside_share: share of the tumour's voxels beyond the organ's label.
    """

    organ: Tensor
    level_hu: float
    share_outside_window: float
    fat_share: float
    outside_share: float

    def outside_window(self, window: tuple[float, float]) -> str | None:
        """Return why a generator cannot paint here; None if it can.

        Args:
            window: HU that the generator sees.
        """
        if self.share_outside_window <= MAX_SHARE_OUTSIDE_WINDOW:
            return None
        low, high = window
        fix = (
            "check that the image is a CT in HU (intensity=), not MR, another scale or of changed "
            "sign, and organ_labels: no soft tissue of a CT has these HU"
        )
        if MIN_LUNG_HU <= self.level_hu <= min(low, MAX_LUNG_HU):
            fix = (
                'pass generator="lung" (-1000 to 400 HU) if it is a lung; if it is not, the image '
                "is in another scale: pass intensity=, ts.Scaled(-1024, 3071, -2048, 2047) for "
                "HU - 1024"
            )
        return (
            f"most of the organ around a tumour must lie within {low:g} to {high:g} HU, which the "
            f"generator sees, but {self.share_outside_window:.0%} of it does not (median "
            f"{self.level_hu:.0f} HU); {fix}"
        )


def measure_tissue(
    hu: Tensor,
    label: Tensor,
    organ_labels: tuple[int, ...],
    inside: Tensor,
    window: tuple[float, float],
) -> Task[TissueAround]:
    """Measure the tissue that a tumour will be painted in.

    Args:
        hu: (X, Y, Z), the tumour and some mm around it, before it is painted.
        label: same shape.
        organ_labels: label values of the organ.
        inside: bool, same shape, the tumour.
        window: HU that the generator sees.
    """
    organ = is_organ(label, organ_labels)
    healthy = organ & hu.isfinite()
    level = masked_median(hu, healthy).nan_to_num(nan=0.0)
    invisible = healthy & ((hu <= window[0]) | (hu >= window[1]))
    shares = (
        invisible.sum() / healthy.sum().clamp(min=1),
        (healthy & inside & (hu < MAX_FAT_HU)).sum() / inside.sum(),
        (inside & ~organ).sum() / inside.sum(),
    )
    (numbers,) = yield [torch.stack([level, *(share.to(level) for share in shares)])]
    return TissueAround(organ, *numbers.tolist())


def fill_background(
    hu: Tensor,
    tissue: TissueAround,
    inside: Tensor,
    spacing: Floats3,
    grain_mm: Floats3,
    params: TumorParams,
    window: tuple[float, float],
    factors: Ints3 = ONE,
    shear: Rows3 | None = None,
) -> BackgroundFill | None:
    """Compute even tissue of the organ's level within a tumour's outline, as sharp as the scan.

    Three kinds of tumours need it: exophytic ones; those in lungs, unless the generator's window
    does not reach lung tissue; and those with more than a little fat under the organ's label, as in
    a kidney's sinus.

    The scan keeps its noise. Where noise cannot be told from an edge (the organ's surface, strands
    in the fat), similar noise is drawn from the shape seed. In a lung, the fill also closes a gap
    of up to CHEST_WALL_GAP_MM between nodule and chest wall, where the label often ends early.

    Args:
        hu: (X, Y, Z), the tumour and some mm around it, before it is painted.
        tissue: from `measure_tissue`.
        inside: bool, the tumour on subvoxels.
        spacing: mm per voxel.
        grain_mm: of the scan, along each axis.
        params: the tumour.
        window: HU that the generator sees.
        factors: subvoxels per voxel along each axis.
        shear: of the sample's axes; see `tumorsynth.geometry.Frame`.

    Returns:
        The fill, or None for all other tumours.
    """
    is_lung = tissue.level_hu < MAX_LUNG_HU and window[0] < MAX_LUNG_HU
    covers_fat = tissue.level_hu > MIN_SOFT_TISSUE_HU and tissue.fat_share > MAX_FAT_SHARE
    if params.bulge == 0 and not is_lung and not covers_fat:
        return None
    frame = Frame(spacing, shear=shear)
    fine = refine_frame(frame, factors)
    finite = hu.isfinite()
    hu = torch.where(finite, hu, 0.0)
    mean, structure = separate_noise(hu, tissue.organ, spacing, SIGNAL_RATIO)
    noise = (1 - structure) * (hu - mean)
    even = tissue.organ & finite & (structure < MAX_NOISE_STRUCTURE)
    noise_sd = noise[even].std() if int(even.sum()) > 1 else hu.new_tensor(0.0)
    stream = substream(params.shape_seed, "fill_noise")
    similar = onto(unit_noise(hu.shape, stream, grain_mm, spacing), hu.device)
    noise = noise + (structure * (2 - structure)).sqrt() * noise_sd * similar
    to_even = torch.where(finite, tissue.level_hu + noise - hu, 0.0)
    if is_lung:
        other_tissue = ~tissue.organ
    else:  # with the blurred border of the organ
        other_tissue = dilate(
            ~tissue.organ | (mean < MAX_FAT_HU), ORGAN_EDGE_MM, frame.plane_distance
        )
    fine_other = repeat_voxels(other_tissue, factors)
    shown = inside | (dilate(inside, EXTENSION_MM, fine.plane_distance) & fine_other)
    filled = inside
    if is_lung:
        near = dilate(inside, CHEST_WALL_GAP_MM, fine.plane_distance)
        filled = inside | (near & fine_other)
    fine_grain_mm = grain_of_subvoxels(grain_mm, spacing, factors)
    weight, shown_weight = (
        feather(part, fine_grain_mm, fine.spacing, "change", shear=shear)
        for part in (filled, shown)
    )
    return BackgroundFill(
        change_hu=average_subvoxels(weight, factors) * to_even,
        generator_change_hu=average_subvoxels(shown_weight, factors) * to_even,
        generator_mask=shown,
        other_tissue=other_tissue,
        weight=weight,
        keep_brighter=is_lung,
    )
