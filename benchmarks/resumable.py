"""Rows of results in a file of JSON lines: what is there is not measured again, and nothing begins past a deadline."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

Fact = str | float | bool | None | list["Fact"] | dict[str, "Fact"]


class Rows:
    """A file of rows {"row": name, facts...}, one a line, written when each is done.

    Args:
        path: the file; what an earlier run wrote stays.
        seconds: after which no further row is begun.
    """

    def __init__(self, path: Path, seconds: float = float("inf")) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: dict[str, dict[str, Fact]] = {row["row"]: row for row in map(json.loads, lines)}
        self.left_out: list[str] = []

    def once(self, name: str, measure: Callable[[], Mapping[str, Fact]]) -> None:
        """Measure a row that is not there yet; an error becomes its fact, and the next row goes on."""
        if name in self.rows:
            return
        if time.monotonic() > self.end:
            self.left_out.append(name)
            return
        began = time.perf_counter()
        try:
            facts: dict[str, Fact] = dict(measure())
        except Exception as error:
            message = (str(error).splitlines() or [""])[0][:200]
            last = traceback.extract_tb(error.__traceback__)[-1]
            facts = dict(failed=f"{type(error).__name__}: {message}", at=f"{Path(last.filename).name}:{last.lineno}")
        row: dict[str, Fact] = {"row": name} | facts | {"seconds": round(time.perf_counter() - began, 2)}
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, {key: value for key, value in row.items() if key != "row"}, flush=True)
