"""`vit2dpe bench`: rows of ours, a peer and no encoding in one process.

Each row first proves that ours computes what the peer computes (same weights, same outputs, same gradients); a row that
fails has no ratio. A row that cannot run holds the reason. Rows that the file holds already, measured with the same
settings, versions and hardware, are not measured again, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from benchmarks import contenders as peers
from benchmarks import measure, ways
from benchmarks.table import Row, line, markdown
from vit2dpe.attention import explain
from vit2dpe.errors import ConfigError, unknown
from vit2dpe.files import write_atomically
from vit2dpe.ranges import Count, Natural, Positive, Range
from vit2dpe.spec import Settings, parse_size, split_words
from vit2dpe.training.devices import pick_device

MODES = ("inference", "training", "first")
PRECISIONS = {"float32": 1e-4, "bfloat16": 0.1, "autocast": 0.1}  # and how far ours may be from the peer
PROVED = 2  # images of a whole model that its equality is proved with


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
            a model of ours, vit2dpe_small_patch16_224(position=lookhere), against itself with its biases as matrices;
            torchvision_swin_t, transformers_vitmae, transformers_dinov3, x_transformers_vit, x_transformers_text (with
            alibi_pos_bias=true or rel_pos_bias=true instead of a rotation); at level op rotary_embedding_torch and
            x_transformers too, and on a GPU liger_kernel and flash_attn.
        sizes: comma-separated sizes in pixels, 224 or 224x320; of a text model 1xN, N tokens.
        modes: inference, training (forward and backward), first (ours alone: the first forward at a size over the next
            one there), or several.
        level: encoder or model (the whole model), block, attention (with roll and windows in a Swin), table (what the
            encoding gives, alone), op (the rotation alone, from the packed projection to q, k and v), or several.
        block: which block, at the levels of block and attention; a Swin's are counted through its stages, the odd ones
            are shifted.
        precision: float32, bfloat16 (weights too), or autocast (to bfloat16).
        compile: torch.compile every contender, as --how compiled does.
        batch: images of a step.
        depth: blocks; None: the model's own.
        repeats: repetitions, in each of which every contender runs once; 0: counts and bytes alone.
        threads: CPU threads.
        device: cpu or cuda. There equality is proved on the device with two images, times are those between events
            after 8 warm-ups, and rows hold milliseconds and the most that a step adds to the memory.
        how: eager, graph (a CUDA graph), compiled (as a whole), blocks (each block compiled), or several.
        seconds: begin no row after so many; the same command goes on.
        least: the peer/ours that is wanted; a row misses it when its interval lies wholly below.
        most: the ours/limit that is wanted at most.
        out: the JSON file to write.
        table: print the rows of these JSON files or folders (comma-separated) as a Markdown table; nothing is measured.
    """

    models: str = _listed("vit_small_patch16_rope_224,vit_small_patch16_rope_mixed_224,vit_relpos_small_patch16_224")
    sizes: str = _listed("224")
    modes: str = _listed("inference,training")
    level: str = _listed("encoder")
    block: Natural = 1
    precision: str = "float32"
    compile: bool = False
    batch: Count = 2
    depth: Count | None = None
    repeats: Natural = 41
    threads: Annotated[int, Range(1, 4096)] = 1
    device: str = "cpu"
    how: str = _listed("eager")
    seconds: Positive | None = None
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
    planned = plan(config)
    config = replace(config, device=str(pick_device(config.device)))
    torch.set_num_threads(config.threads)
    out, about = Path(config.out), _about(command, config.device)
    known = _known(out, about)
    rows: list[Row] = []
    end, left_out = time.monotonic() + (config.seconds or float("inf")), 0
    print("peer/ours [95%], ours/limit [95%]; operations, saved MiB and peak MiB of peer, ours, limit", flush=True)
    for settings in planned:
        row = next((old for old in known if settings.items() <= old.items() and "failed" not in old), None)
        if row is None and time.monotonic() > end:
            left_out += 1
            continue
        rows.append(row or _row(settings, config))
        print(line(rows[-1]), flush=True)
        write_atomically(out, json.dumps(about | dict(rows=rows), indent=1).encode())
    if left_out:
        print(f"{left_out} rows for another run of the same command: {config.seconds:g} s are over", flush=True)
    return rows


def plan(config: BenchConfig) -> list[Row]:
    """The settings of all rows."""
    modes, sizes = split_words(config.modes), [parse_size(text) for text in split_words(config.sizes)]
    levels = ["encoder" if word == "model" else word for word in split_words(config.level)]
    hows = ["compiled"] if config.compile else split_words(config.how)
    if not modes or any(mode not in MODES for mode in modes):
        raise ConfigError(f"modes are {', '.join(MODES)}; got {config.modes!r}")
    for kind, words, known in (("level", levels, peers.LEVELS), ("way", hows, ways.WAYS)):
        for word in words or [""]:
            if word not in known:
                raise unknown(kind, word, known)
    if config.precision not in PRECISIONS:
        raise unknown("precision", config.precision, PRECISIONS)
    if config.compile and config.how not in ("eager", "compiled"):
        raise ConfigError(f"compile is how=compiled, got how={config.how} with it")
    if "graph" in hows and not config.device.startswith("cuda"):
        raise ConfigError(f"graph is a CUDA graph, got device={config.device}")
    if "blocks" in hows and levels != ["encoder"]:
        raise ConfigError(f"blocks are those of whole models, got level={config.level}")
    if "first" in modes and (levels != ["encoder"] or hows != ["eager"]):
        raise ConfigError(f"first is about whole models in eager mode, got level={config.level}, how={','.join(hows)}")
    return [
        _settings(word, size, mode, level, how, config)
        for word in split_words(config.models) for level in levels for size in sizes for how in hows for mode in modes
    ]  # fmt: skip


def _settings(word: str, size: tuple[int, int], mode: str, level: str, how: str, config: BenchConfig) -> Row:
    """The settings of a row; equal settings make equal rows."""
    one_block = level in ("block", "attention", "op")
    settings = dict(
        model=word, height=size[0], width=size[1], mode=mode, level=level,
        block=config.block if one_block else None, precision=config.precision, compiled=how == "compiled",
        batch=config.batch, depth=config.depth, repeats=config.repeats, least=config.least, most=config.most,
    )  # fmt: skip
    return settings if how in ("eager", "compiled") else settings | dict(how=how)  # as files of before have it


def _row(settings: Row, config: BenchConfig) -> Row:
    """A row; on a GPU one that does not fit its memory says so."""
    how = settings.get("how", "compiled" if settings["compiled"] else "eager")
    try:
        return _compared(settings, how, config)
    except torch.OutOfMemoryError as error:
        return settings | dict(failed=f"out of memory: {str(error).partition('. ')[0]}")
    finally:
        ways.release(how, config.device)


def _compared(settings: Row, how: str, config: BenchConfig) -> Row:
    size, level = (settings["height"], settings["width"]), settings["level"]
    try:
        # One block and one attention are the same in a shallow model, but for a Swin, whose stages differ.
        modules = peers.contenders(
            settings["model"], size, config.batch, config.depth, level, config.block, config.device
        )
    except (ConfigError, ImportError) as error:
        if "unknown model" in str(error):
            raise
        return settings | dict(failed=str(error))
    x = peers.tokens(modules, config.batch, size).to(config.device)
    if settings["mode"] == "first":
        return settings | _first(modules["ours"], size, config)
    few = x[:PROVED] if level == "encoder" else x  # parts may have been recorded for their batch
    with ways.exact_products(config.device):
        row = settings | _equal(modules, few, settings["mode"])
    if "failed" in row:
        return row
    if config.precision == "bfloat16":
        modules, x, few = {kind: m.bfloat16() for kind, m in modules.items()}, x.bfloat16(), few.bfloat16()
    with ways.in_precision(config.precision, config.device):
        row["difference"] = difference(modules["peer"], modules["ours"], few)
        if not row["difference"] <= PRECISIONS[config.precision]:
            return row | dict(failed=f"ours does not compute what the peer computes in {config.precision}")
        if level in ("encoder", "block", "attention"):
            row["backend"] = _backend(modules["ours"], few, settings["mode"])
    return row | _measured(modules, x, settings["mode"], how, config)


def _backend(ours: nn.Module, x: Tensor, mode: str) -> str:
    """The fused attention of torch that our attentions call, or the way of their bias that calls it in parts."""
    used = [line.kernel or line.bias for line in explain(ours, x, training=mode == "training")]
    return ", ".join(sorted({selection.path for selection in used}))


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


def _measured(modules: dict[str, nn.Module], x: Tensor, mode: str, how: str, config: BenchConfig) -> Row:
    row: Row = {}
    training = mode == "training"
    if training and hasattr(modules["peer"], "shape"):  # tokens ask for gradients, images do not
        x.requires_grad_()
    steps: dict[str, Callable[[nn.Module, Tensor], object]] = {}
    for kind, module in modules.items():
        with ways.in_precision(config.precision, config.device):
            step = measure.Step(module, modules["peer"], x) if training else measure.infer
            steps[kind] = step
            row[f"kernels_{kind}"] = measure.kernels(module, x)
            row[f"peak_{kind}"] = measure.peak_bytes(partial(step, module, x))
            row[f"buffers_{kind}"] = measure.buffer_bytes(module)
            if training:
                row[f"saved_{kind}"] = measure.saved_bytes(module, x)
    if not config.repeats:
        return row
    runs: dict[str, Callable[[], object]] = {}
    for kind, module in modules.items():
        try:
            runs[kind] = ways.runner(module, steps[kind], x, how, config.precision, config.device)
            ways.warm_up(runs[kind], config.device)
        except (torch._dynamo.exc.TorchDynamoException, ConfigError) as error:
            return row | dict(failed=f"{kind} does not compile: {(str(error).splitlines() or [''])[0]}")
        allocated = None if how == "graph" else ways.allocated_bytes(runs[kind], config.device)  # a graph has its own
        row |= {} if allocated is None else {f"allocated_{kind}": allocated}
    ratios = [("peer", "ours"), ("ours", "limit")][: len(modules) - 1]
    seconds = measure.interleaved(runs, config.repeats, config.device)
    if config.device != "cpu":  # where the clock is that of the device, which does nothing else
        row |= {f"ms_{kind}": round(1e3 * statistics.median(times), 4) for kind, times in seconds.items()}
    return row | {f"{a}_{b}": measure.paired(seconds, a, b) for a, b in ratios}


def _first(ours: nn.Module, size: tuple[int, int], config: BenchConfig) -> Row:
    """The first forward at a size over the next one there, at sizes from this one on, each seen once."""
    embed: Any = getattr(ours, "patch_embed", None)
    if embed is None:
        return dict(failed="first goes through sizes of images, in patches that this model does not name")
    patch = max(embed.patch_size)
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
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    )  # fmt: skip
