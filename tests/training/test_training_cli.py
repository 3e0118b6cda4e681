"""``tumorsynth train``: from a dataset.json to a generator that paints tumours into a scan."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from balls import make_cases, write_dataset

import tumorsynth as ts
from tumorsynth.commands.main import main
from tumorsynth.models.autoencoder import LIGHT, Autoencoder
from tumorsynth.training.folders import save_autoencoder
from tumorsynth.training.pictures import CAPTION_HEIGHT

nib = pytest.importorskip("nibabel")
TINY = ("--preset", "tiny", "--log-every", "5")


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, and both stages trained on it with the tiny preset, shortened."""
    folder = tmp_path_factory.mktemp("training")
    dataset = write_dataset(folder / "data", make_cases())
    short = (*TINY, "--steps", 20, "--picture-every", 10, "--patch-size")
    assert run("train", "autoencoder", dataset, "-o", folder / "ae", *short, 16) == 0
    words = ("-o", folder / "gen", "--autoencoder", folder / "ae", "--licence", "CC0")
    assert run("train", "denoiser", dataset, *words, "--tumor-label", 2, *short, 32) == 0
    return folder


def test_from_dataset_json_to_synthesize(folder, tmp_path, capsys):
    case = make_cases(seed=1)[0]
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(case.hu.numpy(), affine), tmp_path / "x_ct.nii.gz")
    nib.save(nib.Nifti1Image(case.label.numpy(), affine), tmp_path / "x_label.nii.gz")
    words = ("--generator", folder / "gen", "--tumor-label", 3, "--count", 1, "--size-mm", 8, 9)
    out = tmp_path / "out"
    scan = (tmp_path / "x_ct.nii.gz", tmp_path / "x_label.nii.gz")
    assert run("synthesize", *scan, "--out", out, *words) == 0, capsys.readouterr().err
    new = np.asarray(nib.load(out / "x_label.nii.gz").dataobj)
    assert (new == 3).sum() > 100
    assert run("info", folder / "gen") == 0
    assert "CC0" in capsys.readouterr().out
    assert run("info", folder / "ae") == 0  # no generator, but checked and shown as well
    said = capsys.readouterr().out
    assert "kind: autoencoder" in said and "MB, sha256 agrees\n" in said


def test_what_a_run_leaves(folder):
    for stage in ("ae", "gen"):
        names = {p.name for p in (folder / stage).iterdir()}
        wanted = {"model.safetensors", "card.json", "CARD.md", "checkpoint.pt", "log.csv"}
        assert wanted <= names and not [n for n in names if n.startswith(".")]
        pictures = sorted((folder / stage / "pictures").iterdir())
        assert [p.name for p in pictures] == ["step_0000010.png", "step_0000020.png"]
        header, *rows = (folder / stage / "log.csv").read_text().splitlines()
        assert header.startswith("step,lr,loss") and len(rows) == 20
        assert list((folder / stage / "tensorboard").iterdir())
    image = pytest.importorskip("PIL.Image").open(folder / "gen" / "pictures" / "step_0000020.png")
    pixels = np.asarray(image)
    # captions, a row for each of four crops, three planes of both, five pixels a voxel, gaps
    rows, columns = 5 * 4 * (32 + 2), 5 * 3 * (2 * 32 + 2 + 6)
    assert pixels.shape == (CAPTION_HEIGHT + rows, columns)
    captions, crops = pixels[:CAPTION_HEIGHT], pixels[CAPTION_HEIGHT:]
    assert set(captions.flat) == {0, 255} and crops.std() > 1
    generator = ts.load_generator(folder / "gen")
    card = generator.card
    assert generator.name == "gen" and card["training"]["tumours"] == 2
    assert card["autoencoder"]["name"] == "ae" and generator.sampler.crop_size == 32
    assert generator.sampler.mask_conditioning == "area"


def test_packs_presets_and_other_predictions(folder, capsys, unmeasured):
    pack = folder / "pack.npz"
    assert run("train", "pack", folder / "data" / "dataset.json", "-o", pack) == 0
    assert (
        "annotated: 48 x 48 x 48 mm, annotated\nplain: 48 x 48 x 48 mm\n" in capsys.readouterr().out
    )
    ae = ("--autoencoder", folder / "gen")  # a generator's serves as well
    for prediction, timesteps, method in (("noise", 4, "ddpm"), ("v", 100, "ddim")):
        out = folder / prediction
        words = (*TINY, *ae, "--steps", 2, "--prediction", prediction, "--timesteps", timesteps)
        assert run("train", "denoiser", pack, "-o", out, *words) == 0
        generator = ts.load_generator(out)
        assert generator.sampler.prediction == prediction
        assert (generator.sampler.method, generator.sampler.timesteps) == (method, timesteps)
        crop, mask = torch.rand(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32, dtype=torch.bool)
        mask[..., 12:20, 12:20, 12:20] = True
        assert torch.isfinite(generator.inpaint(crop, mask, seed=0)).all()
    more = ("--init", folder / "noise", "--steps", 2)
    assert run("train", "denoiser", pack, "-o", folder / "more", *TINY, *ae, *more) == 0


def test_trains_from_a_pack_without_the_extras(folder):
    """As on a machine with torch alone: no typer, rich, lightning, monai, nibabel, scipy."""
    assert run("train", "pack", folder / "data" / "dataset.json", "-o", folder / "p.npz") == 0
    code = (
        "import sys, runpy\n"
        "for name in ('typer', 'rich', 'lightning', 'monai', 'nibabel', 'scipy', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['x', *sys.argv[1:]]\n"
        "runpy.run_module('tumorsynth.training.denoiser', run_name='__main__')\n"
    )
    words = [folder / "p.npz", "-o", folder / "bare", "--autoencoder", folder / "ae"]
    words += ["--preset", "tiny", "--steps", 2]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ts.load_generator(folder / "bare").name == "bare"


def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, capsys):
    data, out = folder / "data" / "dataset.json", tmp_path / "out"
    with torch.random.fork_rng():
        four = Autoencoder(type(LIGHT)(**{**vars(LIGHT), "latent_channels": 4}))
    save_autoencoder(four, tmp_path / "four", {"name": "four"})
    (tmp_path / "cut").mkdir()
    for name in ("card.json", "model.safetensors"):
        raw = (folder / "ae" / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(raw if name == "card.json" else raw[:-1])
    stage1 = ("train", "autoencoder", data, "-o", out)
    stage2 = ("train", "denoiser", data, "-o", out, *TINY, "--autoencoder")
    for words, said in (
        (
            (*stage1, "--preset", "huge"),
            "--preset must be tiny or light or lung or base, got 'huge'",
        ),
        ((*stage1, "--patch-size", 52), "smaller than the patch of 52 mm"),
        ((*stage1, "--patch-size", 30), "--patch-size must be a multiple of 4, got 30"),
        (
            (*stage1, "--patch-size", 16, "--init", tmp_path / "four"),
            "has another size than",
        ),
        ((*stage1, "--steps", "many"), "--steps"),
        ((*stage2, folder / "ae", "--tumor-label", 9), "no voxels of tumour label 9, but of 1, 2"),
        ((*stage2, folder / "ae", "--max-diameter-mm", 8), "tumours of 9.7, 12.0 mm, none from"),
        ((*stage2, folder / "ae", "--patch-size", 36), "--patch-size must be a multiple of 8"),
        ((*stage2, "nothing"), "bundled generator (liver-early, lung), but nothing is not there"),
        ((*stage2, folder / "data"), "has no card.json: is its training finished?"),
        ((*stage2, tmp_path / "cut"), "is missing or not the file its card describes (sha256)"),
        ((*stage2, tmp_path / "four", "--network", "base"), "--contrast off"),
        (
            (*stage2, tmp_path / "four", "--network", "base", "--contrast", "off"),
            "8 latent channels and 4 mm",
        ),
        ((*stage2, tmp_path / "four", "--tissue-low", "300"), "--tissue-low must be below"),
        ((*stage2, tmp_path / "four", "--init", folder / "gen"), "denoiser of another size"),
        (("train", "pack", data, "-o", tmp_path / "pack.zip"), "must end in .npz"),
        (("train", "teapot"), "teapot"),
        (("train", "autoencoder", data), "--out"),
    ):
        assert run(*words) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0], lines
        assert not out.exists()
    # what a folder holds is said before the scans are read
    short = (*TINY, "--steps", 20, "--patch-size")
    for words, said in (
        (("autoencoder", "nowhere", "-o", folder / "ae", *short, 16), "add --resume"),
        (
            ("autoencoder", "nowhere", "-o", folder / "gen", *short, 16, "--resume"),
            "holds a run of `tumorsynth train denoiser`",
        ),
        (
            ("autoencoder", "nowhere", "-o", folder / "ae", *TINY, "--patch-size", 16, "--resume"),
            f"steps 20, now 200); it is finished: train it further with --init {folder / 'ae'}",
        ),
    ):
        assert run("train", *words) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0], lines
    shutil.copytree(folder / "ae", tmp_path / "made", ignore=lambda *_: ["checkpoint.pt"])
    words = ("autoencoder", "nowhere", "-o", tmp_path / "made", *short, 16, "--resume")
    assert run("train", *words) == 2
    assert "no checkpoint.pt to go on from" in capsys.readouterr().err
    # a run over one autoencoder does not go on over another
    assert run(*stage2[:4], folder / "gen", *TINY, "--autoencoder", tmp_path / "four") == 2
    assert "add --resume" in capsys.readouterr().err
    again = ("--steps", 20, "--patch-size", 32, "--resume")
    words = (*stage2[:4], folder / "gen", *TINY, "--autoencoder", tmp_path / "four", *again)
    assert run(*words) == 2
    assert "other settings (autoencoder" in capsys.readouterr().err


def test_help_and_inference_import_no_training(tmp_path):
    code = (
        "import sys\n"
        "from tumorsynth.commands.main import main\n"
        "main(['--help']); main(['info', 'hu2023'])\n"
        "bad = [m for m in sys.modules if m.startswith('tumorsynth.training')]\n"
        "assert not bad, bad\n"
        "main(['train', 'denoiser', '--help'])\n"
        "assert 'lightning' not in sys.modules and 'monai' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-diameter-mm" in done.stdout


def test_every_field_of_a_card_is_json(folder):
    for stage in ("ae", "gen"):
        card = json.loads((folder / stage / "card.json").read_text())
        assert card["training"]["steps"] == 20 and card["training"]["scans"]


def test_a_wrong_autoencoder_is_said_before_the_scans_are_read(tmp_path, capsys):
    scans = tmp_path / "no-such-folder"  # which would be said first
    out = tmp_path / "out"
    for words, name in (
        (["denoiser", scans, "-o", out, "--autoencoder", "nosuch"], "nosuch"),
        (["denoiser", scans, "-o", out, "--autoencoder", "liver-early", "--init", "none"], "none"),
        (["autoencoder", scans, "-o", out, "--init", "neither"], "neither"),
    ):
        assert main(["train", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert name in said and "no-such-folder" not in said and said.count("\n") == 1


def test_python_m_tumorsynth_and_folders_that_were_changed(folder, tmp_path, capsys):
    words = [sys.executable, "-m", "tumorsynth", "info", str(folder / "nothing")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tumorsynth: no generator")
    shutil.copytree(folder / "ae", tmp_path / "ae")
    card = json.loads((tmp_path / "ae" / "card.json").read_text())
    del card["config_sha256"]  # as earlier versions wrote it
    (tmp_path / "ae" / "card.json").write_text(json.dumps(card))
    assert run("info", tmp_path / "ae") == 0
    assert "no config_sha256, so a changed config" in capsys.readouterr().out
    card["config_sha256"] = "0"
    (tmp_path / "ae" / "card.json").write_text(json.dumps(card))
    assert run("info", tmp_path / "ae") == 2
    assert "must have its config_sha256" in capsys.readouterr().err
