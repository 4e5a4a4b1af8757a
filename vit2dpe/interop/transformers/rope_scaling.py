"""Frequencies that a config of `transformers` scales at every length, as options of `rope`: linear, llama3, yarn.

    linear     rope(step=1/f)
    llama3     rope(llama3=(f, low, high, L))
    yarn       rope(factors=(f_0, ...)),  1/f_i = (1 - e_i)/f + e_i,  e_i = 1 - clamp((i - low)/(high - low), 0, 1)
               over pair i of a head; low and high are the pairs that turn beta_fast and beta_slow times over L tokens,
               rounded outwards where the config truncates; logits times a^2, a = 0.1 ln f + 1 or `attention_factor`
    longrope   the policy longrope(long_factor, short_factor) over L tokens, which is the model's own; logits times a^2,
               a = (1 + ln f / ln L)^(1/2)

Source: transformers, `modeling_rope_utils.py`, the functions `_compute_*_parameters`. How ours differs: float64; theirs
scales sine and cosine by a, ours the logits of all layers. longrope: theirs goes by the longest text so far, ours by
the extent of the line.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ...errors import ConfigError
from .weights import Config

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Rope(NamedTuple):
    """A word; a factor on all logits; the context, and the policy beyond it."""

    word: str
    logits: float = 1.0
    context: int | None = None
    policy: str | None = None


def rope_of(config: Config, head_dim: int) -> Rope:
    """The rotary encoding of a config, of transformers 4 or 5.

    Raises:
        ConfigError: for a kind that depends on more than the length a model is used at, and for missing numbers.
    """
    older = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}
    rope = config.get("rope_parameters") or older
    kind, base = rope.get("rope_type", rope.get("type", "default")), float(rope["rope_theta"])
    if kind == "default":
        return Rope(f"rope(base={base})")
    if config["plain_rope"]:
        return Rope(f"rope(base={base})", context=rope.get("original_max_position_embeddings"))
    if kind not in KINDS:
        raise ConfigError(
            f"this {config['model_type']} scales its frequencies ({kind}); load it with plain_rope=True and run it "
            "under use_policy, which scales them at evaluation"
        )
    given = dict(rope)
    if kind in ("yarn", "longrope"):
        longest = config["max_position_embeddings"]
        length = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        given |= dict(original_max_position_embeddings=length or longest)
        given |= dict(factor=rope.get("factor") or longest / given["original_max_position_embeddings"])
    wanted = {"linear": ("factor",), "llama3": LLAMA3, "longrope": ("long_factor", "short_factor")}.get(kind, ())
    if missing := [name for name in wanted if given.get(name) is None]:
        raise ConfigError(
            f"this {config['model_type']} scales its frequencies by {kind}, and its config lacks {', '.join(missing)}"
        )
    if kind == "linear":
        return Rope(f"rope(base={base}, step={1 / float(given['factor'])})")
    if kind == "llama3":
        return Rope(f"rope(base={base}, llama3={tuple(float(given[name]) for name in LLAMA3)})")
    if kind == "yarn":
        factors = tuple(yarn_factors(given, base, head_dim))
        return Rope(f"rope(base={base}, factors={factors})", yarn_attention(given) ** 2)
    length = int(given["original_max_position_embeddings"])
    attention = given.get("attention_factor")
    if attention is None:
        factor = float(given["factor"])
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    long, short = (tuple(map(float, given[name])) for name in ("long_factor", "short_factor"))
    policy = f"longrope(long_factor={long}, short_factor={short})"
    return Rope(f"rope(base={base})", float(attention) ** 2, length, policy)


def yarn_factors(rope: Config, base: float, head_dim: int) -> list[float]:
    """What divides the frequency of each pair of a head."""
    factor, length = float(rope["factor"]), rope["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that turns so often over the training length."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    kept = [1 - min(1.0, max(0.0, (i - low) / (high - low))) for i in range(head_dim // 2)]
    return [1 / ((1 - keep) / factor + keep) for keep in kept]


def yarn_attention(rope: Config) -> float:
    """What sine and cosine are multiplied by."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    factor, own, every = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scaled(own) / scaled(every) if own and every else scaled(1.0)
