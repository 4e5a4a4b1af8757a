"""What a study's rows say, as a picture: accuracy over size, or over depth."""

from __future__ import annotations

import statistics

from .tables import Row, default_rows, metric_of, over_depth, spell


def draw(rows: list[Row], curves: dict[str, list[tuple[int, float]]] | None = None, status: str = ""):
    """Accuracy over size, a panel a mode, a colour an encoding: solid its default policy, dashed its best other one.

    Before a cell is finished the panel shows the training loss instead.
    """
    from matplotlib.figure import Figure

    if over_depth(rows):
        return _draw_depths(rows, status)
    modes = list(dict.fromkeys(row["mode"] for row in rows)) or [""]
    figure = Figure(figsize=(6.2 * len(modes) + 1.6, 5), layout="constrained")
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    if not rows:
        for name, curve in (curves or {}).items():
            axes[0].plot(*zip(*curve, strict=True), label=name)
        axes[0].set(xlabel="step", ylabel="training loss", title="no encoding is finished yet")
        axes[0].legend()
    colours = {word: f"C{i}" for i, word in enumerate(dict.fromkeys(row["encoding"] for row in rows))}
    for ax, mode in zip(axes, modes, strict=True):
        if not rows:
            break
        _panel(ax, [row for row in rows if row["mode"] == mode], colours)
        more = {"scale": ": the same picture with more pixels", "canvas": ": more content at the scale of training"}
        ax.set_title(mode + more.get(mode, ""), fontsize=10)
    if rows:
        axes[0].set_ylabel(metric_of(rows).unit)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(
        f"{metric_of(rows).name} over {metric_of(rows).over}{f' ({status})' if status else ''}", fontsize=11
    )
    return figure


def _draw_depths(rows: list[Row], status: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    ax, metric, shown = figure.subplots(), metric_of(rows), default_rows(rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for i, word in enumerate(dict.fromkeys(row["encoding"] for row in rows)):
        x = [at + 0.03 * i for at in range(len(modes))]  # so that equal lines are told apart
        cells = [[r["value"] for r in shown if (r["encoding"], r["mode"]) == (word, mode)] for mode in modes]
        ax.plot(x, [statistics.mean(v) if v else float("nan") for v in cells], "o-", label=word, ms=4)
    ax.set_xticks(range(len(modes)), [mode.removeprefix("depth ") for mode in modes])
    ax.set(xlabel="depth [blocks]", ylabel=metric.unit, ylim=(-4, 104))
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{metric.name} over depth{f' ({status})' if status else ''}", fontsize=11)
    return figure


def _panel(ax, rows: list[Row], colours: dict[str, str]) -> None:
    import numpy as np

    sizes = sorted({(r["height"], r["width"]) for r in rows}, key=lambda s: s[0] * s[1])
    at = {size: (size[0] * size[1]) ** 0.5 for size in sizes}
    for word, colour in colours.items():
        mine = [row for row in rows if row["encoding"] == word]
        lines = list(dict.fromkeys((row["policy"], row["temperature"]) for row in mine))
        score = {
            line: statistics.mean([r["value"] for r in mine if (r["policy"], r["temperature"]) == line])
            for line in lines
        }
        sign = -1 if metric_of(rows).more_is_better else 1
        shown = lines[:1] + sorted(lines[1:], key=lambda line: sign * score[line])[:1]
        for i, (policy, temperature) in enumerate(shown):
            values = [
                [r["value"] for r in mine if (r["policy"], r["temperature"]) == (policy, temperature)
                 and (r["height"], r["width"]) == size]
                for size in sizes
            ]  # fmt: skip
            mean = np.array([np.mean(v) if v else np.nan for v in values])
            spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
            x = np.array([at[size] for size in sizes])
            label = word if i == 0 else f"{word} · {policy}" + ("" if temperature == "none" else f" · {temperature}")
            ax.plot(x, mean, "o-" if i == 0 else "--", color=colour, label=label, ms=4, lw=1.8 if i == 0 else 1)
            if spread.any():
                ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
    train = rows[0]["train_height"], rows[0]["train_width"]
    ax.axvline((train[0] * train[1]) ** 0.5, color="0.6", lw=1, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks([at[size] for size in sizes], [spell(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel(f"{metric_of(rows).scale}; dotted: training")
    if not metric_of(rows).more_is_better:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
