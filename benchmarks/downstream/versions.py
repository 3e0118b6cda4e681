"""Versions of scans with synthetic tumours, made once and kept: training steps then cost the same.

A version holds only the voxels that changed, each with the number of its tumour, so that a tumour
can be left out of a version later.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import tumorsynth as ts
from benchmarks.downstream.exposure import View
from benchmarks.downstream.files import locked, write_whole
from benchmarks.downstream.pack import TOUCHING, Scan

ORGAN, TUMOR = 1, 2


@dataclass(frozen=True)
class Version:
    """What synthesis changed in a scan.

    Attributes:
        index: flat indices of changed or labelled voxels.
        hu: their new values, int16.
        owner: number of the tumour that each belongs to, from 1 on.
        tumor: whether each is labelled as tumour.
    """

    index: np.ndarray
    hu: np.ndarray
    owner: np.ndarray
    tumor: np.ndarray

    @property
    def count(self) -> int:
        """Number of tumours."""
        return int(self.owner.max(initial=0))

    def only(self, kept: Sequence[int]) -> Version:
        """Return the version with some of its tumours."""
        inside = np.isin(self.owner, list(kept))
        return Version(*(part[inside] for part in (self.index, self.hu, self.owner, self.tumor)))


def difference(scan: Scan, hu: np.ndarray, label: np.ndarray) -> Version:
    """Return what differs between a scan and the same with tumours."""
    made = (label == TUMOR) & (scan.lesions == 0)
    numbers, count = ndimage.label(made, TOUCHING)
    if not count:
        empty = np.zeros(0, np.int64)
        return Version(empty, empty.astype(np.int16), empty.astype(np.uint8), empty.astype(bool))
    nearest = ndimage.distance_transform_edt(~made, scan.spacing, False, True)
    index = np.flatnonzero((hu != scan.hu) | made)
    owner = numbers[tuple(nearest)].ravel()[index]
    return Version(index, hu.ravel()[index], owner.astype(np.uint8), made.ravel()[index])


def apply(scan: Scan, source: View, version: Version) -> View:
    """Return a view of a scan with the tumours of a version."""
    hu, tumor = source.hu.copy(), source.tumor.copy()
    hu.ravel()[version.index] = version.hu
    tumor.ravel()[version.index[version.tumor]] = True
    counted = source.counted | (tumor & scan.organ)
    own = tuple(
        version.index[version.tumor & (version.owner == k)] for k in np.unique(version.owner)
    )
    return replace(source, hu=hu, tumor=tumor, counted=counted, lesions=own)


def synthesize(
    generator: Any, options: Mapping[str, Any], scan: Scan, count: int, seed: int, device: str
) -> list[Version]:
    """Make versions of a scan in HU, as a user's transform would."""
    synth = ts.SynthesizeTumor(
        generator=generator, organ_labels=ORGAN, tumor_label=TUMOR, device=device, **options
    )
    image = torch.from_numpy(scan.hu.astype(np.float32))[None]
    label = torch.from_numpy(np.where(scan.lesions > 0, TUMOR, scan.organ).astype(np.uint8))[None]
    versions = []
    for k in range(count):
        hu, made = synth(image, label, spacing=scan.spacing, seed=seed + k)
        changed = hu[0].round().clamp(-32768, 32767).numpy().astype(np.int16)
        versions.append(difference(scan, changed, made[0].numpy()))
    return versions


def cached_versions(
    folder: Path,
    key: Mapping[str, Any],
    generator: Any,
    options: Mapping[str, Any],
    scan: Scan,
    count: int,
    device: str,
) -> list[Version]:
    """Read the versions of a scan, or make and keep them.

    Args:
        folder: of the cache.
        key: what the versions depend on, beside the scan; JSON types.
        generator: what `SynthesizeTumor` takes.
        options: more of its arguments.
        scan: to put tumours in.
        count: number of versions.
        device: where the generator runs.
    """
    words = json.dumps([key, scan.name, scan.spacing, count], sort_keys=True)
    name = hashlib.sha256(words.encode()).hexdigest()[:16]
    path = folder / f"{scan.name}-{name}.npz"
    with locked(folder / f".{name}.lock"):
        if not path.is_file():
            start = time.process_time()
            seed = int(hashlib.sha256(scan.name.encode()).hexdigest()[:7], 16)
            made = synthesize(generator, options, scan, count, seed, device)
            seconds = time.process_time() - start
            about = {"key": key, "cpu_seconds": round(seconds, 1)}
            _save(path, made, about)
            tumors = sum(version.count for version in made)
            print(f"{path.name}: {count} versions, {tumors} tumours, {seconds:.0f} s", flush=True)
    return _load(path)


def _save(path: Path, versions: Sequence[Version], about: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    arrays = {f"{k}/{name}": part for k, v in enumerate(versions) for name, part in vars(v).items()}
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def _load(path: Path) -> list[Version]:
    with np.load(path) as file:
        count = len({name.split("/")[0] for name in file.files if "/" in name})
        return [
            Version(*(file[f"{k}/{part}"] for part in ("index", "hu", "owner", "tumor")))
            for k in range(count)
        ]
