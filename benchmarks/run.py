"""`vit2dpe bench`: rows of ours, a peer and no encoding in one process.

Each row first proves that ours computes what the peer computes (same weights, same outputs, same gradients); a row that
fails has no ratio. A row that cannot run holds the reason. Rows that the file holds already, measured with the same
settings, versions and hardware, are not measured again, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from benchmarks import contenders as peers
from benchmarks import measure
from benchmarks.table import Row, line, markdown
from vit2dpe.errors import ConfigError, unknown
from vit2dpe.files import write_atomically
from vit2dpe.ranges import Count, Natural, Positive, Range
from vit2dpe.spec import Settings, parse_size, split_words

MODES = ("inference", "training", "first")
PRECISIONS = {"float32": 1e-4, "bfloat16": 0.1, "autocast": 0.1}  # and how far ours may be from the peer


def _listed(default: str) -> str:
    """A field of comma-separated words, which YAML may hold as a list."""
    text: str = field(default=default, metadata={"list": ","})
    return text


@dataclass(frozen=True)
class BenchConfig(Settings):
    """Time our models against timm's of the same function, and against no encoding at all.

    Args:
        models: comma-separated: timm names that from_timm reads, with arguments where they need some, as in
            vit_relpos_small_patch16_224(rel_pos_type=bias) or swin_tiny_patch4_window7_224(fused=true);
            torchvision_swin_t, transformers_vitmae, transformers_dinov3, x_transformers_vit, x_transformers_text (with
            alibi_pos_bias=true or rel_pos_bias=true instead of a rotation); at level op rotary_embedding_torch and
            x_transformers too.
        sizes: comma-separated sizes in pixels, 224 or 224x320; of a text model 1xN, N tokens.
        modes: inference, training (forward and backward), first (ours alone: the first forward at a size over the next
            one there), or several.
        level: encoder (the whole model), block, attention (with roll and windows in a Swin), table (what the encoding
            gives, alone), or op (the rotation alone, from the packed projection to q, k and v).
        block: which block, at the levels of block and attention; a Swin's are counted through its stages, the odd ones
            are shifted.
        precision: float32, bfloat16 (weights too), or autocast (to bfloat16).
        compile: torch.compile every contender.
        batch: images of a step.
        depth: blocks; None: the model's own.
        repeats: repetitions, in each of which every contender runs once; 0: counts and bytes alone.
        threads: CPU threads.
        device: cpu or cuda.
        least: the peer/ours that is wanted; a row misses it when its interval lies wholly below.
        most: the ours/limit that is wanted at most.
        out: the JSON file to write.
        table: print the rows of these JSON files or folders (comma-separated) as a Markdown table; nothing is measured.
    """

    models: str = _listed("vit_small_patch16_rope_224,vit_small_patch16_rope_mixed_224,vit_relpos_small_patch16_224")
    sizes: str = _listed("224")
    modes: str = _listed("inference,training")
    level: str = "encoder"
    block: Natural = 1
    precision: str = "float32"
    compile: bool = False
    batch: Count = 2
    depth: Count | None = None
    repeats: Natural = 41
    threads: Annotated[int, Range(1, 4096)] = 1
    device: str = "cpu"
    least: Positive | None = None
    most: Positive | None = None
    out: str = "runs/bench.json"
    table: str = _listed("")


def bench(config: BenchConfig, command: str = "") -> list[Row]:
    """Run every row, print a table, write it with versions and hardware; returns the rows."""
    if config.table:
        found = [row for file in _files(config.table) for row in json.loads(file.read_text())["rows"]]
        print("\n".join(markdown(found)))
        return found
    modes, sizes = _check(config), [parse_size(text) for text in split_words(config.sizes)]
    torch.set_num_threads(config.threads)
    out, about = Path(config.out), _about(command, config.device)
    known = _known(out, about)
    rows: list[Row] = []
    print("peer/ours [95%], ours/limit [95%]; operations, saved MiB and peak MiB of peer, ours, limit", flush=True)
    for word in split_words(config.models):
        for size in sizes:
            for mode in modes:
                settings = _settings(word, size, mode, config)
                row = next((old for old in known if settings.items() <= old.items() and "failed" not in old), None)
                rows.append(row or _row(settings, config))
                print(line(rows[-1]), flush=True)
                write_atomically(out, json.dumps(about | dict(rows=rows), indent=1).encode())
    return rows


def _check(config: BenchConfig) -> list[str]:
    modes = split_words(config.modes)
    if not modes or any(mode not in MODES for mode in modes):
        raise ConfigError(f"modes are {', '.join(MODES)}; got {config.modes!r}")
    if config.level not in peers.LEVELS:
        raise unknown("level", config.level, peers.LEVELS)
    if config.precision not in PRECISIONS:
        raise unknown("precision", config.precision, PRECISIONS)
    if config.device != "cpu" and config.level != "encoder":
        raise ConfigError(f"parts of a model are measured on the CPU, got level={config.level}, device={config.device}")
    if "first" in modes and config.level != "encoder":
        raise ConfigError(f"first is about whole models, got level={config.level}")
    return modes


def _settings(word: str, size: tuple[int, int], mode: str, config: BenchConfig) -> Row:
    """The settings of a row; equal settings make equal rows."""
    one_block = config.level in ("block", "attention", "op")
    return dict(
        model=word, height=size[0], width=size[1], mode=mode, level=config.level,
        block=config.block if one_block else None, precision=config.precision, compiled=config.compile,
        batch=config.batch, depth=config.depth, repeats=config.repeats, least=config.least, most=config.most,
    )  # fmt: skip


def _row(settings: Row, config: BenchConfig) -> Row:
    size = (settings["height"], settings["width"])
    try:
        # One block and one attention are the same in a shallow model, but for a Swin, whose stages differ.
        modules = peers.contenders(settings["model"], size, config.batch, config.depth, config.level, config.block)
    except (ConfigError, ImportError) as error:
        if "unknown model" in str(error):
            raise
        return settings | dict(failed=str(error))
    x = peers.tokens(modules, config.batch, size)
    if settings["mode"] == "first":
        return settings | _first(modules["ours"], size, config)
    row = settings | _equal(modules, x, settings["mode"])
    if "failed" in row:
        return row
    x = x.to(config.device)
    for module in modules.values():
        module.to(config.device)
    if config.precision == "bfloat16":
        modules, x = {kind: module.bfloat16() for kind, module in modules.items()}, x.bfloat16()
    with measure.in_precision(config.precision, config.device):
        row["difference"] = difference(modules["peer"], modules["ours"], x)
        if not row["difference"] <= PRECISIONS[config.precision]:
            return row | dict(failed=f"ours does not compute what the peer computes in {config.precision}")
        return row | _measured(modules, x, settings["mode"], config)


def _equal(modules: dict[str, nn.Module], x: Tensor, mode: str) -> Row:
    """Outputs, and in training gradients to the inputs and to what encodings learn, in float32."""
    found: Row = dict(difference=difference(modules["peer"], modules["ours"], x))
    if not found["difference"] <= 1e-4:
        return found | dict(failed="ours does not compute what the peer computes")
    if mode == "training":
        there, here = (_gradients(modules[kind], modules["peer"], x) for kind in ("peer", "ours"))
        found["gradient_difference"] = max(_apart(a, b) for a, b in zip(there, here, strict=True))
        if not found["gradient_difference"] <= 1e-3:
            return found | dict(failed="ours has not the gradients that the peer has")
    return found


def difference(peer: nn.Module, ours: nn.Module, x: Tensor) -> float:
    """The largest difference of outputs, relative to the largest output."""
    there, here = (_plain(module, measure.infer(module, x)).float() for module in (peer, ours))
    return _apart(there, here)


def _plain(module: nn.Module, given: measure.Outputs) -> Tensor:
    """One tensor, in a layout that both sides share."""
    plain: Callable[[measure.Outputs], Tensor] | None = getattr(module, "plain", None)
    return measure.outputs(given)[0] if plain is None else plain(given)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ConfigError(f"outputs of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def _gradients(module: nn.Module, peer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient to the inputs, and the length of the gradient to the encodings (in another layout, the same length)."""
    x = x.clone().requires_grad_()
    measure.Step(module, peer, x).backward(module, x)
    learned = [p.grad.square().sum() for p in peers.encodings_of(module) if p.grad is not None]
    length = torch.stack(learned).sum().sqrt() if learned else x.new_zeros(())
    found = (torch.zeros_like(x) if x.grad is None else x.grad, length)
    measure.clear(module, x)
    return found


def _measured(modules: dict[str, nn.Module], x: Tensor, mode: str, config: BenchConfig) -> Row:
    row: Row = {}
    training = mode == "training"
    if training and hasattr(modules["peer"], "shape"):  # tokens ask for gradients, images do not
        x.requires_grad_()
    steps: dict[str, Callable[[nn.Module, Tensor], object]] = {}
    for kind, module in modules.items():
        step = steps[kind] = measure.Step(module, modules["peer"], x) if training else measure.infer
        module.train(training)
        row[f"kernels_{kind}"] = measure.kernels(module, x)
        row[f"peak_{kind}"] = measure.peak_bytes(partial(step, module, x))
        row[f"buffers_{kind}"] = measure.buffer_bytes(module)
        if training:
            row[f"saved_{kind}"] = measure.saved_bytes(module, x)
    if not config.repeats:
        return row
    runs: dict[str, Callable[[], object]] = {}
    for kind, module in modules.items():
        run: Any = torch.compile(module) if config.compile else module
        runs[kind] = partial(steps[kind], run, x)
        try:
            runs[kind]()
        except torch._dynamo.exc.TorchDynamoException as error:
            return row | dict(failed=f"{kind} does not compile: {str(error).splitlines()[0]}")
    ratios = [("peer", "ours"), ("ours", "limit")][: len(modules) - 1]
    found = measure.paired(runs, config.repeats, ratios, config.device)
    return row | {f"{a}_{b}": value for (a, b), value in zip(ratios, found, strict=True)}


def _first(ours: nn.Module, size: tuple[int, int], config: BenchConfig) -> Row:
    """The first forward at a size over the next one there, at sizes from this one on, each seen once."""
    embed: Any = getattr(ours, "patch_embed", None)
    if embed is None:
        return dict(failed="first goes through sizes of images, in patches that this model does not name")
    patch = max(embed.patch_size)
    ours.to(config.device)
    height, width = size
    unseen = torch.randn(config.batch, 3, height + 7 * patch, width, device=config.device)
    row: Row = {f"kernels_{when}": measure.kernels(ours, unseen) for when in ("first", "later")}
    ratios = []
    for i in range(config.repeats):
        shape = (config.batch, 3, height + patch * (i // 7), width + patch * (i % 7))
        x = torch.randn(shape, device=config.device)
        first, later = (measure.timed(partial(measure.infer, ours, x), config.device) for _ in range(2))
        ratios.append(first / later)
    return row | ({"first_later": measure.interval(ratios)} if ratios else {})


def _known(out: Path, about: Row) -> list[Row]:
    """Rows of an earlier run on the same machine with the same versions."""
    if not out.is_file():
        return []
    old = json.loads(out.read_text())
    passing = ("command", "load", "rows")
    same = {k: v for k, v in old.items() if k not in passing} == {k: v for k, v in about.items() if k not in passing}
    return old["rows"] if same else []


def _files(words: str) -> list[Path]:
    """JSON files named, or in a folder named."""
    found = []
    for path in map(Path, split_words(words)):
        if not path.exists():
            raise ConfigError(f"{path} is neither a file nor a folder; --table takes what --out wrote")
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return found


def _about(command: str, device: str) -> Row:
    import os

    import timm

    from vit2dpe import __version__
    from vit2dpe.training.run_folder import processor

    return dict(
        command=command, vit2dpe=__version__, torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version(), cpu=processor(), threads=torch.get_num_threads(), load=os.getloadavg(),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
    )  # fmt: skip
