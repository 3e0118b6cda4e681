"""What may be asked for: checks of single arguments, for the core and the adapters alike."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from numbers import Real
from typing import Any


def is_bool(value: object) -> bool:
    """Whether this is True or False, of Python, numpy or torch: 1 and 0 where a number is asked."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def any_bool(value: Any) -> bool:
    """Whether a number, or one of several, is True or False."""
    if is_bool(value):
        return True
    return isinstance(value, list | tuple) and any(any_bool(part) for part in value)


def check_probability(name: str, p: Any) -> float:
    """A number from 0 to 1; ValueError otherwise."""
    number: Any = Real
    if is_bool(p) or not isinstance(p, number) or not 0 <= p <= 1:
        raise ValueError(
            f"{name} must be a probability between 0 and 1, got {p!r}; pass {name}=1 for every "
            f"sample, {name}=0.5 for about half of them"
        )
    return float(p)


def check_keywords(
    transform: object, given: Iterable[str], core: Iterable[str], base: type | None = None
) -> None:
    """TypeError for a keyword that nobody takes, before somebody else is blamed for it.

    given: what the transform's own constructor has no name for. core: the names of the synthesis's
    settings. base: the framework's class whose constructor gets the rest.
    """
    accepted = {*core, "healthy_only", *(_names(base) if base else ())}
    unknown = sorted(set(given) - accepted)
    if unknown:
        for cls in type(transform).__mro__:
            if cls.__module__.startswith("tumorsynth."):
                accepted |= _names(cls)
        raise TypeError(
            f"unknown keyword argument {', '.join(unknown)} of {type(transform).__name__}; "
            f"{_meant(unknown, accepted)}it takes {', '.join(sorted(accepted))}"
        )


def _names(cls: type) -> set[str]:
    """What a class's own constructor names, which may pass on more."""
    if "__init__" not in vars(cls):
        return set()
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    named = {
        one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    return named - {"self"}


def _meant(unknown: Iterable[str], known: Iterable[str]) -> str:
    found: list[str] = []
    for name in unknown:
        close = difflib.get_close_matches(name, known) or difflib.get_close_matches(
            name, known, n=1, cutoff=0.4
        )
        found += [one for one in close if one not in found]
    return f"did you mean {' or '.join(found)}? " if found else ""
