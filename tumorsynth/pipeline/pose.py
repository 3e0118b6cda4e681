"""How the shape of a placed tumour lies in its crop, for generators that bring shapes along."""

from __future__ import annotations

import torch

from tumorsynth.generators.protocol import Pose
from tumorsynth.pipeline.records import PaintRequest
from tumorsynth.placement.shape import Shape


def pose_of(request: PaintRequest) -> Pose:
    """Return the pose of a tumour; it follows from its params and its crop's place."""
    params, grid = request.tumor.params, request.grid
    frame = grid.frame
    shape = Shape(params, frame.shear)
    # from a voxel of the crop to mm from the tumour's centre, along the sample's axes
    to_sample = torch.zeros(3, 4, dtype=torch.float64)
    for x, (axis, flipped) in enumerate(zip(frame.axes, frame.flips, strict=True)):
        centre = (params.centre[axis] + float(shape.offset[axis])) * frame.spacing[axis]
        first = grid.origin[axis] + (grid.side - 1 if flipped else 0)
        to_sample[axis, x] = -1.0 if flipped else 1.0
        to_sample[axis, 3] = first - centre
    if frame.shear is not None:
        to_sample = torch.tensor(frame.shear, dtype=torch.float64) @ to_sample
    to_shape = shape.rotation.T @ to_sample
    if shape.mirrored:
        to_shape[2] *= -1
    return Pose(params.outline, params.diameter_mm, to_shape)
