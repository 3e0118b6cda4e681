"""Interrupted, resumed and split trainings end where an uninterrupted one does."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from balls import make_cases
from safetensors.torch import load_file

from tumorsynth.scans.errors import exit_code
from tumorsynth.training import autoencoder, denoiser, engine
from tumorsynth.training.config import AutoencoderTraining, DataConfig, DenoiserTraining, Hardware
from tumorsynth.training.data import save_pack
from tumorsynth.training.engine import Diverged
from tumorsynth.training.folders import read_autoencoder
from tumorsynth.training.launch import launch
from tumorsynth.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"network": "tiny", "picture_every": 0, "log_every": 1, "warmup": 5}
STAGE1 = AutoencoderTraining(steps=14, patch_size=16, batch_size=2, save_every=5, lr=4e-3, **SMALL)
EVERYTHING = {  # each part of stage 1 that has a state of its own
    "codes": 32,
    "ema": 0.9,
    "perceptual": "gradient",
    "adversarial_weight": 0.1,
    "adversarial_start": 0.3,
    "discriminator_width": 4,
    "dead_code_every": 4,
}
STAGE2 = DenoiserTraining(
    steps=40, patch_size=32, batch_size=2, save_every=3, lr=2e-3, pool=8, reuse=3, **SMALL
)


@pytest.fixture(scope="module")
def cases():
    return make_cases()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cases):
    """An autoencoder folder and a pack of the cases."""
    folder = tmp_path_factory.mktemp("trained")
    autoencoder.train(cases, folder / "ae", STAGE1)
    save_pack(cases, folder / "pack.npz")
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


def losses(folder):
    with (folder / "log.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def flags(config):
    """The command line of a config."""
    words = []
    for key, value in vars(config).items():
        words += [] if value is None else [f"--{key.replace('_', '-')}", str(value)]
    return words


def command(*words):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums depend on it
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tumorsynth.commands.main", "train", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_denoiser_goes_on_to_the_same_weights(trained, cases, tmp_path, unmeasured):
    ae = str(trained / "ae")
    run = tmp_path / "killed"
    words = ["denoiser", trained / "pack.npz", "-o", run, "--autoencoder", ae, *flags(STAGE2)]
    process = command(*words)
    deadline = time.time() + 600
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))  # anywhere: in a step, in a save
    process.kill()
    process.communicate()
    assert not (run / "card.json").exists(), "it was done before it could be killed"

    denoiser.train(cases, ae, run, STAGE2, resume=True)
    denoiser.train(cases, ae, tmp_path / "whole", STAGE2)
    assert_same(run, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == STAGE2.steps
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("unread", [0, 1])  # 1: as on a GPU
def test_sigterm_saves_and_everything_of_stage_1_is_resumed(
    cases, tmp_path, unmeasured, monkeypatch, unread
):
    config = AutoencoderTraining(**{**vars(STAGE1), **EVERYTHING, "save_every": 1000})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    autoencoder.train(cases, whole, config)
    monkeypatch.setitem(engine.UNREAD_STEPS, "cpu", unread)

    def stop():
        while not (stopped / "log.csv").exists() or len(losses(stopped)) < 6:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(SystemExit) as caught:
        autoencoder.train(cases, stopped, config)
    watcher.join()
    assert caught.value.code == 128 + signal.SIGTERM
    saved = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert 6 <= saved["step"] < config.steps
    assert not (stopped / "card.json").exists()
    autoencoder.train(cases, stopped, config, resume=True)
    assert_same(stopped, whole)
    assert losses(stopped) == losses(whole)


def test_resume_of_a_finished_run_changes_nothing(trained, cases):
    def told():
        card = json.loads((trained / "ae" / "card.json").read_text())
        del card["metrics"]["seconds"]
        return card

    before, card = weights(trained / "ae"), told()
    checkpoint = torch.load(trained / "ae" / "checkpoint.pt", weights_only=True)
    assert checkpoint["seconds"] > 0
    autoencoder.train(cases, trained / "ae", STAGE1, resume=True)
    assert all(torch.equal(v, before[k]) for k, v in weights(trained / "ae").items())
    assert told() == card  # and its seconds are those of the training still


def test_other_labels_are_other_data_also_for_a_finished_run(trained, cases, tmp_path, unmeasured):
    config = DenoiserTraining(**{**vars(STAGE2), "steps": 1})
    denoiser.train(cases, str(trained / "ae"), tmp_path / "run", config)
    relabelled = replace(cases[0], label=cases[0].label.flip(0).contiguous())
    flipped = replace(cases[1], hu=cases[1].hu.flip(0).contiguous())
    again = {"config": config, "resume": True}
    for changed in ([relabelled, cases[1]], [cases[0], flipped], cases[:1]):
        name = next(c.name for c in cases if not any(c is other for other in changed))
        with pytest.raises(ValueError, match=f"trained with other settings .other scans: {name}.;"):
            denoiser.train(changed, str(trained / "ae"), tmp_path / "run", **again)
    with pytest.raises(ValueError, match="other settings .tumor_label 2, now 1.;"):
        label = DataConfig(tumor_label=1)
        denoiser.train(cases, str(trained / "ae"), tmp_path / "run", data=label, **again)
    denoiser.train(cases, str(trained / "ae"), tmp_path / "run", **again)


def test_what_a_run_started_from_is_in_its_card_and_belongs_to_it(
    trained, cases, tmp_path, capsys, unmeasured
):
    start = read_autoencoder(str(trained / "ae"))[1]
    one = AutoencoderTraining(**{**vars(STAGE1), "steps": 1})
    two = DenoiserTraining(**{**vars(STAGE2), "steps": 1})
    from_ae = {"init": str(trained / "ae")}
    autoencoder.train(cases, tmp_path / "ae2", one, card={"licence": "CC0"}, **from_ae)
    denoiser.train(cases, str(trained / "ae"), tmp_path / "gen", two)
    capsys.readouterr()
    denoiser.train(cases, str(trained / "ae"), tmp_path / "gen2", two, init=str(tmp_path / "gen"))
    assert "another autoencoder" not in capsys.readouterr().err
    denoiser.train(cases, str(tmp_path / "ae2"), tmp_path / "gen3", two, init=str(tmp_path / "gen"))
    assert "trained over another autoencoder, whose latent" in capsys.readouterr().err

    def card(name):
        return json.loads((tmp_path / name / "card.json").read_text())

    assert card("ae2")["init"]["sha256"] == start["sha256"] and card("ae2")["licence"] == "CC0"
    assert card("ae2")["init"]["licence"] == start["licence"]
    made = card("gen")
    assert "init" not in made and made["licence"].endswith("trained on and of its autoencoder, ae")
    for name in ("gen2", "gen3"):
        assert card(name)["init"]["sha256"] == made["sha256"]
        assert (
            "and of what it started from, gen and of its autoencoder, ae" in card(name)["licence"]
        )
    assert card("gen3")["autoencoder"]["init"]["name"] == "ae"
    shutil.rmtree(tmp_path / "gen")  # whatever lies there now, it is not what was started from
    shutil.copytree(tmp_path / "gen3", tmp_path / "gen")
    again = {"init": str(tmp_path / "gen"), "resume": True}
    with pytest.raises(ValueError, match="trained with other settings .init "):
        denoiser.train(cases, str(trained / "ae"), tmp_path / "gen2", two, **again)


def test_one_run_at_a_time_in_a_folder(cases, tmp_path, unmeasured):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)  # as another run holds it
    fcntl.flock(handle, fcntl.LOCK_EX)
    config = AutoencoderTraining(**{**vars(STAGE1), "steps": 1})
    with pytest.raises(ValueError, match="only one run may write into a folder"):
        autoencoder.train(cases, tmp_path / "run", config)
    assert not list((tmp_path / "run").iterdir())
    os.close(handle)
    autoencoder.train(cases, tmp_path / "run", config)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["log.csv", "model.safetensors"])
def test_a_disk_that_fills_names_the_file_and_the_remedy(
    cases, tmp_path, monkeypatch, name, unmeasured
):
    run = tmp_path / "run"
    run.mkdir()
    if name == "log.csv":
        (run / name).symlink_to("/dev/full")
    else:
        mkstemp_of_python = tempfile.mkstemp

        def mkstemp(dir, prefix):
            path = f"{dir}/{prefix}x"
            os.symlink("/dev/full", path)
            return os.open(path, os.O_WRONLY), path

        monkeypatch.setattr("tumorsynth.generators.folder.tempfile.mkstemp", mkstemp)
    config = AutoencoderTraining(**{**vars(STAGE1), "steps": 1})
    with pytest.raises(OSError, match=r"cannot be written .*No space left.*make room") as caught:
        autoencoder.train(cases, run, config)
    assert exit_code(caught.value) == 1
    if name != "log.csv":
        assert f"{run}/{name}" in str(caught.value) and "checkpoint.pt stays" in str(caught.value)
        monkeypatch.setattr("tumorsynth.generators.folder.tempfile.mkstemp", mkstemp_of_python)
        autoencoder.train(cases, run, config, resume=True)
        assert (run / name).is_file()


def test_a_gpu_that_is_not_there_is_said_before_the_scans_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def read():
        raise AssertionError("the scans were read")

    for kind in ("cuda", "gpu", "mps"):
        with pytest.raises(ValueError, match=f"--accelerator {kind}: there is no such GPU here"):
            autoencoder.train(read, tmp_path / "run", STAGE1, Hardware(accelerator=kind))


def test_two_processes_as_one(trained, cases, tmp_path, unmeasured):
    """Same global batch, same crops, same noise: the same loss curve but for the last digits."""
    short = {"steps": 6, "precision": "32-true"}
    config2 = DenoiserTraining(**{**vars(STAGE2), **short, "batch_size": 4, "accumulate": 2})
    # hollowed cubes have equal latents, and rounding decides which of two like codes is nearest
    config1 = AutoencoderTraining(**{**vars(STAGE1), **EVERYTHING, **short, "hollow": 0.0})
    ae = str(trained / "ae")
    two2 = command(
        *("denoiser", trained / "pack.npz", "-o", tmp_path / "two2", "--autoencoder", ae),
        *(*flags(config2), "--devices", "2", "--accelerator", "cpu"),
    )
    two1 = subprocess.Popen(  # as torchrun and SLURM do: the processes are there already
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(random.randint(20000, 40000)), "-m", "tumorsynth.commands.main"),
            *("train", "autoencoder", str(trained / "pack.npz"), "-o", str(tmp_path / "two1")),
            *(*flags(config1), "--accelerator", "cpu"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    denoiser.train(cases, ae, tmp_path / "one2", config2)
    autoencoder.train(cases, tmp_path / "one1", config1)
    for process in (two1, two2):
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
    for stage in ("1", "2"):
        one, two = losses(tmp_path / f"one{stage}"), losses(tmp_path / f"two{stage}")
        assert one.keys() == two.keys() and len(one) == 6
        for step, value in one.items():
            assert two[step] == pytest.approx(value, rel=1e-4), (stage, step)
        assert '"processes": 2' in (tmp_path / f"two{stage}" / "card.json").read_text()


@pytest.mark.parametrize(
    ("variables", "hardware", "expected"),
    [
        ({}, Hardware(), {"devices": 1}),
        ({}, Hardware(devices="2", strategy="ddp"), {"devices": 2, "strategy": "ddp"}),
        ({}, Hardware(devices="0,1"), {"devices": "0,1"}),
        # as srun starts a task: Lightning reads SLURM's own variables
        ({"SLURM_NTASKS": "2"}, Hardware(devices="1", num_nodes=2), {"devices": 1, "num_nodes": 2}),
        # as torchrun starts one
        (
            {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"},
            Hardware(),
            {"devices": 2, "num_nodes": 3},
        ),
        # as `fabric run` starts one, which says the rest itself
        ({"LT_CLI_USED": "1", "LT_DEVICES": "2"}, Hardware(), {}),
    ],
)
def test_what_fabric_is_told(monkeypatch, variables, hardware, expected):
    told, launched = [], []

    class Recorder:
        def __init__(self, **given):
            told.append(given)

        def launch(self):
            launched.append(self)

    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "LT_CLI_USED", "LT_DEVICES", "LT_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning.fabric.Fabric", Recorder)
    monkeypatch.setattr("tumorsynth.training.launch.atexit.register", lambda _: None)
    launch(hardware, "32-true")
    assert told == [{**expected, "precision": "32-true"}]
    assert len(launched) == ("LT_CLI_USED" not in variables)


@pytest.mark.slow  # imports Lightning twice more; test_what_fabric_is_told and _as_one are quick
def test_two_nodes_under_slurm(trained, cases, tmp_path, unmeasured):
    """A process per node, told by the variables that srun sets: as one process."""
    # without hollowed cubes, as in test_two_processes_as_one
    short = {"steps": 4, "precision": "32-true", "hollow": 0.0}
    config = AutoencoderTraining(**{**vars(STAGE1), **short})
    port = str(random.randint(20000, 40000))
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "2", "NNODES": "2", "NTASKS_PER_NODE": "1"}
    tasks = []
    for node in ("0", "1"):
        mine = {**job, "PROCID": node, "NODEID": node, "LOCALID": "0", "NODELIST": "127.0.0.1"}
        tasks.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tumorsynth.training.autoencoder"),
                    *(str(trained / "pack.npz"), "-o", str(tmp_path / "two")),
                    *(*flags(config), "--num-nodes", "2", "--devices", "1", "--accelerator", "cpu"),
                ],
                env={
                    **os.environ,
                    **{f"SLURM_{name}": value for name, value in mine.items()},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                    **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    autoencoder.train(cases, tmp_path / "one", config)
    for task in tasks:
        said = task.communicate(timeout=600)[0]
        assert task.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4 and list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    assert '"processes": 2' in (tmp_path / "two" / "card.json").read_text()


def test_accumulated_parts_make_the_same_step(trained, cases, tmp_path, unmeasured):
    ae = str(trained / "ae")
    for parts in (1, 4):
        changes = {"steps": 3, "batch_size": 4, "accumulate": parts, "precision": "32-true"}
        config = DenoiserTraining(**{**vars(STAGE2), **changes})
        denoiser.train(cases, ae, tmp_path / str(parts), config)
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert list(one.values()) == pytest.approx(list(four.values()), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(trained, cases, tmp_path):
    config = AutoencoderTraining(**{**vars(STAGE1), "lr": 1e30, "save_every": 1, "warmup": 0})
    with pytest.raises(Diverged, match=r"not finite at step \d+ .*lower --lr 1e\+30"):
        autoencoder.train(cases, tmp_path / "run", config)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] < config.steps and not (tmp_path / "run" / "card.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    class Full:
        """Cannot be written: as a full disk, in the middle of the file."""

        def state_dict(self):
            raise OSError(28, "No space left on device")

    class Part:
        def state_dict(self):
            return {"a": torch.ones(3)}

    run = RunFolder(tmp_path, {"seed": 0}, resume=False)
    run.save(1, {"model": Part()})
    with pytest.raises(OSError, match="No space left"):
        run.save(2, {"model": Part(), "other": Full()})
    saved = run.load()
    assert saved is not None and saved["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_checkpoint_that_cannot_be_written_names_the_one_that_stays(tmp_path):
    run = RunFolder(tmp_path, {"seed": 0}, resume=False)

    class Part:
        def state_dict(self):
            return {"a": torch.ones(100_000)}

    run.save(1, {"model": Part()})
    temporary = tmp_path / f".checkpoint.pt.{os.getpid()}"
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match="step 2 cannot be written.*the last checkpoint stays"):
        run.save(2, {"model": Part()})
    saved = run.load()
    assert saved is not None and saved["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt"]


def test_resume_refuses_other_settings_data_and_damaged_files(trained, cases, tmp_path, unmeasured):
    run = tmp_path / "run"
    autoencoder.train(cases, run, AutoencoderTraining(**{**vars(STAGE1), "steps": 2}))
    with pytest.raises(ValueError, match="holds checkpoint.pt and card.json.*--resume"):
        autoencoder.train(cases, run, STAGE1)
    with pytest.raises(
        ValueError, match="other settings .steps 2, now 14.*--init .*run and another --out"
    ):
        autoencoder.train(cases, run, STAGE1, resume=True)
    (run / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint"):
        autoencoder.train(cases, run, STAGE1, resume=True)


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, cases):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "run").mkdir()
    torch.save({"format": 1, "identity": Evil()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no checkpoint"):
        autoencoder.train(cases, tmp_path / "run", STAGE1, resume=True)
    assert not (tmp_path / "ran").exists()


def test_one_process_without_lightning_trains_the_same(
    trained, cases, tmp_path, monkeypatch, unmeasured
):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)  # as where it is not installed
    autoencoder.train(cases, tmp_path / "alone", STAGE1)
    assert_same(tmp_path / "alone", trained / "ae")
    with pytest.raises(ModuleNotFoundError, match=r"needs lightning.*tumorsynth\[train\]"):
        autoencoder.train(cases, tmp_path / "two", STAGE1, Hardware(devices="2"))


def test_autoencoder_folder_round_trip(trained):
    network, card = read_autoencoder(str(trained / "ae"))
    assert card["kind"] == "autoencoder" and card["training"]["steps"] == STAGE1.steps
    assert float(network.latent_low) < float(network.latent_high)
    assert not any(p.requires_grad for p in network.parameters())
