"""The rows that a GPU is wanted for, the first ones first, measured by `vit2dpe bench`; a file for each group.

    python -m benchmarks.gpu_speed --out runs/gpu/speed [--device cuda] [--seconds 240] [--small]

What DIR/NAME.json holds is not measured again, so that the same command goes on where its time was over.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

from benchmarks.run import BenchConfig, bench, plan
from benchmarks.table import Row, markdown

S, B = "vit_small_patch16", "vit_base_patch16"
SWIN = "swin_tiny_patch4_window7_224"
OWN = "vit2dpe_small_patch16_224"
TABLE = "(rel_pos_type=bias)"


def _config(
    models: str, batch: int, sizes: str = "224", modes: str = "inference,training", **more: object
) -> BenchConfig:
    """bfloat16 autocast, 21 repetitions."""
    settings = dict(models=models, batch=batch, sizes=sizes, modes=modes, precision="autocast", repeats=21)
    return BenchConfig(**settings | dict(device="cuda") | more)  # type: ignore[arg-type]


# Goals: peer/ours at least, ours/none at most.
PLAN = {
    "rope_s_224": _config(f"{S}_rope_224", 256, modes="inference", least=1.5, most=1.06),
    "rope_s_224_training": _config(f"{S}_rope_224", 256, modes="training", most=1.06),
    "mixed_s_224": _config(f"{S}_rope_mixed_224", 256, most=1.1),
    "relative_s_224": _config(f"vit_relpos_small_patch16_224{TABLE}", 256, most=1.1),
    "swin_t_224": _config(f"{SWIN},torchvision_swin_t", 128, least=1.5),
    "rope_s_1024": _config(f"{S}_rope_224", 8, "1024"),
    "relative_s_1024": _config(f"vit_relpos_small_patch16_224{TABLE}", 8, "1024"),
    "rope_s_224_compiled": _config(f"{S}_rope_224", 256, how="compiled,blocks", most=1.05),
    "relative_s_224_compiled": _config(f"vit_relpos_small_patch16_224{TABLE}", 256, how="compiled", most=1.03),
    "mixed_s_224_compiled": _config(f"{S}_rope_mixed_224", 256, how="compiled", most=1.08),
    "rope_b_224": _config(f"{B}_rope_224", 128),
    "relative_b_224": _config(f"vit_relpos_base_patch16_224{TABLE}", 128),
    "rope_b_1024": _config(f"{B}_rope_224", 4, "1024"),
    "relative_b_1024": _config(f"vit_relpos_base_patch16_224{TABLE}", 4, "1024"),
    "rope_s_224_graph": _config(f"{S}_rope_224", 64, how="eager,graph"),
    "rotation": _config(
        f"{S}_rope_224,{S}_rope_mixed_224,flash_attn,liger_kernel,rotary_embedding_torch", 256,
        level="op", precision="bfloat16", depth=2,
    ),
    "attention": _config(f"{S}_rope_224,{S}_rope_mixed_224,{SWIN}", 64, level="attention,block"),
    "biases_s_1024": _config(f"{OWN}(position=alibi),{OWN}(position=lookhere)", 8, "1024"),  # against matrices
}  # fmt: skip
_MICRO = "(embed_dim=48, num_heads=3, patch_size=8)"
SMALL = {
    "rope": _config(f"{S}_rope_224{_MICRO}", 3, "32x48", least=1.5, depth=1, repeats=2),
    "learned": _config(f"{S}_224{_MICRO}", 3, "32", "training", depth=1, repeats=2),
}


def measure(out: Path, configs: dict[str, BenchConfig], device: str, seconds: float) -> list[str]:
    """Every group within the time; returns the names of those that are for another run, in full or in part."""
    end, open_ = time.monotonic() + seconds, []
    for name, config in configs.items():
        left = end - time.monotonic()
        if left <= 0:
            open_.append(name)
            continue
        print(f"-- {name}", flush=True)
        file = out / f"{name}.json"
        bench(replace(config, device=device, out=str(file), seconds=min(left, 1e6)))
        if any("open" in row for row in rows_of(file, config)):
            open_.append(name)
    return open_


def rows_of(file: Path, config: BenchConfig) -> list[Row]:
    """The rows of a group, those that its file lacks marked `open`."""
    found: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = []
    for settings in plan(config):
        row = next((row for row in found if settings.items() <= row.items()), None)
        rows.append(row or settings | dict(open=True, failed="open: not measured yet"))
    return rows


def table(folder: Path) -> str:
    """What was measured and what is open, for RESULTS.md: the cards and versions, then the rows."""
    files = [folder / f"{name}.json" for name in PLAN]
    abouts = [json.loads(file.read_text()) for file in files if file.is_file()]
    told = sorted({f"{about['device']}, torch {about['torch']}, timm {about['timm']}" for about in abouts})
    rows = [row for file, config in zip(files, PLAN.values(), strict=True) for row in rows_of(file, config)]
    measured = sum("failed" not in row for row in rows)
    head = f"{measured} of {len(rows)} rows are measured{': ' if told else ''}{'; '.join(told)}."
    return "\n".join([head, "", *markdown(rows)])


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON file for each group")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--small", action="store_true", help="two tiny models, two repetitions")
    config = parser.parse_args(args)
    warnings.simplefilter("ignore")
    left = measure(config.out, SMALL if config.small else PLAN, config.device, config.seconds)
    print(f"for another run: {', '.join(left) or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
