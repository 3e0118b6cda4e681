"""What the plans of an nnU-Net dataset say about its images; imports nothing of nnU-Net."""

from __future__ import annotations

from typing import Any

import numpy as np

from tumorsynth.intensity import HU, Intensity, ZScore


def check_configuration(trainer: Any) -> None:
    """Raise ValueError for a trainer whose configuration cannot have synthetic tumours."""
    name, configuration = trainer.configuration_name, trainer.configuration_manager
    if len(configuration.patch_size) != 3:
        raise ValueError(
            f"tumorsynth needs a 3-D configuration, got {name} with patches of "
            f"{tuple(configuration.patch_size)}; train 3d_fullres or 3d_lowres"
        )
    if trainer.is_cascaded:
        raise ValueError(
            f"tumorsynth cannot train {name}: the earlier stage's predictions know nothing of the "
            "synthetic tumours; train 3d_fullres or 3d_lowres"
        )
    channels = trainer.dataset_json.get("channel_names") or trainer.dataset_json.get("modality")
    if len(channels) != 1:
        raise ValueError(
            f"tumorsynth needs images of one channel, CT, got {channels}; in the others the "
            "tumour would be missing"
        )


def read_intensity(trainer: Any) -> Intensity:
    """Return the intensity scale of the preprocessed images.

    Raises:
        ValueError: for a normalisation from which HU cannot be recovered.
    """
    (scheme,) = trainer.configuration_manager.normalization_schemes
    if scheme == "NoNormalization":
        return HU()
    if scheme != "CTNormalization":
        raise ValueError(
            f"tumorsynth needs the plans' normalisation to be CTNormalization, got {scheme}, from "
            'which HU cannot be recovered; set "channel_names": {"0": "CT"} in dataset.json and '
            "plan and preprocess again"
        )
    properties = trainer.plans_manager.foreground_intensity_properties_per_channel["0"]
    return ZScore(
        properties["mean"],
        properties["std"],
        properties["percentile_00_5"],
        properties["percentile_99_5"],
    )


def read_affine(plans: Any, configuration: Any) -> np.ndarray:
    """Return the affine, voxel to RAS mm, of a configuration's arrays.

    nnU-Net's readers give axes z, y, x, which the plans permute. The preprocessed data do not keep
    their directions. This assumes those of DICOM: x runs to the left, y to the back.
    """
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (source, mm) in enumerate(
        zip(plans.transpose_forward, configuration.spacing, strict=True)
    ):
        affine[2 - source, axis] = mm if source == 0 else -mm
    return affine
