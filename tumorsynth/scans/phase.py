"""The tumours of a report in another phase of the same patient, registered to the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tumorsynth.scans.volume import Volume

if TYPE_CHECKING:
    from tumorsynth.synthesizer import SynthesizeTumor


@dataclass(frozen=True)
class Phase:
    """The first phase, and the contrast of the other one.

    Attributes:
        report: file name of the first phase's report.
        first: the CT that the report was made from.
        contrast_hu: of the other phase; None keeps that of the report.
    """

    report: str
    first: Volume
    contrast_hu: str | tuple[float, float] | None = None

    def check_contrast(self, synth: SynthesizeTumor) -> None:
        """Raise ValueError for a contrast that does not exist."""
        if self.contrast_hu is not None:
            synth.settings.with_contrast(self.contrast_hu)

    def call(self) -> dict[str, Any]:
        """Return the arguments of the transform's call."""
        import torch

        first = torch.from_numpy(self.first.values())[None]
        return {"first_phase": first, "contrast_hu": self.contrast_hu}

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the report."""
        contrast = list(self.contrast_hu) if isinstance(self.contrast_hu, tuple) else None
        return {
            "report": self.report,
            "ct": self.first.name,
            "contrast_hu": contrast or self.contrast_hu,
        }


def check_phase(first: Volume, other: Volume) -> None:
    """Raise ValueError unless two CTs lie on one grid."""
    same = first.stored.shape == other.stored.shape
    if not same or not np.allclose(first.affine, other.affine, atol=1e-3):
        raise ValueError(
            f"--other-phase must lie on the grid of {first.name}, {_grid(first)}, but {other.name} "
            f"has {_grid(other)}; register it and resample it to that CT first"
        )


def _grid(volume: Volume) -> str:
    sides = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return (
        f"{' x '.join(map(str, volume.stored.shape))} voxels of "
        f"{' x '.join(f'{mm:.3g}' for mm in sides)} mm"
    )
