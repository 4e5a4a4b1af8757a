"""`vit2dpe report`: one page of one study or several."""

from __future__ import annotations

from .options import parse, parser


def report(args: list[str]) -> int:
    options = parser("vit2dpe report", "One HTML page, without a network, of one study or several.")
    options.add_argument("runs", nargs="+", help="folders of studies, each with its results.csv")
    options.add_argument("--out", default="report.html", type=str, help="the page to write")
    values = parse(options, args)
    from ..study.html import merge

    print(merge(values["runs"], values["out"]))
    return 0
