"""Writes docs/encodings.md from what the encodings declare: `python docs/build_tables.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vit2dpe.encodings import ENCODINGS, Dims, NoPosition, assign
from vit2dpe.positions import Positions
from vit2dpe.testing import tensors

# ViT-S/16 at 224 pixels: what the numbers of the table are for.
DIMS = Dims(width=384, heads=6, grid=(14, 14), depth=12)


def table() -> str:
    lines = [
        "| name | class | gives | relative | continuous | of each block | parameters | a forward makes | policies |",
        "|---|---|---|---|---|---|---:|---:|---|",
        *(_row(name) for name in ENCODINGS),
    ]
    return "\n".join(lines)


def _row(name: str) -> str:
    shared, blocks = assign(name, DIMS)
    own = [block for block in blocks if block is not None]
    one = own[0] if own else shared
    parameters = sum(p.numel() for module in (shared, *own) for p in module.parameters())
    at = Positions.grid(DIMS.grid)
    with torch.no_grad():
        # Queries and keys share a rotation, so it is counted once.
        made = sum(t.numel() for n, t in tensors(one(at)).items() if not n.startswith("k_"))
    times = f"{made:,}" + (f" x {len(own)}" if own else "")
    cells = [
        f"`{name}`",
        f"`{type(one).__name__}`",
        ", ".join(sorted(one.gives)) or "nothing",
        "yes" if one.relative else "no",
        "yes" if one.continuous else "no",
        "yes" if own else "no",
        f"{parameters:,}",
        "0" if isinstance(one, NoPosition) else times,
        ", ".join(one.policies),
    ]
    return "| " + " | ".join(cells) + " |"


def sources() -> str:
    """The opening of each encoding's file, as it stands there."""
    parts, seen = [], set()
    for name in ENCODINGS:
        shared, blocks = assign(name, DIMS)
        module = sys.modules[type(blocks[0] or shared).__module__]
        if module.__name__ in seen or isinstance(blocks[0] or shared, NoPosition):
            continue
        seen.add(module.__name__)
        file = module.__name__.replace(".", "/") + ".py"
        parts.append(f"## [{Path(file).stem}](../{file})\n\n{(module.__doc__ or '').strip()}\n")
    return "\n".join(parts)


def page() -> str:
    return f"""# Encodings

Built by `python docs/build_tables.py` from what each encoding declares; `check_encoding` proves the declarations.

Numbers are for ViT-S/16 at 224 pixels: width {DIMS.width}, {DIMS.heads} heads, {DIMS.depth} blocks, a grid of
{DIMS.grid[0]}x{DIMS.grid[1]}. "A forward makes" counts the numbers in the Signal; "x {DIMS.depth}" where every block
makes its own.

{table()}

- **gives**: `token` is added to tokens at the input, `rotation` turns queries and keys, `bias` is added to the logits.
- **relative**: moving all tokens together changes no logit between them.
- **continuous**: fractional coordinates are accepted.
- **policies**: what it can do at a size it was not trained at, the default first. See `vit2dpe/policies.py`.

![every encoding, drawn](gallery.png)

*`vit2dpe show all --grid 9x14`: similarity of token vectors, mean cosine of rotations, bias per head, seen from the
circled place.*

Sums are written `sincos+rope`, options `rope(base=10)`. A new one: [adding-an-encoding.md](adding-an-encoding.md).

{sources()}"""


if __name__ == "__main__":
    target = Path(__file__).parent / "encodings.md"
    target.write_text(page().rstrip() + "\n")
    print(target)
