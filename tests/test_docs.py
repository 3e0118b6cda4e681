"""Docs and README: the docs' Python blocks run, the site builds, messages and versions are real."""

from __future__ import annotations

import ast
import functools
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

import tumorsynth as ts
from tumorsynth.placement.types import SkipCode

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
NEEDS = {
    "monai": "monai",
    "evaluation": "monai",
    "torchio": "torchio",
    "nnunet": "nnunetv2",
    "lightning": "lightning",
    "reliability": "nibabel",
}


def python_of(page: Path) -> str:
    """Return the page with all but its Python blocks blanked: errors name the page's lines."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        if fence:
            inside = line == "```python"
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


README = ROOT / "README.md"
# a constructor's name and one of its defaults
SIGNATURES = [
    r"SynthesizeTumor\(.*?gap_mm: float = 2\.0",
    r"Gate\(.*?tries: int = 3",
    r"Scaled\(.*?a_max: float = 250",
    r"ZScore\(",
    r"HU\(",
    r"MassEffect\(.*?capsule: str = ",
    r"ContrastPrior\(.*?hypo",
    r"make_phantom\(.*?seed: int = 0",
    r"load_generator\(.*?device",
    r"RandSynthesizeTumord\(\n(?: [^\n]*\n)*? +prob: float = 1\.0,\n(?: [^\n]*\n)*? +size_mm: ",
    r"TumorSynthCallback\(\n(?: [^\n]*\n)*? +p: float = 1\.0,\n(?: [^\n]*\n)*? +size_mm: ",
    r"TumorGenerator",
]
# the README's blocks run in test_package.py
WITH_CODE = [p for p in PAGES if p != README and python_of(p).strip()]


@pytest.fixture(scope="module")
def make_phantom_once():
    """Share phantoms between pages: making them would take most of the time."""
    made = functools.cache(ts.make_phantom)

    def make_phantom(**options):
        ct = made(**options)
        return ts.Phantom(ct.image.clone(), ct.label.clone(), ct.spacing, ct.affine.copy())

    return make_phantom


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.stem)
def test_code_blocks_run(page, tmp_path, monkeypatch, make_phantom_once, capsys):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason=f"the page needs {NEEDS[page.stem]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ts, "make_phantom", make_phantom_once)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": page.stem})
    if page.stem == "monai":  # the first line that a reader sees counts tumour voxels
        assert int(capsys.readouterr().out.splitlines()[0].split()[-1]) > 50


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) < 150
    assert text.count("img.shields.io") <= 2  # loaded from elsewhere


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_a_page_starts_with_a_snippet(page):
    lines = page.read_text().splitlines()
    assert any(line.startswith("```") for line in lines[:24]), "a task, then a snippet"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_json_blocks_parse(page):
    for block in re.findall(r"^```json\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
        json.loads(block if block.lstrip().startswith("{") else "{" + block + "}")


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert "equivalent diameter" in api  # a docstring has come through
    text = html.unescape(re.sub(r"<[^>]+>", "", api))
    roles = re.findall(r":(?:class|func|meth|attr|mod):", text)
    assert not roles, f"{len(roles)} Sphinx roles: write `name` in docstrings"
    assert '<details class="example"' not in api, "docstrings need Examples:, not Example:"
    assert "Raises:" in text and "Returns:" in text
    for signature in SIGNATURES:
        assert re.search(signature, text, flags=re.S), f"no {signature} on the API page"
    for file in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(http[^"]+)', file.read_text())
        loaded += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(http[^"]+)', file.read_text())
        assert not loaded, f"{file.name} loads {loaded} from elsewhere"
        assert 'class="mermaid"' not in file.read_text()  # its renderer is loaded from elsewhere


@pytest.mark.parametrize(
    "page",
    [README, *(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md"))],
    ids=lambda p: p.parent.name + p.stem,
)
def test_relative_links_lead_somewhere(page):
    """Check what mkdocs does not: it checks the links of docs/."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def messages() -> list[str]:
    """Every string of the source, with … where a value is put in."""
    found = []
    for file in (ROOT / "tumorsynth").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_real_messages():
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [
        one for line in re.findall(r"^## `(.+)`$", page, flags=re.M) for one in line.split("`, `")
    ]
    assert len(quoted) > 10
    real = messages()
    unknown = [q for q in quoted if not any(q in message for message in real)]
    assert not unknown, f"no code says {unknown}: has the message changed?"


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_the_pages_name_the_versions_of_the_matrix(row):
    pages = [DOCS / "compatibility.md"]
    if (DOCS / f"{row.name.split()[0]}.md").exists():
        pages.append(DOCS / f"{row.name.split()[0]}.md")
    for requirement in row.requirements:
        if requirement.startswith(f"{row.package}=="):
            for page in pages:
                assert requirement.partition("==")[2] in page.read_text(), page.name


def test_compatibility_names_the_lowest_versions():
    page = (DOCS / "compatibility.md").read_text()
    for line in (ROOT / "tests" / "floors.txt").read_text().splitlines():
        if "==" in line:
            package, version = line.split("==")
            assert f"| {package} | {version} |" in page


def test_every_figure_of_the_benchmarks_names_a_committed_json():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"`(?:results/)?(\w+\.json)`", text))
    patterns = {"mixed.json", "session.json"}  # written elsewhere
    assert len(named) > 20
    assert {n for n in named - patterns if not (ROOT / "benchmarks/results" / n).exists()} == set()


def test_the_report_page_names_every_skip_code():
    page = (DOCS / "report.md").read_text()
    assert all(f"| `{code.value}` |" in page for code in SkipCode)


def fields_of(heading: str) -> set[str]:
    """Return the fields that the report page lists under a heading; every cell is filled."""
    page = (DOCS / "report.md").read_text()
    section = page.partition(f"# {heading}\n")[2].split("\n#")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert rows and all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_the_report_page_lists_the_fields_that_reports_have(phantom, tmp_path):
    pytest.importorskip("nibabel")
    from tumorsynth.commands.main import main
    from tumorsynth.scans import nifti

    calls = (
        {"gate": True},
        {"gate": ts.Gate(visibility=(1e6, 1e7))},
        {"organ_labels": 99},
        {"contrast_hu": "liver"},
    )
    found, tumors = {"loader"}, set()  # that one is Lightning's, tested there
    for settings in calls:
        fixed = {"organ_labels": 1, "tumor_label": 20, "count": 1, "size_mm": 12}
        synth = ts.SynthesizeTumor("hu2023", **{**fixed, **settings})
        synth(phantom.image, phantom.label, spacing=phantom.spacing, seed=0)
        found |= {name for entry in synth.report for name in entry}
        tumors |= {name for one in synth.params for tumor in one["tumors"] for name in tumor}
    synth = ts.SynthesizeTumor("hu2023", 1, 20, count=1, size_mm=12, mass_effect=0.3)
    synth(phantom.image, phantom.label, spacing=phantom.spacing, seed=0)
    grown = synth.grow(synth.params, 1.2)
    synth(phantom.image, phantom.label, spacing=phantom.spacing, params=grown)
    found |= synth.report[0].keys()
    tumors |= grown[0]["tumors"][0].keys()
    assert fields_of("Report: one entry a tumour") == found
    assert fields_of("Params of a tumour") == tumors
    for name, array in (("ct", phantom.image), ("label", phantom.label)):
        values = array[0].round().short().numpy()
        volume = nifti.new_volume(name, values, phantom.affine)
        nifti.write_volume(tmp_path / f"a_{name}.nii.gz", volume, values)
    pair = [str(tmp_path / f"a_{name}.nii.gz") for name in ("ct", "label")]
    words = "--generator hu2023 --organ-label 1 --tumor-label 20 --count 1".split()
    words += ["--geometry", "sform", "--follow-up", "1"]
    assert main(["synthesize", *pair, "-o", str(tmp_path / "out"), *words]) == 0
    report = json.loads((tmp_path / "out" / "a_t0_report.json").read_text())
    again = ["-o", str(tmp_path / "again"), "--other-phase", pair[0]]
    assert main(["replay", str(tmp_path / "out" / "a_t0_report.json"), *pair, *again]) == 0
    report |= json.loads((tmp_path / "again" / "a_report.json").read_text())
    of_layouts = {"organs", "masks", "segmentation"}  # commands/test_layouts_cli, test_segment
    assert fields_of("The file of the command line") == report.keys() | of_layouts


def test_why_the_reports_centre_and_feather_are_not_the_params(phantom):
    settings = {"count": 3, "size_mm": (8, 30), "contrast_hu": -60}
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20, **settings)
    for seed in range(4):
        _, label = synth(phantom.image, phantom.label, spacing=phantom.spacing, seed=seed)
        for entry in synth.report:
            if not entry["applied"]:
                continue
            params = next(p for p in synth.params[0]["tumors"] if p["seed"] == entry["seed"])
            assert label[(0, *entry["centre_voxel"])] == 20
            assert entry["sigma_mm"] >= params["sigma_mm"]
            assert entry["requested_diameter_mm"] == params["drawn_mm"]


def test_figures_have_a_source():
    """Times and speeds are quoted from committed JSON alone, so the pages name none."""
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        found = re.search(r"\b\d+(\.\d+)? ?(ms\b|seconds\b|x faster|times faster)", prose)
        assert found is None, f"{page.name}: {found.group()}"
