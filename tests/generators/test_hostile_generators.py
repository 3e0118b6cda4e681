"""Malicious generator folders: refused soon with a clear error, or loaded and working."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import resource
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth.generators.config import build
from tumorsynth.generators.folder import config_digest, read_folder

LONG = int(os.environ.get("TUMORSYNTH_EXAMPLES", "0"))
SECONDS = 10  # of CPU time, of a load and a tumour


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_generator().save(tmp_path_factory.mktemp("good") / "tiny")


def write(folder, good, card, raw=None):
    """Write a folder as an attacker would, with every hash adjusted."""
    folder.mkdir(exist_ok=True)
    raw = (good / "model.safetensors").read_bytes() if raw is None else raw
    card = {**card, "sha256": hashlib.sha256(raw).hexdigest()}
    if "config" in card:
        card["config_sha256"] = config_digest(card["config"])
    (folder / "model.safetensors").write_bytes(raw)
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def works_or_refused(folder, match=""):
    """Return True if it loads and paints, False if it is refused with a clear ValueError."""
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        generator = read_folder(folder)
        crop, mask = tiny_crop(side=generator.crop_size)
        worked = bool(generator.change(crop, mask, seed=[1], contrast_hu=-30.0).isfinite().all())
        assert worked
    except ValueError as error:
        assert match in str(error)
        worked = False
    assert time.process_time() - start < SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, f"{grown} KiB"
    return worked


# -- cards -----------------------------------------------------------------------------------------

LEAVES = [
    math.nan, math.inf, -math.inf, 1e300, -1, 0, 1, 2, 3, 7, 8, 64, 2**16, 2**31, 10**9, 10**30,
    0.5, True, None, "x", "8", [], {}, [8], [1] * 65, [8] * 10_000, [[1]], {"a": 1}, "ddim",
]  # fmt: skip


def places(value, path=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, (dict, list)):
            yield from places(entry, (*path, key))


@settings(
    max_examples=LONG or 60,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_configs_changed_anywhere(good, tmp_path_factory, data):
    card = json.loads((good / "card.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(card["config"]))))
        held = card["config"]
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(LEAVES)))
    works_or_refused(write(tmp_path_factory.mktemp("bad"), good, card))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("sampler", {"steps": 10**9, "timesteps": 10**9}, "at most 65536"),
        ("sampler", {"steps": 5000, "timesteps": 5000}, "at most 1000"),
        ("sampler", {"crop_size": 256}, "at most 192"),
        ("sampler", {"crop_multiple": 2}, "must be a multiple of 8"),
        ("sampler", {"clamp": -1.0}, "clamp must be positive"),
        ("autoencoder", {"encoder_blocks": 10**6}, "encoder_blocks must be at most 64"),
        ("autoencoder", {"encoder_widths": [8] * 1000}, "at most 64 entries"),
        ("autoencoder", {"encoder_widths": [65536, 65536]}, "wrong shape"),
        ("autoencoder", {"codes": 65536}, "extra: latent_high"),
        ("autoencoder", {"window": [-math.inf, 250]}, "must be a finite number"),
        ("autoencoder", {"latent_channels": 4}, "the denoiser must take 4 channels of latent"),
        ("denoiser", {"widths": [60000, 60000]}, "wrong shape"),
        ("denoiser", {"cond_channels": 12}, "9 of conditioning"),
        ("denoiser", {"groups": 0}, "does not describe a generator"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused(good, tmp_path, part, change, words):
    card = json.loads((good / "card.json").read_text())
    card["config"][part] |= change
    assert not works_or_refused(write(tmp_path / "bad", good, card), words)


@pytest.mark.parametrize(
    "name", [None, 5, math.nan, [], {"a": {}}, "x" * 10**6, "../../etc/passwd", "\x1b[2J", "a\nb"]
)
def test_a_name_is_text_and_no_path(good, tmp_path, name, capsys):
    from tumorsynth.commands.main import main

    card = json.loads((good / "card.json").read_text()) | {"name": name, "description": "\x1b[2J"}
    folder = write(tmp_path / "odd", good, card)
    assert works_or_refused(folder)
    assert main(["info", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


# -- tensors ---------------------------------------------------------------------------------------


def test_tensors_of_another_kind_or_not_finite_are_refused(good, tmp_path):
    card = json.loads((good / "card.json").read_text())
    key = "denoiser.stem.weight"
    for change, words in (
        (lambda t: t.to(torch.int8), "must hold numbers like torch.float32"),
        (lambda t: t.to(torch.complex64), "must hold numbers like torch.float32"),
        (lambda t: t.to(torch.bool), "must hold numbers like torch.float32"),
        (lambda t: t * math.nan, "must be finite"),
        (lambda t: t + math.inf, "must be finite"),
    ):
        tensors = load_file(good / "model.safetensors")
        tensors[key] = change(tensors[key])
        folder = write(tmp_path / "bad", good, card, save(tensors))
        assert not works_or_refused(folder, words)
    tensors = {k: v.half() for k, v in load_file(good / "model.safetensors").items()}
    assert works_or_refused(write(tmp_path / "half", good, card, save(tensors)))


def headers(raw):
    """safetensors files with a header that lies."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = [k for k in header if k != "__metadata__"]

    def made(header, text=None):
        text = json.dumps(header).encode() if text is None else text
        return struct.pack("<Q", len(text)) + text + body

    def one(**change):
        return made({**header, names[0]: {**header[names[0]], **change}})

    yield "a length beyond the file", struct.pack("<Q", 2**63) + raw[8:]
    yield "a length of 100 MB", struct.pack("<Q", 10**8) + raw[8:]
    yield "nothing but a length", struct.pack("<Q", 0)
    yield "a header of spaces", made(None, b" " * 10_000_000)
    yield "nested without end", made(None, b'{"a":' * 100_000)
    yield "offsets past the end", one(data_offsets=[0, 2**40])
    yield "offsets that overlap", one(data_offsets=header[names[1]]["data_offsets"])
    yield "offsets backwards", one(data_offsets=[400, 0])
    yield "a shape that overflows", one(shape=[2**62, 4])
    yield "a negative shape", one(shape=[-1, 8])
    yield "a shape of 10,000 axes", one(shape=[1] * 10_000)
    yield "a dtype that is none", one(dtype="PICKLE")
    yield "another dtype", one(dtype="F64")
    yield (
        "a name that is a path",
        made({("../../x" if k == names[0] else k): v for k, v in header.items()}),
    )
    yield (
        "200,000 names",
        made(
            {str(k): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(200_000)}
        ),
    )


def test_headers_that_lie_are_refused(good, tmp_path):
    card = json.loads((good / "card.json").read_text())
    raw = (good / "model.safetensors").read_bytes()
    for k, (what, bad) in enumerate(headers(raw)):
        folder = write(tmp_path / str(k), good, card, bad)
        assert not works_or_refused(folder), what


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../..", "a\0b", "x" * 5000, "a/b/c", "~/x", "nö/\udcff", "a\nb", "-x"]
)
def test_names_without_a_generator_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        ts.SynthesizeTumor(name)
    assert "generator" in str(error.value)


def test_a_valid_config_is_built(good):
    config = json.loads((good / "card.json").read_text())["config"]
    assert build(config)[2] == tiny_generator().sampler
