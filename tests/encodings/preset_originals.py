"""The functions that presets name, called: of places (N, d), index, time, rows, columns, length, their cos and sin.

Theirs are (N, channels that turn), in their order of channels. Of diffusers the classes themselves are run, from their
source and without the package around them, whose import takes ten seconds; sizes are the defaults of its models.
"""

from __future__ import annotations
import __future__

import ast
import functools
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from timm.layers import RotaryEmbeddingCat
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.glm4v import modeling_glm4v as glm4v
from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as minimax
from transformers.models.pixtral import modeling_pixtral as pixtral
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen35
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.sam2_video import modeling_sam2_video as sam2
from transformers.models.sam3 import modeling_sam3 as sam3
from transformers.models.vjepa2 import modeling_vjepa2 as vjepa2

WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}


class Float64(TorchFunctionMode):
    """What is written for float32 runs in float64: every dtype that a call names, and the default."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: WIDE.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return function(*args, **kwargs)

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)


# diffusers ----------------------------------------------------------------------------------------------------------

FOUND = importlib.util.find_spec("diffusers")


@functools.cache
def source(file):
    """The syntax of a file of diffusers, class or function by name; decorators (caches, compilers) are left out."""
    tree = ast.parse((Path(FOUND.submodule_search_locations[0]) / "models" / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if isinstance(d, ast.Name) and d.id == "staticmethod"]
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@functools.cache
def diffusers(file, name, *helpers):
    space = dict(torch=torch, nn=nn, math=math, np=numpy, maybe_adjust_dtype_for_device=lambda dtype, device: dtype)
    embeddings = source("embeddings.py")
    nodes = [node for key, node in embeddings.items() if "rotary_pos_embed" in key]
    if file != "embeddings.py":
        file = f"transformers/transformer_{file}.py"
        nodes += [source(file)[key] for key in (*helpers, name)]
    body = ast.Module(nodes, type_ignores=[])
    exec(compile(body, file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True), space)
    return space[name]


def defaults(file, model):
    """The defaults of a model's __init__ that are literals."""
    body = source(f"transformers/transformer_{file}.py")[model].body
    init = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names, found = [arg.arg for arg in init.args.args], {}
    for name, value in zip(names[::-1], init.args.defaults[::-1], strict=False):
        found[name] = ast.literal_eval(value) if not isinstance(value, ast.Call) else None
    return found


def twice(each):
    """Of pairs (2i, 2i+1)."""
    return each.repeat_interleave(2, -1)


def embed_nd(file, name, model, theta=None, key="axes_dims_rope"):
    def run(at, extent):
        made = defaults(file, model)
        kind = diffusers("flux" if name == "FluxPosEmbed" else file, name)
        return kind(theta=theta or made["rope_theta"], axes_dim=list(made[key]))(at)

    return run


def of_latents(file, name, model):
    """Of videos, (1, 1, frames, rows, columns), or of images."""

    def run(at, extent):
        made, kind, latents = defaults(file, model), diffusers(file, name), torch.zeros(1, 1, *extent)
        if "rope_axes_dim" in made:
            patch = ([1, 1],) if len(extent) == 2 else (1, 1)
            return kind(*patch, list(made["rope_axes_dim"]), made["rope_theta"])(latents)
        cos, sin = kind(made["attention_head_dim"], (1, 1, 1), 1024)(latents)
        return cos.flatten(0, 2), sin.flatten(0, 2)

    return run


def cosmos(at, extent):
    made = defaults("cosmos", "CosmosTransformer3DModel")
    kind = diffusers("cosmos", "CosmosRotaryPosEmbed")
    turn = kind(made["attention_head_dim"], made["max_size"], (1, 1, 1), rope_scale=made["rope_scale"])
    return turn(torch.zeros(1, 1, *extent), fps=30)


def kandinsky5(at, extent):
    kind = diffusers("kandinsky", "Kandinsky5RoPE3D", "get_freqs")
    made = kind(defaults("kandinsky", "Kandinsky5Transformer3DModel")["axes_dims"])
    turn = made((1, *extent), [torch.arange(n) for n in extent]).flatten(0, 4)  # (N, Dh/2, 2, 2)
    return twice(turn[..., 0, 0]), twice(turn[..., 1, 0])


def prx(at, extent):
    turn = diffusers("prx", "PRXEmbedND")(64, defaults("prx", "PRXTransformer2DModel")["theta"], [32, 32])(at[None])
    return twice(turn[0, 0, ..., 0, 0]), twice(turn[0, 0, ..., 1, 0])


def helios(at, extent):
    made = defaults("helios", "HeliosTransformer3DModel")
    kind = diffusers("helios", "HeliosRotaryPosEmbed")(made["rope_dim"], made["rope_theta"])
    both = kind(torch.arange(extent[0])[None], *extent[1:], torch.device("cpu"))  # (1, 2 Dh, frames, rows, columns)
    return both[0].flatten(1).T.chunk(2, -1)


def complex_table(values):
    return twice(values.real), twice(values.imag)


def z_image(at, extent):
    made = defaults("z_image", "ZImageTransformer2DModel")
    kind = diffusers("z_image", "RopeEmbedder")
    return complex_table(kind(made["rope_theta"], made["axes_dims"], made["axes_lens"])(at.long()))


def qwen_image(at, extent):
    made = defaults("qwenimage", "QwenImageTransformer2DModel")
    kind = diffusers("qwenimage", "QwenEmbedRope")(10_000, list(made["axes_dims_rope"]), scale_rope=True)
    return complex_table(kind([tuple(extent)], max_txt_seq_len=1, device=torch.device("cpu"))[0])


def lumina(at, extent):
    return complex_table(diffusers("embeddings.py", "get_2d_rotary_pos_embed_lumina")(96, *extent).flatten(0, 1))


def lumina2(at, extent):
    made = defaults("lumina2", "Lumina2Transformer2DModel")
    kind = diffusers("lumina2", "Lumina2RotaryPosEmbed")
    return complex_table(kind(10_000, made["axes_dim_rope"], made["axes_lens"])._get_freqs_cis(at[None].long())[0])


def ideogram4(at, extent):
    made = defaults("ideogram4", "Ideogram4Transformer2DModel")
    kind = diffusers("ideogram4", "Ideogram4MRoPE")
    cos, sin = kind(made["attention_head_dim"], made["rope_theta"], made["mrope_section"])(at[None].long())
    return cos[0], sin[0]


def hunyuan_dit(at, extent):
    return diffusers("embeddings.py", "get_2d_rotary_pos_embed")(88, ((0, 0), extent), extent)


def glm_image(at, extent):
    return diffusers("glm_image", "GlmImageRotaryPosEmbed")(128, 1)(torch.zeros(1, 1, *extent))


def cogvideox(at, extent):
    grid, of = extent[1:], diffusers("embeddings.py", "get_3d_rotary_pos_embed")
    return of(64, None, grid, extent[0], grid_type="slice", max_size=grid)


def allegro(at, extent):
    made = defaults("allegro", "AllegroTransformer3DModel")
    scale = [made[f"interpolation_scale_{axis}"] for axis in "thw"]
    of = diffusers("embeddings.py", "get_3d_rotary_pos_embed_allegro")
    found = of(made["attention_head_dim"], ((0, 0), extent[1:]), extent[1:], extent[0], scale)[:3]
    return [torch.cat([each[i][at[:, axis].long()] for axis, each in enumerate(found)], -1) for i in (0, 1)]


def minimax_h3(at, extent):
    made = defaults("minimax_h3", "MiniMaxH3Transformer3DModel")
    return diffusers("minimax_h3", "MiniMaxH3RotaryPosEmbed")(made["rope_freq_dim"], made["rope_theta"])(at)


# transformers and timm ----------------------------------------------------------------------------------------------


def vision(kind, config, swap=False, cast=None, batched=False):
    """A vision rotary of transformers, with its default sizes."""

    def run(at, extent):
        at = at.flip(-1) if swap else at
        x = torch.zeros(1, dtype=cast or at.dtype) if at.dtype == torch.float32 else at
        cos, sin = kind(config)(x, at[None] if batched else at)
        return cos.reshape(len(at), -1), sin.reshape(len(at), -1)

    return run


def text(kind, config, *more):
    """Of three rows of places, or one."""

    def run(at, extent):
        rows = at.T[:, None] if at.shape[-1] == 3 else at.T
        cos, sin = kind(config)(at[:1], rows, *more)
        return cos.reshape(len(at), -1), sin.reshape(len(at), -1)

    return run


def rope(theta, kind="default", **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


def dinov3_vit(at, extent):
    config = SimpleNamespace(rope_theta=100.0, hidden_size=384, num_attention_heads=6, image_size=16, patch_size=1)
    return dinov3.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 1, *extent))


def unlike_pairs(name):
    """The cos of the two channels of each pair, of what is refused because they differ: (N, pairs) twice."""
    at = torch.arange(9.0)
    if name == "ernie_image":
        made = defaults("ernie_image", "ErnieImageTransformer2DModel")
        kind = diffusers("ernie_image", "ErnieImageEmbedND3", "rope")(128, made["rope_theta"], made["rope_axes_dim"])
        return kind(at[None, :, None].expand(1, 9, 3))[0, :, 0].cos().chunk(2, -1)  # turned as (i, i + n)
    x = torch.eye(20).expand(1, 9, 20, 20).transpose(1, 2)  # each channel alone, turned as (2i, 2i+1)
    turned = vjepa2.rotate_queries_or_keys(x.reshape(1, 1, -1, 20), at.repeat(20)).unflatten(2, (20, 9))[0, 0]
    return turned.diagonal(dim1=0, dim2=2).unflatten(-1, (-1, 2)).unbind(-1)


def llama4_vision(at, extent):
    """Of squares; its class token, at 0, is the last."""
    config = llama4.Llama4VisionConfig(image_size=14 * extent[0], patch_size=14)
    return complex_table(llama4.Llama4VisionRotaryEmbedding(config)(torch.zeros(1))[:-1].flatten(1))


def timm(width, **options):
    def run(at, extent):
        made = RotaryEmbeddingCat(width, in_pixels=False, feat_shape=list(extent), **options).get_embed()
        sin, cos = made.chunk(2, -1)
        return cos, sin

    return run


LLAMA = dict(hidden_size=256, num_attention_heads=2)
QWEN2 = Qwen2VLTextConfig(**LLAMA, rope_parameters=rope(1e6, mrope_section=[16, 24, 24]))
QWEN3 = Qwen3VLTextConfig(**LLAMA, head_dim=128, rope_parameters=rope(5e6, mrope_section=[24, 20, 20]))
LLAMA3 = rope(
    5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
ORIGINALS = {
    "flux": embed_nd("flux", "FluxPosEmbed", "FluxTransformer2DModel", 10_000),
    "flux2": embed_nd("flux2", "Flux2PosEmbed", "Flux2Transformer2DModel"),
    "chroma": embed_nd("chroma", "FluxPosEmbed", "ChromaTransformer2DModel", 10_000),
    "bria": embed_nd("bria", "BriaEmbedND", "BriaTransformer2DModel"),
    "bria_fibo": embed_nd("bria_fibo", "BriaFiboEmbedND", "BriaFiboTransformer2DModel"),
    "longcat_image": embed_nd("longcat_image", "LongCatImagePosEmbed", "LongCatImageTransformer2DModel", 10_000),
    "ovis_image": embed_nd("ovis_image", "OvisImagePosEmbed", "OvisImageTransformer2DModel", 10_000),
    "krea2": embed_nd("krea2", "Krea2RotaryPosEmbed", "Krea2Transformer2DModel"),
    "z_image": z_image,
    "qwen_image": qwen_image,
    "lumina": lumina,
    "lumina2": lumina2,
    "ideogram4": ideogram4,
    "hunyuan_image": of_latents("hunyuanimage", "HunyuanImageRotaryPosEmbed", "HunyuanImageTransformer2DModel"),
    "hunyuan_dit": hunyuan_dit,
    "glm_image": glm_image,
    "prx": prx,
    "wan": of_latents("wan", "WanRotaryPosEmbed", "WanTransformer3DModel"),
    "skyreels_v2": of_latents("skyreels_v2", "SkyReelsV2RotaryPosEmbed", "SkyReelsV2Transformer3DModel"),
    "sana_video": of_latents("sana_video", "WanRotaryPosEmbed", "SanaVideoTransformer3DModel"),
    "helios": helios,
    "hunyuan": of_latents("hunyuan_video", "HunyuanVideoRotaryPosEmbed", "HunyuanVideoTransformer3DModel"),
    "hunyuan15": of_latents("hunyuan_video15", "HunyuanVideo15RotaryPosEmbed", "HunyuanVideo15Transformer3DModel"),
    "motif_video": of_latents("motif_video", "MotifVideoRotaryPosEmbed", "MotifVideoTransformer3DModel"),
    "cosmos": cosmos,
    "kandinsky5": kandinsky5,
    "cogvideox": cogvideox,
    "allegro": allegro,
    "minimax_h3": minimax_h3,
    "dinov3": dinov3_vit,
    "sam2": vision(sam2.Sam2VideoVisionRotaryEmbedding, sam2.Sam2VideoConfig(), swap=True),
    "sam3": vision(sam3.Sam3ViTRotaryEmbedding, sam3.Sam3ViTConfig(), swap=True),
    "pixtral": vision(pixtral.PixtralVisionRotaryEmbedding, pixtral.PixtralVisionConfig(), cast=torch.bfloat16),
    "qwen2vl_vision": vision(qwen2.Qwen2VLVisionRotaryEmbedding, qwen2.Qwen2VLVisionConfig()),
    "qwen3vl_vision": vision(qwen3.Qwen3VLVisionRotaryEmbedding, qwen3.Qwen3VLVisionConfig()),
    "gemma4_vision": vision(
        gemma4.Gemma4VisionRotaryEmbedding, gemma4.Gemma4VisionConfig(), True, torch.bfloat16, batched=True
    ),
    "llama4_vision": llama4_vision,
    "kimi_k25": vision(kimi.Kimi_K25VisionRotaryEmbedding, kimi.Kimi_K25VisionConfig()),
    "minimax_m3_vl": vision(minimax.MiniMaxM3VLVisionRotaryEmbedding, minimax.MiniMaxM3VLVisionConfig()),
    "eva02": timm(64, ref_feat_shape=[16, 16]),
    "perception_encoder": timm(64, ref_feat_shape=[24, 24], grid_offset=1.0, grid_indexing="xy"),
    "rope_vit": timm(64, temperature=100.0, grid_indexing="xy"),
    "qwen2vl": text(qwen2.Qwen2VLRotaryEmbedding, QWEN2),
    "qwen3vl": text(qwen3.Qwen3VLTextRotaryEmbedding, QWEN3),
    "qwen3_5": text(
        qwen35.Qwen3_5TextRotaryEmbedding,
        qwen35.Qwen3_5TextConfig(rope_parameters=rope(1e7, mrope_section=[11, 11, 10], partial_rotary_factor=0.25)),
    ),
    "glm4v": text(
        glm4v.Glm4vTextRotaryEmbedding,
        glm4v.Glm4vTextConfig(rope_parameters=rope(1e4, mrope_section=[8, 12, 12], partial_rotary_factor=0.5)),
    ),
    "llama": text(LlamaRotaryEmbedding, LlamaConfig(**LLAMA)),
    "llama3": text(LlamaRotaryEmbedding, LlamaConfig(**LLAMA, max_position_embeddings=131072, rope_parameters=LLAMA3)),
    "gemma4": text(gemma4.Gemma4TextRotaryEmbedding, gemma4.Gemma4TextConfig(), "full_attention"),
}
