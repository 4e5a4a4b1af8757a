"""An encoder, and a decoder that reads it, with any encoding in each and between the two.

Sources: Vaswani et al., arXiv 1706.03762; T5, arXiv 1910.10683.

Legend: B batch, S tokens of the source, N of the target, V vocabulary of the target.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...encodings import Position
from ...errors import ConfigError
from ..unwrap import unwrap_names
from .heads import TextDecoder, TextEncoder
from .model import Encoded


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that reads it.

    Args:
        position: of the encoder; `decoder_position` of the decoder (default: the same spec), `cross_position` between
            the two (default: none).
        source_vocab, target_vocab: vocabularies; `shared` uses one embedding for both.
        depth, decoder_depth: blocks of the encoder and of the decoder (default: as many).
        tied, logit_scale: see `TextDecoder`.
        **model: for both; see `TextModel`.
    """

    def __init__(
        self,
        position: Position = "sincos",
        *,
        decoder_position: Position | None = None,
        cross_position: str | None = None,
        source_vocab: int,
        target_vocab: int,
        shared: bool = False,
        depth: int = 3,
        decoder_depth: int | None = None,
        tied: bool = True,
        logit_scale: float = 1.0,
        **model: Any,
    ) -> None:
        super().__init__()
        nn.Module.register_load_state_dict_pre_hook(self, unwrap_names)
        if shared and source_vocab != target_vocab:
            raise ConfigError(f"a shared embedding needs one vocabulary, got {source_vocab} and {target_vocab} tokens")
        self.encoder = TextEncoder(position, pool="", vocab_size=source_vocab, depth=depth, **model)
        self.decoder = TextDecoder(
            position if decoder_position is None else decoder_position,
            cross=True,
            cross_position=cross_position,
            vocab_size=target_vocab,
            depth=depth if decoder_depth is None else decoder_depth,
            tied=tied,
            logit_scale=logit_scale,
            **model,
        )
        if shared:
            self.encoder.embed = self.decoder.embed
        self.train_grid = self.encoder.train_grid

    def encode(self, source: Tensor, valid: Tensor | None = None) -> Encoded:
        return self.encoder.encode(source, valid)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_valid: Tensor | None = None,
        target_valid: Tensor | None = None,
    ) -> Tensor:
        """(B, S), (B, N) -> (B, N, V): logits of the token after each of the target."""
        logits: Tensor = self.decoder(target, target_valid, memory=self.encode(source, source_valid))
        return logits

    def no_weight_decay(self) -> set[str]:
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{name}.{inner}" for name, part in parts.items() for inner in part.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)
