"""A voxel size that is unknown, or said twice: through the core and every framework's transform."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from ways import SETTINGS, TWO_MM, WAYS, diameter, scan, warnings_of

import tumorsynth as ts


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request):
    return request.param


# -- nobody knows the size -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "meta"])
def test_an_unknown_size_gives_one_warning_for_each_transform(way, kind):
    image, label = scan(kind)

    def work():
        for transform in (way(), way()):
            for _ in range(3):
                transform(image, label)

    said = warnings_of(work)
    assert len(said) == 2  # one for each of the two transforms
    assert all(
        "pass spacing=(dx, dy, dz), spacing=(1, 1, 1) where they are 1 mm" in one for one in said
    )
    assert all(("have no affine" in one) or ("is the identity" in one) for one in said)


@pytest.mark.parametrize("kind", ["plain", "meta"])
@pytest.mark.parametrize("spacing", [1, (1, 1, 1), (2.0, 2.0, 2.0)])
def test_a_spacing_that_was_given_is_known_and_taken(way, kind, spacing):
    made = []
    assert not warnings_of(lambda: made.append(way(spacing=spacing)(*scan(kind))))
    voxel = float(np.broadcast_to(spacing, 3).prod())
    assert diameter(made[0], voxel) == pytest.approx(12, rel=0.06)


def test_an_affine_that_is_no_identity_is_known_and_taken(way):
    made = []
    assert not warnings_of(lambda: made.append(way()(*scan("meta", TWO_MM))))
    assert diameter(made[0], 8) == pytest.approx(12, rel=0.06)


def test_a_crop_of_lost_affines_keeps_the_linear_part_alone(way):
    moved = np.eye(4)
    moved[:3, 3] = (-30, 12, 400)
    assert len(warnings_of(lambda: way()(*scan("meta", moved)))) == 1


@pytest.mark.parametrize(
    "linear", [[[-1, 0, 0], [0, -1, 0], [0, 0, 1]], [[0, 0, 1], [0, -1, 0], [1, 0, 0]]]
)
def test_1_mm_along_other_axes_at_the_origin_is_unknown_too(way, linear):
    """As ITK writes for arrays."""
    affine = np.eye(4)
    affine[:3, :3] = linear
    said = warnings_of(lambda: way()(*scan("meta", affine)))
    assert len(said) == 1 and "stems from one of 1 mm and no position" in said[0]
    made = []
    assert not warnings_of(lambda: made.append(way(spacing=(2, 2, 2.0))(*scan("meta", affine))))
    assert diameter(made[0], 8) == pytest.approx(12, rel=0.06)


def test_1_mm_at_a_place_of_its_own_is_known(way):
    affine = np.diag([-1.0, -1, 1, 1])
    affine[:3, 3] = (123.4, -56.7, -890)
    assert not warnings_of(lambda: way()(*scan("meta", affine)))


def test_one_sample_of_unknown_size_in_a_batch_is_enough():
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    (a, b), (c, d) = scan("meta", TWO_MM), scan("meta")
    batch = data.list_data_collate([{"image": a, "label": b}, {"image": c, "label": d}])
    synth = ts.SynthesizeTumor(**SETTINGS)
    assert len(warnings_of(lambda: synth(batch["image"], batch["label"], seed=0))) == 1


def test_the_callers_own_identity_is_a_known_size():
    synth = ts.SynthesizeTumor(**SETTINGS)
    assert not warnings_of(lambda: synth(*scan(), affine=np.eye(4), seed=0))


def test_a_label_with_an_affine_gives_the_core_the_size_of_its_image():
    _, label = scan("meta", TWO_MM)
    synth, made = ts.SynthesizeTumor(**SETTINGS), []
    assert not warnings_of(lambda: made.append(synth(scan()[0], label, seed=0)[1]))
    assert diameter(made[0], 8) == pytest.approx(12, rel=0.06)


def test_nothing_is_said_where_no_tumour_is_wanted():
    synth = ts.SynthesizeTumor(p=0, **SETTINGS)
    assert not warnings_of(lambda: synth(*scan(), seed=0))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_remember_the_warning(way, again):
    image, label = scan()
    first = way()
    assert len(warnings_of(lambda: again(first)(image, label))) == 1
    assert len(warnings_of(lambda: first(image, label))) == 1
    assert not warnings_of(lambda: again(first)(image, label))


class Samples(torch.utils.data.Dataset):
    """Counts the warnings of each call in a worker."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return len(warnings_of(lambda: self.transform(*scan())))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_several_epochs_warn_once_together(way, workers):
    """Forked workers start anew in each epoch, and share the warning."""
    if workers and "fork" not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = "fork" if workers else None
    loader = torch.utils.data.DataLoader(
        Samples(way()), batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    # two workers may reach it in the same microsecond
    assert 1 <= sum(sum(loader) for _ in range(2)) <= max(workers, 1)


# -- two sources of a size -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "affine"),
    [
        ((1, 1, 1), TWO_MM),
        (1.0, TWO_MM),
        ((0.8, 0.8, 2.5), np.diag([0.8, 0.8, 5.0, 1.0])),
        ((2.5, 0.8, 0.8), np.diag([0.8, 0.8, 2.5, 1.0])),  # the axes in another order
        ((2, 2, 2.1), TWO_MM),
    ],
)
def test_a_spacing_against_an_affine_is_refused_with_both(way, spacing, affine):
    image, label = scan("meta", affine)
    with pytest.raises(ValueError, match="spacing must agree with the affine of 'im") as caught:
        way(spacing=spacing)(image, label)
    words = str(caught.value)
    for sizes in (np.broadcast_to(spacing, 3), np.linalg.norm(affine[:3, :3], axis=0)):
        assert " x ".join(f"{v:.4g}" for v in sizes) in words
    assert "leave spacing out" in words and "override_affine=True" in words


def test_the_way_out_of_a_contradiction_works(way):
    image, label = scan("meta", TWO_MM)
    told = way(spacing=(1, 1, 1.0), override_affine=True)(image, label)
    assert diameter(told, 1) == pytest.approx(12, rel=0.06)
    assert diameter(way()(image, label), 8) == pytest.approx(12, rel=0.06)


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-6, 1.004])
def test_rounding_is_no_contradiction(way, factor):
    image, label = scan("meta", TWO_MM * factor)
    assert diameter(way(spacing=(2, 2, 2.0))(image, label), 8) == pytest.approx(12, rel=0.06)


def test_a_label_contradicts_too(way):
    """The image's affine was lost, the label's was not."""
    image, label = scan("meta", np.eye(4), TWO_MM)
    with pytest.raises(ValueError, match="spacing must agree with the affine of 'label'"):
        way(spacing=(1, 1, 1.0))(image, label)


def test_a_spacing_wins_over_an_affine_that_was_lost(way):
    """Of the two, the label's affine was lost."""
    image, label = scan("meta", TWO_MM, np.eye(4))
    assert diameter(way(spacing=(2, 2, 2.0))(image, label), 8) == pytest.approx(12, rel=0.06)


def test_an_affine_of_the_caller_contradicts_like_a_spacing():
    image, label = scan("meta", TWO_MM)
    synth = ts.SynthesizeTumor(**SETTINGS)
    flipped = TWO_MM @ np.diag([-1, 1, 1, 1])
    for affine, says in ((np.eye(4), "voxels of 1 x 1 x 1 mm .* 2 x 2 x 2 mm"), (flipped, "axes")):
        with pytest.raises(ValueError, match=f"affine must agree with .* {says}"):
            synth(image, label, affine=affine, seed=0)
        synth(image, label, affine=affine, override_affine=True, seed=0)
    moved = TWO_MM.copy()
    moved[:3, 3] = 70  # of the scan that a crop was cut from
    synth(image, label, affine=moved, seed=0)


def test_overriding_needs_something_that_overrides():
    with pytest.raises(ValueError, match="override_affine=True must come with .* pass one of them"):
        ts.SynthesizeTumor(**SETTINGS)(*scan(), override_affine=True)


def test_each_sample_of_a_batch_is_compared():
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    parts = [scan("meta", TWO_MM), scan("meta", np.diag([3.0, 3, 3, 1]))]
    batch = data.list_data_collate([{"image": a, "label": b} for a, b in parts])
    synth = ts.SynthesizeTumor(**SETTINGS)
    synth(batch["image"], batch["label"], spacing=[[2, 2, 2], [3, 3, 3]], seed=0)
    with pytest.raises(ValueError, match="2 x 2 x 2 mm and that affine of 3 x 3 x 3 mm"):
        synth(batch["image"], batch["label"], spacing=2.0, seed=0)


# -- two grids -------------------------------------------------------------------------------------


def moved(affine, by=(0.0, 0, 0), scale=1.0):
    out = np.array(affine)
    out[:3, :3] *= scale
    out[:3, 3] += by
    return out


@pytest.mark.parametrize(
    "other",
    [
        moved(TWO_MM, (0.01, 0.01, 0.01)),
        moved(TWO_MM, (0.15, 0, 0)),
        moved(TWO_MM, scale=1.002),  # 0.08 voxels over 40
        TWO_MM.astype(np.float32) * np.float32(1 + 1e-6),
    ],
)
def test_a_share_of_a_voxel_is_no_other_grid(way, other):
    assert (way()(*scan("meta", TWO_MM, other)) == 2).any()


@pytest.mark.parametrize(
    "other",
    [
        moved(TWO_MM, (0.3, 0, 0)),
        moved(TWO_MM, scale=1.004),  # 0.16 voxels over 40
        TWO_MM @ np.diag([-1, 1, 1, 1]),
        np.eye(4),
    ],
)
def test_more_than_a_share_of_a_voxel_is_refused(way, other):
    with pytest.raises(ValueError, match="'im.*' and 'label' must share one grid.*voxels apart; "):
        way()(*scan("meta", TWO_MM, other))


def test_two_grids_under_one_spacing_are_refused_unless_overridden(way):
    image, label = scan("meta", TWO_MM, TWO_MM @ np.diag([-1, 1, 1, 1]))
    with pytest.raises(ValueError, match="must share one grid.*override_affine=True"):
        way(spacing=(2, 2, 2.0))(image, label)
    assert (way(spacing=(2, 2, 2.0), override_affine=True)(image, label) == 2).any()


# -- files -----------------------------------------------------------------------------------------


def write(folder, affine):
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    image, label = scan()
    paths = folder / "ct.nii.gz", folder / "label.nii.gz"
    for path, x in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(x[0].numpy().astype(np.int16), affine), path)
    return dict(zip(("image", "label"), map(str, paths), strict=True))


ONE_MM = np.diag([-1.0, -1, 1, 1])  # of a scan
ONE_MM[:3, 3] = (91.4, -12.7, -340.5)
MNI = np.eye(4)
MNI[:3, 3] = (-98, -134, -72)
FILES = [  # the file's affine, whether MONAI and TorchIO resample to 1 mm, whether that is known
    (TWO_MM, True, True),
    (ONE_MM, True, True),
    (ONE_MM, False, True),
    (MNI, True, True),
    (MNI, False, True),
    (np.eye(4), True, False),  # what a tool writes that knows no affine
    (np.eye(4), False, False),
    (np.diag([-1.0, -1, 1, 1]), True, False),  # ITK, of an array
    (np.diag([-1.0, -1, 1, 1]), False, False),
    (None, True, False),  # nibabel, without one
    (None, False, False),
]


@pytest.mark.parametrize(("affine", "resample", "known"), FILES)
@pytest.mark.parametrize("batch", [False, True])
def test_monai_files_that_were_resampled_to_1_mm_are_known(
    tmp_path, affine, resample, known, batch
):
    """Resampling leaves the identity, which alone would mean that an affine was lost."""
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    data = pytest.importorskip("monai.data")
    from tumorsynth.monai import BatchSynthesizeTumord, RandSynthesizeTumord

    keys = ["image", "label"]
    chain = [transforms.LoadImaged(keys), transforms.EnsureChannelFirstd(keys)]
    if resample:
        modes = ("bilinear", "nearest")
        chain.append(transforms.Orientationd(keys, "RAS", labels=None))
        chain.append(transforms.Spacingd(keys, (1, 1, 1), mode=modes))
        chain.append(transforms.RandSpatialCropd(keys, (30, 30, 30), random_size=False))
    kind = BatchSynthesizeTumord if batch else RandSynthesizeTumord
    synth = kind("image", "label", **SETTINGS)
    loaded = transforms.Compose(chain)(write(tmp_path, affine))
    loaded = data.list_data_collate([loaded] * 2) if batch else loaded
    assert len(warnings_of(lambda: synth(loaded))) == (not known)


@pytest.mark.parametrize(("affine", "resample", "known"), FILES)
def test_torchio_files_that_were_resampled_to_1_mm_are_known(tmp_path, affine, resample, known):
    tio = pytest.importorskip("torchio", reason="needs TorchIO")
    if int(tio.__version__.split(".")[0]) > 1:
        pytest.skip("TorchIO 2 forgets the file")
    from tumorsynth.torchio import RandomSynthesizeTumor

    paths = write(tmp_path, affine)
    subject = tio.Subject(image=tio.ScalarImage(paths["image"]), label=tio.LabelMap(paths["label"]))
    chain = [tio.ToCanonical(), tio.Resample(1)] if resample else []
    synth = tio.Compose([*chain, RandomSynthesizeTumor(**SETTINGS)])
    assert len(warnings_of(lambda: [synth(subject) for _ in range(2)])) == (not known)
