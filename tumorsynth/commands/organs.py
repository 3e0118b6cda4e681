"""The organ on the command line: by value, or by name with a label map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tumorsynth.commands.shared import say
from tumorsynth.label_maps import LabelMap, organ_values, read_label_map
from tumorsynth.label_maps.published import PUBLISHED

if TYPE_CHECKING:
    from tumorsynth.scans.layouts import Found
    from tumorsynth.scans.organ_masks import OrganMasks

DEFAULT_ORGAN_LABEL, DEFAULT_TUMOR_LABEL = (1,), 2

OrganLabel = Annotated[
    list[int] | None,
    typer.Option(
        help="Label value of the organ. Repeat the option for several values. [default: 1]",
        show_default=False,
    ),
]
Organ = Annotated[
    list[str] | None,
    typer.Option(
        help="Name of the organ in --label-map, in place of its value: liver, kidney (left and "
        "right), ... Repeat the option for several.",
        show_default=False,
    ),
]
LabelMapOption = Annotated[
    str | None,
    typer.Option(
        "--label-map",
        help=f"Which values the names have: {', '.join(PUBLISHED)}, or the path of a dataset.json.",
        show_default=False,
    ),
]
TumorLabel = Annotated[
    int | None,
    typer.Option(
        help="Label value for the tumours, free in the label maps. [default: 2; with a label map "
        "or a dataset.json, the value of its tumours or the first free one]",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Organs:
    """What the options about organ and tumour come to.

    Attributes:
        organ_labels: values, or names of ``label_map``.
        tumor_label: value for the tumours.
        label_map: the names of the values; None where values were given.
        masks: which files of the organs matter, where there is one file per organ.
    """

    organ_labels: tuple[Any, ...]
    tumor_label: int
    label_map: LabelMap | None = None
    masks: OrganMasks | None = None


def values_of(
    organ_label: Sequence[int] | None, organ: Sequence[str] | None, label_map: str | None
) -> list[int]:
    """Return the organ's values for commands that need no names.

    Raises:
        ValueError: for options that exclude each other, or an unknown name.
    """
    _check_given(organ_label, organ, label_map)
    if not organ:
        return list(organ_label or DEFAULT_ORGAN_LABEL)
    return list(organ_values(tuple(organ), _map_for(organ, label_map)))


def organs_of_annotated(
    found: Found,
    *,
    organ_label: Sequence[int] | None,
    organ: Sequence[str] | None,
    label_map: str | None,
    tumor_label: int | None,
) -> Organs:
    """Turn the options into the values that organ and tumours have in annotated scans.

    Args:
        found: the scans.
        organ_label: values of --organ-label.
        organ: names of --organ.
        label_map: of --label-map.
        tumor_label: of --tumor-label; None for that of the label map's tumours, or 2.

    Raises:
        ValueError: for options that exclude each other or do not suit the files.
    """
    _check_given(organ_label, organ, label_map)
    if found.has_masks:
        return _of_masks(found, organ_label, organ, label_map, tumor_label, False, False)
    named, known = _maps_of(found, organ, label_map)
    own = None if known is None else known.tumor_value()
    if tumor_label is None:
        tumor_label = DEFAULT_TUMOR_LABEL if own is None else own
    labels = _values_beside(organ, named, tumor_label) if organ else organ_label
    labels = labels or DEFAULT_ORGAN_LABEL
    return Organs(tuple(labels), tumor_label)


def choose_organs(
    found: Found,
    *,
    organ_label: Sequence[int] | None,
    organ: Sequence[str] | None,
    label_map: str | None,
    tumor_label: int | None,
    segmented: bool = False,
    grows: bool = False,
    moves: bool = False,
) -> Organs:
    """Turn the options into what the transform and the reading of files need.

    Args:
        found: the scans.
        organ_label: values of --organ-label.
        organ: names of --organ.
        label_map: of --label-map.
        tumor_label: of --tumor-label; None for a default that suits the label maps.
        segmented: whether TotalSegmentator makes the label maps.
        grows: whether tumours may grow beyond the organ.
        moves: whether tumours push tissue aside.

    Raises:
        ValueError: for options that exclude each other or do not suit the files.
    """
    _check_given(organ_label, organ, label_map)
    if segmented:
        return _of_segmentation(organ_label, organ, label_map, tumor_label)
    if found.has_masks:
        return _of_masks(found, organ_label, organ, label_map, tumor_label, grows, moves)
    named, known = _maps_of(found, organ, label_map)
    labels: tuple[Any, ...] = tuple(organ or organ_label or DEFAULT_ORGAN_LABEL)
    of_layout = known or read_label_map(found.label_map)
    if tumor_label is not None:
        value = tumor_label
    elif known is not None:
        value = _default_tumor_label(known)
    else:
        value = _default_in_layout(found, labels, of_layout)
    name = None if known is None else known.name_of(value)
    if known is not None and name is not None and not known.is_tumor(name):
        raise ValueError(
            f"--tumor-label must be free in the label maps, but {value} is {name} in "
            f"{known.source}; give --tumor-label {known.free_value()}"
        )
    held = _values_beside(organ, named, value) if organ else labels
    if value in held:
        option, what = ("--organ", " ".join(organ)) if organ else ("--organ-label", value)
        raise ValueError(
            f"--tumor-label must differ from the values of {option}, but {value} is one of {what}; "
            "give the tumours a value of their own"
        )
    if found.dataset is not None:
        from tumorsynth.scans.dataset_json import check_tumor_label

        check_tumor_label(found.dataset, value)
    if of_layout is not None and not organ and not organ_label:
        _note_default_organ(of_layout)
    return Organs(labels, value, named)


def _values_beside(
    organ: Sequence[str], named: LabelMap | None, tumor_label: int
) -> tuple[int, ...]:
    """Return the values of --organ, of regions without that of the tumours."""
    assert named is not None
    try:
        return tuple(organ_values(tuple(organ), named.without(tumor_label)))
    except ValueError as error:
        words = str(error).replace("organ_labels", "--organ").replace("label_map", "--label-map")
        raise ValueError(words) from error


def _note_default_organ(known: LabelMap) -> None:
    """Say which organ the default value is, where the label maps hold several."""
    (value,) = DEFAULT_ORGAN_LABEL
    name = known.name_of(value)
    if name is not None and len(known.organ_names()) > 1:
        say(
            f"note: no organ is named, so that tumours go into {value}, which is {name} in "
            f"{known.source}; --organ names another"
        )


def _check_given(
    organ_label: Sequence[int] | None, organ: Sequence[str] | None, label_map: str | None
) -> None:
    if organ and organ_label:
        raise ValueError("--organ and --organ-label exclude each other; give one of them")
    if label_map is not None and not organ:
        read_label_map(label_map)
        raise ValueError(
            "--label-map is for names; give the organ's with --organ, as in --organ liver"
        )


def _maps_of(
    found: Found, organ: Sequence[str] | None, label_map: str | None
) -> tuple[LabelMap | None, LabelMap | None]:
    """Return the map of the names, None without any, and what is known of all values."""
    named = _map_for(organ, label_map, found) if organ else None
    return named, named or _map_of_dataset(found)


def _map_for(organ: Sequence[str], label_map: str | None, found: Found | None = None) -> LabelMap:
    """The map that the names belong to: the given one, or that of the data set."""
    if label_map is not None:
        named = read_label_map(label_map)
        assert named is not None
        return named
    if found is not None and (named := _map_of_dataset(found)) is not None:
        return named
    if found is not None and found.label_map is not None:
        return _map_for(organ, found.label_map)
    if found is not None and len(organ) == 1:
        from tumorsynth.label_maps import matching_names
        from tumorsynth.scans.pairing import name_of

        stems = {name_of(pair.label) or "" for pair in found.pairs}
        if len(stems) == 1 and matching_names(organ[0], stems).names:  # liver.nii.gz alone
            return LabelMap(f"{stems.copy().pop()} alone", {organ[0]: (1,)})
    raise ValueError(
        f"--organ needs to know which value {organ[0]!r} has; add --label-map with one of "
        f"{', '.join(PUBLISHED)}, or a dataset.json, or give --organ-label in place of both"
    )


def _map_of_dataset(found: Found) -> LabelMap | None:
    if found.dataset is None:
        return None
    from tumorsynth.scans.dataset_json import label_map

    return label_map(found.dataset)


def _default_tumor_label(named: LabelMap) -> int:
    """The value for tumours: that of the map's own tumours, or the first free one."""
    own = named.tumor_value()
    if own is not None:
        return own
    name = named.name_of(DEFAULT_TUMOR_LABEL)
    return DEFAULT_TUMOR_LABEL if name is None and not named.is_complete else named.free_value()


def _default_in_layout(
    found: Found, organ_labels: tuple[int, ...], of_layout: LabelMap | None
) -> int:
    """The usual value; the first free one where a public layout has an organ there.

    That is the first that the layout's own label map does not have, if the first file holds that
    map's values alone, or else the first that the file does not hold. The files are checked when
    they are read.
    """
    from tumorsynth.scans.scan import is_another_organ
    from tumorsynth.scans.volume_files import read_volume

    first = found.pairs[0]
    if first.places is None:
        return DEFAULT_TUMOR_LABEL
    of_map = DEFAULT_TUMOR_LABEL if of_layout is None else _default_tumor_label(of_layout)
    try:
        label = read_volume(first.label)
        held = label.held_values()
        is_usual = not is_another_organ(label, organ_labels, DEFAULT_TUMOR_LABEL, clearly=False)
    except (ValueError, OSError):  # reported when its turn comes
        return of_map
    if of_layout is not None and of_map != DEFAULT_TUMOR_LABEL and _holds_only(of_layout, held):
        say(
            f"note: tumours get {of_map}, the first value that {of_layout.source} does not have, "
            "as the files are named as in that data set; --tumor-label gives them another"
        )
        return of_map
    if is_usual:
        return DEFAULT_TUMOR_LABEL
    free = held[-1] + 1
    say(
        f"note: {DEFAULT_TUMOR_LABEL} is an organ of {label.name}, so that tumours get {free}; "
        "--tumor-label gives them another value"
    )
    return free


def _holds_only(known: LabelMap, values: Sequence[int]) -> bool:
    """Whether a label map holds a public one's values alone.

    Files may be named as in a public set and hold other values.
    """
    return all(known.name_of(value) is not None for value in values if value)


def _of_segmentation(
    organ_label: Sequence[int] | None,
    organ: Sequence[str] | None,
    label_map: str | None,
    tumor_label: int | None,
) -> Organs:
    if not organ or label_map is not None:
        raise ValueError(
            "--segment needs the organ by name, without --organ-label and --label-map; give for "
            "example --organ liver"
        )
    named = read_label_map("totalsegmentator")
    assert named is not None
    return Organs(tuple(organ), tumor_label or named.free_value(), named)


def _of_masks(
    found: Found,
    organ_label: Sequence[int] | None,
    organ: Sequence[str] | None,
    label_map: str | None,
    tumor_label: int | None,
    grows: bool,
    moves: bool,
) -> Organs:
    from tumorsynth.scans.organ_masks import choose_masks

    for option, value in (
        ("--organ-label", organ_label),
        ("--label-map", label_map),
        ("--tumor-label", tumor_label),
    ):
        if value:
            raise ValueError(
                f"{option} is for label maps, but there is one file per organ here, got {value}; "
                "leave it out, and name the organ with --organ"
            )
    folders = [pair.label for pair in found.pairs]
    masks = choose_masks(folders, organ or (), context=grows, moves=moves)
    _note_absent_masks(found, masks)
    values = dict(zip(masks.organs, ((v,) for v in masks.organ_labels), strict=True))
    return Organs(masks.organs, masks.tumor_label, LabelMap("the masks", values), masks)


def _note_absent_masks(found: Found, masks: OrganMasks) -> None:
    """Say which scans have some of the organs' files, and not all."""
    from tumorsynth.scans.layouts import MAX_LISTED

    absent = [(pair.name, masks.lacking(pair.label)) for pair in found.pairs]
    listed = [f"{name} has no {' and no '.join(names)}" for name, names in absent if names]
    if listed:
        more = f", and {len(listed) - MAX_LISTED} more scans" if len(listed) > MAX_LISTED else ""
        say(
            f"note: {', '.join(listed[:MAX_LISTED])}{more}: tumours go into the organs that are "
            "there"
        )
