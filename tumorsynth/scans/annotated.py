"""Read annotated scans from files with all checks, for a bank of lesions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tumorsynth.generators.annotated_scans import AnnotatedScan, make_scan
from tumorsynth.geometry import frame_from_affine
from tumorsynth.intensity import Intensity
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_masks import OrganMasks, read_scan


def read_annotated(
    files: Iterable[tuple[str, Path, Path]],
    reading: Reading,
    intensity: Intensity,
    masks: OrganMasks | None = None,
) -> Iterator[AnnotatedScan]:
    """Yield scans, one at a time in memory.

    Args:
        files: (name, CT, label map) of each.
        reading: what to do where they contradict themselves or each other.
        intensity: what the values of the CTs mean.
        masks: which files matter where labels are folders of one file per organ.

    Raises:
        ValueError: for files that do not go together, or a CT that is not in that scale.
    """
    for name, ct, label in files:
        image, map_ = read_scan(ct, label, reading, masks)
        frame = frame_from_affine(image.affine)
        yield make_scan(name, image.values(), map_.integers(), frame, intensity)
