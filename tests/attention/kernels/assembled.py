"""Compile the kernels of `rotary_triton` for sm_90, on any machine; print registers, spills and widths of stores."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from vit2dpe.attention.kernels import rotary_triton

CONSTANTS = {"LEARNED", "ROWS", "PAIRS", "SPLITS", "SIZE"}
WIDE = {"turn", "angle", "table"}  # in float32; the other pointers are bfloat16
POINTERS = {"packed", "dq", "dk", "dv", "q", "k", "out", *WIDE}
ODD = {"tokens", "heads", "members", "splits", "turn_heads", "count"}  # multiples of nothing


def compiled(name: str, kernel: JITFunction, constants: dict[str, int | bool], wide: set[str]) -> dict:
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in CONSTANTS else "i32" if n not in POINTERS else "*fp32" if n in wide else "*bf16"
        for n in names
    }
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in CONSTANTS | ODD}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    return {"kernel": name, **resources(made.asm["cubin"]), "stores": stores(made.asm["ptx"])}


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "spilled": found["LOCAL"]}


def stores(ptx: str) -> list[str]:
    return sorted(set(re.findall(r"st\.global\.(\w+)", ptx)))


def main() -> None:
    tile = {"ROWS": 32, "PAIRS": 32}
    rows = [
        compiled("forward", rotary_triton.forward_kernel, tile, WIDE),
        compiled("backward", rotary_triton.backward_kernel, tile | {"LEARNED": False}, WIDE),
        compiled("learned", rotary_triton.backward_kernel, tile | {"LEARNED": True}, WIDE),
        compiled("fold", rotary_triton.fold_kernel, {"SPLITS": 16, "SIZE": 64}, WIDE | {"out"}),
    ]
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
