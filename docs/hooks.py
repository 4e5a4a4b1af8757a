"""What mkdocs needs to know of pages outside docs/: the README is the first page, results and contributing come along.

Links are written so that they hold in the repository; here they are turned into those of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "recipes/RESULTS.md": "results.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """The decisions join the navigation by themselves, in the order of their numbers."""
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    config.nav[-1] = {"Decisions": [f"decisions/{name}" for name in names]}
    config.watch += [str(ROOT / name) for name in PAGES]
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = next((s for s, p in PAGES.items() if p == page.file.src_uri), f"docs/{page.file.src_uri}")
    return LINK.sub(lambda match: _link(match, source, page.file.src_uri), markdown)


def _link(match: re.Match[str], source: str, here: str) -> str:
    """A link as it stands in `source`, for the page `here`; to a file that is no part of the site: its words alone."""
    picture, words, target, anchor = match.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path == "docs/decisions":
        path = sorted((ROOT / "docs" / "decisions").glob("*.md"))[0].relative_to(ROOT).as_posix()
    if path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif (ROOT / path).exists():
        return words if picture else f"{words}" if "`" in words or "](" in words else f"`{words}`"
    else:
        return match.group(0)
    return f"{picture}[{words}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor or ''})"
