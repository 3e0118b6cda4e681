"""Params repeat their tumours on the grid that they were drawn on, and are refused on any other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.pipeline.validation import check_params

SETTINGS = {"generator": "hu2023", "count": 2, "size_mm": (6, 9)}
SHAPE = (44, 40, 36)
SPACING = (1.0, 1.2, 1.5)
AFFINE = np.diag([-1.0, -1.2, 1.5, 1.0])  # LPS
AFFINE[:3, 3] = (120, 90, -300)


def scan(shape=SHAPE, seed=0):
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = (sum(a**2 for a in axes) < 0.8)[None].to(torch.int16)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    return torch.where(label > 0, 100.0, -50.0) + 8 * noise, label


def changed(**entries):
    """The affine with some entries changed: {(row, column): value}."""
    affine = AFFINE.copy()
    for name, value in entries.items():
        affine[int(name[1]), int(name[2])] = value
    return affine


def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = AFFINE.copy()
    affine[:3, :3] = rotation @ affine[:3, :3]
    return affine


OTHER_AFFINES = {  # what the message names
    "size": (changed(m00=-2.0), r"voxels of 1 x 1.2 x 1.5 mm, got one of 2 x 1.2 x 1.5 mm"),
    "slices": (changed(m22=3.0), r"voxels of 1 x 1.2 x 1.5 mm, got one of 1 x 1.2 x 3 mm"),
    "metres": (AFFINE @ np.diag([0.1, 0.1, 0.1, 1]), r"got one of 0.1 x 0.12 x 0.15 mm"),
    "flip": (changed(m00=1.0), "with axes LPS, got one with axes RPS"),
    "another patch": (changed(m03=60.0), r"starting at .*60, 90, -300\) mm, up to 60 voxels away"),
    "a voxel on": (changed(m23=-298.5), r"starting at .*up to 1 voxels away"),
    "turned": (turned(5), r"starting at .*voxels away"),
    "sheared": (changed(m12=0.15), r"starting at .*voxels away"),
}


@pytest.fixture(scope="module")
def drawn():
    """Params of a call with a spacing, and of one with an affine, after JSON."""
    synth, (image, label) = ts.SynthesizeTumor(**SETTINGS), scan()
    found = {}
    for name, geometry in (("spacing", SPACING), ("affine", AFFINE)):
        new, new_label = synth(image, label, seed=0, **{name: geometry})
        assert all(record["applied"] for record in synth.report)
        found[name] = json.loads(json.dumps(synth.params)), new, new_label
    return found


def core(image, label, **call):
    return ts.SynthesizeTumor(**SETTINGS)(image, label, **call)


def adapter(image, label, **call):
    return Adapter(**SETTINGS)(image.round().to(torch.int16), label, **call)


def meta_tensors(image, label, affine, **call):
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    parts = [data.MetaTensor(x, affine=affine) for x in (image, label)]
    return ts.SynthesizeTumor(**SETTINGS)(*parts, **call)


WAYS = [core, adapter, meta_tensors]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OTHER_AFFINES)
def test_another_affine_is_refused_and_named(drawn, way, kind):
    params, *_ = drawn["affine"]
    affine, says = OTHER_AFFINES[kind]
    with pytest.raises(ValueError, match=f"params must be replayed on the grid .*{says}.*; pass"):
        way(*scan(), affine=affine, params=params)


@pytest.mark.parametrize("way", [core, adapter])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 1.2, 1.5), (1, 1.2, 1.53), (1.2, 1, 1.5)])
def test_another_spacing_is_refused_and_named(drawn, way, spacing):
    params, *_ = drawn["spacing"]
    wanted = " x ".join(f"{v:g}" for v in spacing)
    with pytest.raises(ValueError, match=f"of 1 x 1.2 x 1.5 mm, got one of {wanted} mm"):
        way(*scan(), spacing=spacing, params=params)


@pytest.mark.parametrize("way", [core, adapter])
@pytest.mark.parametrize("shape", [(44, 40, 35), (48, 48, 48), (40, 44, 36)])
@pytest.mark.parametrize("geometry", ["spacing", "affine"])
def test_another_shape_is_refused_and_named(drawn, way, geometry, shape):
    params, *_ = drawn[geometry]
    given = {geometry: {"spacing": SPACING, "affine": AFFINE}[geometry]}
    wanted = " x ".join(map(str, shape))
    with pytest.raises(ValueError, match=f"of 44 x 40 x 36 voxels, got one of {wanted}; pass"):
        way(*scan(shape), **given, params=params)


def test_an_unknown_size_after_a_known_one_is_refused(drawn):
    """The forgotten spacing= of a replay."""
    with pytest.raises(ValueError, match="of 1 x 1.2 x 1.5 mm, got one of 1 x 1 x 1 mm"):
        core(*scan(), params=drawn["spacing"][0])


def test_a_spacing_alone_has_the_axes_of_ras(drawn):
    """As far as two grids are known, they must be the same."""
    with pytest.raises(ValueError, match="with axes LPS, got one with axes RAS"):
        core(*scan(), spacing=SPACING, params=drawn["affine"][0])
    with pytest.raises(ValueError, match="with axes RAS, got one with axes LPS"):
        core(*scan(), affine=AFFINE, params=drawn["spacing"][0])
    params, new, new_label = drawn["spacing"]
    again, again_label = core(*scan(), affine=np.diag([*SPACING, 1]), params=params)
    assert torch.equal(again, new) and torch.equal(again_label, new_label)
    sheared = np.diag([*SPACING, 1.0])
    sheared[1, 2] = 0.15
    with pytest.raises(ValueError, match="with axes at right angles, got one with axes sheared"):
        core(*scan(), affine=sheared, params=params)


def test_the_sample_of_a_batch_is_named():
    image, label = (torch.stack([x, x]) for x in scan())
    synth = ts.SynthesizeTumor(**SETTINGS)
    new, _ = synth(image, label, spacing=SPACING, seed=0)
    spacings = torch.tensor([SPACING, SPACING])  # float32
    assert torch.equal(core(image, label, spacing=spacings, params=synth.params)[0], new)
    spacings[1, 0] = 2
    with pytest.raises(ValueError, match=r"params\[1\] must be replayed on the grid"):
        core(image, label, spacing=spacings, params=synth.params)


def test_rounding_is_the_same_grid(drawn):
    """Another program wrote the affine: each voxel is as it was."""
    params, new, new_label = drawn["affine"]
    near = AFFINE + 1e-4 * np.array([[1, 0, 0, 9], [0, 1, 0, 9], [0, 0, 1, 9], [0, 0, 0, 0]])
    for affine in (AFFINE.astype(np.float32), near):
        again, again_label = core(*scan(), affine=affine, params=params)
        assert torch.equal(again_label, new_label) and torch.equal(again, new)


@pytest.mark.parametrize("geometry", ["spacing", "affine"])
def test_another_phase_on_the_same_grid_gets_the_same_tumours(drawn, geometry):
    params, _, new_label = drawn[geometry]
    given = {geometry: {"spacing": SPACING, "affine": AFFINE}[geometry]}
    phase, label = scan(seed=1)
    again, again_label = core(phase + 25, label, **given, params=params)
    assert torch.equal(again_label, new_label)
    assert not torch.equal(again, phase + 25)


def test_params_of_an_earlier_version_fit_any_grid_that_holds_their_centres(drawn):
    params = json.loads(json.dumps(drawn["affine"][0]))
    del params[0]["grid"]
    core(*scan(), spacing=2.0, params=params)
    with pytest.raises(ValueError, match="outside the label"):
        core(*(x[..., :4] for x in scan()), spacing=2.0, params=params)


def test_params_without_a_tumour_fit_any_grid():
    synth = ts.SynthesizeTumor(**{**SETTINGS, "size_mm": 90})
    synth(*scan(), spacing=SPACING, seed=0)
    assert "grid" not in synth.params[0]
    image, _ = scan((20, 20, 20))
    assert core(*scan((20, 20, 20)), spacing=3, params=synth.params)[0].equal(image)


def test_a_sample_that_gets_no_tumour_is_not_compared(drawn):
    params = drawn["affine"][0]
    image, label = (torch.stack([x, x]) for x in scan())
    affines = np.stack([AFFINE, changed(m00=-2.0)])
    made = Adapter(**SETTINGS)
    new, _ = made(image, label, excluded=[False, True], affine=affines, params=params * 2)
    assert torch.equal(new[1], image[1]) and not torch.equal(new[0], image[0])


@pytest.mark.parametrize(
    "grid",
    [
        3,
        [],
        {},
        {"shape": [4, 4, 4]},
        {"shape": [4, 4], "spacing": [1, 1, 1]},
        {"shape": [4, 4, 0], "spacing": [1, 1, 1]},
        {"shape": [4, 4, 4.5], "spacing": [1, 1, 1]},
        {"shape": [4, 4, True], "spacing": [1, 1, 1]},
        {"shape": [4, 4, 4], "spacing": [1, 1, "a"]},
        {"shape": [4, 4, 4], "spacing": [1, 1, float("nan")]},
        {"shape": [4, 4, 4], "spacing": None},
        {"shape": [4, 4, 4], "affine": [[1, 2]]},
        {"shape": [4, 4, 4], "affine": np.zeros((4, 4)).tolist()},
        {"shape": [4, 4, 4], "spacing": [1, 1, 1], "affine": np.eye(4).tolist()},
        {"shape": [4, 4, 4], "more": 1},
    ],
)
def test_what_is_no_grid_is_refused(drawn, grid):
    params = [{**drawn["affine"][0][0], "grid": grid}]
    with pytest.raises(ValueError, match="a record's grid must hold a shape .*got .*; pass synth"):
        check_params(params, 1)
