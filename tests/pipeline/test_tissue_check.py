"""Tumours lie in tissue that their generator is for: on arrays, in files and through adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_synthesizer import check, same
from tiny import tiny_generator
from typer.testing import CliRunner

import tumorsynth as ts
from tumorsynth.commands.main import app

SHAPE = (64, 60, 40)
WEIGHTS = Path(__file__).parents[2] / "weights"


def tissue(*levels, noise=15.0, shape=SHAPE, seed=0):
    """Slabs of tissue along the first axis, all with label 1: image and label (1, X, Y, Z)."""
    n = shape[0] // len(levels)
    at = torch.cat([torch.full((n,), float(level)) for level in levels])
    image = at[:, None, None] + noise * torch.randn(
        (n * len(levels), *shape[1:]), generator=torch.Generator().manual_seed(seed)
    )
    return image[None], torch.ones(image.shape, dtype=torch.uint8)[None]


def synth(generator="hu2023", **changes):
    return ts.SynthesizeTumor(
        generator,
        **{"organ_labels": 1, "tumor_label": 2, "count": 1, "size_mm": (6, 14), **changes},
    )


def soft_lung():
    """A generator whose card is the lung's, without its networks' time."""
    generator = ts.HandcraftedGenerator()
    generator.window = (-1000.0, 250.0)
    generator.card = {
        **generator.card,
        **{"tissue_range": ts.load_generator("lung").card["tissue_range"]},
    }
    return generator


@pytest.mark.parametrize("seed", range(4))
def test_a_lung_tumour_lies_in_the_aerated_part(seed):
    image, label = tissue(-850, 30, noise=30)
    made = synth("lung", size_mm=(8, 15))
    new, out = made(image, label, spacing=1.5, seed=seed)
    (record,) = check(made, image, label, new, out, spacing=(1.5,) * 3)
    inside = out == 2
    assert image[inside].mean() < -750 and new[inside].quantile(0.99) < 250


@pytest.mark.parametrize("generator", ["lung", "soft"])
def test_consolidation_is_skipped_with_a_reason_unless_asked_for(generator):
    generator = soft_lung() if generator == "soft" else generator
    image, label = tissue(30)
    made = synth(generator, count=2)
    new, out = made(image, label, spacing=1.5, seed=0)
    assert same(new, image) and same(out, label)
    assert [record["code"] for record in made.report] == ["tissue"] * 2
    reason = made.report[0]["reason"]
    assert "median 3" in reason and "-960 to -450 HU" in reason and "--any-tissue" in reason
    again = made(image, label, spacing=1.5, params=made.params)
    assert same(again[0], image)
    for override in ({"any_tissue": True}, {"contrast_hu": -30}, {"contrast_hu": "liver-portal"}):
        made = synth(generator, **override)
        new, out = made(image, label, spacing=1.5, seed=0)
        assert made.report[0]["applied"], override
        check(made, image, label, new, out, spacing=(1.5,) * 3)


@pytest.mark.parametrize("level", [-25, 0, 30, 60, 110, 200])
def test_every_healthy_organ_is_painted_as_without_a_card(level):
    image, label = tissue(level, noise=20 if level > 20 else 6)
    without = ts.HandcraftedGenerator()
    without.card = {"name": "hu2023"}
    results = []
    for generator in ("hu2023", without):
        made = synth(generator, count=3)
        results.append(made(image, label, spacing=1.0, seed=3))
        assert all(record["applied"] for record in made.report)
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


@pytest.mark.parametrize("level", [-900, 450])
def test_lung_and_bone_are_not_for_the_generators_of_abdominal_organs(level):
    image, label = tissue(level, noise=20)
    made = synth()
    made(image, label, spacing=1.0, seed=0)
    assert made.report[0]["code"] == ("tissue" if level > 0 else "outside_window")


PADDING = [-1024.0, -2000.0, -3024.0, -1000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", PADDING)
def test_padding_under_a_label_is_neither_painted_nor_labelled(padding, dtype):
    image, label = tissue(60, 60)
    image[:, 32:] = padding
    image = image.to(dtype)
    made = synth(count=3)
    for seed in range(3):
        new, out = made(image, label, spacing=1.0, seed=seed)
        assert any(record["applied"] for record in made.report)
        assert not bool((out[:, 32:] == 2).any()) and same(new[:, 32:], image[:, 32:])
        again = made(image, label, spacing=1.0, params=made.params)
        assert same(again[0], new) and same(again[1], out)


@pytest.mark.parametrize(
    "intensity",
    [
        ts.Scaled(-175, 250, 0, 1),
        ts.ZScore(100.0, 40.0, -160.0, 240.0),
        ts.Scaled(-1000, 400, -1, 1),
    ],
)
def test_padding_of_a_clipped_scale_is_left_alone(intensity):
    image, label = tissue(60, 60)
    image[:, 32:] = -1024
    offset = float(intensity.to_hu(torch.zeros(())))
    image = ((image - offset) / intensity.hu_per_unit).clamp(*intensity.limits)
    made = synth(count=3, intensity=intensity)
    new, out = made(image, label, spacing=1.0, seed=1)
    assert any(record["applied"] for record in made.report)
    assert not bool((out[:, 32:] == 2).any()) and same(new[:, 32:], image[:, 32:])


def test_gas_bubbles_and_metal_are_left_alone():
    image, label = tissue(60)
    rng = torch.Generator().manual_seed(2)
    holes = (
        torch.nn.functional.max_pool3d(
            (torch.rand(image.shape, generator=rng) > 0.999).float(), 3, 1, 1
        )
        > 0
    )
    for value in (-900.0, 2500.0):
        filled = torch.where(holes, torch.tensor(value), image)
        made = synth(count=3)
        for seed in range(3):
            new, out = made(filled, label, spacing=1.0, seed=seed)
            assert not bool((holes & (out == 2)).any())
            assert same(new[holes], filled[holes])


def test_padding_in_a_lung_is_left_alone():
    image, label = tissue(-850, -850)
    image[:, 32:] = -1024
    made = synth(soft_lung(), count=2)
    for seed in range(6):
        _, out = made(image, label, spacing=1.0, seed=seed)
        assert int((out[:, 33:] == 2).sum()) == 0
    assert any(record["applied"] for record in made.report)


@pytest.mark.parametrize("padding", PADDING)
def test_an_organ_of_padding_alone_says_so(padding):
    image, label = tissue(60)
    image[:] = padding
    made = synth()
    new, out = made(image, label, spacing=1.0, seed=0)
    assert same(new, image) and same(out, label)
    (record,) = made.report
    assert record["code"] == "outside_window" and f"median {padding:.0f} HU" in record["reason"]


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
@pytest.mark.parametrize("noise", [8.0, 30.0])
@pytest.mark.parametrize("level", [-10, 5, 20, 30])
def test_no_tumour_is_brighter_than_an_unenhanced_liver(generator, level, noise):
    image, label = tissue(level, noise=noise)
    made = synth(generator)
    new, out = made(image, label, spacing=1.0, seed=1)
    (record,) = made.report
    if noise < 10:
        assert record["applied"] and -25 < record["hu_change"] < 0
    elif (generator, level) == ("liver-early", 30):  # its -18 HU are just visible
        assert record["visibility"] >= 5 and -25 < record["hu_change"] < 0
    else:  # tissue as dark as a fluid leaves no contrast that such noise would not hide
        assert record["code"] == "faint" and same(new, image) and same(out, label)


def test_a_generator_without_a_range_paints_anywhere_it_sees():
    image, label = tissue(30)
    generator = tiny_generator(window=(-1000.0, 250.0))
    made = synth(generator)
    made(image, label, spacing=1.0, seed=0)
    assert made.report[0]["applied"]
    generator.card["tissue_range"] = "lung"
    with pytest.raises(ValueError, match="tissue_range must hold"):
        made(image, label, spacing=1.0, seed=0)


def test_a_saved_generator_keeps_its_range(tmp_path):
    generator = tiny_generator()
    generator.card["tissue_range"] = ts.load_generator("hu2023").card["tissue_range"]
    image, label = tissue(500)
    made = synth(str(generator.save(tmp_path / "tiny")))
    made(image, label, spacing=1.0, seed=0)
    assert made.report[0]["code"] in ("tissue", "outside_window")


def test_mass_effect_keeps_out_of_padding():
    image, label = tissue(60, 60)
    image[:, 32:] = -1024
    made = synth(count=2, mass_effect=0.5)
    new, out = made(image, label, spacing=1.0, seed=0)
    tumour = out == 2
    assert bool(tumour.any()) and float(new[tumour].min()) > -250


def test_monai_and_torchio_move_and_skip_alike():
    monai = pytest.importorskip("tumorsynth.monai")
    image, label = tissue(30)
    transform = monai.RandSynthesizeTumord(
        keys="image", label_key="label", prob=1.0, generator=soft_lung(), count=1, spacing=1.5
    )
    transform.set_random_state(0)
    made = transform({"image": image.clone(), "label": label.clone()})
    assert same(torch.as_tensor(made["image"]), image)
    allowed = monai.RandSynthesizeTumord(
        keys="image",
        label_key="label",
        prob=1.0,
        generator=soft_lung(),
        count=1,
        spacing=1.5,
        any_tissue=True,
    )
    allowed.set_random_state(0)
    made = allowed({"image": image.clone(), "label": label.clone()})
    assert bool((torch.as_tensor(made["label"]) == 2).any())
    tio = pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    subject = tio.Subject(
        image=tio.ScalarImage(tensor=image, affine=np.diag([1.5, 1.5, 1.5, 1])),
        label=tio.LabelMap(tensor=label, affine=np.diag([1.5, 1.5, 1.5, 1])),
    )
    for option in (False, True):
        transform = RandomSynthesizeTumor(
            image="image", label="label", generator=soft_lung(), count=1, any_tissue=option
        )
        torch.manual_seed(0)
        assert bool((transform(subject)["label"].data == 2).any()) == option


def test_files_are_skipped_with_the_reason_and_painted_if_asked(tmp_path):
    nib = pytest.importorskip("nibabel")
    shutil.copytree(WEIGHTS / "lung", tmp_path / "lung")
    image, label = tissue(30, shape=(40, 40, 32))
    paths = []
    for kind, values in (("ct", image.numpy().astype(np.int16)), ("label", label.numpy())):
        paths.append(str(tmp_path / f"effusion_{kind}.nii.gz"))
        nib.save(nib.Nifti1Image(values[0], np.diag([1.5, 1.5, 1.5, 1])), paths[-1])
    options = ["--generator", str(tmp_path / "lung"), "--count", "1", "--size-mm", "6", "14"]
    for more, code in (([], 1), (["--any-tissue"], 0), (["--contrast-hu", "-40", "-20"], 0)):
        out = tmp_path / f"out{len(more)}"
        command = ["synthesize", *paths, "--out", str(out), *options, *more]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        report = json.loads((out / "effusion_report.json").read_text())
        (record,) = report["tumors"]
        assert record["applied"] == (code == 0)
        assert more or record["code"] == "tissue"
        assert more or "--any-tissue" in result.output.replace("\n", " ")
