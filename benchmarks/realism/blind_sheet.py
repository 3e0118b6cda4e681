"""Pages of real and synthetic tumours in random order, to be read blind.

    python -m benchmarks.realism.blind_sheet CT_DIR -o PAGES --key KEYS [--generator liver-early]
    python -m benchmarks.realism.blind_score KEYS/key.json PAGES/answers.csv

CT_DIR holds NAME_ct.nii.gz with NAME_label.nii.gz (1 liver, 2 tumour); outlines in annotations/
come first. Half of the cases are real tumours, taken in turn from the patients that the generator
was not trained on; the others are synthetic ones elsewhere in the same livers, with the size
(within 15 %) and the contrast of real ones there. A page has three slices through a tumour, below,
in the middle and above, each in two windows. Ticks on the frame point at the tumour; the field is
moved by up to 10 mm at random. Real and synthetic cases are cut, drawn and marked alike.

KEYS/key.json has the truth: keep it from the reader, and the seed, which is random by default.
Write "real" or "synthetic", and 1 (a guess) to 5 (certain), into PAGES/answers.csv. Pages are parts
of the scans: mind their terms. So PAGES must not lie in this repository.
"""

from __future__ import annotations

import argparse
import io
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.common import HERE, environment
from benchmarks.realism.generators import Entry, load
from benchmarks.realism.paired import Tumor, make, real_tumors
from benchmarks.realism.scans import ANNOTATIONS, REAL, Scan, liver_scans
from tumorsynth.atomic_writes import write_atomic

WINDOWS_HU = ((-160.0, 240.0), (30.0, 190.0))  # abdomen, liver
FIELD_MM, PIXELS_PER_MM = 84.0, 3.5
JITTER_MM = 10.0  # of the field, along each axis
FRAME = 14  # pixels around each slice, for the ticks
SIZE_JITTER = 0.15
TRIES = 5  # rounds through the real tumours that are imitated


@dataclass
class Case:
    """One page, and what the key says of it."""

    page: Image.Image
    truth: str
    about: dict[str, Any]


def page_of(scan: Scan, hu: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Three slices through a tumour, in two windows; from scan, mask and a random shift alone."""
    flips = tuple(
        axis for axis, way in enumerate(scan.directions) if way not in ("L", "P", "S")[axis]
    )
    hu, mask = np.flip(hu, flips), np.flip(mask, flips)  # the patient's right at the left
    where = np.argwhere(mask)
    middle = where.mean(0)
    deep = int(where[:, 2].max() - where[:, 2].min()) + 1
    step = max(1, round(deep / 3))
    shift = rng.uniform(-JITTER_MM, JITTER_MM, 2)
    sides = round(FIELD_MM * PIXELS_PER_MM)
    at_mm = (np.arange(sides) + 0.5) / PIXELS_PER_MM - FIELD_MM / 2
    x, y = (middle[k] + (at_mm + shift[k]) / scan.spacing[k] for k in (0, 1))
    tile = sides + 2 * FRAME
    page = Image.new("L", (3 * tile, len(WINDOWS_HU) * tile))
    pen = ImageDraw.Draw(page)
    ticks = [FRAME + (FIELD_MM / 2 - shift[k]) * PIXELS_PER_MM for k in (0, 1)]
    for column, offset in enumerate((-step, 0, step)):
        z = int(np.clip(round(middle[2]) + offset, 0, hu.shape[2] - 1))
        plane = ndimage.map_coordinates(
            hu[:, :, z], np.meshgrid(x, y, indexing="ij"), order=3, cval=-1024.0
        )
        for row, (low, high) in enumerate(WINDOWS_HU):
            grey = (np.clip((plane.T - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
            left, top = column * tile, row * tile
            page.paste(Image.fromarray(grey), (left + FRAME, top + FRAME))
            across, down = left + ticks[0], top + ticks[1]
            pen.line([(across, top + 2), (across, top + FRAME - 2)], fill=200, width=2)
            pen.line([(left + 2, down), (left + FRAME - 2, down)], fill=200, width=2)
    return page


def case_of(tumor: Tumor, truth: str, rng: np.random.Generator, **about: Any) -> Case:
    known = {
        "patient": tumor.scan.patient,
        "scan": tumor.scan.name,
        "diameter_mm": round(tumor.diameter_mm, 1),
        "contrast_hu": round(tumor.contrast_hu, 1),
    }
    return Case(page_of(tumor.scan, tumor.hu.numpy(), tumor.mask, rng), truth, known | about)


def in_turn(tumors: dict[str, list[Tumor]], count: int, rng: np.random.Generator) -> list[Tumor]:
    """Real tumours, one of each patient in turn, until there are enough."""
    waiting = [[some[k] for k in rng.permutation(len(some))] for some in tumors.values()]
    chosen: list[Tumor] = []
    while len(chosen) < count and any(waiting):
        for k in rng.permutation(len(waiting)):
            if waiting[k] and len(chosen) < count:
                chosen.append(waiting[k].pop())
    return chosen


def synthetic(entry: Entry, real: list[Tumor], count: int, rng: np.random.Generator) -> list[Case]:
    """Synthetic tumours like the real ones, each like another one where there is room for it.

    Those of one scan do not overlap: tumours at one place could not both be real.
    """
    cases: list[Case] = []
    taken: dict[str, np.ndarray] = {}
    reasons: set[str] = set()
    for _ in range(TRIES):
        for k in rng.permutation(len(real)):
            like, seed = real[k], int(rng.integers(2**31))
            diameter = like.diameter_mm * float(np.exp(rng.uniform(-SIZE_JITTER, SIZE_JITTER)))
            scan = like.scan
            taken.setdefault(scan.name, np.zeros(scan.hu.shape, bool))
            made = make(entry.generator, scan, diameter, like.contrast_hu, seed, taken[scan.name])
            if isinstance(made, str):
                reasons.add(made)
                continue
            taken[scan.name] |= made.tumor.mask
            told = {"asked_hu": made.asked_hu, "seed": made.seed}
            cases.append(case_of(made.tumor, "synthetic", rng, **told))
            print(f"{len(cases)} of {count} painted", flush=True)
            if len(cases) == count:
                return cases
    raise SystemExit(f"got {len(cases)} of {count} synthetic tumours: {'; '.join(sorted(reasons))}")


def cases_of(scans: list[Scan], entry: Entry, count: int, rng: np.random.Generator) -> list[Case]:
    """Real and synthetic cases, half each, shuffled."""
    by_patient: dict[str, list[Scan]] = {}
    for scan in scans:
        by_patient.setdefault(scan.patient, []).append(scan)
    tumors = {}
    for patient, own in sorted(by_patient.items()):
        scan = own[int(rng.integers(len(own)))]  # one phase: no tumour is shown twice
        found = [t for t in real_tumors(scan) if np.isfinite(t.contrast_hu)]
        if found:
            tumors[patient] = found
    real = in_turn(tumors, count // 2, rng)
    if len(real) < count // 2:
        raise SystemExit(f"{count} cases take {count // 2} real tumours, got {len(real)}")
    cases = [case_of(tumor, "real", rng) for tumor in real]
    cases += synthetic(entry, real, count - len(real), rng)
    return [cases[k] for k in rng.permutation(len(cases))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scans", type=Path, metavar="CT_DIR")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PAGES")
    parser.add_argument("--key", type=Path, required=True, metavar="KEYS", help="another folder")
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS, help="more labels")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scans; default: all")
    parser.add_argument("--generator", default="liver-early", metavar="[LABEL=]NAME")
    parser.add_argument(
        "--trained-on", action="append", default=[], metavar="LABEL=PATIENT,...", help="or =none"
    )
    parser.add_argument("--cases", type=int, default=40, help="even: half of them are real")
    parser.add_argument("--seed", type=int, help="who knows it knows the order; default: random")
    args = parser.parse_args(arguments)
    pages, keys = args.out.resolve(), args.key.resolve()
    if args.cases < 2 or args.cases % 2:
        parser.error(f"--cases must be an even number from 2, got {args.cases}")
    if keys == pages or pages in keys.parents:
        parser.error(f"--key must not lie in the reader's folder {args.out}, got {args.key}")
    if pages.is_relative_to(HERE.parent):
        parser.error(f"PAGES must lie outside of the repository, got {args.out}: mind the terms")
    if pages.exists() and any(pages.iterdir()):
        parser.error(f"PAGES must be empty or not exist, got {args.out}; pass another folder")
    torch.set_num_threads(1)
    (entry,) = load([args.generator], args.trained_on)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    every = liver_scans(args.scans, args.annotations, args.only)
    scans = [
        s for s in every if s.patient not in entry.trained_on and bool((s.label == REAL).any())
    ]
    cases = cases_of(scans, entry, args.cases, np.random.default_rng(seed))
    for folder in (pages, keys):
        folder.mkdir(parents=True, exist_ok=True)
    names = [f"{k:02d}" for k in range(1, len(cases) + 1)]
    for name, case in zip(names, cases, strict=True):
        png = io.BytesIO()
        case.page.save(png, "PNG")
        write_atomic(pages / f"case_{name}.png", lambda file, png=png: file.write(png.getvalue()))
    template = "".join(f"{name},,\n" for name in names)
    (pages / "answers.csv").write_text("case,answer,confidence\n" + template)
    key = {
        "environment": environment(),
        "generator": entry.describe(),
        "seed": seed,
        "cases": {n: {"truth": c.truth, **c.about} for n, c in zip(names, cases, strict=True)},
    }
    text = (json.dumps(key, indent=2) + "\n").encode()
    write_atomic(keys / "key.json", lambda file: file.write(text))
    print(f"{len(cases)} pages and answers.csv in {args.out}; the key in {args.key}")


if __name__ == "__main__":
    main()
