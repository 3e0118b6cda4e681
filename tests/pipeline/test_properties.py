"""Random calls give a valid result, or a ValueError or TypeError of tumorsynth, in bounded time.

The suite tries a few hundred calls. ``TUMORSYNTH_EXAMPLES=5000 pytest PATH_OF_THIS_FILE``
tries as many per test, from new seeds every time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import time
import traceback
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from callers import is_ours
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.appearance.blend import feather_reach
from tumorsynth.pipeline.frames import find_frames
from tumorsynth.subvoxels import subvoxel_factors

LONG = int(os.environ.get("TUMORSYNTH_EXAMPLES", "0"))
MANY = 100 if LONG else 6
SECONDS = 20  # of CPU time for one call; the median is a few milliseconds
TINY = tiny_generator()
NAN, INF = math.nan, math.inf
ENDLESS = "an iterator"  # stands in for one, which a single call would consume
COUNTS: Counter[str] = Counter()  # of outcomes


@pytest.fixture(scope="module", autouse=True)
def figures():
    yield
    print("\nproperties:", dict(sorted(COUNTS.items())))


def tries(quick: int):
    """How many examples a test tries; the quick ones are the same every time."""
    return settings(
        max_examples=LONG or quick,
        deadline=None,  # CPU time is asserted below: a clock has others' load in it
        derandomize=not LONG,
        phases=[Phase.generate] if LONG else list(Phase),  # not hours to make an example smaller
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def sound_or_refused(make, image, label, organs, tumor_label):
    """Call ``make`` for (image, label, report) and check the outcome; return whether it worked."""
    kept = [(x, x.clone()) if isinstance(x, torch.Tensor) else (x, None) for x in (image, label)]
    start = time.thread_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            new_image, new_label, report = make()
        # the last for a generator's name: documented, and what users of files expect
        except (ValueError, TypeError, FileNotFoundError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert is_ours(last.filename), f"not our own words: {error!r} {last}"
            assert str(error)[0].islower() or str(error).startswith(("Scaled", "ZScore"))
            assert any(word in str(error) for word in ("must", "needs", "does not fit", "outside"))
            new_image = None
            COUNTS["refused"] += 1
    spent = time.thread_time() - start
    assert spent < SECONDS, f"{spent:.1f} s"
    words = [str(w.message)[:24] for w in warned]
    assert len(set(words)) == len(words), words  # each once
    for given_, before in kept:
        assert before is None or same(given_, before), "an input was changed"
    if new_image is None:
        return False
    assert (new_image.shape, new_image.dtype) == (image.shape, image.dtype)
    assert (new_label.shape, new_label.dtype) == (label.shape, label.dtype)
    assert new_image.device == image.device
    if image.is_floating_point():
        assert torch.equal(image.isfinite(), new_image.isfinite())
    relabelled = differs(label, new_label)
    if bool(relabelled.any()):
        old, new = label.to(torch.float64), new_label.to(torch.float64)
        assert (new[relabelled] == float(tumor_label)).all()
        assert sum((old == float(v)) for v in organs).bool()[relabelled].all()
    made = sum(r["applied"] for r in report)
    COUNTS["sound, with tumours" if made else "sound, without"] += 1
    COUNTS["slowest, CPU ms"] = max(COUNTS["slowest, CPU ms"], round(1000 * spent))
    assert all(r["reason"] for r in report if not r["applied"])
    assert bool(relabelled.any()) == bool(made)
    if not made:
        assert same(image, new_image)
    json.dumps(report)
    return True


def differs(a, b):
    return (a != b) & ~((a != a) & (b != b))


def same(a, b):
    if a.layout != torch.strided or a.device.type == "meta":
        return True
    # a clone: one voxel is contiguous whatever its strides
    a, b = (x.detach().flatten().clone().as_strided((x.numel(),), (1,)) for x in (a, b))
    a, b = (x.view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


# -- what is given -------------------------------------------------------------------------------

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
ODD_DTYPES = [torch.bool, torch.complex64, torch.float8_e5m2, *INTS]
TISSUES = [*[110.0] * 8, 60.0, -100.0, -1000.0, 0.0, 3000.0, 0.5, 65000.0, 1e30]
# of an image that somebody takes for HU: HU / 10, z-scores, [0, 1], + 1024, another sign
ODD_SCALES = [*[(1, 0)] * 12, (0.1, 0), (1 / 150, -0.3), (1 / 425, 175 / 425), (1, 1024), (-1, 0)]
ODD_NUMBERS = [NAN, INF, -INF, 0, -1, 1e-300, 1e300, 10**400, "1", None, 1j, True, (), [1], {}]
numbers = st.one_of(st.floats(), st.integers(), st.sampled_from(ODD_NUMBERS))


@st.composite
def volumes(draw, odd):
    """Image and label; ``odd`` names what is unusual or wrong about them."""
    sides = st.integers(1, 18) if draw(st.integers(0, 2)) == 1 else st.integers(12, 20)
    shape = draw(st.tuples(*[sides] * 3))
    batch = draw(st.sampled_from([None, None, 1, 2, 3]))
    full = ((1,) if batch is None else (batch, 1)) + shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hu = draw(st.sampled_from(TISSUES)) + draw(st.sampled_from([0, 12, 300])) * rng.normal(
        size=full
    )
    scale, offset = draw(st.sampled_from(ODD_SCALES))
    hu = scale * hu + offset
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 3e4]), max_size=1)):
        hu[rng.random(full) < draw(st.sampled_from([0.001, 0.1, 1.0]))] = value
    kind = draw(
        st.sampled_from(["ball", "ball", "full", "full", "slab", "corner", "noise", "none"])
    )
    grids = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    around = [2 * g / max(n - 1, 1) - 1 for g, n in zip(grids, shape, strict=True)]
    where = {
        "ball": sum(g**2 for g in around) < 0.9,
        "full": np.ones(shape, bool),
        "slab": grids[int(rng.integers(3))] < 3,
        "corner": np.all([g < 5 for g in grids], axis=0),
        "noise": rng.random(shape) < 0.5,
        "none": np.zeros(shape, bool),
    }[kind]
    values = np.broadcast_to(
        where * draw(st.sampled_from([1.0, 1.0, 1.0, 1.0, 1.0, 3, 1.5, -1, NAN])), full
    )
    values = np.where(rng.random(full) < draw(st.sampled_from([0, 0, 0.02])), 2, values)
    image_dtype = draw(st.sampled_from(ODD_DTYPES if odd == "image dtype" else FLOATS))
    label_dtype = draw(st.sampled_from(ODD_DTYPES if odd == "label dtype" else INTS + FLOATS))
    with np.errstate(all="ignore"):
        image = torch.from_numpy(hu).to(image_dtype)
        label = torch.from_numpy(np.nan_to_num(values, nan=7)).to(label_dtype)
        if values.dtype == float and label_dtype in FLOATS:
            label = torch.from_numpy(values).to(label_dtype)
    image, label = draw(layouts(image)), draw(layouts(label))
    if odd == "label":  # one-hot, another grid, another number of axes
        label = draw(
            st.sampled_from(
                [label.repeat_interleave(3, -4), label[..., :-1], label[None], label[0]]
            )
        )
    if odd == "image":
        image = draw(st.sampled_from([image[..., :0], image[0], image.numpy, None]))
    return image, label


@st.composite
def layouts(draw, x):
    """The same values in another memory layout."""
    kind = draw(st.sampled_from(["", "", "", "permuted", "strided", "offset", "expanded", "grad"]))
    if kind == "permuted":
        order = draw(st.permutations(range(x.ndim)))
        return x.permute(order).contiguous().permute([order.index(k) for k in range(x.ndim)])
    if kind == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if kind == "offset":
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)
    if kind == "expanded":
        return x[..., :1].expand(x.shape)
    if kind == "grad" and x.is_floating_point() and x.dtype in FLOATS:
        return x.clone().requires_grad_()
    return x


lengths = st.one_of(st.floats(0.3, 6), st.floats(0.01, 100), st.sampled_from([1, 1.0, 0.01, 100]))
thick = st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.floats(3, 12))  # slices
spacings = st.one_of(
    st.none(),
    *[st.tuples(*[st.floats(0.3, 6)] * 3)] * 3,
    thick,
    thick.flatmap(st.permutations).map(tuple),
    st.tuples(*[lengths] * 3),
    st.tuples(*[lengths] * 3).map(np.array),
    st.tuples(*[lengths] * 3).map(torch.tensor),
)
odd_spacings = st.one_of(numbers, st.tuples(*[numbers] * 3))


@st.composite
def affines(draw, odd):
    """Oblique, flipped and sheared affines, thick slices, and sometimes a degenerate one."""
    angles = draw(st.tuples(*[st.floats(-4, 4)] * 3))
    matrix = np.eye(4)
    for axis, angle in enumerate(angles):
        turn = np.eye(4)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    sides = st.floats(0.3, 6) if draw(st.integers(0, 4)) else lengths
    scale = draw(st.tuples(*[st.one_of(sides, sides.map(lambda v: -v))] * 3))
    if draw(st.integers(0, 3)) == 0:
        scale = draw(thick)
    matrix = matrix @ np.diag([*scale, 1.0])
    if draw(st.booleans()):  # a tilted gantry, up to 35 degrees
        a, b = draw(st.sampled_from([(1, 2), (0, 2), (0, 1), (2, 0)]))
        matrix[:3, b] += draw(st.floats(-0.7, 0.7)) * matrix[:3, a] * abs(scale[b] / scale[a])
    matrix[:3, 3] = draw(st.tuples(*[st.floats(-1e4, 1e4)] * 3))
    if odd:
        row, column = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        matrix[row, column] = draw(st.sampled_from([NAN, INF, 0.0, 1e300, 1e-300, 5.0]))
    forms = [matrix, matrix.tolist(), torch.from_numpy(matrix)]
    return draw(st.sampled_from([*forms, matrix[:3]] if odd else forms))


seeds = st.integers(0, 2**63 - 4)
odd_seeds = st.one_of(
    st.integers(),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([np.int64(3), torch.tensor(4), np.array([1, 2]), 0.5, "0", NAN, 10**400, {}]),
    st.just(ENDLESS),
)
pair = st.tuples(st.floats(0.3, 30), st.floats(0.3, 30)).map(sorted).map(tuple)
scales = st.sampled_from(
    [ts.HU(), ts.HU(), ts.HU(), ts.Scaled(-175, 250, 0, 1), ts.ZScore(40.0, 150.0, -200, 300)]
)
odd_scales = st.builds(
    lambda kind, args: functools.partial(kind, *args),
    st.sampled_from([ts.Scaled, ts.ZScore]),
    st.tuples(*[st.one_of(numbers, st.sampled_from([1e-12, 1e8, -200, 250, 1]))] * 4),
)


@st.composite
def transforms(draw, odd, generator=None):
    """Settings of SynthesizeTumor, one of them odd."""
    # sometimes what is costly: the largest counts, sizes and numbers of tries
    costly = not LONG or draw(st.integers(0, 19)) == 0
    many = MANY if costly else 4
    wide = ["liver", "kidney", 200.0, 0.1, (1, 200)] if costly else ["liver", 0.1]
    given = {
        "generator": generator or draw(st.sampled_from(["hu2023", "hu2023", TINY])),
        "organ_labels": draw(st.sampled_from([1, 1, 1, (1, 3), np.array([1]), (1, 2**40), 257])),
        "tumor_label": 2,
        "p": draw(st.sampled_from([*[1.0] * 6, 0.5, 0])),
        "count": draw(st.sampled_from([1, 2, (0, 3), (1, 2), None, many])),
        "size_mm": draw(
            st.one_of(
                *[st.sampled_from([(2, 5), (1.5, 8), 4.0])] * 3,
                *[pair] * costly,
                st.sampled_from(wide),
            )
        ),
        "intensity": draw(odd_scales if odd == "intensity" else scales),
        "blend": draw(st.sampled_from(["change", "change", "difftumor"])),
        "contrast_hu": draw(st.sampled_from([None, None, -40.0, (-1500, 1500)])),
        "sigma_mm": draw(st.sampled_from([None, None, 0, (0, 20)])),
        "gap_mm": draw(st.sampled_from([2.0, 0, 100])),
        "merge": draw(st.booleans()),
        "gate": draw(
            st.sampled_from([None, None, True, ts.Gate(tries=many, visibility=(1e9, 2e9))])
        ),
    }
    if given["count"] == MANY and isinstance(given["gate"], ts.Gate):  # 100 x 100 tries take long
        given["gate"] = True
    if odd == "setting":
        given[draw(st.sampled_from(sorted(given)))] = draw(numbers)
    return given


def built(given):
    if isinstance(given["intensity"], functools.partial):
        given = {**given, "intensity": given["intensity"]()}
    return ts.SynthesizeTumor(**given)


ODD = ["image", "label", "image dtype", "label dtype", "spacing", "affine", "seed", "intensity",
       "setting"]  # fmt: skip


@st.composite
def cases(draw, generator=None):
    """A volume, settings and a call, at most one thing of which is odd."""
    odd = draw(st.sampled_from([*[""] * 20, *ODD]))
    call = {"seed": draw(odd_seeds if odd == "seed" else seeds)}
    if odd == "affine" or (odd != "spacing" and draw(st.booleans())):
        call["affine"] = draw(affines(odd == "affine"))
    else:
        call["spacing"] = draw(odd_spacings if odd == "spacing" else spacings)
    return draw(volumes(odd)), draw(transforms(odd, generator)), call


def unwrapped(call):
    return {**call, "seed": itertools.count()} if call["seed"] is ENDLESS else call


# -- the core --------------------------------------------------------------------------------------


@tries(40)
@given(cases())
def test_any_call(case):
    (image, label), given_, call = case
    transform = None

    def make():
        nonlocal transform
        transform = built(given_)
        out = transform(image, label, **unwrapped(call))
        return *out, transform.report

    if not sound_or_refused(make, image, label, organs_of(given_), 2):
        return
    new_image, new_label = transform(
        image, label, **{**call, "seed": None}, params=transform.params
    )
    first = make()
    assert same(new_image, first[0]) and same(new_label, first[1])  # replays, and repeats
    json.loads(json.dumps(transform.params))
    where = {name: call.get(name) for name in ("spacing", "affine")}
    batch = len(image) if image.ndim == 5 else 1
    frames, _ = find_frames(image.shape[-3:], batch, [], **where)
    untouched_beyond_the_feather(transform, frames, image, new_image, label, new_label)


@tries(4)
@given(cases("hu2023"))
def test_any_compiled_call(case):
    (image, label), given_, call = case

    def make(compiled=True):
        transform = built(given_)

        def step(image, label):
            return transform(image, label, **unwrapped(call))

        out = torch.compile(step, backend="eager")(image, label) if compiled else step(image, label)
        return *out, transform.report

    try:
        if not sound_or_refused(make, image, label, organs_of(given_), 2):
            return
        compiled, plain = make(), make(compiled=False)
        assert all(same(x, y) for x, y in zip(compiled[:2], plain[:2], strict=True))
    finally:
        torch.compiler.reset()


def organs_of(given_):
    try:
        return [int(v) for v in np.atleast_1d(np.asarray(given_["organ_labels"], dtype=object))]
    except (TypeError, ValueError, OverflowError):
        return []


def untouched_beyond_the_feather(transform, frames, image, new_image, label, new_label):
    for b, frame in enumerate(frames):
        one = [x[b, 0] if x.ndim == 5 else x[0] for x in (image, new_image, label, new_label)]
        relabelled = differs(one[2], one[3])
        sigmas = [r["sigma_mm"] for r in transform.report if r["applied"] and r["sample"] == b]
        changed = differs(one[0], one[1])
        if not sigmas:
            assert not bool(changed.any())
            continue
        m = feather_reach(max(sigmas), frame.plane_distance, transform.settings.blend)
        sizes = [r["true_diameter_mm"] for r in transform.report if r["applied"]]
        if max(subvoxel_factors(frame.spacing, min(sizes))) > 1:
            # of coarse voxels a tumour may fill less than half as far as it reaches, unlabelled
            rim = [math.ceil(max(sizes) / 2 / s) for s in frame.plane_distance]
            m = [n + k for n, k in zip(m, rim, strict=True)]
        box = [
            slice(max(0, int(i.min()) - k), int(i.max()) + k + 1)
            for i, k in zip(relabelled.nonzero().T, m, strict=True)
        ]
        changed[tuple(box)] = False
        assert not bool(changed.any())


# -- changed params --------------------------------------------------------------------------------


def scan(n=16):
    g = torch.meshgrid(*[torch.linspace(-1, 1, n)] * 3, indexing="ij")
    organ = (g[0] ** 2 + g[1] ** 2 + g[2] ** 2) < 0.9
    noise = torch.randn(organ.shape, generator=torch.Generator().manual_seed(0))
    return (torch.where(organ, 110.0, -100.0) + 12 * noise)[None], organ.to(torch.uint8)[None]


IMAGE, LABEL = scan()
REPLAYED = ts.SynthesizeTumor("hu2023", size_mm=(3, 7), count=2, gate=True)
REPLAYED(IMAGE, LABEL, seed=3)
GOOD = REPLAYED.params
json_values = st.recursive(
    st.one_of(numbers, st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@tries(60)
@given(st.data())
def test_params_tampered_with(data):
    params = copy.deepcopy(GOOD)
    record = params[0]
    for _ in range(data.draw(st.integers(1, 3))):
        tumors = record["tumors"]
        place = record
        if isinstance(tumors, list) and tumors and data.draw(st.integers(0, 3)):
            place = data.draw(st.sampled_from(tumors))
        if not isinstance(place, dict) or not place:
            continue
        key = data.draw(st.sampled_from([*sorted(place), "rejected", "more"]))
        what = data.draw(st.sampled_from(["value", "value", "number", "element", "gone"]))
        held = place.get(key)
        if what == "gone":
            place.pop(key, None)
        elif what == "element" and isinstance(held, list | tuple) and held:
            held = list(held)
            held[data.draw(st.integers(0, len(held) - 1))] = data.draw(numbers)
            place[key] = held
        elif what == "number" and isinstance(held, int | float):
            place[key] = held * data.draw(st.sampled_from([-1, 0, 0.5, 100, 1e12, NAN]))
        else:
            place[key] = data.draw(json_values)
        if "tumors" not in record:
            break

    def make():
        out = REPLAYED(IMAGE, LABEL, params=params)
        return *out, REPLAYED.report

    sound_or_refused(make, IMAGE, LABEL, [1], 2)


@pytest.mark.parametrize("name", ["bulge", "displaced", "structure_hu", "seed"])
def test_params_without_a_number_are_refused(name):
    params = copy.deepcopy(GOOD)
    params[0]["tumors"][0][name] = None
    with pytest.raises(ValueError, match=f"a tumour's {name} must be .*got None"):
        REPLAYED(IMAGE, LABEL, params=params)


# -- the adapters ----------------------------------------------------------------------------------


@tries(25)
@given(cases("hu2023"), st.booleans(), st.booleans())
def test_any_call_of_the_adapters(case, separate, healthy_only):
    (image, label), given_, call = case

    def make():
        if isinstance(given_["intensity"], functools.partial):
            given_["intensity"] = given_["intensity"]()
        settings_ = {k: v for k, v in given_.items() if k != "p"}
        adapter = Adapter(separate, healthy_only, **settings_)
        out = adapter(image, label, label if separate else None, **unwrapped(call))
        return *out, adapter.report

    # with a separate organ map, a tumour replaces any label value
    organs = organs_of(given_)
    if separate and isinstance(label, torch.Tensor) and not label.is_complex():
        organs = sorted(set(label.to(torch.float64).reshape(-1).tolist()))
    sound_or_refused(make, image, label, organs, 2)


@tries(15)
@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.sampled_from(["f2", "f4", "f8", ">f4", "i1", "u1", "i2", ">i2", "u2", "i4", "i8"]),
    st.sampled_from(["u1", "i2", ">i4", "f4", "f8", "u4", "?"]),
    st.sampled_from(["", "flipped", "transposed", "strided", "read-only", "broadcast"]),
    st.integers(0, 2**32 - 1),
)
def test_numpy_arrays_of_any_kind_in_monai(shape, image_dtype, label_dtype, layout, seed):
    monai = pytest.importorskip("tumorsynth.monai")
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 10, (1, *shape)).clip(0, 120).astype(image_dtype)
    label = np.ones((1, *shape), label_dtype)
    arrays = [image, label]
    for k, x in enumerate(arrays):
        arrays[k] = {
            "": lambda x=x: x,
            "flipped": lambda x=x: x[:, ::-1, :, ::-1],
            "transposed": lambda x=x: np.ascontiguousarray(x.T).T,
            "strided": lambda x=x: np.repeat(x, 2, -1)[..., ::2],
            "read-only": lambda x=x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
            "broadcast": lambda x=x: np.broadcast_to(x[..., :1], x.shape),
        }[layout]()
    before = [x.tobytes() for x in arrays]
    transform = monai.RandSynthesizeTumor(generator="hu2023", size_mm=(2, 6), count=(1, 2))
    transform.set_random_state(seed)
    try:
        new = transform(*arrays)
    except (ValueError, TypeError) as error:
        assert label_dtype == "?" and "does not fit" in str(error)
        COUNTS["refused"] += 1
        return
    assert [x.tobytes() for x in arrays] == before
    for x, y in zip(arrays, new, strict=True):
        assert (type(x), x.dtype, x.shape) == (type(y), y.dtype, y.shape)
    changed = new[1] != arrays[1]
    assert (new[1][changed] == 2).all() and np.isfinite(new[0]).all()
    COUNTS["sound, with tumours" if changed.any() else "sound, without"] += 1
