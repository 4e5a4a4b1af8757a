"""What mkdocs needs to know of pages outside docs/: the README is the first page, results and contributing come along.

Links are written so that they hold in the repository; here they are turned into those of the site. Notebooks become
pages as they were executed.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "recipes/RESULTS.md": "results.md", "CONTRIBUTING.md": "contributing.md"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Decisions and notebooks join the navigation by themselves, in the order of their numbers."""
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    config.nav[-1] = {"Decisions": [f"decisions/{name}" for name in names]}
    at = next(i for i, part in enumerate(config.nav) if "Notebooks" in part)
    config.nav[at] = {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]}
    config.watch += [str(ROOT / name) for name in (*PAGES, "notebooks")]
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in NOTEBOOKS:
        text, pictures = _notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown: its cells, what each printed, and its pictures, by their names."""
    parts, pictures = list[str](), dict[str, bytes]()
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for out in cell.get("outputs", ()):
            data = out.get("data", {"text/plain": out.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                of_images = re.search(r'cmap="gray"|data\.mean', source)
                parts.append(f"![what the cell above drew]({name})" + "{ .as-is }" * bool(of_images))
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif not re.match(r"<\S+ at 0x", "".join(data["text/plain"])):  # what a last line of plotting returns
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == here), here if here.startswith("notebooks/") else f"docs/{here}")
    return LINK.sub(lambda match: _link(match, source, here), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Names in a line of text may be broken behind dots, brackets and slashes, options nowhere."""
    return re.sub(r"(?<!</span>)<code>([^<]*)</code>", lambda code: f"<code>{_breakable(code[1])}</code>", html)


def _breakable(code: str) -> str:
    places = r"--\w[\w.-]*|(?<=[,(=/])(?=[A-Za-z_])|(?<=\w\.)(?=[A-Za-z_]\w{4})"
    return re.sub(places, lambda m: f'<span class="whole">{m[0]}</span>' if m[0] else "<wbr>", code)


def _link(match: re.Match[str], source: str, here: str) -> str:
    """A link as it stands in `source`, for the page `here`; to a file that is no part of the site: its words alone."""
    picture, words, target, anchor = match.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path == "docs/decisions":
        path = sorted((ROOT / "docs" / "decisions").glob("*.md"))[0].relative_to(ROOT).as_posix()
    if path == "notebooks":
        path = f"notebooks/{NOTEBOOKS[0].stem}.md"
    elif (ROOT / path) in NOTEBOOKS:
        path = path.replace(".ipynb", ".md")
    elif path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif (ROOT / path).exists():
        return words if picture or "`" in words else f"`{words}`"
    else:
        return match.group(0)
    return f"{picture}[{words}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor or ''})"
