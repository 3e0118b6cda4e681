"""`Call`: what is the same for all tumours of one call."""

from __future__ import annotations

from dataclasses import dataclass

from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.pipeline.paint import Painter
from tumorsynth.pipeline.settings import Settings


@dataclass(frozen=True)
class Call:
    """What the stages share.

    Args:
        settings: of the transform.
        generator: on the device of this call.
        painter: runs the generator.
    """

    settings: Settings
    generator: TumorGenerator
    painter: Painter
