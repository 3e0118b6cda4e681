"""Show the pictures of benchmarks/results, which lie outside docs/, on the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
