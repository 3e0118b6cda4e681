"""Label maps that a file's scale quantised: read as what they were, and written whole."""

from __future__ import annotations

import numpy as np
import pytest

from tumorsynth.label_values import round_labels
from tumorsynth.scans.collection import Task, process_scan
from tumorsynth.scans.nifti import new_volume, read_volume, write_volume
from tumorsynth.scans.pairing import Pair
from tumorsynth.synthesizer import SynthesizeTumor

nib = pytest.importorskip("nibabel")

AFFINE = np.diag([1.5, 1.25, 2.5, 1])


def quantised(path, labels, dtype):
    """Save a float map as nibabel does with the header of a CT: with a scale of its own choice."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(labels.astype(np.float64), AFFINE, header), path)
    return path


@pytest.mark.parametrize("dtype", ["int16", "uint8", "uint16", "int8"])
@pytest.mark.parametrize("largest", [1, 2, 7, 20, 117])
def test_a_quantised_label_is_read_as_it_was_and_written_whole(tmp_path, dtype, largest):
    labels = np.random.default_rng(largest).integers(0, largest + 1, (12, 11, 10))
    labels[0, 0, :2] = 0, largest
    volume = read_volume(quantised(tmp_path / "a.nii.gz", labels, dtype))
    assert volume.is_scaled
    np.testing.assert_array_equal(volume.integers(), labels)

    whole = volume.as_label()
    changed = np.zeros(labels.shape, bool)
    changed[3, 4, 5] = True
    write_volume(tmp_path / "b.nii.gz", whole, whole.with_changes(changed, [largest + 1]))
    back = nib.load(tmp_path / "b.nii.gz")
    expected = np.where(changed, largest + 1, labels)
    np.testing.assert_array_equal(np.asarray(back.dataobj), expected)
    np.testing.assert_array_equal(np.asarray(back.dataobj.get_unscaled()), expected)
    assert (back.dataobj.slope, back.dataobj.inter) == (1, 0)
    assert back.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(back.affine, AFFINE)


def test_a_map_that_its_dtype_cannot_hold_whole_gets_a_larger_one(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), AFFINE)
    image.header.set_slope_inter(5, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.as_label().stored.dtype == np.int16
    np.testing.assert_array_equal(volume.as_label().stored, volume.integers())
    volume.check_label_fits(300)


def test_a_float_map_of_almost_whole_numbers_is_written_whole(tmp_path):
    stored = np.array([0, 0.99998, 1.99997, 2.0], np.float32).reshape(2, 2, 1)
    volume = new_volume("a", stored, AFFINE)
    assert volume.integers().ravel().tolist() == [0, 1, 2, 2]
    assert volume.as_label().stored.dtype == np.float32
    assert volume.as_label().stored.ravel().tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("kind", ["quantised", "almost whole", "whole"])
def test_a_scan_s_label_is_rounded_once(tmp_path, monkeypatch, kind):
    rounded = []
    monkeypatch.setattr(
        "tumorsynth.scans.volume.round_labels", lambda *a: rounded.append(1) or round_labels(*a)
    )
    labels = np.ones((40, 40, 40))
    if kind == "quantised":
        quantised(tmp_path / "label.nii.gz", labels, "int16")
    else:
        labels = (labels * (0.99998 if kind == "almost whole" else 1)).astype(np.float32)
        nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "label.nii.gz")
    hu = np.random.default_rng(0).normal(100, 8, (40, 40, 40)).astype(np.float32)
    nib.save(nib.Nifti1Image(hu, AFFINE), tmp_path / "ct.nii.gz")
    synth = SynthesizeTumor("hu2023", tumor_label=2, count=1, size_mm=12)
    pair = Pair("a", tmp_path / "ct.nii.gz", tmp_path / "label.nii.gz")
    (record,) = process_scan(synth, Task(pair, 0, organ_required=True), tmp_path)
    made = np.asarray(nib.load(tmp_path / "a_label.nii.gz").dataobj)
    assert record["applied"] and (made == 2).sum() == record["label_voxels"] > 0
    assert len(rounded) == 1


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_whole_maps_are_left_as_they_are(dtype):
    volume = new_volume("a", np.arange(8, dtype=dtype).reshape(2, 2, 2), AFFINE)
    assert volume.as_label() is volume


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
@pytest.mark.parametrize("kind", ["probabilities", "interpolated"])
def test_probabilities_and_interpolated_labels_are_refused(tmp_path, dtype, kind):
    ramp = np.linspace(0, 1, 40)
    values = np.tile(ramp if kind == "probabilities" else 3 * ramp, (4, 4, 1))
    volume = read_volume(quantised(tmp_path / "p.nii.gz", values, dtype))
    with pytest.raises(ValueError, match=r"whole numbers, but p.nii.gz holds \d*\.\d+; give a"):
        volume.integers()
    with pytest.raises(ValueError, match="whole numbers"):
        volume.as_label()


def test_a_scale_of_one_or_more_hides_labels_and_is_refused(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), AFFINE)
    image.header.set_slope_inter(1.5, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="a.nii.gz holds 1.5"):
        read_volume(tmp_path / "a.nii.gz").integers()
