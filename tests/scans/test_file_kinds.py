"""Files that are no NIfTI are named for what they are; NIfTI under another name is read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pytest

from tumorsynth.evaluation.folders import find_comparisons
from tumorsynth.reader_study.blinding import find_scans
from tumorsynth.scans.nifti import read_volume, write_volume
from tumorsynth.scans.pairing import find_files, find_pairs
from tumorsynth.training.reading import find_sources

nib = pytest.importorskip("nibabel")

AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.8, 0.1, -40], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
ARRAY = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)


def nifti_bytes(kind=nib.Nifti1Image):
    image = kind(ARRAY, AFFINE)
    image.header["descrip"] = b"kept"
    return image.to_bytes()


def packed(write):
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def tar(out):
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("a.nii")
        info.size = len(nifti_bytes())
        archive.addfile(info, io.BytesIO(nifti_bytes()))


def zipped(out):
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.nii", nifti_bytes())


STRANGERS = {
    "empty": (b"", "but empty; copy or export it again"),
    "empty gzip": (gzip.compress(b""), "but empty"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer; fetch the content with: git lfs pull"),
    "annex": (b"/annex/objects/MD5E-s123--0f.nii.gz\n", "git-annex pointer; .*git annex get scan"),
    "HTML": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "an HTML page; download"),
    "html": (b"\xef\xbb\xbf<HTML>", "an HTML page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "JSON": (json.dumps({"message": "Not Found"}).encode(), "a JSON document"),
    "text": ("Zugriff verweigert: bitte später".encode(), "a text that begins with 'Zugriff"),
    "DICOM": (bytes(128) + b"DICM" + bytes(400), "a DICOM file; .*dcm2niix"),
    "bare DICOM": (b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + bytes(400), "a DICOM file"),
    "NRRD": (b"NRRD0004\ntype: short\n", "an NRRD file; convert it, .*SimpleITK.*'scan.nii.gz'"),
    "MetaImage": (b"ObjectType = Image\nNDims = 3\n", "a MetaImage file; convert it"),
    "npy": (packed(lambda out: np.save(out, ARRAY)), "a NumPy array; it holds no voxel size"),
    "npz": (packed(lambda out: np.savez(out, data=ARRAY)), "a NumPy archive; it holds no voxel"),
    "zip": (packed(zipped), "a zip archive; unpack it"),
    "tar": (packed(tar), "a tar archive; unpack it"),
    "tar.gz": (gzip.compress(packed(tar)), "a tar archive; unpack it"),
    "bz2": (bz2.compress(nifti_bytes()), "compressed with bzip2; unpack it"),
    "xz": (lzma.compress(nifti_bytes()), "compressed with xz; unpack it"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG picture"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG picture"),
    "MGH": (nib.MGHImage(ARRAY, AFFINE).to_bytes(), "an MGH file of FreeSurfer; .*mri_convert"),
    "MGZ": (gzip.compress(nib.MGHImage(ARRAY, AFFINE).to_bytes()), "an MGH file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "noise": (bytes([200, 7, 255, 0, 1]) * 100, "is not a NIfTI file; give a .nii or .nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan"])
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_named_for_what_it_is(tmp_path, kind, name):
    content, says = STRANGERS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a NIfTI file.*{says}|^{name} {says}") as e:
        read_volume(path)
    assert "\n" not in str(e.value)


def same_voxels(path):
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.stored, ARRAY)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.name == path.name
    return volume


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.Nii", "a.img", "volume"])
def test_content_counts_and_not_the_name(tmp_path, name, layers, kind):
    content = nifti_bytes(kind)
    for _ in range(layers):
        content = gzip.compress(content)
    path = tmp_path / name
    path.write_bytes(content)
    same_voxels(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".HDR", ".IMG"), (".hdr.gz", ".img.gz")])
def test_both_halves_of_a_pair_are_read_and_written_as_one_file(tmp_path, suffixes, kind):
    image = kind(ARRAY, AFFINE)
    image.header["descrip"] = b"kept"
    image.set_sform(AFFINE, 1)
    files = image.make_file_map({key: io.BytesIO() for key in ("header", "image")})
    image.to_file_map(files)
    for key, suffix in zip(("header", "image"), suffixes, strict=True):
        content = files[key].fileobj.getvalue()
        content = gzip.compress(content) if suffix.endswith(".gz") else content
        (tmp_path / f"s{suffix}").write_bytes(content)
    for suffix in suffixes:
        volume = same_voxels(tmp_path / f"s{suffix}")
        write_volume(tmp_path / "out.nii.gz", volume, volume.stored)
        back = nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(back.dataobj), ARRAY)
        assert (back.header["descrip"], int(back.header["sform_code"])) == (b"kept", 1)
    for suffix, missing in (suffixes, suffixes[::-1]):
        hidden = (tmp_path / f"s{suffix}").rename(tmp_path / "hidden")
        with pytest.raises(ValueError, match=f"s{missing} is .* of a pair .*there is no s{suffix}"):
            read_volume(tmp_path / f"s{missing}")
        hidden.rename(tmp_path / f"s{suffix}")


def test_an_analyze_header_is_named(tmp_path):
    image = nib.AnalyzeImage(ARRAY, np.diag([2, 2, 2, 1]))
    nib.save(image, tmp_path / "s.img")
    for name in ("s.hdr", "s.img"):
        with pytest.raises(ValueError, match=f"{name} is of an Analyze 7.5 pair"):
            read_volume(tmp_path / name)


def test_links_that_lead_nowhere_are_named(tmp_path):
    annexed, dangling = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    os.symlink(".git/annex/objects/Xk/2V/MD5E-s9--0/MD5E-s9--0.nii.gz", annexed)
    os.symlink("elsewhere.nii.gz", dangling)
    with pytest.raises(FileNotFoundError, match="a.nii.gz is a git-annex link .*git annex get"):
        read_volume(annexed)
    with pytest.raises(FileNotFoundError, match="b.nii.gz is a link to elsewhere.nii.gz"):
        read_volume(dangling)
    with pytest.raises(FileNotFoundError, match="git-annex"):
        find_pairs(annexed, dangling)


def test_a_folder_of_dicom_slices_is_named(tmp_path):
    for k in range(3):
        (tmp_path / f"IM{k}").write_bytes(STRANGERS["DICOM"][0])
    with pytest.raises(ValueError, match="needs its label file as second argument"):
        find_pairs(tmp_path, None)
    for read in (read_volume, find_comparisons, find_sources, lambda p: find_scans(p, "real")):
        arguments = (tmp_path,) * (2 if read is find_comparisons else 1)
        with pytest.raises(ValueError, match="folder of DICOM slices, one scan; give the folder"):
            read(*arguments)


def test_upper_case_names_are_found_and_paired(tmp_path):
    for name in ("a_ct.NII.GZ", "A2_CT.Nii", "a_label.nii", "A2_LABEL.NII"):
        (tmp_path / name).touch()
    pairs = [(p.name, p.ct.name, p.label.name) for p in find_pairs(tmp_path, None)]
    assert pairs == [("A2", "A2_CT.Nii", "A2_LABEL.NII"), ("a", "a_ct.NII.GZ", "a_label.nii")]


def test_other_formats_are_listed_where_no_nifti_has_their_name(tmp_path):
    for name in ("a.nii.gz", "a.nrrd", "b.mha", "c.hdr", "c.img", "d.img", "e.txt", "f.npz"):
        (tmp_path / name).touch()
    found = {name: path.name for name, path in find_files(tmp_path, "").items()}
    assert found == {"a": "a.nii.gz", "b": "b.mha", "c": "c.hdr", "d": "d.img"}
