"""`CopyPaste`: real lesions, moved from annotated scans into healthy tissue.

Pasting lesions is what most people try first, and the baseline that a generator has to beat.
TumorCP (Yang et al., MICCAI 2021) pastes a lesion with a random flip, rotation, scale and contrast;
CarveMix (Zhang et al., MICCAI 2021) pastes it with a region around.
This implementation is written from the papers, and differs in three points:

* Placing, blending and reports are those of every generator here; a lesion keeps its contrast to
  the organ around it, not its HU.
* `change` moves what is coarser than noise: the lesion's shape, contrast, rim and inner texture.
  The scan keeps its own noise, which would otherwise give a pasted lesion away. `inpaint`, with
  blend="difftumor", pastes the voxels as they are.
* Where the organ's surface cuts a lesion, its edge goes along.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.contrast import FLUID_HU, MIN_DARKER_HU
from tumorsynth.appearance.surroundings import similar_level_around
from tumorsynth.appearance.tissue import CARD_KEY, SOFT_TISSUE, TissueRange
from tumorsynth.arguments import keywords_of, known_keywords
from tumorsynth.devices import onto
from tumorsynth.generators import filters
from tumorsynth.generators.annotated_scans import read_scans
from tumorsynth.generators.bank import KIND, read_bank, write_bank
from tumorsynth.generators.conditioning import ContrastTarget, check_pair, crop_to_hu
from tumorsynth.generators.lesions import TEXTURE_SIGMA_MM, Lesion, NoTissue, cut_lesions
from tumorsynth.generators.protocol import Pose
from tumorsynth.geometry import bounding_box
from tumorsynth.intensity import HU, HU_HIGH, HU_LOW, Intensity
from tumorsynth.models.slabs import Near
from tumorsynth.once import Once
from tumorsynth.placement.arguments import check_organ_labels, check_tumor_label
from tumorsynth.placement.rasterize import equivalent_diameter
from tumorsynth.placement.sample_tumor import choose_like_size
from tumorsynth.placement.settings import OwnShape
from tumorsynth.random_streams import substream

MARGIN_MM = 8  # around a tumour, in which the change is computed
WINDOW_MARGIN_HU = 150.0  # by which the window holds more than the lesions and their organs
TERMS = "your own data: whoever gets this file gets voxels of these scans"


@keywords_of()
class CopyPaste:
    """Pastes the lesions of annotated scans, with the interface of `TumorGenerator`.

    Args:
        lesions: what to paste.
        card: entries of the card: name, terms, ...

    Raises:
        ValueError: for no lesions.

    Examples:
        >>> bank = ts.CopyPaste.from_scans([("a_ct.nii.gz", "a_label.nii.gz")], tumor_label=2)
        >>> bank.save("bank.safetensors")
        >>> synth = ts.SynthesizeTumor("bank.safetensors", organ_labels=1, tumor_label=2)
    """

    crop_size = 48
    crop_multiple = 1
    own_edge = True
    even = False  # slow variation is what a lesion's texture is
    keeps_detail = False
    parameter_count = 0
    takes_poses = True

    def __init__(self, lesions: Iterable[Lesion], card: dict[str, Any] | None = None) -> None:
        self.lesions = tuple(lesions)
        if not self.lesions:
            raise ValueError("a bank must hold a lesion, got none; give annotated scans")
        self.device = torch.device("cpu")
        self.source: str | None = None  # the file that it was read from
        self.window = _window(self.lesions)
        self.own_shapes = tuple(
            OwnShape(one.outline, one.diameter_mm, one.has_thick_slices) for one in self.lesions
        )
        self._number_of = {one.outline: k for k, one in enumerate(self.lesions)}
        self._sizes_mm = torch.tensor([one.diameter_mm for one in self.lesions]).double()
        self.card: dict[str, Any] = {
            "name": KIND,
            "licence": TERMS,
            "source": "lesions of " + ", ".join(dict.fromkeys(one.source for one in self.lesions)),
            "method": "Yang et al., TumorCP, MICCAI 2021; Zhang et al., CarveMix, MICCAI 2021",
            CARD_KEY: _tissue(self.lesions).to_card(),
            **(card or {}),
        }

    @property
    def name(self) -> str:
        """Name in reports."""
        return str(self.card["name"])

    @classmethod
    @known_keywords
    def from_scans(
        cls,
        scans: Any,
        tumor_label: int = 2,
        organ_labels: int | Iterable[int] = (1,),
        *,
        intensity: Intensity = HU(),  # noqa: B008 (frozen)
        name: str = KIND,
        terms: str = TERMS,
    ) -> CopyPaste:
        """Cut the lesions out of annotated scans, which are read one at a time.

        Args:
            scans: pairs of NIfTI files (ct, label), or triples of arrays (image, label, spacing or
                affine), (X, Y, Z) or (1, X, Y, Z). MetaTensors need no spacing.
            tumor_label: value of the lesions; those that touch are one.
            organ_labels: values of the organ around them, against which contrast is measured.
            intensity: what the values of images mean.
            name: name of the bank, in reports.
            terms: terms of use of the scans, for the card.

        Raises:
            TypeError: for anything else.
            ValueError: if no scan has a lesion that can be used, saying why; if an image is not in
                the scale of ``intensity``; if image and label do not go together; or if
                ``tumor_label`` is one of the organ's.
        """
        organ, lesions, left_out = check_organ_labels(organ_labels), [], []
        tumor_label = check_tumor_label(tumor_label, organ)
        names, held, without = [], set(), []
        for scan in read_scans(scans, intensity):
            cut = cut_lesions(scan.hu, scan.label, scan.frame, tumor_label, organ, scan.name)
            lesions += cut.lesions
            left_out += cut.left_out
            names.append(scan.name)
            if not cut.lesions and not cut.left_out:
                without.append(f"{scan.name} holds no {tumor_label} = tumor_label")
            if not cut.lesions:
                held |= set(scan.label.unique().tolist())
        if not lesions:
            why = "; ".join(left_out[:3]) or (
                f"no label holds {tumor_label} = tumor_label (they hold "
                f"{', '.join(map(str, sorted(held)[:20])) or 'nothing'})"
            )
            raise ValueError(
                f"scans must hold a lesion, but none of {len(names)} does: {why}; give annotated "
                "scans, and the values in their labels"
            )
        wrong = [why for why in left_out if isinstance(why, NoTissue)]
        if wrong:
            more = f"; and {len(wrong) - 3} more, listed in the card" if len(wrong) > 3 else ""
            Once().give(
                f"lesions must be tissue, but {len(wrong)} of {len(left_out) + len(lesions)} are "
                f"not and are left out of the bank: {'; '.join(wrong[:3])}{more}; look at these "
                "scans, and correct their labels"
            )
        about = {"name": name, "licence": terms, "left_out": [*left_out, *without]}
        return cls(lesions, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CopyPaste:
        """Read a bank that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged.
        """
        bank = cls(*read_bank(path))
        bank.source = os.fspath(path)  # handles pickle this in place of the lesions
        return bank

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank, complete or not at all.

        Args:
            path: the file, which must end in .safetensors.
        """
        card = {key: value for key, value in self.card.items() if key != "sha256"}
        write_bank(path, self.lesions, card)

    def to(self, device: torch.device | str) -> CopyPaste:
        """Set the device, and return self; lesions move one at a time."""
        self.device = torch.device(device)
        return self

    @known_keywords
    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
        poses: Sequence[Pose] | None = None,
    ) -> Tensor:
        """Return lesion minus healthy tissue, both without noise.

        Args:
            crop: (B, 1, X, Y, Z) floating, where 0 and 1 are the ends of ``window``; 1 mm voxels.
            tumor_mask: bool, same shape.
            seed: one int for each sample.
            contrast_hu: HU between the tumour's core and the tissue around, one number or one for
                each sample; None keeps each lesion's own.
            near: ignored; the change is computed around the tumour.
            poses: which shape each tumour has, and how it lies in the crop. A lesion of another
                shape, or without a pose, is one of like size, turned at random.

        Returns:
            (B, 1, X, Y, Z) in the crop's scale.
        """
        return self._paste(crop, tumor_mask, seed, contrast_hu, poses, keep_noise=True)

    @known_keywords
    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
        poses: Sequence[Pose] | None = None,
    ) -> Tensor:
        """Return the crop with the lesion's own voxels in the mask; arguments as for `change`."""
        return crop + self._paste(crop, tumor_mask, seed, contrast_hu, poses, keep_noise=False)

    @torch.no_grad()
    def _paste(
        self,
        crop: Tensor,
        mask: Tensor,
        seeds: Sequence[int],
        contrast_hu: float | Sequence[float] | None,
        poses: Sequence[Pose] | None,
        *,
        keep_noise: bool,
    ) -> Tensor:
        check_pair(crop, mask)
        if len(seeds) != len(crop):
            raise ValueError(
                f"seed must be one for each sample, got {len(seeds)} for {len(crop)} samples; "
                "pass a list of B ints"
            )
        change = torch.zeros_like(crop)
        low, high = self.window
        # one sample at a time, so that no result depends on the batch
        with torch.autocast(crop.device.type, enabled=False):
            for sample, seed in enumerate(seeds):
                one = slice(sample, sample + 1)
                box = bounding_box(mask[sample, 0], MARGIN_MM)
                if box is None:
                    continue
                lesion, to_lesion = self._choose(
                    mask[sample, 0], int(seed), None if poses is None else poses[sample]
                )
                hu, inside = crop_to_hu(crop[one], self.window), mask[one]
                level = similar_level_around(hu, inside)
                target = ContrastTarget(
                    inside, level, _contrast(contrast_hu, sample, lesion, level), self.window
                )
                part = _change_hu(
                    hu[0, 0][box.slices] - level,
                    inside[0, 0][box.slices],
                    lesion,
                    _sample_points(to_lesion, box.start, box.shape),
                    keep_noise,
                )
                painted = crop[one].to(torch.float32, copy=True)
                painted[0, 0][box.slices] += part / (high - low)
                painted += target.correction(painted)
                change[sample] = (painted[0] - crop[sample].float()).to(crop.dtype)
        return change

    def _choose(self, mask: Tensor, seed: int, pose: Pose | None) -> tuple[Lesion, Tensor]:
        """Return a lesion, and the matrix (3, 4) from voxels of the crop to its own."""
        if pose is not None and pose.outline in self._number_of:
            lesion = self.lesions[self._number_of[pose.outline]]
            to_shape = pose.to_shape * (lesion.diameter_mm / pose.diameter_mm)
        else:
            rng = substream(seed, "lesion")
            diameter_mm = equivalent_diameter(int(mask.sum()))
            u = float(torch.rand((), generator=rng, dtype=torch.float64))
            lesion = self.lesions[choose_like_size(self._sizes_mm, diameter_mm, u)]
            # the factor of a random matrix: a rotation or a mirror image
            turn = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))[0]
            if lesion.has_thick_slices:  # turned within its slices, mirrored across or not
                plane = torch.linalg.qr(turn[:2, :2])[0]
                turn = torch.block_diag(plane, turn[2:, 2:].sign())
            turn *= lesion.diameter_mm / diameter_mm
            centre = mask.nonzero().double().mean(0).cpu()
            to_shape = torch.cat([turn, -(turn @ centre)[:, None]], 1)
        to_lesion = torch.linalg.solve(lesion.to_mm, to_shape)
        to_lesion[:, 3] += lesion.centre
        return lesion, to_lesion


def _contrast(
    contrast_hu: float | Sequence[float] | None, sample: int, lesion: Lesion, level: Tensor
) -> Tensor:
    """Return the contrast (1,) of a sample: as requested, or else the lesion's own.

    Its own makes nothing darker than fluid that was not so before, as in an unenhanced organ.
    """
    if contrast_hu is not None:
        asked = torch.as_tensor(contrast_hu, dtype=level.dtype).flatten()
        return onto(asked[sample if len(asked) > 1 else 0][None], level.device)
    darkest = min(FLUID_HU, lesion.level_hu + lesion.contrast_hu)
    least = (darkest - level).clamp(max=-MIN_DARKER_HU)
    return torch.full_like(level, lesion.contrast_hu).maximum(least)


def _change_hu(
    healthy: Tensor, mask: Tensor, lesion: Lesion, points: Tensor, keep_noise: bool
) -> Tensor:
    """Return the change in HU around one tumour.

    Args:
        healthy: (x, y, z), HU above the organ.
        mask: bool, same shape.
        lesion: to paste.
        points: (x, y, z, 3), in voxels of the lesion.
        keep_noise: whether what is finer than the lesion's texture stays as it is in the scan.
    """
    texture = _interpolate(lesion.texture(), points, healthy.device)
    edge = filters.blur(mask.float(), lesion.edge_mm)
    edge = edge / edge.amax()
    if not keep_noise:
        own = _interpolate(lesion.mask.float(), points, healthy.device) > 0.5
        voxels = _interpolate(lesion.deviation(), points, healthy.device)
        return edge * (torch.where(own, voxels, texture) - healthy)
    # what the scan holds there that is coarser than its noise, as vessels are, goes
    inside = mask.float()
    weight = filters.blur(inside, TEXTURE_SIGMA_MM)
    smooth = filters.blur(healthy * inside, TEXTURE_SIGMA_MM) / weight.clamp(min=1e-6)
    return edge * (texture - torch.where(weight > 1e-3, smooth, 0.0))


def _sample_points(matrix: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return where the voxels of a box lie in a lesion: (x, y, z, 3), float64."""
    axes = [torch.arange(a, a + n, dtype=torch.float64) for a, n in zip(start, shape, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], -1) @ matrix[:, :3].T + matrix[:, 3]


def _interpolate(volume: Tensor, points: Tensor, device: torch.device) -> Tensor:
    """Interpolate a volume linearly at points in voxels; beyond it, its border continues."""
    last = torch.tensor(volume.shape, dtype=torch.float64) - 1
    at = 2 * points / last.clamp(min=1) - 1
    at = at.where(last > 0, 0.0).flip(-1)  # grid_sample counts axes from the last
    sampled = F.grid_sample(
        onto(volume[None, None], device),
        onto(at[None].float(), device),
        padding_mode="border",
        align_corners=True,
    )
    return sampled[0, 0]


def _window(lesions: Sequence[Lesion]) -> tuple[float, float]:
    """Return the HU that crops hold: soft tissue, or more if the lesions or their organs are."""
    ends = [hu for one in lesions for hu in (one.level_hu, one.level_hu + one.contrast_hu)]
    low, high = min(ends) - WINDOW_MARGIN_HU, max(ends) + WINDOW_MARGIN_HU
    return min(HU_LOW, low), max(HU_HIGH, high)


def _tissue(lesions: Sequence[Lesion]) -> TissueRange:
    """Return the tissue to paste into: soft tissue, or like that around lesions elsewhere."""
    low, high = SOFT_TISSUE.level_hu
    levels = [one.level_hu for one in lesions]
    if low <= min(levels) and max(levels) <= high:
        return SOFT_TISSUE
    ends = min(levels), max(levels)
    around = [(ends[0] - w, ends[1] + w) for w in (100.0, 200.0, 400.0)]
    return TissueRange(*(around[0], around[1], around[2]))
