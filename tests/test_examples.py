"""Every example runs; those that train do so with fewer steps, and as they stand among the slow."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FEWER_STEPS = {
    "lightning_module.py": {"range(4)": "range(2)"},
    "monai_segmenter_gate.py": {
        "WARM_UP, EPOCHS = 3, 6": "WARM_UP, EPOCHS = 1, 2",
        "range(4)": "range(2)",
    },
    "monai_pipeline.py": {
        "for epoch in range(12)": "for epoch in range(1)",
        "for i in range(3)": "for i in range(1)",
    },
    "new_organ.py": {'"steps": 300': '"steps": 8', '"steps": 250': '"steps": 8'},
}


def run(script: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "script", sorted({p.name for p in EXAMPLES.glob("*.py")} - set(FEWER_STEPS))
)
def test_example_runs(script, tmp_path):
    assert run(EXAMPLES / script, tmp_path)


@pytest.mark.parametrize("script", FEWER_STEPS)
def test_example_that_trains_runs_with_fewer_steps(script, tmp_path):
    text = (EXAMPLES / script).read_text()
    for steps, fewer in FEWER_STEPS[script].items():
        assert text.count(steps) == 1
        text = text.replace(steps, fewer)
    (tmp_path / script).write_text(text)
    assert run(tmp_path / script, tmp_path)


@pytest.mark.slow  # as above, with all their steps
@pytest.mark.parametrize("script", FEWER_STEPS)
def test_example_that_trains_runs_as_it_stands(script, tmp_path):
    assert run(EXAMPLES / script, tmp_path)


def test_whole_scan_keeps_what_it_does_not_change(tmp_path):
    """A scan of the user's, stored with a slope: same grid, same voxels but for the tumours."""
    nib = pytest.importorskip("nibabel")
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(0)
    hu = rng.normal(100, 12, (64, 56, 40)).round()
    affine = np.diag([-1.5, 1.5, 2.0, 1.0])
    scan = nib.Nifti1Image((hu + 1024).astype(np.uint16), affine)
    scan.header.set_slope_inter(1, -1024)
    nib.save(scan, tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.full(hu.shape, 3, np.uint8), affine), tmp_path / "b.nii.gz")

    run(EXAMPLES / "whole_scan.py", tmp_path, "a.nii.gz", "b.nii.gz", "3")

    before = nib.load(tmp_path / "a.nii.gz")
    after = nib.load(tmp_path / "whole_scan" / "new_ct.nii.gz")
    label = np.asarray(nib.load(tmp_path / "whole_scan" / "new_label.nii.gz").dataobj)
    assert np.array_equal(after.affine, affine)
    assert (label == 20).any() and set(np.unique(label)) == {3, 20}
    changed = after.get_fdata() != before.get_fdata()
    assert changed[label == 20].mean() > 0.8
    assert changed.mean() < 3 * (label == 20).mean()


@pytest.mark.slow
def test_gallery_command_makes_the_pages_pictures(tmp_path):
    page = (EXAMPLES.parent / "docs" / "gallery.md").read_text()
    named = set(re.findall(r"\(pictures/(\S+)\)", page)) - {"lidc0314_lower_preview.png"}  # --scan
    run(EXAMPLES / "pictures" / "make.py", tmp_path, "-o", ".")
    assert len(named) > 4 and named <= {path.name for path in tmp_path.glob("*.png")}


def test_gallery_command_knows_its_options(monkeypatch, capsys):
    make = EXAMPLES / "pictures" / "make.py"
    monkeypatch.setattr(sys, "argv", [str(make), "--help"])
    monkeypatch.syspath_prepend(make.parent)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(make), run_name="__main__")
    assert "--scan" in capsys.readouterr().out
