"""`keywords_of`: signatures, docstrings and errors of constructors that pass keywords on."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from tumorsynth.arguments import keywords_of


class Base:
    """A base.

    Args:
        size: how large,
            in mm.
        colour: which colour.
        seed: the seed.

    Raises:
        ValueError: never.
    """

    def __init__(self, size: float, colour: str = "red", *, seed: int = 0) -> None:
        self.values = size, colour, seed


@keywords_of(Base, without=["seed"])
class Named(Base):
    """Passes keywords on.

    Args:
        name: of the object.
        **keywords: the arguments of Base.

    Returns:
        Nothing.
    """

    def __init__(self, name: str = "a", **keywords: object) -> None:
        super().__init__(**keywords)  # type: ignore[arg-type]
        self.name = name


@keywords_of(Base)
class Positional(Base):
    """Passes everything on.

    Args:
        **keywords: the arguments of Base.
    """

    def __init__(self, size: float, *args: object, **keywords: object) -> None:
        super().__init__(size, *args, **keywords)  # type: ignore[arg-type]


def test_signature_shows_the_parameters_that_are_passed_on():
    shown = str(inspect.signature(Named))
    assert shown == "(name: 'str' = 'a', *, size: 'float', colour: 'str' = 'red') -> 'None'"
    shown = str(inspect.signature(Positional))
    assert shown == "(size: 'float', colour: 'str' = 'red', *, seed: 'int' = 0) -> 'None'"
    assert Named("b", size=1).values == (1, "red", 0) and Positional(1, "blue").values[1] == "blue"


def test_docstring_lists_them_with_all_their_lines():
    assert inspect.getdoc(Named) == (
        "Passes keywords on.\n\nArgs:\n    name: of the object.\n    size: how large,\n"
        "        in mm.\n    colour: which colour.\n\nReturns:\n    Nothing."
    )
    assert "size: how large,\n        in mm.\n    colour: which colour.\n    seed: the seed." in (
        inspect.getdoc(Positional) or ""
    )


def test_unknown_keywords_are_named_with_a_suggestion():
    with pytest.raises(TypeError, match=r"argument color of Named; did you mean colour\? it takes"):
        Named(color="blue")
    with pytest.raises(TypeError, match="unknown keyword argument seed of Named"):
        Named(size=1, seed=2)


def test_copies_pickles_and_subclasses_work_as_without():
    class Derived(Named):
        def __init__(self, extra: int, **keywords: object) -> None:
            super().__init__(**keywords)
            self.extra = extra

    assert str(inspect.signature(Derived)).startswith("(extra: 'int', **keywords")
    assert Derived(3, name="c", size=2).values == (2, "red", 0)
    named = Named("b", size=4)
    for again in (copy.copy(named), copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(again) is Named and vars(again) == vars(named)
