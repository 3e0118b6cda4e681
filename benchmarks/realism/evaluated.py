"""Measure versions of a generator on scans that none has seen, as `tumorsynth train` measures one.

    python -m benchmarks.realism.evaluated CASES.npz --generator NAME=FOLDER [...] -o NAME

`tumorsynth.training.evaluate` says what is measured. The scans' organ has label 1, tumours 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import write
from tumorsynth.generators.folder import read_folder
from tumorsynth.generators.store import find_folder
from tumorsynth.training.data import load_pack
from tumorsynth.training.evaluate import measure_on


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pack", type=Path, help="of `tumorsynth train pack`")
    parser.add_argument("--generator", action="append", required=True, metavar="[NAME=]FOLDER")
    parser.add_argument("-o", "--output", required=True, metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = load_pack(args.pack)
    rows = {}
    for given in args.generator:
        name, _, folder = given.rpartition("=")
        rows[name or folder] = measure_on(read_folder(find_folder(folder)), cases, [1], 2)
    write(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
