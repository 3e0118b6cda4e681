"""A voxel size that was never known stays unknown through the transforms of MONAI and TorchIO.

Each chain runs on arrays, which have no affine, on volumes with an affine in memory, and on files:
the first warn once, the others never.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ways import SETTINGS, TWO_MM, scan, warnings_of

import tumorsynth as ts
from tumorsynth.pipeline.lost_affines import lost_affines

BOTH = ["image", "label"]
MODES = ("bilinear", "nearest")
ONE_MM = np.array([[-1, 0, 0, 91.4], [0, -1, 0, -12.7], [0, 0, 1, -340.5], [0, 0, 0, 1.0]])  # LPS
THREE_MM = np.diag([3.0, 3, 3, 1])
OBLIQUE = np.array([[1.2, -0.3, 0, -80.2], [0.3, 1.2, 0, -60], [0, 0, 1.5, 20], [0, 0, 0, 1]])
DEFAULTS = {  # what libraries and tools write for arrays of 40 x 40 x 40 voxels
    "identity": np.eye(4),
    "ITK": np.diag([-1.0, -1, 1, 1]),
    "none": None,  # nibabel centres them, and writes codes of 0
    "far corner": np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    "permuted": np.array([[0, 0, 1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]),
    "ITK, cropped": np.array([[-1, 0, 0, -9], [0, -1, 0, -30], [0, 0, 1, 7], [0, 0, 0, 1.0]]),
    "ITK, flipped": np.array([[1, 0, 0, -39], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
}
KNOWN = {"two": TWO_MM, "one": ONE_MM, "three": THREE_MM, "oblique": OBLIQUE}

MONAI = {
    "flip": lambda t: [t.Flipd(BOTH, 0)],
    "random flip": lambda t: [t.RandFlipd(BOTH, 1.0, spatial_axis=[0, 2])],
    "rotate90": lambda t: [t.Rotate90d(BOTH, 1, (0, 2))],
    "random rotate90": lambda t: [t.RandRotate90d(BOTH, 1.0)],
    "rotate": lambda t: [t.Rotated(BOTH, 0.4, mode=MODES)],
    "zoom": lambda t: [t.Zoomd(BOTH, 0.7, mode=("area", "nearest"), keep_size=False)],
    "random zoom": lambda t: [t.RandZoomd(BOTH, 1.0, 0.8, 0.9, mode=("area", "nearest"))],
    "spacing": lambda t: [t.Spacingd(BOTH, (1.5, 1.5, 1.5), mode=MODES)],
    "to 1 mm": lambda t: [t.Spacingd(BOTH, (1, 1, 1), mode=MODES)],
    "resize": lambda t: [t.Resized(BOTH, (32, 36, 30), mode=("area", "nearest"))],
    "affine": lambda t: [
        t.RandAffined(BOTH, prob=1.0, rotate_range=0.3, scale_range=0.1, mode=MODES)
    ],
    "orientation": lambda t: [t.Orientationd(BOTH, "LPS", labels=None)],
    "axes": lambda t: [t.Orientationd(BOTH, "SPL", labels=None)],
    "crop": lambda t: [t.SpatialCropd(BOTH, (2, 3, 1), (38, 36, 35))],
    "random crop": lambda t: [t.RandSpatialCropd(BOTH, (34, 34, 34), random_size=False)],
    "pad": lambda t: [t.SpatialPadd(BOTH, (50, 44, 47), mode="edge")],
    "crop or pad": lambda t: [t.ResizeWithPadOrCropd(BOTH, (36, 48, 36), mode="edge")],
    "usual": lambda t: [
        t.Orientationd(BOTH, "RAS", labels=None),
        t.Spacingd(BOTH, (1.2, 1.2, 2), mode=MODES),
        t.CropForegroundd(BOTH, "label", allow_smaller=True),
        t.RandFlipd(BOTH, 1.0, spatial_axis=1),
    ],
    "zoom, flip, 1 mm": lambda t: [
        t.Zoomd(BOTH, 1.2, mode=("area", "nearest"), keep_size=False),
        t.Flipd(BOTH, 2),
        t.Spacingd(BOTH, (1, 1, 1), mode=MODES),
    ],
}
TORCHIO = {
    "flip": lambda tio: [tio.RandomFlip(axes=(0, 2), flip_probability=1)],
    "resample": lambda tio: [tio.Resample(1.5)],
    "to 1 mm": lambda tio: [tio.Resample(1)],
    "resize": lambda tio: [tio.Resize((32, 36, 30))],
    "canonical": lambda tio: [tio.ToCanonical()],
    "orientation": lambda tio: [tio.ToOrientation("LPS")],
    "axes": lambda tio: [tio.ToOrientation("SPL")],
    "crop": lambda tio: [tio.Crop((1, 2, 0, 3, 4, 0))],
    "pad": lambda tio: [tio.Pad((3, 1, 2), padding_mode="edge")],
    "crop or pad": lambda tio: [tio.CropOrPad((36, 48, 36), padding_mode="edge")],
    "affine": lambda tio: [tio.RandomAffine(scales=0.1, degrees=10)],
    "anisotropy": lambda tio: [tio.RandomAnisotropy(downsampling=1.5)],
    "multiple": lambda tio: [tio.EnsureShapeMultiple(16)],
    "usual": lambda tio: [
        tio.ToCanonical(),
        tio.Resample((1.2, 1.2, 2)),
        tio.CropOrPad((34, 33, 24)),
        tio.RandomFlip(axes=(1,), flip_probability=1),
    ],
    "pad, 1 mm, crop": lambda tio: [tio.Pad(2), tio.Resample(1), tio.CropOrPad(37)],
}


class Monai:
    """Chains of MONAI, with its transform at the end."""

    chains = MONAI

    def __init__(self, **given):
        module = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
        self.synth = module.RandSynthesizeTumord(*BOTH, **SETTINGS, **given)

    @staticmethod
    def load(chain, affine=None, paths=None):
        transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
        steps = MONAI[chain](transforms)
        if paths is not None:
            steps = [transforms.LoadImaged(BOTH), transforms.EnsureChannelFirstd(BOTH), *steps]
            parts = paths
        elif affine is None:
            parts = dict(zip(BOTH, (x.numpy() for x in scan()), strict=True))
            parts["label"] = parts["label"].astype(np.float32)  # area and bilinear need it
        else:
            parts = dict(zip(BOTH, scan("meta", affine), strict=True))
        return transforms.Compose(steps).set_random_state(3)(parts)

    def __call__(self, parts):
        return self.synth.set_random_state(0)(parts)

    @staticmethod
    def volume(part):
        affine = getattr(part, "affine", None)
        return np.eye(3) if affine is None else np.asarray(affine)[:3, :3]

    @staticmethod
    def voxels(part):
        return torch.as_tensor(np.asarray(part))


class TorchIO(Monai):
    """Chains of TorchIO, with its transform at the end."""

    chains = TORCHIO

    def __init__(self, **given):
        module = pytest.importorskip("tumorsynth.torchio", reason="needs TorchIO")
        self.synth = module.RandomSynthesizeTumor(**SETTINGS, **given)

    @staticmethod
    def load(chain, affine=None, paths=None):
        tio = pytest.importorskip("torchio", reason="needs TorchIO")
        if int(tio.__version__.split(".")[0]) > 1:
            pytest.skip("TorchIO 2 keeps no history that tells")
        kinds = tio.ScalarImage, tio.LabelMap
        if paths is not None:
            parts = [kind(paths[name]) for kind, name in zip(kinds, BOTH, strict=True)]
        else:
            parts = [kind(tensor=x, affine=affine) for kind, x in zip(kinds, scan(), strict=True)]
        torch.manual_seed(3)
        chain = tio.Compose(TORCHIO[chain](tio))
        return chain(tio.Subject(dict(zip(BOTH, parts, strict=True))))

    def __call__(self, parts):
        torch.manual_seed(0)
        return self.synth(parts)

    @staticmethod
    def volume(part):
        return part.affine[:3, :3]

    @staticmethod
    def voxels(part):
        return part.data


CHAINS = [(way, chain) for way in (Monai, TorchIO) for chain in way.chains]
ids = [f"{way.__name__}: {chain}" for way, chain in CHAINS]
each_chain = pytest.mark.parametrize(("way", "chain"), CHAINS, ids=ids)


def diameter(way, made, voxel_mm3):
    voxels = int((way.voxels(made["label"]) == 2).sum())
    return (6 / np.pi * voxels * voxel_mm3) ** (1 / 3)


@each_chain
def test_arrays_stay_unknown_and_a_spacing_wins(way, chain):
    parts = way.load(chain)
    silent, told = way(), way(spacing=(2, 2, 2.0))
    made = []
    said = warnings_of(lambda: [silent(parts) for _ in range(2)])
    assert len(said) == 1 and "pass spacing=(dx, dy, dz)" in said[0]
    sizes = np.linalg.norm(way.volume(parts["image"]), axis=0)
    assert (
        "taken as "
        + " x ".join(
            f"{v:.4g}" for v in (sizes[:1] if np.allclose(sizes, sizes[0], rtol=1e-3) else sizes)
        )
        in said[0]
    )
    assert not warnings_of(lambda: made.append(told(parts)))
    assert diameter(way, made[0], 8) == pytest.approx(12, rel=0.06)
    assert not warnings_of(lambda: made.append(way(spacing=(1, 1, 1))(parts)))
    assert diameter(way, made[1], 1) == pytest.approx(12, rel=0.06)


@each_chain
@pytest.mark.parametrize("affine", KNOWN)
def test_affines_in_memory_stay_known(way, chain, affine):
    parts = way.load(chain, KNOWN[affine])
    made = []
    assert not warnings_of(lambda: made.append(way()(parts)))
    voxel = abs(np.linalg.det(way.volume(parts["image"])))
    assert diameter(way, made[0], voxel) == pytest.approx(12, rel=0.08)
    with pytest.raises(ValueError, match="spacing must agree with the affine of 'image'"):
        way(spacing=(7, 7, 7))(parts)


@each_chain
@pytest.mark.parametrize("affine", ["two", "one"])
def test_files_never_warn(tmp_path, way, chain, affine):
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in BOTH}
    for path, x in zip(paths.values(), scan(), strict=True):
        nib.save(nib.Nifti1Image(x[0].numpy().astype(np.int16), KNOWN[affine]), path)
    parts = way.load(chain, paths=paths)
    made = []
    assert not warnings_of(lambda: made.append(way()(parts)))
    voxel = abs(np.linalg.det(way.volume(parts["image"])))
    assert diameter(way, made[0], voxel) == pytest.approx(12, rel=0.08)


@each_chain
@pytest.mark.parametrize("affine", ["ITK", "permuted"])
def test_affines_in_memory_of_1_mm_at_the_origin_stay_unknown(way, chain, affine):
    parts = way.load(chain, DEFAULTS[affine])
    assert len(warnings_of(lambda: way()(parts))) == 1
    made = []
    assert not warnings_of(lambda: made.append(way(spacing=(2, 2, 2.0))(parts)))
    assert diameter(way, made[0], 8) == pytest.approx(12, rel=0.06)


@pytest.mark.parametrize("way", [Monai, TorchIO])
@pytest.mark.parametrize("chain", ["flip", "resample", "to 1 mm", "axes", "crop", "pad", "usual"])
@pytest.mark.parametrize("affine", DEFAULTS)
def test_files_that_say_no_size_stay_unknown(tmp_path, way, chain, affine):
    """What a tool writes that knows no affine."""
    chain = "spacing" if chain == "resample" and way is Monai else chain
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in BOTH}
    for path, x in zip(paths.values(), scan(), strict=True):
        nib.save(nib.Nifti1Image(x[0].numpy().astype(np.int16), DEFAULTS[affine]), path)
    parts = way.load(chain, paths=paths)
    assert len(warnings_of(lambda: way()(parts))) == 1
    assert not warnings_of(lambda: way(spacing=(1, 1, 1))(parts))


@pytest.mark.parametrize("spacing", [None, (2, 2, 2.0)])
def test_a_replay_of_a_lost_affine_is_bit_equal(spacing):
    parts = Monai.load("usual")
    synth = ts.SynthesizeTumor(**SETTINGS)
    image, label = (parts[name] for name in BOTH)
    first = synth(image, label, spacing=spacing, seed=5)
    again = synth(image, label, spacing=spacing, params=synth.params)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], image)


def test_lazy_transforms_are_noted_too():
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    data = pytest.importorskip("monai.data")
    for steps in MONAI.values():
        for affine in (None, TWO_MM, ONE_MM):
            image, label = scan()
            parts = {"image": image, "label": label.float()}
            if affine is not None:
                parts = {k: data.MetaTensor(x, affine=affine) for k, x in parts.items()}
            chain = [
                transforms.EnsureTyped(BOTH),
                *steps(transforms),
            ]
            lazy = transforms.Compose(chain, lazy=True, overrides={"label": {"mode": "nearest"}})
            out = lazy.set_random_state(3)(parts)
            out["label"] = out["label"].round()
            assert len(warnings_of(lambda out=out: Monai()(out))) == (affine is None)


@pytest.mark.parametrize("affine", [None, TWO_MM])
def test_the_second_epoch_of_a_persistent_dataset(tmp_path, affine):
    """The cache drops the affine; a flip after it turns the identity that stands for it."""
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    data = pytest.importorskip("monai.data")
    parts = dict(zip(BOTH, scan(), strict=True))
    if affine is not None:
        parts = {name: data.MetaTensor(x, affine=affine) for name, x in parts.items()}
    chain = [transforms.EnsureTyped(BOTH), transforms.RandFlipd(BOTH, 1.0, spatial_axis=0)]
    cached = data.PersistentDataset([parts], transforms.Compose(chain), cache_dir=tmp_path)
    first, second = cached[0], cached[0]
    assert len(warnings_of(lambda: Monai()(first))) == (affine is None)
    assert len(warnings_of(lambda: Monai()(second))) == 1
    made = Monai(spacing=(2, 2, 2.0))(second)
    assert diameter(Monai, made, 8) == pytest.approx(12, rel=0.06)


@pytest.mark.parametrize("collate", ["monai", "torch"])
@pytest.mark.parametrize("chain", ["flip", "spacing", "to 1 mm", "zoom"])
def test_batches_in_lightning(collate, chain):
    module = pytest.importorskip("tumorsynth.lightning", reason="needs Lightning")
    data = pytest.importorskip("monai.data", reason="needs MONAI")

    def put(samples):
        if collate == "monai":
            return data.list_data_collate(samples)
        # not default_collate: once MONAI's was called, it keeps the affines in the whole process
        return {name: torch.stack([sample[name] for sample in samples]) for name in BOTH}

    class Trainer:
        current_epoch = global_rank = 0

    def run(affines, **given):
        batch = put([Monai.load(chain, affine) for affine in affines])
        callback = module.TumorSynthCallback(seed=0, **SETTINGS, **given)
        return warnings_of(lambda: callback.on_train_batch_start(Trainer(), None, batch, 0))

    assert len(run([None, None])) == 1
    assert not run([None, None], spacing=(2, 2, 2))
    told = collate == "monai" or chain in ("spacing", "to 1 mm")  # of all samples
    assert len(run([TWO_MM, TWO_MM])) == (not told)
    with pytest.raises(ValueError, match="spacing must agree"):
        run([TWO_MM, TWO_MM], spacing=(7, 7, 7))


def test_one_lost_sample_of_a_batch_is_enough_and_the_other_still_contradicts():
    data = pytest.importorskip("monai.data", reason="needs MONAI")
    batch = data.list_data_collate([Monai.load("flip", TWO_MM), Monai.load("flip")])
    synth = ts.SynthesizeTumor(**SETTINGS)
    image, label = batch["image"], batch["label"]
    assert len(warnings_of(lambda: synth(image, label, seed=0))) == 1
    synth(image, label, spacing=[[2, 2, 2], [3, 3, 3]], seed=0)
    with pytest.raises(ValueError, match="spacing must agree .* affine of 2 x 2 x 2 mm"):
        synth(image, label, spacing=3.0, seed=0)


@pytest.mark.parametrize(
    ("affine", "known"),
    [
        (np.eye(4), False),
        (np.diag([-1.0, -1, 1, 1]), False),
        (np.array([[1, 0, 0, -39], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), False),
        (np.array([[-1, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1.0]]), True),
        (np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), False),  # a flip
        (np.array([[0, 1, 0, 7], [-1, 0, 0, 60], [0, 0, 1, 0], [0, 0, 0, 1.0]]), False),
        (np.array([[1, 0, 0, -91.4], [0, 1, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1.0]]), True),
        (ONE_MM, True),
    ],
)
def test_the_place_decides_where_nothing_was_noted(affine, known):
    synth = ts.SynthesizeTumor(**SETTINGS)
    assert len(warnings_of(lambda: synth(*scan("meta", affine), seed=0))) == (not known)


LIKE_READ = {
    "array": None,
    "whole": ([1, 1, 1], (-90, -126, -72)),
    "fraction": ([1, 1, 1], (-127.5, -20.1, 0.3)),
    "half": ([1, 1, 1], (0.5, 0.5, 0.5)),
    "LPS": ([-1, -1, 1], (100, 90, 30)),
    "LPS scan": ([-1, -1, 1], (91.4, -12.7, -340.5)),
    "ITK": ([-1, -1, 1], (0, 0, 0)),
    "ITK crop": ([-1, -1, 1], (-7, -3, 20)),
    "nibabel": ([-1, 1, 1], (11.5, -9.5, -8.5)),
    "template": ([-1, 1, 1], (90, -126, -72)),
    "2 mm": ([2, 2, 2], (0, 0, 0)),
}


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "memory"])
@pytest.mark.parametrize("case", LIKE_READ)
def test_random_chains_of_monai_change_no_answer(tmp_path, case, from_file):
    t = pytest.importorskip("monai.transforms", reason="needs MONAI")
    data = pytest.importorskip("monai.data")
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    affine = np.eye(4)
    if LIKE_READ[case] is not None:
        affine[:3, :3], affine[:3, 3] = np.diag(LIKE_READ[case][0]), LIKE_READ[case][1]
    volume = np.zeros((24, 20, 18), np.float32)
    if from_file:
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / "x.nii.gz")
        first = t.LoadImage(ensure_channel_first=True)(tmp_path / "x.nii.gz")
    elif LIKE_READ[case] is None:
        first = data.MetaTensor(volume[None])
    else:
        first = data.MetaTensor(volume[None], affine=torch.as_tensor(affine))

    def lost(x):
        return lost_affines(x.affine, x.shape[-3:], x)[0]

    steps = [
        t.Flip(1),
        t.Rotate90(1, (0, 2)),
        t.Rotate((0.2, 0.1, 0)),
        t.SpatialCrop(roi_start=(3, 0, 1), roi_end=(30, 15, 14)),
        t.CenterSpatialCrop((14, 14, 14)),
        t.CropForeground(lambda x: torch.arange(x.shape[-1]).expand(x.shape) > 2),
        t.SpatialPad((30, 31, 25)),
        t.SpatialPad((50, 50, 50), method="end"),
        t.BorderPad((0, 30, 0, 25, 0, 2)),
        t.ResizeWithPadOrCrop((22, 40, 17), method="end"),
        t.Spacing((1.5, 1.2, 0.9)),
        t.Spacing((1, 1, 1)),
        t.Zoom(0.8, keep_size=False),
        t.Zoom(0.8, keep_size=True),
        t.Zoom(1.3, keep_size=True),
        t.Zoom(1.2, mode="trilinear", align_corners=True, keep_size=False),
        t.Resize((20, 21, 15)),
        t.RandAffine(prob=1, translate_range=5),
        t.RandAffine(prob=1, rotate_range=0.3, scale_range=0.2, translate_range=5),
        t.RandAffine(prob=0, rotate_range=0.3),
        t.RandSpatialCrop((15, 15, 15), random_size=False),
        t.Orientation("LPS", labels=None),
        t.Orientation("SPL", labels=None),
    ]
    expected = lost(first)
    unknown = case in ("array", "ITK", "ITK crop", "nibabel")
    assert expected == (unknown or (case in ("whole", "LPS") and not from_file))
    draw = np.random.default_rng(0)
    for _ in range(60):
        chain = [steps[i] for i in draw.integers(len(steps), size=draw.integers(1, 5))]
        x = t.Compose(chain, lazy=draw.random() < 0.2)(first)
        assert lost(x) == expected, [type(step).__name__ for step in chain]


@pytest.mark.parametrize("chain", TORCHIO)
@pytest.mark.parametrize(
    ("origin", "unknown"),
    [((9, 126, 0), True), ((-90, -126, -72), False), ((-127.5, 3.5, -20.1), False)],
)
def test_torchio_answers_for_identity_files_as_read(tmp_path, chain, origin, unknown):
    nib = pytest.importorskip("nibabel", reason="needs nibabel")
    affine = np.eye(4)
    affine[:3, 3] = origin
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in BOTH}
    for path, x in zip(paths.values(), scan(), strict=True):
        nib.save(nib.Nifti1Image(x[0].numpy().astype(np.int16), affine), path)
    parts = TorchIO.load(chain, paths=paths)
    assert len(warnings_of(lambda: TorchIO()(parts))) == unknown
