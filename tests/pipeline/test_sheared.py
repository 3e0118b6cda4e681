"""Sheared and oblique grids: tumours have their size and shape in mm, whatever the axes' angles."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.appearance import gate
from tumorsynth.appearance.blend import feather, feather_reach
from tumorsynth.appearance.gate import _depth_mm
from tumorsynth.appearance.noise import measure_noise
from tumorsynth.appearance.visibility import visibility
from tumorsynth.geometry import Frame, frame_from_affine, frame_from_spacing, shear_of
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place, place_from_params
from tumorsynth.placement.rasterize import equivalent_diameter
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask, TumorParams

ANGLES = [0, 10, 20, 30]
BALL = TumorParams((0, 0, 0), 20.0, (1.0,) * 3, (1.0, 0.0, 0.0, 0.0), 0.0, 3, 0, 0.0, 20.0)


def tilted(degrees: float, spacing=(1.0, 1.0, 1.0), rotation=0.0) -> np.ndarray:
    """A gantry tilt: each slice lies a little further to the front; and a turn about z."""
    linear = np.diag(spacing).astype(float)
    linear[1, 2] = spacing[2] * math.tan(math.radians(degrees))
    c, s = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ linear
    affine[:3, 3] = (12.0, -30.0, 7.0)
    return affine


def in_mm(mask: torch.Tensor, start, affine: np.ndarray) -> np.ndarray:
    voxels = mask.nonzero().numpy() + np.array(start)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def roundness(points: np.ndarray, weights=None) -> float:
    """Shortest over longest axis of some points."""
    variance = np.linalg.eigvalsh(np.cov(points.T, aweights=weights))
    return math.sqrt(variance[0] / variance[-1])


def ball_in(affine: np.ndarray, size=(70, 80, 70)) -> tuple[LocalMask, Frame]:
    frame = frame_from_affine(affine)
    region = OrganRegion.of_label(torch.ones(size, dtype=torch.uint8), 1)
    ball = replace(BALL, centre=tuple(n // 2 for n in size))
    tumor = place_from_params(ball, region, frame.spacing, shear=frame.shear)
    assert isinstance(tumor, LocalMask)
    return tumor, frame


def test_visibility_and_the_volume_of_a_taken_value_are_those_of_the_sheared_grid():
    """Of slices that lie further and further to the front, as with a tilted gantry."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:2, 2] = 0.7, -0.7
    frame = frame_from_affine(affine)
    assert frame.voxel_mm3 < 0.72 * math.prod(frame.spacing)
    size = (40, 40, 40)
    hu = 100 + 10 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[16:24, 16:24, 16:24] = True
    hu[mask] -= 40
    found = gate.measure(hu, mask, torch.ones_like(mask), frame.spacing, frame.shear)["visibility"]
    noise = measure_noise(hu, ~mask, frame.spacing)
    section = math.pi / 4 * equivalent_diameter(512 * frame.voxel_mm3) ** 2
    contrast = float(hu[mask].mean()) - 100
    assert found == pytest.approx(visibility(contrast, section, noise, frame.spacing), rel=0.05)

    label = torch.zeros(1, *size, dtype=torch.uint8)
    label[0, :4], label[0, 8:, 4:-4, 4:-4] = 1, 2  # 33 000 voxels apart from the organ
    image = torch.full((1, *size), 100.0)
    for scale, expected in ((1.2, 0), (1.3, 1)):  # 57 and 72 ml; by the columns' lengths 80, 101
        scaled = affine @ np.diag([scale] * 3 + [1])
        transform = ts.SynthesizeTumor("hu2023", count=1, size_mm=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transform(image, label, affine=scaled, seed=0)
        assert len([w for w in caught if "tumor_label" in str(w.message)]) == expected


def test_a_frame_knows_its_voxels_volume():
    generator = np.random.default_rng(0)
    for degrees in ANGLES:
        affine = tilted(degrees, (0.7, 0.9, 3.0), rotation=25)
        frame = frame_from_affine(affine)
        assert frame.voxel_mm3 == pytest.approx(abs(np.linalg.det(affine[:3, :3])))
        assert (frame.shear is None) == (degrees == 0)
    for _ in range(20):  # distances between any two voxels
        linear = np.linalg.qr(generator.normal(size=(3, 3)))[0] @ tilted(30, (1, 2, 3))[:3, :3]
        affine = np.eye(4)
        affine[:3, :3] = linear
        frame = frame_from_affine(affine)
        step = generator.integers(-9, 9, 3)
        there = np.array(frame.shear) @ (step * frame.spacing)
        assert np.linalg.norm(there) == pytest.approx(np.linalg.norm(linear @ step))
        planes = 1 / np.linalg.norm(np.linalg.inv(linear), axis=1)
        assert frame.plane_distance == pytest.approx(planes)
    flat = frame_from_spacing((1, 2, 3))
    assert flat.voxel_mm3 == 6 and flat.plane_distance == flat.spacing


def test_rounded_rotations_are_not_sheared():
    affine = tilted(0, (0.7, 0.7, 5.0), rotation=12).astype(np.float32)
    affine += np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32) * 1e-6
    assert shear_of(affine) is None


@pytest.mark.parametrize("degrees", ANGLES)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 1.5), (1.0, 1.0, 4.0)])
def test_a_ball_is_a_ball_in_mm(degrees, spacing):
    affine = tilted(degrees, spacing, rotation=15)
    tumor, frame = ball_in(affine, tuple(round(90 / s) for s in spacing))
    volume = float(tumor.share.sum()) * abs(np.linalg.det(affine[:3, :3]))
    assert volume == pytest.approx(math.pi / 6 * 20**3, rel=0.02)
    share = tumor.share
    points = in_mm(share > 0, tumor.start, affine)
    weights = share[share > 0].numpy()
    assert roundness(points, weights) > (0.97 if spacing[2] < 2 else 0.94)
    distance = np.linalg.norm(points - np.average(points, axis=0, weights=weights), axis=1)
    assert distance.max() < 10 + max(spacing) and frame.voxel_mm3 > 0


@pytest.mark.parametrize("degrees", ANGLES)
def test_feather_and_depth_are_the_same_in_all_directions(degrees):
    affine = tilted(degrees)
    tumor, frame = ball_in(affine)
    reach = feather_reach(2.0, frame.plane_distance, "change")
    margin = [n for r in reversed(reach) for n in (r, r)]
    mask = torch.nn.functional.pad(tumor.mask, margin)
    weight = feather(mask, 2.0, frame.spacing, "change", shear=frame.shear)
    points = in_mm(weight >= 0, (0, 0, 0), affine)
    middle = in_mm(mask, (0, 0, 0), affine).mean(0)
    distance = np.linalg.norm(points - middle, axis=1)
    for values, most in ((weight, 0.12), (_depth_mm(mask, frame.spacing, frame.shear), 1.0)):
        shell = values.flatten().numpy()[np.abs(distance - 10) < 0.3]
        assert len(shell) > 100 and shell.std() < most
    assert float(weight[mask].max()) == 1 and float(weight.min()) >= 0


def test_an_angle_of_zero_and_none_filter_alike():
    """The filter of sheared grids against the one along axes."""
    mask = torch.zeros(30, 30, 30, dtype=torch.bool)
    mask[11:19, 12:18, 10:20] = True
    straight = feather(mask, 1.5, (1.0, 1.0, 2.0), "change")
    right_angles = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    sheared = feather(mask, 1.5, (1.0, 1.0, 2.0), "change", shear=right_angles)
    assert float((straight - sheared).abs().max()) < 0.02


@pytest.mark.parametrize(("degrees", "generator"), [(20, "liver-early"), (30, "hu2023")])
def test_reports_and_change_hold_in_a_tilted_scan(degrees, generator):
    affine = tilted(degrees, (1.5, 1.5, 1.5))
    ct = ts.make_phantom(spacing=(1.5, 1.5, 1.5), shape=(90, 80, 70))
    synth = ts.SynthesizeTumor(generator, organ_labels=1, tumor_label=20, count=1, size_mm=20)
    made, label = synth(ct.image, ct.label, affine=affine, seed=3)
    record = synth.report[0]
    volume = int((label == 20).sum()) * abs(np.linalg.det(affine[:3, :3]))
    assert record["volume_mm3"] == pytest.approx(volume)
    assert record["diameter_mm"] == pytest.approx((6 * volume / math.pi) ** (1 / 3))
    assert record["true_diameter_mm"] == pytest.approx(20, abs=0.1)
    assert record["centre_mm"] == pytest.approx(
        list(affine[:3, :3] @ np.array(record["centre_voxel"]) + affine[:3, 3])
    )
    again, _ = synth(ct.image, ct.label, affine=affine, params=synth.params)
    assert torch.equal(again, made)


def test_tumours_keep_their_distance_in_mm():
    affine = tilted(30, (1.0, 1.0, 1.0))
    frame = frame_from_affine(affine)
    region = OrganRegion.of_label(torch.ones(60, 60, 60, dtype=torch.uint8), 1)
    settings = PlacementSettings(size_mm=(8, 14), count=8, gap_mm=4.0)
    rng = torch.Generator().manual_seed(2)
    found = place(region, frame.spacing, settings, rng, shear=frame.shear)
    clouds = [in_mm(t.mask, t.start, affine) for t in found if isinstance(t, LocalMask)]
    assert len(clouds) >= 4
    for i, one in enumerate(clouds):
        for other in clouds[i + 1 :]:
            apart = np.linalg.norm(one[:, None] - other[None], axis=-1).min()
            assert apart >= 4.0


def test_mass_effect_moves_tissue_alike_in_all_directions():
    from tumorsynth.appearance.mass_effect import displacement

    affine = tilted(30, (1.5, 1.5, 1.5))
    frame = frame_from_affine(affine)
    params = replace(BALL, centre=(30, 35, 30), displaced=0.5)
    region, source_mm = displacement(params, (60, 70, 60), frame.spacing, shear=frame.shear)
    length = source_mm.norm(dim=0).flatten().numpy()
    points = in_mm(torch.ones(region.shape), region.start, affine)
    offset = in_mm(torch.ones(1, 1, 1), params.centre, affine)[0]
    from tumorsynth.placement.shape import Shape

    centre = offset + affine[:3, :3] @ Shape(params).offset.numpy()
    distance = np.linalg.norm(points - centre, axis=1)
    shell = length[np.abs(distance - 12) < 0.4]
    assert len(shell) > 50 and shell.std() < 0.1 * shell.mean()


def test_scores_of_a_tilted_pair_are_those_of_the_straight_one():
    pytest.importorskip("monai")
    from tumorsynth.evaluation.metrics import scores

    def balls(affine):
        size = (70, 90, 70)
        points = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        mm = points @ affine[:3, :3].T
        middle = affine[:3, :3] @ (np.array(size) / 2)
        real = np.linalg.norm(mm - middle, axis=-1) < 10
        predicted = np.linalg.norm(mm - middle - (0, 3.0, 0), axis=-1) < 10
        return (1 + predicted).astype(int), (1 + real).astype(int)

    straight, slanted = np.diag([1.0, 1.0, 1.0, 1.0]), tilted(30)
    expected = scores(*balls(straight), (1, 1, 1))
    spacing = frame_from_affine(slanted).spacing
    found = scores(*balls(slanted), spacing, shear=shear_of(slanted))
    assert found.diameters_mm[0] == pytest.approx(20, rel=0.01)
    assert found.dsc == pytest.approx(expected.dsc, abs=0.01)
    assert found.hd95_mm == pytest.approx(expected.hd95_mm, abs=0.4)
    assert found.nsd == pytest.approx(expected.nsd, abs=0.04)
