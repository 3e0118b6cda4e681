"""How many training crops hold a synthetic tumour, by the order of the transforms?

    python -m benchmarks.downstream.crops [--scans 6] [--crops 8]

Needs MONAI. Every order sees the same phantoms and makes the same number of crops; every scan gets
1 to 3 tumours of `hu2023`, as with prob=1. Writes results/crops.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandSpatialCropSamplesd,
)
from monai.utils import set_determinism

import tumorsynth as ts
from benchmarks.common import write
from tumorsynth.monai import RandSynthesizeTumord

BOTH = ["image", "label"]
ORGAN, TUMOR, SIZE = 1, 2, (48, 48, 32)


def orders(crops: int) -> dict[str, Compose]:
    def synthesize() -> RandSynthesizeTumord:
        return RandSynthesizeTumord(
            *BOTH, generator="hu2023", organ_labels=ORGAN, tumor_label=TUMOR, prob=1.0
        )

    def organ_box() -> CropForegroundd:
        return CropForegroundd(
            BOTH,
            source_key="label",
            select_fn=lambda label: label == ORGAN,
            margin=16,
            allow_smaller=True,
        )

    def random_crop() -> RandSpatialCropSamplesd:
        return RandSpatialCropSamplesd(BOTH, SIZE, num_samples=crops, random_size=False)

    def foreground_crop() -> RandCropByPosNegLabeld:
        return RandCropByPosNegLabeld(BOTH, "label", SIZE, pos=1, neg=1, num_samples=crops)

    def class_crop() -> RandCropByLabelClassesd:
        return RandCropByLabelClassesd(
            BOTH, "label", SIZE, ratios=[0, 1, 1], num_classes=3, num_samples=crops
        )

    return {
        "synthesise, random crop": Compose([synthesize(), random_crop()]),
        "synthesise, crop by foreground": Compose([synthesize(), foreground_crop()]),
        "crop by foreground, synthesise": Compose([foreground_crop(), synthesize()]),
        "synthesise, crop by class": Compose([synthesize(), class_crop()]),
        "organ box, synthesise, crop by class": Compose([organ_box(), synthesize(), class_crop()]),
    }


def case(seed: int) -> dict[str, MetaTensor]:
    ct = ts.make_phantom(spacing=(2.0, 2.0, 3.0), seed=seed)
    label = (ct.label == ts.phantom.LABELS["liver"]).to(torch.int16)
    return {
        "image": MetaTensor(ct.image, affine=ct.affine),
        "label": MetaTensor(label, affine=ct.affine),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--crops", type=int, default=8, help="of each scan")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows: dict[str, dict[str, Any]] = {}
    scans = [case(seed) for seed in range(args.scans)]
    for name, transforms in orders(args.crops).items():
        set_determinism(0)
        transforms.set_random_state(seed=0)
        with_tumor, start = 0, time.process_time()
        for scan in scans:
            made = transforms(scan)
            with_tumor += sum(bool((crop["label"] == TUMOR).any()) for crop in made)
        total = args.scans * args.crops
        rows[name] = {
            "crops": total,
            "with_tumor": with_tumor,
            "share": round(with_tumor / total, 3),
            "cpu_ms_per_crop": round(1000 * (time.process_time() - start) / total, 1),
        }
        print(f"{name:40} {with_tumor:3} of {total}", flush=True)
    write("crops", {"crop": SIZE, "spacing": (2.0, 2.0, 3.0), "orders": rows})


if __name__ == "__main__":
    main()
