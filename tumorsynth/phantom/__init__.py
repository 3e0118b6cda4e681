"""A procedural abdominal CT, made from a seed, as a healthy stand-in for a scan."""

from tumorsynth.phantom.landmarks import LABELS
from tumorsynth.phantom.make import Phantom, make_phantom

__all__ = ["LABELS", "Phantom", "make_phantom"]
