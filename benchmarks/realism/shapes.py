"""How far are drawn tumour sizes and shapes from real ones, on cases that no prior was fitted to?

    python -m benchmarks.realism.shapes SHAPES_DIR ORGAN_MASK_DIR [--organ liver ...]

The cases of an organ are split into two fixed halves (`shape_measures.first_half`). Priors are
fitted to each half and tested on the other: Kolmogorov-Smirnov distances in diameter, elongation,
flatness, and sphericity by two measures. Drawn tumours have the real ones' diameters and are taken
through the real ones' slices before they are measured. Intervals: cases resampled with replacement.
"random_splits" repeats fit and test on other halves; "halves" and "random_halves" are the distances
of the real halves from each other, which is what chance alone gives. "shipped" is the prior of the
package, fitted to all cases. "fitted" has the numbers of every prior.

An organ's results replace its earlier ones in results/shapes.json; the table is printed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.stats import ks_2samp

from benchmarks.common import HERE, write
from benchmarks.realism.shape_fit import (
    Pool,
    draw_pool,
    fit_shape,
    fit_sizes,
    weighted_distances,
)
from benchmarks.realism.shape_measures import (
    FEATURES,
    FILES,
    FITTED,
    LARGEST,
    SMALLEST,
    RealTumors,
    drawn_mask,
    features,
    first_half,
    random_half,
    read_real,
    step_share,
    through_slices,
)
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.organ_priors import PRIORS, SizePrior
from tumorsynth.placement.place import place
from tumorsynth.placement.rasterize import flatness
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import Skip

GOAL = 0.12
SHAPE_SEEDS = 100_000_000  # from here on: others than those of turns and surfaces
GOAL_ORGANS = ("liver", "kidney", "pancreas")
ORGANS_WITH_MASKS = ("liver", "kidney", "pancreas")
MEASURES = ("diameter", *FEATURES)
JUDGED = MEASURES[: 1 + FITTED]
FITTED_NUMBERS = (
    "log_diameter",
    "elongation",
    "flatness",
    "flatness_slope",
    "roughness",
    "roughness_slope",
)
Distances = dict[str, float]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(ks_2samp(a, b).statistic)


def rounded(values: Distances) -> Distances:
    return {name: round(value, 3) for name, value in values.items()}


def in_range(diameters: np.ndarray, prior: SizePrior) -> np.ndarray:
    low, high = prior.range_mm
    return diameters[(diameters >= low) & (diameters <= high)]


def draw_diameters(prior: SizePrior, count: int = 4000) -> np.ndarray:
    gen = rng(0)
    return np.array([prior.draw_diameter(*prior.range_mm, gen) for _ in range(count)])


def draw_features(
    prior: SizePrior, real: RealTumors, draws: int, name: str, slices: bool = True
) -> np.ndarray:
    """Measures (N, len(FEATURES)) of tumours drawn with the real ones' sizes and slices."""
    found = []
    for seed in range(draws * len(real.masks)):
        k = seed % len(real.masks)
        diameter, spacing = float(real.diameters[k]), real.spacings[k].tolist()
        shape = prior.draw_shape(diameter, rng(SHAPE_SEEDS + seed))
        mask = drawn_mask(shape, diameter, seed, spacing if slices else (1.0, 1.0, 1.0))
        if mask is None:
            continue
        found.append(
            features(through_slices(mask, spacing, FILES[name].interpolation) if slices else mask)
        )
    return np.array(found)


class Organ:
    """The real tumours of an organ, their measures, and the pool that priors are fitted with."""

    def __init__(self, name: str, folder: Path, pool_size: int, cache: Path | None) -> None:
        self.name, self.prior = name, PRIORS[name]
        self.real = read_real(name, folder)
        sized = (self.real.diameters >= SMALLEST) & (self.real.diameters <= LARGEST[name])
        self.sized, self.shaped = sized, self.real.where(sized)
        self.measured = np.array([features(mask) for mask in self.shaped.masks])
        file = cache / f"{name}_{pool_size}.npz" if cache else None
        if file is not None and file.is_file():
            self.pool = Pool.load(file)
            return
        self.pool = draw_pool(self.shaped, FILES[name].interpolation, pool_size)
        if file is not None:
            self.pool.save(file)

    def fit(self, chosen: np.ndarray) -> SizePrior:
        """Fit to the chosen tumours, bool (N,)."""
        prior = fit_sizes(self.real.diameters[chosen], self.prior)
        return fit_shape(self.pool, self.measured, chosen[self.sized], prior)

    def test(self, prior: SizePrior, chosen: np.ndarray, draws: int, slices: bool = True) -> dict:
        """Distances of a prior from the chosen tumours, with intervals."""
        of_shape = chosen[self.sized]
        shaped = self.shaped.where(of_shape)
        drawn = draw_features(prior, shaped, draws, self.name, slices)
        real = self.measured[of_shape]
        diameters = draw_diameters(prior)
        chosen_tumors = self.real.where(chosen)
        ks = {"diameter": distance(in_range(chosen_tumors.diameters, prior), diameters)}
        spread = [
            distance(in_range(chosen_tumors.diameters[rows], prior), diameters)
            for rows in resampled(chosen_tumors.cases)
        ]
        intervals = {"diameter": interval(spread)}
        for k, name in enumerate(FEATURES):
            ks[name] = distance(real[:, k], drawn[:, k])
            spread = [distance(real[rows, k], drawn[:, k]) for rows in resampled(shaped.cases)]
            intervals[name] = interval(spread)
        return {
            "cases": len(set(chosen_tumors.cases)),
            "tumours": len(in_range(chosen_tumors.diameters, prior)),
            "shapes": len(real),
            "drawn": len(drawn),
            "ks": rounded(ks),
            "interval_5_95": intervals,
            "percentiles_5_25_50_75_95": {
                name: {
                    kind: np.percentile(values[:, k], [5, 25, 50, 75, 95]).round(3).tolist()
                    for kind, values in (("real", real), ("drawn", drawn))
                }
                for k, name in enumerate(FEATURES)
            },
        }

    def between(self, first: np.ndarray) -> Distances:
        """Distances of two halves of the real tumours."""
        found = {
            "diameter": distance(
                in_range(self.real.diameters[first], self.prior),
                in_range(self.real.diameters[~first], self.prior),
            )
        }
        one, two = self.measured[first[self.sized]], self.measured[~first[self.sized]]
        for k, name in enumerate(FEATURES):
            found[name] = distance(one[:, k], two[:, k])
        return found

    def random_splits(self, count: int) -> dict:
        """Fit and test on random halves; shapes by the pool's draws, which are not redrawn."""
        gen = np.random.default_rng(0)
        fits, halves = [], []
        for _ in range(count):
            first = random_half(self.real, gen)
            halves.append(self.between(first))
            prior = self.fit(first)
            shapes = weighted_distances(self.pool, self.measured, ~first[self.sized], prior)
            sizes = distance(
                in_range(self.real.diameters[~first], prior), draw_diameters(prior, 2000)
            )
            fits.append({"diameter": sizes, **shapes})
        return {"count": count, "random_splits": summary(fits), "random_halves": summary(halves)}


def resampled(cases: list[str], count: int = 200) -> list[np.ndarray]:
    """Rows of the tumours of as many cases, drawn with replacement."""
    gen = np.random.default_rng(0)
    names = sorted(set(cases))
    rows = {name: [k for k, case in enumerate(cases) if case == name] for name in names}
    return [
        np.array([k for c in gen.choice(len(names), len(names)) for k in rows[names[c]]])
        for _ in range(count)
    ]


def interval(values: list[float]) -> list[float]:
    return np.percentile(values, [5, 95]).round(3).tolist()


def summary(found: list[Distances]) -> dict[str, list[float]]:
    """Median and 95th percentile of each distance."""
    return {
        name: np.percentile([f[name] for f in found], [50, 95]).round(3).tolist()
        for name in found[0]
    }


def numbers(prior: SizePrior) -> dict:
    return {key: value for key, value in asdict(prior).items() if key in FITTED_NUMBERS}


def steps(organ: Organ, most: int = 60) -> dict:
    """How real masks were brought to 1 mm, told by how much of them recurs with every slice."""
    thick = np.flatnonzero(organ.shaped.spacings[:, 2] >= 2)[:most]
    found: dict[str, list[float]] = {"real": [], "distance": [], "linear": []}
    for k in thick.tolist():
        diameter, spacing = float(organ.shaped.diameters[k]), organ.shaped.spacings[k].tolist()
        found["real"].append(step_share(organ.shaped.masks[k], spacing[2]))
        shape = organ.prior.draw_shape(diameter, rng(SHAPE_SEEDS + k))
        mask = drawn_mask(shape, diameter, k, spacing)
        if mask is not None:
            for way in ("distance", "linear"):
                found[way].append(step_share(through_slices(mask, spacing, way), spacing[2]))
    return {
        "slices_of_2_mm_or_more": len(thick),
        **{key: round(float(np.median(values)), 3) for key, values in found.items() if values},
    }


def judge(organ: Organ, draws: int, splits: int) -> dict:
    """All results of an organ."""
    first = first_half(organ.real)
    everything = np.ones(len(first), dtype=bool)
    found: dict = {
        "shapes_mm": [SMALLEST, LARGEST[organ.name]],
        "diameters_mm": organ.prior.range_mm,
        "step_share": steps(organ),
        "out_of_sample": [],
        "fitted": {"all": numbers(organ.fit(everything)), "shipped": numbers(organ.prior)},
    }
    for name, half in (("first", first), ("second", ~first)):
        prior = organ.fit(half)
        found["fitted"][name] = numbers(prior)
        found["out_of_sample"].append(
            {"fitted_to": name, **organ.test(prior, ~half, draws)},
        )
    found["halves"] = rounded(organ.between(first))
    found.update(organ.random_splits(splits))
    found["shipped"] = organ.test(organ.prior, everything, draws)
    found["shipped_without_slices"] = organ.test(organ.prior, everything, draws, slices=False)["ks"]
    return found


def placed(name: str, folder: Path, draws: int) -> dict:
    """The shipped prior inside real organs, whose surface cuts tumours."""
    flat, ratio, reasons = [], [], 0
    files = sorted(folder.glob(f"{name}_*.nii.gz"))
    for file in files:
        scan = nib.load(file)
        label = torch.from_numpy(np.asarray(scan.dataobj).astype(np.uint8))
        spacing = [float(s) for s in scan.header.get_zooms()[:3]]
        region = OrganRegion.of_label(label, 1)
        settings = PlacementSettings(size_mm=(8, 30), prior=name)
        for seed in range(draws):
            (tumor,) = place(region, spacing, settings, rng(seed))
            if isinstance(tumor, Skip):
                reasons += 1
                continue
            flat.append(flatness(tumor.mask, spacing))
            ratio.append(tumor.diameter_mm / tumor.params.drawn_mm)
    return {
        "organs": len(files),
        "tumours": len(flat),
        "skipped": reasons,
        "flatness_5_50_95": np.percentile(flat, [5, 50, 95]).round(3).tolist(),
        "made_smaller_than_drawn": round(float(np.mean(np.array(ratio) < 0.98)), 3),
    }


def failures(organs: dict) -> list[str]:
    """Every distance out of sample above the goal."""
    return [
        f"{name}, fitted to the {test['fitted_to']} half: {measure} {value}"
        for name in GOAL_ORGANS
        if name in organs
        for test in organs[name]["out_of_sample"]
        for measure, value in test["ks"].items()
        if measure in JUDGED and value > GOAL
    ]


def table(organs: dict) -> str:
    """The results as Markdown."""
    lines = [f"| | tumours | {' | '.join(MEASURES)} |", "| --- | --- |" + " --- |" * len(MEASURES)]
    for name, found in organs.items():
        for test in found["out_of_sample"]:
            cells = [
                f"{test['ks'][m]:.2f} ({test['interval_5_95'][m][0]:.2f}-"
                f"{test['interval_5_95'][m][1]:.2f})"
                for m in MEASURES
            ]
            label = f"{name}, fitted to the {test['fitted_to']} half"
            lines.append(f"| {label} | {test['tumours']} | {' | '.join(cells)} |")
        for key, label in (
            ("random_splits", f"{found['count']} random splits: median (95 %)"),
            ("random_halves", "their real halves from each other"),
        ):
            cells = [
                f"{found[key][m][0]:.2f} ({found[key][m][1]:.2f})" if m in found[key] else ""
                for m in MEASURES
            ]
            lines.append(f"| {name}, {label} | | {' | '.join(cells)} |")
        for key, ks in (
            ("the shipped prior, all cases", found["shipped"]["ks"]),
            ("the same without slices", found["shipped_without_slices"]),
        ):
            cells = [f"{ks[m]:.2f}" for m in MEASURES]
            lines.append(f"| {name}, {key} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def outlines(names: list[str], path: Path, sizes: tuple[float, ...]) -> None:
    """Drawn outlines in their largest slice, ten of each size, at one scale per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, size) for name in names for size in sizes]
    fig, axes = plt.subplots(len(rows), 10, figsize=(10, len(rows)))
    for row, (name, size) in zip(axes, rows, strict=True):
        for k, axis in enumerate(row):
            mask = drawn_mask(PRIORS[name].draw_shape(size, rng(SHAPE_SEEDS + k)), size, k)
            assert mask is not None
            plane = np.pad(mask[:, :, mask.sum((0, 1)).argmax()], 2)
            axis.imshow(plane, cmap="gray", vmin=-0.3, vmax=1.4)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{name}\n{size:g} mm", fontsize=8)
    fig.tight_layout(pad=0.3)
    fig.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path, metavar="SHAPES_DIR")
    parser.add_argument("organs", type=Path, metavar="ORGAN_MASK_DIR")
    parser.add_argument("--organ", nargs="+", choices=sorted(FILES), default=sorted(FILES))
    parser.add_argument("--draws", type=int, default=2, help="drawn tumours for each real one")
    parser.add_argument("--pool", type=int, default=1800, help="tumours drawn to fit priors with")
    parser.add_argument("--cache", type=Path, help="existing folder to keep these in, and to reuse")
    parser.add_argument("--splits", type=int, default=10, help="random splits of the cases")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.organ:
        judged = judge(Organ(name, args.shapes, args.pool, args.cache), args.draws, args.splits)
        inside = placed(name, args.organs, 50) if name in ORGANS_WITH_MASKS else None
        # read late: another organ may have been written meanwhile
        path = HERE / "results" / "shapes.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        found = {**known.get("organs", {}), name: {**judged, "in_organs": inside}}
        write("shapes", {"goal": GOAL, "failures": failures(found), "organs": found})
        print(json.dumps(judged["fitted"]))
        print(table({name: judged}))
        print("above the goal:", failures({name: judged}) or "none", flush=True)
    if args.picture:
        outlines(["liver", "kidney", "cyst", "pancreas", "lung"], args.picture, (9.0, 14.0, 28.0))


if __name__ == "__main__":
    main()
