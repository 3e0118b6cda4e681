"""The MONAI transforms in datasets, loaders, worker processes and engines."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from monai.data import (
    CacheDataset,
    CacheNTransDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    PersistentDataset,
    SmartCacheDataset,
    ThreadDataLoader,
    decollate_batch,
)
from monai.data.utils import list_data_collate
from monai.transforms import Compose, EnsureTyped, Identityd
from monai.utils import set_determinism
from monai_samples import LPS, SETTINGS, equal, same, sample, transform, tumor
from tiny import tiny_generator

from tumorsynth.monai import BatchSynthesizeTumord, PrepareBatchTumorSynth


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["by rule", "diffusion"])
def test_set_random_state_reproduces_and_the_global_generators_are_not_touched(generator):
    data = sample()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(5)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    settings = {"prob": 0.9, "count": (1, 2), "generator": generator}
    chain = Compose([transform(**settings), Identityd("image")])
    chain.set_random_state(7)
    first = [chain(data) for _ in range(3)]
    chain.set_random_state(7)
    again = [chain(data) for _ in range(3)]
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not equal(first[0], first[1])
    assert random.getstate() == states[0]
    assert same(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_set_determinism_reproduces():
    made = []
    for _ in range(2):
        set_determinism(3)
        made.append(Compose([transform()])(sample()))
    set_determinism(None)
    assert equal(*made) and not equal(made[0], Compose([transform()])(sample()))


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["by rule", "diffusion"])
def test_set_determinism_may_ask_for_deterministic_algorithms(generator):
    made = []
    try:
        for algorithms in (True, False):
            set_determinism(3, use_deterministic_algorithms=algorithms)
            made.append(Compose([transform(generator=generator)])(sample()))
            assert torch.are_deterministic_algorithms_enabled() is algorithms
    finally:
        torch.use_deterministic_algorithms(False)
        set_determinism(None)
    assert equal(*made) and (made[0]["label"] == 2).any()


def test_each_rank_of_a_distributed_training_makes_its_own_tumours(monkeypatch):
    """From one seed on all ranks; tests/training/test_distributed.py has real ones."""
    batch = list_data_collate([sample("tensor")] * 2)
    kinds = (transform, lambda: BatchSynthesizeTumord("image", **SETTINGS))
    for make, given in zip(kinds, (sample("tensor"), batch), strict=True):
        made = []
        for rank in ("0", "1", "1"):
            monkeypatch.setenv("RANK", rank)
            made.append(make().set_random_state(0)(given))
        assert not equal(made[0], made[1]) and equal(made[1], made[2])


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("loader", [DataLoader, torch.utils.data.DataLoader])
def test_workers_and_epochs_do_not_repeat_each_other(loader, persistent):
    chain = Compose([transform()]).set_random_state(0)
    data = Dataset([sample("tensor")] * 4, chain)

    def epochs():
        torch.manual_seed(0)
        made = loader(
            data,
            batch_size=1,
            num_workers=2,
            collate_fn=list_data_collate,
            persistent_workers=persistent,
        )
        return [batch["label"].clone() for _ in range(2) for batch in made]

    first = epochs()
    assert all((x == 2).any() for x in first)
    assert len({x.numpy().tobytes() for x in first}) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, epochs(), strict=True))


@pytest.mark.slow  # each imports torch and MONAI anew; test_concurrency.py has the core's
def test_spawned_workers_make_what_forked_ones_make():
    data = Dataset([sample("tensor")], transform().set_random_state(0))

    def labels(context):
        torch.manual_seed(0)
        made = torch.utils.data.DataLoader(
            data, batch_size=None, num_workers=1, multiprocessing_context=context
        )
        return [item["label"] for item in made]

    spawned = labels("spawn")
    assert all((label == 2).any() for label in spawned)
    assert all(torch.equal(a, b) for a, b in zip(spawned, labels("fork"), strict=True))


def test_threads_of_one_loader_do_not_repeat_each_other():
    data = Dataset([sample("tensor")] * 6, Compose([transform()]).set_random_state(0))
    loader = ThreadDataLoader(data, batch_size=1, num_workers=2, use_thread_workers=True)
    labels = [batch["label"] for batch in loader]
    assert all((label == 2).any() for label in labels)
    assert len({label.numpy().tobytes() for label in labels}) == 6


def test_threads_that_draw_at_the_same_time_keep_their_own_draws(monkeypatch):
    synthesis, both = transform().set_random_state(0), threading.Barrier(2)
    draw_seed = synthesis._draw_seed

    def at_once():
        drawn = draw_seed()
        both.wait(60)
        return drawn

    monkeypatch.setattr(synthesis, "_draw_seed", at_once)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(synthesis, [sample("tensor")] * 2)
    assert tumor(one).any() and tumor(two).any() and not equal(one, two)


class SeededByIndex(torch.utils.data.Dataset):
    def __init__(self, data, synthesis):
        self.data, self.synthesis = data, synthesis

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.synthesis.set_random_state(index)(self.data)["label"]


def test_a_worker_keeps_a_state_that_is_set_inside_it():
    data = SeededByIndex(sample("tensor"), transform())
    own = list(torch.utils.data.DataLoader(data, batch_size=None))
    workers = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(own, workers, strict=True))


def test_cached_datasets_get_new_tumours_each_time(tmp_path):
    # plain tensors: MONAI 1.4 cannot read the MetaTensors it stored with torch 2.6 and later
    typed = EnsureTyped(["image", "label"], track_meta=False)
    chain = Compose([typed, transform()]).set_random_state(0)
    items = [sample("tensor")]
    cached = CacheDataset(items, chain, progress=False)
    stored = PersistentDataset(items, chain, cache_dir=tmp_path / "all")
    first_only = CacheNTransDataset(items, chain, cache_n_trans=1, cache_dir=tmp_path / "first")
    smart = SmartCacheDataset(items * 2, chain, replace_rate=0.5, cache_num=1, progress=False)
    for dataset in (cached, stored, first_only, smart):
        one, two = dataset[0], dataset[0]
        assert tumor(one).any() and tumor(two).any() and not equal(one, two)
    smart.start()
    smart.update_cache()  # replaces the first scan
    smart.shutdown()
    assert tumor(smart[0]).any()
    for dataset in (cached, smart):
        assert not tumor(dataset._cache[0]).any()
    size = sample("tensor")["image"].nbytes + sample("tensor")["label"].nbytes
    for file in tmp_path.glob("*/*.pt"):  # the cache holds the scan without the generator
        assert file.stat().st_size < size + 20_000
    batch = next(iter(ThreadDataLoader(cached, batch_size=1)))
    assert tumor(batch).any()


@pytest.mark.parametrize("kind", [PersistentDataset, CacheNTransDataset])
def test_a_cache_that_drops_the_affine_gives_a_warning_whose_fix_works(tmp_path, kind):
    """In scans of 2 mm taken as 1 mm, tumours of 8 mm would measure 16 mm."""
    if version("monai").startswith("1.4."):
        pytest.skip("MONAI 1.4 cannot read the MetaTensors it stored with torch 2.6 and later")
    keeps = {"track_meta": True, "weights_only": False}
    items = [sample("meta", np.diag([2.0, 2.0, 2.0, 1.0]))]

    def tumors(name, options, settings):
        own = transform(size_mm=8, **settings)
        chain = Compose([EnsureTyped(["image", "label"]), own]).set_random_state(0)
        more = {} if kind is PersistentDataset else {"cache_n_trans": 1}
        dataset = kind(items, chain, cache_dir=tmp_path / name, **more)
        for option, value in options.items():  # CacheNTransDataset has no arguments for them
            setattr(dataset, option, value)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            volumes = [int(tumor(dataset[0]).sum()) for _ in range(3)]
        return max(volumes), [str(one.message) for one in said if "1 mm" in str(one.message)]

    wrong, said = tumors("drops", {}, {})
    assert len(said) == 1 and "'image' and 'label' have no affine" in said[0]
    assert all(part in said[0] for part in ("spacing=", "track_meta=True", "weights_only=False"))
    fixes = [("told", {}, {"spacing": (2, 2, 2)})]
    if keeps.keys() <= inspect.signature(PersistentDataset).parameters.keys():  # MONAI 1.6
        fixes.append(("keeps", keeps, {}))
    for fix in fixes:
        right, said = tumors(*fix)
        assert not said and 0 < 4 * right < wrong


def test_only_one_of_several_workers_warns_about_the_spacing():
    for workers in (0, 2):
        dataset = WarningsCounted([sample("tensor")] * 4, Compose([transform()]))
        counted = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
        assert sum(counted) == 1


class WarningsCounted(Dataset):
    def __getitem__(self, index):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            super().__getitem__(index)
        return sum("taken as 1 mm" in str(one.message) for one in said)


@pytest.mark.parametrize("options", [{"copy_cache": False}, {"runtime_cache": "threads"}])
def test_a_cache_without_copies_stays_unchanged(options):
    chain = Compose([EnsureTyped(["image", "label"], track_meta=False), transform()])
    dataset = CacheDataset([sample("tensor")], chain, progress=False, **options)
    one, two = dataset[0], dataset[0]
    assert tumor(one).any() and tumor(two).any() and not equal(one, two)
    assert not tumor(dataset._cache[0]).any()


def test_a_pickled_dataset_holds_the_scan_without_the_generator():
    chain = Compose([EnsureTyped(["image", "label"], track_meta=False)])
    synthesis = transform(generator="liver-early")
    synthesis.adapter.synth.handle.get("cpu")  # loaded before the workers start
    chain.transforms = (*chain.transforms, synthesis)
    dataset = CacheDataset([sample("tensor")], chain, progress=False)
    size = sum(sample("tensor")[key].nbytes for key in ("image", "label"))
    assert len(pickle.dumps(dataset)) < 2 * size + 20_000  # the scan, and the scan in the cache


def test_a_cached_metatensor_gets_new_tumours_each_time():
    chain = Compose([EnsureTyped(["image", "label"]), transform()]).set_random_state(0)
    dataset = CacheDataset([sample("meta", LPS)], chain, progress=False)
    one, two = dataset[0], dataset[0]
    assert tumor(one).any() and tumor(two).any() and not equal(one, two)
    assert not tumor(dataset._cache[0]).any() and type(one["label"]) is MetaTensor


def test_a_pickle_is_small_and_continues_the_same_draws():
    synthesis = transform().set_random_state(0)
    data = sample()
    synthesis(data)
    raw = pickle.dumps(synthesis)
    assert len(raw) < 20_000
    assert equal(pickle.loads(raw)(data), copy.deepcopy(synthesis)(data))
    assert equal(pickle.loads(raw)(data), synthesis(data))


def test_copies_of_a_transform_share_the_weights_of_a_name():
    synthesis = transform(generator="liver-early")
    raw = pickle.dumps(synthesis)
    assert len(raw) < 20_000
    copies = [synthesis, pickle.loads(raw), copy.deepcopy(synthesis)]
    assert len({id(c.adapter.synth.handle.get("cpu")) for c in copies}) == 1


@pytest.mark.parametrize("answers", [[True, False, True], torch.tensor([1, 0, 1])])
def test_a_predicate_and_healthy_only_on_a_batch(answers):
    batch = next(iter(DataLoader(Dataset([sample("meta") for _ in range(3)]), batch_size=3)))
    batch["label"][2, :, 20:24, 20:24, 20:24] = 2
    given = copy.deepcopy(batch)
    settings = {**SETTINGS, "healthy_only": True}
    synthesis = BatchSynthesizeTumord("image", when=lambda data: data["healthy"], **settings)
    out = synthesis.set_random_state(0)({**batch, "healthy": answers})
    assert equal(batch, given) and type(out["label"]) is MetaTensor
    changed = [not torch.equal(a, b) for a, b in zip(out["image"], given["image"], strict=True)]
    assert changed == [True, False, False]
    assert torch.equal(out["label"][1:], given["label"][1:])
    reasons = [record.get("reason", "") for record in synthesis.report]
    has_tumor = "left alone (holds a tumour already: 64 voxels of 2 = tumor_label)"
    assert reasons == ["", "left alone (as asked)", has_tumor]
    # the changed sample equals that of a batch in which all change
    plain = BatchSynthesizeTumord("image", **SETTINGS).set_random_state(0)(batch)
    assert torch.equal(plain["image"][0], out["image"][0])

    nobody = BatchSynthesizeTumord("image", when=lambda data: False, **SETTINGS)(batch)
    assert nobody["image"] is batch["image"]
    with pytest.raises(ValueError, match="one answer for each of the 3 samples"):
        BatchSynthesizeTumord("image", when=lambda data: [True] * 2, **SETTINGS)(batch)


def test_a_monai_engine_trains_on_tumours():
    pytest.importorskip("ignite", reason="MONAI's engines need pytorch-ignite")
    from monai.engines import SupervisedEvaluator, SupervisedTrainer

    loader = DataLoader(Dataset([sample("meta", seed=s) for s in range(4)]), batch_size=2)
    network = torch.nn.Conv3d(1, 3, 1)
    prepare = PrepareBatchTumorSynth("image", "label", prob=1.0, **SETTINGS).set_random_state(0)
    seen = []

    def loss(out, label):
        seen.append(label)
        return torch.nn.functional.cross_entropy(out, label[:, 0].long())

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.001),
        loss_function=loss,
        prepare_batch=prepare,
    )
    before = network.weight.detach().clone()
    trainer.run()
    assert len(seen) == 2 and all((part == 2).any() for label in seen for part in label)
    assert not torch.equal(before, network.weight)
    assert [record["sample"] for record in prepare.report] == [0, 1]

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=network
    )
    evaluator.run()
    assert not (evaluator.state.output[0]["label"] == 2).any()


def test_prepare_batch_calls_another_one():
    from monai.engines.utils import PrepareBatchExtraInput

    batch = list_data_collate([{**sample("tensor"), "age": torch.tensor(40.0)}])
    prepare = PrepareBatchTumorSynth(prepare_batch=PrepareBatchExtraInput("age"), **SETTINGS)
    _image, label, extra, _ = prepare.set_random_state(0)(batch, "cpu")
    assert (label == 2).any() and extra[0].tolist() == [40]
    assert not (batch["label"] == 2).any()


def test_cuda_in_a_forked_worker_gives_the_fix(monkeypatch):
    # torch's own flag of a forked process, which makes torch raise its error
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="forked worker process; synthesise on the batch"):
        transform(device="cuda")(sample("tensor"))
    with pytest.raises(RuntimeError, match="forked worker process; synthesise on the batch"):
        _in_a_worker(Dataset([sample("tensor")], Compose([transform(device="cuda")])))


def _in_a_worker(items):
    return next(iter(torch.utils.data.DataLoader(items, batch_size=None, num_workers=1)))


@pytest.mark.gpu
def test_cuda_in_a_real_forked_worker():
    torch.zeros(1, device="cuda")
    data = Dataset([sample("tensor")], transform(device="cuda"))
    with pytest.raises(RuntimeError, match="forked worker process; synthesise on the batch"):
        _in_a_worker(data)
    batch = next(iter(ThreadDataLoader(data, batch_size=1)))
    assert tumor(batch).any()


def test_a_batch_of_scans_with_geometries_of_their_own():
    thick = np.diag([2.0, -2.0, 2.0, 1.0])
    items = [sample("meta", affine=a, shape=(48, 48, 48)) for a in (None, thick)]
    batch = list_data_collate(items)
    synthesis = BatchSynthesizeTumord("image", **{**SETTINGS, "size_mm": 16}).set_random_state(0)
    out = synthesis(batch)
    voxels = [float((label == 2).sum()) for label in out["label"]]
    assert voxels == pytest.approx([np.pi / 6 * 16**3, np.pi / 6 * 8**3], rel=0.1)
    for record, affine in zip(synthesis.report, (np.eye(4), thick), strict=True):
        centre = affine @ [*record["centre_voxel"], 1]
        np.testing.assert_allclose(record["centre_mm"], centre[:3])


def test_batch():
    items = [sample("meta", LPS, shape=(40, 40, 24), seed=s) for s in range(3)]
    batch = next(iter(DataLoader(Dataset(items), batch_size=3)))
    before = copy.deepcopy(batch)
    synthesis = BatchSynthesizeTumord("image", label_key="label", **SETTINGS).set_random_state(0)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    out = synthesis(batch)
    assert random.getstate() == states[0] and same(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert equal(batch, before)
    assert type(out["image"]) is MetaTensor and out["image"].is_batch
    parts = decollate_batch(out)
    assert all(tumor(part).any() for part in parts)
    assert all(np.allclose(part["image"].affine, LPS) for part in parts)
    assert {r["sample"] for r in synthesis.report} == {0, 1, 2}
    assert equal(out, synthesis.set_random_state(0)(batch))

    plain = {key: np.concatenate([np.asarray(out[key])] * 4) for key in ("image", "label")}
    half = BatchSynthesizeTumord("image", prob=0.5, tumor_label=3, **SETTINGS)
    made = tumor(half.set_random_state(1)(plain), 3).any((1, 2, 3, 4))
    assert made.any() and not made.all()
    none = BatchSynthesizeTumord("image", prob=0, **SETTINGS)(batch)
    assert none["image"] is batch["image"]
