"""Code in README and docs runs, links lead somewhere, tables name every function's formula."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from dcconv.operator.functions import angulars, magnitudes, weightings

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
OPERATOR = TEXTS["docs/operator.md"]
SNIPPETS = {
    f"{name}-{i}": code
    for name, text in TEXTS.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
README_LINES = 200


@pytest.mark.parametrize("name", SNIPPETS)
def test_code_runs(name: str) -> None:
    subprocess.run([sys.executable, "-c", SNIPPETS[name]], check=True, cwd=ROOT)


def test_there_are_snippets() -> None:
    assert {"README.md-0", "README.md-1", "docs/strategies.md-0"} <= set(SNIPPETS)


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= README_LINES


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXTS[name])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_page_is_linked() -> None:
    listed = set(re.findall(r"\]\((docs/[\w./-]+\.md)\)", TEXTS["README.md"]))
    assert {name for name in TEXTS if name.startswith("docs/")} == listed


@pytest.mark.parametrize("name", [*magnitudes, *angulars])
def test_every_function_has_a_row(name: str) -> None:
    rows = {
        record.formula
        for table in (magnitudes, angulars)
        for record in table.values()
        if record.name == name
    }
    for formula in rows:
        assert f"| `{name}` | {formula} |" in OPERATOR


@pytest.mark.parametrize("name", weightings)
def test_every_weighting_has_a_row(name: str) -> None:
    assert f"| `{name}` | {weightings[name].formula}" in OPERATOR


def test_every_cited_section_of_the_specification_is_there() -> None:
    headings = re.findall(r"^##+ ([0-9.]+)", TEXTS["docs/specification.md"], re.MULTILINE)
    sections = {heading.rstrip(".") for heading in headings}
    cited = {
        (section, str(path.relative_to(ROOT)))
        for folder in ("dcconv", "train", "bench", "tests", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu") and path != Path(__file__)
        for section in re.findall(
            r"\bspec (?:section )?([0-9]+(?:\.[0-9]+)?)", path.read_text(encoding="utf-8")
        )
    }
    assert len(cited) > 10
    assert {pair for pair in cited if pair[0] not in sections} == set()
