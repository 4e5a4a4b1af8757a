"""The same encodings in an untouched `torch.nn.Transformer`.

The stock modules take a bias as a float `mask`. In torch 2.15 that is silently wrong in inference: `eval()` under
`no_grad` takes a fast path that reads every nonzero entry of the mask as "masked" (pytorch issue 118628). What is
here keeps off that path by public means (a layer that has a forward hook does not take it), and gives what the
project's own attention gives with the same weights:

    attach(encoder, "alibi", grid=(14, 14), prefix=1)     token and bias terms, on modules that exist
    RotaryEncoderLayer(d_model, nhead, grid=(14, 14))     any encoding, rotations too; the stock layer's state_dict
    TokenPosition("sincos", encoder, grid=128)            token terms alone, a module to put after an embedding
    attention_mask(encoding(at), batch)                   the float mask, for those who pass it themselves
    check(model)                                          raises where a float mask would meet the fast path

Stock layouts: x is (N, L, E) with `batch_first`, else (L, N, E), or (L, E) without a batch; a mask is (L, S) or
(N·H, L, S) with the heads of a sample next to each other. A stock boolean mask is True where attention is *not*
allowed. An expanded mask costs N·H·L·S numbers, which `vit2dpe.Attention` does not spend.
"""

from .attached import Attached, attach
from .masks import attention_mask, check
from .places import TokenPosition, add_position, set_grid
from .rotary import RotaryEncoderLayer

__all__ = [
    "Attached",
    "RotaryEncoderLayer",
    "TokenPosition",
    "add_position",
    "attach",
    "attention_mask",
    "check",
    "set_grid",
]
