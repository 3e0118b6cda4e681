"""benchmarks/downstream/downstream.py: tiny runs end to end; a comparison of arms is fair."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import balls
import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("lightning")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "downstream"
ANNOTATED, HEALTHY = 6, 3
TINY = "--spacing 2 2 2 --crop 16 16 16 --steps 2 --channels 4 --overlap 0 --size-mm 8 12".split()


@pytest.fixture
def downstream():
    from benchmarks.downstream import downstream

    return downstream


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Six annotated scans and three healthy ones; patient p0 has two of the annotated."""
    folder, cases = tmp_path_factory.mktemp("scans"), []
    for k in range(ANNOTATED + HEALTHY):
        case = replace(balls.make_cases(seed=k)[0], name=f"scan{k}")
        cases.append(replace(case, label=case.label.clamp(max=1)) if k >= ANNOTATED else case)
    path = balls.write_dataset(folder, cases)
    entries = json.loads(path.read_text())["training"]
    entries[0]["patient"] = entries[1]["patient"] = "p0"
    path.write_text(json.dumps({"training": entries[:ANNOTATED], "healthy": entries[ANNOTATED:]}))
    return path


def run(downstream, dataset, out, *flags):
    from lightning import Fabric

    words = [str(dataset), "-o", str(out), "--network", "unet", "--folds", "2", *TINY, *flags]
    args, settings = downstream.arguments(words)
    return downstream.run_all(args, settings, Fabric(accelerator="cpu", devices=1))


def test_three_arms_end_to_end(downstream, dataset, tmp_path, capsys):
    groups = tmp_path / "patients.csv"
    with groups.open("w", newline="") as file:
        rows = [[f"scan{k}", 40 + 5 * k, "FM"[k % 2]] for k in range(2, ANNOTATED + HEALTHY)]
        csv.writer(file).writerows([["patient", "age", "sex"], ["p0", 71, "F"], *rows])
    arms = ["--arm", "real", "real-and-healthy", "hand-crafted=hu2023"]
    flags = [*arms, "--groups", str(groups), "--p", "1", "--batch", "4", "--steps", "3"]
    found = run(downstream, dataset, tmp_path / "out", *flags)

    assert found["finished"] == "6 of 6 runs"
    told = {name: values for name, values in found["runs"].items() if "fold0" in name}
    assert {values["steps"] for values in told.values()} == {3}
    assert told["unet-hand-crafted-fold0-seed0"]["synthetic_tumors"] > 0
    assert told["unet-real-fold0-seed0"]["synthetic_tumors"] == 0
    assert told["unet-real-fold0-seed0"]["scans_listed_healthy"] == 0
    assert told["unet-real-and-healthy-fold0-seed0"]["scans_listed_healthy"] > 0
    assert {"test", "age 70-79", "sex F", "sex M"} <= found["tables"].keys()
    rows = found["tables"]["test"]["unet"]
    assert list(rows) == ["real", "real-and-healthy", "hand-crafted"]
    assert rows["hand-crafted"]["minus real"]["dsc"]["value"] is not None
    assert (tmp_path / "out" / "table.md").read_text().count("hand-crafted minus real") > 3
    scored = json.loads((tmp_path / "out" / "runs" / "unet-real-fold0-seed0.json").read_text())
    assert all(entry["scores"]["tumors"] in (0, 2) for entry in scored["test"])

    # again: nothing is trained anew
    before = (tmp_path / "out" / "runs" / "unet-real-fold0-seed0.json").stat().st_mtime_ns
    again = run(downstream, dataset, tmp_path / "out", *flags)
    assert "6 runs, 6 finished before" in capsys.readouterr().out
    assert again["tables"] == found["tables"]
    after = (tmp_path / "out" / "runs" / "unet-real-fold0-seed0.json").stat().st_mtime_ns
    assert after == before

    with pytest.raises(ValueError, match="other settings.*steps"):
        run(downstream, dataset, tmp_path / "out", *flags, "--steps", "5")


def test_partial_runs_give_a_partial_table(downstream, dataset, tmp_path):
    flags = ["--arm", "real", "real-and-healthy"]
    found = run(downstream, dataset, tmp_path, *flags, "--only-folds", "1")
    assert found["finished"] == "2 of 2 runs"
    assert run(downstream, dataset, tmp_path, *flags, "--table")["finished"] == "2 of 4 runs"
    (tmp_path / "runs" / "unet-real-fold0-seed0.json").write_text(
        (tmp_path / "runs" / "unet-real-fold1-seed0.json").read_text()
    )
    args, settings = downstream.arguments(
        [str(dataset), "-o", str(tmp_path), "--network", "unet", "--folds", "2", *flags]
    )
    runs = downstream.plan(args, [downstream.parse_arm(a) for a in args.arm])
    for planned in runs:
        planned["path"] = tmp_path / "runs" / f"{downstream.key_of(planned)}.json"
    partial = downstream.summarize(args, runs, settings)
    assert partial["finished"] == "3 of 4 runs"  # fold 0 has one arm only, and does not count
    assert partial["tables"]["test"] == found["tables"]["test"]


def test_arms_share_weights_and_crops(dataset, monkeypatch, downstream):
    """What a network sees differs between arms in the synthetic tumours alone."""
    from lightning import Fabric

    from benchmarks.downstream import downstream_data as data
    from benchmarks.downstream import downstream_training as training

    cases = data.read_dataset(dataset)
    settings = training.Settings(
        (2.0,) * 3, (16,) * 3, steps=3, channels=4, p=1.0, size_mm=(8, 12), batch=3
    )
    grid = data.deterministic(settings.spacing, settings.crop)
    loaded = [grid(data.as_dict(c)) for c in cases]
    index = {c.name: k for k, c in enumerate(cases)}
    seen: dict[str, list[torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    make = training.make_network

    def spied(name: str, arm: str):
        def made(network, chosen):
            model = make(network, chosen)
            weights[arm] = next(model.parameters()).detach().clone()
            hook = lambda _, inputs: seen.setdefault(arm, []).append(inputs[0].clone())  # noqa: E731
            model.register_forward_pre_hook(hook)
            return model

        return made

    for arm in (training.Arm("plain"), training.Arm("crafted", "hu2023")):
        monkeypatch.setattr(training, "make_network", spied("unet", arm.name))
        _, told = training.train(
            Fabric(accelerator="cpu", devices=1),
            "unet",
            arm,
            cases,
            loaded,
            index,
            settings,
            seed=5,
        )
    assert told["synthetic_tumors"] > 0
    assert weights["plain"].equal(weights["crafted"])
    same = [a == b for a, b in zip(seen["plain"], seen["crafted"], strict=True)]
    assert all(part.float().mean() > 0.5 for part in same)
    assert any(not part.all() for part in same)


def test_a_killed_run_goes_on(downstream, dataset, tmp_path, monkeypatch):
    from benchmarks.downstream import downstream_training as training

    flags = ["--arm", "real", "--only-folds", "0", "--steps", "4", "--save-every", "2"]
    whole, steps = training.DiceCELoss.forward, []

    def dies(self, *given):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(training.DiceCELoss, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        run(downstream, dataset, tmp_path, *flags)
    kept = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert kept == ["unet-real-fold0-seed0.ckpt", "unet-real-fold0-seed0.of.json"]
    found = run(downstream, dataset, tmp_path, *flags)
    assert len(steps) == 4 + 2  # the last two alone
    assert found["runs"]["unet-real-fold0-seed0"]["steps"] == 4
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["unet-real-fold0-seed0.json"]


def test_pools_hold_healthy_scans_alone(dataset):
    from benchmarks.downstream import downstream_data as data
    from benchmarks.downstream import downstream_training as training

    cases = data.read_dataset(dataset)[4:7]
    settings = training.Settings((2.0,) * 3, (16,) * 3, pool=2, size_mm=(8, 12), p=1.0)
    grid = data.deterministic(settings.spacing, settings.crop)
    loaded = [grid(data.as_dict(c)) for c in cases]
    index = {c.name: k for k, c in enumerate(cases)}
    arm = training.Arm("crafted", "hu2023")
    pool = training.make_pool(arm, cases, loaded, index, settings)
    assert {name: len(held) for name, held in pool.items()} == {"scan4": 0, "scan5": 0, "scan6": 2}
    one, two = (version["label"] for version in pool["scan6"])
    assert (one == 2).any() and not one.equal(two)
    alone = training.make_pool(arm, cases[2:], loaded, index, settings)  # in any other company
    assert alone["scan6"][0]["image"].equal(pool["scan6"][0]["image"])
    pick = data.RandVersion(pool, 1.0).set_random_state(0)
    assert any(pick(loaded[2])["label"].equal(one) for _ in range(8))
    assert pick(loaded[0])["label"] is loaded[0]["label"]
    assert not training.make_pool(training.Arm("real"), cases, loaded, index, settings)


def test_folds_keep_patients_apart(dataset, downstream):
    from benchmarks.downstream import downstream_data as data

    cases = data.read_dataset(dataset)
    for seed in range(5):
        folds = data.fold_of(cases, 3, seed)
        for fold in range(3):
            run = {"fold": fold, "annotated": None, "seed": 0}
            to_train, to_test = downstream.split(cases, folds, run)
            patients = [{c.patient for c in part} for part in (to_train, to_test)]
            assert patients[0].isdisjoint(patients[1])
            assert {c.name for c in to_train} | {c.name for c in to_test} == {c.name for c in cases}
            assert any(c.healthy for c in to_test) and any(not c.healthy for c in to_test)
    ill = [c for c in cases if not c.healthy]
    assert sorted(set(data.fold_of([*ill, cases[-1]], 3).values())) == [0, 1, 2]  # one healthy one
    few = data.annotated_only(cases, 2, 0)
    more = data.annotated_only(cases, 4, 0)
    assert sum(not c.healthy for c in few) == 2
    assert {c.name for c in few} < {c.name for c in more}


def test_own_folds_are_kept_and_checked(dataset):
    from benchmarks.downstream import downstream_data as data

    cases = [replace(c, fold=k % 2) for k, c in enumerate(data.read_dataset(dataset))]
    with pytest.raises(ValueError, match="patient p0 is in folds 0 and 1"):
        data.fold_of(cases, 5)
    cases[1] = replace(cases[1], fold=0)
    assert data.fold_of(cases, 5)["scan3"] == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "must be like"),
        ('{"training": [{"image": "a.nii.gz"}]}', "KeyError.*label"),
        ('{"training": []}', "lists no cases"),
        ('{"training": [{"image": "a.nii.gz", "label": "a.nii.gz"}]}', "a: no such file"),
        ('{"organ_labels": [1], "tumor_labels": [1], "training": []}', "organ or tumour"),
    ],
)
def test_bad_datasets_say_what_is_wrong(tmp_path, content, words):
    from benchmarks.downstream import downstream_data as data

    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        data.read_dataset(tmp_path / "dataset.json")


def test_label_values_are_mapped(dataset, tmp_path):
    """KiTS: organ 1, tumour 2, cyst 3, which counts as organ."""
    from benchmarks.downstream import downstream_data as data

    case = replace(data.read_dataset(dataset)[0], organ_labels=(2,), tumor_labels=(1,))
    got = data.deterministic((1, 1, 1), (16,) * 3)(data.as_dict(case))["label"]
    plain = data.deterministic((1, 1, 1), (16,) * 3)(data.as_dict(data.read_dataset(dataset)[0]))
    assert ((got == 2) == (plain["label"] == 1)).all()
    none = replace(case, organ_labels=(9,), tumor_labels=())
    with pytest.raises(RuntimeError, match="transform") as error:  # MONAI wraps it
        data.deterministic((1, 1, 1), (16,) * 3)(data.as_dict(none))
    assert "holds none of (9,)" in str(error.value.__cause__)


def test_groups_need_every_patient(tmp_path):
    from benchmarks.downstream import downstream_data as data

    path = tmp_path / "patients.csv"
    path.write_text("patient,age,sex\na,63.5,F\nb,,M\n")
    groups = data.read_groups(path, ["a", "b"])
    assert groups == {"age": {"a": "60-69", "b": "unknown"}, "sex": {"a": "F", "b": "M"}}
    with pytest.raises(ValueError, match="misses the patients c"):
        data.read_groups(path, ["a", "c"])


def test_tumour_stays_in_or_near_the_organ():
    from benchmarks.downstream import downstream_training as training

    found = np.zeros((20, 8, 8), np.uint8)
    found[2:8] = 1
    found[4:6, 4:6, 4:6] = 2  # in the organ
    found[8, 4, 4] = 2  # touching it
    found[15, 4, 4] = 2  # elsewhere
    settings = training.Settings()
    kept = training.postprocess(found, None, settings)
    assert kept[4, 4, 4] == 2 and kept[8, 4, 4] == 2 and kept[15, 4, 4] == 0
    organ = np.zeros(found.shape, bool)
    organ[2:8] = True
    strict = training.postprocess(found, organ, settings)
    assert strict[4, 4, 4] == 2 and strict[8, 4, 4] == 0
    near = training.postprocess(found, organ, replace(settings, keep_mm=2.0))
    assert near[8, 4, 4] == 2 and near[15, 4, 4] == 0


@pytest.mark.parametrize(
    ("network", "millions"),
    [("unet", 4.8), ("dynunet", 16.5), pytest.param("swinunetr", None, marks=pytest.mark.slow)],
)
def test_published_networks(network, millions):
    """The sizes that the paper's settings give."""
    from benchmarks.downstream import downstream_training as training

    if network == "swinunetr":
        model = training.make_network(network, training.Settings(channels=12))
        with torch.no_grad():
            assert model(torch.zeros(1, 1, 64, 64, 64)).shape == (1, 3, 64, 64, 64)
        with pytest.raises(ValueError, match="multiple of 32 voxels, twice that"):
            training.make_network(network, training.Settings(crop=(32, 32, 32)))
        return
    with torch.device("meta"):
        model = training.make_network(network, training.Settings())
        out = model(torch.empty(1, 1, 96, 96, 96))
    assert out.shape == (1, 3, 96, 96, 96)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_differences_are_paired(downstream):
    """Two arms whose scores differ by the same in every patient differ without any doubt."""
    from benchmarks.downstream import downstream_table as tables
    from tumorsynth.evaluation.metrics import CaseScores

    def case(dsc):
        return CaseScores(dsc, dsc, None, None, 1, 1, 0, 1, 1, 0, (9.0,), (True,))

    worse = {f"p{k}": [case(0.1 * k)] for k in range(8)}
    better = {p: [case(s[0].dsc + 0.05)] for p, s in worse.items()}
    rows = tables.compared({"real": worse, "synthetic": better}, draws=200)
    low, high = rows["synthetic"]["minus real"]["dsc"]["ci95"]
    assert low == pytest.approx(0.05) and high == pytest.approx(0.05)
    wide = rows["real"]["dsc"]["ci95"]
    assert wide[1] - wide[0] > 0.1
    few = tables.compared({"real": {p: worse[p] for p in ("p1", "p2")}})
    assert few["real"]["dsc"] == {"value": 0.15, "ci95": None}
    with pytest.raises(ValueError, match="not tested on the same patients"):
        tables.compared({"real": worse, "synthetic": {"p0": [case(1.0)]}})


def test_phantom_lesions_are_whole_and_in_the_liver(tmp_path):
    from scipy import ndimage

    from benchmarks.downstream import downstream_phantoms as phantoms

    image, label, _ = phantoms.make_patient(1, phantoms.Shapes(), True, spacing=4.0)
    parts, count = ndimage.label(label == phantoms.TUMOR, np.ones((3, 3, 3)))
    assert 1 <= count <= 4
    assert np.bincount(parts.ravel())[1:].min() > 1
    assert abs(float(np.median(image[label == 1])) - 108) < 25
    tumor, organ = image[label == 2], image[label == 1]
    assert abs(tumor.mean() - organ.mean()) > 5


@pytest.mark.parametrize("words", ["synthetic", "real=hu2023", "=hu2023"])
def test_arms_that_are_none(downstream, words):
    with pytest.raises(ValueError, match="arm"):
        downstream.parse_arm(words)


@pytest.mark.slow
def test_two_processes_share_a_run(dataset, tmp_path):
    """``fabric run``: one result, from both."""
    flags = ["--network", "unet", "--folds", "2", "--only-folds", "0", "--arm", "real", *TINY]
    script = [str(BENCHMARKS / "downstream.py"), str(dataset), "-o", str(tmp_path), *flags]
    launch = ["-m", "lightning.fabric.cli", "--accelerator", "cpu", "--devices", "2"]
    done = subprocess.run([sys.executable, *launch, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    held = json.loads(path.read_text())
    assert held["run"]["steps"] == 2
    assert len(held["test"]) == len({entry["case"] for entry in held["test"]}) >= 3
