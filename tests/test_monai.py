"""The transforms as MONAI's users meet them: Compose, datasets, loaders, MetaTensor, inverse."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from monai.data import (
    CacheDataset,
    CacheNTransDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    PersistentDataset,
    SmartCacheDataset,
    ThreadDataLoader,
    decollate_batch,
)
from monai.data.utils import list_data_collate
from monai.transforms import (
    Compose,
    EnsureTyped,
    Flipd,
    Identityd,
    OneOf,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    Spacingd,
)

import tumorsynth as ts
from tumorsynth.monai import (
    BatchSynthesizeTumord,
    PrepareBatchTumorSynth,
    RandSynthesizeTumor,
    RandSynthesizeTumorD,
    RandSynthesizeTumord,
    RandSynthesizeTumorDict,
)

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10)}
LPS = np.diag([-0.8, -0.8, 2.5, 1.0])  # the array's x and y run to the left and to the back


def volume(shape=(48, 48, 48), seed=0):
    """(image float32 HU, label int16), numpy (1, X, Y, Z): an ellipsoid of organ 1 in tissue."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = (sum(g**2 for g in grid) < 0.7).astype(np.int16)[None]
    image = (60 + 40 * label + rng.normal(0, 10, label.shape)).astype(np.float32)
    return image, label


def sample(kind="numpy", affine=None, **kwargs):
    image, label = volume(**kwargs)
    if kind == "numpy":
        return {"image": image, "label": label, "name": "a"}
    image, label = torch.from_numpy(image), torch.from_numpy(label)
    if kind == "meta":
        affine = np.eye(4) if affine is None else affine
        meta = {"filename_or_obj": "ct.nii.gz"}
        image, label = (MetaTensor(x, affine=affine, meta=dict(meta)) for x in (image, label))
    return {"image": image, "label": label, "name": "a"}


def transform(**kwargs):
    return RandSynthesizeTumord("image", label_key="label", **{**SETTINGS, **kwargs})


def tumor(data, value=2):
    return np.asarray(data["label"]) == value


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def equal(a, b):
    return all(same(a[key], b[key]) for key in ("image", "label"))


@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
@pytest.mark.parametrize("image_dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("label_dtype", ["uint8", "int64", "float32"])
def test_types_and_dtypes_come_back_and_the_input_stays(kind, image_dtype, label_dtype):
    data = sample(kind, LPS)
    for key, dtype in (("image", image_dtype), ("label", label_dtype)):
        x = data[key]
        data[key] = x.astype(dtype) if kind == "numpy" else x.to(getattr(torch, dtype))
    before = copy.deepcopy(data)
    out = transform().set_random_state(0)(data)

    assert equal(data, before)
    assert out["name"] == "a" and set(out) == set(data)
    for key in ("image", "label"):
        assert type(out[key]) is type(data[key])
        assert out[key].dtype == data[key].dtype
    changed = np.asarray(out["image"]) != np.asarray(before["image"])
    assert tumor(out).sum() > 50
    assert changed[tumor(out)].mean() > 0.9
    assert changed.mean() < 0.2
    core = (np.asarray(out["image"], float) - np.asarray(before["image"], float))[tumor(out)]
    assert core.mean() < -8


def test_integer_images_are_the_float_result_rounded():
    data = sample()
    data["image"] = data["image"].round()
    exact = transform().set_random_state(3)(data)["image"]
    whole = transform().set_random_state(3)({**data, "image": data["image"].astype(np.int16)})
    assert same(whole["image"], exact.round())


@pytest.mark.parametrize("dtype", [">i2", "uint16", "uint32"])
def test_odd_numpy_arrays(dtype):
    data = sample()
    data["image"] = np.flip(data["image"], 1)  # negative stride
    data["label"] = data["label"].astype(dtype)
    data["label"].setflags(write=False)
    out = transform().set_random_state(0)(data)
    assert out["label"].dtype == np.dtype(dtype)
    plain = transform().set_random_state(0)(
        {"image": data["image"].copy(), "label": data["label"].astype(np.int32)}
    )
    assert equal(out, plain) and tumor(out).any()


def test_tumor_label_has_to_fit_the_label():
    data = sample()
    data["label"] = data["label"].astype(np.uint16)
    with pytest.raises(ValueError, match="tumor_label -1 does not fit .* convert"):
        transform(tumor_label=-1)(data)


def test_metatensor_keeps_affine_meta_and_gives_spacing_and_orientation():
    data = sample("meta", LPS, shape=(64, 64, 24))
    synthesis = transform(size_mm=15)
    out = synthesis.set_random_state(1)(data)
    for key in ("image", "label"):
        assert torch.equal(out[key].affine, data[key].affine)
        assert out[key].meta["filename_or_obj"] == "ct.nii.gz"
        assert out[key].affine is not data[key].affine
    volume_mm3 = tumor(out).sum() * 0.8 * 0.8 * 2.5
    assert volume_mm3 == pytest.approx(np.pi / 6 * 15**3, rel=0.1)
    report = synthesis.report[0]
    centre = LPS @ [*report["centre_voxel"], 1]
    np.testing.assert_allclose(report["centre_mm"], centre[:3])

    bare = {key: np.asarray(data[key]) for key in ("image", "label")}
    given = transform(size_mm=15, spacing=(0.8, 0.8, 2.5)).set_random_state(1)(bare)
    assert same(given["label"], out["label"])


def test_applied_operations_are_untouched_and_inverse_works():
    chain = Compose(
        [
            Orientationd(["image", "label"], "RAS", labels=None),
            Flipd(["image", "label"], 0),
            transform(),
        ]
    ).set_random_state(0)
    data = sample("meta", LPS, shape=(40, 44, 24))
    out = chain(data)
    names = [op["class"] for op in out["image"].applied_operations]
    assert names == ["Orientationd", "Flipd"] or names == ["Orientation", "Flip"]
    back = chain.inverse(out)
    assert back["image"].shape == data["image"].shape
    assert np.allclose(back["image"].affine, LPS)
    kept = ~tumor(back)
    assert same(np.asarray(back["label"])[kept], np.asarray(data["label"])[kept])
    assert tumor(back).sum() == tumor(out).sum() > 0


def test_probability():
    data = sample("meta")
    out = transform(prob=0.0)(data)
    assert out["image"] is data["image"] and out["label"] is data["label"] and out is not data

    synthesis = transform(prob=0.5).set_random_state(0)
    done = [tumor(synthesis(data)).any() for _ in range(20)]
    assert 4 < sum(done) < 16
    assert synthesis.report == [] or done[-1]


def test_set_random_state_reproduces_and_the_global_generators_are_not_touched():
    data = sample()
    np.random.seed(5)
    torch.manual_seed(5)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    chain = Compose([transform(prob=0.9, count=(1, 2)), Identityd("image")])
    chain.set_random_state(7)
    first = [chain(data) for _ in range(3)]
    chain.set_random_state(7)
    again = [chain(data) for _ in range(3)]
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not equal(first[0], first[1])
    assert same(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("loader", [DataLoader, torch.utils.data.DataLoader])
def test_workers_and_epochs_do_not_repeat_each_other(loader):
    chain = Compose([transform()]).set_random_state(0)
    data = Dataset([sample("tensor")] * 4, chain)

    def epochs():
        torch.manual_seed(0)
        made = loader(data, batch_size=1, num_workers=2, collate_fn=list_data_collate)
        return [batch["label"].clone() for _ in range(2) for batch in made]

    first = epochs()
    assert all((x == 2).any() for x in first)
    assert len({x.numpy().tobytes() for x in first}) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, epochs(), strict=True))


class SeededByIndex(torch.utils.data.Dataset):
    def __init__(self, data, synthesis):
        self.data, self.synthesis = data, synthesis

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.synthesis.set_random_state(index)(self.data)["label"]


def test_a_state_set_inside_a_worker_holds():
    data = SeededByIndex(sample("tensor"), transform())
    own = list(torch.utils.data.DataLoader(data, batch_size=None))
    workers = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(own, workers, strict=True))


def test_cached_datasets_synthesise_anew(tmp_path):
    # plain tensors: MONAI 1.4 cannot read the MetaTensors it stored with torch 2.6 and later
    typed = EnsureTyped(["image", "label"], track_meta=False)
    chain = Compose([typed, transform()]).set_random_state(0)
    items = [sample("tensor")]
    cached = CacheDataset(items, chain, progress=False)
    stored = PersistentDataset(items, chain, cache_dir=tmp_path / "all")
    first_only = CacheNTransDataset(items, chain, cache_n_trans=1, cache_dir=tmp_path / "first")
    smart = SmartCacheDataset(items * 2, chain, replace_rate=0.5, cache_num=1, progress=False)
    for dataset in (cached, stored, first_only, smart):
        one, two = dataset[0], dataset[0]
        assert tumor(one).any() and tumor(two).any() and not equal(one, two)
    for dataset in (cached, smart):
        assert not tumor(dataset._cache[0]).any()
    size = sample("tensor")["image"].nbytes + sample("tensor")["label"].nbytes
    for file in tmp_path.glob("*/*.pt"):  # what was cached is the scan, with no generator beside
        assert file.stat().st_size < size + 20_000
    batch = next(iter(ThreadDataLoader(cached, batch_size=1)))
    assert tumor(batch).any()


def test_pickle_is_small_and_goes_on_alike():
    synthesis = transform().set_random_state(0)
    data = sample()
    synthesis(data)
    raw = pickle.dumps(synthesis)
    assert len(raw) < 20_000
    assert equal(pickle.loads(raw)(data), copy.deepcopy(synthesis)(data))
    assert equal(pickle.loads(raw)(data), synthesis(data))


def test_copies_of_a_transform_share_the_weights_of_a_name():
    synthesis = transform(generator="liver-early")
    raw = pickle.dumps(synthesis)
    assert len(raw) < 20_000
    copies = [synthesis, pickle.loads(raw), copy.deepcopy(synthesis)]
    assert len({id(c.adapter.synth.handle.get("cpu")) for c in copies}) == 1


@pytest.mark.parametrize("kind", ["numpy", "meta"])
def test_healthy_only(kind):
    healthy, ill = sample(kind), sample(kind)
    ill["label"][:, 20:24, 20:24, 20:24] = 2
    synthesis = transform(healthy_only=True).set_random_state(0)
    out = synthesis(ill)
    assert out["image"] is ill["image"] and out["label"] is ill["label"]
    assert synthesis.report[0]["reason"] == "left alone (holds a tumour already)"
    state = synthesis.R.get_state()[1].copy()
    out = synthesis(healthy)
    assert tumor(out).any()
    # a sample's own draws do not depend on what was left alone before it
    other = transform().set_random_state(0)
    other(ill)
    assert same(other.R.get_state()[1], state)
    assert equal(other(healthy), out)


def test_healthy_only_looks_at_the_label_and_not_at_the_organ_map():
    data = sample("tensor")
    data["organ"], data["label"] = data["label"].clone(), torch.zeros_like(data["label"])
    synthesis = transform(organ_key="organ", tumor_label=1, healthy_only=True)
    out = synthesis.set_random_state(0)(data)
    assert tumor(out, 1).any()
    assert synthesis(out)["label"] is out["label"]


def healthy(data):
    return data["healthy"]


def test_a_predicate_on_the_dictionary():
    data = sample("meta")
    synthesis = transform(when=healthy).set_random_state(0)
    left = synthesis({**data, "healthy": False})
    assert left["image"] is data["image"]
    assert synthesis.report[0]["reason"] == "left alone (as asked)"
    assert tumor(synthesis({**data, "healthy": True})).any()
    assert len(pickle.dumps(synthesis)) < 20_000


@pytest.mark.parametrize("answers", [[True, False, True], torch.tensor([1, 0, 1])])
def test_a_predicate_and_healthy_only_on_a_batch(answers):
    batch = next(iter(DataLoader(Dataset([sample("meta") for _ in range(3)]), batch_size=3)))
    batch["label"][2, :, 20:24, 20:24, 20:24] = 2
    given = copy.deepcopy(batch)
    settings = {**SETTINGS, "healthy_only": True}
    synthesis = BatchSynthesizeTumord("image", when=lambda data: data["healthy"], **settings)
    out = synthesis.set_random_state(0)({**batch, "healthy": answers})
    assert equal(batch, given) and type(out["label"]) is MetaTensor
    changed = [not torch.equal(a, b) for a, b in zip(out["image"], given["image"], strict=True)]
    assert changed == [True, False, False]
    assert torch.equal(out["label"][1:], given["label"][1:])
    reasons = [record.get("reason", "") for record in synthesis.report]
    assert reasons == ["", "left alone (as asked)", "left alone (holds a tumour already)"]
    # the sample that is changed is changed as in a batch where all are
    plain = BatchSynthesizeTumord("image", **SETTINGS).set_random_state(0)(batch)
    assert torch.equal(plain["image"][0], out["image"][0])

    nobody = BatchSynthesizeTumord("image", when=lambda data: False, **SETTINGS)(batch)
    assert nobody["image"] is batch["image"]
    with pytest.raises(ValueError, match="one answer for each of the 3 samples"):
        BatchSynthesizeTumord("image", when=lambda data: [True] * 2, **SETTINGS)(batch)


def test_repr_says_what_was_asked_for():
    synthesis = transform(prob=0.5, healthy_only=True, organ_key="organ")
    text = repr(synthesis)
    assert text == (
        "RandSynthesizeTumord('image', 'label', organ_key='organ', prob=0.5, generator='hu2023', "
        "count=1, size_mm=(8, 10), healthy_only=True)"
    )
    assert repr(RandSynthesizeTumor(prob=0.5)) == "RandSynthesizeTumor(prob=0.5)"
    held = ts.load_generator("liver-early")  # an object with weights is named, not printed
    assert "generator='liver-early'" in repr(transform(generator=held))


def test_a_monai_engine_trains_on_tumours():
    pytest.importorskip("ignite", reason="MONAI's engines need pytorch-ignite")
    from monai.engines import SupervisedEvaluator, SupervisedTrainer

    loader = DataLoader(Dataset([sample("meta", seed=s) for s in range(4)]), batch_size=2)
    network = torch.nn.Conv3d(1, 3, 1)
    prepare = PrepareBatchTumorSynth("image", "label", prob=1.0, **SETTINGS).set_random_state(0)
    seen = []

    def loss(out, label):
        seen.append(label)
        return torch.nn.functional.cross_entropy(out, label[:, 0].long())

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.001),
        loss_function=loss,
        prepare_batch=prepare,
    )
    before = network.weight.detach().clone()
    trainer.run()
    assert len(seen) == 2 and all((part == 2).any() for label in seen for part in label)
    assert not torch.equal(before, network.weight)
    assert [record["sample"] for record in prepare.report] == [0, 1]

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=network
    )
    evaluator.run()
    assert not (evaluator.state.output[0]["label"] == 2).any()


def test_prepare_batch_hands_on_to_another():
    from monai.engines.utils import PrepareBatchExtraInput

    batch = list_data_collate([{**sample("tensor"), "age": torch.tensor(40.0)}])
    prepare = PrepareBatchTumorSynth(prepare_batch=PrepareBatchExtraInput("age"), **SETTINGS)
    _image, label, extra, _ = prepare.set_random_state(0)(batch, "cpu")
    assert (label == 2).any() and extra[0].tolist() == [40]
    assert not (batch["label"] == 2).any()


def test_cuda_in_a_forked_worker_says_what_to_write(monkeypatch):
    # torch's own flag of a forked process; the error behind it is torch's
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="forked worker process; synthesise on the batch"):
        transform(device="cuda")(sample("tensor"))


def _in_a_worker(items):
    return next(iter(torch.utils.data.DataLoader(items, batch_size=None, num_workers=1)))


@pytest.mark.gpu
def test_cuda_in_a_real_forked_worker():
    torch.zeros(1, device="cuda")
    data = Dataset([sample("tensor")], transform(device="cuda"))
    with pytest.raises(RuntimeError, match="forked worker process; synthesise on the batch"):
        _in_a_worker(data)
    batch = next(iter(ThreadDataLoader(data, batch_size=1)))
    assert tumor(batch).any()


def test_separate_organ_map_whose_values_mean_something_else():
    data = sample("meta")
    liver = data["label"].clone()
    organ = liver.to(torch.uint8)
    organ[:, :10] = 2  # another organ that has the tumour's value in the label
    lesions = torch.zeros_like(liver)
    lesions[:, 20:24, 20:24, 20:24] = 1
    data = {"image": data["image"], "label": lesions, "organ": organ}
    before = copy.deepcopy(data)
    synthesis = transform(organ_key="organ", organ_labels=1, tumor_label=1, gap_mm=2)
    out = synthesis.set_random_state(0)(data)
    assert equal(data, before) and same(out["organ"], before["organ"])
    assert type(out["label"]) is MetaTensor and out["label"].dtype == lesions.dtype
    new = tumor(out, 1) & ~tumor(before, 1)
    assert new.sum() == synthesis.report[0]["label_voxels"] > 0
    assert tumor(out, 1)[tumor(before, 1)].all()
    assert (np.asarray(organ)[new] == 1).all()
    assert not new[:, 18:26, 20:24, 20:24].any()

    with pytest.raises(ValueError, match="organ map must have the label's shape"):
        synthesis({**data, "organ": organ[:, :-1]})
    none = synthesis({**data, "organ": torch.zeros_like(organ)})
    assert equal(none, before)
    assert synthesis.report[0]["reason"].startswith("no organ: no voxel has a label of (1,)")


def test_missing_keys():
    data = {"image": volume()[0]}
    with pytest.raises(KeyError, match="label"):
        transform()(data)
    out = transform(allow_missing_keys=True)(data)
    assert out["image"] is data["image"]


def test_multi_sample_crops_one_of_and_nesting():
    crops = RandCropByPosNegLabeld(
        ["image", "label"], "label", (32, 32, 32), pos=1, neg=0, num_samples=2
    )
    choice = OneOf([transform(size_mm=6), Compose([transform(size_mm=6)])])
    chain = Compose([EnsureTyped(["image", "label"]), crops, choice])
    out = chain.set_random_state(0)(sample("meta"))
    assert len(out) == 2 and all(tumor(x).any() for x in out)
    assert not equal(out[0], out[1])


def chain_state(seed):
    """The state that Compose.set_random_state gives its first random transform."""
    probe = Compose([transform()]).set_random_state(seed)
    return probe.transforms[0].R


def test_lazy_pipeline_gives_the_synthesis_its_pending_grid():
    keys = ["image", "label"]
    resample = Spacingd(keys, (1.5, 1.5, 1.5), mode=("bilinear", "nearest"))
    data = sample("meta", LPS, shape=(64, 64, 24))
    chain = Compose([resample, transform()], lazy=True).set_random_state(0)
    out = chain(data)
    assert tumor(out).any() and not out["image"].pending_operations
    resampled = Compose([resample, Identityd(keys)], lazy=True)(data)
    assert not equal(resampled, data)
    assert equal(out, transform().set_random_state(state=chain_state(0))(resampled))


def test_array_transform_and_aliases():
    assert RandSynthesizeTumorD is RandSynthesizeTumorDict is RandSynthesizeTumord
    image, label = volume()
    array = RandSynthesizeTumor(**SETTINGS).set_random_state(0)
    new_image, new_label = array(image, label)
    out = transform().set_random_state(0)({"image": image, "label": label})
    assert same(out["image"], new_image) and same(out["label"], new_label)
    organ = RandSynthesizeTumor(separate_organ=True, **SETTINGS)(image, 0 * label, label)
    assert (organ[1] == 2).any() and not (organ[1] == 1).any()


def test_scaled_intensity_trains():
    data = sample("tensor")
    data["image"] = ((data["image"] + 175) / 425).clamp(0, 1)
    out = transform(intensity=ts.Scaled()).set_random_state(0)(data)
    assert out["image"].max() <= 1
    weight = torch.nn.Parameter(torch.ones(1))
    (weight * out["image"]).sum().backward()
    assert not out["image"].is_inference() and weight.grad.isfinite()


def test_from_a_json_file(tmp_path):
    pytest.importorskip("yaml")
    from monai.bundle import ConfigParser

    config = {
        "synthesis": {
            "_target_": "tumorsynth.monai.RandSynthesizeTumord",
            "keys": "image",
            "label_key": "label",
            "prob": 1.0,
            "generator": "hu2023",
            "count": [1, 2],
            "organ_labels": [1],
            "when": "$lambda data: data['name'] == 'a'",
            "intensity": {"_target_": "tumorsynth.HU"},
        }
    }
    (tmp_path / "train.json").write_text(json.dumps(config))
    parser = ConfigParser()
    parser.read_config(tmp_path / "train.json")
    synthesis = parser.get_parsed_content("synthesis")
    assert tumor(synthesis(sample())).any()
    assert not tumor(synthesis({**sample(), "name": "b"})).any()


def test_the_bundle_runs(tmp_path):
    pytest.importorskip("yaml")
    nib = pytest.importorskip("nibabel")
    from monai.bundle import run

    image, label = volume()
    for kind, array in (("images", image), ("labels", label)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array[0], LPS), tmp_path / "data" / kind / "a.nii.gz")
    configs = Path(__file__).resolve().parent.parent / "examples" / "monai_bundle" / "configs"
    run(
        config_file=str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        **{"synthesis#count": 1, "synthesis#size_mm": 10},
    )
    new_image, new_label = (
        nib.load(tmp_path / "out" / kind / "a.nii.gz") for kind in ("images", "labels")
    )
    assert np.allclose(new_image.affine, LPS) and np.allclose(new_label.affine, LPS)
    found = np.asarray(new_label.dataobj) == 2
    change = np.asarray(new_image.dataobj) - image[0]
    volume_mm3 = found.sum() * 0.8 * 0.8 * 2.5
    assert volume_mm3 == pytest.approx(np.pi / 6 * 10**3, rel=0.25)
    assert change[found].mean() < -5 and (change != 0).mean() < 0.2


def test_batch():
    items = [sample("meta", LPS, shape=(40, 40, 24), seed=s) for s in range(3)]
    batch = next(iter(DataLoader(Dataset(items), batch_size=3)))
    before = copy.deepcopy(batch)
    synthesis = BatchSynthesizeTumord("image", label_key="label", **SETTINGS).set_random_state(0)
    out = synthesis(batch)
    assert equal(batch, before)
    assert type(out["image"]) is MetaTensor and out["image"].is_batch
    parts = decollate_batch(out)
    assert all(tumor(part).any() for part in parts)
    assert all(np.allclose(part["image"].affine, LPS) for part in parts)
    assert {r["sample"] for r in synthesis.report} == {0, 1, 2}
    assert equal(out, synthesis.set_random_state(0)(batch))

    plain = {key: np.concatenate([np.asarray(out[key])] * 4) for key in ("image", "label")}
    half = BatchSynthesizeTumord("image", prob=0.5, tumor_label=3, **SETTINGS)
    made = tumor(half.set_random_state(1)(plain), 3).any((1, 2, 3, 4))
    assert made.any() and not made.all()
    none = BatchSynthesizeTumord("image", prob=0, **SETTINGS)(batch)
    assert none["image"] is batch["image"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prob": 1.5}, ValueError, "prob must be a probability"),
        ({"p": 0.5}, TypeError, "unknown keyword argument p;"),
        ({"sise_mm": 3}, TypeError, "unknown keyword argument sise_mm"),
        ({"keys": ["image", "label"]}, ValueError, "label_key"),
        ({"tumor_label": 1}, ValueError, "tumor_label must differ"),
        ({"organ_key": "organ", "tumor_label": 1.5}, ValueError, "whole number"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        RandSynthesizeTumord(**{"keys": "image", **SETTINGS, **kwargs})


def test_flips_after_the_synthesis_still_invert():
    chain = Compose([transform(), RandFlipd(["image", "label"], prob=1, spatial_axis=1)])
    out = chain.set_random_state(0)(sample("meta"))
    back = chain.inverse(out)
    assert same(back["label"], np.flip(np.asarray(out["label"]), 2))
