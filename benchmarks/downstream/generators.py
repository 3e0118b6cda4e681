"""The generator of an arm, and what its versions depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.downstream.experiments import Job
from benchmarks.downstream.pack import Scan


def make_generator(job: Job, scans: Mapping[str, Scan]) -> tuple[Any, dict[str, Any]]:
    """Return what `SynthesizeTumor` takes as ``generator``, and its description for the cache."""
    name = job.arm.generator
    if name != "copy-paste":
        return name, {"generator": name}
    raise NotImplementedError("copy-paste")
