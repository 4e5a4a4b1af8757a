"""transformers' models as peers: ViTMAE with three patches of four left out, and DINOv3.

Both are built from their configuration with random weights, which ours takes over. A configuration's words may follow
in parentheses, as in transformers_vitmae(hidden_size=192, num_attention_heads=3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vit2dpe.errors import ConfigError
from vit2dpe.interop.timm.arguments import exact_ratio
from vit2dpe.interop.transformers.convert import from_transformers
from vit2dpe.models import MAE, ViT
from vit2dpe.models.mae_names import from_transformers as mae_state
from vit2dpe.spec import Plain

VITMAE, DINOV3 = NAMES = ("transformers_vitmae", "transformers_dinov3")
SMALL = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=16)
DECODER = dict(decoder_hidden_size=192, decoder_num_attention_heads=6, decoder_intermediate_size=768)


def contenders(name: str, options: dict[str, Plain], size: tuple[int, int], depth: int | None) -> dict[str, nn.Module]:
    """{"peer", "ours", "limit"} of one of the two names.

    Raises:
        ConfigError: for images that are not square, which neither takes here, and an unknown word of a configuration.
    """
    if size[0] != size[1]:
        raise ConfigError(f"{name} is measured on square images, got {size[0]}x{size[1]}")
    settings = SMALL | (DECODER if name == VITMAE else {}) | dict(image_size=size[0], num_hidden_layers=depth or 12)
    torch.manual_seed(0)
    return (_vitmae if name == VITMAE else _dinov3)(settings | options, set(options))


def _config(kind: Any, settings: dict[str, Any], asked: set[str]) -> Any:
    known = kind().to_dict()
    if unknown := sorted(asked - set(known)):
        raise ConfigError(f"{kind.__name__} of transformers has no {', '.join(unknown)}")
    return kind(**settings)


def _vitmae(settings: dict[str, Any], asked: set[str]) -> dict[str, nn.Module]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    # 1e-6 is the original's; transformers' own default is 1e-12.
    config = _config(ViTMAEConfig, dict(decoder_num_hidden_layers=2, layer_norm_eps=1e-6) | settings, asked)
    peer = ViTMAEForPreTraining(config)
    # transformers 5.23 leaves both tables at zero in a model that is built and not loaded; these are its own formulas.
    peer.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # type: ignore[assignment]
    peer.vit.embeddings.initialize_weights()
    patches = (config.image_size // config.patch_size) ** 2
    peer.decoder.initialize_weights(patches)

    def ours(position: str) -> MAE:
        encoder = ViT(
            position, img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.hidden_size,
            depth=config.num_hidden_layers, num_heads=config.num_attention_heads, num_classes=0,
            mlp_ratio=exact_ratio(config.intermediate_size, config.hidden_size),
        )  # fmt: skip
        model = MAE(
            encoder, decoder_position=position, decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers, decoder_num_heads=config.decoder_num_attention_heads,
            decoder_mlp_ratio=exact_ratio(config.decoder_intermediate_size, config.decoder_hidden_size),
        )  # fmt: skip
        state = mae_state(peer.state_dict())
        if position == "none":
            state = {name: value for name, value in state.items() if "pos_embed" not in name}
        model.load_state_dict(state)
        return model

    noise = torch.rand(1, patches)
    return {"peer": _Theirs(peer, noise), "ours": _Ours(ours("sincos"), noise), "limit": _Ours(ours("none"), noise)}


def _dinov3(settings: dict[str, Any], asked: set[str]) -> dict[str, nn.Module]:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    gated = bool(settings.get("use_gated_mlp"))
    more = dict(pos_embed_rescale=None, num_register_tokens=4, hidden_act="silu" if gated else "gelu")
    config = _config(DINOv3ViTConfig, more | settings, asked)
    peer = DINOv3ViTModel(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return {
        "peer": _Hidden(peer),
        "ours": _Features(from_transformers(peer)),
        "limit": _Features(from_transformers(peer, "none")),
    }


class _Theirs(nn.Module):
    def __init__(self, model: Any, noise: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, noise=self.noise.expand(len(images), -1)).logits  # type: ignore[operator]


class _Ours(_Theirs):
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, noise=self.noise.expand(len(images), -1))[1]  # type: ignore[operator]


class _Hidden(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state


class _Features(_Hidden):
    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)
