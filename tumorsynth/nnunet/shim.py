"""Where nnU-Net finds the trainer: the folder for nnUNet_extTrainer, or a copy in nnunetv2 itself.

nnU-Net looks for trainers in its own package and, from 2.8 on, in the folders that the environment
variable ``nnUNet_extTrainer`` names. A file with one import, the shim, is enough for either. This
module imports nothing of nnU-Net.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

SHIM = Path(__file__).parent / "trainers" / "nnUNetTrainerTumorSynth.py"


def folder() -> Path:
    """Return the shim's folder, for ``nnUNet_extTrainer`` (nnU-Net 2.8 and later)."""
    return SHIM.parent


def install() -> Path:
    """Copy the shim among nnU-Net's own trainers (2.5 and later); return the copy's path.

    Raises:
        ModuleNotFoundError: without nnunetv2 in this environment.
    """
    found = importlib.util.find_spec("nnunetv2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "nnU-Net must be installed in this environment, but nnunetv2 cannot be found; "
            "pip install nnunetv2"
        )
    trainers = Path(found.submodule_search_locations[0]) / "training" / "nnUNetTrainer"
    return Path(shutil.copyfile(SHIM, trainers / SHIM.name))
