"""Any positional encoding in any transformer at any resolution, by one word.

Names are imported on first use, so that `import vit2dpe` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._register import register_with_timm
from ._version import __version__ as __version__

_HOME = {
    "Positions": "positions",
    "Rotation": "signal",
    "Signal": "signal",
    "attend": "attention",
    "rotate": "attention",
    "Attention": "attention",
    "attention_maps": "attention",
    "explain": "attention",
    "ENCODINGS": "encodings",
    "Dims": "encodings",
    "PositionEncoding": "encodings",
    "build": "encodings",
    "frozen": "encodings.frozen",
    "Swin": "models",
    "ViT": "models",
    "MAE": "models",
    "inflate": "models.inflate",
    "from_timm": "interop.timm.convert",
    "to_timm": "interop.timm.convert",
    "set_policy": "resolution.apply",
    "TextEncoder": "models.text.heads",
    "TextDecoder": "models.text.heads",
    "Seq2Seq": "models.text.seq2seq",
    "pack": "models.text.ragged",
    "KVCache": "attention.cache",
    "generate": "models.text.generate",
    "beam_search": "models.text.generate",
    "from_transformers": "interop.transformers.convert",
    "from_torch": "interop.stock.read",
    "to_torch": "interop.stock.write",
    "use_policy": "resolution.apply",
    "sweep": "resolution.sweep",
    "tune": "resolution.tuning",
    "load_run": "training.checkpoint",
    "check_encoding": "testing",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if TYPE_CHECKING:
    from .attention import Attention, KVCache, attend, attention_maps, explain, rotate  # noqa: F401
    from .encodings import ENCODINGS, Dims, PositionEncoding, build  # noqa: F401
    from .encodings.frozen import frozen  # noqa: F401
    from .errors import CheckpointError, ConfigError, DataError  # noqa: F401
    from .interop.stock.read import from_torch  # noqa: F401
    from .interop.stock.write import to_torch  # noqa: F401
    from .interop.timm.convert import from_timm, to_timm  # noqa: F401
    from .interop.transformers.convert import from_transformers  # noqa: F401
    from .models import MAE, Swin, ViT  # noqa: F401
    from .models.inflate import inflate  # noqa: F401
    from .models.text.generate import beam_search, generate  # noqa: F401
    from .models.text.heads import TextDecoder, TextEncoder  # noqa: F401
    from .models.text.ragged import pack  # noqa: F401
    from .models.text.seq2seq import Seq2Seq  # noqa: F401
    from .positions import Positions  # noqa: F401
    from .resolution.apply import set_policy, use_policy  # noqa: F401
    from .resolution.sweep import sweep  # noqa: F401
    from .resolution.tuning import tune  # noqa: F401
    from .signal import Rotation, Signal  # noqa: F401
    from .testing import check_encoding  # noqa: F401
    from .training.checkpoint import load_run  # noqa: F401
else:
    register_with_timm()
