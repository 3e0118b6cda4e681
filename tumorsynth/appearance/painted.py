"""A tumour painted into its sample but not written yet, for scorers that need more of the scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tumorsynth.geometry import Box, Frame
from tumorsynth.intensity import Intensity


@dataclass(frozen=True)
class PaintedTumor:
    """A tumour, and the sample around it.

    Args:
        image: (X, Y, Z), the sample without the tumour, in the scale of ``intensity``.
        region: the part of the sample that the tumour changes.
        after: that part with the tumour.
        inside: bool, the tumour's voxels in that part, at least one.
        frame: how the sample's axes lie in the patient.
        intensity: what the image's values mean.
    """

    image: Tensor
    region: Box
    after: Tensor
    inside: Tensor
    frame: Frame
    intensity: Intensity

    def image_in(self, box: Box) -> Tensor:
        """Return a box of the sample with the tumour."""
        values = self.image[box.slices].clone()
        common = box.within(self.region)
        if not common.is_empty:
            values[common.relative_to(box).slices] = self.after[
                common.relative_to(self.region).slices
            ]
        return values

    def mask_in(self, box: Box) -> Tensor:
        """Return which voxels of a box are the tumour."""
        mask = torch.zeros(box.shape, dtype=torch.bool, device=self.image.device)
        common = box.within(self.region)
        if not common.is_empty:
            mask[common.relative_to(box).slices] = self.inside[
                common.relative_to(self.region).slices
            ]
        return mask
