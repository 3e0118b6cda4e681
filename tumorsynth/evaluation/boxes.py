"""Crop maps to what they hold."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def crop_to_content(*maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """Crop maps to the box of all voxels that are not 0, and pad with zeros by one voxel.

    The padding makes a mask's face at the scan's border a surface.
    """
    content = maps[0] != 0
    for other in maps[1:]:
        content = content | (other != 0)
    box = ndimage.find_objects(content.astype(np.uint8))
    where = box[0] if box else (slice(0, 0),) * 3
    return tuple(np.pad(m[where], 1) for m in maps)
