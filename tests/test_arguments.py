"""`keywords_of`: signature, docstring and errors of constructors that pass keywords on."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

import tumorsynth as ts
from tumorsynth.adapter import Adapter
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


def calls_with_a_misspelt_keyword():
    """Every public class and function, and a keyword that is off by a letter."""
    synth = ts.SynthesizeTumor("hu2023")
    hu2023, early = ts.load_generator("hu2023"), ts.load_generator("liver-early")
    return [
        (ts.SynthesizeTumor, "organ_label", "organ_labels"),
        (synth, "sed", "seed"),
        (synth, "spaceing", "spacing"),
        (synth.synthesize, "parms", "params"),
        (ts.Scaled, "amin", "a_min"),
        (ts.ZScore, "means", "mean"),
        (ts.Gate, "try", "tries"),
        (ts.MassEffect, "shares", "share"),
        (ts.ContrastPrior, "nam", "name"),
        (ts.make_phantom, "spaceing", "spacing"),
        (ts.load_generator, "devce", "device"),
        (ts.HandcraftedGenerator, "confg", "config"),
        (ts.CopyPaste, "lesion", "lesions"),
        (ts.CopyPaste.from_scans, "scan", "scans"),
        (ts.Generator, "sampler_", "sampler"),
        (ts.Generator.from_difftumor, "denoisr", "denoiser"),
        (hu2023.inpaint, "sed", "seed"),
        (hu2023.change, "sed", "seed"),
        (early.inpaint, "sed", "seed"),
        (early.change, "sed", "seed"),
        (early.sample, "nois", "noise"),
        (early.save, "foldr", "folder"),
    ]


def test_a_misspelt_keyword_is_answered_with_the_known_one():
    for call, wrong, right in calls_with_a_misspelt_keyword():
        with pytest.raises(TypeError, match=f"keyword argument {wrong} of .* mean .*{right}"):
            call(**{wrong: 1})
    with pytest.raises(TypeError, match="keyword argument a of HU; it takes none"):
        ts.HU(a=1)


def test_every_public_class_and_function_answers_an_unknown_keyword():
    for name in ts.__all__:
        public = getattr(ts, name)
        if not callable(public) or name == "TumorGenerator":  # a protocol
            continue
        with pytest.raises(TypeError, match=f"unknown keyword argument qqq of {name}; it takes"):
            public(qqq=1)


def test_the_classes_stay_what_they_are():
    for value in (ts.HU(), ts.Scaled(0, 1, 0, 1), ts.ZScore(1, 2), ts.Gate(), ts.MassEffect(0.5)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
        assert dataclasses.replace(value) == value and hash(value) == hash(copy.copy(value))
        assert repr(value).startswith(type(value).__name__)


@pytest.mark.parametrize("value", ["no", "yes", None, 2, 1.0, [True]])
def test_a_flag_is_true_or_false(value):
    for name, make in (
        ("merge", ts.SynthesizeTumor),
        ("any_tissue", ts.SynthesizeTumor),
        ("healthy_only", Adapter),
        ("separate_organ", Adapter),
    ):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got .*; pass {name}="):
            make(**{name: value})
        for good in (True, False, 0, 1):
            make(**{name: good})


def test_params_and_seed_exclude_each_other():
    synth = ts.SynthesizeTumor("hu2023", size_mm=(5, 6))
    image = 60 + torch.randn(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    label = torch.ones(1, 24, 24, 24, dtype=torch.uint8)
    synth(image, label, spacing=1, seed=0)
    params = synth.params
    for call in (synth, synth.synthesize, Adapter(generator="hu2023")):
        with pytest.raises(ValueError, match="seed must not be given together with params.*seed=3"):
            call(image, label, spacing=1, seed=3, params=params)
        call(image, label, spacing=1, seed=None, params=params)
