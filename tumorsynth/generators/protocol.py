"""`TumorGenerator`: what a generator must offer to `SynthesizeTumor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tumorsynth.models.slabs import Near


class Pose(NamedTuple):
    """How the shape of a tumour lies in its crop.

    Attributes:
        outline: the shape (see `tumorsynth.placement.user_shapes`); "" for an ellipsoid.
        diameter_mm: its equivalent diameter.
        to_shape: (3, 4) float64, from a voxel (x, y, z, 1) of the crop to mm from the shape's
            centre, along the axes in which the outline was measured.
    """

    outline: str
    diameter_mm: float
    to_shape: Tensor


@runtime_checkable
class TumorGenerator(Protocol):
    """A source of tumours: an object with these members works as ``generator=``.

    A crop is (B, 1, X, Y, Z) on a 1 mm grid, RAS, where 0 and 1 are the ends of ``window``. Results
    may depend on the crop, the mask and the seed of each sample, not on other samples of the batch.

    Attributes:
        name: name in reports.
        window: HU that 0 and 1 in a crop stand for.
        crop_size: smallest side of a crop, in voxels of 1 mm.
        crop_multiple: sides of crops are multiples of this.
        own_edge: whether a change fades out at the tumour's outline by itself.
        even: whether a painted tumour gets the scan's noise and slow variation, and softer edges
            when large (match_texture would be clearer, but cards hold this name).
        keeps_detail: whether `inpaint` keeps the scan's noise.
        device: where it computes.
        card: name, source, licence; free-form but for ``name`` and, if it has one,
            ``tissue_range``: for which tissue it is (`tumorsynth.appearance.tissue.TissueRange`).
            Reports quote it.
        darkens: optional; true where, without ``contrast_hu``, tumours are always darker than the
            tissue around. A faint one, whose contrast is raised, then becomes darker as well, and
            one that comes out brighter is skipped.
        parameter_count: optional, of its networks: small ones run on one CPU thread.
        own_shapes: optional, shapes that it brings along, a sequence of
            `tumorsynth.placement.settings.OwnShape`. Tumours get one of about their size, unless
            ``shapes=`` is given.
        takes_poses: optional; if true, `change` and `inpaint` get ``poses=``, a `Pose` for each
            sample: which shape a tumour has, and how it lies in the crop.

    Examples:
        >>> class Darker:
        ...     name, window, crop_size, crop_multiple = "darker", (-175.0, 250.0), 64, 1
        ...     own_edge, even, keeps_detail = False, False, True
        ...     device, card = torch.device("cpu"), {"name": "darker"}
        ...     def to(self, device):
        ...         self.device = torch.device(device)
        ...         return self
        ...     def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        ...         return torch.full_like(crop, -40 / 425)
        ...     def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        ...         return crop + tumor_mask * self.change(crop, tumor_mask, seed)
        >>> synth = ts.SynthesizeTumor(Darker(), organ_labels=1, tumor_label=2)
    """

    @property
    def name(self) -> str: ...
    @property
    def window(self) -> tuple[float, float]: ...
    @property
    def crop_size(self) -> int: ...
    @property
    def crop_multiple(self) -> int: ...
    @property
    def own_edge(self) -> bool: ...
    @property
    def even(self) -> bool: ...
    @property
    def keeps_detail(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def card(self) -> dict[str, Any]: ...

    def to(self, device: torch.device | str) -> Any:
        """Move to a device, in place; return self."""

    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: Sequence[int],
        *,
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Return tumour minus healthy tissue.

        Args:
            crop: (B, 1, X, Y, Z) in [0, 1].
            tumor_mask: bool, same shape.
            seed: one int for each sample.
            contrast_hu: HU between the tumour's core and the tissue around, one for each sample;
                None leaves it to the generator.
            near: the part of the crop, along X, Y and Z, that the caller reads.

        Returns:
            The change in the crop's scale, the crop's shape.
        """

    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: Sequence[int],
        *,
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Return the crop with a tumour in the mask; arguments and shape as for `change`."""


MEMBERS = tuple(name for name in vars(TumorGenerator) if not name.startswith("_"))


def missing_members(generator: object) -> list[str]:
    """Return the members of `TumorGenerator` that an object lacks."""
    return [name for name in MEMBERS if not hasattr(generator, name)]
