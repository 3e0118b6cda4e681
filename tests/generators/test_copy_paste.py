"""Lesions cut out of made-up scans, and pasted into others: their place, contrast and texture."""

from __future__ import annotations

import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tumorsynth as ts
from tumorsynth.commands.main import main
from tumorsynth.generators.bank import read_bank
from tumorsynth.generators.copy_paste import CopyPaste
from tumorsynth.generators.lesions import core_of, cut_lesions
from tumorsynth.geometry import frame_from_affine, frame_from_spacing
from tumorsynth.placement.sample_tumor import choose_like_size, upright

LEVEL_HU, CONTRAST_HU, RIM_HU = 110.0, -40.0, 50.0
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), (False, True)))


def grid(shape, spacing):
    axes = [torch.arange(n) * s for n, s in zip(shape, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def scan(spacing=(1.0, 1.0, 1.0), noise=4.0, level=LEVEL_HU, bodies=(), seed=0, side_mm=72):
    """An organ in fat with bodies in it: (centre in mm, half-axes in mm, contrast at each end)."""
    shape = [round(side_mm / s) for s in spacing]
    at = grid(shape, spacing).float()
    label = torch.zeros(shape, dtype=torch.int16)
    label[tuple(slice(n // 12, n - n // 12) for n in shape)] = 1
    hu = torch.where(label == 1, level, -90.0)
    for centre, half, contrast in bodies:
        relative = (at - torch.tensor(centre)) / torch.tensor(half)
        # wider at one end, so that no rotation but its own maps it onto itself
        wide = relative.clone()
        wide[..., 1] *= 1 + 0.4 * relative[..., 0]
        inside = wide.norm(dim=-1) < 1
        low, high = contrast
        share = (relative[..., 0] + 1) / 2
        hu = torch.where(inside, level + low + (high - low) * share, hu)
        label[inside] = 2
    rng = torch.Generator().manual_seed(seed)
    return hu + noise * torch.randn(shape, generator=rng), label, spacing


EGG = ((36.0, 36.0, 36.0), (14.0, 9.0, 8.0), (-60.0, -20.0))
BALL = ((18.0, 18.0, 18.0), (6.0, 6.0, 6.0), (-30.0, -30.0))


@pytest.fixture(scope="module")
def bank():
    return CopyPaste.from_scans([scan(bodies=[EGG, BALL])])


def synth(generator, **options):
    return ts.SynthesizeTumor(
        generator, **{"organ_labels": 1, "tumor_label": 2, "count": 1, "size_mm": 20.0, **options}
    )


class Spy:
    """A bank that keeps what it is asked for."""

    def __init__(self, bank):
        self.bank, self.calls = bank, []

    def __getattr__(self, name):
        return getattr(self.bank, name)

    def change(self, crop, tumor_mask, seed, **options):
        before = crop.clone()
        made = self.bank.change(crop, tumor_mask, seed, **options)
        assert crop.equal(before), "the caller's crop must stay as it is"
        self.calls.append((crop, tumor_mask, options["poses"], made))
        return made


# -- cutting --------------------------------------------------------------------------------------


def test_lesions_are_measured(bank):
    ball, egg = sorted(bank.lesions, key=lambda one: one.diameter_mm)
    assert ball.diameter_mm == pytest.approx(12, abs=0.3)
    assert ball.contrast_hu == pytest.approx(-30, abs=1) and egg.contrast_hu == pytest.approx(
        -40, abs=4
    )
    assert ball.level_hu == pytest.approx(LEVEL_HU, abs=1)
    assert ball.edge_mm == min(one.edge_mm for one in bank.lesions) == 0.4  # cut sharp
    assert [shape.diameter_mm for shape in bank.own_shapes] == [
        one.diameter_mm for one in bank.lesions
    ]


@pytest.mark.parametrize("axes, flip", ORIENTATIONS)
def test_orientation_of_the_array_changes_no_lesion(axes, flip):
    spacing = (0.8, 1.0, 3.0)
    image, label, _ = scan(spacing, bodies=[EGG, BALL])
    affine = np.diag([*spacing, 1.0])
    before = CopyPaste.from_scans([(image, label, affine)]).lesions
    turned = affine[:, [*axes, 3]].copy()
    image, label = image.permute(axes), label.permute(axes)
    if flip:
        turned[:, 3] += turned[:, 1] * (image.shape[1] - 1)
        turned[:, 1] *= -1
        image, label = image.flip(1), label.flip(1)
    after = CopyPaste.from_scans([(image, label, turned)]).lesions
    assert sorted(one.outline for one in after) == sorted(one.outline for one in before)
    for one in after:
        same = next(other for other in before if other.outline == one.outline)
        assert one.hu.equal(same.hu) and one.mask.equal(same.mask)
        assert one.to_mm.allclose(same.to_mm) and one.centre.allclose(same.centre)


def test_a_sheared_scan_has_its_lesions_in_mm():
    image, label, spacing = scan(bodies=[BALL])
    affine = np.eye(4)
    affine[0, 2] = 0.4  # a tilted gantry: the determinant stays 1
    cut = cut_lesions(image, label, frame_from_affine(affine), 2, [1], "tilted")
    assert cut.lesions[0].diameter_mm == pytest.approx(12, abs=0.3)


def test_soft_edges_are_seen():
    image, label, spacing = scan(bodies=[BALL], noise=0.0)
    from tumorsynth.appearance.blend import gaussian_filter

    soft = gaussian_filter(image, [1.5] * 3)
    cut = cut_lesions(soft, label, frame_from_spacing(spacing), 2, [1], "soft")
    assert cut.lesions[0].edge_mm == pytest.approx(1.5, abs=0.5)


def test_a_winding_lesion_is_one_and_touching_ones_too():
    image, label, spacing = scan()
    label[10:60, 30:33, 30:33] = 2  # longer than what is looked at first
    label[60, 33, 33] = 2  # at a corner
    cut = cut_lesions(image, label, frame_from_spacing(spacing), 2, [1], "long")
    assert len(cut.lesions) == 1 and cut.left_out == []
    assert int(cut.lesions[0].mask.sum()) == 50 * 9 + 1


def test_what_cannot_be_pasted_is_left_out_and_named():
    image, label, spacing = scan(bodies=[EGG])
    label[8:10, 8:10, 8:10] = 2  # 8 voxels
    label[0:8, 30:40, 30:40] = 2  # beyond the organ, at the border
    bank = CopyPaste.from_scans([(image, label, spacing)])
    assert len(bank.lesions) == 1
    assert any("fewer than 30 voxels" in one for one in bank.card["left_out"])
    assert any("touches the scan's border" in one for one in bank.card["left_out"])


def test_the_core_of_a_mask():
    mask = torch.zeros(12, 12, 12, dtype=torch.bool)
    mask[2:10, 2:10, 2:10] = True
    assert int(core_of(mask).sum()) == 6**3
    flat = torch.zeros(12, 12, 4, dtype=torch.bool)
    flat[2:10, 2:10, 1:3] = True
    assert int(core_of(flat).sum()) == 2 * 6**2
    tiny = torch.zeros(5, 5, 5, dtype=torch.bool)
    tiny[1:3, 1:3, 1:3] = True
    assert core_of(tiny).equal(tiny)


# -- pasting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes, flip", ORIENTATIONS)
def test_a_lesion_lies_in_its_own_shape_at_any_orientation(bank, axes, flip):
    spacing = (0.9, 1.3, 2.4)
    image, label, _ = scan(spacing)
    affine = np.diag([*spacing, 1.0])[:, [*axes, 3]]
    image, label = image.permute(axes), label.permute(axes)
    if flip:
        affine[:, 0] *= -1
    spy = Spy(bank)
    made = synth(spy, count=3, size_mm=20.0)
    for seed in range(2):
        made(image[None], label[None], affine=affine, seed=seed)
    assert len(spy.calls) >= 4
    for _, mask, (pose,), _ in spy.calls:
        lesion, to_lesion = bank._choose(mask[0, 0], 0, pose)
        points = torch.nonzero(torch.ones_like(mask[0, 0])).double()
        at = (points @ to_lesion[:, :3].T + to_lesion[:, 3]).round().long()
        last = torch.tensor(lesion.mask.shape) - 1
        inside = ((at >= 0) & (at <= last)).all(1)
        x, y, z = at.clamp_min(0).minimum(last).unbind(1)
        own = (lesion.mask[x, y, z] & inside).reshape(mask.shape[2:])
        dice = 2 * int((own & mask[0, 0]).sum()) / int(own.sum() + mask.sum())
        assert dice > 0.8, dice  # outlines are bent a little, and voxels are coarse


def test_texture_comes_along_with_the_shape(bank):
    # the egg's wide end is 40 HU brighter than its narrow one
    spy, (image, label, spacing) = Spy(bank), scan(noise=0.0)
    made = synth(spy, size_mm=22.0)
    seen = 0
    for seed in range(6):
        made(image[None], label[None], spacing=spacing, seed=seed)
    for _, mask, (pose,), change in spy.calls:
        lesion, to_lesion = bank._choose(mask[0, 0], 0, pose)
        if lesion.diameter_mm < 15:
            continue
        points = mask[0, 0].nonzero().double()
        along = (points @ to_lesion[:, :3].T + to_lesion[:, 3])[:, 0]
        hu = change[0, 0][mask[0, 0]] * (bank.window[1] - bank.window[0])
        low, high = along.quantile(0.25), along.quantile(0.75)
        assert float(hu[along > high].mean() - hu[along < low].mean()) > 12
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("level", [60.0, 110.0, 160.0])
def test_a_lesion_keeps_its_contrast_in_another_organ(bank, level):
    image, label, spacing = scan(level=level)
    made = synth(bank, count=3, size_mm=12.0)
    out, new = made(image[None], label[None], spacing=spacing, seed=1)
    tumor = new[0] == 2
    core = torch.zeros_like(tumor)
    core[1:-1, 1:-1, 1:-1] = core_of(tumor)[1:-1, 1:-1, 1:-1]
    assert float(out[0][core].mean()) - level == pytest.approx(-30, abs=4)


def test_a_requested_contrast_is_met(bank):
    image, label, spacing = scan()
    for contrast in (-70.0, 35.0):
        made = synth(bank, size_mm=18.0, contrast_hu=contrast)
        out, new = made(image[None], label[None], spacing=spacing, seed=1)
        core = core_of(new[0] == 2)
        assert float(out[0][core].mean()) - LEVEL_HU == pytest.approx(contrast, abs=4)


def test_nothing_becomes_darker_than_fluid_in_an_unenhanced_organ(bank):
    image, label, spacing = scan(level=30.0)
    made = synth(bank, size_mm=18.0)
    out, new = made(image[None], label[None], spacing=spacing, seed=1)
    assert 0 < float(out[0][core_of(new[0] == 2)].mean()) < 22


def test_the_scan_keeps_its_noise(bank):
    noise = 12.0
    image, label, spacing = scan(noise=noise)
    out, new = synth(bank, size_mm=20.0)(image[None], label[None], spacing=spacing, seed=2)
    core = core_of(new[0] == 2)
    fine = (out[0] - image)[core]
    differences = (out[0][1:] - out[0][:-1])[core[1:] & core[:-1]]
    assert float(differences.std()) / 2**0.5 == pytest.approx(noise, rel=0.2)
    assert float(fine.std()) < noise  # what was added is smooth


def test_vessels_do_not_shine_through(bank):
    image, label, spacing = scan(noise=2.0)
    at = grid(image.shape, spacing).float()
    vessel = (at[..., :2] - torch.tensor([36.0, 36.0])).norm(dim=-1) < 3
    image[vessel & (label == 1)] += 70
    made = synth(bank, size_mm=24.0)
    covered = 0
    for seed in range(8):
        out, new = made(image[None], label[None], spacing=spacing, seed=seed)
        core = core_of(new[0] == 2) & vessel
        if int(core.sum()) > 50:
            assert float(out[0][core].mean()) < LEVEL_HU
            covered += 1
    assert covered


def test_everything_beyond_the_feather_is_bit_identical(bank):
    image, label, spacing = scan()
    out, new = synth(bank)(image[None], label[None], spacing=spacing, seed=3)
    changed = out[0] != image
    assert changed.any() and (new != label).any()
    far = torch.nn.functional.max_pool3d((new[0] == 2)[None].float(), 17, 1, 8)[0] == 0
    assert not changed[far].any()


@pytest.mark.parametrize("options", [{}, {"blend": "difftumor", "sigma_mm": 1.0}, {"gate": True},
                                     {"mass_effect": 0.4}, {"bulge": 0.3}, {"merge": True},
                                     {"contrast_hu": "liver-portal"}])  # fmt: skip
def test_params_replay_and_batches_change_nothing(bank, options):
    image, label, _ = scan()
    spacing = (1.0, 1.0, 3.0)
    made = synth(bank, count=2, size_mm=(9, 16), **options)
    batch = torch.stack([image, image + 3])[:, None], torch.stack([label, label])[:, None]
    out, new = made(*batch, spacing=spacing, seed=[4, 5])
    assert any(record["applied"] for record in made.report)
    params, report = made.params, made.report
    again, labels = made(*batch, spacing=spacing, params=params)
    assert again.equal(out) and labels.equal(new)
    for number in range(2):
        alone, alone_label = made(
            batch[0][number], batch[1][number], spacing=spacing, seed=4 + number
        )
        assert alone.equal(out[number]) and alone_label.equal(new[number])
    assert [r["applied"] for r in report]


def test_half_precision_and_autocast(bank):
    image, label, spacing = scan()
    expected, new = synth(bank)(image[None], label[None], spacing=spacing, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = synth(bank)(image[None], label[None], spacing=spacing, seed=1)
    assert out.equal(expected)
    half, half_label = synth(bank)(image[None].half(), label[None], spacing=spacing, seed=1)
    assert half.dtype == torch.float16 and half_label.equal(new)


def test_shapes_of_the_user_s_win(bank):
    mask = torch.zeros(20, 20, 20)
    mask[4:16, 6:14, 8:12] = 1
    image, label, spacing = scan()
    made = synth(bank, shapes=[(mask, (1, 1, 1))])
    out, new = made(image[None], label[None], spacing=spacing, seed=1)
    assert made.report[0]["applied"]
    assert made.params[0]["tumors"][0]["outline"] not in [s.outline for s in bank.own_shapes]
    assert float((out - image)[new == 2].mean()) < -10


def test_without_a_pipeline_around(bank):
    image, label, _ = scan(noise=3.0)
    low, high = bank.window
    crop = ((image[12:60, 12:60, 12:60] - low) / (high - low))[None, None]
    mask = torch.zeros_like(crop, dtype=torch.bool)
    mask[:, :, 18:30, 18:30, 18:30] = True
    painted = bank.inpaint(crop, mask, [7], contrast_hu=-35.0)
    got = float((painted - crop)[0, 0][core_of(mask[0, 0])].mean()) * (high - low)
    assert got == pytest.approx(-35, abs=4)
    assert bank.change(crop, torch.zeros_like(mask), [7]).count_nonzero() == 0
    with pytest.raises(ValueError, match="seed must be one for each sample"):
        bank.change(crop, mask, [1, 2])
    with pytest.raises(TypeError, match="unknown keyword"):
        bank.change(crop, mask, [1], contrast=3)


def test_a_bank_from_lungs_has_their_window():
    image, label, spacing = scan(level=-850.0, bodies=[((36.0,) * 3, (8.0,) * 3, (880.0, 880.0))])
    bank = CopyPaste.from_scans([(image, label, spacing)])
    low, high = bank.window
    assert low <= -1000 and high >= 150
    lung, organ, _ = scan(level=-840.0, seed=3)
    made = synth(bank, size_mm=16.0)
    out, new = made(lung[None], organ[None], spacing=spacing, seed=1)
    assert float(out[0][core_of(new[0] == 2)].mean()) == pytest.approx(35, abs=15)
    liver, organ, _ = scan()
    made(liver[None], organ[None], spacing=spacing, seed=1)
    assert made.report[0]["code"] == "tissue"


def test_lesions_of_a_like_size_are_taken(bank):
    sizes = torch.tensor([6.0, 12.0, 40.0]).double()
    assert [choose_like_size(sizes, 3.0, u) for u in (0.0, 0.5)] == [0, 0]
    assert choose_like_size(sizes, 300.0, 0.999999) == 2
    taken = [choose_like_size(sizes, 12.0, u) for u in np.linspace(0, 0.999, 50)]
    assert taken.count(1) > 45


@pytest.mark.parametrize("vertical", range(3))
def test_thick_slices_stay_slices(vertical):
    from tumorsynth.placement.shape import _rotation_matrix

    rng = np.random.default_rng(0)
    ups = []
    for _ in range(20):
        q = rng.standard_normal(4)
        turn = _rotation_matrix(upright(tuple(q / np.linalg.norm(q)), vertical))
        assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-9)
        assert abs(float(turn[vertical, 2])) == pytest.approx(1)
        ups.append(float(turn[vertical, 2]))
    assert {round(up) for up in ups} == {-1, 1}


def test_a_bank_of_thick_slices_is_upright():
    made = CopyPaste.from_scans([scan((1.0, 1.0, 4.0), bodies=[EGG])])
    assert [shape.upright for shape in made.own_shapes] == [True]
    spy, (image, label, spacing) = Spy(made), scan((3.0, 0.8, 0.8))  # (z, y, x)
    synth(spy, size_mm=18.0)(image[None], label[None], spacing=spacing, seed=0)
    (pose,) = spy.calls[0][2]
    assert pose.to_shape[2, :3].abs().tolist() == pytest.approx([1, 0, 0], abs=1e-6)


# -- files ----------------------------------------------------------------------------------------


def test_a_saved_bank_is_the_same(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]
    image, label, spacing = scan()
    expected, new = synth(bank, count=2)(image[None], label[None], spacing=spacing, seed=1)
    for generator in (path, str(path), CopyPaste.load(path), ts.load_generator(path)):
        made = synth(generator, count=2)
        out, labels = made(image[None], label[None], spacing=spacing, seed=1)
        assert out.equal(expected) and labels.equal(new)
        copied = pickle.loads(pickle.dumps(made))
        assert copied(image[None], label[None], spacing=spacing, seed=1)[0].equal(expected)
    assert len(pickle.dumps(synth(path))) < 20_000  # the path travels, and not the voxels
    in_memory = pickle.loads(pickle.dumps(synth(bank, count=2)))
    assert in_memory(image[None], label[None], spacing=spacing, seed=1)[0].equal(expected)
    card = CopyPaste.load(path).card
    assert "your own data" in card["licence"] and len(card["sha256"]) == 64
    CopyPaste.load(path).save(tmp_path / "again.safetensors")
    lesions, _ = read_bank(tmp_path / "again.safetensors")
    assert all(a.hu.equal(b.hu) for a, b in zip(lesions, bank.lesions, strict=True))


def test_what_is_no_bank_is_named(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(FileNotFoundError, match="no bank .*train bank"):
        synth(path)
    with pytest.raises(ValueError, match="must end in .safetensors, got bank.npz"):
        bank.save(tmp_path / "bank.npz")
    with pytest.raises(ValueError, match="existing folder"):
        bank.save(tmp_path / "no" / "bank.safetensors")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a bank of lesions"):
        synth(path)
    save_file({"hu": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="must be a bank of lesions"):
        synth(path)
    bank.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a bank of lesions"):
        synth(path)
    path.write_bytes(whole)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name, wrong in (
        ("hu", torch.zeros(5, dtype=torch.int16)),
        ("shape", torch.full((2, 3), -1)),
        ("mask_bits", torch.zeros(10**4, dtype=torch.uint8)),
        ("to_mm", torch.zeros(2, 3, 3)),
    ):
        save_file({**load_file(path), name: wrong}, tmp_path / "x.safetensors", metadata)
        with pytest.raises(ValueError, match="x.safetensors is damaged"):
            synth(tmp_path / "x.safetensors")
    save_file(
        load_file(path), path, {"card": metadata["card"].replace('"format": 1', '"format": 9')}
    )
    with pytest.raises(ValueError, match="format 9"):
        synth(path)


def test_a_failed_write_leaves_the_old_bank(bank, tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        bank.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


@pytest.mark.parametrize(
    "scans, error, message",
    [
        ([], ValueError, "none of 0 does"),
        ("folder", TypeError, "scans must be a list"),
        (["a.nii.gz"], TypeError, "scan 0 must be a tuple"),
        ([("a", "b", "c", "d")], TypeError, "a pair or a triple"),
        ([("a.nii.gz", "b.nii.gz")], FileNotFoundError, "no such file: a.nii.gz"),
        ([scan()], ValueError, "no label holds 2 = tumor_label .they hold 0, 1"),
        ([scan(bodies=[EGG])[:2]], ValueError, "must say how large its voxels are"),
        ([(scan()[0], scan()[1][1:], (1, 1, 1))], ValueError, "must have one shape"),
        ([(scan()[0] / 1000, scan()[1], (1, 1, 1))], ValueError, "scan 0: .*HU"),
        ([(scan()[0], scan()[1] + 0.5, (1, 1, 1))], ValueError, "whole numbers|0.5"),
        ([(*scan()[:2], (1, 1, 0))], ValueError, "spacing must be"),
    ],
)
def test_what_cannot_be_cut_is_named(scans, error, message):
    with pytest.raises(error, match=message):
        CopyPaste.from_scans(scans)


def test_images_in_another_scale():
    image, label, spacing = scan(bodies=[EGG])
    scale = ts.Scaled(-175, 250, 0, 1)
    scaled = ((image + 175) / 425).clamp(0, 1)
    bank = CopyPaste.from_scans([(scaled, label, spacing)], intensity=scale)
    assert bank.lesions[0].contrast_hu == pytest.approx(-40, abs=4)
    with pytest.raises(ValueError, match="scan 0"):
        CopyPaste.from_scans([(image, label, spacing)], intensity=scale)


# -- the command ----------------------------------------------------------------------------------


def save(path, values, spacing):
    nib = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nib.save(nib.Nifti1Image(values.numpy().round().astype(np.int16), affine), path)


def run(*words):
    return main([str(word) for word in words])


def test_files_from_the_command_line_to_a_replay(tmp_path, capsys):
    pytest.importorskip("monai", reason="train needs the extra train")
    for name, bodies in (("a", [EGG]), ("b", [BALL]), ("c", [])):
        image, label, spacing = scan((1.0, 1.0, 2.0), bodies=bodies, seed=len(name))
        save(tmp_path / "data" / f"{name}_ct.nii.gz", image, spacing)
        save(tmp_path / "data" / f"{name}_label.nii.gz", label, spacing)
    out = tmp_path / "bank.safetensors"
    words = ("train", "bank", tmp_path / "data", "-o", out)
    assert run(*words, "--terms", "ask Anna") == 0
    said = capsys.readouterr()
    assert "with 2 lesions" in said.out and "HU" in said.out
    assert run(*words) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite", "--tumor-label", 7) == 2
    assert "no label holds 7" in capsys.readouterr().err
    assert run("info", out) == 0 and "ask Anna" in capsys.readouterr().out
    healthy = tmp_path / "data" / "c_ct.nii.gz", tmp_path / "data" / "c_label.nii.gz"
    made, again = tmp_path / "made", tmp_path / "again"
    assert run("synthesize", *healthy, "-o", made, "--generator", out, "--seed", 3) == 0
    report = next(made.glob("*_report.json"))
    assert '"ask Anna"' in report.read_text()
    assert run("replay", report, *healthy, "-o", again, "--generator", out) == 0
    ct = next(made.glob("*_ct.nii.gz")).name
    assert (made / ct).read_bytes() == (again / ct).read_bytes()
    assert run(*words, "--overwrite") == 0  # another bank: other terms, another sha256
    other = tmp_path / "other"
    assert run("replay", report, *healthy, "-o", other, "--generator", out) == 2
    files = [tuple(tmp_path / "data" / f"a_{kind}.nii.gz" for kind in ("ct", "label"))]
    from_python = CopyPaste.from_scans(files)
    lesion = next(one for one in CopyPaste.load(out).lesions if one.diameter_mm > 15)
    assert from_python.lesions[0].outline == lesion.outline
    assert from_python.lesions[0].hu.equal(lesion.hu)


def test_in_monai(bank, tmp_path):
    pytest.importorskip("monai")
    from tumorsynth.monai import RandSynthesizeTumord

    path = tmp_path / "bank.safetensors"
    bank.save(path)
    image, label, spacing = scan()
    transform = RandSynthesizeTumord(
        "image", "label", organ_labels=1, tumor_label=2, generator=path, spacing=spacing, count=1
    )
    transform.set_random_state(0)
    out = transform({"image": image[None], "label": label[None]})
    assert (out["label"] == 2).any()


# -- what is no tissue ----------------------------------------------------------------------------

WRONG_HU = [-3024.0, -1024.0, -900.0, -300.0, 600.0, 1200.0, 3000.0]


def scan_with_ball_of(hu, noise=4.0, level=LEVEL_HU, sound=True, centre=(46.0, 46.0, 46.0)):
    """A scan with a ball of 7 mm radius of these HU, and perhaps a sound lesion beside it."""
    image, label, spacing = scan(noise=noise, level=level, bodies=[BALL] if sound else [])
    ball = (grid(image.shape, spacing) - torch.tensor(centre)).norm(dim=-1) < 7
    image[ball], label[ball] = hu + image[ball] - level, 2
    return image, label, spacing


def as_files(folder, image, label, spacing):
    save(folder / "x_ct.nii.gz", image, spacing)
    save(folder / "x_label.nii.gz", label, spacing)
    return folder / "x_ct.nii.gz", folder / "x_label.nii.gz"


@pytest.mark.parametrize("hu", WRONG_HU)
@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("noise", [4.0, 40.0])
def test_a_label_on_no_tissue_stays_out_of_the_bank(hu, kind, noise, tmp_path):
    given = scan_with_ball_of(hu, noise)
    alone = scan_with_ball_of(hu, noise, sound=False)
    name = "scan 0" if kind == "arrays" else "x_ct.nii.gz"
    if kind == "files":
        given, alone = as_files(tmp_path, *given), as_files(tmp_path / "alone", *alone)
    with pytest.warns(UserWarning, match=f"lesion of {name} at voxel .* median of") as said:
        bank = CopyPaste.from_scans([given])
    named = float(re.search(r"median of (-?\d+) HU", str(said[0].message))[1])
    assert len(said) == 1 and named == pytest.approx(hu, abs=5)
    assert [round(one.diameter_mm) for one in bank.lesions] == [12]
    assert len(bank.card["left_out"]) == 1
    with pytest.raises(ValueError, match="must hold a lesion.* has a median of"):
        CopyPaste.from_scans([alone])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "hu, level",
    [(10, 110), (-90, 30), (250, 110), (30, -850), (-600, -850), (-820, -850), (600, 300)],
)
def test_tissue_is_no_false_alarm(hu, level):
    """As a cyst, fat, an arterial lesion, a nodule, ground glass (dense, faint), a bone lesion."""
    bank = CopyPaste.from_scans([scan_with_ball_of(hu, 15.0, level, sound=False)])
    assert bank.lesions[0].contrast_hu == pytest.approx(hu - level, abs=4)
    image, label, spacing = scan(level=level)
    made = synth(bank, size_mm=14.0)
    made(image[None], label[None], spacing=spacing, seed=1)
    (record,) = made.report
    assert record["applied"] and record["hu_change"] * (hu - level) > 0


@pytest.mark.parametrize("level", [-850.0, LEVEL_HU])
def test_air_is_no_lesion_in_a_lung_either(level):
    with pytest.raises(ValueError, match="air, padding"):
        CopyPaste.from_scans([scan_with_ball_of(-1024.0, level=level, sound=False)])


@pytest.mark.parametrize("foreign", [-1024.0, -700.0, 1500.0, 3000.0])
@pytest.mark.parametrize("blend", [{}, {"blend": "difftumor", "sigma_mm": 1.0}])
def test_gas_and_metal_in_a_lesion_are_not_pasted(foreign, blend):
    image, label, spacing = scan_with_ball_of(60.0, sound=False)
    image[45:48, 45:48, 45:48] = foreign
    bank = CopyPaste.from_scans([(image, label, spacing)])
    lesion = bank.lesions[0]
    assert lesion.contrast_hu == pytest.approx(60 - LEVEL_HU, abs=3)
    assert 0 < int(lesion.hu[lesion.mask].min()) and int(lesion.hu[lesion.mask].max()) < 120
    healthy, organ, spacing = scan()
    made = synth(bank, size_mm=14.0, **blend)
    out, new = made(healthy[None], organ[None], spacing=spacing, seed=1)
    assert made.report[0]["applied"]
    assert float(out[new == 2].min()) > 20 and float(out[new == 2].max()) < 150


def test_calcification_in_a_lesion_stays():
    image, label, spacing = scan_with_ball_of(60.0, sound=False)
    image[45:48, 45:48, 45:48] = 500.0
    lesion = CopyPaste.from_scans([(image, label, spacing)]).lesions[0]
    assert int((lesion.hu == 500).sum()) == 27


def test_a_lesion_that_is_half_gas_is_left_out():
    image, label, spacing = scan_with_ball_of(60.0, sound=False)
    image[::3, ::3, ::3] = torch.where(label == 2, -1000.0, image)[::3, ::3, ::3]
    with pytest.raises(ValueError, match="more than half in or next to gas"):
        CopyPaste.from_scans([(image, label, spacing)])


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_labels_that_are_not_whole_say_so(kind, tmp_path):
    nib = pytest.importorskip("nibabel")
    image, label, spacing = scan(bodies=[EGG])
    given = image, label * 0.9, spacing
    if kind == "files":
        files = as_files(tmp_path, image, label, spacing)
        affine = np.diag([*spacing, 1.0])
        nib.save(nib.Nifti1Image(given[1].numpy().astype(np.float32), affine), files[1])
        nib.save(nib.Nifti1Image(image.numpy().astype(np.float32), affine), files[0])
        given = files
    with pytest.raises(ValueError, match="label of .* must hold whole numbers, got 0.9; resample"):
        CopyPaste.from_scans([given])


@pytest.mark.parametrize("way", ["MonaiArray", "MonaiBatch", "Lightning", "TorchIO"])
def test_a_bank_in_the_adapters(way, bank, tmp_path, monkeypatch):
    ways = pytest.importorskip("ways")
    bank.save(tmp_path / "bank.safetensors")
    wanted = {"generator": tmp_path / "bank.safetensors", "size_mm": 18.0, "count": 1}
    monkeypatch.setattr(ways, "SETTINGS", wanted)
    image, label, spacing = scan((2.0, 2.0, 2.0))
    made = getattr(ways, way)(spacing=spacing)
    new = made(image[None], label[None])
    inside = torch.as_tensor(np.asarray(new)).reshape(-1, *label.shape)[0] == 2
    diameter_mm = (6 / np.pi * float(inside.sum()) * 8) ** (1 / 3)
    assert diameter_mm == pytest.approx(18, rel=0.15)
    transform = getattr(made, "transform", None) or made.callback
    record = transform.report[0]
    assert record["applied"] and record["generator"] == "copy-paste"
    assert -50 < record["hu_change"] < -15
