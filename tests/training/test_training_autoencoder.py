"""Stage 1's cubes, and a start from a trained network with fewer latent channels."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from balls import make_cases

from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training import autoencoder
from tumorsynth.training.config import AutoencoderTraining, Hardware
from tumorsynth.training.cubes import add_hole, case_shares, sample_cube
from tumorsynth.training.folders import save_autoencoder
from tumorsynth.training.launch import usable_precision
from tumorsynth.training.networks import NETWORKS, starting_autoencoder

TINY = AutoencoderTraining(network="tiny")


def test_a_hollowed_cube_has_one_ball_of_one_value():
    rng = np.random.default_rng(0)
    zeros = 0
    for _ in range(40):
        cube = torch.rand(1, 24, 24, 24) * 2 - 1
        before = cube.clone()
        made = add_hole(cube, rng)
        assert torch.equal(cube, before)
        ball = made != cube
        share = float(ball.float().mean())
        assert 0 < share < 0.2, share
        values = made[ball].unique()
        assert len(values) == 1 and float(values.abs()) <= 0.9
        zeros += float(values) == 0
    assert 8 < zeros < 32


def test_cubes_are_hollowed_as_often_as_asked():
    cases = make_cases()
    made = {
        share: [
            sample_cube(
                cases,
                case_shares(cases),
                AutoencoderTraining(patch_size=16, hollow=share),
                np.random.default_rng(seed),
            )
            for seed in range(12)
        ]
        for share in (0.0, 0.5, 1.0)
    }
    changed = {
        share: sum(not torch.equal(*pair) for pair in zip(made[0.0], cubes, strict=True))
        for share, cubes in made.items()
    }
    assert changed[0.0] == 0 and 2 <= changed[0.5] <= 10 and changed[1.0] == 12, changed


def test_more_latent_channels_start_as_the_trained_network(tmp_path):
    torch.manual_seed(0)
    trained = Autoencoder(NETWORKS["tiny"]).eval()
    save_autoencoder(trained, tmp_path / "ae", {"name": "ae"})
    config = replace(TINY, latent_channels=12)
    wider = starting_autoencoder(config, str(tmp_path / "ae"))[0].eval()
    x = torch.rand(1, 1, 16, 16, 16) * 2 - 1
    with torch.no_grad():
        assert wider.encode(x).shape[1] == 12
        torch.testing.assert_close(wider.encode(x)[:, :8], trained.encode(x))
        off = (wider(x) - trained(x)).abs().mean() / trained(x).std()
    assert 0 < float(off) < 0.2
    assert all(p.requires_grad for p in wider.parameters())


def test_a_training_may_start_from_an_autoencoder_with_another_window(tmp_path):
    trained = Autoencoder(replace(NETWORKS["tiny"], window=(-175.0, 250.0))).eval()
    save_autoencoder(trained, tmp_path / "ae", {"name": "ae"})
    config = replace(TINY, window_low=-1000.0)
    started = starting_autoencoder(config, str(tmp_path / "ae"))[0].eval()
    assert started.config.window == (-1000.0, 250.0)
    scaled = torch.rand(1, 1, 16, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(started(scaled), trained(scaled))


def test_fewer_or_unasked_latent_channels_are_refused(tmp_path):
    trained = Autoencoder(replace(NETWORKS["tiny"], latent_channels=4))
    save_autoencoder(trained, tmp_path / "ae", {"name": "ae"})
    for channels in (None, 3):
        with pytest.raises(ValueError, match="has another size than --network tiny"):
            starting_autoencoder(replace(TINY, latent_channels=channels), str(tmp_path / "ae"))


def test_a_cpu_that_emulates_bfloat16_trains_in_float32(tmp_path, monkeypatch, unmeasured):
    cpu = Hardware(accelerator="cpu")
    config = replace(TINY, steps=1, patch_size=16, batch_size=1, picture_every=0)
    config = replace(config, precision="bf16-mixed")
    monkeypatch.setattr("tumorsynth.training.launch.cpu_computes_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="does not compute in bfloat16, so .* 32-true") as said:
        autoencoder.train(make_cases(), tmp_path / "ae", config, cpu)
    assert len([w for w in said if "bfloat16" in str(w.message)]) == 1
    card = json.loads((tmp_path / "ae" / "card.json").read_text())
    assert config.precision == "bf16-mixed" and card["training"]["precision"] == "32-true"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_precision(cpu, "32-true") == "32-true"
        assert usable_precision(Hardware(accelerator="cuda"), "bf16-mixed") == "bf16-mixed"
        monkeypatch.setattr("tumorsynth.training.launch.cpu_computes_bfloat16", lambda: True)
        assert usable_precision(cpu, "bf16-mixed") == "bf16-mixed"


@pytest.mark.parametrize(("gains", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_default_precision_is_the_faster_one(gains, expected, monkeypatch):
    monkeypatch.setattr("tumorsynth.training.launch.cpu_computes_bfloat16", lambda: True)
    monkeypatch.setattr("tumorsynth.training.launch.cpu_gains_from_bfloat16", lambda: gains)
    config = replace(TINY, steps=1, patch_size=16, batch_size=1, picture_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="lightning")
        assert usable_precision(Hardware(accelerator="cuda"), config.precision) == "bf16-mixed"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert usable_precision(Hardware(), config.precision) == "bf16-mixed"
        assert usable_precision(Hardware(accelerator="cpu"), config.precision) == expected
        for asked in ("bf16-mixed", "32-true"):
            assert usable_precision(Hardware(accelerator="cpu"), asked) == asked


def test_the_card_names_the_precision(tmp_path, unmeasured):
    config = replace(TINY, steps=1, patch_size=16, batch_size=1, picture_every=0)
    autoencoder.train(make_cases(), tmp_path / "ae", config, Hardware(accelerator="cpu"))
    card = json.loads((tmp_path / "ae" / "card.json").read_text())
    assert card["training"]["precision"] == usable_precision(Hardware(accelerator="cpu"), "auto")
