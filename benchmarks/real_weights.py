"""Trained weights of six families at sizes they were not trained at: policies, `tune`, `swap`, speed and memory.

    python -m benchmarks.real_weights --root <ImageNet> --out runs/real_weights --device cuda

`root` holds class folders in train/ and val/ (or test/), of ImageNet or of some of its classes, named by their wnid.
Labels are used for measuring alone; `tune` and `swap` take images of train/. For each name `out/rows.jsonl` has

    NAME model          what timm's model is, how far ours is from its logits
    NAME 1x, 1.5x, ...  top-1 at that multiple of the sides, by policy and temperature; at 1x timm's own beside it
    NAME tune 1.5x      what `vit2dpe tune` chooses there without labels, and its top-1
    NAME swap           `vit2dpe swap` to another encoding; NAME swap 1x, 1.5x, ...: its top-1
    NAME speed 1x       images a second of a forward pass (on the CPU of processor time), and memory: on a CPU the peak
                        of the whole process, weights included; on CUDA what the pass adds to torch's allocator

A row that is there is not measured again: what was stopped goes on, a swap at its last checkpoint; to measure a row
once more, delete its line. DINOv2 has no classifier: instead of top-1 stands that of k nearest neighbours (k = 20) of
pooled features, those of `--neighbours` images of train/ at its own size, and there is nothing to tune.

`--random` draws small models of the six families, without any download, to see that everything runs.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from benchmarks.gpu_checks import about
from benchmarks.measure import resident_bytes, timed
from benchmarks.resumable import Fact, Rows
from benchmarks.ways import allocated_bytes
from vit2dpe import from_timm, load_run, use_policy
from vit2dpe.data.datasets import load_images
from vit2dpe.models.timm_api import every_policy
from vit2dpe.resolution.sweep import train_size_of
from vit2dpe.spec import Size, Words, show_size
from vit2dpe.study import EvaluateConfig, SwapConfig, TuneConfig, evaluate_model, swap, tune_model
from vit2dpe.study.exchange import scaled_size
from vit2dpe.study.probe import Encoder, features, knn_probe

FACTORS = (1.0, 1.5, 2.0, 3.0)
OPEN = "not measured: needs weights"
MICRO = dict(depth=1, embed_dim=48, num_heads=3)


class Weights(NamedTuple):
    """A name of timm, the encoding that `swap` puts in place of its own, and arguments that make it small."""

    name: str
    to: str
    small: Mapping[str, int | tuple[int, ...]]


SIX = (
    Weights("vit_small_patch16_224.augreg_in21k_ft_in1k", "rope", MICRO | dict(img_size=(32, 48))),
    Weights("deit3_small_patch16_224.fb_in22k_ft_in1k", "rope", MICRO | dict(img_size=(32, 48))),
    Weights("vit_small_patch14_dinov2.lvd142m", "rope", MICRO | dict(img_size=(28, 42))),
    Weights("eva02_small_patch14_336.mim_in22k_ft_in1k", "rope", MICRO | dict(img_size=(28, 42))),
    Weights("vit_small_patch16_rope_mixed_224.naver_in1k", "relative", MICRO | dict(img_size=(32, 48))),
    Weights(
        "swinv2_tiny_window8_256.ms_in1k",
        "relative",
        dict(img_size=(32, 64), embed_dim=24, depths=(1, 1), num_heads=(2, 4), window_size=4),
    ),
)


class Options(NamedTuple):
    """What is measured on; see the options of the command."""

    root: Path
    out: Path
    device: str
    batch: int
    limit: int | None
    images: int | None
    neighbours: int
    epochs: int
    random: bool
    repeats: int = 5


class Subject:
    """One of the six, in folders of its own: theirs/ and ours/ as hub folders, what is tuned, the run of the swap."""

    def __init__(self, of: Weights, options: Options) -> None:
        self.of, self.options = of, options
        self.folder = options.out / of.name
        self.theirs, self.ours, self.swapped = (self.folder / name for name in ("theirs", "ours", "swap"))
        self.val = next((place for name in ("val", "test") if (place := options.root / name).is_dir()), options.root)

    @cached_property
    def model(self) -> nn.Module:
        """Ours, from its folder."""
        return timm.create_model(f"local-dir:{self.ours}", pretrained=True).eval()

    def size(self, factor: float) -> Size:
        return scaled_size(self.model, factor)  # type: ignore[arg-type]

    @torch.inference_mode()
    def build(self) -> dict[str, Fact]:
        """Write theirs/ and ours/; how far the two are apart on noise."""
        torch.manual_seed(0)
        small = dict(self.of.small) if self.options.random else {}
        if small and timm.get_pretrained_cfg(self.of.name).num_classes:
            small["num_classes"] = sum(path.is_dir() for path in self.val.iterdir())
        theirs = timm.create_model(self.of.name, pretrained=not self.options.random, **small).eval()
        for parameter in (
            theirs.parameters() if self.options.random else ()
        ):  # what starts at zero would hide a difference
            parameter.add_(torch.randn_like(parameter) * 0.02)
        ours = from_timm(theirs).eval()
        for model, folder in ((theirs, self.theirs), (ours, self.ours)):
            save_for_hf(model, str(folder), safe_serialization=True)
        height, width = train_size_of(ours)
        images = torch.randn(2, 3, height, width)
        apart, scale = float((ours(images) - theirs(images)).abs().max()), float(theirs(images).abs().max())
        return dict(
            size=show_size((height, width)),
            position=str(timm.models.get_model_args(ours)["position"]),
            parameters=sum(p.numel() for p in ours.parameters()),
            classes=ours.num_classes,
            apart=apart / scale,
        )

    def accuracy(
        self, model: Path, size: Size, policies: Words = ("all",), temperatures: Words = ("none",)
    ) -> dict[str, Fact]:
        """Top-1 by policy and temperature, of the model in a folder."""
        options, cfg = self.options, vars(self.model)["pretrained_cfg"]
        if not self.model.num_classes:
            return self.neighbours(model, size, policies, temperatures)
        rows = evaluate_model(
            EvaluateConfig(
                model=str(model), data=str(options.root), sizes=(size,), policies=policies,
                temperatures=temperatures, limit=options.limit, crop=float(cfg["crop_pct"]),
                batch_size=options.batch, device=options.device, out=str(self.folder / "evaluate"),
            )
        )  # fmt: skip
        found: dict[str, Fact] = {_words(row.policy, row.temperature): row.value for row in rows}
        return found | dict(images=int(rows[0].n or 0))

    def neighbours(self, folder: Path, size: Size, policies: Words, temperatures: Words) -> dict[str, Fact]:
        """The same of a model without a classifier, by its nearest neighbours at its own size."""
        options, swapped = self.options, folder == self.swapped
        model = load_run(folder) if swapped else timm.create_model(f"local-dir:{folder}", pretrained=True)
        encoder = model.to(options.device)
        if not isinstance(encoder, Encoder):
            raise TypeError(f"{type(model).__name__} has no features")
        cfg = vars(self.model)["pretrained_cfg"]

        def of(images: Tensor, at: Size) -> Tensor:
            return features(encoder, images, cfg["mean"], cfg["std"], size=at, pool="avg")

        def collected(at: Size, part: str) -> tuple[Tensor, Tensor]:
            data = load_images(
                "folder", options.root, source_size=at, cache="none",
                limit_train=options.neighbours, limit_test=options.limit,
            )  # fmt: skip
            split = data.train if part == "train" else data.test
            parts = torch.arange(len(split)).split(options.batch)
            return torch.cat([of(split.pixels(index), at) for index in parts]), split.labels

        near, labels = collected(self.size(1), "train")
        found: dict[str, Fact] = {}
        for policy in every_policy(model) if "all" in policies else policies:
            for temperature in temperatures:
                with use_policy(model, policy, temperature=temperature):
                    test, answers = collected(size, "test")
                score = knn_probe(near, labels, test, answers, min(20, len(near)))
                found[_words(policy, temperature)] = score["top1"]
        return found | dict(images=len(answers))

    def policies(self, factor: float) -> dict[str, Fact]:
        size = self.size(factor)
        if factor != 1:
            return dict(size=show_size(size), top1=self.accuracy(self.ours, size, temperatures=("none", "log")))
        found: dict[str, Fact] = dict(size=show_size(size), top1=self.accuracy(self.ours, size, ("default",)))
        return found | (dict(timm=self.accuracy(self.theirs, size, ("default",))) if self.model.num_classes else {})

    def tune(self, factor: float) -> dict[str, Fact]:
        if not self.model.num_classes:
            return dict(open="it has no classes to agree on")
        options, size, out = self.options, self.size(factor), self.folder / f"tune-{factor:g}x"
        found = tune_model(
            TuneConfig(
                init=str(self.theirs), root=str(options.root / "train"), size=size, batch_size=options.batch,
                device=options.device, out=str(out),
            )
        )  # fmt: skip
        chosen = self.accuracy(out if found.helps else self.ours, size, ("default",))
        gain: list[Fact] = list(found.gain)
        return dict(policy=found.policy, temperature=found.temperature, helps=found.helps, gain=gain, top1=chosen)

    def swap(self) -> dict[str, Fact]:
        options, size = self.options, self.size(1)
        data = dict(root=str(options.root), limit_train=options.images, limit_test=options.limit or 1000)
        optim = dict(epochs=options.epochs, batch_size=options.batch)
        run = dict(out=str(self.swapped), device=options.device)
        swap(
            SwapConfig.of(
                init=str(self.theirs), to=self.of.to, data=data, optim=optim, run=run, measure=show_size(size),
                policies="default", resume=True,
            )
        )  # fmt: skip
        meta = vars(load_run(self.swapped))["about"]
        return dict(to=self.of.to, updates=meta["state"]["step"], images=meta["swap"]["images"])

    def swapped_at(self, factor: float) -> dict[str, Fact]:
        size = self.size(factor)
        return dict(size=show_size(size), top1=self.accuracy(self.swapped, size, ("default",)))

    @torch.inference_mode()
    def speed(self, factor: float) -> dict[str, Fact]:
        options, size = self.options, self.size(factor)
        model, images = self.model.to(options.device), torch.randn(options.batch, 3, *size).to(options.device)
        run, device = partial(model, images), options.device
        peak = allocated_bytes(run, device) if device.startswith("cuda") else resident_bytes(run)
        seconds = statistics.median(timed(run, device) for _ in range(options.repeats))
        return dict(
            size=show_size(size),
            batch=options.batch,
            threads=torch.get_num_threads(),
            images_per_s=options.batch / seconds,
            peak_MiB=None if peak is None else peak / 2**20,
        )


def measure(of: Weights, options: Options, rows: Rows) -> None:
    """All rows of one name; the others are left out where its model cannot be had."""
    subject, name = Subject(of, options), of.name
    rows.once(f"{name} model", subject.build)
    if "failed" in rows.rows.get(f"{name} model", {"failed": True}):
        return
    for factor in FACTORS:
        rows.once(f"{name} {factor:g}x", partial(subject.policies, factor))
        rows.once(f"{name} speed {factor:g}x", partial(subject.speed, factor))
    for factor in FACTORS[1:]:
        rows.once(f"{name} tune {factor:g}x", partial(subject.tune, factor))
    rows.once(f"{name} swap", subject.swap)
    if "failed" not in rows.rows.get(f"{name} swap", {"failed": True}):
        for factor in FACTORS:
            rows.once(f"{name} swap {factor:g}x", partial(subject.swapped_at, factor))


def markdown(file: Path) -> str:
    """The rows of a file as a table, a line for each name and size; what is not there stands open."""
    kept = Rows(file).rows
    heads = ("as it is", "best policy", "tuned", "swapped", "images/s", "MiB", "images")
    lines = ["| " + " | ".join(("weights", "sides", *heads)) + " |", "|---|---|" + "---:|" * len(heads)]
    for name, to, _ in SIX:
        if not any(row.startswith(f"{name} ") for row in kept):
            sides = ", ".join(f"{factor:g}x" for factor in FACTORS)
            lines.append(f"| `{name}` | {sides} | {OPEN} |" + " |" * (len(heads) - 1))
            continue
        for factor in FACTORS:
            found, tuned, swapped, speed = (
                kept.get(f"{name} {what}{factor:g}x", {}) for what in ("", "tune ", "swap ", "speed ")
            )
            top1 = _top1(found)
            best = max(top1, key=top1.__getitem__, default="")
            cells = [
                _cell(found, next(iter(top1.values()), None)),
                f"{top1[best]:.1f} (`{best}`)" if len(top1) > 1 else "",
                "" if factor == 1 else _cell(tuned, _top1(tuned).get("default"), _chosen(tuned)),
                _cell(swapped, _top1(swapped).get("default"), f" (`{to}`)"),
                *(_cell(speed, speed.get(key)) for key in ("images_per_s", "peak_MiB")),
            ]
            images = found["top1"]["images"] if isinstance(found.get("top1"), dict) else ""  # type: ignore[index, call-overload]
            lines.append("| " + " | ".join([f"`{name}`", f"{factor:g}x", *cells, str(images)]) + " |")
    return "\n".join(lines)


def _top1(row: Mapping[str, Fact]) -> dict[str, float]:
    found = row.get("top1")
    values = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in values if name != "images" and isinstance(value, int | float)}


def _chosen(row: Mapping[str, Fact]) -> str:
    return f" (`{_words(str(row['policy']), str(row['temperature']))}`)" if row.get("helps") else " (nothing helps)"


def _cell(row: Mapping[str, Fact], value: Fact | None, more: str = "") -> str:
    """A number, or why there is none."""
    if isinstance(value, int | float):
        return f"{value:.1f}{more}"
    return str(row.get("failed") or row.get("open") or OPEN).replace("|", "/")


def _words(policy: str, temperature: str) -> str:
    return policy if temperature == "none" else f"{policy}, {temperature}"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_weights", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--root", type=Path, required=True, help="train/ and val/ of class folders")
    parser.add_argument("--out", type=Path, default=Path("runs/real_weights"))
    parser.add_argument(
        "--names", nargs="+", default=[of.name for of in SIX], help="some of the six, or their beginnings"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, help="images of val/ to measure on; default all")
    parser.add_argument("--images", type=int, default=50_000, help="of train/ that a swap learns from")
    parser.add_argument("--epochs", type=int, default=1, help="of a swap")
    parser.add_argument(
        "--neighbours", type=int, default=50_000, help="images of train/, for a model without a classifier"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--random", action="store_true", help="small models with random weights: a dry run")
    given = parser.parse_args(args)
    chosen = [of for of in SIX if any(of.name.startswith(name) for name in given.names)]
    if not chosen or not (given.root / "train").is_dir():
        parser.error(f"no train/ in {given.root}" if chosen else f"none of {', '.join(of.name for of in SIX)}")
    warnings.simplefilter("ignore")
    rows = Rows(given.out / "rows.jsonl", given.seconds)
    rows.once("about", partial(about, given.device))
    settings = {name: getattr(given, name) for name in Options._fields if hasattr(given, name)}
    for of in chosen:
        measure(of, Options(**settings), rows)
    print(f"{markdown(rows.path)}\n\n{len(rows.rows) - 1} rows in {rows.path}; {len(rows.left_out)} for another run")
    return 1 if any("failed" in row for row in rows.rows.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
