"""`vit2dpe report`: one page of one study or several."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..spec import Settings, Words


@dataclass(frozen=True)
class ReportConfig(Settings):
    """One HTML page, without a network, of one study or several.

    Args:
        runs: folders of studies, each with its results.csv.
        out: the page to write.
    """

    runs: Words = field(default=(), metadata={"positional": True})
    out: str = "report.html"


def report(config: ReportConfig, command: str = "") -> Path:
    """Write the page, print where it is, and return that."""
    from ..study.html import merge

    if not config.runs:
        raise ConfigError("name the folders of one study or several, each with its results.csv")
    page = Path(merge(list(config.runs), config.out))
    print(page)
    return page
