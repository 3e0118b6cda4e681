"""Names of organs in place of label values: maps of public sets, and the user's own."""

from tumorsynth.label_maps.names import (
    LabelMap,
    LabelMapLike,
    has_names,
    matching_names,
    organ_values,
    suggest,
)
from tumorsynth.label_maps.published import PUBLISHED
from tumorsynth.label_maps.reading import read_label_map

__all__ = [
    "PUBLISHED",
    "LabelMap",
    "LabelMapLike",
    "has_names",
    "matching_names",
    "organ_values",
    "read_label_map",
    "suggest",
]
