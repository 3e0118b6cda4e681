"""Generator folders: saving, checking, loading once, handles."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth.generators.folder import read_folder, write_folder
from tumorsynth.generators.handcrafted import HandcraftedConfig, HandcraftedGenerator
from tumorsynth.generators.store import (
    Handle,
    bundled_names,
    default_generator,
    find_folder,
    load_generator,
)


@pytest.fixture()
def folder(tmp_path):
    return tiny_generator().save(tmp_path / "tiny")


def rewrite(folder, change=None, **card_entries):
    """The folder with other tensors or card entries, the hash made to fit."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    raw = save(tensors)
    (folder / "model.safetensors").write_bytes(raw)
    card = json.loads((folder / "card.json").read_text())
    card |= {"sha256": hashlib.sha256(raw).hexdigest(), **card_entries}
    (folder / "card.json").write_text(json.dumps(card))


def works(folder) -> bool:
    crop, mask = tiny_crop()
    return bool(load_generator(folder).inpaint(crop, mask, seed=0).isfinite().all())


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [0, 64])
def test_a_saved_generator_gives_the_same_tumours(tmp_path, codes):
    generator = tiny_generator(codes=codes, mask_conditioning="area")
    generator.card |= {"licence": "research use", "metrics": {"fid": 12.5}, "data": ["a", "b"]}
    with torch.no_grad():
        if not codes:
            generator.autoencoder.latent_high.fill_(2.5)
    folder = generator.save(tmp_path / "made" / "here")
    assert sorted(p.name for p in folder.iterdir()) == ["CARD.md", "card.json", "model.safetensors"]
    loaded = load_generator(folder)
    assert isinstance(loaded, ts.Generator)
    assert loaded.sampler == generator.sampler
    assert loaded.card.items() >= generator.card.items()
    crop, mask = tiny_crop()
    for method in ("inpaint", "change"):
        assert torch.equal(
            getattr(loaded, method)(crop, mask, seed=5),
            getattr(generator, method)(crop, mask, seed=5),
        )
    readable = (folder / "CARD.md").read_text()
    assert "tiny-0" in readable and "research use" in readable and "fid: 12.5" in readable


def test_saving_again_writes_the_same_bytes(folder, tmp_path):
    again = load_generator(folder).save(tmp_path / "again")
    for name in ("model.safetensors", "card.json", "CARD.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_sampler_is_saved_as_it_is_now(folder, tmp_path):
    other = load_generator(folder).with_sampler(method="ddim", timesteps=8, steps=4)
    assert other.source is None  # not what its folder holds
    assert load_generator(other.save(tmp_path / "other")).sampler == other.sampler


def test_other_files_in_the_folder_stay(folder):
    (folder / "log.txt").write_text("mine")
    tiny_generator(1).save(folder)
    assert (folder / "log.txt").read_text() == "mine" and works(folder)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        tiny_generator().save(tmp_path / "file")


# -- writing that fails --------------------------------------------------------------------------


def test_a_write_that_is_cut_off_leaves_the_old_generator(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args):
        raise OSError("no space left on device")

    for function in ("replace", "chmod", "fdopen"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="no space"):
                tiny_generator(1).save(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert works(folder)


def test_a_card_that_is_not_json_leaves_the_old_generator(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = tiny_generator(1)
    other.card["metrics"] = torch.ones(3)
    with pytest.raises(TypeError):
        other.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_of_saving_leaves_a_whole_generator(folder, tmp_path):
    """The process ends at once before the k-th rename; no handler and no finally runs."""
    crop, mask = tiny_crop()
    one, two = tiny_generator(0), tiny_generator(1)
    made = [g.change(crop, mask, seed=3) for g in (one, two)]
    tensors = load_file(two.save(tmp_path / "two") / "model.safetensors")
    raw, card = save(tensors), json.loads((tmp_path / "two/card.json").read_text())
    seen = set()
    for k in range(6):
        one.save(folder)
        child = os.fork()
        if child == 0:
            steps = [*[os.replace] * k, lambda *a: os._exit(9)]
            os.replace = lambda *a, steps=steps: steps.pop(0)(*a)
            write_folder(folder, raw, card)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (9 if k < 4 else 0)
        found = load_generator(folder)
        new = found.name == "tiny-1"
        seen.add((k, new))
        assert torch.equal(found.change(crop, mask, seed=3), made[new])
        assert Handle(folder).get("cpu").name == found.name
    assert {k for k, new in seen if not new} == {0, 1}  # until the model is in place, the old one


def test_leftovers_of_a_killed_save_are_removed(folder):
    left = [folder / ".model.safetensors.abc", folder / ".card.json.def"]
    for path in left:
        path.write_text("")
    os.utime(left[0], (0, 0))
    (folder / ".mine").write_text("")
    os.utime(folder / ".mine", (0, 0))
    tiny_generator(1).save(folder)
    assert [path.exists() for path in (*left, folder / ".mine")] == [False, True, True]


# -- folders that must not load ------------------------------------------------------------------


def test_a_changed_byte_is_found(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="must have the sha256 of its card") as error:
        load_generator(folder)
    assert hashlib.sha256(raw).hexdigest() in str(error.value)


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_a_file_cut_short_is_found(folder, length):
    path = folder / "model.safetensors"
    raw = path.read_bytes()[:length]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="cut short"):
        load_generator(folder)
    card = json.loads((folder / "card.json").read_text())  # and when the card agrees
    card["sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_generator(folder)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


@pytest.mark.parametrize("dump", [pickle.dumps, None])
def test_a_pickle_is_refused_and_not_executed(folder, dump, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = folder / "model.safetensors"
    if dump:
        path.write_bytes(dump({"weight": Evil()}))
    else:
        torch.save({"weight": Evil()}, path)
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_generator(folder)
    assert not (tmp_path / "evil-was-here").exists()


KEY = "denoiser.stem.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), r"missing: stem\.weight"),
        (lambda t: t.update({"denoiser.more": torch.ones(2)}), r"extra: more"),
        (lambda t: t.update({"autoencoder.more": torch.ones(2)}), r"extra: more"),
        (lambda t: t.update({"optimizer.step": torch.ones(2)}), r"do not belong .*optimizer\.step"),
        (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), r"wrong shape: stem\.weight"),
        (lambda t: t.pop("autoencoder.latent_low"), r"missing: latent_low"),
        (lambda t: t.clear(), r"missing: "),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_generator(folder)


def test_a_card_is_json_also_where_a_figure_is_none(folder, tmp_path):
    generator = load_generator(folder)
    generator.card["metrics"] = {"rmse_hu": math.nan, "contrast_hu": [1.5, math.inf]}
    text = (generator.save(tmp_path / "made") / "card.json").read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read["metrics"] == {"rmse_hu": None, "contrast_hu": [1.5, None]}


@pytest.mark.parametrize(
    "config",
    [{}, [], None, "conv", {"autoencoder": {}, "denoiser": {}, "sampler": {}},
     {"autoencoder": {}, "denoiser": {"type": "os.system"}, "sampler": {}}],
)  # fmt: skip
def test_a_config_of_no_generator_is_refused(folder, config):
    rewrite(folder, config=config)
    with pytest.raises(ValueError, match="config does not describe a generator"):
        load_generator(folder)


def test_an_autoencoder_is_no_generator(folder):
    rewrite(folder, config={"autoencoder": {}})
    with pytest.raises(ValueError, match="holds an autoencoder alone; train"):
        load_generator(folder)


def test_a_changed_config_that_would_still_load_is_found(folder):
    """A weight's hash does not cover what the weights are used for."""
    card = json.loads((folder / "card.json").read_text())
    card["config"]["sampler"]["mask_conditioning"] = "area"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="must have its config_sha256"):
        load_generator(folder)
    card["config"]["sampler"]["mask_conditioning"] = "nearest"
    card["licence"] = "what people write into it is theirs"
    (folder / "card.json").write_text(json.dumps(card, sort_keys=True))
    assert works(folder)
    del card["config_sha256"]  # as earlier versions wrote it
    (folder / "card.json").write_text(json.dumps(card))
    assert works(folder)


@pytest.mark.parametrize(
    "card",
    [
        "[" * 100_000,
        '{"a": 1' + "0" * 10_000 + "}",
        "",
        "{",
        "[]",
        "5",
        "null",
        '"name"',
        "{}",
        '{"name": "x"}',
    ],
)
def test_an_invalid_card_is_refused(folder, card):
    (folder / "card.json").write_text(card)
    with pytest.raises(ValueError, match="restore the folder"):
        load_generator(folder)


def test_a_card_of_a_later_format_says_so(folder):
    rewrite(folder, format=99)
    with pytest.raises(ValueError, match="format 99, this version reads format 1"):
        load_generator(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "card.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_generator(folder)


@pytest.mark.parametrize("name", ["no-such-generator", "liver", "HU2023", "./nowhere", "/nowhere"])
def test_an_unknown_name_lists_the_known_ones(name):
    for call in (load_generator, Handle, ts.SynthesizeTumor):
        with pytest.raises(FileNotFoundError, match="no generator") as error:
            call(name)
        for known in bundled_names():
            assert known in str(error.value)
        assert repr(name) in str(error.value)


@pytest.mark.parametrize("thing", [5, None, torch.nn.Identity(), HandcraftedGenerator])
def test_a_handle_refuses_other_objects(thing):
    with pytest.raises(TypeError, match="generator must be") as error:
        Handle(thing)
    assert "hu2023" in str(error.value)


# -- loaded once -----------------------------------------------------------------------------------


def test_a_generator_is_loaded_once(folder):
    first = load_generator(folder)
    assert load_generator(str(folder)) is first
    assert load_generator(folder, "cpu") is first
    assert load_generator("hu2023") is load_generator("hu2023")
    assert Handle(folder).get("cpu") is first
    assert Handle(first).get("cpu") is first


def test_a_rewritten_folder_is_loaded_again(folder):
    first = load_generator(folder)
    tiny_generator(1).save(folder)
    second = load_generator(folder)
    assert second is not first and second.name == "tiny-1" and first.name == "tiny-0"


def test_moving_a_loaded_generator_does_not_move_everybodys(folder):
    moved = load_generator(folder).to("meta")  # .to() is in place, as torch's
    assert moved.device.type == "meta"
    assert load_generator(folder, "cpu").device.type == "cpu"
    assert works(folder)
    assert Handle(folder).get("cpu").device.type == "cpu"
    assert Handle(moved).get("cpu").device.type == "cpu"


# -- handles -------------------------------------------------------------------------------------


def test_a_handle_pickles_as_a_name(folder):
    crop, mask = tiny_crop()
    for source in ("hu2023", folder, str(folder), load_generator(folder)):
        handle = Handle(source)
        expected = handle.get("cpu").change(crop, mask, seed=[1])  # loaded by now
        raw = pickle.dumps(handle)
        assert len(raw) < 2000
        assert torch.equal(pickle.loads(raw).get("cpu").change(crop, mask, seed=[1]), expected)
        assert copy.deepcopy(handle).get("cpu") is handle.get("cpu")


def test_a_handle_of_a_generator_without_a_folder_carries_it():
    crop, mask = tiny_crop()
    generator = tiny_generator(3)
    other = pickle.loads(pickle.dumps(Handle(generator))).get("cpu")
    assert torch.equal(other.change(crop, mask, seed=1), generator.change(crop, mask, seed=1))


def test_a_changed_sampler_travels_with_the_handle(folder):
    crop, mask = tiny_crop()
    other = load_generator(folder).with_sampler(method="ddim", timesteps=8, steps=4)
    again = pickle.loads(pickle.dumps(Handle(other))).get("cpu")
    assert again.sampler == other.sampler
    assert torch.equal(again.change(crop, mask, seed=1), other.change(crop, mask, seed=1))


IN_ANOTHER_PROCESS = """
import pickle, sys
print(pickle.load(sys.stdin.buffer).get("cpu").precision)
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_a_precision_travels_to_another_process(folder, by_name):
    """As to the workers of a loader that spawns them."""
    generator = load_generator(folder)
    handle = Handle(folder if by_name else generator)
    generator.precision = "bfloat16"
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps(handle),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
    )
    assert done.stdout.decode().strip() == "bfloat16", done.stderr.decode()


def test_a_pickled_precision_changes_no_other_handle(folder):
    generator = load_generator(folder)
    generator.precision = "bfloat16"
    raw = pickle.dumps(Handle(generator))
    generator.precision = "auto"
    again = pickle.loads(raw)
    assert again.get("cpu").precision == "bfloat16" and generator.precision == "auto"
    assert again.get("cpu") is again.get("cpu")  # copied once
    assert pickle.loads(pickle.dumps(again)).get("cpu").precision == "bfloat16"
    generator.precision = "bfloat16"
    assert pickle.loads(raw).get("cpu") is generator


def test_a_handcrafted_generator_keeps_its_own_settings():
    own = HandcraftedGenerator(HandcraftedConfig(contrast_hu=(60.0, 60.0)))
    handle = Handle(own)
    assert handle.get("cpu") is own
    raw = pickle.dumps(handle)
    assert len(raw) < 2000
    assert pickle.loads(raw).get("cpu").config == own.config


def test_the_bundled_generators_load():
    assert bundled_names()[-1] == "hu2023" and default_generator() in bundled_names()
    for name in bundled_names():
        generator = load_generator(name)
        assert generator.name == name and generator.device.type == "cpu"


def test_a_model_changed_after_loading_is_found(folder):
    ts.load_generator(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="sha256"):
        ts.load_generator(folder)


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    folder = tiny_generator().save(tmp_path / "gen")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for source in ("liver-early", folder):
        read_folder(find_folder(source))
    assert torch.equal(torch.get_rng_state(), before)
    ts.SynthesizeTumor(str(folder))(*scan(), spacing=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def scan():
    return torch.full((1, 40, 40, 40), 100.0), torch.ones(1, 40, 40, 40, dtype=torch.uint8)
