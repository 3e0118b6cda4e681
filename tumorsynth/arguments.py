"""Checks of single arguments, and signatures of constructors that pass arguments on."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from inspect import Parameter
from numbers import Real
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
_OPEN = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}  # *arguments and **keywords


def is_bool(value: object) -> bool:
    """Return whether a value is a bool of Python, numpy or torch; the numbers 0 and 1 are not."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def any_bool(value: Any) -> bool:
    """Return whether a value, or any value in nested lists and tuples, is a bool."""
    if is_bool(value):
        return True
    return isinstance(value, list | tuple) and any(any_bool(part) for part in value)


def format_beside(value: float, limits: Iterable[float], spec: str = ".1f") -> str:
    """Return a number for a message, with the digits that tell it from the limits beside it.

    Args:
        value: the number.
        limits: the numbers that the message compares it with.
        spec: of the format, with the fewest digits: ".1f", ".3g", ".0%".

    Examples:
        >>> format_beside(4.99, [5.0]), format_beside(4.2, [5.0])
        ('4.99', '4.2')
    """
    limits, kind = list(limits), spec[-1]
    for digits in range(int(spec[1:-1]), 18):
        text = f"{value:.{digits}{kind}}"
        shown = float(text.rstrip("%")) / (100 if kind == "%" else 1)
        if all((shown < end) == (value < end) and (shown > end) == (value > end) for end in limits):
            return text
    return repr(value)


def check_probability(name: str, p: Any) -> float:
    """Return a number from 0 to 1.

    Args:
        name: of the argument, for the message.
        p: its value.

    Raises:
        ValueError: for anything else.
    """
    number: Any = Real
    if is_bool(p) or not isinstance(p, number) or not 0 <= p <= 1:
        raise ValueError(
            f"{name} must be a probability between 0 and 1, got {p!r}; pass {name}=1 for every "
            f"sample, {name}=0.5 for about half of them"
        )
    return float(p)


def check_flag(name: str, value: Any) -> bool:
    """Return a bool, also for 0 and 1.

    Args:
        name: of the argument, for the message.
        value: the argument.

    Raises:
        ValueError: for anything else: the text "no" would count as true.
    """
    if not is_bool(value) and not (isinstance(value, int) and value in (0, 1)):
        raise ValueError(f"{name} must be True or False, got {value!r}; pass {name}=True")
    return bool(value)


def check_callable(name: str, value: Any) -> Any:
    """Return a function, or None for none.

    Args:
        name: of the argument, for the message.
        value: the argument.

    Raises:
        TypeError: for anything else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}; pass one, or leave {name} out")
    return value


def keywords_of(*sources: type, without: Iterable[str] = ()) -> Callable[[Class], Class]:
    """Decorate a class whose constructor passes ``**keywords`` on to other constructors.

    The signature and the docstring of the class then show the parameters of those constructors,
    and an unknown keyword is a TypeError that suggests a known one.

    Args:
        sources: the classes whose constructors get the keywords. A constructor that takes
            ``*arguments`` passes on their positional parameters too.
        without: parameters of theirs that the class does not take.

    Examples:
        >>> @keywords_of(SynthesizeTumor, without=["p"])
        ... class Transform:
        ...     def __init__(self, prob=1.0, **settings): ...
    """

    def decorate(cls: Class) -> Class:
        constructor = cls.__init__  # type: ignore[misc]
        signature = _merge(inspect.signature(constructor), sources, set(without))
        accepted = [*signature.parameters][1:]  # without self

        @functools.wraps(constructor)
        def init(self: Any, *arguments: Any, **keywords: Any) -> None:
            _check_keywords(type(self).__name__, keywords, accepted)
            constructor(self, *arguments, **keywords)

        init.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = init  # type: ignore[misc]
        cls.__doc__ = _with_entries(cls, sources, accepted)
        return cls

    return decorate


def known_keywords(function: Function) -> Function:
    """Decorate a function, so that an unknown keyword is a TypeError that suggests a known one."""
    accepted = [*inspect.signature(function).parameters.keys() - {"self", "cls"}]
    owner = function.__qualname__.removesuffix(".forward").removesuffix(".__call__")

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        _check_keywords(owner, keywords, accepted)
        return function(*arguments, **keywords)

    return call  # type: ignore[return-value]


def _check_keywords(owner: str, keywords: dict[str, Any], accepted: list[str]) -> None:
    """Raise TypeError for a keyword that a class or function does not accept."""
    unknown = sorted(keywords.keys() - set(accepted))
    if unknown:
        raise TypeError(
            f"unknown keyword argument {', '.join(unknown)} of {owner}; "
            f"{suggestion(unknown, accepted)}it takes {', '.join(sorted(accepted)) or 'none'}"
        )


def _merge(own: inspect.Signature, sources: Iterable[type], without: set[str]) -> inspect.Signature:
    """Return a signature with the sources' parameters in place of *arguments and **keywords."""
    kinds = {parameter.kind for parameter in own.parameters.values()}
    merged = {p.name: p for p in own.parameters.values() if p.kind not in _OPEN}
    if Parameter.VAR_KEYWORD not in kinds:
        return own
    for source in sources:
        for parameter in _parameters(source):
            if parameter.kind in _OPEN or parameter.name in without:
                continue
            if Parameter.VAR_POSITIONAL not in kinds:
                parameter = parameter.replace(kind=Parameter.KEYWORD_ONLY)
            merged.setdefault(parameter.name, parameter)
    # a stable sort: positional parameters come before those that are keywords only
    return own.replace(parameters=sorted(merged.values(), key=lambda p: p.kind))


def _parameters(cls: type) -> list[Parameter]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    return [*signature.parameters.values()][1:]  # without self


def _with_entries(cls: type, sources: Iterable[type], accepted: Iterable[str]) -> str | None:
    """Return a class's docstring with an entry for every parameter in place of that of **."""
    doc = inspect.getdoc(cls)
    if doc is None:  # python -OO
        return None
    own = _entries(doc)
    known: dict[str, str] = {}
    for source in sources:
        known = _entries(inspect.getdoc(source) or "") | known
    added = "".join(known[name] for name in accepted if name not in own and name in known)
    placeholder = re.compile(r"^    \*\*\w+:.*\n(?: {5,}.*\n)*", re.M)
    return placeholder.sub(lambda _: added, f"{doc}\n", count=1).rstrip()


def _entries(doc: str) -> dict[str, str]:
    """Return the lines of each parameter in the Args section of a docstring."""
    section = re.search(r"^Args:\n((?: {4,}.*\n|\n(?= ))*)", f"{doc}\n", re.M)
    entries = re.findall(r"^(    (\w+).*\n(?: {5,}.*\n)*)", section[1] if section else "", re.M)
    return {name: lines for lines, name in entries}


def suggestion(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return "did you mean ...? " with the known names close to unknown ones, or nothing.

    Upper and lower case do not matter.
    """
    spelt = {name.lower(): name for name in known}
    found: list[str] = []
    for name in unknown:
        close = difflib.get_close_matches(name.lower(), spelt) or difflib.get_close_matches(
            name.lower(), spelt, n=1, cutoff=0.4
        )
        found += [spelt[one] for one in close if spelt[one] not in found]
    return f"did you mean {' or '.join(found)}? " if found else ""
