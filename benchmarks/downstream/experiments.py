"""The experiments: which tumours are annotated, which are tested, and which arms there are.

Patients are never on both sides of a job. Even seeds train on the first healthy scan and test false
positives on the second; odd seeds the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.downstream.arms import ARMS, Arm
from benchmarks.downstream.pack import Scan

HEALTHY = ("chaos_set3", "crlm_1004")
EARLY_MM = 20.0
# Patients that can be annotated, in the order in which folds start and n grows.
ANNOTATED = (
    "ircadb_p01",
    "radcttace_0745_eqp",
    "radcttace_0697_eqp",
    "radcttace_1720_eqp",
    "radcttace_2144_eqp",
    "crlm_1100_lowres",
)
# Patients that are tested, in halves: the upper bound learns from the half that it is not tested on.
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
        part: "" or the half that an upper bound is tested on.
        annotated: tumours taught in the shared half of each batch.
        healthy: scans without tumours that are trained on.
        more: real tumours that the upper bound is taught in the other half.
        tests: tumours that are scored. Others in these scans count neither way.
        healthy_tests: scans without tumours in which false positives are counted.
        synthesis: arguments of `SynthesizeTumor`, beside the arm's.
    """

    experiment: str
    arm: Arm
    fold: int
    seed: int
    part: str
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


def few_annotated(scans: Mapping[str, Scan], fold: int, count: int) -> dict[str, Any]:
    """4a: ``count`` annotated patients; all others are tested."""
    first = 2 * fold
    chosen = [ANNOTATED[(first + k) % len(ANNOTATED)] for k in range(count)]
    tests = [name for half in HALVES for name in half if name not in chosen]
    return {
        "annotated": {name: every(scans[name]) for name in chosen},
        "tests": {name: every(scans[name]) for name in tests},
        "more": {name: every(scans[name]) for name in tests},
        "synthesis": {"size_mm": "liver", "count": (2, 6)},
    }


def large_to_small(scans: Mapping[str, Scan], fold: int) -> dict[str, Any]:
    """4b: annotate only tumours over 20 mm; test on those under 20."""
    del fold
    small = {name: early(scan) for name, scan in scans.items() if early(scan)}
    tested = {name: small[name] for half in HALVES for name in half if name in small}
    return {
        "annotated": {name: late(scans[name]) for name in LARGE},
        "tests": tested,
        "more": tested,
        "synthesis": {"size_mm": (5.0, EARLY_MM), "count": (2, 6)},
    }


def portal_to_arterial(scans: Mapping[str, Scan], fold: int) -> dict[str, Any]:
    """4c: train on tumours of the portal and equilibrium phases, test on one arterial scan."""
    del fold
    return {
        "annotated": {name: every(scans[name]) for name in DARK},
        "tests": {"radcttace_0745_ap": every(scans["radcttace_0745_ap"])},
        "more": {},
        "synthesis": {"size_mm": "liver", "count": (2, 6), "contrast_hu": "liver-arterial"},
    }


def none_annotated(scans: Mapping[str, Scan], fold: int) -> dict[str, Any]:
    """4d: synthetic tumours alone, against four annotated patients alone."""
    return few_annotated(scans, fold, 4)


EXPERIMENTS: dict[str, Callable[[Mapping[str, Scan], int], dict[str, Any]]] = {
    "few-1": lambda scans, fold: few_annotated(scans, fold, 1),
    "few-2": lambda scans, fold: few_annotated(scans, fold, 2),
    "few-4": lambda scans, fold: few_annotated(scans, fold, 4),
    "large-to-small": large_to_small,
    "portal-to-arterial": portal_to_arterial,
    "none-annotated": none_annotated,
}


def jobs_of(plan: Mapping[str, Any], scans: Mapping[str, Scan]) -> list[Job]:
    """List the jobs of a plan in the order in which they run.

    Args:
        plan: ``{"runs": [{"experiment": "few-2", "folds": [0], "seeds": [0], "arms": ["real", {"name":
            ..., "generator": ...}]}]}``; an arm is a name of `ARMS` or the arguments of `Arm`.
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


def _jobs(
    experiment: str, arm: Arm, fold: int, seed: int, scans: Mapping[str, Scan]
) -> list[Job]:
    given = EXPERIMENTS[experiment](scans, fold)
    more = given.pop("more")
    train_on, test_on = seed % 2, 1 - seed % 2
    job = Job(
        experiment=experiment,
        arm=arm,
        fold=fold,
        seed=seed,
        part="",
        more={},
        healthy=(HEALTHY[train_on],),
        healthy_tests=(HEALTHY[test_on],),
        **given,
    )
    if arm.others != "more":
        halves = [job]
    elif not more:
        raise ValueError(f"{experiment} has no upper bound: no other patient is of the test's kind")
    else:
        halves = [
            replace(
                job,
                part="ab"[k],
                tests={n: t for n, t in job.tests.items() if n in half},
                more={n: t for n, t in more.items() if n not in half},
            )
            for k, half in enumerate(HALVES)
        ]
    return [_without(one, arm.trained_on, scans) for one in halves]


def _without(job: Job, patients: Sequence[str], scans: Mapping[str, Scan]) -> Job:
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
