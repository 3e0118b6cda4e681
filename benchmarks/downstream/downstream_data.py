"""Scans for downstream.py: from a Decathlon-style dataset.json to folds and MONAI's transforms.

    {"organ_labels": [1], "tumor_labels": [2],
     "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}, ...],
     "healthy":  [{"image": ..., "label": ...}, ...]}

Beside the Decathlon's keys: organ_labels and tumor_labels say which values of the label files are
which (here the defaults); "healthy" lists scans whose label marks the organ alone. An entry may
name its "patient" (the image's file name otherwise), a "fold", and an "organ" file, any
segmenter's prediction of the organ (values above 0), with which predictions are post-processed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import partition_dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    Randomizable,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    Transform,
)

ORGAN, TUMOR = 1, 2  # in the label that the networks learn


@dataclass(frozen=True)
class Case:
    """One scan of a dataset.json."""

    name: str
    patient: str
    image: Path
    label: Path
    organ: Path | None
    healthy: bool  # listed as healthy: no tumour in it
    fold: int | None
    organ_labels: tuple[int, ...]
    tumor_labels: tuple[int, ...]


def read_dataset(path: Path, healthy: bool = False) -> list[Case]:
    """The cases of a dataset.json; with ``healthy`` all of them count as scans without tumour.

    ValueError names every problem: what is no dataset.json, missing files, names that occur twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; pass a dataset.json")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        organs = tuple(int(v) for v in listed.get("organ_labels", [1]))
        tumors = tuple(int(v) for v in listed.get("tumor_labels", [2]))
        cases = [
            _case(path.parent, entry, healthy or key == "healthy", organs, tumors)
            for key in ("training", "healthy")
            for entry in listed.get(key, [])
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} must be like {{"training": [{{"image": "a.nii.gz", "label": "b.nii.gz"}}]}}; '
            f"reading it gave {type(error).__name__}: {error}"
        ) from error
    problems = [] if cases else [f'{path} lists no cases under "training"; add some']
    if set(organs) & set(tumors):
        problems.append(f"a value is organ or tumour: {path} has {organs} and {tumors}")
    for case in cases:
        files = [case.image, case.label, *([case.organ] if case.organ else [])]
        problems += [f"{case.name}: no such file: {f}" for f in files if not f.is_file()]
    names = [case.name for case in cases]
    problems += [f"{n}: the name occurs twice" for n in sorted(set(names)) if names.count(n) > 1]
    if problems:
        raise ValueError("; ".join(problems[:20]))
    return cases


def _case(folder: Path, entry: Any, healthy: bool, organs: tuple, tumors: tuple) -> Case:
    name = Path(entry["image"]).name.split(".nii")[0]
    return Case(
        name=name,
        patient=str(entry.get("patient", name)),
        image=folder / entry["image"],
        label=folder / entry["label"],
        organ=folder / entry["organ"] if entry.get("organ") else None,
        healthy=healthy,
        fold=None if entry.get("fold") is None else int(entry["fold"]),
        organ_labels=organs,
        tumor_labels=() if healthy else tumors,
    )


def fold_of(cases: Sequence[Case], folds: int, seed: int = 0) -> dict[str, int]:
    """The fold of each patient: the dataset's own where every entry names one, else drawn.

    Patients with and without tumours are spread separately. ValueError for a patient in two folds,
    and for fewer patients with tumours than folds.
    """
    if all(case.fold is not None for case in cases):
        held: dict[str, int] = {}
        for case in cases:
            if held.setdefault(case.patient, int(case.fold or 0)) != case.fold:
                raise ValueError(
                    f"patient {case.patient} is in folds {held[case.patient]} and {case.fold}: "
                    "scans of one patient must share a fold"
                )
        return held
    ill = sorted({case.patient for case in cases if not case.healthy})
    if not 2 <= folds <= len(ill):
        raise ValueError(
            f"folds must be from 2 to the number of patients with tumours ({len(ill)}), got {folds}"
        )
    chosen = {}
    for patients in (ill, sorted({case.patient for case in cases} - set(ill))):
        if len(patients) < folds:  # few or no healthy ones
            chosen.update({p: k for k, p in enumerate(patients)})
            continue
        parts = partition_dataset(patients, num_partitions=folds, shuffle=True, seed=seed)
        chosen.update({p: k for k, part in enumerate(parts) for p in part})
    return chosen


def annotated_only(cases: Sequence[Case], count: int | None, seed: int) -> list[Case]:
    """All healthy cases and ``count`` annotated ones; a larger count holds the smaller one's."""
    ill = [case for case in cases if not case.healthy]
    if count is None:
        return list(cases)
    if not 1 <= count <= len(ill):
        raise ValueError(
            f"annotated must be from 1 to {len(ill)}, the annotated scans to train on, got {count}"
        )
    order = np.random.default_rng(seed).permutation(len(ill))[:count]
    kept = {ill[k].name for k in order}
    return [case for case in cases if case.healthy or case.name in kept]


def deterministic(spacing: Sequence[float], crop: Sequence[int]) -> Compose:
    """From a case's dict to HU and label on the working grid: RAS, ``spacing`` mm, padded to crop.

    Output: image float32 HU, label uint8 (0, ORGAN, TUMOR), organ uint8 where the case has one,
    ``centre``, ``healthy``: whether the label holds no tumour, and the case's ``name``.
    """
    keys, missing = ["image", "label", "organ"], {"allow_missing_keys": True}
    labels = ["label", "organ"]
    return Compose(
        [
            LoadImaged(keys, reader="NibabelReader", dtype=np.float32, **missing),
            EnsureChannelFirstd(keys, channel_dim="no_channel", **missing),
            Orientationd(keys, axcodes="RAS", labels=None, **missing),
            _ThreeClasses(),
            Spacingd(
                keys, pixdim=spacing, mode=("bilinear", "nearest", "nearest"),
                padding_mode="border", **missing,
            ),
            Lambdad(labels, lambda x: x.round(), **missing),
            EnsureTyped(labels, dtype=torch.uint8, **missing),
            SpatialPadd("image", crop, value=-1024),
            SpatialPadd(labels, crop, value=0, **missing),
            _Healthy(),
        ]
    )  # fmt: skip


def as_dict(case: Case) -> dict[str, Any]:
    """What `deterministic` takes."""
    files = {"image": str(case.image), "label": str(case.label)}
    return {**files, **({"organ": str(case.organ)} if case.organ else {}), "case": case}


class _ThreeClasses(Transform):
    """The file's values become 0, ORGAN, TUMOR; a label must fit its image.

    A Transform, as MONAI's caches hold nothing that comes after a plain function.
    """

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        case, image, label = data["case"], data["image"], data["label"]
        if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=0.1):
            raise ValueError(
                f"{case.name}: its label must lie on its image's grid, got shapes "
                f"{tuple(image.shape[1:])} and {tuple(label.shape[1:])} or other affines"
            )
        organ, tumor = (torch.zeros_like(label, dtype=torch.bool) for _ in range(2))
        for value in case.organ_labels:
            organ |= label == value
        for value in case.tumor_labels:
            tumor |= label == value
        classes = torch.where(tumor, float(TUMOR), organ.float() * ORGAN)
        if not bool(classes.any()):
            raise ValueError(
                f"{case.name}: its label holds none of {case.organ_labels + case.tumor_labels}; "
                "give organ_labels and tumor_labels in the dataset.json"
            )
        out = {**data, "label": label.clone().copy_(classes)}
        if "organ" in data:
            out["organ"] = (data["organ"] > 0).to(data["organ"].dtype)
        return out


class _Healthy(Transform):
    """What the random part needs to know of a scan."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in data.items() if k != "case"}
        healthy = not bool((data["label"] == TUMOR).any())
        centre = centre_of(data["label"])
        return {**kept, "centre": centre, "healthy": healthy, "name": data["case"].name}


def centre_of(label: Any) -> Any:
    """Where a crop may have its centre: in the tumours, or the organ of a scan without any."""
    tumor = label == TUMOR
    return (tumor if bool(tumor.any()) else label > 0).to(torch.uint8)


class RandVersion(Randomizable, Transform):
    """With probability ``prob`` another version of a scan in its place, if there are any.

    versions: of each scan's name, dicts that replace its image and label.
    """

    def __init__(self, versions: Mapping[str, Sequence[dict[str, Any]]], prob: float):
        self.versions, self.prob = versions, prob

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        which, chance = self.R.rand(2)  # as many draws where there is nothing to choose from
        held = self.versions.get(data["name"], ())
        if not held or chance >= self.prob:
            return data
        return {**data, **held[int(which * len(held))]}


def random_part(
    settings: Any, versions: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> Compose:
    """One random crop of a scan on the working grid, scaled and augmented; image and label.

    versions: for `RandVersion`.
    """
    both = ["image", "label"]
    low, high = settings.window
    centre = "centre" if settings.centre_on == "tumor" else "label"
    return Compose(
        [
            RandVersion(versions or {}, settings.p),
            RandCropByPosNegLabeld(
                both, centre, spatial_size=settings.crop, pos=1, neg=1, num_samples=1,
                image_key="image", image_threshold=low,
            ),
            ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
            *(RandFlipd(both, prob=0.2, spatial_axis=axis) for axis in range(3)),
            RandRotate90d(both, prob=0.2, max_k=3),
            RandScaleIntensityd("image", factors=0.1, prob=0.15),
            RandShiftIntensityd("image", offsets=0.1, prob=0.15),
            EnsureTyped(both, track_meta=False),
        ]
    )  # fmt: skip


def read_groups(path: Path, patients: Sequence[str]) -> dict[str, dict[str, str]]:
    """From a CSV with a column "patient": {column: {patient: group}}; ages become decades.

    ValueError where a patient that is scored is missing from it.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "patient" not in rows[0] or len(rows[0]) < 2:
        raise ValueError(f'{path} must have a column "patient" and at least one more, such as age')
    held = {row["patient"]: row for row in rows}
    unknown = sorted(set(patients) - held.keys())
    if unknown:
        raise ValueError(f"{path} misses the patients {', '.join(unknown[:10])}; add their rows")
    columns = [c for c in rows[0] if c != "patient"]
    return {c: {p: _group(c, held[p][c]) for p in patients} for c in columns}


def _group(column: str, value: str) -> str:
    if column.lower() != "age":
        return value or "unknown"
    try:
        decade = int(float(value)) // 10 * 10
    except ValueError:
        return "unknown"
    return f"{decade}-{decade + 9}"
