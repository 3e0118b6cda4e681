from __future__ import annotations

import pytest
import torch

from tumorsynth.random_streams import STREAM_SALTS, substream


def first(rng: torch.Generator) -> int:
    return int(torch.randint(1 << 48, (), generator=rng))


def test_streams_of_one_seed_are_independent_and_repeatable():
    values = {first(substream(7, name)) for name in STREAM_SALTS}
    assert len(values | {first(torch.Generator().manual_seed(7))}) == len(STREAM_SALTS) + 1
    for name in STREAM_SALTS:
        assert first(substream(7, name)) == first(substream(7, name)) != first(substream(8, name))


def test_salts_are_distinct_and_stay_as_they_are():
    """Params of earlier versions must replay the same tumours."""
    assert STREAM_SALTS == {
        "contrast": 0x6875,
        "contrast_prior": 0x7072696F,
        "structure": 0x636F7265,
        "contrast_condition": 0x636F6E74,
        "own_variation": 0x6F776E76,
        "edge": 0x65646765,
        "bulge": 0x62756C67,
        "fill_noise": 0x66696C6C,
        "lumps": 0x6C756D70,
        "heterogeneity": 0x68657465,
        "vessel_noise": 0x76657373,
        "rim": 0x72696D,
        "lesion": 0x6C657369,
    }
    assert len(set(STREAM_SALTS.values())) == len(STREAM_SALTS)


def test_unknown_stream_is_an_error():
    with pytest.raises(KeyError):
        substream(7, "colour")
