"""The Triton code that torch.compile makes of a model of three blocks, on a CPU: real code, kernels that do nothing.

Prints a line of JSON for each encoding: the launches of a forward, and how many take a cosine or a sine.
"""

from __future__ import annotations

import json
import re
import sys

import torch
import torch._inductor.async_compile
import torch._inductor.config
import torch._inductor.graph
import triton
from triton.backends.compiler import GPUTarget

from vit2dpe import ViT


class Driver:
    """An H100 that answers questions and runs nothing."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_device_interface = staticmethod(lambda: torch.cuda)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    is_active = staticmethod(lambda: True)


class Kernel:
    def run(self, *args: object, **kwargs: object) -> None: ...


def code_of(word: str) -> str:
    """The program of a forward with gradients, in bfloat16 autocast."""
    programs: list[str] = []
    generate = torch._inductor.graph.GraphLowering.codegen

    def codegen(self):
        made = generate(self)
        programs.append(made[0].value)
        return made

    torch._inductor.graph.GraphLowering.codegen = codegen
    sizes = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=2)
    model = torch.compile(ViT(word, class_token=False, global_pool="avg", **sizes), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(4, 3, 16, 24))
    torch._inductor.graph.GraphLowering.codegen = generate
    (program,) = programs
    return program


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    torch._inductor.config.cpu_backend = "triton"
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.async_compile.AsyncCompile.triton = lambda self, *args, **kwargs: Kernel()
    for word in sys.argv[1:]:
        program = code_of(word)
        launches = re.findall(r"(triton_\w+)\.run\(", program[program.index("def call(") :])
        kernels = dict(re.findall(r"def (triton_\w+)\(.*?\):\n(.*?)\n'''", program, re.S))
        turning = [name for name in launches if re.search(r"\b(cos|sin)\(", kernels[name])]
        print(json.dumps({"word": word, "launches": len(launches), "turning": len(turning)}))


if __name__ == "__main__":
    main()
