"""Build the notebooks: `python notebooks/build.py [--execute] [N_name.py ...]`, all of them by default.

The source is a .py in percent format: `# %%` opens a code cell, `# %% [markdown]` a text in comments. Without
`--execute` the outputs of cells that did not change are kept.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def sources() -> list[Path]:
    """The notebooks' sources, in reading order."""
    return sorted(HERE.glob("[0-9]*_*.py"))


def convert(text: str) -> nbformat.NotebookNode:
    """Percent format to a notebook without outputs; the same text gives the same bytes."""
    cells = []
    marks = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]  # what precedes the first mark is for tools
    for index, (kind, body) in enumerate(zip(marks[::2], marks[1::2], strict=True)):
        if kind.strip() == "[markdown]":
            cell = new_markdown_cell(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            cell = new_code_cell(body.strip())
        cell.id = f"cell-{index}"
        cells.append(cell)
    return new_notebook(cells=cells, metadata=KERNEL)


def execute(notebook: nbformat.NotebookNode, timeout: float = 900) -> None:
    """Run all cells in place; an error in one is raised. Nothing of the machine or the clock is recorded."""
    from nbclient import NotebookClient

    # Pictures inline whatever this process draws with; no advice from tqdm, which would name a path of the machine.
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONWARNINGS": "ignore:IProgress not found"}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(HERE), env={**os.environ, **inline})
    notebook.metadata = nbformat.from_dict(KERNEL)  # the kernel wrote its versions into it


def keep_outputs(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Copy from the notebook at `path` what cells of the same source gave when they last ran."""
    old = {cell.source: cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source in old:
            cell.outputs, cell.execution_count = old[cell.source].outputs, old[cell.source].execution_count


def processor_time() -> float:
    """Seconds of this process and of the kernels that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="sources; default: all beside this file")
    parser.add_argument("--execute", action="store_true", help="run every cell and keep what it shows")
    arguments = parser.parse_args(argv)
    for source in arguments.files or sources():
        notebook, path = convert(source.read_text(encoding="utf-8")), source.with_suffix(".ipynb")
        begun, used = time.perf_counter(), processor_time()
        if arguments.execute:
            execute(notebook)
        elif path.exists():
            keep_outputs(notebook, path)
        nbformat.write(notebook, path)
        print(
            f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size / 1024:.0f} kB, "
            f"{time.perf_counter() - begun:.0f} s by the clock, {processor_time() - used:.0f} s of processor time"
        )


if __name__ == "__main__":
    main()
