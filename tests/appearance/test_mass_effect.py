"""Mass effect: how tissue moves, in image and label, and that a seed repeats it."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.mass_effect import (
    MAX_LEVEL,
    MAX_SHARE,
    MassEffect,
    displacement,
    push_aside,
)
from tumorsynth.pipeline.paint import Painter
from tumorsynth.placement.shape import Shape
from tumorsynth.placement.types import TumorParams

TINY = tiny_generator()
ISO = (1.0, 1.0, 1.0)


def tumor(centre=(40, 40, 40), diameter=24.0, share=0.5, rough=0.0, axes=(1, 1, 1), **more):
    rotation = (0.5, 0.5, 0.5, 0.5)
    return TumorParams(
        centre, diameter, axes, rotation, rough, 3, 4, 1.0, diameter, None, share, **more
    )


def determinants(source, spacing):
    """Jacobian determinants of the map from each voxel to where it comes from."""
    u = source.double().numpy()
    jacobian = np.stack([np.stack(np.gradient(part, *spacing)) for part in u])
    return np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)) + np.eye(3))


def scan(shape=(72, 72, 72), spacing=ISO, noise=10.0, seed=0):
    """An organ (1, 100 HU) in fat (0, -100 HU) with a dark vessel (3) and a rib (4, 700 HU)."""
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    label = torch.zeros(shape, dtype=torch.int16)
    label[x.square() + y.square() + z.square() < 30**2] = 1
    label[((x - 18).square() + y.square() < 9) & (label == 1)] = 3
    label[(y < -31) & (y > -34)] = 4
    image = torch.tensor([-100.0, 100.0, 0.0, 160.0, 700.0])[label.long()]
    image += noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return image[None], label[None]


def synth(generator="hu2023", **changes):
    settings = {"organ_labels": 1, "tumor_label": 2, "size_mm": 24, "count": 1, "mass_effect": 0.5}
    return ts.SynthesizeTumor(generator, **{**settings, **changes})


# -- the field ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [ISO, (0.8, 0.8, 2.5)])
@pytest.mark.parametrize("share", [0.3, MAX_SHARE])
@pytest.mark.parametrize("rough", [0.0, 0.2])
def test_nothing_folds_and_volume_is_kept(spacing, share, rough):
    size = [round(80 / s) for s in spacing]
    centre = tuple(n // 2 for n in size)
    params = tumor(centre, 24.0, share, rough, (1.25, 1.0, 0.8))
    volumes = determinants(displacement(params, size, spacing).source_mm, spacing)
    assert volumes.min() > 0.5 * (1 - share)
    assert volumes.max() < 1.5
    # the voxels of the part come from less volume than they have, by what the tumour adds
    voxel = math.prod(spacing)
    inner = volumes[1:-1, 1:-1, 1:-1]
    assert (1 - inner).sum() * voxel == pytest.approx(0, abs=0.03 * math.pi / 6 * 24**3)
    inside = volumes < 0.7 * (1 - share) + 0.3
    assert inside.sum() * voxel == pytest.approx(math.pi / 6 * 24**3, rel=0.2)


def test_tissue_moves_as_an_incompressible_medium_would_and_less_far_away():
    params = tumor(diameter=24.0, share=0.5)
    region, source = displacement(params, (80, 80, 80), ISO)
    centre = torch.tensor(params.centre) + Shape(params).offset
    at = torch.stack(
        torch.meshgrid(*[torch.arange(s.start, s.stop) for s in region.slices], indexing="ij"), -1
    )
    far = (at - centre).norm(dim=-1)
    back = (at - centre + source.permute(1, 2, 3, 0)).norm(dim=-1)
    for radius, least in ((14.0, 0.85), (18.0, 0.6)):
        here = (far - radius).abs() < 0.5
        free = (far.pow(3) - 0.5 * 12**3) ** (1 / 3)  # incompressible, without an end
        moved = ((far - back) / (far - free))[here].mean()
        assert least < moved <= 1.02
    assert (source[:, far > 12 * MAX_LEVEL + 3] == 0).all()
    vectors = source.movedim(0, -1)
    outward = (vectors * (at - centre)).sum(-1)
    assert (outward <= 1e-6).all()  # every voxel comes from nearer the centre


def test_displacement_does_not_depend_on_the_grid():
    """The same tumour on a fine and on a thick-sliced grid moves tissue by the same mm."""
    fine, thick = (1.0, 1.0, 1.0), (1.0, 1.0, 4.0)
    means = []
    for spacing, centre, size in (
        (fine, (40, 40, 40), (80,) * 3),
        (thick, (40, 40, 10), (80, 80, 20)),
    ):
        params = tumor(centre, 24.0, 0.5)
        region, source = displacement(params, size, spacing)
        offset = Shape(params).offset * torch.tensor(spacing)
        x = torch.arange(region.start[0], region.stop[0]) - 40 - offset[0]
        y = torch.arange(region.start[1], region.stop[1]) - 40 - offset[1]
        z = (torch.arange(region.start[2], region.stop[2]) - centre[2]) * spacing[2] - offset[2]
        grids = torch.stack(torch.meshgrid(x.double(), y.double(), z.double(), indexing="ij"))
        ring = (grids.norm(dim=0) - 15).abs() < 1
        means.append(float(source.norm(dim=0)[ring].mean()))
    assert means[0] == pytest.approx(means[1], rel=0.06)


def test_rigid_tissue_stays_and_less_is_displaced_towards_it():
    def wall(index):
        return index[0] >= 54  # 2 mm from the tumour's surface

    free = displacement(tumor(), (80, 80, 80), ISO).source_mm
    region, source = displacement(tumor(), (80, 80, 80), ISO, wall)
    assert float(source[:, 54 - region.start[0] :].abs().max()) < 0.02
    volumes = determinants(source, ISO)
    assert 0 < volumes.min() and volumes.max() < 2.5
    middle = 40 - region.start[1]
    gap = source[0, 40 - region.start[0] :, middle, middle]
    assert float(gap.abs().max()) < 0.7 * float(free.norm(dim=0).max())
    # on the other side nothing changes
    left = slice(0, 28 - region.start[0])
    assert torch.allclose(source[:, left], free[:, left], atol=0.05)


def test_a_tumour_at_the_samples_border_or_in_one_slice():
    for size, centre in (((80, 80, 9), (3, 40, 4)), ((80, 80, 1), (40, 40, 0))):
        source = displacement(tumor(centre), size, ISO).source_mm
        assert source.isfinite().all() and float(source.abs().max()) > 1


def test_shares_by_size():
    auto = MassEffect()
    assert auto.share_at(8) == auto.share_at(20) == 0
    assert 0 < auto.share_at(25) < auto.share_at(40) < auto.share_at(50) == auto.share_at(90) == 0.6
    assert MassEffect(0.4).share_at(5) == 0.4


# -- image and label ------------------------------------------------------------------------------


def push(image, label, params, spacing=ISO):
    """New image and label, and the largest displacement."""
    pushed = push_aside(image[0], label[0], params, spacing, (1,), 2, ts.HU())
    new, new_label = image.clone(), label.clone()
    new[0][pushed.region.slices] = pushed.image
    new_label[0][pushed.region.slices] = pushed.label
    return new, new_label, pushed.largest_mm


def test_image_and_label_move_together():
    image, label = scan(noise=0.0)
    new, new_label, largest = push(image, label, tumor((36, 36, 36)))
    assert largest > 2
    assert int((new_label != label).sum()) > 100
    # labels read back from the new image agree with the new label, except along edges
    levels = torch.tensor([-100.0, 100.0, 160.0, 700.0])
    read = torch.tensor([0, 1, 3, 4])[(new[..., None] - levels).abs().argmin(-1)]
    assert float((read != new_label).float().mean()) < 0.01
    vessel = (new_label == 3)[0].nonzero().float()
    middle = vessel[(vessel[:, 2] - 36).abs() < 2].mean(0)
    assert float(middle[0]) > 54.0  # 53.5 before
    assert torch.equal(new_label == 4, label == 4)  # the rib
    assert torch.equal(new[label == 4], image[label == 4])


def test_noise_stays_in_place():
    image, label = scan(noise=15.0)
    new, new_label, _ = push(image, label, tumor((36, 36, 36)))
    clean, _ = scan(noise=0.0)
    moved, _, _ = push(clean, label, tumor((36, 36, 36)))
    for part in (new_label == 1) & (label == 1), (new_label == 3) & (label == 3):
        inner = part & (new != image)
        noise = (new - moved)[inner].std()
        assert float(noise) == pytest.approx(15, rel=0.15)


def test_no_smooth_band_and_no_ghost_where_the_organ_ended():
    rng = torch.Generator().manual_seed(0)
    image = torch.full((1, 64, 64, 64), 200.0)
    image[:, 32:] = -100.0
    image += 15 * torch.randn(image.shape, generator=rng)
    label = torch.zeros(image.shape, dtype=torch.int64)
    label[:, :32] = 1
    new, new_label, _ = push(image, label, tumor((16, 32, 32), 30.0, 0.9))
    rows = new[0, 26:32, 29:36, 29:36]  # within the organ now
    assert (new_label[0, 26:33, 29:36, 29:36] == 1).all()
    assert float((rows.mean((1, 2)) - 200).abs().max()) < 8
    assert float(rows.std((1, 2)).min()) > 0.25 * 15  # stretched, so smoother


def test_a_fixed_capsule_stays_in_place():
    image, label = scan(noise=0.0)
    for fixed in (False, True):
        params = tumor((36, 47, 36), fixed_capsule=fixed)
        _, new_label, _ = push(image, label, params)
        outside = label == 0
        assert bool((new_label[outside] != 0).any()) is not fixed
        assert not bool(((label == 1) & (new_label == 0)).any())


@pytest.mark.parametrize("scale", [ts.Scaled(-175, 250, 0, 1), ts.ZScore(100, 50, -120, 190)])
def test_bone_is_bone_in_a_clipped_scale_too(scale):
    image, label = scan(noise=0.0)
    low, high = (-175, 250) if isinstance(scale, ts.Scaled) else (-120, 190)
    hu = image.clamp(low, high)
    scaled = (hu - scale.to_hu(torch.zeros(()))) / scale.hu_per_unit
    pushed = push_aside(scaled[0], label[0], tumor((36, 30, 36)), ISO, (1,), 2, scale)
    where = pushed.region.slices
    rib = label[0][where] == 4
    assert int(rib.sum()) > 100 and torch.equal(pushed.image[rib], scaled[0][where][rib])
    assert torch.equal(pushed.label == 4, rib)
    assert not torch.equal(pushed.label, label[0][where])


def test_voxels_that_are_not_finite_stay_in_place():
    image, label = scan()
    image[0, 50:53, 36, 36] = math.nan
    new, _, _ = push(image, label, tumor((36, 36, 36)))
    assert torch.equal(new.isnan(), image.isnan())


# -- the whole synthesis --------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize("spacing", [ISO, (1.0, 1.0, 3.0)])
def test_tissue_moves_first_and_then_the_tumour_is_painted(generator, spacing):
    image, label = scan((72, 72, round(72 / spacing[2])), spacing)
    transform = synth(generator)
    new, new_label = transform(image, label, spacing=spacing, seed=3)
    (record,) = transform.report
    assert record["applied"] and record["displaced_mm"] > 1
    painted = new_label == 2
    assert int(painted.sum()) == record["label_voxels"]
    assert record["diameter_mm"] == pytest.approx(24, rel=0.02)
    # nothing changes beyond the reach, and labels only become those nearby
    centre = torch.tensor(record["centre_voxel"]) * torch.tensor(spacing)
    changed = ((new != image) | (new_label != label))[0].nonzero() * torch.tensor(spacing)
    assert float((changed - centre).norm(dim=1).max()) < 24 / 2 * MAX_LEVEL * 1.8
    moved = (new_label != label) & ~painted
    assert int(moved.sum()) > 0 and set(new_label[moved].tolist()) <= {0, 1, 3}
    plain = synth(generator, mass_effect=0)
    other, other_label = plain(image, label, spacing=spacing, seed=3)
    assert plain.report[0]["displaced_mm"] == 0
    overlap = (painted & (other_label == 2)).sum() / painted.sum()
    assert float(overlap) > 0.8  # the same tumour in the same place


def test_off_means_off_and_auto_leaves_early_tumours_alone():
    image, label = scan()
    off = synth(mass_effect=0.0, size_mm=(8, 18), count=2)(image, label, spacing=ISO, seed=1)
    auto = synth(mass_effect="auto", size_mm=(8, 18), count=2)(image, label, spacing=ISO, seed=1)
    assert torch.equal(off[0], auto[0]) and torch.equal(off[1], auto[1])
    assert ts.SynthesizeTumor("hu2023").settings.mass_effect.share == 0


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_seed_params_and_batches_repeat_bit_by_bit(generator):
    image, label = scan()
    transform = synth(generator, count=3, size_mm=(10, 20))
    one = transform(image, label, spacing=ISO, seed=8)
    params = json.loads(json.dumps(transform.params))
    assert sum(r["applied"] for r in transform.report) >= 2
    report = transform.report
    again = pickle.loads(pickle.dumps(transform))(image, label, spacing=ISO, seed=8)
    replayed = synth(generator, count=3, mass_effect=0)
    third = replayed(image, label, spacing=ISO, params=params)  # the params decide
    images, labels = torch.stack([scan(seed=1)[0], image]), torch.stack([label, label])
    batch = transform(images, labels, spacing=ISO, seed=[4, 8])
    for other in (again, third, [part[1] for part in batch]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert replayed.report == report


def test_tumours_of_several_samples_go_through_the_networks_together(monkeypatch):
    """As on a GPU. Within a sample they go one by one: each sees what the last one moved."""
    images, labels = zip(*(scan(noise=2.0, seed=seed) for seed in range(3)), strict=True)
    images, labels = torch.stack(images), torch.stack(labels)
    labels[1] = 0  # a sample without an organ
    transform = synth(tiny_generator(crop_size=64), count=(1, 2), size_mm=14)
    expected = transform(images, labels, spacing=ISO, seed=[3, 4, 1])
    report, passes = transform.report, []
    inner = transform.handle.get("cpu").change

    def change(crop, mask, **arguments):
        passes.append(len(crop))
        parts = zip(crop.split(1), mask.split(1), arguments["seed"], strict=True)
        return torch.cat([inner(c, m, seed=[s]) for c, m, s in parts])  # to the last bit

    monkeypatch.setattr(transform.handle.get("cpu"), "change", change)
    monkeypatch.setattr(Painter, "_batch_size", lambda self, device: self.batch_limit)
    result = transform(images, labels, spacing=ISO, seed=[3, 4, 1])
    applied = [sum(r["sample"] == b and r["applied"] for r in report) for b in (0, 2)]
    assert sorted(applied) == [1, 2] and passes == [2, 1]
    assert all(map(torch.equal, result, expected)) and transform.report == report


def test_several_tumours_stay_apart_and_do_not_move_each_other():
    image, label = scan()
    transform = synth(count=4, size_mm=(10, 16))
    _, new_label = transform(image, label, spacing=ISO, seed=2)
    records = [r for r in transform.report if r["applied"]]
    assert len(records) >= 3
    assert int((new_label == 2).sum()) == sum(r["label_voxels"] for r in records)
    label[0, 30:40, 30:40, 30:40] = 2  # a tumour of the scan itself
    transform(image, label, spacing=ISO, seed=2)
    _, new_label = transform(image, label, spacing=ISO, seed=2)
    assert (new_label[label == 2] == 2).all()


def test_where_the_gate_rejects_a_tumour_its_tissue_moves_back():
    image, label = scan()
    transform = synth(gate=Gate(scorer=lambda hu, mask, spacing: 0.0, tries=1), count=2, size_mm=14)
    new, new_label = transform(image, label, spacing=ISO, seed=0)
    assert not any(r["applied"] for r in transform.report)
    assert torch.equal(new, image) and torch.equal(new_label, label)
    params = json.loads(json.dumps(transform.params))
    again, _ = synth()(image, label, spacing=ISO, params=params)
    assert torch.equal(again, image)


@pytest.mark.parametrize("value", [-0.1, 0.95, "much", None, True])
def test_invalid_shares_are_refused(value):
    with pytest.raises(ValueError, match='a share of the tumour.s volume from 0 to 0.9, or "auto"'):
        synth(mass_effect=value)
    with pytest.raises(ValueError, match="capsule must be"):
        MassEffect(0.5, capsule="loose")


# -- the adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.float32])
def test_adapters_pass_it_on(dtype):
    image, label = scan()
    wanted = synth()(image, label, spacing=ISO, seed=3)
    adapter = Adapter(generator="hu2023", tumor_label=2, size_mm=24, count=1, mass_effect=0.5)
    new, new_label = adapter(image, label.to(dtype), spacing=ISO, seed=3)
    assert torch.equal(new, wanted[0])
    assert new_label.dtype == dtype and torch.equal(new_label.to(torch.int16), wanted[1])
    with pytest.raises(ValueError, match="mass_effect must be 0 where the organ is in a map"):
        Adapter(separate_organ=True, mass_effect="auto")


def test_monai_and_torchio_take_it():
    monai = pytest.importorskip("tumorsynth.monai")
    torchio = pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    image, label = scan()
    kwargs = {"organ_labels": 1, "tumor_label": 2, "size_mm": 24, "count": 1, "mass_effect": 0.5}
    transform = monai.RandSynthesizeTumor(generator="hu2023", prob=1.0, **kwargs)
    transform.set_random_state(0)
    transform(image, label)
    assert transform.report[0]["displaced_mm"] > 1
    subject = torchio.Subject(
        image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label)
    )
    random = RandomSynthesizeTumor(generator="hu2023", p=1, **kwargs)
    torch.manual_seed(0)  # deep inside the organ a tumour moves no border
    once = random(subject)
    again = once.get_composed_history()(subject)
    assert torch.equal(once.image.data, again.image.data)
    assert torch.equal(once.label.data, again.label.data)
    relabelled = (once.label.data != label) & (once.label.data != 2)
    assert int(relabelled.sum()) > 0  # of the organ, which bulges, or the vessel


def test_the_command_line_takes_it_and_replays_it(tmp_path, capsys):
    nib = pytest.importorskip("nibabel")
    from tumorsynth.commands.main import main

    image, label = scan()
    paths = [tmp_path / "a_ct.nii", tmp_path / "a_label.nii"]
    for path, part in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(part[0].numpy().astype(np.int16), np.eye(4)), path)
    words = ["--generator", "hu2023", "--count", "1", "--size-mm", "24", "24", "--seed", "3"]
    files = [str(p) for p in paths]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["synthesize", *files, "-o", one, *words, "--mass-effect", "0.5"]) == 0
    report = json.loads((tmp_path / "one/a_report.json").read_text())
    assert report["tumors"][0]["displaced_mm"] > 1
    assert main(["replay", f"{one}/a_report.json", *files, "-o", two]) == 0
    assert "every voxel is as in the report" in capsys.readouterr().out
    assert main(["synthesize", *files, "-o", f"{two}b", *words, "--mass-effect", "lots"]) == 2
    assert "a share from 0 to 0.9, or auto" in capsys.readouterr().err
