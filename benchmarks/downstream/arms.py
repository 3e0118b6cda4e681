"""Arms: what fills the other half of each batch, beside the annotated crops that all arms share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Patients that a generator learned from, also those behind its autoencoder: never in its test.
TRAINED_ON = {
    "liver-early": ("crlm_1004", "crlm_1006", "crlm_1100_lowres", "hcc_015_pv"),
}


@dataclass(frozen=True)
class Arm:
    """One way to fill the other half of each batch.

    Attributes:
        name: in tables and files.
        others: "annotated" (the annotated scans again), "healthy" (healthy scans as they are),
            "more" (real tumours of the test's own kind, from other patients: the upper bound), or
            "synthetic" (healthy and annotated scans with synthetic tumours).
        generator: for "synthetic", what `SynthesizeTumor` takes as ``generator``, or "copy-paste",
            whose lesions are those of the job's annotated scans.
        options: more arguments of `SynthesizeTumor`.
        keep: of the synthetic tumours, the half that a network trained on `real` marks best
            ("seen") or worst ("missed"); "" keeps all.
        alone: whether synthetic tumours in healthy scans fill the whole batch.
        trained_on: patients that the generator learned from.
    """

    name: str
    others: str = "synthetic"
    generator: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: str = ""
    alone: bool = False
    trained_on: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arm:
        """Build an arm that a plan describes; a known generator brings ``trained_on``."""
        known = TRAINED_ON.get(values.get("generator", ""), ())
        trained_on = tuple(values.get("trained_on", known))
        arm = cls(**{**values, "trained_on": trained_on})
        if arm.others not in ("annotated", "healthy", "more", "synthetic"):
            raise ValueError(f"{arm.name}: unknown others={arm.others!r}")
        if (arm.others == "synthetic") != bool(arm.generator):
            raise ValueError(f"{arm.name}: a generator goes with others='synthetic' alone")
        return arm


ARMS = {
    values["name"]: Arm.from_dict(values)
    for values in (
        {"name": "real", "others": "annotated"},
        {"name": "real-and-healthy", "others": "healthy"},
        {"name": "upper-bound", "others": "more"},
        {"name": "copy-paste", "generator": "copy-paste"},
        {"name": "hu2023", "generator": "hu2023"},
        {"name": "liver-early", "generator": "liver-early"},
        {"name": "liver-early-gate", "generator": "liver-early", "options": {"gate": True}},
        {"name": "liver-early-seen", "generator": "liver-early", "keep": "seen"},
        {"name": "liver-early-missed", "generator": "liver-early", "keep": "missed"},
        {"name": "liver-early-alone", "generator": "liver-early", "alone": True},
        {"name": "hu2023-alone", "generator": "hu2023", "alone": True},
    )
}
