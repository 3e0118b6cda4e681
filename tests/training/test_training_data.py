"""Training data: reading, packing, tumours, crops, and everything that is refused beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from balls import make_cases, write_dataset
from scipy import ndimage

import tumorsynth as ts
from tumorsynth.training import autoencoder, denoiser
from tumorsynth.training.config import (
    PRESETS,
    AutoencoderTraining,
    DataConfig,
    DenoiserTraining,
    configured,
)
from tumorsynth.training.crop_pool import TumorCrops
from tumorsynth.training.data import (
    Case,
    check_cases,
    connected_components,
    find_tumors,
    hu_problem,
    load_pack,
    random_patch,
    save_pack,
    split_held_out,
)

nib = pytest.importorskip("nibabel")
reading = pytest.importorskip("tumorsynth.training.reading")


@pytest.fixture(scope="module")
def cases():
    return make_cases()


def case(name, array, label=None):
    return Case(
        name,
        torch.as_tensor(array, dtype=torch.int16),
        None if label is None else torch.as_tensor(label, dtype=torch.uint8),
    )


# -- reading --------------------------------------------------------------------------------------


def test_dataset_json_pack_and_folders_give_the_same_cases(cases, tmp_path):
    dataset = write_dataset(tmp_path / "data", cases)
    read = reading.load_data(dataset)
    save_pack(read, tmp_path / "pack.npz")
    packed = load_pack(tmp_path / "pack.npz")
    assert [c.name for c in packed] == ["annotated", "plain"]
    assert packed[1].label is None
    for original, a, b in zip(cases, read, packed, strict=True):
        # the file is LPS: on the generator's grid x and y run the other way
        assert torch.equal(a.hu, original.hu.flip(0, 1)) and torch.equal(a.hu, b.hu)
    assert torch.equal(packed[0].label, cases[0].label.flip(0, 1))

    (tmp_path / "data" / "images" / "plain.nii.gz").unlink()
    folders = reading.load_data(tmp_path / "data" / "images", tmp_path / "data" / "labels")
    assert [c.name for c in folders] == ["annotated"]
    assert torch.equal(folders[0].label, packed[0].label)
    alone = reading.load_data(tmp_path / "data" / "images")
    assert alone[0].label is None and torch.equal(alone[0].hu, packed[0].hu)


def test_validation_cases_are_held_out_also_in_packs(cases, tmp_path):
    dataset = write_dataset(tmp_path / "data", cases)
    first, second = json.loads(dataset.read_text())["training"]
    dataset.write_text(json.dumps({"training": [second], "validation": [first], "test": ["x"]}))
    save_pack(reading.load_data(dataset), tmp_path / "pack.npz")
    packed = load_pack(tmp_path / "pack.npz")
    assert [(c.name, c.held_out) for c in packed] == [("plain", False), ("annotated", True)]
    assert packed[1].label is not None
    training, held_out = split_held_out(packed)
    assert training == packed[:1] and held_out == packed[1:]
    with pytest.raises(ValueError, match="all 1 are; list some under .training."):
        split_held_out(held_out)

    arrays = dict(np.load(tmp_path / "pack.npz"))
    del arrays["held_out"]  # as packs were
    np.savez(tmp_path / "old.npz", **arrays)
    assert [c.held_out for c in load_pack(tmp_path / "old.npz")] == [False, False]

    dataset.write_text(json.dumps({"training": [], "validation": [first]}))
    with pytest.raises(ValueError, match="lists no cases under training"):
        reading.load_data(dataset)
    both = {"training": [first], "validation": [first, {"image": "missing.nii.gz"}]}
    dataset.write_text(json.dumps(both))
    with pytest.raises(
        ValueError, match='(?s)2 problems.*missing: no such.*annotated: listed under both "tr'
    ):
        reading.load_data(dataset)


def test_scans_of_one_name_are_told_apart_by_their_folders(cases, tmp_path):
    names = ["a/s1/ct", "a/s2/ct", "b/s2/ct", "other"]
    many = [Case(name, (cases[0].hu + k).contiguous(), None) for k, name in enumerate(names)]
    for name in names:
        (tmp_path / "data" / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    dataset = write_dataset(tmp_path / "data", many)
    entries = json.loads(dataset.read_text())["training"]
    dataset.write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    read = reading.load_data(dataset)
    assert [c.name for c in read] == ["s1/ct", "a/s2/ct", "b/s2/ct", "other"]
    assert [c.held_out for c in read] == [False, False, True, True]
    for case, original in zip(read, many, strict=True):
        assert torch.equal(case.hu, original.hu.flip(0, 1))
    dataset.write_text(json.dumps({"training": [entries[0], entries[0]]}))
    with pytest.raises(ValueError, match="ct: listed twice"):
        reading.load_data(dataset)


def test_voxels_that_training_sees_cannot_be_held_out(cases, tmp_path):
    copied = Case("copied", cases[0].hu.clone(), None, held_out=True)
    dataset = write_dataset(tmp_path / "data", [cases[0], copied])
    one, other = json.loads(dataset.read_text())["training"]
    dataset.write_text(json.dumps({"training": [one], "validation": [other]}))
    with pytest.raises(ValueError, match="copied: held out, but the same voxels as annotated"):
        reading.load_data(dataset)
    said = "copied: held out, but the same voxels as annotated"  # of packs
    assert [words[: len(said)] for words in check_cases([cases[0], copied], 32)] == [said]
    copied.hu[0, 0, 0] += 1
    assert check_cases([cases[0], copied], 32) == []


def test_data_that_goes_with_no_labels_or_is_one_scan(cases, tmp_path):
    dataset = write_dataset(tmp_path / "data", cases)
    images, labels = tmp_path / "data" / "images", tmp_path / "data" / "labels"
    for data, given, said in (
        (dataset, labels, "--labels goes with a folder of CTs"),
        (tmp_path / "pack.npz", labels, "--labels goes with a folder of CTs"),
        (images / "plain.nii.gz", None, "is one scan; pass its folder"),
        (images, images, "NAME_label.nii.gz beside NAME_ct.nii.gz"),
    ):
        with pytest.raises(ValueError, match=said):
            reading.load_data(data, given)
    with pytest.raises(FileNotFoundError, match="^no such file: .*pack.npz$"):
        reading.load_data(tmp_path / "pack.npz")
    for folder, ending in ((images, "ct"), (labels, "label")):
        (folder / "annotated.nii.gz").rename(images / f"a_{ending}.nii.gz")
    (images / "plain.nii.gz").unlink()
    for given in (images, None, tmp_path / "data" / ".." / "data" / "images"):
        (read,) = reading.load_data(images, given)  # the label map is no second CT
        assert read.name == "a" and read.label is not None


def test_a_scan_in_metres_is_named(cases, tmp_path):
    affine = np.diag([0.001, 0.001, 0.001, 1.0])
    nib.save(nib.Nifti1Image(cases[0].hu.numpy(), affine), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="a: a.nii.gz .* 0.001x0.001x0.001 mm; if its .* metres"):
        reading.load_data(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_read_the_same_in_the_same_order(cases, tmp_path, workers):
    many = [
        Case(f"case{k}", (case.hu + k).contiguous(), case.label)
        for k, case in enumerate([*cases, *cases, *cases])
    ]
    sources = reading.find_sources(write_dataset(tmp_path / "data", many))
    read = reading.read_cases(sources, workers)
    assert [c.name for c in read] == [f"case{k}" for k in range(6)]
    for case, original in zip(read, many, strict=True):
        assert torch.equal(case.hu, original.hu.flip(0, 1))


def test_reading_brings_a_scan_to_1_mm_and_crops_it_to_the_body(tmp_path):
    array = np.full((20, 30, 10), -1000, np.int16)
    array[4:16, 5:25, 2:8] = 400
    array[6:14, 8:20, 3:7] = 100
    label = (array > 0).astype(np.uint8)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "label.nii.gz")
    source = reading.Source("ct", tmp_path / "ct.nii.gz", tmp_path / "label.nii.gz")
    read = reading.read_case(source)
    # cropped to the body: 12 x 20 x 6 voxels of 2, 2 and 3 mm
    assert all(abs(n - m) <= 3 for n, m in zip(read.hu.shape, (24, 40, 18), strict=True))
    assert read.hu.max() == 400 and read.label is not None and read.label.shape == read.hu.shape
    assert read.label.float().mean() > 0.75


def test_a_pack_is_written_whole_or_not_at_all(cases, tmp_path):
    (tmp_path / "pack.npz").write_bytes(b"the one before")
    bad = Case("bad", cases[0].hu, object())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        save_pack([bad], tmp_path / "pack.npz")
    assert (tmp_path / "pack.npz").read_bytes() == b"the one before"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="is not a pack.*train pack"):
        load_pack(tmp_path / "pack.npz")


# -- tumours --------------------------------------------------------------------------------------


def test_components_are_those_of_scipy():
    mask = np.random.default_rng(0).random((20, 17, 13)) < 0.07
    labelled, count = ndimage.label(mask, np.ones((3, 3, 3)))
    wanted = sorted(
        (tuple(s.start for s in box), tuple(s.stop for s in box), int((labelled == i + 1).sum()))
        for i, box in enumerate(ndimage.find_objects(labelled))
    )
    found = sorted(
        (low, high, round(np.pi / 6 * d**3))
        for low, high, d in connected_components(torch.from_numpy(mask))
    )
    assert count > 20 and found == wanted
    assert connected_components(torch.zeros(3, 3, 3, dtype=torch.bool)) == []


def test_tumours_are_found_and_filtered_by_size(cases):
    tumors = find_tumors(cases, 2)
    assert sorted(t.low for t in tumors) == [(10, 10, 10), (30, 26, 26)]
    assert sorted(round(t.diameter_mm) for t in tumors) == [10, 12]
    assert [t.low for t in find_tumors(cases, 2, max_diameter_mm=11)] == [(30, 26, 26)]
    assert [t.low for t in find_tumors(cases, 2, min_diameter_mm=11)] == [(10, 10, 10)]
    with pytest.raises(ValueError, match=r"annotated: tumours of .* none from 20 to inf mm"):
        find_tumors(cases, 2, min_diameter_mm=20)


def test_patch_of_a_case_smaller_than_the_patch(cases):
    small = Case("small", cases[0].hu[:10, :40], None)
    assert random_patch(small, 32, np.random.default_rng(0), (-50, 240)).shape == (32, 32, 32)


def test_every_place_draws_from_a_window_that_moves_on():
    config = DenoiserTraining(batch_size=4, pool=24, reuse=3)
    crops = TumorCrops([], [], 2, config, (-175.0, 250.0))
    for place in range(4):
        windows = [crops.window(step, place) for step in range(200)]
        assert windows[0] == (0, 1)
        for (low, high), (low2, high2) in zip(windows, windows[1:], strict=False):
            assert low <= low2 <= low + 1 and high <= high2 <= high + 1
        assert all(high - low == 6 for low, high in windows[12:])
        assert windows[-1][1] == 6 + (199 - 10 + place % 3) // 3
        assert len({crops.key(step, place) for step in range(200)}) > 40


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hu: (hu + 175) / 425, "lie in .0, 1., so the CT is scaled; give the CT in HU"),
        (lambda hu: hu + 1024, r"HU \+ 1024 .*; subtract 1024"),
        (lambda hu: -hu, "their sign changed, .*; multiply them by -1"),
        (lambda hu: (-hu).clip(-1024, 600), "their sign changed, .*; multiply them by -1"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "look like z-scores .*; give the CT in HU"),
        (lambda hu: (hu - hu.min()) / 150, "look like z-scores or scaled otherwise"),
        (lambda hu: hu / 10, "HU divided by 10, .*; multiply them by 10"),
        (lambda hu: hu / 100, "HU divided by 100, .*; multiply them by 100"),
        (
            lambda hu: (hu + 1000) / 1250 * 255,
            "hold no air and no fat, so are not HU",
        ),
        (
            lambda hu: ((hu + 1000) / 1250 * 255).round(),
            "numbers from 0 to 2.. are a label map, not HU",
        ),
        (lambda hu: hu * 0 + 60, "every voxel is 60"),
        (lambda hu: hu * np.nan, "NaN"),
        (
            lambda hu: hu.clip(-1000, -900) * 2 + 1000,
            "less than 1 % of .* between -175 and 250",
        ),
    ],
)
def test_values_that_are_no_hu(change, said):
    hu = np.full((20, 20, 20), -1000.0)
    hu[3:17, 3:17] = np.random.default_rng(0).normal(60, 60, (14, 14, 20)).clip(-175, 250)
    assert hu_problem(torch.from_numpy(hu)) is None
    wrong = change(hu) if "lie in" not in said else change(hu.clip(-175, 250))
    import re

    assert re.search(said, hu_problem(torch.from_numpy(wrong)))


def test_scans_that_were_cut_off_or_hold_little_air_are_hu():
    ct = ts.make_phantom(spacing=(3.0, 3.0, 3.0), shape=(100, 80, 50), seed=0)
    scan = ct.image[0]
    body = scan[20:80, 20:60]
    for hu in (scan, body):
        for low, high in ((-1024, 600), (-200, 300), (-175, 250), (-1000, 1000)):
            assert hu_problem(hu.clip(low, high)) is None
        assert "sign changed" in (hu_problem(-hu) or "")
        assert "sign changed" in (hu_problem((-hu).clip(-1024, 600)) or "")


def test_all_problems_of_all_files_are_said_at_once(cases, tmp_path):
    folder = tmp_path / "data"
    dataset = write_dataset(folder, cases)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    hu, label = cases[0].hu.numpy(), cases[0].label.numpy()

    def add(name, image, mask=None, where=affine):
        nib.save(nib.Nifti1Image(image, affine), folder / f"{name}.nii.gz")
        entry = {"image": f"{name}.nii.gz"}
        if mask is not None:
            nib.save(nib.Nifti1Image(mask, where), folder / f"{name}_seg.nii.gz")
            entry["label"] = f"{name}_seg.nii.gz"
        return entry

    (folder / "broken.nii.gz").write_bytes(b"no NIfTI")
    moved = affine.copy()
    moved[0, 3] = 30
    entries = [
        *json.loads(dataset.read_text())["training"],
        add("scaled", ((hu + 175) / 425).astype(np.float32)),
        add("offset", hu + 1024),
        add("shape", hu, label[:-2]),
        add("moved", hu, label, moved),
        add("halves", hu, label * 0.5),
        add("organs", (label - 1) * 3),
        add("four", np.stack([hu, hu], -1)),
        {"image": "broken.nii.gz"},
        {"image": "missing.nii.gz"},
    ]
    dataset.write_text(json.dumps({"training": entries}))
    with pytest.raises(ValueError) as caught:
        reading.load_data(dataset)
    said = str(caught.value)
    assert said.startswith("9 problems")
    for name, words in (
        ("scaled", "so the CT is scaled; give the CT in HU"),
        ("offset", "subtract 1024"),
        ("shape", r"its image's shape (48, 48, 48), got (46, 48, 48)"),
        ("moved", "elsewhere in space"),
        ("halves", "must hold whole numbers, but halves_seg.nii.gz holds 0.5"),
        ("organs", "whole numbers from 0 to 3 are a label map, not HU"),
        ("four", "one 3-D image, got shape 48x48x48x2"),
        ("broken", "broken.nii.gz is not a NIfTI file"),
        ("missing", "no such file"),
    ):
        (line,) = [
            line
            for line in said.replace("data: ", "data:\n").split("\n")
            if line.startswith(f"{name}: ")
        ]
        assert words in line


def test_all_problems_of_the_cases_are_said_at_once(cases, tmp_path):
    bad = [
        case("thin", cases[0].hu[:, :, :20], cases[0].label[:, :, :20] * 0 + 5),
        case("misfit", cases[0].hu, cases[0].label[:-1] * 0),
        case("ones", cases[0].hu * 0 + 1),
    ]
    assert check_cases(cases, 48) == []
    autoencoder.train(
        cases,
        tmp_path / "ae",
        AutoencoderTraining(network="tiny", steps=1, patch_size=16, batch_size=1, picture_every=0),
    )
    config = DenoiserTraining(network="tiny", patch_size=32, steps=1)
    with pytest.raises(ValueError) as caught:
        denoiser.train(bad, str(tmp_path / "ae"), tmp_path / "gen", config)
    said = str(caught.value)
    assert "thin: 48 x 48 x 20 mm is smaller than the patch of 32 mm; lower --patch-size" in said
    assert "misfit: a label must have its image's shape (48, 48, 48), got (47, 48, 48)" in said
    assert "ones: every voxel is 1; give the CT in HU" in said
    assert "thin: no voxels of tumour label 2, but of 5" in said
    assert "misfit: no voxels of tumour label 2, but of none" in said
    assert "ones: no label" in said
    assert not (tmp_path / "gen").exists()


def test_a_dataset_as_windows_writes_it(cases, tmp_path):
    dataset = write_dataset(tmp_path, cases)
    text = json.dumps(json.loads(dataset.read_text()), indent=1).replace("\n", "\r\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        dataset.write_bytes(text.encode(encoding))
        assert len(reading.find_sources(dataset)) == 2


def test_a_dataset_that_is_none(tmp_path):
    for text in (
        *("{", "[]", "[" * 100_000, "{}", '{"training": {}}', '{"training": {"a": 1}}'),
        *('{"training": [{"label": "a"}]}', '{"training": [3]}', '{"training": [{"image": 5}]}'),
        '{"training": [{"image": "a", "label": ["b"]}]}',
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError) as caught:
            reading.load_data(tmp_path / "dataset.json")
        said = str(caught.value)
        assert "dataset.json" in said and "Error" not in said
        assert 'write {"training": [{"image": ' in said or "lists no cases" in said
    (tmp_path / "dataset.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="lists no cases"):
        reading.load_data(tmp_path / "dataset.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        reading.load_data(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .nii"):
        reading.load_data(tmp_path / "empty")


# -- configuration --------------------------------------------------------------------------------


def test_presets_are_valid_and_flags_win_over_them():
    kinds = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}
    for stage, presets in PRESETS.items():
        for preset in presets.values():
            config = configured(kinds[stage], preset, {"steps": 7, "lr": None})
            assert config.steps == 7 and config.lr == preset.get("lr", kinds[stage]().lr)
    for wrong, said in (
        ({"precision": "half"}, "--precision must be auto or bf16-mixed or 32-true"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"lr": float("nan")}, "--lr must be a number, got nan"),
        ({"lr": float("inf")}, "--lr must be a number, got inf"),
        ({"lr": -1.0}, "--lr must not be negative, got -1"),
        ({"transplant": 5.0}, "--transplant must be from 0 to 1, got 5"),
        ({"brighter": 2.0}, "--brighter must be from 0 to 1, got 2"),
        ({"structure": 1.5}, "--structure must be from 0 to 1, got 1.5"),
        ({"ema": 1.0}, "--ema must be below 1"),
        ({"timesteps": 0}, "--timesteps must be at least 1, got 0"),
        ({"batch_size": 3, "accumulate": 2}, "multiple of --accumulate"),
        ({"prediction": "y"}, "--prediction must be noise or x0 or v"),
    ):
        with pytest.raises(ValueError, match=said):
            configured(DenoiserTraining, {}, wrong)
    with pytest.raises(ValueError, match="--min-diameter-mm"):
        configured(DataConfig, {}, {"min_diameter_mm": -1})
    with pytest.raises(ValueError, match="--tumor-label must be from 1 to 255, .* got 0"):
        configured(DataConfig, {}, {"tumor_label": 0})
    with pytest.raises(ValueError, match="--hollow must be from 0 to 1, got 1.5"):
        configured(AutoencoderTraining, {}, {"hollow": 1.5})
