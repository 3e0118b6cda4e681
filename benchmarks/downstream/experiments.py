"""The experiments: which tumours are annotated, which are tested, and which arms there are.

Patients are never on both sides of a job. Of the scans without tumours, even seeds train on every
other one from the first on and count false positives in the rest; odd seeds the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.downstream.arms import ARMS, Arm
from benchmarks.downstream.pack import Scan

EARLY_MM = 20.0
# Patients of liver.json that can be annotated, in the order in which folds start and n grows.
ANNOTATED = (
    "ircadb_p01",
    "radcttace_0745_eqp",
    "radcttace_0697_eqp",
    "radcttace_1720_eqp",
    "radcttace_2144_eqp",
    "crlm_1100_lowres",
)
# Patients that are tested, in halves: an upper bound learns from the half that does not test it.
HALVES = (
    ("lits000", "radcttace_0745_eqp", "radcttace_1720_eqp", "hcc_015_pv"),
    ("crlm_1006", "radcttace_0697_eqp", "radcttace_2144_eqp", "crlm_1100_lowres", "ircadb_p01"),
)
LARGE = (
    "radcttace_0745_eqp",
    "radcttace_1720_eqp",
    "radcttace_2144_eqp",
    "crlm_1100_lowres",
    "hcc_015_pv",
)
DARK = ("ircadb_p01", "radcttace_0697_eqp", "radcttace_1720_eqp", "radcttace_2144_eqp")

Tumors = dict[str, tuple[int, ...]]  # by scan, the numbers of tumours


@dataclass(frozen=True)
class Job:
    """One training and its test.

    Attributes:
        experiment, arm, fold, seed: which job this is.
        part: which part of the tests it is, where an arm needs several trainings; else "".
        parts: how many parts there are.
        annotated: tumours taught in the shared half of each batch.
        healthy: scans without tumours that are trained on.
        more: real tumours that an upper bound is taught in the other half.
        tests: tumours that are scored. Others in these scans count neither way.
        healthy_tests: scans without tumours in which false positives are counted.
        synthesis: arguments of `SynthesizeTumor`, beside the arm's.
    """

    experiment: str
    arm: Arm
    fold: int
    seed: int
    part: str
    parts: int
    annotated: Tumors
    healthy: tuple[str, ...]
    more: Tumors
    tests: Tumors
    healthy_tests: tuple[str, ...]
    synthesis: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its files."""
        words = [self.experiment, f"fold{self.fold}", f"seed{self.seed}", self.arm.name, self.part]
        return "_".join(word for word in words if word)


@dataclass(frozen=True)
class Design:
    """One fold of an experiment.

    Attributes:
        annotated, tests, synthesis: of its jobs.
        upper: for each training of the upper bound, the scans that it is tested on and what it is
            taught in the other half of each batch.
    """

    annotated: Tumors
    tests: Tumors
    synthesis: Mapping[str, Any]
    upper: tuple[tuple[tuple[str, ...], Tumors], ...] = ()


def few_annotated(scans: Mapping[str, Scan], fold: int, count: int) -> Design:
    """4a: ``count`` annotated patients; all others are tested."""
    first = 2 * fold
    chosen = [ANNOTATED[(first + k) % len(ANNOTATED)] for k in range(count)]
    tests = {n: every(scans[n]) for half in HALVES for n in half if n not in chosen}
    annotated = {n: every(scans[n]) for n in chosen}
    return Design(annotated, tests, {"size_mm": "liver", "count": (2, 6)}, halves(tests))


def large_to_small(scans: Mapping[str, Scan]) -> Design:
    """4b: annotate only tumours of 20 mm and more; test on those under 20."""
    tests = {n: early(scans[n]) for half in HALVES for n in half if early(scans[n])}
    annotated = {n: late(scans[n]) for n in LARGE}
    return Design(annotated, tests, {"size_mm": (5.0, EARLY_MM), "count": (2, 6)}, halves(tests))


def portal_to_arterial(scans: Mapping[str, Scan]) -> Design:
    """4c: train on tumours of the portal and equilibrium phases, test on one arterial scan."""
    tests = {"radcttace_0745_ap": every(scans["radcttace_0745_ap"])}
    synthesis = {"size_mm": "liver", "count": (2, 6), "contrast_hu": "liver-arterial"}
    return Design({n: every(scans[n]) for n in DARK}, tests, synthesis)


def cross_validation(scans: Mapping[str, Scan], fold: int, folds: int, count: int | None) -> Design:
    """Any pack: leave a fold of patients out, annotate ``count`` of the others (None: all)."""
    ill = {n: scan for n, scan in scans.items() if scan.diameters_mm}
    patients = np.random.default_rng(0).permutation(sorted({s.patient for s in ill.values()}))
    held_out, rest = patients[fold::folds], [p for k, p in enumerate(patients) if k % folds != fold]
    chosen = rest[:count]
    tests = {n: every(s) for n, s in ill.items() if s.patient in held_out}
    annotated = {n: every(s) for n, s in ill.items() if s.patient in chosen}
    more = {n: every(s) for n, s in ill.items() if s.patient in rest and s.patient not in chosen}
    upper = ((tuple(tests), more),) if more else ()
    return Design(annotated, tests, {"size_mm": "liver", "count": (1, 6)}, upper)


def halves(tests: Tumors) -> tuple[tuple[tuple[str, ...], Tumors], ...]:
    """Split the tests into `HALVES`: each is tested by what learned from the other."""
    own = [tuple(n for n in half if n in tests) for half in HALVES]
    return tuple((own[k], {n: tests[n] for n in own[1 - k]}) for k in (0, 1))


def design_of(experiment: str, scans: Mapping[str, Scan], fold: int) -> Design:
    """The design of an experiment.

    Args:
        experiment: "few-N" (4a), "large-to-small" (4b), "portal-to-arterial" (4c), "none-annotated"
            (4d), or, for any pack, "folds-K" or "folds-K-N": K folds, N annotated patients.
        scans: of the pack.
        fold: number of the fold.
    """
    kind, *numbers = experiment.split("-")
    if kind == "few":
        return few_annotated(scans, fold, int(numbers[0]))
    if kind == "folds":
        count = int(numbers[1]) if numbers[1:] else None
        return cross_validation(scans, fold, int(numbers[0]), count)
    if experiment == "large-to-small":
        return large_to_small(scans)
    if experiment == "portal-to-arterial":
        return portal_to_arterial(scans)
    if experiment == "none-annotated":
        return few_annotated(scans, fold, 4)
    raise ValueError(f"unknown experiment {experiment!r}")


def jobs_of(plan: Mapping[str, Any], scans: Mapping[str, Scan]) -> list[Job]:
    """List the jobs of a plan in the order in which they run.

    Args:
        plan: ``{"runs": [{"experiment": "few-2", "folds": [0], "seeds": [0], "arms": ["real"]}]}``;
            an arm is a name of `ARMS` or a dict of the arguments of `Arm`.
        scans: of the pack.
    """
    jobs: dict[str, Job] = {}
    for entry in plan["runs"]:
        arms = [ARMS[a] if isinstance(a, str) else Arm.from_dict(a) for a in entry["arms"]]
        for seed in entry["seeds"]:
            for fold in entry.get("folds", [0]):
                for arm in arms:
                    for job in _jobs(entry["experiment"], arm, fold, seed, scans):
                        jobs.setdefault(job.name, job)
    return list(jobs.values())


def _jobs(experiment: str, arm: Arm, fold: int, seed: int, scans: Mapping[str, Scan]) -> list[Job]:
    design = design_of(experiment, scans, fold)
    healthy = sorted(n for n, scan in scans.items() if not scan.diameters_mm)
    job = Job(
        experiment=experiment,
        arm=arm,
        fold=fold,
        seed=seed,
        part="",
        parts=1,
        annotated=design.annotated,
        more={},
        healthy=tuple(healthy[seed % 2 :: 2]),
        tests=design.tests,
        healthy_tests=tuple(healthy[1 - seed % 2 :: 2]),
        synthesis=design.synthesis,
    )
    jobs = [job]
    if arm.others == "more":
        if not design.upper:
            raise ValueError(f"{experiment} has no upper bound: no other patient is of that kind")
        parts = len(design.upper)
        jobs = [
            replace(
                job,
                part="abcdef"[k] if parts > 1 else "",
                parts=parts,
                tests={n: design.tests[n] for n in names},
                more=more,
            )
            for k, (names, more) in enumerate(design.upper)
        ]
    return [_without(one, arm.trained_on, scans) for one in jobs]


def _without(job: Job, patients: Iterable[str], scans: Mapping[str, Scan]) -> Job:
    """Leave patients that the arm's generator learned from out of the test."""
    job = replace(
        job,
        tests={n: t for n, t in job.tests.items() if scans[n].patient not in patients},
        healthy_tests=tuple(n for n in job.healthy_tests if scans[n].patient not in patients),
    )
    taught = {scans[n].patient for n in (*job.annotated, *job.more, *job.healthy)}
    tested = {scans[n].patient for n in (*job.tests, *job.healthy_tests)}
    if taught & tested:
        raise ValueError(f"{job.name}: patients on both sides: {sorted(taught & tested)}")
    return job


def every(scan: Scan) -> tuple[int, ...]:
    """The numbers of all tumours."""
    return tuple(range(1, len(scan.diameters_mm) + 1))


def early(scan: Scan) -> tuple[int, ...]:
    """The numbers of tumours under 20 mm."""
    return tuple(k for k in every(scan) if scan.diameters_mm[k - 1] < EARLY_MM)


def late(scan: Scan) -> tuple[int, ...]:
    """The numbers of the other tumours."""
    return tuple(k for k in every(scan) if scan.diameters_mm[k - 1] >= EARLY_MM)
