"""Stage 2: what its crops hold, and what the trained generator is told and draws."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from balls import make_cases

from tumorsynth.appearance.contrast import contrast_of
from tumorsynth.appearance.surroundings import level_around
from tumorsynth.appearance.tissue import TissueRange
from tumorsynth.training import autoencoder, denoiser
from tumorsynth.training.config import PRESETS, AutoencoderTraining, DataConfig, DenoiserTraining
from tumorsynth.training.crops import (
    contrast_range,
    even_tissue_centres,
    sample_crop,
    tissue_warning,
)
from tumorsynth.training.data import find_tumors
from tumorsynth.training.tissue import learned_tissue

WINDOW = (-175.0, 250.0)
TINY = DenoiserTraining(**{**PRESETS["denoiser"]["tiny"], "steps": 3, "picture_every": 0})


def crops(config, count=40):
    cases = make_cases()
    tumors = find_tumors(cases, 2)
    centres = [even_tissue_centres(case, config) for case in cases]
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield sample_crop(cases, tumors[seed % 2], 2, rng, centres, config, WINDOW)


def contrasts(config):
    found = []
    for hu, mask in crops(config):
        level = level_around(hu[None], mask[None], (20.0, 220.0))
        found.append(float(contrast_of(hu[None], mask[None], level)))
    return np.array(found)


def test_crops_are_in_the_window_with_a_tumour_in_them():
    for hu, mask in crops(TINY):
        assert hu.shape == mask.shape == (1, 32, 32, 32)
        assert mask.dtype == torch.bool and 0 < int(mask.sum()) < mask.numel() / 3
        assert WINDOW[0] <= float(hu.min()) and float(hu.max()) <= WINDOW[1]


def test_moved_tumours_have_all_contrasts_that_may_be_asked_for():
    stay, moved = (contrasts(replace(TINY, transplant=t)) for t in (0.0, 1.0))
    assert (stay < 0).all() and stay.std() < 15
    assert moved.std() > 1.5 * stay.std()
    assert moved.min() < 1.3 * stay.mean() and moved.max() > 5  # twice as dark, and brighter


def test_without_contrast_moved_tumours_keep_theirs():
    assert (contrasts(replace(TINY, transplant=1.0, contrast="off")) < 0).all()


def test_moved_tumours_are_as_often_brighter_as_asked_for():
    dark, bright = (contrasts(replace(TINY, transplant=1.0, brighter=b)) for b in (0.0, 1.0))
    assert (dark < 0).all()
    assert (bright > 0).mean() > 0.8  # some have no room for it in the window, some stay


def test_a_dark_centre_stays_darker_than_the_rest_when_its_tumour_becomes_brighter():
    cases = make_cases()
    config = replace(TINY, transplant=1.0, brighter=1.0)
    tumor = max(find_tumors(cases, 2), key=lambda each: each.diameter_mm)
    middle = torch.tensor([(a + b - 1) / 2 for a, b in zip(tumor.low, tumor.high, strict=True)])
    place = torch.stack(torch.meshgrid(*map(torch.arange, cases[0].hu.shape), indexing="ij"), -1)
    cases[tumor.case].hu[(place - middle).norm(dim=-1) < 0.25 * tumor.diameter_mm] -= 60
    centres = [even_tissue_centres(case, config) for case in cases]
    differences = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hu, mask = sample_crop(cases, tumor, 2, rng, centres, config, WINDOW)
        level = level_around(hu[None], mask[None], (20.0, 220.0))
        at, values = mask[0].nonzero().float(), hu[0][mask[0]]
        radius = (6 * len(at) / np.pi) ** (1 / 3) / 2
        if radius < 5 or float(contrast_of(hu[None], mask[None], level)) < 5:
            continue  # thick slices hide the centre of a small one
        far = (at - at.mean(0)).norm(dim=1) / radius
        inside, rest = values[far < 0.25], values[(far > 0.5) & (far < 0.75)]
        differences.append(float(inside.mean() - rest.mean()))
    assert len(differences) > 8 and np.median(differences) < -3


def test_structure_gives_rims_and_washed_out_centres():
    config = replace(TINY, transplant=1.0, brighter=0.0, patch_size=48)
    spread = []
    for structure in (0.0, 1.0):
        pairs = list(crops(replace(config, structure=structure)))
        spread.append(np.median([float(hu[mask].std()) for hu, mask in pairs]))
    assert spread[1] > 1.15 * spread[0]


def test_range_of_contrast_is_the_real_tumours_for_an_organ_at_110_hu():
    cases = make_cases()
    found = contrast_range(cases, find_tumors(cases, 2), 2, TINY)
    hu = cases[0].hu.float()
    organ, tumor = (float(hu[cases[0].label == value].median()) for value in (1, 2))
    real = (tumor - organ) * 110 / organ
    assert found.low < real < found.high < 0
    assert found.high - found.low < 0.8 * abs(real)


@pytest.mark.parametrize("transplant", [0.0, 0.8])
@pytest.mark.parametrize("offset", [0, -900])
def test_the_learned_tissue_is_that_around_the_tumours_with_a_margin(offset, transplant):
    cases = make_cases()
    for case in cases:
        case.hu = case.hu + offset
    config = replace(
        TINY, tissue_low=20.0 + offset, tissue_high=220.0 + offset, transplant=transplant
    )
    found = learned_tissue(cases, find_tumors(cases, 2), 2, config)
    organ = float(cases[0].hu[cases[0].label == 1].float().median())
    low, high = found.level_hu
    assert low < organ - 40 and organ + 40 < high and high - low < 400
    assert found.local_hu[0] < low and found.voxel_hu[0] < found.local_hu[0]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ae")
    tiny = {**PRESETS["autoencoder"]["tiny"], "steps": 3, "picture_every": 0}
    autoencoder.train(make_cases(), folder / "ae", AutoencoderTraining(**tiny))
    return str(folder / "ae")


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_options_end_up_in_the_generator(stage1, tmp_path, prediction, unmeasured):
    config = replace(TINY, contrast="off", zero_terminal_snr="on", prediction=prediction)
    generator = denoiser.train(make_cases(), stage1, tmp_path / "g", config)
    assert generator.sampler.contrast is None
    tissue = TissueRange.of_card(json.loads((tmp_path / "g" / "card.json").read_text()))
    assert tissue is not None and tissue.level_hu[0] < 100 < tissue.level_hu[1]
    assert generator.sampler.zero_terminal_snr and generator.sampler.prediction == prediction
    assert float(generator.schedule.alphas_cumprod[-1]) == 0
    assert generator.denoiser.config.cond_channels == 9


def test_zero_terminal_snr_is_refused_for_noise(stage1, tmp_path):
    config = replace(TINY, zero_terminal_snr="on", prediction="noise")
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction"):
        denoiser.train(make_cases(), stage1, tmp_path / "g", config)
    assert not (tmp_path / "g").exists()


def test_held_out_scans_are_not_trained_on_but_measured(stage1, tmp_path):
    cases = make_cases()
    away = replace(make_cases(seed=5)[0], name="away", held_out=True)
    plain = denoiser.train(cases, stage1, tmp_path / "a", TINY)
    more = denoiser.train([*cases, away], stage1, tmp_path / "b", TINY)
    for one, other in zip(plain.denoiser.parameters(), more.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
    assert more.card["training"]["held_out"] == ["away"]
    assert "TRAINED ON" in str(plain.card["metrics"])
    assert "TRAINED ON" not in str(more.card["metrics"])


def test_tumours_are_chosen_by_their_annotated_size(stage1, tmp_path, unmeasured):
    """Drawn in to where they can be seen they would be below the least size."""
    with pytest.raises(ValueError, match="none from 12.5 to inf"):
        denoiser.train(make_cases(), stage1, tmp_path / "g", TINY, DataConfig(2, 12.5))
    generator = denoiser.train(make_cases(), stage1, tmp_path / "g", TINY, DataConfig(2, 11.8))
    assert generator.card["training"]["tumours"] == 1


def test_tissue_beyond_the_autoencoders_window_is_refused(stage1, tmp_path):
    with pytest.raises(ValueError, match="must lie in the autoencoder's window"):
        denoiser.train(
            make_cases(), stage1, tmp_path / "g", replace(TINY, tissue_low=-950, tissue_high=220)
        )


def test_real_tumours_are_measured_one_by_one():
    from tumorsynth.training.realism import real_tumors

    (case, _) = make_cases()
    ones = real_tumors(case, [1], 2)
    assert len(ones) == 2
    for one in ones:  # the other lies within the crop, too
        crop = replace(case, hu=one.after, label=one.mask.byte())
        assert len(find_tumors([crop], 1)) == 1


def test_tumours_in_other_tissue_than_the_configs_are_told():
    cases = make_cases()
    tumors = find_tumors(cases, 2)
    assert tissue_warning(cases, tumors, 2, TINY) is None
    lung = replace(TINY, tissue_low=-950.0, tissue_high=-600.0)
    words = tissue_warning(cases, tumors, 2, lung)
    assert "not from --tissue-low -950 to --tissue-high -600 HU (its median is 100 HU)" in words
    assert "the tissue around the tumour is" in tissue_warning(cases, tumors[:1], 2, lung)


def test_tumours_amid_no_tissue_at_all_divide_by_nothing():
    (case, _) = make_cases()
    case.hu = torch.where(case.label == 2, 60, 0).short()
    found = contrast_range([case], find_tumors([case], 2), 2, TINY)
    assert np.isfinite([found.low, found.high]).all()
