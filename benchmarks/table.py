"""Rows of the bench as lines and as a Markdown table, each with its goal and whether it was met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# As JSON holds it: settings, `failed` or ratios by name (peer_ours), counts by name and contender (kernels_peer).
Row = dict[str, Any]
KINDS = ("peer", "ours", "limit", "first", "later")


def line(row: Row) -> str:
    """One row on the terminal."""
    head = f"{about(row)}: "
    if "failed" in row:
        found = row.get("gradient_difference", row.get("difference"))
        apart = "" if found is None else f" (relative difference {found:.1e})"
        return f"{head}{row['failed']}{apart}"
    parts = [", ".join(found for found in (ratio(row, kind) for kind in RATIOS) if found)]
    parts += [", ".join(cells(row, name, mib)) for name, mib in COUNTS]
    parts += [row["backend"]] if "ms_ours" in row else []
    return head + "; ".join(part for part in [*parts, verdict(row)] if part)


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table; for a row that failed, the reason."""
    names = ["row", "peer / ours", "ours / limit", "saved MiB", "peak MiB", "buffers MiB", "operations", "wanted"]
    # What a GPU alone measures has columns where it was measured.
    more = [name for name in ON_A_GPU if any(f"{name}_ours" in row for row in rows)]
    backend = ["backend"] if any("ms_ours" in row for row in rows) else []
    names[-1:-1] = [ON_A_GPU[name] for name in more] + backend
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        if "failed" in row:
            wanted = f" {verdict(row)} |" if "open" in row else " |"
            lines.append(f"| {about(row)} | {row['failed']} |" + " |" * (len(names) - 3) + wanted)
            continue
        first = ratio(row, "first_later")
        found = [ratio(row, "peer_ours") or (f"first / later {first}" if first else ""), ratio(row, "ours_limit")]
        counts = {name: ", ".join(cells(row, name, mib)) for name, mib in COUNTS}
        found += [counts[name] for name in ("saved", "peak", "buffers", "kernels", *more)]
        found += [row.get("backend", "") for _ in backend]
        lines.append("| " + " | ".join([about(row), *found, verdict(row)]) + " |")
    return lines


RATIOS = ("peer_ours", "ours_limit", "first_later")
ON_A_GPU = {"allocated": "allocated MiB", "ms": "ms"}
COUNTS = (
    ("kernels", False), ("saved", True), ("peak", True), ("buffers", True), ("allocated", True), ("ms", False),
)  # fmt: skip


def about(row: Row) -> str:
    """The title of a row: model, size, mode, and the settings that differ from the defaults."""
    part = row.get("level", "encoder")
    words = [row["model"], f"{row['height']}x{row['width']}", row["mode"]]
    if part != "encoder":
        words.append(part if row.get("block") is None else f"{part} {row['block']}")
    words += [] if row.get("precision", "float32") == "float32" else [row["precision"]]
    words += ["compiled"] if row.get("compiled") else [row["how"]] if "how" in row else []
    words += [f"batch {row['batch']}"]
    words += [] if row.get("depth") is None else [f"{row['depth']} blocks"]
    return ", ".join(words)


def ratio(row: Row, kind: str) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*row[kind]) if kind in row else ""


def cells(row: Row, name: str, mib: bool) -> list[str]:
    found = [row[f"{name}_{kind}"] for kind in KINDS if f"{name}_{kind}" in row]
    return [f"{value / 2**20:.1f}" if mib else str(value) for value in found]


def verdict(row: Row) -> str:
    """Whether a row meets its goals; one is missed where the whole interval lies on the wrong side."""
    verdicts = []
    for wanted, kind, sign in (("least", "peer_ours", ">="), ("most", "ours_limit", "<=")):
        goal = row.get(wanted)
        if goal is None or (kind not in row and "open" not in row):
            continue
        if "open" in row:
            verdicts.append(f"{kind.replace('_', '/')} {sign} {goal}: open")
            continue
        _, low, high = row[kind]
        missed = high < goal if sign == ">=" else low > goal
        verdicts.append(f"{kind.replace('_', '/')} {sign} {goal}: {'missed' if missed else 'met'}")
    return ", ".join(verdicts)
