"""What placing a tumour costs, counted in operators and voxels, not by the clock."""

from __future__ import annotations

import pytest
import torch
from balls import ball
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth._room import Field
from tumorsynth._tumor_shape import Shape
from tumorsynth.masks import LocalMask, organ_box, place

ISO = (1.0, 1.0, 1.0)
