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
    "SimpleITK",
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


def test_import_alone_loads_nothing_heavy_and_the_names_load_quickly_beyond_their_dependencies():
    loaded, seconds = run(
        "import sys, tumorsynth; print(*sys.modules)\n"
        "import time, torch, numpy, einops, safetensors.torch\n"
        "start = time.process_time()\n" + TOUCH_ALL + "print(time.process_time() - start)"
    ).splitlines()
    loaded = loaded.split()
    assert "tumorsynth" in loaded
    heavy = {"torch", "numpy", "einops", "safetensors", *EXTRAS}
    assert not heavy.intersection(loaded)
    assert not [m for m in loaded if m.startswith("tumorsynth.")]
    assert float(seconds) < 1.0


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_core_and_readme_example_work_without_extras_and_without_training(tmp_path):
    code = BLOCK_EXTRAS + readme_blocks()[0] + TOUCH_ALL + "print(*sys.modules)"
    *printed, loaded = run(code, cwd=tmp_path).splitlines()
    assert "diameter_mm" in "".join(printed)
    assert not list(tmp_path.iterdir())
    assert "tumorsynth.synthesizer" in loaded.split()
    assert not [m for m in loaded.split() if m.startswith("tumorsynth.training")]


def test_readme_lines_for_frameworks_run(tmp_path, monkeypatch):
    for framework in ("monai", "torchio", "lightning"):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    _, block = readme_blocks()  # the first runs above
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


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
