"""Text models of Hugging Face's `transformers` as ours, with their weights: BERT, GPT-2, BLOOM, Llama, T5.

A converter reads a config and a state dict and says which of our models it is, with which arguments and weights. What
a model has that ours has not is refused by name; so is a weight that would be left over. Nothing of `transformers` is
imported.

How the layouts differ: q, k and v are one matrix here; GPT-2's matrices are transposed; BLOOM's rows go head by head;
Llama turns channels (i, i + Dh/2) where ours turns (2i, 2i+1), so the rows of q and k change places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, unknown
from .seq2seq import Seq2Seq
from .text import TextDecoder, TextEncoder

Config = dict[str, Any]
State = dict[str, Tensor]


def from_transformers(
    source: nn.Module | str | Path, position: str | None = None, *, plain_rope: bool = False
) -> TextEncoder | TextDecoder | Seq2Seq:
    """Our model with the weights of theirs, in evaluation mode.

    Args:
        source: a model of `transformers`, or a folder with `config.json` and `model.safetensors`.
        position: another encoding; default: its own, so that outputs are equal.
        plain_rope: load a Llama whose config scales its frequencies at the length before scaling; run it under
            `use_policy(model, "yarn", temperature="yarn")` or whichever policy it was scaled by.

    Returns:
        a `TextEncoder` (BERT, without its pooler; with pool="" and the masked head where it has one), a `TextDecoder`
        or a `Seq2Seq`.

    Raises:
        ConfigError: for a family or a setting that is not covered.
        CheckpointError: for weights that are missing or left over.
    """
    if isinstance(source, nn.Module):
        config, state = source.config.to_dict(), dict(source.state_dict())  # type: ignore[operator, union-attr]
    else:
        config, state = _read(Path(source).expanduser())
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise unknown("family", str(family), FAMILIES)
    if family == "llama":
        config = config | {"plain_rope": plain_rope}
    kind, arguments, found = FAMILIES[family](config, _Weights(state))
    if position is not None:
        arguments["position"] = position
        found = {name: value for name, value in found.items() if "position." not in name}
    model = kind(**arguments).eval()
    missing, unexpected = model.load_state_dict(found, strict=False)
    wrong = [name for name in missing if position is None or "position." not in name] + list(unexpected)
    if wrong:
        raise CheckpointError(f"weights without a counterpart: {', '.join(wrong[:5])}")
    return model


class _Weights:
    """A state dict that remembers what was taken from it."""

    def __init__(self, state: State) -> None:
        self.left = dict(state)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise CheckpointError(f"the checkpoint has no {name}")
        return self.left.pop(name).detach().clone()

    def linear(self, ours: str, theirs: str, bias: bool = True) -> State:
        parts = ("weight", "bias") if bias else ("weight",)
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in parts}

    def linears(self, ours: str, theirs: str, names: dict[str, str], bias: bool = True) -> State:
        """Several maps, each under its own name: `names` is ours -> theirs, behind the prefixes."""
        found: State = {}
        for mine, other in names.items():
            found |= self.linear(ours + mine, theirs + other, bias)
        return found

    def joined(self, ours: str, theirs: list[str], bias: bool = True) -> State:
        """Several maps of one input as one: rows below rows."""
        parts = ("weight", "bias") if bias else ("weight",)
        return {f"{ours}.{part}": torch.cat([self.take(f"{name}.{part}") for name in theirs]) for part in parts}

    def without(self, *prefixes: str) -> _Weights:
        """Names without the first of these prefixes that they have."""
        for prefix in prefixes:
            self.left = {name.removeprefix(prefix): value for name, value in self.left.items()}
        return self

    def drop(self, *names: str) -> None:
        """What ours does not need."""
        self.left = {n: v for n, v in self.left.items() if not n.startswith(names) and not n.endswith(names)}

    def head(self, name: str, embedding: Tensor) -> Tensor | None:
        """The matrix of the head, or None where there is none or it is the embedding's."""
        found = self.left.pop(name, None)
        return None if found is None or torch.equal(found, embedding) else found

    def finish(self) -> None:
        if self.left:
            raise CheckpointError(f"weights that ours has no place for: {', '.join(list(self.left)[:5])}")


# Maps of a block that change their names alone: ours -> theirs.
_BERT_BLOCK = {
    "attn.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_BLOOM_BLOCK = {
    "attn.proj": "self_attention.dense",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}
_LLAMA_MAPS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
_LLAMA_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def _bert(config: Config, w: _Weights) -> tuple[type, Config, State]:
    _demand(config, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    w.without("bert.").drop("pooler.", "position_ids", "cls.seq_relationship.", "cls.predictions.decoder.")
    masked = "cls.predictions.bias" in w.left
    embed = "embeddings."
    state = {
        "embed.weight": w.take(embed + "word_embeddings.weight"),
        "type_embed.weight": w.take(embed + "token_type_embeddings.weight"),
        "position.pos_embed": w.take(embed + "position_embeddings.weight")[None],
        **w.linear("embed_norm", embed + "LayerNorm"),
    }
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}."
        state |= w.joined(ours + "attn.qkv", [f"{theirs}attention.self.{n}" for n in ("query", "key", "value")])
        state |= w.linears(ours, theirs, _BERT_BLOCK)
    if masked:
        state["masked_head.bias"] = w.take("cls.predictions.bias")
        state |= w.linear("masked_head.dense", "cls.predictions.transform.dense")
        state |= w.linear("masked_head.norm", "cls.predictions.transform.LayerNorm")
    w.finish()
    return (
        TextEncoder,
        dict(
            position="learned",
            pool="",
            masked_lm=masked,
            vocab_size=config["vocab_size"],
            context=config["max_position_embeddings"],
            embed_dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            norm_eps=config["layer_norm_eps"],
            token_types=config["type_vocab_size"],
            post_norm=True,
            embed_norm=True,
        ),
        state,
    )


def _gpt2(config: Config, w: _Weights) -> tuple[type, Config, State]:
    _demand(
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    w.without("transformer.").drop(".attn.bias", ".attn.masked_bias")
    embedding = w.take("wte.weight")
    state = {"embed.weight": embedding, "position.pos_embed": w.take("wpe.weight")[None], **w.linear("norm", "ln_f")}
    for i in range(config["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        state |= w.linears(ours, theirs, {"norm1": "ln_1", "norm2": "ln_2"})
        for mine, other in (("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"),
                            ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
            state[f"{ours}{mine}.weight"] = w.take(f"{theirs}{other}.weight").t().contiguous()
            state[f"{ours}{mine}.bias"] = w.take(f"{theirs}{other}.bias")
    head = w.head("lm_head.weight", embedding)
    w.finish()
    return (
        TextDecoder,
        dict(
            position="learned",
            vocab_size=config["vocab_size"],
            context=config["n_positions"],
            embed_dim=config["n_embd"],
            depth=config["n_layer"],
            num_heads=config["n_head"],
            hidden=config.get("n_inner") or 4 * config["n_embd"],
            norm_eps=config["layer_norm_epsilon"],
            mlp="gelu_tanh",
            tied=head is None,
        ),
        _with_head(state, head),
    )


def _bloom(config: Config, w: _Weights) -> tuple[type, Config, State]:
    _demand(config, apply_residual_connection_post_layernorm=False)
    w.without("transformer.")
    heads, width = config["n_head"], config["hidden_size"]
    embedding = w.take("word_embeddings.weight")
    state = {"embed.weight": embedding, **w.linear("embed_norm", "word_embeddings_layernorm")}
    state |= w.linear("norm", "ln_f")
    for i in range(config["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        for name, value in w.linear(ours + "attn.qkv", theirs + "self_attention.query_key_value").items():
            state[name] = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)  # theirs: q, k, v of a head
        state |= w.linears(ours, theirs, _BLOOM_BLOCK)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    return (
        TextDecoder,
        dict(
            position="alibi",
            vocab_size=config["vocab_size"],
            context=config.get("seq_length") or 2048,
            embed_dim=width,
            depth=config["n_layer"],
            num_heads=heads,
            norm_eps=config["layer_norm_epsilon"],
            mlp="gelu_tanh",
            embed_norm=True,
            tied=head is None,
        ),
        _with_head(state, head),
    )


def _llama(config: Config, w: _Weights) -> tuple[type, Config, State]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads, bias = config.get("num_key_value_heads") or heads, bool(config.get("attention_bias"))
    _demand(config, hidden_act="silu", mlp_bias=bias, head_dim=width // heads)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    scaled = rope.get("rope_type", "default") != "default"
    if scaled and not config["plain_rope"]:
        raise ConfigError(
            f"this Llama scales its frequencies ({rope['rope_type']}); load it with plain_rope=True and run it under "
            "use_policy, which scales them at evaluation"
        )
    w.without("model.").drop("rotary_emb.inv_freq")
    embedding = w.take("embed_tokens.weight")
    state = {"embed.weight": embedding, **w.linear("norm", "norm", bias=False)}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        for part in ("weight", "bias") if bias else ("weight",):
            q, k, v = (w.take(f"{theirs}self_attn.{n}_proj.{part}") for n in "qkv")
            state[f"{ours}attn.qkv.{part}"] = torch.cat([interleaved(q, heads), interleaved(k, kv_heads), v])
        state |= w.linears(ours, theirs, _LLAMA_MAPS, bias)
        state |= w.linears(ours, theirs, _LLAMA_NORMS, bias=False)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    before = rope.get("original_max_position_embeddings") if scaled else None
    return (
        TextDecoder,
        dict(
            position=f"rope(base={float(rope['rope_theta'])})",
            vocab_size=config["vocab_size"],
            context=before or config["max_position_embeddings"],
            embed_dim=width,
            depth=config["num_hidden_layers"],
            num_heads=heads,
            kv_heads=kv_heads,
            hidden=config["intermediate_size"],
            norm="rms",
            norm_eps=config["rms_norm_eps"],
            mlp="swiglu",
            bias=bias,
            tied=head is None,
        ),
        _with_head(state, head),
    )


def _t5(config: Config, w: _Weights) -> tuple[type, Config, State]:
    width, heads = config["d_model"], config["num_heads"]
    _demand(config, d_kv=width / heads)
    mlps = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}
    if config["feed_forward_proj"] not in mlps:
        raise unknown("feed_forward_proj", config["feed_forward_proj"], mlps)
    embedding = w.take("shared.weight")
    w.drop("embed_tokens.weight")
    state = {"encoder.embed.weight": embedding, "decoder.embed.weight": embedding}
    depths = dict(encoder=config["num_layers"], decoder=config.get("num_decoder_layers") or config["num_layers"])
    for half, depth in depths.items():
        table = w.take(f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        state[f"{half}.position.relative_attention_bias"] = table[None]
        state |= w.linear(f"{half}.norm", f"{half}.final_layer_norm", bias=False)
        for i in range(depth):
            ours, theirs = f"{half}.blocks.{i}.", f"{half}.block.{i}.layer."
            last = 2 if half == "decoder" else 1
            self_, dense = f"{theirs}0.SelfAttention.", f"{last}.DenseReluDense."
            names = {"attn.proj": "0.SelfAttention.o", "norm1": "0.layer_norm", "norm2": f"{last}.layer_norm"}
            names |= {"mlp.fc2": dense + "wo"}
            if config["feed_forward_proj"] == "relu":
                names |= {"mlp.fc1": dense + "wi"}
            else:
                names |= {"mlp.fc1_g": dense + "wi_0", "mlp.fc1_x": dense + "wi_1"}
            state |= w.joined(ours + "attn.qkv", [self_ + n for n in "qkv"], bias=False)
            if half == "decoder":
                cross = "1.EncDecAttention."
                names |= {"cross.q": cross + "q", "cross.proj": cross + "o", "norm_cross": "1.layer_norm"}
                state |= w.joined(ours + "cross.kv", [theirs + cross + n for n in "kv"], bias=False)
            state |= w.linears(ours, theirs, names, bias=False)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    buckets, reach = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    word = f"t5(buckets={buckets}, max_distance={reach}, bidirectional="
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return (
        Seq2Seq,
        dict(
            position=f"{word}true)",
            decoder_position=f"{word}false)",
            source_vocab=config["vocab_size"],
            target_vocab=config["vocab_size"],
            shared=True,
            context=512,
            embed_dim=width,
            depth=depths["encoder"],
            decoder_depth=depths["decoder"],
            num_heads=heads,
            hidden=config["d_ff"],
            norm="rms",
            norm_eps=config["layer_norm_epsilon"],
            mlp=mlps[config["feed_forward_proj"]],
            bias=False,
            scale=1.0,
            tied=head is None,
            logit_scale=width**-0.5 if scaled else 1.0,
        ),
        _with_head(state, head, "decoder."),
    )


FAMILIES: dict[str, Callable[[Config, _Weights], tuple[type, Config, State]]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "llama": _llama,
    "t5": _t5,
}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, head by head: (i, i + Dh/2) of each head to (2i, 2i+1)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _with_head(state: State, head: Tensor | None, prefix: str = "") -> State:
    return state if head is None else state | {f"{prefix}head.weight": head}


def _demand(config: Config, **wanted: Any) -> None:
    """Refuse what our model would compute differently."""
    for name, value in wanted.items():
        if config.get(name, value) != value and config[name] is not None:
            raise ConfigError(f"a {config['model_type']} with {name}={config[name]!r} is not covered, only {value!r}")


def _read(folder: Path) -> tuple[Config, State]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: give a folder that transformers saved")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
