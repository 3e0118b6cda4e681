"""Calls in steps that torch.compile compiles: as without it, to the last bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from phantoms import shared_phantom
from torchio_subjects import make_subject

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.tracing import untraced

SETTINGS = {
    "generator": "hu2023",
    "organ_labels": 1,
    "tumor_label": 20,
    "count": 1,
    "contrast_hu": -60,
}
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(scope="module")
def scan():
    return shared_phantom((2.0, 2.0, 2.0), (64, 64, 48))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_function_makes_the_same_tumours(scan, backend):
    synth, net = ts.SynthesizeTumor(**SETTINGS), torch.nn.Conv3d(1, 1, 1)

    @torch.compile(backend=backend)
    def step(image, label, **call):
        image, label = synth(image, label, spacing=scan.spacing, **call)
        return net(image[None]).mean(), image, label

    for seed in (0, 1):
        loss, *made = step(scan.image, scan.label, seed=seed)
        loss.backward()
        params = synth.params
        assert equal(made, synth(scan.image, scan.label, spacing=scan.spacing, seed=seed))
        assert int((made[1] == 20).sum()) == synth.report[0]["label_voxels"] > 0
        assert equal(step(scan.image, scan.label, params=params)[1:], made)
    assert net.weight.grad is not None
    torch.manual_seed(5)
    _, *drawn = step(scan.image, scan.label)
    torch.manual_seed(5)
    assert equal(drawn, synth(scan.image, scan.label, spacing=scan.spacing))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_to_call_it_compiles(scan, backend):
    synth, adapter = ts.SynthesizeTumor(**SETTINGS), Adapter(**SETTINGS)
    call = {"spacing": scan.spacing, "seed": 0}
    expected = synth(scan.image, scan.label, **call)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.synth = synth

        def forward(self, image, label):
            with torch.autocast("cpu", enabled=False):
                return self.synth(image, label, **call)

    for ways in (
        Step(),
        synth,
        lambda image, label: synth(image, label, **call),
        lambda image, label: synth.synthesize(image, label, **call)[:2],
        lambda image, label: adapter(image, label, **call),
    ):
        compiled = torch.compile(ways, backend=backend)
        given = call if ways is synth else {}
        assert equal(compiled(scan.image, scan.label, **given), expected)


def test_fullgraph_names_the_function_and_the_reason(scan):
    synth = ts.SynthesizeTumor(**SETTINGS)

    @torch.compile(backend="eager", fullgraph=True)
    def step(image, label):
        return synth(image, label, spacing=scan.spacing, seed=0)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"SynthesizeTumor\.forward") as error:
        step(scan.image, scan.label)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):  # it has reasons
        assert "compile without fullgraph=True" in str(error.value)


def test_what_an_untraced_function_calls_is_not_compiled_either():
    seen = []

    def inner(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    class Owner:
        @untraced
        def method(self, x, *, times=1):
            """Doc."""
            return inner(x) * times

    owner = Owner()
    assert owner.method.__doc__ == "Doc." and owner.method.__name__ == "method"
    compiled = torch.compile(lambda x: owner.method(x, times=3) * 2, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [12, 12] and seen == [False]
    with pytest.raises(TypeError, match="times_"):
        owner.method(1, times_=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_monai_transforms_draw_the_same(scan, backend):
    pytest.importorskip("monai")
    from monai.data import MetaTensor

    from tumorsynth.monai import (
        BatchSynthesizeTumord,
        PrepareBatchTumorSynth,
        RandSynthesizeTumor,
        RandSynthesizeTumord,
    )

    image = MetaTensor(scan.image, affine=scan.affine)
    label = MetaTensor(scan.label, affine=scan.affine)
    sample = {"image": image, "label": label}
    batch = {"image": image[None], "label": label[None]}
    for transform, given in (
        (RandSynthesizeTumor(prob=0.7, **SETTINGS), (image, label)),
        (RandSynthesizeTumord("image", prob=0.7, **SETTINGS), (sample,)),
        (BatchSynthesizeTumord("image", prob=0.7, **SETTINGS), (batch,)),
        (PrepareBatchTumorSynth(prob=0.7, **SETTINGS), (batch,)),
    ):
        compiled = torch.compile(lambda *x, t=transform: t(*x), backend=backend)
        made = []
        for call in (transform, compiled):
            transform.set_random_state(3)
            several = [call(*given) for _ in range(4)]
            parts = [out.values() if isinstance(out, dict) else out for out in several]
            made.append([part for out in parts for part in out])
        assert equal(*made)
        assert any((part == 20).any() for part in made[0])


def test_a_monai_trainer_with_compiled_parts(scan):
    pytest.importorskip("ignite")
    from monai.engines import SupervisedTrainer

    from tumorsynth.monai import PrepareBatchTumorSynth

    def train(compiles):
        torch.manual_seed(0)
        net = torch.nn.Conv3d(1, 1, 1)
        prepare = PrepareBatchTumorSynth(spacing=scan.spacing, **SETTINGS).set_random_state(0)
        step = torch.compile(prepare, backend="eager") if compiles else prepare
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=[{"image": scan.image[None], "label": scan.label[None]}] * 2,
            network=torch.compile(net, backend="eager") if compiles else net,
            optimizer=torch.optim.SGD(net.parameters(), 1e-9),
            loss_function=lambda out, label: (out - label).square().mean(),
            prepare_batch=step,
        )
        trainer.run()
        return [net.weight, trainer.state.output[0]["label"]], prepare.report

    (plain, report), (compiled, other) = train(False), train(True)
    assert equal(plain, compiled) and report == other and report[0]["applied"]


@pytest.mark.parametrize("inside", [True, False], ids=["in the step", "callback"])
def test_a_compiled_lightning_module(scan, inside):
    L = pytest.importorskip("lightning")
    from tumorsynth.lightning import TumorSynthCallback

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv3d(1, 1, 1)
            self.synth = ts.SynthesizeTumor(**SETTINGS)
            self.labels = []

        def training_step(self, batch, batch_idx):
            image, label = batch["image"], batch["label"]
            if inside:
                image, label = self.synth(image, label, spacing=scan.spacing, seed=batch_idx)
            self.keep(label)
            return self.net(image).square().mean()

        @torch.compiler.disable
        def keep(self, label):
            self.labels.append(label)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    def train(compiles):
        module = Net()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[]
            if inside
            else [TumorSynthCallback(spacing=scan.spacing, seed=1, **SETTINGS)],
        )
        data = [{"image": scan.image, "label": scan.label}] * 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(
                torch.compile(module, backend="eager") if compiles else module,
                torch.utils.data.DataLoader(data),
            )
        return module.labels

    plain, compiled = train(False), train(True)
    assert len(plain) == 2 and equal(plain, compiled)
    assert all((label == 20).any() for label in compiled)


def test_torchio_transforms_compile(scan):
    pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    subject = make_subject(scan)
    transform = RandomSynthesizeTumor(**SETTINGS)
    made = []
    for call in (transform, torch.compile(lambda x: transform(x), backend="eager")):
        torch.manual_seed(0)
        out = call(subject)
        made.append([out["image"].data, out["label"].data])
    assert equal(*made) and (made[0][1] == 20).any()
