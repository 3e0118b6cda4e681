"""What the recipes of `liver-early` and `lung` share: copies of scans, packs, cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import ndimage

from tumorsynth.training.data import Case, find_tumors, save_pack


def smoothed(case: Case, sigma_mm: float) -> Case:
    """A scan as a smoother kernel shows it."""
    hu = ndimage.gaussian_filter(case.hu.float().numpy(), sigma_mm)
    name = f"{case.name}, smoothed by {sigma_mm:g} mm"
    return replace(case, name=name, hu=torch.from_numpy(hu).round().to(case.hu.dtype))


def write_pack(path: Path, cases: list[Case]) -> None:
    """Write a pack and print its tumours, of label 2."""
    save_pack(cases, path)
    annotated = [case for case in cases if case.label is not None and bool((case.label == 2).any())]
    tumors = find_tumors(annotated, 2) if annotated else []
    sizes = ", ".join(f"{annotated[t.case].name} {t.diameter_mm:.1f} mm" for t in tumors)
    print(f"{path}: {len(cases)} scans; tumours: {sizes or 'none'}", flush=True)


def described(card: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return a trained generator's card with what training cannot know: data, terms, limits."""
    first = {key: fields[key] for key in ("name", "version", "description", "licence", "data")}
    autoencoder = {**card["autoencoder"], "licence": fields["licence"]}
    return first | card | fields | {"autoencoder": autoencoder}
