"""`SegmenterScorer` in the frameworks: on the batch, with the network in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tumorsynth as ts
from tumorsynth.appearance.gate import LIMITS, Gate

OPEN = Gate(**dict.fromkeys(LIMITS), tries=1)
SETTINGS = {"organ_labels": 1, "tumor_label": 2, "count": 1, "size_mm": 14, "generator": "hu2023"}


def batch(size=2, side=32):
    rng = torch.Generator().manual_seed(0)
    image = 110 + 3 * torch.randn(size, 1, side, side, side, generator=rng)
    return {"image": image, "label": torch.ones(image.shape, dtype=torch.int16)}


class Net(nn.Module):
    """Logits of three classes; a bias decides whether it finds everything or nothing."""

    def __init__(self, bias=-9.0):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)
        nn.init.zeros_(self.conv.weight)
        self.conv.bias.data = torch.tensor([0.0, 0.0, bias])
        self.calls = []

    def forward(self, x):
        self.calls.append((tuple(x.shape), self.training))
        return self.conv(x)


def test_a_batch_transform_scores_with_the_network_as_it_is_now():
    monai = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
    network = Net().train()
    gate = replace(OPEN, scorer=ts.SegmenterScorer(network, 2, 32), least=0.5)
    transform = monai.BatchSynthesizeTumord(
        "image", "label", gate=gate, spacing=(1, 1, 1), **SETTINGS
    ).set_random_state(0)
    transform(batch())
    assert [record["scores"]["scorer"] for record in transform.report] == [0.0, 0.0]
    assert not any(record["applied"] for record in transform.report)
    network.conv.bias.data[2] = 9.0  # it has learned
    transform(batch())
    assert [record["scores"]["scorer"] for record in transform.report] == [1.0, 1.0]
    assert all(record["applied"] for record in transform.report)
    assert network.training and set(network.calls) == {((1, 1, 32, 32, 32), False)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("UNet", {"channels": (4, 8), "strides": (2,)}),
        ("BasicUNet", {"features": (4, 4, 8, 8, 8, 4)}),
        ("BasicUNetPlusPlus", {"features": (4, 4, 8, 8, 8, 4), "deep_supervision": True}),
        (
            "DynUNet",
            {
                "kernel_size": (3, 3, 3),
                "strides": (1, 2, 2),
                "upsample_kernel_size": (2, 2),
                "deep_supervision": True,
                "deep_supr_num": 1,
            },
        ),
        ("SegResNet", {"init_filters": 8}),
        ("SegResNetDS", {"init_filters": 8, "dsdepth": 2}),
        ("UNETR", {"img_size": (32, 32, 32), "feature_size": 4, "hidden_size": 24, "mlp_dim": 24,
                   "num_heads": 2}),
        ("SwinUNETR", {"feature_size": 12}),
        ("AttentionUnet", {"channels": (4, 8), "strides": (2,)}),
    ],
)  # fmt: skip
def test_networks_of_monai(name, options):
    nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI")
    torch.manual_seed(0)
    common = {"in_channels": 1, "out_channels": 3}
    if name not in ("SegResNet", "SegResNetDS", "UNETR", "SwinUNETR"):
        common["spatial_dims"] = 3
    network = getattr(nets, name)(**common, **options).train()
    side = 64 if name == "SwinUNETR" else 32  # the scan has 32
    scorer = ts.SegmenterScorer(network, 2, side, preprocess=ts.Scaled(-175, 250, 0, 1))
    gate = replace(OPEN, scorer=scorer, least=0.0)
    synth = ts.SynthesizeTumor(**SETTINGS, gate=gate)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = batch(1)
    synth(one["image"], one["label"], spacing=(1, 1, 1), seed=0)
    assert 0 <= synth.report[0]["scores"]["scorer"] <= 1
    assert all(module.training for module in network.modules()) and torch.rand(1) == expected


def test_lightning_scores_with_the_module_in_training():
    L = pytest.importorskip("lightning", reason="needs Lightning")
    from tumorsynth.lightning import TumorSynthCallback

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, data, index):
            assert self.training and self.net.training
            return self(data["image"] / 100).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    class Seen(L.Callback):
        scores = []

        def on_train_batch_end(self, trainer, *_):
            self.scores += [record["scores"]["scorer"] for record in callback.report]
            trainer.lightning_module.net.conv.bias.data[2] = 9.0

    scorer = ts.SegmenterScorer(None, 2, 32)
    gate = replace(OPEN, scorer=scorer, least=0.0)
    callback = TumorSynthCallback(gate=gate, spacing=(1, 1, 1), **SETTINGS)
    key = callback.state_key
    trainer = L.Trainer(
        max_steps=2,
        callbacks=[callback, seen := Seen()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader([batch(2), batch(2)], batch_size=None)
    module = Module()
    trainer.fit(module, loader)
    assert seen.scores == [0.0, 0.0, 1.0, 1.0]
    assert scorer.model is module and not any("scorer" in name for name in module.state_dict())
    assert "0x" not in key and "SegmenterScorer" in key


def test_the_key_of_a_checkpoint_is_the_same_before_and_after_training():
    pytest.importorskip("lightning", reason="needs Lightning")
    from tumorsynth.lightning import TumorSynthCallback

    gate = replace(OPEN, scorer=ts.SegmenterScorer(None, 2, 32))
    callback = TumorSynthCallback(gate=gate, **SETTINGS)
    key = callback.state_key
    callback.adapter.score_with(Net())
    assert callback.state_key == key


def test_torchios_history_holds_no_network():
    tio = pytest.importorskip("torchio", reason="needs TorchIO")
    transforms = pytest.importorskip("tumorsynth.torchio", reason="needs TorchIO")
    gate = replace(OPEN, scorer=ts.SegmenterScorer(Net(9.0), 2, 32), least=0.5)
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).numpy()
    one = {name: value[0] for name, value in batch(1).items()}
    subject = tio.Subject(
        image=tio.ScalarImage(tensor=one["image"].short(), affine=affine),
        label=tio.LabelMap(tensor=one["label"], affine=affine),
    )
    transform = transforms.RandomSynthesizeTumor(gate=gate, **SETTINGS)
    made = transform(subject)
    assert transform.report[0]["scores"]["scorer"] == 1.0
    assert "Net" not in repr(made.applied_transforms) and (made["label"].data == 2).any()


def test_a_replay_in_monai_needs_no_network():
    monai = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
    network = Net(9.0)
    gate = replace(OPEN, scorer=ts.SegmenterScorer(network, 2, 32), least=0.5)
    transform = monai.RandSynthesizeTumord("image", "label", gate=gate, prob=1.0, **SETTINGS)
    one = {name: value[0] for name, value in batch(1).items()}
    made = transform.set_random_state(0)(dict(one))
    assert transform.report[0]["scores"]["scorer"] == 1.0 and len(network.calls) == 1
    again = transform.replay(dict(one), params=transform.params)
    assert len(network.calls) == 1 and transform.report[0]["scores"]["scorer"] is None
    assert torch.equal(again["image"], made["image"]) and (again["label"] == 2).any()
