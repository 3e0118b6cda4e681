"""The restricted reader against malicious files: nothing in them may run."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tumorsynth.generators.checkpoint import CheckpointError, LazyTensor, read_checkpoint

STORE = zipfile.ZIP_STORED


def archive(path: Path, data: bytes, entries: dict[str, bytes] | None = None, **kw: Any) -> Path:
    """A torch zip archive with this pickle in it."""
    with zipfile.ZipFile(path, "w", **kw) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/byteorder", b"little")
        for name, content in (entries or {}).items():
            file.writestr(name, content)
    return path


class Call:
    """Pickles as a call of a global, which need not exist here."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def storage_pickle(
    numel: int = 4,
    key: str = "0",
    offset: Any = 0,
    shape: Any = (2, 2),
    stride: Any = (2, 1),
    kind: str = "FloatStorage",
    pid: Any = None,
) -> bytes:
    """The pickle of one tensor, every part of it as given."""
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if obj == "STORAGE":
                return pid or ("storage", getattr(torch, kind), key, "cpu", numel)
            return None

    rebuild = torch._utils._rebuild_tensor_v2
    Pickler(out, 2).dump(Call(rebuild, "STORAGE", offset, shape, stride, False, OrderedDict()))
    return out.getvalue()


FOUR = {"a/data/0": struct.pack("<4f", 1, 2, 3, 4)}


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    saved = {
        "view": base.view(2, 3, 4)[:, 1:, ::2],
        "turned": base.view(4, 6).T,
        "expanded": torch.ones(1).expand(5, 7),
        "half": torch.randn(3).half(),
        "whole": torch.arange(3),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "plain": [1, 2.5, "three", None, {"four": (5, True)}],
    }
    torch.save(saved, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert found.pop("plain") == saved.pop("plain")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert isinstance(found[name], LazyTensor)
        torch.testing.assert_close(found[name].load(), tensor, rtol=0, atol=0)


def test_containers_become_plain_and_stand_ins_keep_nothing(tmp_path: Path) -> None:
    state = OrderedDict(a=1, b=torch.ones(2))
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    content = {"s": state, "d": defaultdict(list, x=[1]), "c": Counter("aab"), "t": [int, dict]}
    torch.save(content, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert isinstance(found["s"], dict) and list(found["s"]) == ["a", "b"]
    assert not hasattr(found["s"], "_metadata")
    assert isinstance(found["d"], dict) and dict(found["d"]) == {"x": [1]}
    assert found["c"] == {} and not any(callable(kind) for kind in found["t"])


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "subprocess Popen",
        "builtins eval",
        "builtins exec",
        "builtins getattr",
        "builtins __import__",
        "builtins open",
        "builtins object",
        "__builtin__ set",
        "torch load",
        "torch.hub load",
        "torch.serialization load",
        "torch._utils _rebuild_parameter",
        "torch.storage _load_from_bytes",
        "numpy.core.multiarray scalar",
        "omegaconf.dictconfig DictConfig.__init__",
        "omegaconf.omegaconf OmegaConf",
        "collections OrderedDict.fromkeys",
        "collections namedtuple",
        "typing get_type_hints",
        "functools partial",
        "operator attrgetter",
        "pickle loads",
        "tumorsynth.generators.checkpoint _Archive",
        "nowhere.at_all thing",
    ],
)
@pytest.mark.parametrize("call", [b")R", b"(l\x85R", b""])
def test_any_other_global_is_refused_by_name(tmp_path: Path, name: str, call: bytes) -> None:
    module, attribute = name.split()
    data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + call + b"."
    with pytest.raises(CheckpointError, match=f"holds {module}.{attribute}, which no") as caught:
        read_checkpoint(archive(tmp_path / "bad.ckpt", data))
    assert str(caught.value).startswith("bad.ckpt ") and "nothing was run" in str(caught.value)


def hostile(target: Path) -> dict[str, Any]:
    touch = Call(__import__("os").system, f"touch {target}")
    rebuild = torch._utils._rebuild_tensor_v2
    return {
        "call": touch,
        "deep": {"state_dict": {"a": [(1, {"b": touch})]}},
        "as a key": {touch: 1},
        "as an argument": Call(rebuild, touch, 0, (1,), (1,), False, OrderedDict()),
        "in a default dict": defaultdict(list, x=touch),
        "eval": Call(eval, f"open({str(target)!r}, 'w')"),
        "exec": Call(exec, f"open({str(target)!r}, 'w')"),
        "import": Call(__import__, "antigravity"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "load within": Call(torch.load, str(target)),
        "code from bytes": Call(torch.storage._load_from_bytes, b"x"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", list(hostile(Path("x"))))
def test_nothing_is_executed(tmp_path: Path, kind: str, protocol: int) -> None:
    target = tmp_path / "made_by_the_pickle"
    data = pickle.dumps(hostile(target)[kind], protocol)
    with pytest.raises(CheckpointError, match="was refused and nothing was run"):
        read_checkpoint(archive(tmp_path / "bad.pt", data))
    assert not target.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"ctyping\nAny\n)R.",  # calls what is only named
        b"ctyping\nAny\n)\x81.",
        b"c__builtin__\ndict\n)R.",
        b"ctorch\nFloatStorage\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR.",  # no storage
        b"comegaconf.nodes\nAnyNode\nK\x01\x85\x81.",  # arguments to a stand-in
        b"]}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on a list
        b"X\x01\x00\x00\x00aQ.",  # a storage named by a string
        b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000h\x00K\x01tQ.",
        b"\x82\x01.",  # extension code
        b"Nr\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"Nr\x00\x00\x00\x01.",  # of 2^24, which would be had
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes that are not there
        b"}]K\x01s.",  # a list as a key
        b"K\x01",  # no end
        b"",
        b"\xff\xfe not a pickle",
    ],
)
def test_malformed_pickles_are_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(CheckpointError, match="bad.pt "):
        read_checkpoint(archive(tmp_path / "bad.pt", b"\x80\x02" + body))


def test_stand_ins_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD sets attributes: on a stand-in it must not, or one file would change the next's."""
    for name in ["ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "ctyping\nAny\n"]:
        state = b"}X\x05\x00\x00\x00dtypeK\x01s"
        for built in (state, b"N" + state + b"\x86"):
            read_checkpoint(archive(tmp_path / "x.pt", b"\x80\x02" + name.encode() + built + b"b."))
    found = read_checkpoint(archive(tmp_path / "y.pt", storage_pickle(), FOUR))
    assert found.load().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "change",
    [
        {"numel": 5, "shape": (5,), "stride": (1,)},  # more than the entry holds
        {"numel": 3},
        {"numel": -4},
        {"numel": 2**62},
        {"kind": "DoubleStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": "/etc/passwd"},
        {"shape": (3, 2)},
        {"stride": (4, 1)},
        {"offset": 1},
        {"offset": -1},
        {"shape": (-2, 2)},
        {"stride": (-2, 1)},
        {"shape": (2, 2, 1)},
        {"shape": [2, 2]},
        {"shape": (2.0, 2)},
        {"shape": (2**60, 2), "stride": (0, 0)},
        {"shape": (1,) * 99, "stride": (0,) * 99},
        {"offset": "0"},
        {"pid": ("storage", torch.FloatStorage, "0", "cpu")},
        {"pid": ("module", torch.FloatStorage, "0", "cpu", 4)},
        {"pid": ("storage", "FloatStorage", "0", "cpu", 4)},
    ],
)
def test_tensors_stay_within_their_storage(tmp_path: Path, change: dict[str, Any]) -> None:
    good = archive(tmp_path / "good.pt", storage_pickle(), FOUR)
    assert read_checkpoint(good).load().tolist() == [[1, 2], [3, 4]]
    with pytest.raises(CheckpointError, match="bad.pt "):
        read_checkpoint(archive(tmp_path / "bad.pt", storage_pickle(**change), FOUR))


@pytest.mark.parametrize("name", ["../a/data/0", "/a/data/0", "a/../../x", "a\\data", "c:/x"])
def test_unsafe_entry_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="unsafe name"):
        read_checkpoint(archive(tmp_path / "bad.pt", pickle.dumps({}, 2), {name: b""}))


def test_compression_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    zeros = {"a/data/0": bytes(32 << 20)}
    archive(path, storage_pickle(8 << 20), zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """A zip bomb: many directory entries for the same bytes."""
    path = archive(tmp_path / "x.pt", pickle.dumps({}, 2), {"a/data/0": bytes(4096)})
    with zipfile.ZipFile(path, "a") as file:
        original = file.getinfo("a/data/0")
        for i in range(1, 50):
            copy = zipfile.ZipInfo(f"a/data/{i}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(copy, field, getattr(original, field))
            file.filelist.append(copy)
        file._didModify = True  # type: ignore[attr-defined]
    assert path.stat().st_size < 16_000
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        read_checkpoint(path)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    empty = pickle.dumps({}, 2)
    with zipfile.ZipFile(tmp_path / "none.pt", "w") as file:
        file.writestr("a/version", b"3")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as file:
        file.writestr("a/data.pkl", empty)
        file.writestr("b/data.pkl", empty)
    for name in ("none", "two"):
        with pytest.raises(CheckpointError, match="data.pkl where one belongs"):
            read_checkpoint(tmp_path / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("a/data.pkl", empty)
        file.writestr("a/byteorder", b"big")
    with pytest.raises(CheckpointError, match="little-endian"):
        read_checkpoint(tmp_path / "big.pt")
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as file, pytest.warns(UserWarning):
        file.writestr("a/data.pkl", empty)
        file.writestr("a/data.pkl", empty)
    with pytest.raises(CheckpointError, match="two entries of one name"):
        read_checkpoint(tmp_path / "twice.pt")


def test_files_that_are_no_zip_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("<html>404</html>")
    torch.save({"a": torch.ones(2000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("old", "empty", "text", "cut"):
        with pytest.raises(CheckpointError, match=f"{name}.pt is not a whole zip checkpoint"):
            read_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_changed_values_are_noticed(tmp_path: Path) -> None:
    values = torch.rand(2000)
    torch.save({"a": values}, tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    raw[raw.index(values.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "x.pt")["a"].load()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_a_mangled_file_is_read_or_refused(tmp_path: Path, changes: list) -> None:
    """Any bytes changed, in the pickle: never another error, never a crash."""
    data = bytearray(storage_pickle())
    for position, byte in changes:
        data[position % len(data)] = byte
    path = archive(tmp_path / "x.pt", bytes(data), FOUR)
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        assert str(error).startswith("x.pt ")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_a_mangled_archive_is_read_or_refused(tmp_path: Path, changes: list) -> None:
    path = archive(tmp_path / "x.pt", storage_pickle(), FOUR)
    raw = bytearray(path.read_bytes())
    for position, byte in changes:
        raw[position % len(raw)] = byte
    path.write_bytes(raw)
    try:
        read_checkpoint(path).load()
    except CheckpointError as error:
        assert str(error).startswith("x.pt ")
    except AttributeError as error:  # a changed pickle may hold another object than a tensor
        assert "load" in str(error)


def test_the_classes_stood_in_for_are_not_imported(tmp_path: Path) -> None:
    """Reading needs neither omegaconf nor lightning, even where a file names them."""
    path = archive(tmp_path / "x.pt", b"\x80\x02comegaconf.listconfig\nListConfig\n)\x81}b.")
    code = (
        "import sys; sys.modules['omegaconf'] = sys.modules['lightning'] = None\n"
        "from tumorsynth.generators.checkpoint import read_checkpoint\n"
        f"read_checkpoint({str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# -- files that would cost without end -------------------------------------------------------------

COSTLY = {
    # one tuple twice in the next, 60 times over: its hash takes 2^60 steps
    "a tuple of doubled tuples as a key": b"}K\x01K\x02\x86" + b"2\x86" * 60 + b"K\x01s.",
    "the same in SETITEMS": b"}(K\x01K\x02\x86" + b"2\x86" * 60 + b"K\x01u.",
    "the same in DICT": b"(K\x01K\x02\x86" + b"2\x86" * 60 + b"K\x01d.",
    "the same in a set": b"\x8f(K\x01K\x02\x86" + b"2\x86" * 60 + b"\x90.",
    "the same in a frozen set": b"(K\x01K\x02\x86" + b"2\x86" * 60 + b"\x91.",
    "a tuple 500,000 deep as a key": b"})" + b"\x85" * 500_000 + b"K\x01s.",
    "integers of one hash as keys": b"}("
    + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(2, 20_000)
    )
    + b"u.",
    "more steps than a checkpoint has": b"(" + b"}" * 1_500_000 + b"l.",
    "a pickle longer than a checkpoint's": b"X" + (9 << 20).to_bytes(4, "little") + bytes(9 << 20),
    "an integer of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "strings of 2^34 bytes": b"\x8d" + (2**34).to_bytes(8, "little") + b".",
    "an array of 2^34 bytes": b"\x96" + (2**34).to_bytes(8, "little") + b".",
    "a memo entry 2^20": b"Nr\x00\x00\x10\x00.",
}

BOUNDED = """
import resource, sys, time
from tumorsynth.generators.checkpoint import CheckpointError, read_checkpoint
for path in sys.argv[1:]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_checkpoint(path)
        print("read")
    except CheckpointError:
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(time.process_time() - began, (after - before) / 1024)
"""


def test_costly_files_are_refused_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """In a process of its own: one that stalls is killed by the timeout."""
    paths = [
        str(archive(tmp_path / f"{k}.pt", b"\x80\x05" + body))
        for k, body in enumerate(COSTLY.values())
    ]
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *paths],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    for kind, line in zip(COSTLY, done.stdout.splitlines(), strict=True):
        assert line != "read", kind
        seconds, mebibytes = map(float, line.split())
        assert seconds < 10 and mebibytes < 400, (kind, line)


def test_a_tensor_that_repeats_a_value_for_ever_is_not_loaded(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", storage_pickle(shape=(2**30, 2**17), stride=(0, 0)), FOUR)
    found = read_checkpoint(path)  # costs nothing until it is asked for
    with pytest.raises(CheckpointError, match="out of 16 stored bytes"):
        found.load()


def test_what_was_checked_of_a_tensor_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD after the checks, with another shape, storage key or archive."""
    data = storage_pickle()[:-1] + b"}X\x05\x00\x00\x00shapeK\x09\x85sb."
    with pytest.raises(CheckpointError, match="cannot be changed"):
        read_checkpoint(archive(tmp_path / "x.pt", data, FOUR))


def test_a_part_of_a_storage_does_not_keep_the_whole(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100_000.0)[5:7]}, tmp_path / "x.pt")
    part = read_checkpoint(tmp_path / "x.pt")["a"].load()
    assert part.tolist() == [5, 6] and part.untyped_storage().nbytes() == 8


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tumorsynth.generators.checkpoint.MAX_ZIP_ENTRIES", 5)
    entries = {f"a/data/{k}": b"" for k in range(5)}
    with pytest.raises(CheckpointError, match="more than 5 entries"):
        read_checkpoint(archive(tmp_path / "x.pt", pickle.dumps({}, 2), entries))
