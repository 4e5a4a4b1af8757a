"""Writing text with a `TextDecoder`: greedy, sampled, or by beam; of a `Seq2Seq`, its decoder with a memory.

Legend: B batch, N tokens of the prompt, V vocabulary, K beams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.cache import KVCache
from ...errors import ConfigError, unknown
from .heads import TextDecoder
from .model import Encoded

# Tokens from one look at which texts have ended to the next, by device: the host waits for each, on the CPU for none.
EVERY, ELSEWHERE = {"cpu": 1}, 16


@torch.no_grad()
def generate(
    model: TextDecoder,
    tokens: Tensor,
    new: int,
    *,
    valid: Tensor | None = None,
    memory: Encoded | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = None,
    overflow: str = "slide",
    cached: bool = True,
) -> Tensor:
    """The prompts and up to `new` further tokens, (B, N + new) or shorter where all have stopped.

    Args:
        tokens: (B, N) prompts, padded on the left where they differ in length; `valid` is False there.
        memory: an encoder's output, for the decoder's cross-attention.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest; top_p: among the likeliest that together reach p (arXiv 1904.09751).
        seed: of the draws; default: the global generator's.
        stop: the end token; the rest of a text that has ended is filled with it. Where the host would wait for each
            token (not on the CPU), up to 15 more are drawn after the end of all, and cut off.
        overflow: how to go on beyond the model's context. "slide": the newer half of a text that fills the line is read
            again from place 0, with any encoding; padding is not counted. "extend": the line grows to N + new and the
            encoding meets what it was not trained on, under the policy in force.
        cached: whether keys and values are kept; off, each step reads all again. The tokens are the same.

    Raises:
        ConfigError: for settings that cannot work.
    """
    _check(model, tokens, new, temperature, top_k, top_p)
    if overflow not in ("slide", "extend"):
        raise unknown("overflow", overflow, ("slide", "extend"))
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    line = _Line(model, tokens, new, valid, memory, overflow, cached)
    ends = _Ends(tokens)
    for _ in range(new):
        token = pick(line.logits(), temperature, top_k, top_p, generator)  # (B,)
        if stop is not None:
            token = token.where(~ends.over, stop)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        if stop is not None and ends.all_have(ends.over | (token == stop)):
            break
        line.add(token)
    return tokens if stop is None else ends.cut(tokens)


def pick(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token of each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        share = ranked.softmax(dim=-1)
        ranked = ranked.masked_fill(share.cumsum(dim=-1) - share >= top_p, float("-inf"))  # the first always stays
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    return _draw(logits.softmax(dim=-1), generator)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """`torch.multinomial(p, 1)`; elsewhere than on the CPU without its check of p, for which the host would wait."""
    return torch.multinomial(p, 1, generator=generator)[:, 0] if p.device.type == "cpu" else first(p, generator)


def first(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """argmax p / e, e ~ Exp(1): which of the clocks that ring at rates p (B, V) is first. As in `torch.multinomial`."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)


@torch.no_grad()
def beam_search(
    model: TextDecoder,
    tokens: Tensor,
    new: int,
    *,
    stop: int,
    beams: int = 4,
    valid: Tensor | None = None,
    memory: Encoded | None = None,
    length_penalty: float = 1.0,
) -> Tensor:
    """The likeliest continuation that K beams find, (B, N + M), M <= new.

    A beam that has stopped stays among the K with its score. At the end the score is divided by the number of new
    tokens (the stop among them) to the power of `length_penalty`: 0 compares sums, 1 means. With one beam it is greedy.

    Args:
        tokens, valid, memory, stop: as in `generate`.
        length_penalty: see above.
    """
    _check(model, tokens, new, 0.0, None, None)
    if beams < 1:
        raise ConfigError(f"a search needs at least one beam, got {beams}")
    batch = len(tokens)
    spread = torch.arange(batch, device=tokens.device).repeat_interleave(beams)
    tokens, valid = tokens[spread], None if valid is None else valid[spread]
    line = _Line(model, tokens, new, valid, None if memory is None else memory.take(spread), "extend", True)
    score = tokens.new_full((batch, beams), float("-inf"), dtype=torch.float32)
    score[:, 0] = 0.0  # all beams are alike at first: one of them counts
    ends = _Ends(tokens)
    length = torch.zeros(batch * beams, device=tokens.device)
    for _ in range(new):
        over = ends.over
        step = line.logits().float().log_softmax(dim=-1)  # (B K, V)
        step = torch.where(over[:, None], torch.full_like(step, float("-inf")), step)
        step[:, stop] = torch.where(over, torch.zeros_like(step[:, stop]), step[:, stop])
        total = score[..., None] + step.unflatten(0, (batch, beams))  # (B, K, V)
        score, best = total.flatten(1).topk(beams, dim=1)
        vocabulary = step.shape[-1]
        source = (torch.arange(batch, device=tokens.device)[:, None] * beams + best // vocabulary).flatten()
        token = (best % vocabulary).flatten()
        length = (length + ~over)[source]
        tokens = torch.cat([tokens[source], token[:, None]], dim=1)
        if ends.all_have(over[source] | (token == stop)):
            break
        line.take(source)
        line.add(token)
    final = score / length.view(batch, beams).clamp(min=1) ** length_penalty
    best = tokens.view(batch, beams, -1)[torch.arange(batch, device=tokens.device), final.argmax(dim=1)]
    return ends.cut(best)


class _Ends:
    """Which texts have ended, and after how many new tokens all had."""

    def __init__(self, tokens: Tensor) -> None:
        self.prompt, self.steps = tokens.shape[1], 0
        self.every = EVERY.get(tokens.device.type, ELSEWHERE)
        self.over = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # (B,)
        self.open = torch.zeros((), dtype=torch.long, device=tokens.device)  # steps after which a text goes on

    def all_have(self, over: Tensor) -> bool:
        """Note which texts are over after one more token; True where, as far as was looked, all are."""
        self.over, self.steps = over, self.steps + 1
        self.open = self.open + ~over.all()
        return self.steps % self.every == 0 and int(self.open) < self.steps

    def cut(self, tokens: Tensor) -> Tensor:
        """Without what was drawn after all had ended."""
        return tokens[:, : self.prompt + min(int(self.open) + 1, self.steps)]


class _Line:
    """The tokens so far and the model's view of them: a cache, or everything anew at each step."""

    def __init__(
        self,
        model: TextDecoder,
        tokens: Tensor,
        new: int,
        valid: Tensor | None,
        memory: Encoded | None,
        overflow: str,
        cached: bool,
    ) -> None:
        self.model, self.memory, self.cached = model, memory, cached
        self.tokens, self.valid = tokens, valid
        if valid is not None:  # padding to the left, wherever it was
            order = valid.int().argsort(dim=1, stable=True)
            self.tokens, self.valid = tokens.gather(1, order), valid.gather(1, order)
            self._trim()
        longest = self.tokens.shape[1] + new
        if overflow == "extend" and self.valid is not None:
            model.one_line(self.valid, new)
        self.limit = max(2, model.context) if overflow == "slide" else longest
        self.length = max(2, min(longest, self.limit))
        if self.tokens.shape[1] > self.limit:  # a longer prompt than the model reads: its end
            self._keep(self.limit)
        self.cache = KVCache(self.length)
        self.unread = self.tokens.shape[1]

    def logits(self) -> Tensor:
        """(B, V) of the token that comes next."""
        if not self.cached:
            # A cache that is thrown away: it fixes the same extent, without which a longer line would be another.
            self.cache.reset()
            self.unread = self.tokens.shape[1]
        fresh = self.tokens[:, -self.unread :]
        valid = None if self.valid is None else self.valid[:, -self.unread :]
        x = self.model.forward_features(fresh, valid, cache=self.cache, memory=self.memory)
        self.unread = 0
        return self.model.forward_head(x[:, -1])

    def add(self, token: Tensor) -> None:
        if self.tokens.shape[1] == self.limit:
            self._slide(self.limit // 2)
            self.cache.reset()
            self.unread = self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens, token[:, None]], dim=1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(self.valid[:, :1])], dim=1)
        self.unread += 1

    def take(self, index: Tensor) -> None:
        """Reorder rows: row b becomes the former row index[b]."""
        self.tokens, self.valid = self.tokens[index], None if self.valid is None else self.valid[index]
        self.memory = None if self.memory is None else self.memory.take(index)
        self.cache.reorder(index)

    def _slide(self, keep: int) -> None:
        """Of texts that fill the line the last tokens alone; the others are as they would be by themselves."""
        if self.valid is None:
            self._keep(keep)
            return
        full = self.valid[:, :1]  # padding is on the left
        old = torch.arange(self.tokens.shape[1], device=full.device) < self.tokens.shape[1] - keep
        self.valid = self.valid & ~(full & old)
        self._trim()

    def _trim(self) -> None:
        """Without columns that are padding in every text."""
        if self.valid is not None:
            self._keep(max(1, int(self.valid.sum(dim=1).max()) if len(self.valid) else 1))

    def _keep(self, last: int) -> None:
        self.tokens = self.tokens[:, -last:]
        self.valid = None if self.valid is None else self.valid[:, -last:]


def _check(
    model: TextDecoder, tokens: Tensor, new: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ConfigError(f"prompts are token ids (B, N) with at least one token, got {tuple(tokens.shape)}")
    if (
        new < 0
        or temperature < 0
        or (top_k is not None and top_k < 1)
        or not 0 < (1.0 if top_p is None else top_p) <= 1
    ):
        raise ConfigError(
            "new and temperature must not be negative, top_k at least 1, top_p in (0, 1]: "
            f"got {new}, {temperature}, {top_k} and {top_p}"
        )
    if model.training:
        raise ConfigError("the model is in training mode, where dropout disturbs what it writes: call model.eval()")
