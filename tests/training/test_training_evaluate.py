"""The figures that end a training: right where the answer is known, and written into the card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from balls import make_cases
from scipy import ndimage
from tiny import tiny_generator

from tumorsynth.generators.card import readable_card
from tumorsynth.generators.diffusion import Generator
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.training import autoencoder, evaluate
from tumorsynth.training.config import AutoencoderTraining
from tumorsynth.training.data import Case, save_pack
from tumorsynth.training.folders import read_autoencoder, save_autoencoder
from tumorsynth.training.measures import (
    Difference,
    RegionErrors,
    distance_mm,
    erode,
    high_pass_noise,
    ssim_map,
    tumor_statistics,
)
from tumorsynth.training.realism import (
    _views,
    measure_generator,
    organ_labels_around,
    real_tumors,
)
from tumorsynth.training.reconstruction import (
    choose_crops,
    evenly_spaced,
    measure_autoencoder,
    tiles,
)

ROOT = Path(__file__).resolve().parents[2]
WINDOW = (-175.0, 250.0)
STAGE1 = AutoencoderTraining(
    network="tiny", steps=3, patch_size=16, batch_size=1, picture_every=0, codes=16
)


@pytest.fixture(scope="module")
def cases():
    return make_cases()


class Known(Autoencoder):
    """Gives every crop back brighter by 10 HU, without a latent of its own."""

    def __init__(self, window=WINDOW):
        super().__init__(AutoencoderConfig(codes=0, groups=8, window=window))

    def encode(self, x):
        return x

    def decode(self, latent):
        low, high = self.config.window
        return latent + 10 * 2 / (high - low)


class Painter(Generator):
    """Tumours 30 HU darker than what was there; inpainting is 5 HU too bright elsewhere."""

    crop_size = 32

    def change(self, crop, tumor_mask, seed=None, noise=None, contrast_hu=None, near=None):
        low, high = self.window
        return tumor_mask.float() * -30 / (high - low)

    def inpaint(self, crop, tumor_mask, seed=None, noise=None, contrast_hu=None):
        low, high = self.window
        return crop + torch.where(tumor_mask, -30.0, 5.0) / (high - low)


def painter(window=WINDOW):
    return Painter(Known(window), tiny_generator().denoiser)


# -- measures -------------------------------------------------------------------------------------


def test_measures_agree_with_scipy():
    rng = np.random.default_rng(0)
    volume = rng.normal(50, 30, (21, 17, 9)).astype(np.float32)
    blurred = ndimage.gaussian_filter(volume, 1.5)
    np.testing.assert_allclose(
        high_pass_noise(torch.from_numpy(volume)), volume - blurred, atol=1e-4
    )
    mask = volume > 115
    far = ndimage.distance_transform_edt(~mask)
    for reach in (1, 3, 8):
        mine = distance_mm(torch.from_numpy(mask), reach).numpy()
        np.testing.assert_allclose(mine[far <= reach], far[far <= reach], rtol=1e-6)
        assert (mine[far > reach] > reach).all() and 0 < (far > 3).sum()
    solid = volume > -15
    for times in (0, 1, 3):
        # scipy takes 0 for "until nothing is left"
        wanted = ndimage.binary_erosion(solid, iterations=times) if times else solid
        assert torch.equal(erode(torch.from_numpy(solid), times), torch.from_numpy(wanted))


@pytest.mark.parametrize("level", [0.0, 300.0])
def test_ssim_agrees_with_monai(level):
    metrics = pytest.importorskip("monai.metrics")
    noise = torch.randn(2, 20, 15, 12, generator=torch.Generator().manual_seed(0))
    a, b = level + 40 * noise[0], level + 30 * noise[0] + 20 * noise[1]
    metric = metrics.SSIMMetric(
        3, data_range=425.0, kernel_type="gaussian", win_size=11, kernel_sigma=1.5
    )
    wanted = float(metric(a[None, None], b[None, None]))
    assert 0.3 < wanted < 0.99
    assert float(ssim_map(a, b, 425.0).mean()) == pytest.approx(wanted, abs=2e-5)
    assert float(ssim_map(a, a, 425.0).min()) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11 voxels"):
        ssim_map(a[:10], b[:10], 425.0)


def test_errors_over_several_crops_are_those_of_all_voxels():
    rng = torch.Generator().manual_seed(0)
    scan = 50 + 20 * torch.randn(40, 20, 20, generator=rng)
    out = scan + 3 + 8 * torch.randn(40, 20, 20, generator=rng)
    errors = RegionErrors(WINDOW)
    for part in (slice(0, 12), slice(12, 40)):
        difference = Difference(scan[part], out[part], WINDOW)
        errors.add(difference, torch.ones_like(scan[part], dtype=torch.bool))
    figures = errors.figures()
    rmse = float((out - scan).square().mean().sqrt())
    assert figures["rmse_hu"] == pytest.approx(rmse, abs=0.006)
    assert figures["psnr_db"] == pytest.approx(20 * np.log10(425 / rmse), abs=0.006)
    assert figures["bias_hu"] == pytest.approx(float((out - scan).mean()), abs=0.006)
    assert figures["voxels"] == scan.numel()
    # white noise keeps nearly all of itself above a blur of 1.5 mm
    assert figures["scan_noise_hu"] == pytest.approx(20, rel=0.05)
    assert figures["reconstruction_noise_hu"] == pytest.approx(464**0.5, rel=0.05)


def test_contrast_of_a_ball(cases):
    label = cases[0].label
    contrast, inside, outside = tumor_statistics(cases[0].hu.float(), label == 2, label == 1)
    assert contrast == pytest.approx(-40, abs=1.5)
    assert inside == pytest.approx(10, abs=1) and outside == pytest.approx(10, abs=1)
    alone = tumor_statistics(cases[0].hu.float(), label == 2, label == 9)
    assert np.isnan(alone).all()


# -- the autoencoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [WINDOW, (-1000.0, 250.0)])
def test_a_known_autoencoder_gets_its_figures(cases, window):
    measured = measure_autoencoder(Known(window), cases, 2)["reconstruction"]
    assert list(measured) == ["tumour", "tissue", "label 1"]
    for name, voxels in (("tumour", int((cases[0].label == 2).sum())), ("tissue", 2 * 48**3)):
        figures = measured[name]
        assert figures["voxels"] == voxels
        assert figures["rmse_hu"] == figures["bias_hu"] == pytest.approx(10, abs=0.01)
        wanted = 20 * np.log10((window[1] - window[0]) / 10)
        assert figures["psnr_db"] == pytest.approx(wanted, abs=0.02)
        assert figures["ssim"] > 0.98
        assert figures["scan_noise_hu"] == figures["reconstruction_noise_hu"] > 8


def test_the_use_of_a_codebook_and_of_the_air_beyond_the_window(cases):
    ae = tiny_generator(codes=8).autoencoder
    scan = cases[1].hu.clone()
    scan[:24] = -1000
    measured = measure_autoencoder(ae, [Case("half air", scan, None)])
    assert measured["reconstruction"]["tissue"]["voxels"] == scan.numel() // 2
    codes = measured["codes"]
    assert codes["codes"] == 8 and codes["latent_voxels"] == 12**3
    assert 1 <= codes["perplexity"] <= 8 * codes["used_share"] <= 8
    assert measure_autoencoder(ae, [Case("half air", scan, None)]) == measured


def test_crops_are_few_and_where_the_tumours_are():
    hu = torch.full((200, 150, 100), 50, dtype=torch.int16)
    label = torch.ones(hu.shape, dtype=torch.uint8)
    label[150:160, 10:20, 80:90] = 2
    label[20:40] = 3
    case = Case("large", hu, label)
    for tumor_label in (2, None):
        places = choose_crops(case, 64, 8, tumor_label, WINDOW)
        assert 6 <= len(places) <= 8
        assert all(hu[where].shape == (64, 64, 64) for where in places)
        assert int((label[places[0]] == 2).sum()) == 1000
    covered = torch.zeros(hu.shape, dtype=torch.bool)
    for where in tiles(hu.shape, 64):
        assert hu[where].shape == (64, 64, 64)
        covered[where] = True
    assert covered.all()
    assert evenly_spaced(list(range(10)), 3) == [1, 5, 8] and evenly_spaced([1, 2], 5) == [1, 2]
    assert evenly_spaced([], 3) == []


# -- the generator --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [WINDOW, (-1000.0, 250.0)])
def test_a_known_generator_gets_its_figures(cases, window, tmp_path):
    path = tmp_path / "pictures.png"
    measured = measure_generator(painter(window), cases, 2, tumours=5, pictures=path)
    assert measured["organ_labels"] == [1] and "skipped" not in measured
    real, made = measured["tumours"]["real"], measured["tumours"]["synthetic"]
    assert real["tumours"] == 2 and real["contrast_hu"][1] == pytest.approx(-40, abs=2)
    # less than the 30 HU painted: the soft edge reaches into the core
    assert 1 <= made["tumours"] <= 5 and -30 < made["contrast_hu"][1] < -26
    assert made["noise_ratio"] == pytest.approx(1, abs=0.15)
    error = measured["inpainting"]
    assert error["holes"] == made["tumours"]
    for name in ("outside_rmse_hu", "ring_rmse_hu", "ring_bias_hu"):
        assert error[name] == pytest.approx(5, abs=0.01)
    for name in ("reconstruction_outside_rmse_hu", "reconstruction_ring_rmse_hu"):
        assert error[name] == pytest.approx(10, abs=0.01)
    pixels = np.asarray(pytest.importorskip("PIL.Image").open(path))
    assert pixels.ndim == 2 and (pixels == 255).sum() > 100  # the outlines
    assert measure_generator(painter(window), cases, 2, tumours=5) == measured


def test_pictures_go_through_the_tumours_middle_also_at_the_scans_edge(cases):
    hu = torch.full((60, 60, 60), 100, dtype=torch.int16)
    label = torch.ones(hu.shape, dtype=torch.uint8)
    hu[:6, 2:8, 54:] = 60
    label[:6, 2:8, 54:] = 2
    (one,) = real_tumors(Case("edge", hu, label), [1], 2)
    for plain, outlined in _views(one, 2, 60.0):
        assert plain.shape == (48, 48)
        dark = (plain > 0) & (plain < 0.45)  # beyond the scan it is black
        assert 20 < int(dark.sum()) <= 36, "the plane does not meet the tumour"
        assert int((outlined == 1).sum()) >= 10


def test_without_room_the_reason_is_told(cases):
    plain = cases[1]
    assert "annotated" in measure_generator(painter(), [plain], 2, [1])["skipped"]
    bare = Case("bare", cases[0].hu, torch.where(cases[0].label == 2, 2, 0).byte())
    assert "no label but" in measure_generator(painter(), [bare], 2)["skipped"]
    label = torch.zeros_like(cases[0].label)
    label[20:23, 20:23, 20:23] = 1
    measured = measure_generator(painter(), [Case("speck", cases[0].hu, label)], 2, [1])
    assert "no room" in measured["skipped"] and measured["tumours"] == {}


def test_organs_are_the_labels_around_the_tumours(cases):
    label = cases[0].label.clone()
    assert organ_labels_around([*cases], 2) == [1]
    label[:, :, 24:][label[:, :, 24:] == 1] = 4  # one of the two tumours lies there
    label[0, 0, 0] = 7
    assert organ_labels_around([Case("two", cases[0].hu, label)], 2) == [1, 4]
    bare = torch.where(label == 2, label, 0)
    assert organ_labels_around([Case("bare", cases[0].hu, bare)], 2) == []


# -- the card -------------------------------------------------------------------------------------


def test_a_training_ends_with_its_figures_and_trains_on_nothing_held_out(cases, tmp_path):
    held = Case("unseen", cases[0].hu, cases[0].label, held_out=True)
    autoencoder.train([cases[1], held], tmp_path / "with", STAGE1, card={"licence": "CC0"})
    autoencoder.train([cases[1]], tmp_path / "without", STAGE1)
    cards = [json.loads((tmp_path / n / "card.json").read_text()) for n in ("with", "without")]
    assert cards[0]["sha256"] == cards[1]["sha256"]
    assert cards[0]["training"]["scans"] == ["plain"]
    assert cards[0]["training"]["held_out"] == ["unseen"]
    assert cards[0]["licence"] == "CC0" and "none stated" in cards[1]["licence"]
    assert cards[0]["metrics"]["how"][0] == "scans held out of the training: unseen"
    assert "TRAINED ON (plain)" in cards[1]["metrics"]["how"][0]
    assert list(cards[0]["metrics"]["reconstruction"]) == ["tissue", "label 1", "label 2"]
    assert list(cards[1]["metrics"]["reconstruction"]) == ["tissue"]
    assert cards[0]["metrics"]["codes"]["codes"] == 16
    readable = (tmp_path / "with" / "CARD.md").read_text()
    rows = re.findall(r"^\| label 2 \|.*$", readable, re.MULTILINE)
    tables = [cards[0]["metrics"][kind]["label 2"] for kind in ("reconstruction", "without_detail")]
    assert len(rows) == 2
    for row, figures in zip(rows, tables, strict=True):
        assert str(figures["psnr_db"]) in row
    # what three steps taught the network is bad, and its detail does not hide it any more
    assert tables[1]["rmse_hu"] > 1.3 * tables[0]["rmse_hu"]
    pixels = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / "with" / "pictures.png"))
    assert pixels.std() > 1


def test_killed_while_measuring_the_folder_is_whole_and_resuming_measures(
    cases, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(autoencoder, "autoencoder_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            autoencoder.train(cases, tmp_path / "ae", STAGE1)
    _, card = read_autoencoder(str(tmp_path / "ae"))
    assert "--resume" in card["metrics"]["skipped"]
    autoencoder.train(cases, tmp_path / "ae", STAGE1, resume=True)
    _, again = read_autoencoder(str(tmp_path / "ae"))
    assert again["sha256"] == card["sha256"] and "reconstruction" in again["metrics"]


def test_a_generators_figures_have_both_parts_and_read_well(cases):
    training, held_out = [cases[1]], [cases[0]]
    metrics = evaluate.generator_metrics(painter(), training, held_out, 2, steps=10)
    assert metrics["how"][0] == "scans held out of the training: annotated"
    assert metrics["reconstruction"]["tumour"]["bias_hu"] == pytest.approx(10, abs=0.01)
    assert metrics["tumours"]["synthetic"]["tumours"] <= 4
    card = {"name": "g", "metrics": metrics, "training": {"held_out": [], "scans": ["a", "b"]}}
    readable = readable_card(card)
    assert "{" not in readable and "[" not in readable
    assert re.search(r"^### tumours\n\n\|  \| tumours \| contrast hu \|", readable, re.MULTILINE)
    assert "- held out: none\n- scans: a, b" in readable


def test_the_command_measures_both_kinds_of_folder_with_torch_alone(cases, tmp_path):
    save_pack(cases, tmp_path / "pack.npz")
    tiny_generator().save(tmp_path / "gen")
    save_autoencoder(tiny_generator().autoencoder, tmp_path / "ae", {"name": "ae"})
    code = (
        "import runpy, sys\n"
        "for name in ('scipy', 'monai', 'matplotlib', 'nibabel', 'lightning', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "for kind in ('gen', 'ae'):\n"
        "    sys.argv = ['evaluate', kind, 'pack.npz', '--calls', '1']\n"
        "    sys.argv += ['--pictures', 'ae.png'] if kind == 'ae' else []\n"
        "    runpy.run_module('tumorsynth.training.evaluate', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    generator, end = decoder.raw_decode(done.stdout)
    whole, _ = decoder.raw_decode(done.stdout[end:].lstrip())
    assert list(generator) == ["annotated"]
    assert {"reconstruction", "real", "synthetic"} <= generator["annotated"].keys()
    assert generator["annotated"]["real"]["tumours"] == 2
    assert {"tissue", "tumour", "label 1"} == whole["reconstruction"].keys()
    assert (tmp_path / "ae.png").is_file()
