"""The nnU-Net trainer on the real nnunetv2: its trainers, plans, loaders, losses and commands."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnU-Net: pip install nnunetv2")

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import (
    nnUNetTrainerNoDA,
)
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam

from tumorsynth.generators.copy_paste import CopyPaste
from tumorsynth.intensity import HU, ZScore
from tumorsynth.nnunet import shim
from tumorsynth.nnunet.augmentation import runs_on, split_transforms
from tumorsynth.nnunet.plans import read_affine
from tumorsynth.nnunet.settings import read_settings
from tumorsynth.nnunet.trainer import TumorSynthMixin, nnUNetTrainerTumorSynth

MEAN, STD, LOW, HIGH = 95.0, 22.0, -20.0, 210.0
PATCH, SPACING = (24, 32, 32), (3.0, 2.0, 2.0)
LABELS = {"background": 0, "liver": 1, "tumor": 2}
SETTINGS = {"generator": "hu2023", "p": 1.0, "count": 1, "size_mm": 14, "trainer": {}}
ROOT = Path(__file__).resolve().parents[2]


def convolution(n):
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{n}d",
            "kernel_sizes": [[3] * n] * 3,
            "strides": [[1] * n, [2] * n, [2] * n],
            "n_conv_per_stage": [1] * 3,
            "n_conv_per_stage_decoder": [1] * 2,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{n}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(scheme="CTNormalization"):
    common = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "normalization_schemes": [scheme],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
    }
    full = {
        **common,
        "data_identifier": "toy",
        "patch_size": list(PATCH),
        "spacing": list(SPACING),
        "median_image_size_in_voxels": list(PATCH),
        "architecture": convolution(3),
    }
    flat = {
        **full,
        "patch_size": list(PATCH[1:]),
        "spacing": list(SPACING[1:]),
        "architecture": convolution(2),
    }
    return {
        "continue_training": False,
        "dataset_name": "Dataset900_Toy",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": MEAN, "std": STD, "percentile_00_5": LOW, "percentile_99_5": HIGH}
        },
        "configurations": {
            "3d_fullres": {**full, "next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {**full, "previous_stage": "3d_fullres"},
            "2d": flat,
        },
    }


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(trainer class, ...): an nnU-Net trainer over five preprocessed cases."""
    module = sys.modules[nnUNetTrainer.__module__]
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        if not isinstance(getattr(module, name, None), os.PathLike):  # read on import until 2.7
            monkeypatch.setattr(module, name, str(tmp_path / name), raising=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("TUMORSYNTH_NNUNET", raising=False)
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset900_Toy" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "nnUNet_results").mkdir()

    def build(
        cls=nnUNetTrainerTumorSynth,
        labels=LABELS,
        configuration="3d_fullres",
        scheme="CTNormalization",
        channels=("CT",),
        ignored=False,
        **settings,
    ):
        values = [v for v in labels.values() if not isinstance(v, list)]
        for i in range(5):  # nnU-Net's folds
            rng = np.random.default_rng(i)
            shape = (26, 34, 36)
            grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
            seg = (sum(g**2 for g in grid) < 0.75).astype(np.int8)
            hu = 20 + 80 * seg + rng.normal(0, 8, shape)
            if ignored:
                seg[:, :, :12] = labels["ignore"]
            data = ((hu.clip(LOW, HIGH) - MEAN) / STD).astype(np.float32)
            np.savez(folder / f"case_{i}.npz", data=data[None], seg=seg[None])
            where = {v: np.argwhere(seg[None] == v)[:50] for v in values if v}
            annotated = [v for v in sorted(values) if v != labels.get("ignore")]
            for key in (tuple([-1, *annotated]), tuple(annotated)):  # later and earlier releases
                where[key] = np.argwhere(seg[None] >= 0)[::500]
            (folder / f"case_{i}.pkl").write_bytes(pickle.dumps({"class_locations": where}))
        dataset_json = {
            "channel_names": dict(enumerate(channels)),
            "labels": labels,
            "file_ending": ".nii.gz",
            "tumorsynth": {**SETTINGS, **settings},
        }
        if any(isinstance(v, list) for v in labels.values()):
            dataset_json["regions_class_order"] = [1, 2]
        device = torch.device("cpu")
        return cls(plans(scheme), configuration, 0, dataset_json, device=device)

    return build


class Records:
    """Keeps the batch that reaches nnU-Net's own train_step."""

    def train_step(self, batch):
        self.batch = batch
        return super().train_step(batch)


class Augmented(TumorSynthMixin, Records, nnUNetTrainer):
    """The synthesis in front of nnU-Net's whole augmentation."""


class Plain(TumorSynthMixin, Records, nnUNetTrainerNoDA):
    """The synthesis alone."""


def first_batch(trainer):
    np.random.seed(0)
    torch.manual_seed(0)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    return next(trainer.dataloader_train)


def test_a_bank_of_own_lesions_paints(make, tmp_path):
    at = torch.stack(torch.meshgrid(*[torch.arange(48.0)] * 3, indexing="ij"))
    lesion = (at - 24).norm(dim=0) < 7
    noise = 5 * torch.randn(at.shape[1:], generator=torch.Generator().manual_seed(0))
    image = 100.0 - 45 * lesion + noise
    path = tmp_path / "bank.safetensors"
    CopyPaste.from_scans([(image, 1 + lesion.int(), (1, 1, 1))]).save(path)
    trainer = make(Plain, generator=str(path))
    trainer.train_step(first_batch(trainer))
    data, target = trainer.batch["data"], trainer.batch["target"]
    target = target[0] if isinstance(target, list) else target
    for sample in range(2):
        tumor, liver = target[sample] == 2, target[sample] == 1
        assert int(tumor.sum()) > 30
        change = float(data[sample][tumor].mean() - data[sample][liver].mean()) * STD
        assert -55 < change < -20


def test_a_step_trains_on_tumours_with_targets_at_every_level(make):
    trainer = make(Augmented)
    batch = first_batch(trainer)
    assert not (batch["target"] == 2).any()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    result = trainer.train_step(batch)
    assert np.isfinite(result["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))  # noqa: B905

    target = trainer.batch["target"]
    assert isinstance(target, list) and len(target) == 2
    scales = trainer._get_deep_supervision_scales()
    for b in range(2):
        assert (target[0][b] == 2).sum() > 30
        levels = DownsampleSegForDSTransform(scales)(segmentation=target[0][b])["segmentation"]
        assert all(torch.equal(level, t[b]) for level, t in zip(levels, target, strict=True))
    assert set(target[0].unique().tolist()) <= {0, 1, 2}  # -1 is gone, as nnU-Net wants it
    assert trainer.batch["data"].shape == (2, 1, *PATCH)
    assert not trainer.batch["data"].is_inference()
    validation = next(trainer.dataloader_val)
    assert isinstance(validation["target"], list) and not (validation["target"][0] == 2).any()


def test_only_the_tumor_and_its_surroundings_change_and_by_hu(make):
    trainer = make(Plain)
    batch = first_batch(trainer)
    trainer.train_step(batch)
    change = (trainer.batch["data"] - batch["data"]) * STD
    label = trainer.batch["target"][0]
    for record in trainer.synthesis.report:
        one, its_change = label[record["sample"]] == 2, change[record["sample"]]
        volume = float(one.sum()) * np.prod(SPACING)
        assert volume == pytest.approx(np.pi / 6 * 14**3, rel=0.25)  # a sphere of size_mm
        assert int(one.sum()) == record["label_voxels"]
        assert float(its_change[one].mean()) == pytest.approx(record["hu_change"], rel=1e-3)
        assert record["hu_change"] < -5
        assert (its_change != 0).sum() < 6 * one.sum()
    values = trainer.batch["data"] * STD + MEAN
    assert values.min() >= LOW - 0.01 and values.max() <= HIGH + 0.01  # still clipped


def test_the_gate_scores_with_the_network_in_training(make):
    """The setting of dataset.json; deep supervision gives a list, full resolution first."""
    gate = {"scorer": "network", "least": 0.0, "tries": 1, "visibility": [0, None]}
    trainer = make(Plain, gate=gate)
    batch = first_batch(trainer)
    assert trainer.network.decoder.deep_supervision
    trainer.network.train()
    layer = trainer.network.decoder.seg_layers[-1]
    layer.weight.data.zero_()
    for bias, share in ((-20.0, 0.0), (20.0, 1.0)):
        layer.bias.data = torch.tensor([0.0, 0.0, bias])
        target = batch["target"]
        target = target[0] if isinstance(target, list) else target
        trainer._synthesize(batch["data"].clone(), target.clone())
        scores = [r["scores"]["scorer"] for r in trainer.synthesis.report if "scores" in r]
        assert scores and set(scores) == {share}
    assert trainer.network.training


@pytest.mark.parametrize(
    ("gate", "error"),
    [
        ({"scorer": "net"}, 'scorer must be "network"'),
        ({"leats": 0.5}, "did you mean least"),
        ({"least": 2, "most": 1}, "least must not be above most"),
        ("on", "gate must be true, false or an object"),
    ],
)
def test_wrong_gates_are_refused(make, gate, error):
    with pytest.raises((ValueError, TypeError), match=error):
        make(Plain, gate=gate).initialize()


@pytest.mark.parametrize("labels", [LABELS, {"background": 0, "liver": [1, 2], "tumor": [2]}])
def test_a_trained_network_judges_scans_in_hu(make, labels):
    from tumorsynth import Gate, SynthesizeTumor
    from tumorsynth.appearance.gate import LIMITS
    from tumorsynth.nnunet import segmenter_scorer

    trainer = make(Plain, labels=labels, organ_labels=[1], tumor_label=2)
    trainer.initialize()
    trainer.network.eval()
    seen = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    layer = trainer.network.decoder.seg_layers[-1]
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([0.0, 0.0, 20.0][: len(layer.bias)])
    if labels is not LABELS:
        layer.bias.data = torch.tensor([0.0, 20.0])
    scorer = segmenter_scorer(trainer)
    assert scorer.patch_size == PATCH and scorer.spacing == SPACING and scorer.orientation == "SPL"
    gate = Gate(**dict.fromkeys(LIMITS), scorer=scorer, least=0.9, tries=1)
    synth = SynthesizeTumor("hu2023", 1, 2, count=1, size_mm=14, gate=gate)
    rng = torch.Generator().manual_seed(0)
    image = 100 + 8 * torch.randn(1, 40, 44, 48, generator=rng)
    image += torch.arange(48.0)  # brighter towards the head
    label = torch.ones(image.shape, dtype=torch.int16)
    synth(image, label, affine=np.diag([1.5, 1.5, 1.5, 1.0]), seed=0)
    assert synth.report[0]["scores"]["scorer"] == 1.0
    (patch,) = seen[0][0]
    assert patch.shape == PATCH and patch.min() >= (LOW - MEAN) / STD - 1e-4
    inside = patch[(patch != 0).any(2).any(1)]  # z comes first
    assert inside[-1].mean() > inside[0].mean() + 0.3
    with pytest.raises(ValueError, match="tumor_label must be a label .*'tumour'"):
        segmenter_scorer(trainer, "tumour")
    trainer.network = None
    with pytest.raises(ValueError, match="predictor must hold a network"):
        segmenter_scorer(trainer)


def test_voxels_beyond_the_scan_and_of_the_ignore_label_stay(make):
    trainer = make(Plain, labels={**LABELS, "ignore": 3}, ignored=True, size_mm=16, count=2)
    batch = first_batch(trainer)
    batch["target"][:, :, :10] = -1
    batch["data"][:, :, :10] = 0
    given = batch["target"].clone()
    image, label = trainer._synthesize(batch["data"], batch["target"])
    assert torch.equal(batch["target"], given)
    assert (label == 2).any()
    kept = (given == -1) | (given == 3)
    assert kept.any() and torch.equal(label[kept], given[kept])
    beyond = given == -1
    assert (image[beyond] == 0).all()


def test_regions_get_the_tumor_and_the_organ_around_it(make):
    labels = {"background": 0, "liver": [1, 2], "tumor": 2}
    trainer = make(Augmented, labels=labels)
    batch = first_batch(trainer)
    result = trainer.train_step(batch)
    assert np.isfinite(result["loss"])
    organ, tumor = trainer.batch["target"][0].bool().unbind(1)
    assert tumor.any() and not (tumor & ~organ).any() and (organ & ~tumor).any()
    assert trainer.synthesis.synth.organ_labels == (1,)


def test_probability_and_healthy_only(make):
    trainer = make(Plain, p=0.0)
    batch = first_batch(trainer)
    trainer.train_step(batch)
    assert torch.equal(trainer.batch["data"], batch["data"])

    trainer = make(Plain, healthy_only=True)
    batch = first_batch(trainer)
    batch["target"][0, 0, 10:14, 10:14, 10:14] = 2
    trainer.train_step(batch)
    same = [torch.equal(a, b) for a, b in zip(trainer.batch["data"], batch["data"], strict=True)]
    assert same == [True, False]


def test_numpys_seed_reproduces_a_step_without_drawing_from_torchs_stream(make):
    made = []
    for _ in range(2):
        trainer = make(Augmented)
        batch = first_batch(trainer)
        state = torch.get_rng_state()
        trainer._deferred(*trainer._synthesize(batch["data"], batch["target"]), trainer._rng)
        assert torch.equal(torch.get_rng_state(), state)
        trainer.train_step(batch)
        made.append(trainer.batch["data"])
    assert torch.equal(*made)


def test_the_learning_rate_follows_nnunets_schedule(make):
    """Also with 2.5, whose own schedule today's torch cannot build."""
    trainer = make(trainer={"num_epochs": 10})
    trainer.initialize()
    assert isinstance(trainer.lr_scheduler, PolyLRScheduler)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.99
    for epoch in (0, 5, 9):
        trainer.lr_scheduler.step(epoch)
        rate = trainer.initial_lr * (1 - epoch / 10) ** 0.9
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_another_trainers_optimizer_is_kept(make):
    class Adam(TumorSynthMixin, nnUNetTrainerAdam):
        pass

    trainer = make(Adam)
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert isinstance(trainer.lr_scheduler, PolyLRScheduler)


def test_an_error_of_the_optimizer_is_raised(make):
    class Broken(TumorSynthMixin, nnUNetTrainer):
        def configure_optimizers(self):
            return super().configure_optimizers("warmup")

    with pytest.raises(TypeError, match="positional argument"):
        make(Broken).initialize()


def test_an_epoch_logs_its_tumors(make):
    trainer = make(Plain, trainer={"num_epochs": 1, "num_iterations_per_epoch": 2})
    batch = first_batch(trainer)
    assert trainer.num_epochs == 1 and trainer.num_iterations_per_epoch == 2
    trainer.on_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    text = Path(trainer.log_file).read_text()
    assert "tumorsynth: 2 tumours in 2 patches" in text
    assert "p=1, generator='hu2023'" in text


def test_an_epoch_counts_skipped_tumors_by_their_code(make):
    trainer = make(Plain, trainer={"num_epochs": 1, "num_iterations_per_epoch": 1}, p=0)
    batch = first_batch(trainer)
    trainer.on_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    assert "tumorsynth: 0 tumours in 2 patches; 2 x not_selected" in (
        Path(trainer.log_file).read_text()
    )


def test_checkpoints_hold_no_generator(make, tmp_path):
    trainer = make(generator="liver-early")
    first_batch(trainer)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    held = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert held["network_weights"].keys() == trainer.network.state_dict().keys()
    assert held["trainer_name"] == "nnUNetTrainerTumorSynth"
    assert len(pickle.dumps({k: v for k, v in held.items() if "weights" not in k})) < 200_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configuration": "2d"}, "needs a 3-D configuration, got 2d"),
        ({"configuration": "3d_cascade_fullres"}, "cannot train 3d_cascade_fullres"),
        ({"channels": ("CT", "PET")}, "images of one channel"),
        ({"scheme": "ZScoreNormalization"}, "to be CTNormalization, got ZScoreNormalization"),
    ],
)
def test_unusable_configurations_are_refused_by_name(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).initialize()


def test_raw_hu(make):
    trainer = make(scheme="NoNormalization")
    trainer.initialize()
    assert isinstance(trainer.synthesis.synth.intensity, HU)


def test_zscore_is_the_plans_own(make):
    trainer = make()
    trainer.initialize()
    assert trainer.synthesis.synth.intensity == ZScore(MEAN, STD, LOW, HIGH)


def test_only_what_moves_voxels_comes_before_the_synthesis():
    arguments = {
        "patch_size": PATCH,
        "rotation_for_DA": (-0.5, 0.5),
        "deep_supervision_scales": [[1, 1, 1]],
        "mirror_axes": (0, 1, 2),
    }
    for dummy_2d in (False, True):
        pipeline = nnUNetTrainer.get_training_transforms(
            **arguments, do_dummy_2d_data_aug=dummy_2d
        ).transforms
        first, rest = split_transforms(pipeline)
        spatial = ["Convert3DTo2DTransform", "SpatialTransform", "Convert2DTo3DTransform"]
        names = [type(t).__name__ for t in first]
        assert names == (spatial if dummy_2d else spatial[1:2])
        assert first + rest == pipeline and len(rest) > 8
    plain = nnUNetTrainer.get_validation_transforms([[1, 1, 1]]).transforms
    assert split_transforms(plain) == ([], plain)
    assert (
        split_transforms(pipeline[:1] + pipeline[3:])[0] == []
    )  # never a 3-D patch folded into 2-D


class OnlyOnTheCPU(BasicTransform):
    """Like some of batchgeneratorsv2; the device "meta" stands in for a GPU."""

    def apply(self, data_dict, **params):
        assert data_dict["image"].device.type == "cpu"
        return data_dict


def test_a_transform_that_cannot_run_on_the_device_is_detected():
    meta = torch.device("meta")
    numpys = np.random.get_state()[1].copy()
    flip = MirrorTransform((0, 1, 2))
    assert runs_on(flip, meta) and runs_on(RandomTransform(flip, 0.1), meta)
    assert not runs_on(OnlyOnTheCPU(), meta)
    assert not runs_on(RandomTransform(OnlyOnTheCPU(), 0.01), meta)
    choice = OneOfTransform([RandomTransform(flip, 1), RandomTransform(OnlyOnTheCPU(), 0)])
    assert not runs_on(choice, meta)
    assert runs_on(OnlyOnTheCPU(), torch.device("cpu"))
    assert (np.random.get_state()[1] == numpys).all()


def test_the_loaders_may_be_made_before_the_network_as_in_nnunet_2_5(make):
    trainer = make(Augmented)
    pipeline = trainer.get_training_transforms(
        PATCH, (-0.5, 0.5), [[1, 1, 1]], (0, 1, 2), False, ignore_label=None
    )
    assert [type(t).__name__ for t in pipeline.transforms] == ["SpatialTransform"]
    deferred = list(trainer._deferred.transforms)
    trainer.initialize()
    assert trainer._deferred.transforms == deferred and len(deferred) > 8


def test_the_workers_transforms_are_small_and_hold_no_generator(make):
    """Spawned workers unpickle them."""
    trainer = make(Augmented, generator="liver-early")
    trainer.initialize()
    trainer.synthesis.synth.handle.get("cpu")
    arguments = (PATCH, (-0.5, 0.5), [[1, 1, 1]], (0, 1, 2), False)
    raw = pickle.dumps(trainer.get_training_transforms(*arguments))
    assert len(raw) < 10_000 and b"tumorsynth" not in raw
    sample = {"image": torch.zeros(1, *PATCH), "segmentation": torch.zeros(1, *PATCH)}
    assert pickle.loads(raw)(**sample)["image"].shape == (1, *PATCH)


def test_the_affine_follows_the_readers_axes_and_the_plans_permutation(make):
    trainer = make()
    configuration = trainer.configuration_manager
    straight = read_affine(trainer.plans_manager, configuration)
    expected = [[0, 0, -2.0, 0], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(straight, expected)
    trainer.plans_manager.plans["transpose_forward"] = [1, 0, 2]  # y is the coarsest axis
    turned = read_affine(trainer.plans_manager, configuration)
    expected = [[0, 0, -2.0, 0], [-3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(turned, expected)


def settings(labels=LABELS, **given):
    return read_settings({"labels": labels, "tumorsynth": given}, ignore_label=labels.get("ignore"))


def test_labels_by_name_by_value_and_by_default():
    named = settings(organ_labels=["liver"], tumor_label="tumor")
    assert named["organ_labels"] == (1,) and named["tumor_label"] == 2 and named["p"] == 0.5
    assert settings(organ_labels=1, tumor_label=2) == named
    assert settings() == named
    several = {"background": 0, "kidney": 1, "spleen": 2, "lesion": 3, "ignore": 4}
    assert settings(several, organ_labels=["kidney", 2])["organ_labels"] == (1, 2)
    regions = {"background": 0, "whole kidney": [1, 2, 3], "masses": [2, 3], "cancer": 2}
    got = settings(regions, organ_labels="whole kidney")
    assert got["organ_labels"] == (1, 3) and got["tumor_label"] == 2


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ({"background": 0, "liver": 1, "vessel": 2}, {}, "tumor_label must be given"),
        ({"background": 0, "liver": 1, "spleen": 3, "tumor": 2}, {}, "organ_labels must be given"),
        (LABELS, {"tumor_label": "tumour"}, "tumor_label must be names .* got 'tumour'; it has"),
        (LABELS, {"organ_labels": [7]}, "organ_labels must be names .* got 7"),
        (LABELS, {"organ_labels": "tumor"}, "organ_labels must hold a label beside the tumour's"),
        (
            {"background": 0, "all": [1, 2], "tumor": [2, 3]},
            {"tumor_label": "tumor"},
            "tumor_label must be one value",
        ),
        (LABELS, {"p": 2}, "p must be a probability"),
        (LABELS, {"p": True}, "p must be a probability"),
        (LABELS, {"trainer": {"num_epochs": 0}}, "whole numbers of at least 1"),
        (LABELS, {"trainer": {"num_epoch": 5}}, "trainer may set num_epochs"),
    ],
)
def test_wrong_settings_are_refused(labels, given, message):
    with pytest.raises(ValueError, match=message):
        settings(labels, **given)


def test_settings_of_the_environment_take_precedence(monkeypatch):
    monkeypatch.setenv("TUMORSYNTH_NNUNET", json.dumps({"p": 0.25, "size_mm": "liver"}))
    got = settings(p=0.75, count=2)
    assert (got["p"], got["size_mm"], got["count"]) == (0.25, "liver", 2)
    monkeypatch.setenv("TUMORSYNTH_NNUNET", "p=1")
    with pytest.raises(ValueError, match="TUMORSYNTH_NNUNET must be JSON"):
        settings()
    monkeypatch.delenv("TUMORSYNTH_NNUNET")
    with pytest.raises(TypeError, match="unknown tumorsynth setting sise_mm"):
        settings(sise_mm=3)


# Stands in for timm, of which nnU-Net's other architectures name classes when they are imported.
TIMM = """
import torch

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return torch.nn.Identity
"""


@pytest.fixture(scope="module")
def with_timm(tmp_path_factory):
    """An environment in which nnU-Net can import all of its trainers."""
    here = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(here)}
    try:
        import timm  # noqa: F401
    except ImportError:
        folder = tmp_path_factory.mktemp("stand-in")
        for module in ("__init__", "layers", "models/__init__", "models/eva"):
            path = folder / "timm" / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TIMM if module in ("layers", "models/eva") else "")
        environment["PYTHONPATH"] += os.pathsep + str(folder)
    return environment


@pytest.mark.slow  # nnU-Net imports every trainer it has
def test_nnunet_finds_the_trainer_through_the_shim(with_timm):
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnU-Net 2.8 looks outside")
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "import tumorsynth.nnunet as t\n"
        "assert find('nnUNetTrainerTumorSynth') is t.nnUNetTrainerTumorSynth\n"
    )
    environment = {**with_timm, "nnUNet_extTrainer": str(shim.folder())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_command_names_the_folder_of_the_shim():
    command = [sys.executable, "-m", "tumorsynth.commands.main", "nnunet", "path"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    copied = Path(done.stdout.strip()) / "nnUNetTrainerTumorSynth.py"
    assert copied.read_text() == shim.SHIM.read_text()


def test_install_copies_the_shim_among_nnunets_trainers(tmp_path):
    trainers = tmp_path / "nnunetv2" / "training" / "nnUNetTrainer"
    trainers.mkdir(parents=True)
    (tmp_path / "nnunetv2" / "__init__.py").touch()
    code = "from tumorsynth.nnunet.shim import install; print(install())"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    copy = Path(done.stdout.strip())
    assert copy.parent == trainers and copy.read_text() == shim.SHIM.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_plans_trains_and_predicts(with_timm, tmp_path):
    trainers = Path(sys.modules[nnUNetTrainer.__module__].__file__).parent
    outside = importlib.util.find_spec("nnunetv2.utilities.find_objects")  # nnU-Net 2.8
    if outside is None and not (trainers / shim.SHIM.name).is_file():
        pytest.skip("this nnU-Net needs `tumorsynth nnunet install` first")
    recipe = ROOT / "examples" / "nnunet" / "recipe.py"
    done = subprocess.run(
        [sys.executable, str(recipe), str(tmp_path / "toy")],
        env=with_timm,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "predicted toy_5.nii.gz" in done.stdout
    results = tmp_path / "toy" / "nnUNet_results" / "Dataset900_Toy"
    (fold,) = results.glob("nnUNetTrainerTumorSynth__nnUNetPlans__3d_fullres/fold_0")
    assert (fold / "checkpoint_final.pth").is_file()
    (log,) = fold.glob("training_log_*.txt")
    assert "tumorsynth: 8 tumours in 8 patches" in log.read_text()
    judge, raw = ROOT / "examples" / "nnunet" / "judge.py", tmp_path / "toy" / "nnUNet_raw"
    scan = raw / "Dataset900_Toy" / "imagesTr" / "toy_0_0000.nii.gz"
    label = raw / "Dataset900_Toy" / "labelsTr" / "toy_0.nii.gz"
    done = subprocess.run(
        [sys.executable, str(judge), str(fold.parent), str(scan), str(label), "--least", "0"],
        env=with_timm,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found" in done.stdout and (tmp_path / "judged" / "label.nii.gz").is_file()
