"""Fills the tables of RESULTS.md and draws docs/study.png: `python recipes/build_results.py`.

A line `<!-- table: NAME -->` in RESULTS.md opens a block that `<!-- end -->` closes; between them stands what the csv
file of results/NAME says. `<!-- claims: NAME -->` opens the verdicts on the claims that were written down before that
study ran, `<!-- bench: NAME -->` the rows of benchmarks/results/NAME. Nothing outside the marks is touched. Several
seeds are told as their mean ± half of a 95% t-interval.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import statistics
from pathlib import Path

from scipy.stats import t as student

from benchmarks import gpu_speed, real_weights
from benchmarks.table import markdown
from recipes.claims import Difference, claims, half_interval, half_of_deviation, paired, verdict
from vit2dpe.spec import split_words
from vit2dpe.study import report
from vit2dpe.study.rows import Row, read_rows

HERE = Path(__file__).parent
PAGE, RESULTS, PICTURE = HERE / "RESULTS.md", HERE / "results", HERE.parent / "docs" / "study.png"
BENCH = HERE.parent / "benchmarks" / "results"
PICTURED = "study_digits"  # the study that the README shows
BLOCK = re.compile(r"(<!-- (table|claims|bench): (\w+) -->\n).*?(<!-- end -->)", flags=re.S)

# What `--encodings all` was when the studies here ran; an encoding that came later is not missing in them.
ALL = (
    "none,learned,windowed,sincos,factorized,fourier,relative,logcpb,t5,alibi,lookhere,fire,rope,rope_mixed,"
    "rope_golden,rope_dinov3"
)


def page(text: str, results: Path = RESULTS) -> str:
    """RESULTS.md with every marked block filled anew."""

    def fill(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        found = bench(BENCH / name) if kind == "bench" else (claims if kind == "claims" else table)(results / name)
        return f"{begin}{found}\n{end}"

    return BLOCK.sub(fill, text)


def bench(folder: Path) -> str:
    """The rows of a folder that `vit2dpe bench` wrote, file by file; two folders have tables of their own."""
    if folder.name == "gpu":
        return gpu_speed.table(folder)
    if folder.name == "real_weights":
        return real_weights.markdown(folder / "rows.jsonl")
    return "\n".join(
        markdown([row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())["rows"]])
    )


def table(folder: Path) -> str:
    if (folder / "mae.csv").is_file():
        return _mae_table(folder)
    if (folder / "against.csv").is_file():
        return _against_table(folder)
    if (folder / "tune.csv").is_file():
        return _tune_table(folder)
    if (folder / "swap.csv").is_file():
        return _swap_table(folder)
    if (folder / "frames.csv").is_file():
        return _frames_table(folder)
    rows = read_rows(folder / "results.csv")
    return f"{_seeds_of(rows, folder)}\n\n{report.table(rows, spread=half_interval)}"


def _seeds_of(rows: list[Row], folder: Path) -> str:
    """What of the planned study is there: which encodings with how many seeds, and on how many images."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row.encoding, set()).add(int(row.seed or 0))
    told = json.loads((folder / "env.json").read_text())["config"]["encodings"]
    planned = split_words(ALL if told == "all" else told)
    counts = {word: len(found) for word, found in seeds.items()}
    most = max(counts.values())
    fewer = [f"`{word}` has {n}" for word, n in counts.items() if n < most]
    missing = [f"`{word}`" for word in planned if word not in seeds]
    many = [f"{count} {word}{'s' * (count > 1)}" for count, word in ((len(seeds), "encoding"), (most, "seed"))]
    said = [f"{', '.join(many)}, {int(rows[0].n or 0):,} test samples"]
    if most > 1:
        said[0] += "; mean ± half of a 95% t-interval over the seeds"
    if fewer:
        said.append(f"Fewer seeds: {', '.join(fewer)}")
    if missing:
        said.append(f"Not finished: {', '.join(missing)}")
    return ". ".join(said) + "."


def _mae_table(folder: Path) -> str:
    """A line for each encoding of mae.csv: labels alone against pretraining first, and the probes."""
    with (folder / "mae.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("scratch_top1", "finetuned_top1", "gain", "linear_top1", "knn_top1", "pretrain_test_loss")
    heads = ("from scratch", "MAE, finetuned", "gain", "linear probe", "k-NN", "loss on hidden test patches")
    lines = ["| " + " | ".join(("encoding", *heads)) + " |", "|---|" + "---:|" * len(heads)]
    for word in dict.fromkeys(row["encoding"] for row in rows):
        mine = [{k: float(v) for k, v in r.items() if k in columns} for r in rows if r["encoding"] == word]
        values = {key: [r[key] for r in mine] for key in columns if key != "gain"}
        values["gain"] = [r["finetuned_top1"] - r["scratch_top1"] for r in mine]
        forms = [{"gain": "+.1f", "pretrain_test_loss": ".3f"}.get(key, ".1f") for key in columns]
        cells = [_told(values[key], form) for key, form in zip(columns, forms, strict=True)]
        lines.append("| " + " | ".join([f"`{word}`", *cells]) + " |")
    return "\n".join(lines)


def _against_table(folder: Path) -> str:
    """A line for each model of against.csv, and the difference between the first and the second with its interval."""
    with (folder / "against.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    heads = ("seeds", "top-1", "of each seed", "top-5", "test loss", "training loss", "processor time [s]")
    lines = ["| " + " | ".join(("model", *heads)) + " |", "|---|" + "---:|" * len(heads)]
    of = {model: [row for row in rows if row["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)}
    for model, mine in of.items():
        mean = {k: statistics.mean(float(r[k]) for r in mine) for k in rows[0] if k not in ("model", "seed")}
        each = ", ".join(f"{float(row['test_top1']):.2f}" for row in mine)
        cells = [f"{len(mine)}", f"{mean['test_top1']:.2f}", each, f"{mean['test_top5']:.2f}"]
        cells += [f"{mean['test_loss']:.3f}", f"{mean['train_loss']:.3f}", f"{mean['cpu_s']:.0f}"]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    (one, a), (other, b) = ((model, [float(row["test_top1"]) for row in mine]) for model, mine in of.items())
    said = f"{one} − {other}: {statistics.mean(a) - statistics.mean(b):+.2f} points of top-1"
    if len(a) + len(b) < 3:
        return "\n".join([*lines, "", f"{said}; one seed each gives no interval."])
    mean, half = difference(a, b)
    return "\n".join([*lines, "", f"{said}, 95% interval {mean - half:+.2f} to {mean + half:+.2f} over the seeds."])


def _frames_table(folder: Path) -> str:
    """A line for each encoding and policy of frames.csv, and the judgement on the claims of `video_frames.py`."""
    with (folder / "frames.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    at: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        at.setdefault((row["encoding"], row["policy"], int(row["frames"])), {})[row["seed"]] = float(row["top1"])
    first, *more = frames = sorted({number for _, _, number in at})
    lines = [
        f"| encoding | policy | {' | '.join(f'{n} frames' for n in frames)} |",
        "|---|---|" + "---:|" * len(frames),
    ]
    for word, policy in dict.fromkeys((word, policy) for word, policy, _ in at):
        cells = [_told(list(at[word, policy, number].values()), ".1f") for number in frames]
        lines.append(f"| `{word}` | {policy} | {' | '.join(cells)} |")

    def less(what: str, number: int, a: tuple[str, str], b: tuple[str, str]) -> Difference:
        return paired(what, number / first, at[(*a, number)], at[(*b, number)])

    default = {word: policy for word, policy, _ in reversed(at)}
    blind = [
        Difference(f"60% − `{word}`", 1, [60 - x for x in at[word, default[word], first].values()])
        for word in ("none", "alibi")
    ]
    table = ("learned", default["learned"])
    claims = [
        blind,
        [less("`t5` − `learned`", more[-1], ("t5", default["t5"]), table)],
        [less("`rope` interpolated − extrapolated", more[-1], ("rope", "interpolate"), ("rope", "extrapolate"))],
    ]
    judged = []
    for number, differences in enumerate(claims, 1):
        told = "; ".join(f"{one.what}: {_told(one.by_seed, '+.1f')}" for one in differences)
        judged.append(f"- Claim {number}: {verdict(differences)} ({told}).")
    seeds, n = len({row["seed"] for row in rows}), int(rows[0]["n"])
    error = 100 * math.sqrt(0.25 / n)
    head = (
        f"Top-1 in percent of {n:,} test videos (standard error at most {error:.1f}), {seeds} seeds; mean ± half of a "
    )
    return "\n".join([head + "95% t-interval.", "", *lines, "", *judged])


def _tune_table(folder: Path) -> str:
    """A line for each model and size of tune.csv, and the judgement on the claim of `tune_against_labels.py`."""
    with (folder / "tune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    heads = ("epoch", "size", "images", "at its own size", "as it is", "tuned", "with labels", "gain with labels")
    lines = ["| model | " + " | ".join((*heads, "gain of tune")) + " | tuned to |"]
    lines.append("|---|" + "---:|" * (len(heads) + 1) + "---|")
    said, kept = 0, 0
    for row in rows:
        gain, error, ours = (float(row[name]) for name in ("labels_gain", "labels_error", "tuned_gain"))
        if judged := gain > 2 * error:
            said, kept = said + 1, kept + (ours >= 0.9 * gain)
        top1 = [f"{float(row[f'{name}_top1']):.1f}" for name in ("native", "default", "tuned", "labels")]
        cells = [row["epoch"] or "1", f"{row['size']} of {row['train_size']}", row["n_test"], *top1]
        cells += [f"{gain:+.1f} ± {2 * error:.1f}" + ("" if judged else ", not judged"), f"{ours:+.1f}"]
        tuned = row["tuned_policy"] + ("" if row["tuned_temperature"] == "none" else f", {row['tuned_temperature']}")
        choice = f"`{tuned}`" if row["helps"] == "True" else "nothing"
        lines.append("| " + " | ".join([row["name"], *cells, choice]) + " |")
    claim = (
        f"The gain with labels exceeds two standard errors in {said} of {len(rows)}; of those the gain of tune is at "
    )
    return "\n".join([*lines, "", f"{claim}least 90% of it in {kept}."])


def _swap_table(folder: Path) -> str:
    """A line for each model, encoding and size of swap.csv: means over seeds, and the paired interval of the gain."""
    with (folder / "swap.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    heads = ("times the side", "seeds", "old", "swapped", "recovered", "recovered − old", "95% over seeds", "images")
    lines = ["| " + " | ".join(("model", "to", *heads)) + " |", "|---|---|" + "---:|" * len(heads)]
    for model, to, by in dict.fromkeys((row["model"], row["to"], row["by"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["to"], row["by"]) == (model, to, by)]
        old, swapped, recovered = ([float(row[kind]) for row in mine] for kind in ("old", "swapped", "recovered"))
        gains = [after - before for after, before in zip(recovered, old, strict=True)]
        mean, interval = statistics.mean(gains), "one seed"
        if len(gains) > 1:
            least = 100 / float(mine[0]["n"])  # a deviation of one image
            half = max(half_interval(gains), half_of_deviation(least, len(gains)))
            interval = f"{mean - half:+.2f} to {mean + half:+.2f}"
        cells = [by, f"{len(mine)}", *(f"{statistics.mean(kind):.2f}" for kind in (old, swapped, recovered))]
        cells += [f"{mean:+.2f}", interval, mine[0]["n"]]
        lines.append("| " + " | ".join([model, f"`{to}`", *cells]) + " |")
    return "\n".join(lines)


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """mean(a) - mean(b) and half of its 95% interval: Student's, of two samples of one variance."""
    degrees = len(a) + len(b) - 2
    squares = sum((x - statistics.mean(values)) ** 2 for values in (a, b) for x in values)
    error = math.sqrt(squares / degrees * (1 / len(a) + 1 / len(b)))
    return statistics.mean(a) - statistics.mean(b), float(student.ppf(0.975, degrees)) * error


def _told(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(half_interval(values), form.lstrip('+'))}" if len(values) > 1 else mean


def draw(results: Path = RESULTS, path: Path = PICTURE) -> None:
    """The README's picture; it carries the digest of what it was drawn from."""
    figure = report.draw(read_rows(results / PICTURED / "results.csv"))
    figure.savefig(path, dpi=110, metadata={"Source": digest(results), "Software": None})


def digest(results: Path = RESULTS) -> str:
    return f"{PICTURED} {hashlib.sha256((results / PICTURED / 'results.csv').read_bytes()).hexdigest()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    draw()
    print(PAGE, PICTURE, sep="\n")
