"""A procedural abdominal CT: a healthy stand-in for a scan, made from a seed."""

from tumorsynth.phantom.anatomy import LABELS
from tumorsynth.phantom.make import Phantom, make_phantom

__all__ = ["LABELS", "Phantom", "make_phantom"]
