"""Do contrast, noise, evenness and edges of tumours match real ones, and the scan they are in?

    python -m benchmarks.realism.matched CASES.npz --real ANNOTATED.npz --generator liver-early \\
        --organ-label 1 --tumor-label 2 --count 100

CASES and ANNOTATED are packs (`tumorsynth train pack`). The same masks are made four ways: "sham",
the untouched scan; "as published", decoded voxels pasted with a blurred mask (blend="difftumor",
the feather drawn from 0 to 4 mm); "before", the change added without being matched to the scan;
"now". Besides the scan as it is: "thick", averaged over 5 mm and interpolated, and "soft", blurred
in the plane by 1.2 mm, for the real tumours as well; "seen" are those of "now" made in the thin
scan and then changed with it, which is what "now" should come to in the others. Real tumours are
larger than most synthetic ones, so edges and evenness are also given for those of 14 to 28 mm.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import ndimage

import tumorsynth as ts
from benchmarks.common import spread, write
from benchmarks.realism.lesions import NOISE_SIGMA_MM, Lesion, deepest, edge, noise_length
from benchmarks.realism.pack_lesions import real_lesions, synthetic_lesions
from tumorsynth.appearance.contrast_priors import ContrastPrior, add_structure
from tumorsynth.appearance.noise import ScanNoise
from tumorsynth.generators.handcrafted import HandcraftedConfig, HandcraftedGenerator
from tumorsynth.pipeline import paint as _painting
from tumorsynth.pipeline import requests as _requests
from tumorsynth.training.data import load_pack

ALIKE_MM = (14.0, 28.0)
SCANS = ("thin", "thick", "soft")
WAYS = ("real", "as published", "before", "seen", "now") + (
    "hu2023 before",
    "hu2023 seen",
    "hu2023 now",
)
NOT_IN = {"thin": ("seen", "hu2023 seen"), "thick": ("as published",), "soft": ("as published",)}
COLUMNS = ("contrast_hu", "noise_ratio", "noise_mm", "noise_z_mm", "slow_ratio", "edge_mm")


def changed(hu: np.ndarray, scan: str) -> np.ndarray:
    """HU (X, Y, Z) as another scanner's."""
    hu = hu.astype(np.float32)
    if scan == "soft":
        return ndimage.gaussian_filter(hu, (1.2, 1.2, 0))
    if scan == "thick":
        slices = ndimage.uniform_filter1d(hu, 5, axis=2)[:, :, 2::5]
        factors = (1, 1, hu.shape[2] / slices.shape[2])
        return ndimage.zoom(slices, factors, order=1, mode="nearest", grid_mode=True)
    return hu


@contextmanager
def unmatched() -> Iterator[None]:
    """As it was before changes were matched to the scan."""
    with (
        mock.patch.object(_painting, "match_to_scan", lambda crop, change, *_: change),
        mock.patch.object(_requests, "measure_noise", lambda *_: ScanNoise((0.0,) * 3, None, None)),
    ):
        yield


def row(lesion: Lesion) -> dict[str, float]:
    """Figures of the 100 voxels farthest from the outline, as in lesions.py."""
    core = deepest(lesion.tumor)
    outside = ndimage.distance_transform_edt(~lesion.tumor)
    shell = lesion.organ & (outside > 2) & (outside < 8)
    smooth = ndimage.gaussian_filter(lesion.hu, NOISE_SIGMA_MM)
    noise = lesion.hu - smooth
    contrast = float(np.median(lesion.hu[core]) - np.median(lesion.hu[shell]))
    return {
        "diameter_mm": float((6 * lesion.tumor.sum() / np.pi) ** (1 / 3)),
        "contrast_hu": contrast,
        "noise_ratio": float(noise[core].std() / noise[shell].std()),
        "noise_mm": noise_length(noise, core),
        "noise_z_mm": noise_length(noise, core, axes=(2,)),
        "slow_ratio": float(smooth[core].std() / smooth[shell].std()),
        "edge_mm": edge(lesion.hu, lesion.tumor, lesion.organ, contrast)["edge_width_mm"],
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """5, 50 and 95 % of every column, and the medians of the tumours of 14 to 28 mm."""
    out: dict[str, Any] = {"tumours": len(rows)}
    alike = [r for r in rows if ALIKE_MM[0] <= r["diameter_mm"] < ALIKE_MM[1]]
    out["14 to 28 mm"] = {"tumours": len(alike)}
    for name in COLUMNS:
        values = np.array([r[name] for r in rows])
        out[name] = [round(float(v), 2) for v in np.nanpercentile(values, [5, 50, 95])]
        if alike:
            middle = np.nanmedian([r[name] for r in alike])
            out["14 to 28 mm"][name] = round(float(middle), 2)
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path, metavar="CASES.npz")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--generator", default="liver-early")
    parser.add_argument("--organ-label", type=int, nargs="+", default=[1])
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--fewer", type=int, default=24, help="tumours in the other scans")
    parser.add_argument("--size-mm", type=float, nargs=2, default=[8.0, 25.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="matched", help="of the file in results/")
    return parser.parse_args()


def one(args: argparse.Namespace, scan: str, way: str) -> dict[str, Any]:
    """The figures of one way of making tumours in one scan, and of the masks on the bare scan."""
    torch.set_num_threads(1)
    labels = args.organ_label, args.tumor_label
    if way == "real":
        annotated = [c for c in load_pack(args.real or args.cases) if c.label is not None]
        cases = [replace(c, hu=torch.from_numpy(changed(c.hu.numpy(), scan))) for c in annotated]
        return {way: summary([row(each) for each in real_lesions(cases, *labels)])}
    case = next(c for c in load_pack(args.cases) if c.label is not None)
    if not way.endswith("seen"):
        case = replace(case, hu=torch.from_numpy(changed(case.hu.numpy(), scan).round()).short())
    generator: Any = ts.load_generator(args.generator)
    if way == "hu2023 before":
        generator = HandcraftedGenerator(HandcraftedConfig(texture_hu=(5.0, 10.0)))
    elif way.startswith("hu2023"):
        generator = HandcraftedGenerator()
    start = time.process_time()
    with nullcontext() if way.endswith(("now", "seen")) else unmatched():
        made, sham, _ = synthetic_lesions(
            generator,
            [case],
            *labels,
            args.count if scan == "thin" else args.fewer,
            0,
            size_mm=tuple(args.size_mm),
            blend="difftumor" if way == "as published" else "change",
        )
    seconds = time.process_time() - start
    if way.endswith("seen"):
        made = [replace(each, hu=changed(each.hu, scan)) for each in made]
    told = {way: summary([row(each) for each in made])}
    told[way]["cpu_ms_per_tumour"] = round(1e3 * seconds / max(1, len(made)))
    if way == "before":
        told["sham"] = summary([row(each) for each in sham])
    return told


def cost(name: str, calls: int = 9) -> dict[str, Any]:
    """CPU time of what matching adds to a tumour of 15 to 20 mm, and of a rim and a core, in ms."""
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {}

    def timed(step: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = function(*args, **options)
            took.setdefault(step, []).append(1e3 * (time.process_time() - start))
            return result

        return run

    noise = torch.randn(1, 96, 96, 96, generator=torch.Generator().manual_seed(0))
    image, label = 110 + 12 * noise, torch.ones(noise.shape, dtype=torch.uint8)
    prior = ContrastPrior(rim_share=1.0, core_share=1.0, core_from_mm=10.0)
    with (
        mock.patch.object(_requests, "measure_noise", timed("grain", _requests.measure_noise)),
        mock.patch.object(_painting, "match_to_scan", timed("match", _painting.match_to_scan)),
        mock.patch.object(_painting, "add_structure", timed("rim and core", add_structure)),
    ):
        synth = ts.SynthesizeTumor(name, 1, 2, count=1, size_mm=(15, 20), contrast_hu=prior)
        for seed in range(calls):
            timed("call", synth)(image, label, spacing=(1, 1, 1), seed=seed)
    return {step: spread(times[1:]) for step, times in took.items()}


def main() -> None:
    args = parse()
    scans = {scan: [way for way in WAYS if way not in NOT_IN[scan]] for scan in SCANS}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(one, args, scan, way): scan for scan, ways in scans.items() for way in ways
        }
        found: dict[str, dict[str, Any]] = {scan: {} for scan in scans}
        for done in as_completed(waiting):
            found[waiting[done]] |= done.result()
            print(waiting[done], done.result(), flush=True)
    order = (WAYS[0], "sham", *WAYS[1:])
    card = ts.load_generator(args.generator).card
    results = {
        "question": str(__doc__).splitlines()[0],
        "how": "CPU time; the machine may have been busy with other work",
        "generator": {key: card[key] for key in ("name", "version", "sha256") if key in card},
        "packs": {
            kind: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "annotated": [c.name for c in load_pack(path) if c.label is not None],
            }
            for kind, path in (("made in", args.cases), ("real", args.real or args.cases))
        },
        "size_mm": args.size_mm,
        "columns": "5, 50, 95 %",
        "cost_ms": {name: cost(name) for name in (args.generator, "hu2023")},
        "scans": {
            scan: {name: told[name] for name in order if name in told}
            for scan, told in found.items()
        },
    }
    write(args.name, results)


if __name__ == "__main__":
    main()
