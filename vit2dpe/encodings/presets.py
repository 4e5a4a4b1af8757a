"""Released conventions of rotary encodings, as data: what `rope(preset=NAME)` stands for, and what it is equal to.

A row gives options of `rope`, of axes in the order index, time, rows, columns, length. The original may have its axes
in another order and its pairs elsewhere (`axes`, `channels`): channels are permuted then, and `channels_of` in
conventions.py says how. `head_dim` is the head width that the options belong to, None where any will do. `off` is how
far cosines of the original's own tables are from float64 at places below 60, of text below 2000: float32 tables, or
bfloat16 ones where transformers casts them to the activations' (1e-3). `tests/encodings/test_presets.py` holds all.
"""

from __future__ import annotations

from typing import NamedTuple

from ..spec import Plain


class Preset(NamedTuple):
    """A convention.

    Args:
        options: of the word.
        axes: the axes of the original, in the order of its pairs.
        head_dim: the head width that the options belong to; None: any.
        channels: "pairs" (2i, 2i+1); "halves" (i, i + n) of the n pairs that turn; "halves by axis", of each axis.
        places: of its tokens, where they are not 0, 1, 2, ... along each axis.
        source: the function it is equal to.
        off: the largest distance of that function's cosines, as released, from float64.
        word: the encoding.
    """

    options: dict[str, Plain]
    axes: str
    head_dim: int | None
    channels: str
    source: str
    off: float
    places: str = ""
    word: str = "rope"


INDEX, TIME, IMAGE, BACK = "index rows columns", "time rows columns", "rows columns", "columns rows"
BFL: dict[str, Plain] = {"sections": (8, 28, 28), "base": 1e4}  # (16, 56, 56) channels
HUNYUAN: dict[str, Plain] = {"sections": (8, 28, 28), "base": 256.0}
WAN: dict[str, Plain] = {"sections": (22, 21, 21), "base": 1e4}  # 2 floor(Dh/6) channels of rows, of columns
D, T, M = "diffusers transformer_", "transformers ", "timm "

PRESETS: dict[str, Preset] = {
    # images, diffusers
    "flux": Preset(BFL, INDEX, 128, "pairs", D + "flux.FluxPosEmbed", 3e-8),
    "flux2": Preset(
        {"sections": (16, 16, 16, 16), "base": 2000.0}, TIME + " length", 128, "pairs", D + "flux2.Flux2PosEmbed", 3e-8
    ),
    "chroma": Preset(BFL, INDEX, 128, "pairs", D + "chroma.FluxPosEmbed", 3e-8),
    "bria": Preset(BFL, INDEX, 128, "pairs", D + "bria.BriaEmbedND", 3e-8),
    "bria_fibo": Preset(BFL, INDEX, 128, "pairs", D + "bria_fibo.BriaFiboEmbedND", 3e-8),
    "longcat_image": Preset(BFL, INDEX, 128, "pairs", D + "longcat_image.LongCatImagePosEmbed", 3e-8),
    "ovis_image": Preset(BFL, INDEX, 128, "pairs", D + "ovis_image.OvisImagePosEmbed", 3e-8),
    "krea2": Preset(
        {"sections": (16, 24, 24), "base": 1000.0}, INDEX, 128, "pairs", D + "krea2.Krea2RotaryPosEmbed", 3e-8
    ),
    "z_image": Preset({"sections": (16, 24, 24), "base": 256.0}, INDEX, 128, "pairs", D + "z_image.RopeEmbedder", 2e-6),
    "qwen_image": Preset(
        BFL, INDEX, 128, "pairs", D + "qwenimage.QwenEmbedRope", 2e-6, "rows and columns from -ceil(n/2)"
    ),
    "lumina": Preset(
        {"base": 1e4, "order": "interleaved"}, IMAGE, None, "pairs",
        "diffusers embeddings.get_2d_rotary_pos_embed_lumina", 2e-6,
    ),
    "lumina2": Preset(
        {"sections": (16, 16, 16), "base": 1e4}, INDEX, 96, "pairs", D + "lumina2.Lumina2RotaryPosEmbed", 2e-15,
        "index: that of the caption's end",
    ),
    "ideogram4": Preset(
        {"sections": (88, 20, 20), "base": 5e6, "bank": "whole", "order": "interleaved"}, TIME, 256, "halves",
        D + "ideogram4.Ideogram4MRoPE", 4e-6, "images from 65536",
    ),
    "hunyuan_image": Preset({"base": 256.0}, IMAGE, None, "pairs", D + "hunyuanimage.HunyuanImageRotaryPosEmbed", 3e-6),
    "hunyuan_dit": Preset(
        {"base": 1e4}, BACK, None, "pairs", "diffusers embeddings.get_2d_rotary_pos_embed", 3e-6,
        "of other grids: scaled to the crop of a 32x32 grid",
    ),
    "glm_image": Preset({"base": 1e4}, IMAGE, None, "halves", D + "glm_image.GlmImageRotaryPosEmbed", 2e-6),
    "prx": Preset({"base": 1e4}, IMAGE, None, "pairs", D + "prx.PRXEmbedND", 3e-8),
    # video, diffusers
    "wan": Preset(WAN, TIME, 128, "pairs", D + "wan.WanRotaryPosEmbed", 3e-8),
    "skyreels_v2": Preset(WAN, TIME, 128, "pairs", D + "skyreels_v2.SkyReelsV2RotaryPosEmbed", 3e-8),
    "sana_video": Preset(
        {"sections": (20, 18, 18), "base": 1e4}, TIME, 112, "pairs", D + "sana_video.WanRotaryPosEmbed", 3e-8
    ),
    "helios": Preset(WAN, TIME, 128, "pairs", D + "helios.HeliosRotaryPosEmbed", 2e-6),
    "hunyuan": Preset(HUNYUAN, TIME, 128, "pairs", D + "hunyuan_video.HunyuanVideoRotaryPosEmbed", 3e-6),
    "hunyuan15": Preset(HUNYUAN, TIME, 128, "pairs", D + "hunyuan_video15.HunyuanVideo15RotaryPosEmbed", 3e-6),
    "motif_video": Preset(HUNYUAN, TIME, 128, "pairs", D + "motif_video.MotifVideoRotaryPosEmbed", 3e-8),
    "cosmos": Preset(  # NTK of a time twice as long is in its base
        {"sections": (22, 21, 21), "base": (1e4 * 2 ** (44 / 42), 1e4, 1e4)}, TIME, 128, "halves",
        D + "cosmos.CosmosRotaryPosEmbed", 2e-6, "time x 24 / frames a second",
    ),
    "kandinsky5": Preset(
        {"sections": (8, 12, 12), "base": 1e4}, TIME, 64, "pairs", D + "kandinsky.Kandinsky5RoPE3D", 1e-6
    ),
    "cogvideox": Preset(
        {"sections": (8, 12, 12), "base": 1e4}, TIME, 64, "pairs", "diffusers embeddings.get_3d_rotary_pos_embed", 2e-6,
        "of other grids (1.0): scaled to the crop",
    ),
    "allegro": Preset(
        {"sections": (16, 16, 16), "base": 1e4, "step": (1 / 2.2, 0.5, 0.5)}, TIME, 96, "halves by axis",
        "diffusers embeddings.get_3d_rotary_pos_embed_allegro", 7e-7,
    ),
    "minimax_h3": Preset(
        {"sections": (16, 16, 16), "base": 1e4}, TIME, 128, "halves", D + "minimax_h3.MiniMaxH3RotaryPosEmbed", 2e-6
    ),
    # vision encoders
    "dinov3": Preset(
        {}, IMAGE, None, "halves", T + "dinov3_vit.DINOv3ViTRopePositionEmbedding", 7e-8, "2 (p + 1/2) / n - 1",
        "rope_dinov3",
    ),
    "sam2": Preset({"base": 1e4}, BACK, None, "pairs", T + "sam2_video.Sam2VideoVisionRotaryEmbedding", 3e-6),
    "sam3": Preset(
        {"base": 1e4}, BACK, None, "pairs", T + "sam3.Sam3ViTRotaryEmbedding", 8e-7,
        "outside of windows: x 24 / columns",
    ),
    "pixtral": Preset(  # the even frequencies of a head are the rows', the odd ones the columns'
        {"base": 1e4, "step": (1.0, 1e4 ** (-1 / 32))}, IMAGE, 64, "halves", T + "pixtral.PixtralVisionRotaryEmbedding",
        2e-3,
    ),
    "qwen2vl_vision": Preset({"base": 1e4}, IMAGE, None, "halves", T + "qwen2_vl.Qwen2VLVisionRotaryEmbedding", 4e-6),
    "qwen3vl_vision": Preset({"base": 1e4}, IMAGE, None, "halves", T + "qwen3_vl.Qwen3VLVisionRotaryEmbedding", 4e-6),
    "gemma4_vision": Preset(
        {"base": 100.0}, BACK, None, "halves by axis", T + "gemma4.Gemma4VisionRotaryEmbedding", 2e-3
    ),
    "llama4_vision": Preset(
        {"base": 1e4, "start": 1.0}, BACK, None, "pairs", T + "llama4.Llama4VisionRotaryEmbedding", 2e-6, "from 1"
    ),
    "kimi_k25": Preset(
        {"base": 1e4, "order": "interleaved"}, BACK, None, "halves", T + "kimi_k25.Kimi_K25VisionRotaryEmbedding", 4e-6
    ),
    "minimax_m3_vl": Preset(
        {"base": 1e4}, TIME, None, "halves", T + "minimax_m3_vl.MiniMaxM3VLVisionRotaryEmbedding", 2e-6
    ),
    "eva02": Preset({"base": 1e4}, IMAGE, None, "pairs", M + "RotaryEmbeddingCat", 5e-7, "x 16 / n"),
    "perception_encoder": Preset(
        {"base": 1e4, "start": 1.0}, BACK, None, "pairs", M + "RotaryEmbeddingCat", 2e-6,
        "(p + 1) x 24 / n, of L/14 at 336",
    ),
    "rope_vit": Preset({"base": 100.0}, BACK, None, "pairs", M + "RotaryEmbeddingCat", 2e-6),
    # text, and images among it
    "qwen2vl": Preset(
        {"sections": (16, 24, 24), "base": 1e6, "bank": "whole"}, TIME, 128, "halves",
        T + "qwen2_vl.Qwen2VLRotaryEmbedding", 5e-8,
    ),
    "qwen3vl": Preset(
        {"sections": (24, 20, 20), "base": 5e6, "bank": "whole", "order": "interleaved"}, TIME, 128, "halves",
        T + "qwen3_vl.Qwen3VLTextRotaryEmbedding", 3e-6,
    ),
    "qwen3_5": Preset(
        {"sections": (11, 11, 10), "base": 1e7, "bank": "whole", "order": "interleaved", "partial": 0.25}, TIME, 256,
        "halves", T + "qwen3_5.Qwen3_5TextRotaryEmbedding", 2e-6,
    ),
    "glm4v": Preset(
        {"sections": (8, 12, 12), "base": 1e4, "bank": "whole", "partial": 0.5}, TIME, 128, "pairs",
        T + "glm4v.Glm4vTextRotaryEmbedding", 2e-7,
    ),
    "llama": Preset({"base": 1e4}, "length", None, "halves", T + "llama.LlamaRotaryEmbedding", 2e-4),
    "llama3": Preset(
        {"base": 5e5, "llama3": (8.0, 1.0, 4.0, 8192.0)}, "length", None, "halves",
        T + "llama.LlamaRotaryEmbedding", 2e-4,
    ),
    "gemma4": Preset(  # of the layers with full attention
        {"base": 1e6, "zeros": 192}, "length", 512, "halves", T + "gemma4.Gemma4TextRotaryEmbedding", 2e-4
    ),
}  # fmt: skip

REFUSED = {  # what is released and no rotation of pairs at frequencies that heads share, or not by these options
    "ltx": "its bank ascends over all channels of all heads, so that each head has frequencies of its own",
    "vjepa2": "it tiles angles (w, w) where pairs are (2i, 2i+1): the two of a pair turn by different angles",
    "ernie_image": "it doubles angles in pairs where channels are turned in halves: the two of a pair turn differently",
    "mochi": "its frequencies are learned, `rope_mixed`, and its places scaled to the area of the grid",
    "cogview4": "places are floor(256 i / n), which no spacing is: give Positions of these coordinates to base=10000",
    "dype": "its frequencies change with the step of diffusion, and an encoding has places alone",
}
