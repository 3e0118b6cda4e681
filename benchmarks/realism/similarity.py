"""Do early tumours of different organs look alike, and synthetic ones like real ones (figure 2)?

    python -m benchmarks.realism.similarity --scan CT LABEL liver=1 kidney=3,4 pancreas=2 \\
        [--scan CT2 LABEL2 liver=1 real=2] --generator liver-early --count 12 -o similarity_organs

Each --scan is a CT, its label map, and the label values of its organs; "real" is the value of its
annotated tumours, which lie in the organ named first. Into every organ go --count synthetic tumours
of 8 to 14 mm. "healthy" are the same masks on the untouched scan: how well the organs' own tissue
tells them apart. Features, classifiers and the test are those of tumorsynth.evaluation.similarity;
results/NAME.json and .png have the figures and the t-SNE maps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.common import HERE, write
from benchmarks.realism.lesions import Lesion
from benchmarks.realism.pack_lesions import real_lesions, synthetic_lesions
from benchmarks.realism.real_or_synthetic import classify
from tumorsynth.evaluation.similarity import embed, save_map, table, tell_apart, tumor_features
from tumorsynth.training.data import Case
from tumorsynth.training.reading import Source, read_cases

EARLY_MM = 20.0
SIZES_MM = (8.0, 14.0)  # the same in all organs, and small enough for a pancreas
REAL_SIZES_MM = (9.0, 20.0)  # as the real early tumours at hand


def features_of(lesions: list[Lesion], relative: bool = False) -> list[dict[str, float]]:
    """Rows of the lesions that have features: those too small have not.

    relative: the organ's median 2 to 8 mm around is made 100 HU everywhere.
    """
    rows = []
    for lesion in lesions:
        level = 100.0
        if relative:
            far = ndimage.distance_transform_edt(~lesion.tumor)
            around = lesion.hu[lesion.organ & (far > 2) & (far < 8)]
            level = float(np.median(around)) if len(around) else np.nan
        try:
            rows.append(tumor_features(lesion.hu - level + 100, lesion.tumor))
        except ValueError as error:
            print(f"left out: {error}", flush=True)
    return rows


def judged(classes: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The classifiers on all features, and on those of texture alone."""
    rows = [row for some in classes.values() for row in some]
    named = np.repeat(list(classes), [len(some) for some in classes.values()])
    values, names = table(rows)
    texture = np.array([not name.startswith(("stat_", "ih_")) for name in names])
    return {
        "intensity and texture": tell_apart(values, named, permutations=100),
        "texture": tell_apart(values[:, texture], named, permutations=100),
    }


def a_map(classes: dict[str, list[dict[str, float]]]) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for some in classes.values() for row in some]
    named = np.repeat(list(classes), [len(some) for some in classes.values()])
    return embed(table(rows)[0]), named


def early(lesions: list[Lesion]) -> list[Lesion]:
    return [each for each in lesions if (6 * each.tumor.sum() / np.pi) ** (1 / 3) < EARLY_MM]


def organs_of(words: list[str]) -> dict[str, list[int]]:
    return {
        name: [int(value) for value in values.split(",")]
        for name, _, values in (word.partition("=") for word in words)
    }


def by_organ(
    case: Case,
    organs: dict[str, list[int]],
    generator: str,
    count: int,
    tumor: int,
    seed: int,
    relative: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of synthetic tumours and of the same masks on the untouched scan, organ by organ."""
    made: dict[str, Any] = {}
    sham: dict[str, Any] = {}
    for name, labels in organs.items():
        tumors, healthy, how = synthetic_lesions(
            generator, [case], labels, tumor, count, seed, size_mm=SIZES_MM
        )
        made[name], sham[name] = features_of(tumors, relative), features_of(healthy, relative)
        print(f"{case.name} {name}: {len(made[name])} of {count} tumours, {how}", flush=True)
    return made, sham


def against_real(
    case: Case, organ: list[int], generator: str, count: int, tumor: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two-sample test of real early tumours against synthetic ones and healthy tissue."""
    real = features_of(early(real_lesions([case], organ, tumor)))
    tumors, healthy, _ = synthetic_lesions(
        generator, [case], organ, tumor, count, seed + 1000, size_mm=REAL_SIZES_MM
    )
    classes = {"real": real, "synthetic": features_of(tumors), "healthy": features_of(healthy)}
    out: dict[str, Any] = {"real_tumours": len(real)}
    for other in ("synthetic", "healthy"):
        pair = {"real": real, other: classes[other]}
        out[f"real against {other}"] = judged(pair) if len(real) > 1 else "too few real tumours"
        values = table(real + classes[other])[0]
        lda = classify(values[: len(real)], values[len(real) :])
        out[f"real against {other}, linear discriminant, pairs left out"] = lda
    return out, classes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", nargs="+", action="append", required=True)
    parser.add_argument("--generator", default="liver-early")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--relative", action="store_true", help="organs: HU relative to the organ around a tumour"
    )
    parser.add_argument("-o", "--out", default="similarity", metavar="NAME")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {
        "generator": args.generator,
        "sizes_mm": SIZES_MM,
        "real_sizes_mm": REAL_SIZES_MM,
        "relative": args.relative,
        "organs": {},
        "real": {},
    }
    maps: dict[str, Any] = {}
    start = time.process_time()
    for ct, label, *words in args.scan:
        organs = organs_of(words)
        real = organs.pop("real", None)
        (case,) = read_cases([Source(Path(ct).name.partition(".")[0], Path(ct), Path(label))])
        tumor = real[0] if real else int(case.label.max()) + 1
        shared = (args.generator, args.count, tumor, args.seed)
        if len(organs) > 1:
            made, sham = by_organ(case, organs, *shared, args.relative)
            results["organs"][case.name] = {"tumours": judged(made), "healthy": judged(sham)}
            maps[f"{case.name}: synthetic tumours"] = a_map(made)
            maps[f"{case.name}: the same masks, healthy"] = a_map(sham)
        if real:
            first = next(iter(organs.values()))
            results["real"][case.name], classes = against_real(case, first, *shared)
            maps[f"{case.name}: real and synthetic"] = a_map(classes)
        results["cpu_seconds"] = round(time.process_time() - start)
        write(args.out, results)  # after each scan: a run takes minutes
        save_map(HERE / "results" / f"{args.out}.png", maps)


if __name__ == "__main__":
    main()
