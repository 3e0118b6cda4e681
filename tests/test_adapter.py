"""What holds for the transforms of all frameworks: their signature, errors, copies and pickles."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pydoc

import pytest

import tumorsynth as ts

PLACES = {
    "RandSynthesizeTumor": "monai",
    "RandSynthesizeTumord": "monai",
    "BatchSynthesizeTumord": "monai",
    "PrepareBatchTumorSynth": "monai",
    "TumorSynthCallback": "lightning",
    "RandomSynthesizeTumor": "torchio",
    "SynthesizeTumor": "torchio",
}
REQUIRED = {
    "RandSynthesizeTumord": {"keys": "image"},
    "BatchSynthesizeTumord": {"keys": "image"},
    "SynthesizeTumor": {"params": {"seed": 0, "applied": True, "tumors": []}},
}
CORE = dict(inspect.signature(ts.SynthesizeTumor).parameters)


@pytest.fixture(params=PLACES)
def adapter(request):
    framework = PLACES[request.param]
    pytest.importorskip(framework, reason=f"needs {framework}")
    return getattr(importlib.import_module(f"tumorsynth.{framework}"), request.param)


def make(adapter, **settings):
    return adapter(**REQUIRED.get(adapter.__name__, {}), **settings)


def test_the_signature_shows_every_setting_with_its_default(adapter):
    shown = inspect.signature(adapter).parameters
    for name, parameter in CORE.items():
        if name != "p":
            assert shown[name].default == parameter.default, name
    assert shown["healthy_only"].default is False
    assert not {one.kind for one in shown.values()} & {inspect.Parameter.VAR_KEYWORD}
    chance = shown.get("prob", shown.get("p"))
    assert chance is not None and chance.default == 1


def test_help_explains_every_argument(adapter):
    text = pydoc.plain(pydoc.render_doc(adapter))
    for name in inspect.signature(adapter).parameters:
        if name != "keys" or "monai" in adapter.__module__:  # TorchIO does not explain its own
            assert f"   {name}: " in text, name
    assert "size_mm: 'float | Sequence[float] | str' = (5, 20)" in text
    assert "**" not in (adapter.__doc__ or "")


def test_a_misspelt_setting_is_named_with_what_was_meant(adapter):
    with pytest.raises(TypeError, match=f"organ_label of {adapter.__name__}; did you mean organ_l"):
        make(adapter, organ_label=1)


def test_an_organ_by_name_is_answered_with_what_to_pass(adapter):
    separate = {"separate_organ", "organ", "organ_key"} & inspect.signature(
        adapter
    ).parameters.keys()
    for more in ({}, *({name: True if name == "separate_organ" else "o"} for name in separate)):
        with pytest.raises(
            ValueError, match="need a label_map.* got 'liver' alone; pass .*organ_labels=1"
        ):
            make(adapter, organ_labels="liver", **more)


@pytest.mark.parametrize("labels", [0, (0,), (1, 0), 0.0])
def test_the_background_is_no_organ(adapter, labels):
    separate = {"separate_organ", "organ", "organ_key"} & inspect.signature(
        adapter
    ).parameters.keys()
    for more in ({}, *({name: True if name == "separate_organ" else "o"} for name in separate)):
        with pytest.raises(ValueError, match="must not hold 0, which is the background"):
            make(adapter, organ_labels=labels, **more)


@pytest.mark.parametrize("labels", [0, (1, 0)])
def test_the_background_is_no_organ_in_the_core_either(labels):
    with pytest.raises(ValueError, match="must not hold 0, which is the background"):
        ts.SynthesizeTumor(organ_labels=labels)
    with pytest.raises(ValueError, match="must not hold 0, which is the background"):
        ts.CopyPaste.from_scans([], organ_labels=labels)


def test_the_core_says_what_was_meant_too():
    with pytest.raises(TypeError, match=r"organ_label of SynthesizeTumor; did you mean organ_labe"):
        ts.SynthesizeTumor(organ_label=1)


def test_copies_and_pickles_are_the_same_transform_and_small(adapter):
    transform = make(adapter, generator="liver-early", organ_labels=(1, 3), count=2)
    raw = pickle.dumps(transform)
    assert len(raw) < 20_000
    for again in (copy.copy(transform), copy.deepcopy(transform), pickle.loads(raw)):
        assert type(again) is adapter and repr(again) == repr(transform)
