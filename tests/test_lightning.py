"""The callback in real Lightning training runs on the CPU."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning", reason="needs Lightning")

from tiny import tiny_generator  # noqa: E402

import tumorsynth as ts  # noqa: E402
from tumorsynth.appearance.gate import Gate  # noqa: E402
from tumorsynth.lightning import TumorSynthCallback  # noqa: E402

# with a contrast no tumour is skipped as too faint
SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10), "contrast_hu": -40}


def scans(n=4, ill=()):
    """n samples of (image, label): an ellipsoid of organ 1, in some with a tumour of label 2."""
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    label = (sum(g**2 for g in grid) < 0.7).astype(np.int64)[None]
    out = []
    for i in range(n):
        image = (60 + 40 * label + rng.normal(0, 10, label.shape)).astype(np.float32)
        its_label = torch.from_numpy(label.copy())
        if i in ill:
            its_label[:, 18:22, 18:22, 18:22] = 2
        out.append((torch.from_numpy(image), its_label))
    return out


def as_dicts(pairs, **more):
    return [{"image": image, "label": label, **more} for image, label in pairs]


class Segmenter(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv3d(1, 3, 1)
        self.seen = {"training": [], "validation": []}

    def step(self, batch, stage):
        image, label = batch if isinstance(batch, list) else (batch["image"], batch["label"])
        self.seen[stage].append((image, label))
        return torch.nn.functional.cross_entropy(self.net(image / 100), label[:, 0])

    def training_step(self, batch, batch_idx):
        return self.step(batch, "training")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "validation")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(data, batch_size=2):
    return torch.utils.data.DataLoader(data, batch_size=batch_size)


def fit(
    data,
    callback,
    epochs=1,
    module=None,
    folder=None,
    resume=None,
    validate=False,
    precision=None,
    deterministic=None,
):
    module = Segmenter() if module is None else module
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        deterministic=deterministic,
        max_epochs=epochs,
        callbacks=callback if isinstance(callback, list) else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=1 if validate else 0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of workers
        trainer.fit(module, loader(data), loader(data) if validate else None, ckpt_path=resume)
    return module, trainer


def labels(module, stage="training"):
    return [label for _, label in module.seen[stage]]


@pytest.mark.parametrize("kind", [dict, list])
def test_only_training_sees_tumours(kind):
    pairs = scans()
    before = [(image.clone(), label.clone()) for image, label in pairs]
    callback = TumorSynthCallback(**SETTINGS)
    data = as_dicts(pairs) if kind is dict else pairs  # torch collates pairs to a list
    module = Segmenter()
    start = module.net.weight.detach().clone()
    fit(data, callback, module=module, validate=True)
    assert len(labels(module)) == 2
    for image, label in module.seen["training"]:
        assert all((one == 2).any() for one in label)
        assert not image.is_inference()
    assert len(labels(module, "validation")) == 3
    assert not any((label == 2).any() for label in labels(module, "validation"))
    assert not torch.equal(module.net.weight, start)
    for (image, label), (old_image, old_label) in zip(pairs, before, strict=True):
        assert torch.equal(image, old_image) and torch.equal(label, old_label)
    assert [record["sample"] for record in callback.report] == [0, 1]


def test_seed_everything_reproduces_and_steps_differ():
    def run(everything, **kwargs):
        L.seed_everything(everything)
        return labels(fit(as_dicts(scans()), TumorSynthCallback(**SETTINGS, **kwargs), 2)[0])

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({one.numpy().tobytes() for label in first for one in label}) == 8
    assert torch.equal(run(1, seed=5)[3], run(2, seed=5)[3])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    data = as_dicts(scans())
    L.seed_everything(0)
    whole = labels(fit(data, TumorSynthCallback(**SETTINGS), epochs=2)[0])
    L.seed_everything(0)
    module, trainer = fit(data, TumorSynthCallback(**SETTINGS), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    L.seed_everything(99)
    rest = fit(data, TumorSynthCallback(**SETTINGS), epochs=2, resume=tmp_path / "half.ckpt")[0]
    assert len(labels(rest)) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], labels(rest), strict=True))


def test_no_weight_of_the_generator_enters_the_checkpoint(tmp_path):
    callback = TumorSynthCallback(generator="liver-early", count=1, size_mm=8)
    module, trainer = fit(as_dicts(scans(2)), callback)
    assert callback.report[0]["generator"].startswith("liver-early")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    held = torch.load(tmp_path / "end.ckpt", weights_only=False)
    assert held["state_dict"].keys() == {"net.weight", "net.bias"}
    (state,) = held["callbacks"].values()
    assert state == {"seed": callback.seed}
    assert (tmp_path / "end.ckpt").stat().st_size < 20_000
    fresh = TumorSynthCallback(generator="liver-early")
    assert len(pickle.dumps(fresh)) < 20_000


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["by rule", "diffusion"])
def test_a_deterministic_trainer_makes_the_same_tumours(monkeypatch, generator):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it, too
    made = []
    try:
        for deterministic in (True, None):
            module, _ = fit(
                as_dicts(scans()),
                TumorSynthCallback(**{**SETTINGS, "generator": generator, "seed": 0}),
                deterministic=deterministic,
            )
            made.append(labels(module))
            assert torch.are_deterministic_algorithms_enabled() is bool(deterministic)
            torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other) and (one == 2).any()


def test_two_callbacks_of_a_trainer_keep_their_own_seeds(tmp_path):
    """For example one for each organ; Lightning tells their states apart by a key."""

    class Four(Segmenter):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv3d(1, 4, 1)

    data = as_dicts(scans(2))
    two = [TumorSynthCallback(**SETTINGS, tumor_label=label) for label in (2, 3)]
    module, trainer = fit(data, two, module=Four())
    (label,) = labels(module)
    assert all((one == value).any() for one in label for value in (2, 3))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = [TumorSynthCallback(**SETTINGS, tumor_label=label) for label in (2, 3)]
    fit(data, again[::-1], epochs=2, module=Four(), resume=tmp_path / "end.ckpt")
    assert [one.seed for one in again] == [one.seed for one in two] and two[0].seed != two[1].seed


TWINS = [  # of one organ and one tumour label, and of different settings
    ({"size_mm": (5, 10)}, {"size_mm": (20, 40)}),
    ({"generator": "hu2023"}, {"generator": "liver-early"}),
    ({"p": 0.2}, {"p": 0.4}),
    ({"seed": 1}, {"seed": 2}),  # otherwise alike
    ({"contrast_hu": -40}, {"contrast_hu": (20, 30)}),
]


@pytest.mark.parametrize(("one", "other"), TWINS)
def test_two_callbacks_of_one_organ_go_into_one_trainer(one, other):
    settings = {"generator": "hu2023", "organ_labels": 1}
    two = [TumorSynthCallback(**{**settings, **own}) for own in (one, other)]
    L.Trainer(callbacks=two, accelerator="cpu", logger=False, enable_checkpointing=False)


def test_the_state_key_is_the_same_in_another_process_and_during_training():
    """The address of an object in memory changes with the process."""
    gates = [Gate(scorer=lambda *crop: True, least=0.5) for _ in range(2)]
    keys = {TumorSynthCallback(generator=tiny_generator(), gate=gate).state_key for gate in gates}
    assert len(keys) == 1
    callback = TumorSynthCallback(**SETTINGS)
    before = callback.state_key
    fit(as_dicts(scans(2)), callback)
    assert callback.seed is not None and callback.state_key == before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_of_the_trainer(precision):
    callback = TumorSynthCallback(**SETTINGS)
    module, _ = fit(scans(2), callback, precision=precision)
    ((image, label),) = module.seen["training"]
    wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert image.dtype == wanted.get(precision, torch.float32) and image.isfinite().all()
    for record, one in zip(callback.report, label, strict=True):
        assert int((one == 2).sum()) == record["label_voxels"] and record["hu_change"] < -8


def test_p_and_healthy_only():
    pairs = scans(4, ill=(1, 2))
    module, _ = fit(as_dicts(pairs), TumorSynthCallback(healthy_only=True, **SETTINGS))
    got = torch.cat(labels(module))
    changed = [not torch.equal(a, label) for a, (_, label) in zip(got, pairs, strict=True)]
    assert changed == [True, False, False, True]
    module, _ = fit(as_dicts(scans()), TumorSynthCallback(p=0, **SETTINGS))
    assert not (torch.cat(labels(module)) == 2).any()


def test_spacing_from_the_batch_and_a_separate_organ_map():
    pairs = scans(2)
    mm = torch.tensor([0.8, 0.8, 2.5])
    data = [
        {"ct": image, "lesions": torch.zeros_like(label), "organs": label, "mm": mm}
        for image, label in pairs
    ]

    class Named(Segmenter):
        def step(self, batch, stage):
            return super().step({"image": batch["ct"], "label": batch["lesions"]}, stage)

    settings = {**SETTINGS, "size_mm": 12, "tumor_label": 1}
    callback = TumorSynthCallback("ct", "lesions", organ="organs", spacing="mm", **settings)
    module, _ = fit(data, callback, module=Named())
    (label,) = labels(module)
    for one in label:
        volume = float((one == 1).sum()) * 0.8 * 0.8 * 2.5
        assert volume == pytest.approx(np.pi / 6 * 12**3, rel=0.15)
    fixed = TumorSynthCallback(
        "ct", "lesions", organ="organs", spacing=(0.8, 0.8, 2.5), seed=callback.seed, **settings
    )
    assert torch.equal(labels(fit(data, fixed, module=Named())[0])[0], label)


def test_batches_that_cannot_be_changed_are_refused_with_the_fix():
    class Tuples(Segmenter):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return tuple(batch)

    with pytest.raises(TypeError, match="must be a dictionary or a list.*got tuple"):
        fit(scans(), TumorSynthCallback(**SETTINGS), module=Tuples())
    with pytest.raises(ValueError, match="the batch has no 'seg', it has \\['image', 'label'\\]"):
        fit(as_dicts(scans()), TumorSynthCallback(label="seg", **SETTINGS))


@pytest.mark.parametrize("argument", ["image", "label", "organ", "spacing"])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_missing_entry_is_named_by_its_argument(argument, kind):
    where, data = ("mm", as_dicts(scans(2))) if kind is dict else (7, scans(2))
    with pytest.raises(ValueError, match=f"has no {where!r}, .* with {argument}=... of Tumor"):
        fit(data, TumorSynthCallback(**SETTINGS, **{argument: where}))


def test_a_batch_on_two_grids_is_refused_by_its_keys():
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    batch = {
        "ct": data.MetaTensor(torch.zeros(1, 1, 8, 8, 8), affine=np.eye(4)),
        "seg": data.MetaTensor(torch.zeros(1, 1, 8, 8, 8), affine=2 * np.eye(4)),
    }
    callback = TumorSynthCallback("ct", "seg", **SETTINGS)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="'ct' and 'seg' must share one grid"):
        callback.on_train_batch_start(trainer, None, batch, 0)


def test_a_batch_without_channels_gets_the_fix():
    data = [(image[0], label[0]) for image, label in scans()]
    with pytest.raises(ValueError, match=r"if these are 2 scans, .* image\[:, None\]"):
        fit(data, TumorSynthCallback(**SETTINGS))


def test_bad_arguments_and_repr():
    for p in (2, True):
        with pytest.raises(ValueError, match="p must be a probability .* pass p=1"):
            TumorSynthCallback(p=p)
    for seed in (True, "a", -1, 1.5):
        with pytest.raises(ValueError, match="seed must be one non-negative int"):
            TumorSynthCallback(seed=seed)
    with pytest.raises(
        TypeError, match="unknown keyword argument sise_mm of TumorSynthCallback; did"
    ):
        TumorSynthCallback(sise_mm=3)
    assert repr(TumorSynthCallback(p=0.5, **SETTINGS)) == (
        "TumorSynthCallback(p=0.5, generator='hu2023', count=1, size_mm=(8, 10), contrast_hu=-40)"
    )
    assert repr(TumorSynthCallback()) == "TumorSynthCallback(p=1)"


def test_the_older_package_runs_it_too():
    """With both installed, the callback derives from the newer package's class."""
    pl = pytest.importorskip("pytorch_lightning")

    class Older(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv3d(1, 3, 1)

        def training_step(self, batch, batch_idx):
            assert all((label == 2).any() for label in batch["label"])
            return self.net(batch["image"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    callback = TumorSynthCallback(**SETTINGS)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Older(), loader(as_dicts(scans())))
    assert trainer.global_step == 2 and callback.report


def test_plain_loop_in_two_lines():
    synth = ts.SynthesizeTumor(**SETTINGS)
    for image, label in loader(scans()):
        image, label = synth(image, label, spacing=(1, 1, 1))
        assert all((one == 2).any() for one in label)
