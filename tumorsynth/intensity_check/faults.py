"""What values can be instead of HU, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What values are instead of HU, and what to do.

    Args:
        kind: short name.
        found: what the values look like.
        conversion: how to make HU of them.
        intensity: the Python argument to pass; empty if none describes them.
        option: the same for the command line.
    """

    kind: str
    found: str
    conversion: str
    intensity: str = ""
    option: str = ""


def _linear(kind: str, found: str, conversion: str, *numbers: float) -> Fault:
    python, option = (sep.join(f"{n:g}" for n in numbers) for sep in (", ", ","))
    return Fault(kind, found, conversion, f"ts.Scaled({python})", f"--intensity={option}")


_NUMBERS = "with the numbers of your scaling, for example"
_UNKNOWN = "give the CT in HU"
DIVIDED = {
    by: _linear(
        f"HU/{by}",
        f"look like HU divided by {by}, with air at {-1000 / by:g}",
        f"multiply them by {by}",
        -4000, 4000, -4000 / by, 4000 / by,
    )
    for by in (2, 10, 100, 1000)
} | {
    0.5: _linear(
        "HU x 2", "look like HU times 2, with air at -2000", "divide them by 2",
        -4000, 4000, -8000, 8000,
    )
}  # fmt: skip
SHIFTED = _linear(
    "HU+1024",
    "look like HU + 1024 (some devices: + 1000), with soft tissue at 1070",
    "subtract 1024",
    -1024, 3071, 0, 4095,
)  # fmt: skip
LOWERED = _linear(
    "HU-1024", "look like HU - 1024, with air at -2024", "add 1024", -1024, 3071, -2048, 2047
)  # fmt: skip
OFFSET = _linear(
    "HU+32768", "look like HU + 32768", "subtract 32768", -1024, 3071, 31744, 35839
)  # fmt: skip
WRAPPED = Fault(
    "unsigned",
    "look like signed numbers read as unsigned ones, with air at 64536",
    "read them as int16, or subtract 65536 from those above 32767",
)
EQUALISED = Fault(
    "equalised",
    "lie evenly between 0 and 255, as in a picture with an equalised histogram",
    f"no scale undoes that: {_UNKNOWN}, from before the equalisation",
)
FLIPPED = Fault(
    "sign",
    "look like HU with their sign changed, with air at the bright end",
    "multiply them by -1",
)
UNIT = Fault(
    "[0, 1]",
    "lie in [0, 1], so the CT is scaled",
    _UNKNOWN,
    f"ts.Scaled(a_min, a_max, 0, 1) {_NUMBERS} ts.Scaled(-175, 250, 0, 1)",
    f"--intensity=HU_LOW,HU_HIGH,0,1 {_NUMBERS} -175,250,0,1",
)
SYMMETRIC = Fault(
    "[-1, 1]",
    "lie in [-1, 1], so the CT is scaled",
    _UNKNOWN,
    f"ts.Scaled(a_min, a_max, -1, 1) {_NUMBERS} ts.Scaled(-175, 250, -1, 1), or -1000, 1000 where "
    "it is HU / 1000",
    f"--intensity=HU_LOW,HU_HIGH,-1,1 {_NUMBERS} -175,250,-1,1, or -1000,1000,-1,1 where it is "
    "HU / 1000",
)
Z_SCORES = Fault(
    "z-scores",
    "look like z-scores or scaled otherwise",
    _UNKNOWN,
    "ts.ZScore(mean, std, low, high) or ts.Scaled(a_min, a_max, b_min, b_max) with the numbers of "
    "your scaling",
    "--intensity=A,B,-10,10 with, for z-scores, A = mean - 10 std and B = mean + 10 std in HU",
)


def windowed(low: float, high: float) -> Fault:
    """Return the fault of a CT windowed to these values."""
    return Fault(
        "0-255" if (low, high) == (0, 255) else f"{low:g} to {high:g}",
        f"look like a CT windowed to {low:g} to {high:g}",
        _UNKNOWN,
        f"ts.Scaled(a_min, a_max, {low:g}, {high:g}) {_NUMBERS} "
        f"ts.Scaled(-160, 240, {low:g}, {high:g}), or, if HU were clipped to this range, "
        f"ts.Scaled({low:g}, {high:g}, {low:g}, {high:g})",
        f"--intensity=HU_LOW,HU_HIGH,{low:g},{high:g} {_NUMBERS} -160,240,{low:g},{high:g}, or, if "
        f"HU were clipped to this range, {low:g},{high:g},{low:g},{high:g}",
    )


def scaled(air: float, fat: float) -> Fault:
    """Return the fault of a CT whose air and fat, -1000 and -100 HU, have these values."""
    per_hu = (fat - air) / 900
    ends = [fat + per_hu * (hu + 100) for hu in (-4000, 4000)]
    python, option = (sep.join(f"{n:.4g}" for n in (-4000, 4000, *ends)) for sep in (", ", ","))
    return Fault(
        "scaled",
        f"show air at {air:.4g} and fat at {fat:.4g}, not at -1000 and -100: {_in_words(air, fat)}",
        _UNKNOWN,
        f"ts.Scaled(a_min, a_max, b_min, b_max) {_NUMBERS}, estimated, ts.Scaled({python})",
        f"--intensity=A,B,LOW,HIGH {_NUMBERS}, estimated, {option}",
    )


def unclear(dark: float, fat: float) -> Fault:
    """Return the fault of a CT whose fat and whose air, or lung, have these values."""
    return Fault(
        "scaled",
        f"show air or lung at {dark:.4g} and fat at {fat:.4g}, not at -1000 and -100",
        _UNKNOWN,
        "ts.Scaled(a_min, a_max, b_min, b_max) with the numbers of your scaling",
        "--intensity=A,B,LOW,HIGH with the numbers of your scaling",
    )


def _in_words(air: float, fat: float) -> str:
    """Return HU -> value as a factor and a number that is added."""
    factor = (fat - air) / 900
    offset = fat + 100 * factor
    if abs(offset) < 25 * factor:
        return f"HU times about {factor:.2g}"
    return f"about {factor:.2g} x HU {'+' if offset > 0 else '-'} {abs(offset):.3g}"


BYTES = windowed(0, 255)
NOT_CT = Fault(
    "no CT",
    "are all positive, with neither air at -1000 nor fat at -100, as in MR",
    "tumorsynth is for CT, not for MR; if it is a CT, give it in HU",
)
LABEL_MAP = Fault(
    "label map", "are few whole numbers, as in a label map", "give the CT as the image"
)
NO_TISSUE = Fault(
    "no tissue",
    "lie where no tissue does",
    "give the CT in HU: undo their scaling, what was added to them, or a change of sign",
)
