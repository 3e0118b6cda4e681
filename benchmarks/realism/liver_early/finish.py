"""Give the trained `liver-early` 6 its default contrast and its card.

    python -m benchmarks.realism.liver_early.finish RUN/liver-early RUN/tumours.npz -o FOLDER
        [--results RUN/results]

Where nobody asks for a contrast, the generator takes those of the metastases that it learned from:
the carcinoma is nearly as bright as its liver on average, and early tumours like it would be
invisible. Figures on unseen patients come from RUN/results, once they are there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.realism.recipes import described
from tumorsynth.appearance.tissue import CARD_KEY, SOFT_TISSUE
from tumorsynth.generators.folder import read_folder
from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.crops import contrast_range
from tumorsynth.training.data import find_tumors, load_pack

FIELDS: dict[str, Any] = {
    "name": "liver-early",
    "version": 6,
    "description": "A small diffusion generator for early (< 20 mm) tumours of abdominal organs, "
    "trained on six tumours of three patients. For research and training data; not for diagnosis.",
    "licence": "CC BY 4.0, with attribution to the collections under data",
    "data": {
        "tumours": "four metastases of one patient (outlined by the project's authors, not "
        "radiologists) and one of another of Colorectal-Liver-Metastases "
        "(doi:10.7937/QXK2-QG03, CC BY 4.0); one hepatocellular carcinoma (outlined by the "
        "authors) of HCC-TACE-Seg (doi:10.7937/TCIA.5FNA-0924, CC BY 4.0)",
        "autoencoder": "these scans; one more of Colorectal-Liver-Metastases, one of "
        "Adrenal-ACC-Ki67-Seg (doi:10.7937/1FPG-VM46, CC BY 4.0), TCIA ACRIN-FLT-Breast 001, "
        "LIDC-IDRI-0314 and one more of the LIDC family (CC BY 3.0); smoothed and brightened "
        "copies of four of them",
        "surroundings": "in four of five crops the tumour is moved, with another contrast and "
        "some with a rim or a washed-out centre, into even tissue of the annotated scans, of one "
        "more of Colorectal-Liver-Metastases, of ACRIN-FLT-Breast and of the LIDC family, or of "
        "smoothed and brightened copies",
    },
    CARD_KEY: SOFT_TISSUE.to_card(),
    "limits": [
        "tissue_range is that of abdominal soft tissue, as for version 4 and hu2023, not measured",
        "trained on three patients in portal or late phase: bright tumours are those of the "
        "portal phase with their contrast reversed",
        "makes no calcified and no cystic lesions",
        "uses a continuous latent in place of the paper's codebook (published sizes and codebooks "
        "can be loaded)",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder of the trained denoiser")
    parser.add_argument("pack", type=Path, metavar="TUMOURS.npz")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="folder with the figures on unseen patients")
    args = parser.parse_args()
    generator = read_folder(args.trained)
    cases = load_pack(args.pack)
    metastases = [t for t in find_tumors(cases, 2) if cases[t.case].name.startswith("crlm")]
    contrast = contrast_range(cases, metastases, 2, DenoiserTraining())
    generator = generator.with_sampler(contrast=contrast)
    generator.card = described(generator.card, FIELDS)
    if args.results:
        found = {"unseen": unseen(args.results)}
        generator.card["metrics"] = found | generator.card["metrics"] | found
    print(f"{generator.save(args.out)}: contrast {contrast}")


def unseen(results: Path) -> dict[str, Any]:
    """Figures on patients that no version has seen, for ``card["metrics"]``."""
    rows = json.loads((results / "reconstruction_lits.json").read_text())["rows"]["v6"]["lits000"]
    liver = rows["liver"]
    group = json.loads((results / "patients.json").read_text())["groups"]["v6"]["unseen by all"]
    names = ("core_contrast_hu", "noise_ratio", "lumps_ratio", "edge_width_mm")
    figures: dict[str, Any] = {
        name: {kind: group["figures"][name][kind] for kind in ("real", "synthetic")}
        for name in names
    }
    return {
        "how": [
            "liver: reconstruction of LiTS volume 0, which no version was trained on",
            f"tumours: {len(group['patients'])} patients that no version was trained on, "
            f"{group['real_tumours']} real and {group['synthetic_tumours']} synthetic tumours of "
            "their size and contrast: means over patients with 95 % intervals (patients.json)",
        ],
        "liver": {k: v for k, v in liver.items() if k != "without_detail"},
        "liver_without_detail": liver["without_detail"],
        "tumours": figures,
        "classifier": group["auc"]["all but shape"],
    }


if __name__ == "__main__":
    main()
