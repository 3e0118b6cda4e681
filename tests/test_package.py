"""The package as a user meets it: names, imports, README, metadata, wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tumorsynth as ts

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [name for name in ts.__all__ if name != "__version__"]
EXTRAS = [
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "monai",
    "nibabel",
    "nnunetv2",
    "omegaconf",
    "ray",
    "rich",
    "scipy",
    "starlette",
    "torchio",
    "tqdm",
    "typer",
    "uvicorn",
]

BLOCK_EXTRAS = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test", name=name)
sys.meta_path.insert(0, Refuse())
"""

TOUCH_ALL = "import tumorsynth as ts\nfor name in ts.__all__: getattr(ts, name)\n"


def run(code: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a fresh interpreter; fails with its error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name):
    value = getattr(ts, name)
    assert value.__name__ == name
    assert value.__module__.startswith("tumorsynth.")
    assert name in dir(ts)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SynthesiseTumour'"):
        _ = ts.SynthesiseTumour
    with pytest.raises(ImportError):
        exec("from tumorsynth import SynthesiseTumour")


def test_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert declared and cited
    assert ts.__version__ == declared[1] == cited[1]


def test_the_lowest_versions_are_the_tested_ones():
    text = (ROOT / "pyproject.toml").read_text()
    part = text[text.index("\ndependencies = ") : text.index("\ndocs = ")]
    allowed = set(re.findall(r'"([\w-]+)>=([\d.]+)"', part))
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()
    tested = {tuple(line.split("==")) for line in lines if "==" in line}

    def whole(pins):
        return {(name, *(*map(int, version.split(".")), 0)[:3]) for name, version in pins}

    untested = {("mirp", "2.3"), ("ray", "2.60")}  # not in `all`
    assert len(tested) > 10 and whole(allowed - untested) == whole(tested)


def test_import_alone_loads_nothing_heavy():
    loaded = run("import sys, tumorsynth; print(*sys.modules)").split()
    assert "tumorsynth" in loaded
    heavy = {"torch", "numpy", "einops", "safetensors", *EXTRAS}
    assert not heavy.intersection(loaded)
    assert not [m for m in loaded if m.startswith("tumorsynth.")]


def test_core_works_without_extras_and_without_training():
    loaded = run(BLOCK_EXTRAS + TOUCH_ALL + "print(*sys.modules)").split()
    assert "tumorsynth.synthesizer" in loaded
    assert not [m for m in loaded if m.startswith("tumorsynth.training")]


def test_core_import_is_quick_beyond_its_dependencies():
    seconds = run(
        "import time, torch, numpy, einops, safetensors.torch\n"
        "start = time.process_time()\n" + TOUCH_ALL + "print(time.process_time() - start)"
    )
    assert float(seconds) < 1.0


def test_readme_example_runs_on_the_core_alone(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    printed = run(BLOCK_EXTRAS + blocks[0], cwd=tmp_path)
    assert "diameter_mm" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("framework", ["monai", "torchio"])
def test_readme_line_for_a_framework_runs(framework):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = (block for block in blocks if f"tumorsynth.{framework}" in block)
    run(block)


def test_wheel_holds_the_package_and_the_weights(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = ROOT / "weights"
    files = [p.relative_to(weights).as_posix() for p in weights.rglob("*") if p.is_file()]
    assert {f"tumorsynth/_weights/{name}" for name in files} <= names
    assert {"tumorsynth/__init__.py", "tumorsynth/py.typed"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"tumorsynth", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
