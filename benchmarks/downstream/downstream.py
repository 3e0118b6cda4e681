"""Does it help? A segmentation network trained with and without synthetic tumours.

    python benchmarks/downstream/downstream.py Task03/dataset.json --healthy healthy.json -o OUT
    fabric run --devices 8 benchmarks/downstream/downstream.py ...             # several GPUs
    python benchmarks/downstream/downstream.py --preset small -o OUT       # minutes, on phantoms

Every --network is trained in every --arm on every fold, tested on the scans of the fold, and
compared in OUT/table.md and OUT/table.json. A run that is finished lies in OUT/runs and is not
repeated: the same command goes on after a kill. README.md has a command for each table of the
paper, and what the small run does and does not show.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.downstream.downstream_data import (
    Case,
    annotated_only,
    as_dict,
    deterministic,
    fold_of,
    read_dataset,
    read_groups,
)
from benchmarks.downstream.downstream_phantoms import write_cohort
from benchmarks.downstream.downstream_table import by_patient, compared, table
from benchmarks.downstream.downstream_training import (
    NETWORKS,
    Arm,
    Settings,
    make_pool,
    test,
    train,
)
from tumorsynth.training.config import Hardware
from tumorsynth.training.launch import launch

ARMS = ("real", "real-and-healthy", "synthetic=liver-early", "hand-crafted=hu2023")
SMALL = Settings(
    spacing=(3.0, 3.0, 3.0),
    crop=(32, 32, 32),
    window=(0.0, 200.0),
    steps=800,
    lr=2e-3,
    overlap=0.25,
    keep_mm=6.0,
    channels=8,
    centre_on="tumor",
    pool=3,
)
SMALL_COHORT = {"annotated": 24, "healthy": 12}
SMALL_FLAGS = {"network": ["unet", "dynunet"], "folds": 3, "annotated": [8]}


def parse_arm(words: str) -> Arm:
    """NAME: real tumours alone; NAME=GENERATOR: with synthetic ones. "real" leaves out the scans
    without tumours, as the paper's baseline does; any other name keeps them."""
    name, _, generator = words.partition("=")
    if not name or (not generator and name not in ("real", "real-and-healthy")):
        raise ValueError(
            f"an arm is real, real-and-healthy or NAME=GENERATOR, got {words!r}; "
            "for example t4=liver-early"
        )
    if generator and name in ("real", "real-and-healthy"):
        raise ValueError(f"the arm {name} has no generator, got {words!r}; choose another name")
    return Arm(name, generator or None, with_healthy=name != "real")


def plan(args: argparse.Namespace, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every run that the flags ask for, all arms of a fold next to each other."""
    return [
        {"network": network, "arm": arm, "fold": fold, "seed": seed, "annotated": count}
        for seed in args.seeds
        for fold in (range(args.folds) if args.only_folds is None else args.only_folds)
        for count in args.annotated
        for network in args.network
        for arm in arms
    ]


def key_of(run: dict[str, Any]) -> str:
    count = "" if run["annotated"] is None else f"-n{run['annotated']}"
    return f"{run['network']}-{run['arm'].name}{count}-fold{run['fold']}-seed{run['seed']}"


def split(
    cases: Sequence[Case], folds: dict[str, int], run: dict[str, Any]
) -> tuple[list[Case], list[Case]]:
    """(to train on, to test on): no patient is in both. The same for every arm and network."""
    rest = [c for c in cases if folds[c.patient] != run["fold"]]
    held = [c for c in cases if folds[c.patient] == run["fold"]]
    return annotated_only(rest, run["annotated"], seed=run["seed"]), held


def finished(path: Path, identity: dict[str, Any]) -> bool:
    """Whether the run is there, made with these very settings; ValueError if with others."""
    if not path.is_file():
        return False
    before = json.loads(path.read_text())["identity"]
    now = json.loads(json.dumps(identity))
    differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if differ:
        what = "; ".join(f"{k} {before.get(k)!r}, now {now.get(k)!r}" for k in differ)[:400]
        raise ValueError(f"{path} was made with other settings ({what}); choose another --out")
    return True


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def run_all(args: argparse.Namespace, settings: Settings, fabric: Any) -> dict[str, Any]:
    """All runs that are not finished yet, then the table of all that are."""
    cases = read_dataset(args.data)
    if args.healthy:
        cases += read_dataset(args.healthy, healthy=True)
    extra = read_dataset(args.test) if args.test else []
    known = {c.patient for c in cases}
    both = sorted({c.patient for c in extra} & known)
    if both:
        raise ValueError(f"patients of --test are in the data too: {', '.join(both[:10])}")
    folds = fold_of(cases, args.folds, args.fold_seed)
    arms = [parse_arm(words) for words in args.arm]
    runs = plan(args, arms)
    todo = []
    for run in runs:
        run["identity"] = {
            **{k: v for k, v in run.items() if k != "arm"},
            "arm": asdict(run["arm"]),
            "settings": asdict(settings),
            "folds": sorted(folds.items()),
            "extra": sorted(c.name for c in extra),
        }
        run["path"] = args.out / "runs" / f"{key_of(run)}.json"
        if not finished(run["path"], run["identity"]) and not args.table:
            todo.append(run)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before", flush=True)
    everything = [*cases, *extra]
    index = {c.name: k for k, c in enumerate(everything)}
    if len(index) < len(everything):
        raise ValueError("scans of --healthy or --test have names of the data; rename their files")
    if todo:
        from monai.data import CacheDataset

        loaded = CacheDataset(
            [as_dict(c) for c in everything],
            deterministic(settings.spacing, settings.crop),
            cache_rate=args.cache_rate,
            num_workers=args.workers,
            progress=False,
        )
    pools: dict[str, Any] = {}
    for run in todo:
        arm = run["arm"]
        to_train, to_test = split(cases, folds, run)
        pool = pools.setdefault(arm.name, {})
        new = [c for c in to_train if c.name not in pool]
        pool.update(make_pool(arm, new, loaded, index, settings))
        start = time.process_time()
        model, told = train(
            fabric, run["network"], arm, to_train, loaded, index, settings, run["seed"],
            args.workers, pool, checkpoint=_checkpoint(fabric, run), save_every=args.save_every,
        )  # fmt: skip
        found = test(fabric, model, [*to_test, *extra], loaded, index, settings)
        told["cpu_seconds"] = round(time.process_time() - start, 1)
        if fabric.is_global_zero:
            entries = {
                part: [
                    {"case": c.name, "patient": c.patient, "scores": found[c.name].as_dict()}
                    for c in scored
                ]
                for part, scored in (("test", to_test), ("extra", extra))
            }
            write_json(run["path"], {"identity": run["identity"], "run": told, **entries})
            for rest in (".ckpt", ".of.json"):
                run["path"].with_suffix(rest).unlink(missing_ok=True)
            print(f"{key_of(run)}: {told}", flush=True)
        fabric.barrier()
    results = summarize(args, runs, settings)
    markdown = results.pop("markdown")
    if fabric.is_global_zero:
        write_json(args.out / "table.json", results)
        (args.out / "table.md").write_text(markdown)
        print(markdown)
    return results


def _checkpoint(fabric: Any, run: dict[str, Any]) -> Path:
    """Where an unfinished run is kept; what other settings left there goes."""
    path, note = run["path"].with_suffix(".ckpt"), run["path"].with_suffix(".of.json")
    if fabric.is_global_zero:
        now = json.loads(json.dumps(run["identity"]))
        if not note.is_file() or json.loads(note.read_text()) != now:
            path.unlink(missing_ok=True)
            write_json(note, now)
    fabric.barrier()
    return path


def summarize(
    args: argparse.Namespace, runs: Sequence[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """Tables of what is finished; a fold counts where all arms of a network have it."""
    held = {key_of(r): json.loads(r["path"].read_text()) for r in runs if r["path"].is_file()}
    names = [parse_arm(words).name for words in args.arm]
    out: dict[str, Any] = {
        "environment": environment(),
        "command": args.command,
        "settings": asdict(settings),
        "finished": f"{len(held)} of {len(runs)} runs",
        "cpu_seconds": round(sum(r["run"]["cpu_seconds"] for r in held.values()), 1),
    }
    parts, text = {}, []
    for count in args.annotated:
        chosen: dict[str, dict[str, list[Any]]] = {}
        for network in args.network:
            mine = [r for r in runs if (r["network"], r["annotated"]) == (network, count)]
            at = {(r["fold"], r["seed"]) for r in mine}
            whole = [
                p for p in sorted(at)
                if all(key_of(r) in held for r in mine if (r["fold"], r["seed"]) == p)
            ]  # fmt: skip
            if whole:
                chosen[network] = {
                    name: [
                        held[key_of(r)] for r in mine
                        if r["arm"].name == name and (r["fold"], r["seed"]) in whole
                    ]
                    for name in names
                }  # fmt: skip
        if not chosen:
            continue
        patients = sorted({e["patient"] for n in chosen.values() for a in n.values()
                           for r in a for e in r["test"]})  # fmt: skip
        groups: dict[str, list[str] | None] = {"test": None}
        if args.groups:
            for column, group in read_groups(args.groups, patients).items():
                for value in sorted(set(group.values())):
                    groups[f"{column} {value}"] = [p for p in patients if group[p] == value]
        if args.test:
            groups["extra"] = None
        for title, members in groups.items():
            part = "extra" if title == "extra" else "test"
            results = {
                network: compared({n: by_patient(rs, part, members) for n, rs in by_arm.items()})
                for network, by_arm in chosen.items()
            }
            label = title if count is None else f"{title}, {count} annotated scans"
            parts[label] = results
            text.append(f"### {label}\n\n{table(results)}\n")
    return {**out, "tables": parts, "runs": {k: r["run"] for k, r in held.items()},
            "markdown": "\n".join(text)}  # fmt: skip


def arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="dataset.json; with --preset small, phantoms if none")
    add("-o", "--out", type=Path, required=True)
    add("--preset", choices=["paper", "small"], default="paper")
    add("--healthy", type=Path, help="dataset.json of scans without tumours, the organ labelled")
    add("--test", type=Path, help="dataset.json of scans never trained on, tested by every run")
    add("--arm", nargs="+", default=list(ARMS), help="the first is what the others are compared to")
    add("--network", nargs="+", choices=NETWORKS, help="all three, small: unet dynunet")
    add("--folds", type=int, help="5, small: 3")
    add("--only-folds", type=int, nargs="+", help="the others later, or elsewhere")
    add("--fold-seed", type=int, default=0)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--annotated", type=int, nargs="+", help="annotated scans to train on; all, small: 8")
    add("--groups", type=Path, help='CSV with a column "patient": a table for each group')
    add("--shapes", type=Path, help="small: real masks for the phantoms' lesions")
    add("--cache-rate", type=float, default=1.0, help="share of the scans kept in memory")
    add("--workers", type=int, default=0)
    add("--table", action="store_true", help="train nothing; the tables of what is finished")
    add("--save-every", type=int, default=1000, help="steps between checkpoints of a run")
    add("--precision", default="32-true", help="of Lightning Fabric, as those that follow")
    for name in ("accelerator", "devices", "num_nodes", "strategy"):
        kind = int if name == "num_nodes" else str
        add("--" + name.replace("_", "-"), type=kind, help="left to `fabric run`, torchrun, SLURM")
    for f in fields(Settings):
        many = isinstance(f.default, tuple)
        kind = type(f.default[0] if many else f.default)
        add("--" + f.name.replace("_", "-"), type=kind, nargs=len(f.default) if many else None)
    args = parser.parse_args(argv)
    args.command = "python benchmarks/downstream/downstream.py " + _without_paths(args, parser)
    base = SMALL if args.preset == "small" else Settings()
    given = {f.name: getattr(args, f.name) for f in fields(Settings)}
    settings = replace(
        base,
        **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None},
    )
    usual = SMALL_FLAGS if args.preset == "small" else {}
    args.network = args.network or usual.get("network", list(NETWORKS))
    args.folds = args.folds or usual.get("folds", 5)
    args.annotated = args.annotated or usual.get("annotated", [None])
    if args.data is None:
        if args.preset != "small":
            parser.error("name a dataset.json, or take --preset small for phantoms")
    return args, settings


def _without_paths(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The flags that were given, files by their names alone."""
    words = [args.data.name] if args.data else []
    for name, value in vars(args).items():
        if name in ("data", "command", "out", "table") or value == parser.get_default(name):
            continue
        values = value if isinstance(value, list) else [value]
        shown = " ".join(v.name if isinstance(v, Path) else str(v) for v in values)
        words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def main() -> None:
    args, settings = arguments()
    hardware = Hardware(args.accelerator, args.devices, args.num_nodes, args.strategy)
    fabric = launch(hardware, args.precision)
    if args.data is None:
        args.data = args.out / "phantoms" / "dataset.json"
        if fabric.is_global_zero:
            write_cohort(args.data.parent, shapes=args.shapes, **SMALL_COHORT)
        fabric.barrier()
    run_all(args, settings, fabric)


if __name__ == "__main__":
    main()
