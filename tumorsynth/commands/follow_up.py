"""The option ``--follow-up``: several numbers after one option, which click does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

OPTION = "--follow-up"
FollowUpFactors = Annotated[
    str | None,
    typer.Option(
        OPTION,
        metavar="FACTOR ...",
        help="A series in time: each scan once for every factor, with the same tumours at that "
        "many times their diameter, as NAME_t0, NAME_t1, ...; for example 1 1.3 1.7.",
        show_default=False,
    ),
]


class SeriesCommand(TyperCommand):
    """A command whose option for the series takes several numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line."""
        return super().parse_args(ctx, join_factors(args))


def join_factors(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which the numbers after the option are one word, with commas."""
    joined: list[str] = []
    words = list(arguments)
    while words:
        joined.append(words.pop(0))
        if joined[-1] == OPTION:
            factors = []
            while words and _is_number(words[0]):
                factors.append(words.pop(0))
            if factors or not words or words[0].startswith("-"):
                joined.append(",".join(factors))
    return joined


def parse_factors(text: str | None) -> tuple[float, ...]:
    """Return the factors; none without the option.

    Raises:
        ValueError: for anything but numbers that `check_factor` accepts.
    """
    if text is None:
        return ()
    from tumorsynth.pipeline.grow import check_factor

    try:
        factors = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        factors = []
    if not factors:
        raise ValueError(
            f"{OPTION} must be factors of the diameter, got {text!r}; give for example "
            f"{OPTION} 1 1.3 1.7"
        )
    return tuple(check_factor(OPTION, factor) for factor in factors)


def _is_number(word: str) -> bool:
    try:
        float(word.replace(",", ""))
    except ValueError:
        return False
    return True
