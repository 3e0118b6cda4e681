"""Tests on the lowest versions allowed and on the frameworks that the docs name: `make matrix`.

    python tests/matrix.py [WORD ...]       all rows, or those whose name holds one of the words

Each row is a folder of packages laid over the environment that runs this (PYTHONPATH), which costs
a download of the framework alone: torch and the rest are shared. Slow tests run too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "build" / "matrix"
PIP = "-m pip install -q --disable-pip-version-check --no-deps --target".split()
PYTEST = "-m pytest -q -p no:cacheprovider -m".split()


@dataclass(frozen=True)
class Row:
    """What to lay over the environment, and the tests to run there.

    requirements: what pip installs; where no version is named, the newest.
    first: a Python statement to run before the tests.
    marks: which of the tests, as for `pytest -m`.
    """

    name: str
    package: str
    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    first: str = "pass"
    marks: str = "not gpu"


def _nnunet(version: str, **others: str) -> Row:
    """nnU-Net before 2.8 finds the trainer through a copy of the shim alone."""
    lines = (ROOT / "tests" / "nnunet.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins |= {**others, "nnunetv2": version}
    return Row(
        f"nnunet {version}",
        "nnunetv2",
        tuple(f"{name}=={pin}" for name, pin in pins.items()),
        ("tests/nnunet/test_nnunet.py",),
        "pass"
        if version.startswith("2.8")
        else "from tumorsynth.nnunet.shim import install; install()",
    )


def _lowest(name: str, *newest: str) -> Row:
    """The lowest versions that pyproject.toml allows, but of torch and of the packages named."""
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for other in ("torch", *newest):
        del pins[other]
    names = "cli nifti preview synthesizer bench evaluation reader_study training_cli weights store"
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.stem.removeprefix("test_") in names.split()
    ]
    return Row(
        name,
        "nibabel",
        tuple(f"{package}=={pin}" for package, pin in pins.items()),
        (*files, *MONAI, *TORCHIO, *LIGHTNING),
        marks="not slow and not gpu",
    )


MONAI = ("tests/test_monai.py", "tests/test_monai_loaders.py")
TORCHIO = ("tests/torchio/test_torchio.py",)
LIGHTNING = ("tests/test_lightning.py",)
ROWS = (
    _lowest("lowest"),
    # the rest allows numpy 2 and has to work with it; these four say that they do not
    _lowest("lowest with numpy 2", "numpy", "monai", "scipy", "scikit-learn"),
    Row("monai 1.4", "monai", ("monai==1.4.0", "numpy==1.26.4"), MONAI),  # it wants numpy < 2
    Row("monai 1.5", "monai", ("monai==1.5.2",), MONAI),
    Row("monai newest", "monai", ("monai",), MONAI),
    Row("torchio 0.20", "torchio", ("torchio==0.20.23", "Deprecated"), TORCHIO),
    Row("torchio newest", "torchio", ("torchio",), TORCHIO),
    Row(
        "torchio 2 alpha",
        "torchio",
        ("torchio==2.0.0a2", "torch-interpol", "loguru", "tyro", "docstring_parser", "typeguard"),
        ("tests/torchio/test_torchio2.py",),
    ),
    Row("lightning 2.4", "lightning", ("lightning==2.4.0",), LIGHTNING),
    Row("lightning newest", "lightning", ("lightning",), LIGHTNING),
    _nnunet("2.5.2", dynamic_network_architectures="0.3.1"),
    _nnunet("2.6.4"),
    _nnunet("2.7.0"),
    _nnunet("2.8.1"),
)


def run(row: Row) -> tuple[bool, str]:
    """Lay the row's packages over the environment and run its tests: (passed, last line)."""
    folder = OVERLAYS / row.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    if python(*PIP, str(folder), *row.requirements).returncode:
        return False, f"pip could not install {', '.join(row.requirements)}"
    code = (
        f"import importlib.metadata as m, {row.package} as p; {row.first}; "
        f"assert p.__file__.startswith({str(folder)!r}), p.__file__; "
        f"print(m.version({row.package!r}))"
    )
    done = python("-c", code)
    if done.returncode:
        return False, f"{row.package} cannot be imported"
    version = done.stdout.split()[-1]
    print(f"== {row.name}: {row.package} {version}", flush=True)
    done = python(*PYTEST, row.marks, *row.tests)
    print(done.stdout, flush=True)
    last = done.stdout.strip().splitlines()[-1]
    return done.returncode == 0 and bool(re.search(r"\d+ passed", last)), f"{version}: {last}"


def main() -> int:
    words = sys.argv[1:]
    rows = [row for row in ROWS if not words or any(word in row.name for word in words)]
    if not rows:
        print(f"no row holds {' or '.join(words)}; there are {', '.join(r.name for r in ROWS)}")
        return 2
    results = {row.name: run(row) for row in rows}
    for name, (passed, line) in results.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name:18} {line}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
