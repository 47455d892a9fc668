"""Hooks of the documentation site: README and changelog as pages, pictures from outside docs/.

Pages link to files of the repository as they lie there, so that both a checkout and the site show
them; here such links become links within the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages that lie elsewhere in the repository, by their place in the site.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
# A link to a file of the repository: in an overview from its root, in docs/ from there.
LINK = re.compile(r"(\]\()((?:\.\./)?)([\w./-]+)((?:#[\w-]+)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside docs/."""
    for place, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    for folder in ("bench/results", "train/results"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".png", ".md"):
                place = str(path.relative_to(ROOT))
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links within the site; drop those it lacks."""
    place = page.file.src_uri

    def inside(match: re.Match[str]) -> str:
        before, up, path, after = match.groups()
        if place in PAGES:
            target = path.removeprefix("docs/")
        elif up:
            target = path
        else:
            return match[0]
        target = {source: page for page, source in PAGES.items()}.get(target, target)
        if files.get_file_from_path(target) is None:
            return f"{before}#{after}"
        return f"{before}{target}{after}"

    return LINK.sub(inside, markdown)
