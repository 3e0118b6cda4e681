"""benchmarks/reliability/golden_calls.py: a record agrees with itself; an altered one does not."""

from __future__ import annotations

import copy
import json

import pytest

golden_calls = pytest.importorskip(
    "benchmarks.reliability.golden_calls", reason="needs the benchmarks beside the tests"
)

CHEAP = [
    "core: hu2023, oblique",
    "core: hu2023, Scaled",
    "core: hu2023, batch of spacings",
    "core: skip, no room",
    "core: wrong arguments",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    file = tmp_path_factory.mktemp("golden") / "before.json"
    golden_calls.record(file, CHEAP, timed=False)
    return file


@pytest.fixture
def document(recorded):
    return json.loads(recorded.read_text())


def compared(document, recorded, capsys, **options):
    """Exit code and lines of a comparison with an altered record."""
    altered = recorded.with_name("altered.json")
    altered.write_text(json.dumps(document))
    folder = golden_calls.kept_folder(altered)
    if not folder.exists():
        folder.symlink_to(golden_calls.kept_folder(recorded))
    code = golden_calls.compare(altered, CHEAP, timed=False, **options)
    return code, capsys.readouterr().out.splitlines()


def test_a_record_agrees_with_itself(recorded, document, capsys):
    assert list(document["calls"]) == CHEAP
    made = document["calls"][CHEAP[0]]
    assert any(r["applied"] for r in made["report"]) and made["replay"]["image"] == made["image"]
    code, lines = compared(document, recorded, capsys)
    assert code == 0 and lines == [f"{len(CHEAP)} calls, 0 differ or have new keys"]


def test_each_kind_of_change_is_found_by_name(recorded, document, capsys):
    calls = document["calls"]
    calls[CHEAP[0]]["image"]["sha256"] = "0" * 64
    calls[CHEAP[1]]["report"][0]["hu_change"] += 1e-12
    calls[CHEAP[2]]["params"][0]["gone"] = 1
    calls[CHEAP[3]]["report"][0]["reason"] = "too little room"
    code, lines = compared(document, recorded, capsys)
    assert code == 1 and len(lines) == 5
    assert lines[0] == f"{CHEAP[0]}: image"
    assert lines[1].startswith(f"{CHEAP[1]}: report[0].hu_change -")
    assert lines[2] == f"{CHEAP[2]}: params[0].gone missing"
    assert lines[3].startswith(f'{CHEAP[3]}: report[0].reason "too little room" -> "no room')


def test_changed_words_and_calls_that_raise(recorded, document, capsys, monkeypatch):
    document["calls"][CHEAP[3]]["report"][0]["reason"] = "too little room"
    code, lines = compared(document, recorded, capsys, allow_words=True)
    assert code == 0 and len(lines) == 2
    monkeypatch.setitem(golden_calls.CALLS, CHEAP[4], lambda place: 1 / 0)
    code, lines = compared(document, recorded, capsys, allow_words=True)
    assert code == 1 and "missing" in lines[1] and len(lines) == 3


def test_a_new_key_is_no_failure_and_a_lost_one_is(document):
    old = document["calls"]
    new = copy.deepcopy(old)
    for record in new[CHEAP[0]]["report"]:
        record["code"] = "placed"
    lines, failed = golden_calls.compare_results(old, new)
    assert not failed and lines == [f"{CHEAP[0]}: new key report.code"]
    lines, failed = golden_calls.compare_results(new, old)
    assert failed and "report[0].code missing" in lines[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [(1, 1.0), (1, True), (None, 0), ("a", None), ([1], [1, 2]), (0.1, 0.1 + 2**-56), (0.0, -0.0)],
)
def test_values_that_python_takes_for_equal_are_told_apart(old, new):
    assert golden_calls.differences({"a": old}, {"a": new})
    assert not golden_calls.differences({"a": old}, {"a": old})


def test_nothing_is_recorded_over_a_record(recorded):
    with pytest.raises(SystemExit, match="exists"):
        golden_calls.record(recorded, CHEAP[:1], timed=False)
