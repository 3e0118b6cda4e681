"""The transforms as TorchIO's own users meet them: history, seeds, Compose, Queue, loaders."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_generator

tio = pytest.importorskip("torchio")
if int(tio.__version__.split(".")[0]) > 1:
    pytest.skip("TorchIO 2 has tests/torchio/test_torchio2.py", allow_module_level=True)

import tumorsynth as ts  # noqa: E402
from tumorsynth.appearance.contrast import ContrastConfig  # noqa: E402
from tumorsynth.generators import store  # noqa: E402
from tumorsynth.generators.config import build  # noqa: E402
from tumorsynth.generators.handcrafted import HandcraftedConfig  # noqa: E402
from tumorsynth.torchio import RandomSynthesizeTumor, SynthesizeTumor  # noqa: E402

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10)}
OBLIQUE = np.array(  # tilted by 10 degrees, axes to the left, up and to the back; in mm
    [[-0.8, 0, 0, 90.0], [0, -0.26, -1.4772, -40.0], [0, 1.4772, -0.26, 1200.5], [0, 0, 0, 1]]
)


def subject(affine=None, shape=(48, 48, 48), image_dtype=torch.float32, label_dtype=torch.int16):
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = (sum(a**2 for a in axes) < 0.7)[None].to(label_dtype)
    image = 60 + 40 * label.float() + 10 * torch.randn(label.shape, generator=generator)
    affine = np.eye(4) if affine is None else affine
    return tio.Subject(
        image=tio.ScalarImage(tensor=image.to(image_dtype), affine=affine),
        label=tio.LabelMap(tensor=label, affine=affine),
        name="a",
    )


def transform(**kwargs):
    return RandomSynthesizeTumor(**{**SETTINGS, **kwargs})


def tumor(x, value=2):
    return x["label"].data == value


def equal(a, b):
    return torch.equal(a["image"].data, b["image"].data) and torch.equal(
        a["label"].data, b["label"].data
    )


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_subject_comes_back_as_it_was_with_a_tumor(image_dtype, label_dtype):
    before = subject(OBLIQUE, image_dtype=image_dtype, label_dtype=label_dtype)
    given = copy.deepcopy(before)
    torch.manual_seed(0)
    synthesis = transform()
    out = synthesis(given)
    assert equal(given, before) and not given.history
    assert out["image"].data.dtype == image_dtype and out["label"].data.dtype == label_dtype
    assert type(out["label"]) is tio.LabelMap and out["name"] == "a"
    np.testing.assert_array_equal(out["image"].affine, OBLIQUE)
    inside = tumor(out)
    change = (out["image"].data.float() - before["image"].data.float())[inside]
    assert change.mean() < -8
    record = synthesis.report[0]
    assert int(inside.sum()) == record["label_voxels"]
    np.testing.assert_allclose(
        record["centre_mm"], (OBLIQUE @ [*record["centre_voxel"], 1])[:3], atol=1e-9
    )
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3]))
    diameter = (6 / np.pi * float(inside.sum()) * voxel) ** (1 / 3)
    assert 7.5 < diameter < 10.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_dtype": torch.int16},
        {"blend": "difftumor", "count": 2, "merge": True, "sigma_mm": (1, 2)},
        {"organ": "organ", "organ_labels": (1,), "tumor_label": 1},
        {"organ_labels": 9},
    ],
    ids=["plain", "integer image", "published blend", "organ map", "no organ"],
)
def test_history_is_small_and_replays_bit_by_bit(settings):
    settings = dict(settings)
    given = subject(OBLIQUE, image_dtype=settings.pop("image_dtype", torch.float32))
    if "organ" in settings:
        given.add_image(given["label"], "organ")
        empty = torch.zeros_like(given["label"].data)
        given.add_image(tio.LabelMap(tensor=empty, affine=OBLIQUE), "label")
    torch.manual_seed(1)
    out = transform(**settings)(given)
    (name, arguments), *rest = out.applied_transforms
    assert name == "SynthesizeTumor" and not rest
    assert len(pickle.dumps(arguments)) < 3000
    assert not any(isinstance(v, torch.nn.Module | torch.Tensor) for v in arguments.values())
    assert type(out.history[0]) is SynthesizeTumor

    arguments = pickle.loads(pickle.dumps(arguments))
    torch.manual_seed(99)  # a replay draws nothing
    again = SynthesizeTumor(**arguments)(given)
    assert equal(again, out) and equal(out.get_composed_history()(given), out)
    assert again.applied_transforms == out.applied_transforms
    assert equal(out, given) == (settings.get("organ_labels") == 9)


def test_history_of_a_chain_replays():
    given = subject()
    chain = tio.Compose([tio.RandomFlip(axes=(0, 1)), transform(), tio.RandomNoise(std=2)])
    torch.manual_seed(4)
    out = chain(given)
    replayed = out.get_composed_history()(given)
    assert equal(replayed, out) and tumor(out).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for example that noise has no inverse
        back = out.apply_inverse_transform()
    assert int(tumor(back).sum()) == int(tumor(out).sum())


def test_scans_that_are_read_lazily_from_files(tmp_path):
    """Lazy, oblique, HU as int16; saved, and replayed after a pickle."""
    given = subject(OBLIQUE, image_dtype=torch.int16, label_dtype=torch.uint8)
    for name in ("image", "label"):
        given[name].save(tmp_path / f"{name}.nii.gz")

    def read():
        label = tio.LabelMap(tmp_path / "label.nii.gz")
        return tio.Subject(image=tio.ScalarImage(tmp_path / "image.nii.gz"), label=label)

    data = tio.SubjectsDataset([read()] * 2, transform=transform(), load_getitem=False)
    torch.manual_seed(0)
    one, two = data[0], data[0]
    assert tumor(one).any() and tumor(two).any() and not equal(one, two)
    assert not tumor(data._subjects[0]).any()
    again = pickle.loads(pickle.dumps(one)).get_composed_history()(read())
    assert equal(again, one)
    one["label"].save(tmp_path / "made.nii.gz")
    assert torch.equal(tio.LabelMap(tmp_path / "made.nii.gz").data, one["label"].data)


def test_a_map_on_another_grid_is_refused_with_a_fix_that_works():
    given = subject(shape=(40, 40, 40))
    coarse = tio.Resample(1.7)(given["label"])
    given.add_image(tio.LabelMap(tensor=coarse.data, affine=coarse.affine), "label")
    with pytest.raises(ValueError, match="must have the image's shape|must share one grid"):
        transform()(given)
    out = tio.Compose([tio.Resample("image"), transform(size_mm=6)])(given)  # the error's fix
    assert tumor(out).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_every_float_dtype(dtype):
    given = subject()
    given["image"].set_data(given["image"].data.to(dtype))
    out = transform()(given)
    assert out["image"].data.dtype == dtype and tumor(out).any()
    assert equal(out.get_composed_history()(given), out)


def test_manual_seed_reproduces_and_p_holds():
    given = subject()
    synthesis = transform()
    torch.manual_seed(0)
    first, second = synthesis(given), synthesis(given)
    torch.manual_seed(0)
    assert equal(first, synthesis(given)) and not equal(first, second)

    never = transform(p=0)(given)
    assert equal(never, given) and not never.history
    torch.manual_seed(0)
    half = transform(p=0.5)
    done = [bool(tumor(half(given)).any()) for _ in range(20)]
    assert 4 < sum(done) < 16


def test_include_exclude_and_keep():
    given = subject()
    for spared in ({"exclude": ["image"]}, {"exclude": ["label"]}, {"include": ["image"]}):
        out = transform(**spared)(given)
        assert equal(out, given) and not out.history
    out = transform(include=["image", "label"], keep={"image": "before"})(given)
    assert torch.equal(out["before"].data, given["image"].data) and tumor(out).any()


def test_dictionary_of_tensors():
    given = subject()
    data = {"ct": given["image"].data, "organs": given["label"].data}
    synthesis = transform(
        image="ct", label="organs", include=["ct", "organs"], label_keys=["organs"]
    )
    out = synthesis(data)
    assert isinstance(out["ct"], torch.Tensor) and (out["organs"] == 2).any()
    assert not (data["organs"] == 2).any()


def test_one_of_queue_and_loader_with_workers():
    choice = tio.OneOf({transform(): 1, transform(size_mm=6): 1})
    data = tio.SubjectsDataset([subject() for _ in range(4)], transform=tio.Compose([choice]))
    torch.manual_seed(0)
    batches = list(tio.SubjectsLoader(data, batch_size=2, num_workers=2))
    labels = [label for batch in batches for label in batch["label"][tio.DATA]]
    assert all((label == 2).any() for label in labels)
    assert len({label.numpy().tobytes() for label in labels}) == 4

    sampler = tio.LabelSampler(16, "label", {0: 0, 1: 0, 2: 1})
    queue = tio.Queue(data, max_length=4, samples_per_volume=2, sampler=sampler, num_workers=2)
    patches = list(tio.SubjectsLoader(queue, batch_size=4))
    assert len(patches) == 2
    assert all((patch == 2).any() for batch in patches for patch in batch["label"][tio.DATA])


@pytest.mark.parametrize("prior", ["liver", (4, 6)])
@pytest.mark.parametrize("generator", ["hu2023", "tiny"])
def test_numpy_errors_are_not_raised(prior, generator, tmp_path):
    given = subject(np.diag([1.3, 0.7, 2.2, 1]), shape=(48, 64, 24))
    given["image"].data[:, :4] = float("nan")
    if generator == "tiny":
        generator = tiny_generator(contrast=ContrastConfig()).save(tmp_path / "tiny")
    store._loaded.clear()  # so that the call loads them too
    settings = {"size_mm": prior, "count": None, "intensity": ts.HU(), "generator": generator}
    with np.errstate(all="raise"):
        out = transform(**settings)(given)
    assert torch.equal(out["image"].data.isnan(), given["image"].data.isnan())


def test_healthy_only():
    given = subject()
    ill = subject()
    ill["label"].data[:, 20:24, 20:24, 20:24] = 2
    chain = transform(healthy_only=True)
    torch.manual_seed(0)
    left = chain(ill)
    reason = "left alone (holds a tumour already: 64 voxels of 2 = tumor_label)"
    assert equal(left, ill) and chain.report[0]["reason"] == reason
    assert equal(left.get_composed_history()(ill), ill)
    out = chain(given)
    assert tumor(out).any() and equal(out.get_composed_history()(given), out)


def test_a_drawn_contrast_is_in_the_params_of_the_history():
    torch.manual_seed(0)
    out = transform(contrast_hu=(-60, -20))(subject())
    assert "contrast_hu" not in out.applied_transforms[0][1]
    assert equal(out.get_composed_history()(subject()), out)


def test_repr_shows_the_given_arguments():
    text = repr(transform(p=0.5, organ="organs"))
    assert text == (
        "RandomSynthesizeTumor(image='image', label='label', organ='organs', p=0.5, "
        "generator='hu2023', count=1, size_mm=(8, 10))"
    )
    out = transform()(subject())
    assert repr(out.history[0]).startswith("SynthesizeTumor(params={")


def test_pickle_and_copies_are_small():
    synthesis = transform(intensity=ts.Scaled(-1000, 1000, -1000, 1000))
    assert len(pickle.dumps(synthesis)) < 20_000
    copied = pickle.loads(pickle.dumps(synthesis))
    torch.manual_seed(0)
    first = transform()(subject())
    torch.manual_seed(0)
    assert torch.equal(copied(subject())["label"].data, first["label"].data)


def test_a_generator_needs_a_name_and_the_history_holds_only_that(tmp_path):
    config = {
        "autoencoder": {"encoder_widths": (8, 8, 8), "decoder_widths": (8, 8, 8), "groups": 4},
        "denoiser": {"type": "conv", "widths": (8, 16), "blocks": 1},
        "sampler": {"crop_size": 32, "crop_multiple": 32},
    }
    generator = ts.Generator(*build(config))
    with pytest.raises(ValueError, match="save it with generator.save"):
        transform(generator=generator)
    folder = generator.save(tmp_path / "own")
    for named in (folder, ts.load_generator(folder)):
        torch.manual_seed(0)
        out = transform(generator=named)(subject())
        assert out.history[0].settings["generator"] == str(folder)
        assert equal(out.get_composed_history()(subject()), out)

    handmade = ts.HandcraftedGenerator(HandcraftedConfig(contrast_hu=(40, 50)))
    out = transform(generator=handmade)(subject())
    assert equal(out.get_composed_history()(subject()), out)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label": "seg"}, "needs the image seg, but the subject has image, label"),
        ({"organ": "organ"}, "needs the image organ"),
        ({"label": "image"}, "must be different names, got \\['image', 'image'\\]"),
        ({"label": ["label"]}, "must be different names"),
    ],
)
def test_names_that_the_subject_lacks_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        transform(**kwargs)(subject())


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ("hu2023", "'hu2023'"),
        ("liver-early", "'liver-early'"),
        (ts.HandcraftedGenerator(), "HandcraftedGenerator"),
        (Path("my/generator"), "PosixPath"),
        (["image"], "\\['image'\\]"),
    ],
)
def test_a_generator_as_first_argument_gets_the_fix(first, found):
    with pytest.raises(ValueError, match=f"image must be the name .*, got {found}; .*generator="):
        RandomSynthesizeTumor(first, p=1)
    with pytest.raises(ValueError, match=f"image must be the name .*, got {found}; .*generator="):
        SynthesizeTumor({"applied": False, "tumors": []}, image=first)


def test_images_of_different_geometry():
    given = subject()
    given.add_image(tio.LabelMap(tensor=given["label"].data, affine=OBLIQUE), "label")
    with pytest.raises(ValueError, match="'image' and 'label' must share one grid.*ToReference"):
        transform()(given)


def test_one_image_is_no_subject():
    given = subject()
    for alone in (given["image"], given["image"].data, given["image"].data.numpy()):
        for synthesis in (transform(), tio.Compose([transform()])):
            with pytest.raises(TypeError, match="got one image alone; pass a subject: tio.Subject"):
                synthesis(alone)


@pytest.mark.parametrize(
    ("params", "found"),
    [("a.json", "'a.json'"), (None, "None"), ([], "a list of 0"), ([{}, {}], "a list of 2")],
)
def test_params_of_a_wrong_type_are_named(params, found):
    with pytest.raises(ValueError, match=f"the record of one sample, .*, got {found}; pass"):
        SynthesizeTumor(params=params)


def test_the_cores_params_are_taken_as_they_are():
    given = subject()
    synth = ts.SynthesizeTumor(**SETTINGS)
    image, label = synth(given["image"].data, given["label"].data, affine=np.eye(4), seed=3)
    for params in (synth.params, synth.params[0]):
        out = SynthesizeTumor(params=params, generator="hu2023")(given)
        assert torch.equal(out["image"].data, image) and torch.equal(out["label"].data, label)


def test_bad_arguments():
    for kind in (RandomSynthesizeTumor, lambda **kwargs: SynthesizeTumor(params={}, **kwargs)):
        with pytest.raises(TypeError, match="argument sise_mm of .*SynthesizeTumor; did .*size_mm"):
            kind(generator="hu2023", sise_mm=3)
    with pytest.raises(TypeError, match="argument exclud of RandomSynthesizeTumor; did .*exclude"):
        transform(exclud=["label"])
    with pytest.raises(ValueError, match="count must be"):
        transform(count=True)
    with pytest.raises(ValueError, match="size_mm"):
        transform(size_mm=(5, 2))


def test_history_replays_on_the_grid_of_its_subject_alone():
    torch.manual_seed(0)
    out = transform()(subject(OBLIQUE))
    replay = out.get_composed_history()
    assert equal(replay(subject(OBLIQUE)), out)
    flipped = OBLIQUE @ np.diag([-1, 1, 1, 1])
    for other, says in [
        (subject(OBLIQUE @ np.diag([2, 1, 1, 1])), "got one of 1.6 x 1.49991 x 1.49991 mm"),
        (subject(flipped), "with axes L.., got one with axes R.."),
        (tio.CropOrPad((40, 48, 48))(subject(OBLIQUE)), "voxels, got one of 40 x 48 x 48"),
        (tio.ToCanonical()(subject(OBLIQUE)), "got one"),
    ]:
        with pytest.raises(ValueError, match=f"params must be replayed on the grid .*{says}"):
            replay(other)
