"""The docs and the README: every Python block runs, the site builds, messages are real."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

import tumorsynth as ts

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
NEEDS = {
    "monai": "monai",
    "evaluation": "monai",
    "torchio": "torchio",
    "nnunet": "nnunetv2",
    "lightning": "lightning",
}


def python_of(page: Path) -> str:
    """The page with all but its Python blocks blanked: errors name the page's own lines."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        if fence:
            inside = line == "```python"
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


WITH_CODE = [p for p in PAGES if python_of(p).strip()]


@pytest.fixture(scope="module")
def make_phantom_once():
    """Pages share phantoms: making them would take most of the time."""
    made = functools.cache(ts.make_phantom)

    def make_phantom(**options):
        ct = made(**options)
        return ts.Phantom(ct.image.clone(), ct.label.clone(), ct.spacing, ct.affine.copy())

    return make_phantom


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.stem)
def test_code_blocks_run(page, tmp_path, monkeypatch, make_phantom_once, capsys):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason=f"the page needs {NEEDS[page.stem]}")
    if page.name == "README.md":
        for framework in ("monai", "torchio", "lightning"):
            pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ts, "make_phantom", make_phantom_once)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": page.stem})
    if page.stem == "monai":  # the first thing that a reader sees is a tumour
        assert int(capsys.readouterr().out.splitlines()[0].split()[-1]) > 50


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


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=lambda p: p.stem)
def test_relative_links_lead_somewhere(page):
    """mkdocs checks the links of docs/."""
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
    quoted = re.findall(r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text(), flags=re.M)
    assert len(quoted) > 10
    real = messages()
    unknown = [q for q in quoted if not any(q in message for message in real)]
    assert not unknown, f"no code says {unknown}: has the message changed?"


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_the_pages_name_the_versions_of_the_matrix(row):
    page = DOCS / f"{row.name.split()[0]}.md"
    for requirement in row.requirements:
        if requirement.startswith(f"{row.package}=="):
            assert requirement.partition("==")[2] in page.read_text()


def test_figures_have_a_source():
    """Times and speeds are quoted from committed JSON alone, so the pages name none."""
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        found = re.search(r"\b\d+(\.\d+)? ?(ms\b|seconds\b|x faster|times faster)", prose)
        assert found is None, f"{page.name}: {found.group()}"
