"""Skip reasons: the words by which a report says why a tumour or a sample was skipped.

Each goes with a `types.SkipCode`. Two are worded where they are measured: the gate's objections in
`appearance/gate.py`, and tissue outside the generator's window in `appearance/background.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tumorsynth.arguments import format_beside

EXCLUDED = "left alone (as asked)"
NO_FREE_VOXEL = "no room: other tumours or forbidden voxels fill the organ"
AIR = (
    "the tumour would lie in air or padding (all voxels below -1000 HU) under the organ's label; "
    "correct the label, or paint there all the same with contrast_hu= or any_tissue=True "
    "(--any-tissue)"
)
MAX_NOISE_HU = 30.0  # few scans are noisier; other tissue under the label varies more
NO_VISIBLE_CHANGE = "the generator leaves this tissue as it is"


def not_selected(p: float) -> str:
    """Return the reason of a sample that the probability p left out."""
    return f"left alone (p = {p:g})"


def has_tumor(voxels: int, tumor_label: int) -> str:
    """Return the reason of a sample that ``healthy_only`` skips."""
    return f"left alone (holds a tumour already: {voxels} voxels of {tumor_label} = tumor_label)"


def no_organ(organ_labels: Sequence[int]) -> str:
    """Return the reason where the organ is missing."""
    return f"no organ: no voxel has a label of {tuple(organ_labels)}"


def no_named_organ(organ: str, label_map: str, found: str) -> str:
    """Return the reason where an organ that was given by name is missing.

    Args:
        organ: its values with their names.
        label_map: what the user calls the map.
        found: the values that the label holds.
    """
    return f"no organ: no voxel has a label of {organ} of label_map {label_map!r}; it holds {found}"


def not_finite(share: float) -> str:
    """Return the reason where this share of the organ's voxels is NaN or infinite."""
    return (
        f"{share:.0%} of the organ's voxels in the image are NaN or infinite; export the scan again"
    )


def unsuited_voxels(share: float, generator: str, voxel_hu: tuple[float, float]) -> str:
    """Return the reason where this share of the organ's voxels is no tissue."""
    low, high = voxel_hu
    return (
        f"most of the organ must lie within {low:g} to {high:g} HU, where {generator} may paint, "
        f"but {share:.0%} of its voxels do not (padding, gas or metal); check label and intensity="
    )


def no_room(smallest_mm: float, largest_that_fits_mm: float = 0.0) -> str:
    """Return the reason where no tumour of an allowed size fits.

    Args:
        smallest_mm: smallest diameter allowed.
        largest_that_fits_mm: largest diameter that an attempt reached; stated if it is smaller.
    """
    smallest = format_beside(smallest_mm, [largest_that_fits_mm], ".3g")
    reason = f"no room for a tumour of {smallest} mm or more in the organ"
    if 0 < largest_that_fits_mm < smallest_mm:
        largest = format_beside(largest_that_fits_mm, [float(smallest)])
        reason += f"; largest that fits: {largest} mm"
    return reason


def no_room_before(smallest_mm: float, tumors: int) -> str:
    """Return the reason of a tumour that is not tried, since so many in a row found no room."""
    return f"{no_room(smallest_mm)}: none of the {tumors} before it found any"


def no_room_again(diameter_mm: float) -> str:
    """Return the reason of a tumour from params that does not fit at its centre."""
    return f"the organ leaves no room for the tumour of {diameter_mm:.1f} mm here"


def gate(objection: str) -> str:
    """Return the reason of a tumour that the gate rejected."""
    return f"the gate: {objection}"


def implausible(generator: str, window: tuple[float, float]) -> str:
    """Return the reason where a generator made what no tissue has.

    Args:
        generator: its name.
        window: HU that 0 and 1 in its crops stand for.
    """
    return (
        f"the generator {generator!r} gave NaN, infinite or impossible values: look at its weights "
        f"and code; 0 and 1 in its crops are {window[0]:g} and {window[1]:g} HU"
    )


def faint(visibility: float, limit: float, diameter_mm: float, noise_hu: float) -> str:
    """Return the reason of a tumour that the scan's noise would hide.

    Args:
        visibility: of the tumour.
        limit: the lowest visibility that suffices.
        diameter_mm: of the tumour.
        noise_hu: standard deviation of the organ around.
    """
    cause, check = f"noise of {noise_hu:.0f} HU", ""
    if noise_hu > MAX_NOISE_HU:
        cause = f"the tissue around varies by {noise_hu:.0f} HU, which"
        check = (
            "unless the scan is that noisy, these are vessels, edges or a label that does not lie "
            "on the organ: check that label and image fit (flipped, shifted, too wide). Else "
        )
    return (
        f"{cause} would hide a tumour of {diameter_mm:.1f} mm: visibility "
        f"{format_beside(visibility, [limit])}, less than {limit:g}; {check}raise size_mm, or set "
        "contrast_hu"
    )


def too_bright(generator: str, excess_hu: float) -> str:
    """Return the reason of a tumour that came out bright where it had to be dark.

    Args:
        generator: its name.
        excess_hu: how much brighter it is than the tissue around, or than what it replaced.
    """
    return (
        f"a tumour by {generator} must be darker than the tissue around and than what it replaces, "
        f"but would be {excess_hu:.0f} HU brighter: its place is of another tissue than what is "
        "around; correct the label, or choose the contrast with contrast_hu="
    )
