"""Places in batches of any nesting, and the tumours that adapters put there."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
from phantoms import shared_phantom
from torchio_subjects import make_subject

from tumorsynth.batch_entries import (
    describe,
    find_entry,
    find_path,
    map_tensors,
    replace_entry,
    value_at,
)

SETTINGS = {
    "generator": "hu2023",
    "organ_labels": 1,
    "tumor_label": 20,
    "count": 1,
    "contrast_hu": -60,
}
SPACING = (2.0, 2.0, 2.0)
Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass
class Record:
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    label: Any


@pytest.fixture(scope="module")
def scan():
    return shared_phantom(SPACING, (64, 64, 48))


BATCHES = [
    ({"a": {"b": 1}}, "a.b", ("a", "b")),
    ({"a.b": 2, "a": {"b": 1}}, "a.b", ("a.b",)),
    ({"a": {"b.c": 1}}, "a.b.c", ("a", "b.c")),
    ({"a": [5, 6]}, "a.1", ("a", 1)),
    ({"a": [5, 6]}, "a.-1", ("a", 1)),
    ({"a": (5, {"b": 6})}, ("a", 1, "b"), ("a", 1, "b")),
    ([5, 6], -2, (0,)),
    ({("a", "b"): 1}, ("a", "b"), (("a", "b"),)),
    ({"a": Pair(1, 2)}, "a.label", ("a", "label")),
    ([Record(1, 2)], "0.label", (0, "label")),
    ({"a": {"b": 1}}, "a.c", None),
    ({"a": {"b": 1}}, "b", None),
    ([5, 6], 2, None),
    ([5, 6], "x", None),
    ({"a": 1}, 0, None),
    ({"a": 1}, ("a", "b"), None),
]


@pytest.mark.parametrize(("batch", "place", "path"), BATCHES)
def test_places_and_their_replacement(batch, place, path):
    assert find_path(batch, place) == path
    if path is None:
        return
    before = repr(batch)
    new = replace_entry(batch, path, "new")
    assert value_at(new, path) == "new" and repr(batch) == before and type(new) is type(batch)
    assert replace_entry(batch, path, "new", in_place=True) is batch
    assert value_at(batch, path) == "new"


def test_a_frozen_dataclass_and_a_named_tuple_are_copied():
    for inner in (Frozen(1, 2), Pair(1, 2), (1, 2)):
        batch = {"a": inner}
        path = find_path(batch, "a.1" if inner == (1, 2) and type(inner) is tuple else "a.label")
        assert replace_entry(batch, path, 9, in_place=True) is batch
        assert value_at(batch, path) == 9 and type(batch["a"]) is type(inner)
    assert inner == (1, 2)


def test_the_description_is_what_to_pass():
    batch = {
        "a": {"image": 1, "data": 2},
        "ct": {"data": torch.zeros(1), "affine": 0, "stem": ["x"]},
        "b": [3, {"c": 4}],
        "names": ["x", "y"],
    }
    assert describe(batch) == "['a.image', 'a.data', 'ct', 'b.0', 'b.1.c', 'names']"
    assert describe([1, 2]) == "['0', '1']"
    assert describe(dict.fromkeys(range(50))).endswith(" and 26 more")
    for place in ("a.image", "ct", "b.1.c"):
        assert find_entry(batch, place) is not None


def test_tensors_are_mapped_through_all_containers():
    batch = {"a": [torch.ones(1)], "b": Pair(torch.ones(1), "x"), "c": Record(torch.ones(1), 3)}
    moved = map_tensors(batch, lambda x: x + 1)
    assert moved["a"][0] == moved["b"].image == moved["c"].image == 2 and moved["b"].label == "x"
    assert batch["a"][0] == batch["b"].image == batch["c"].image == 1


# -- Lightning -------------------------------------------------------------------------------------


def fit(loaders, callback, epochs=1):
    """Train; return what training_step got, in order."""
    L = pytest.importorskip("lightning")

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self.weight.square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    module = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, loaders)
    return module.seen


def callback(*args, **kwargs):
    pytest.importorskip("lightning")
    from tumorsynth.lightning import TumorSynthCallback

    return TumorSynthCallback(*args, **{"spacing": SPACING, "seed": 1, **SETTINGS, **kwargs})


def loader(samples, n=2, **kwargs):
    return torch.utils.data.DataLoader([samples] * n, batch_size=1, **kwargs)


def ready(batch):
    """A loader of one batch as it is."""
    return torch.utils.data.DataLoader([batch], batch_size=None)


def has_tumor(label):
    return bool((label == 20).any())


@pytest.mark.parametrize("default", [True, False], ids=["default", "path"])
@pytest.mark.parametrize("spacing", [None, SPACING])
def test_torchio_batches(scan, default, spacing):
    tio = pytest.importorskip("torchio")
    dataset = getattr(tio, "SubjectsDataset", list)([make_subject(scan)] * 2)
    loads = getattr(tio, "SubjectsLoader", torch.utils.data.DataLoader)
    batches = loads(dataset, batch_size=2)
    places = () if default else ("image.data", "label.data")
    made = callback(*places, spacing=spacing)
    (batch,) = fit(batches, made)
    label = find_entry(batch, "label").value
    assert [record["applied"] for record in made.report] == [True, True]
    assert all(has_tumor(one) for one in label) and not label[0].equal(label[1])
    images, labels = (torch.stack([one] * 2) for one in (scan.image, scan.label))
    flat = fit(ready({"image": images, "label": labels}), callback())
    assert flat[0]["label"].equal(label)  # the affine in the batch says the same as spacing
    if spacing is None:
        assert made.report[0]["centre_mm"] == pytest.approx(
            (scan.affine @ [*made.report[0]["centre_voxel"], 1])[:3].tolist()
        )


def sample(scan, kind):
    pairs = {"image": scan.image, "label": scan.label}
    return {"dict": pairs, "tuple": tuple(pairs.values()), "named": Pair(**pairs)}[kind]


@pytest.mark.parametrize("kind", ["dict", "tuple", "named"])
@pytest.mark.parametrize("outer", [dict, list])
def test_labelled_and_unlabelled_loaders(scan, kind, outer):
    labelled = sample(scan, kind)
    bare = {"image": scan.image} if kind == "dict" else (scan.image,)
    loaders = {"labeled": loader(labelled), "unlabeled": loader(bare)}
    made = callback()
    seen = fit(loaders if outer is dict else [*loaders.values()], made)
    first, other = ("labeled", "unlabeled") if outer is dict else (0, 1)
    for batch in seen:
        image, label = (value_at(batch[first], (key,)) for key in places(batch[first]))
        assert has_tumor(label) and not image[0].equal(scan.image)
        assert value_at(batch[other], places(batch[other])[:1])[0].equal(scan.image)
    assert {record["loader"] for record in made.report} == {str(first)}


def places(part):
    return ("image", "label") if isinstance(part, dict) or hasattr(part, "_fields") else (0, 1)


def test_every_labelled_loader_or_the_named_one(scan):
    loaders = {"a": loader(sample(scan, "dict")), "b": loader(sample(scan, "dict"))}
    made = callback()
    batch = fit(loaders, made)[0]
    assert has_tumor(batch["a"]["label"]) and has_tumor(batch["b"]["label"])
    assert not batch["a"]["label"].equal(batch["b"]["label"])  # seeds of their own
    for given in ({"loader": "b"}, {"image": "b.image", "label": "b.label"}):
        batch = fit(loaders, callback(**given))[0]
        assert not has_tumor(batch["a"]["label"]) and has_tumor(batch["b"]["label"])
    nested = {"x": [loaders["a"], loaders["b"]]}
    batch = fit(nested, callback(loader="x.1"))[0]
    assert not has_tumor(batch["x"][0]["label"]) and has_tumor(batch["x"][1]["label"])


@pytest.mark.parametrize("given", [{}, {"loader": "a"}, {"image": "a.image", "label": "a.label"}])
def test_a_loader_that_ends_first_gives_nothing_to_do(scan, given):
    combined = pytest.importorskip("lightning.pytorch.utilities").CombinedLoader
    loaders = {"a": loader(sample(scan, "dict"), 1), "b": loader({"image": scan.image}, 3)}
    seen = fit(combined(loaders, "max_size"), callback(**given))
    assert [batch["a"] is None for batch in seen] == [False, True, True]
    assert has_tumor(seen[0]["a"]["label"])


def test_dataclass_batches(scan):
    def collate(samples):
        return Record(*(torch.stack(parts) for parts in zip(*samples, strict=True)))

    seen = fit(loader(sample(scan, "tuple"), collate_fn=collate), callback())
    assert all(has_tumor(batch.label) for batch in seen)


@pytest.mark.parametrize(
    ("batch", "given", "words"),
    [
        (
            {"a": {"ct": 1, "seg": 1}},
            {},
            r"no 'image', it has \['a.ct', 'a.seg'\].* image=\.\.\. of",
        ),
        ({"a": {"image": 1, "seg": 1}}, {}, r"no 'label', it has \['a.image', 'a.seg'\].* label="),
        ({"a": {"image": 1, "label": 1}}, {"loader": "b"}, r"no 'b', it has .*loader=\.\.\. of"),
        ({"image": {"t1": 1, "t2": 1}, "label": 1}, {}, r"\['image.t1', 'image.t2', 'label'\]"),
        ({"a": {"image": 1, "label": 1}}, {"spacing": "mm"}, r"no 'mm', it has \['a.image'"),
    ],
)
def test_messages_name_what_is_there_and_what_to_pass(scan, batch, given, words):
    batch = filled(batch, scan.label[None])
    with pytest.raises(ValueError, match=words):
        fit(ready(batch), callback(**given))


def filled(batch, tensor):
    if isinstance(batch, dict):
        return {key: filled(part, tensor) for key, part in batch.items()}
    return tensor.float()


def test_a_tuple_of_tuples_is_refused(scan):
    module_batch = (scan.image[None], scan.label[None])
    made = callback()
    pytest.importorskip("lightning")
    with pytest.raises(TypeError, match="must be a dictionary or a list.*got tuple"):
        made.on_train_batch_start(Trainer(), None, module_batch, 0)


class Trainer:
    current_epoch = global_rank = 0


@pytest.mark.parametrize(
    "given",
    [
        {"image": [1]},
        {"label": {}},
        {"organ": ()},
        {"loader": True},
        {"spacing": (1, 2)},
        {"spacing": {"a": 1}},
        {"spacing": -1.0},
    ],
)
def test_places_and_spacings_that_cannot_be_are_refused_at_once(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        callback(**given)


# -- MONAI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BatchSynthesizeTumord", "PrepareBatchTumorSynth"])
@pytest.mark.parametrize("nesting", ["flat", "loaders", "torchio"])
def test_monai_takes_nested_batches(scan, name, nesting):
    monai = pytest.importorskip("tumorsynth.monai")
    image, label = scan.image[None], scan.label[None]
    batch = {
        "flat": {"image": image, "label": label},
        "loaders": {"labeled": {"image": image, "label": label}, "unlabeled": [image]},
        "torchio": {
            "image": {"data": image, "affine": scan.affine[None]},
            "label": {"data": label, "affine": scan.affine[None]},
        },
    }[nesting]
    keys = ("labeled.image", "labeled.label") if nesting == "loaders" else ("image", "label")
    spacing = None if nesting == "torchio" else SPACING
    made = getattr(monai, name)(*keys, spacing=spacing, **SETTINGS).set_random_state(0)
    out = made(batch)
    if isinstance(out, dict):
        assert out.keys() == batch.keys()
        out = tuple(find_entry(out, key).value for key in keys)
    assert has_tumor(out[1]) and not out[0].equal(image)
    assert not has_tumor(find_entry(batch, keys[1]).value)
    expected = monai.BatchSynthesizeTumord("image", spacing=SPACING, **SETTINGS)
    flat = expected.set_random_state(0)({"image": image, "label": label})
    assert out[1].equal(flat["label"])


def test_monai_names_nested_keys(scan):
    monai = pytest.importorskip("tumorsynth.monai")
    made = monai.BatchSynthesizeTumord("image", spacing=SPACING, **SETTINGS)
    with pytest.raises(
        KeyError, match=r"misses \['image', 'label'\].* has \['a.image', 'a.label'\]"
    ):
        made({"a": {"image": scan.image[None], "label": scan.label[None]}})
