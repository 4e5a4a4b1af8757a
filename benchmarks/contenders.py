"""The modules of a comparison: a peer's, ours with the peer's weights, and ours without an encoding.

At level `encoder` these are whole models. The inputs of a single block or attention are recorded in a forward pass of
the whole models: rotations, and biases shared by all blocks, are inputs of both sides; what a block computes in every
forward is computed here too. At level `table` the encodings run alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hf, rotation, x_transformers
from benchmarks.ways import blocks
from vit2dpe.encodings import PositionEncoding, Sum, named_encodings
from vit2dpe.errors import ConfigError
from vit2dpe.interop.timm.convert import from_timm
from vit2dpe.models import Swin
from vit2dpe.models.swin.stage import in_full
from vit2dpe.signal import Dense, Signal
from vit2dpe.spec import Plain, parse_terms

LEVELS = ("op", "table", "attention", "block", "encoder")
TORCHVISION, OWN = "torchvision_swin_t", "vit2dpe_"
WHOLE = {name: package for package in (hf, x_transformers) for name in package.NAMES}  # at level encoder alone


def contenders(
    word: str, size: tuple[int, int], batch: int, depth: int | None = None, level: str = "encoder", block: int = 0,
    device: str = "cpu",
) -> dict[str, nn.Module]:  # fmt: skip
    """{"peer", "ours", "limit"} of a model, `name` or `name(argument=value)`, on a device; a table has no limit.

    Of one of ours, `vit2dpe_small_patch16_224(position=lookhere)`, the peer is the same with its biases as matrices.
    `fused=true` among the arguments sends all attention of timm's through the fused kernel (TIMM_FUSED_ATTN=2).

    Raises:
        ConfigError: for an unknown name, and for a level that the model does not have.
    """
    name, options = _read(word)
    if name in WHOLE:
        if level != "encoder":
            raise ConfigError(f"{name} is measured as a whole, got level={level}")
        return placed(WHOLE[name].contenders(name, options, size, depth), device)
    if name.startswith(OWN):
        if level != "encoder":
            raise ConfigError(f"{name} is measured as a whole, got level={level}")
        return placed(_own(name, options, size, depth), device)
    if name in rotation.PACKAGES and (level != "op" or options):
        raise ConfigError(f"{name} has no models and no arguments, it is measured at level=op alone; got level={level}")
    peer = _peer(rotation.ROPE, {}, size, depth) if name in rotation.PACKAGES else _peer(name, options, size, depth)
    with torch.no_grad():
        for parameter in peer.parameters():  # LayerScale and tables that start near zero would hide a difference
            parameter.add_(torch.randn_like(parameter) * 0.02)
    models = placed({"peer": peer, "ours": _ours(peer, size, None), "limit": _ours(peer, size, "none")}, device)
    if level == "encoder":
        return models
    if level == "table":
        return _tables(word, models)
    of = {kind: blocks(model) for kind, model in models.items()}
    if block >= len(of["ours"]):
        raise ConfigError(f"{word} has {len(of['ours'])} blocks, counted from 0; got block={block}")
    found: dict[str, nn.Module] = {}
    parts: dict[str, Any] = {kind: of_kind[block] for kind, of_kind in of.items()}
    images = torch.zeros(batch, 3, *size, device=device)
    inputs = {kind: _inputs(models[kind], part, images) for kind, part in parts.items()}
    if level == "op":
        (x, *_), words = inputs["peer"]
        return rotation.contenders(name, parts["peer"].attn, words.get("rope"), x.shape[1:])
    inputs["ours"] = _turned(parts["ours"], *inputs["ours"])
    for kind, part in parts.items():
        make = _Block if level == "block" else _PeerAttention if kind == "peer" else _OurAttention
        found[kind] = make(part, *inputs[kind])
    return found


def placed(modules: dict[str, nn.Module], device: str) -> dict[str, nn.Module]:
    """On the device before any input of a part is recorded there, and in evaluation mode."""
    return {kind: module.to(device).eval() for kind, module in modules.items()}


def tokens(modules: dict[str, nn.Module], batch: int, size: tuple[int, int]) -> Tensor:
    """Random inputs: images (B, 3, H, W), or tokens of the peer's own `shape`."""
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = getattr(modules["peer"], "shape", (3, *size))
    return torch.randn(batch, *shape, generator=generator)


def _read(word: str) -> tuple[str, dict[str, Plain]]:
    """A model's name and its arguments."""
    import timm

    spelled = parse_terms(word, "model", [*timm.list_models(), TORCHVISION, *WHOLE, *rotation.PACKAGES])
    if len(spelled) != 1:
        raise ConfigError(f"one model at a time, separated by commas, got {word!r}")
    return spelled[0]


def _peer(name: str, options: dict[str, Plain], size: tuple[int, int], depth: int | None) -> nn.Module:
    import timm

    torch.manual_seed(0)
    if name == TORCHVISION:
        if options or depth is not None:
            raise ConfigError(f"{TORCHVISION} takes no arguments and no depth")
        from torchvision.models.swin_transformer import SwinTransformer

        shape = dict(patch_size=[4, 4], embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7])
        return SwinTransformer(**shape, num_classes=10, stochastic_depth_prob=0.0)
    fused = options.pop("fused", False)
    settings: dict[str, Plain | tuple[int, int]] = {"img_size": size, "num_classes": 10, "drop_path_rate": 0.0}
    if depth is not None:
        settings["depth"] = depth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = timm.create_model(name, **settings | options)
        except TypeError as error:
            raise ConfigError(f"{name} cannot be made: {error}") from None
    for module in model.modules():
        if fused and hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


def _own(name: str, options: dict[str, Plain], size: tuple[int, int], depth: int | None) -> dict[str, nn.Module]:
    """A model of ours, for encodings that no peer has; in place of a peer the same one, its biases as matrices."""
    peer, ours = (_peer(name, dict(options), size, depth) for _ in range(2))  # of one seed
    limit = _peer(name, options | dict(position="none"), size, depth)
    limit.load_state_dict({key: value for key, value in ours.state_dict().items() if key in limit.state_dict()})
    for encoding in named_encodings(peer).values():
        encoding.register_forward_hook(_as_matrices)
    return {"peer": peer, "ours": ours, "limit": limit}


def _as_matrices(encoding: nn.Module, at: tuple[object, ...], signal: Signal) -> Signal:
    """A forward hook."""
    return signal.with_bias(tuple(Dense(term.dense()) for term in signal.bias))


def _ours(peer: nn.Module, size: tuple[int, int], position: str | None) -> nn.Module:
    if not type(peer).__module__.startswith("torchvision"):
        return from_timm(peer, position)
    swin = Swin(position or "relative", img_size=size, num_classes=10, padding="attend", drop_path_rate=0.0)
    state = {name: value for name, value in peer.state_dict().items() if position is None or "relative" not in name}
    swin.load_state_dict(state)
    return swin


def _inputs(model: nn.Module, part: nn.Module, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `part` is called with in a forward pass of `model`."""
    caught: list[Any] = []
    handle = part.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(images)
    handle.remove()
    return caught[0]


def _turned(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the block's own rotation in its signal: timm's blocks receive theirs from outside too."""
    own = part.attn.position
    if own is None or "bias" in own.gives:
        return args, kwargs
    x, signal, at, *rest = args
    with torch.no_grad():
        signal = signal.plus(own(at))
    part.attn.position = None
    return (x, signal, at, *rest), kwargs


class _Block(nn.Module):
    """A block, all inputs but the tokens fixed."""

    def __init__(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.part, self.rest, self.kwargs = part, args[1:], kwargs
        self.shape = args[0].shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, *self.rest, **self.kwargs)


class _PeerAttention(_Block):
    """The attention of a peer's block; of a timm Swin with the roll and the windows around it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part._attn(x) if hasattr(self.part, "_attn") else self.part.attn(x, **self.kwargs)


class _OurAttention(_Block):
    """Our attention, with the bias that its block computes in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        signal, at, *windows = self.rest
        if self.part.attn.position is not None:
            signal = signal.plus(self.part.attn.position(at))
        return self.part.attn(x, in_full(signal) if windows else signal, *windows)


def _tables(word: str, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    peer: Any = models["peer"]
    if hasattr(getattr(peer, "rope", None), "freqs"):
        return {"peer": _PeerRotations(peer), "ours": _OurTables(models["ours"])}
    if hasattr(peer, "blocks") and getattr(peer.blocks[0].attn, "rel_pos", None) is not None:
        return {"peer": _PeerBiases(peer), "ours": _OurTables(models["ours"])}
    raise ConfigError(f"{word} learns no rotations and no biases of each block, whose making could be compared alone")


class _PeerRotations(nn.Module):
    """timm's (depth, H, N, 2 Dh): sines, then cosines, each number for both channels of a pair."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rope, self.grid = model.rope, model.patch_embed.grid_size

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.rope.get_embed(shape=self.grid)]

    @staticmethod
    def plain(found: list[Tensor]) -> Tensor:
        """(2, depth, H, N, Dh/2) cosines and sines."""
        sin, cos = found[0].unflatten(-1, (2, -1, 2))[..., 0].unbind(-2)
        return torch.stack([cos, sin])


class _PeerBiases(nn.Module):
    """(1, H, N, N) of each block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(block.attn.rel_pos for block in model.blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part.get_bias() for part in self.parts]  # type: ignore[operator]

    plain = staticmethod(torch.cat)


class _OurTables(nn.Module):
    """The signals of a model's encodings for all blocks: rotations, or biases as matrices."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        device = model.patch_embed.proj.weight.device
        self.at = model.positions(*model.patch_embed.img_size, device)
        own = [block.attn.position for block in model.blocks]
        self.parts = nn.ModuleList([model.position] if own[0] is None else own)

    def forward(self, x: Tensor) -> list[Tensor]:
        at = type(self.at)(
            self.at.coords, self.at.extent, self.at.prefix
        )  # new Positions: nothing is shared with the forward before
        signals = [part(at) for part in self.parts]
        if signals[0].q_rotation is not None:
            return [tensor for signal in signals for tensor in signal.q_rotation]
        return [term.dense() for signal in signals for term in signal.bias]

    def plain(self, found: list[Tensor]) -> Tensor:
        if found[0].ndim == 4 and len(found) == 2 * len(self.parts):
            both = torch.stack([torch.cat(found[0::2]), torch.cat(found[1::2])])
            return both[..., self.at.prefix :, :]
        return torch.cat(found)

    def gradients(self, given: list[Tensor]) -> list[Tensor]:
        """The peer's gradients, on our tables: a pair's two numbers are one, rows of the prefix get nothing."""
        if not any("rotation" in part.gives for part in self.parts):  # type: ignore[operator]
            return given
        both = given[0].unflatten(-1, (2, -1, 2)).sum(-1)
        front = both.new_zeros(*both.shape[:2], self.at.prefix, *both.shape[3:])
        sin, cos = torch.cat([front, both], dim=2).unbind(-2)
        return [tensor[None] for pair in zip(cos, sin, strict=True) for tensor in pair]


def encodings_of(module: nn.Module) -> list[nn.Parameter]:
    """Learned parameters of what acts within attention, ours and the peers'."""
    ours = [part for part in module.modules() if isinstance(part, PositionEncoding) and not isinstance(part, Sum)]
    if ours:
        return [p for part in ours if "token" not in part.gives for p in part.parameters()]
    if isinstance(module, _PeerBiases | _PeerRotations):
        return list(module.parameters())
    words = ("rel_pos", "relative_position_bias_table", "freqs", "cpb_mlp")
    return [p for name, p in module.named_parameters() if any(word in name for word in words)]
