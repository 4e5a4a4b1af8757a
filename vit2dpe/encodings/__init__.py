"""Positional encodings, one idea a file: from places to a `Signal`. Imports the ground floor alone."""

from .alibi import Alibi
from .base import NoPosition, PositionEncoding, Sum, terms
from .cycle import Cycle
from .decomposed import Decomposed
from .factorized import Factorized
from .find import encoding_parameters, encodings_of, modules_outside_encodings, named_encodings
from .fire import Fire
from .fourier import Fourier
from .irpe import IRPE
from .jitter import Jitter
from .kerple import Kerple
from .learned import LearnedTable
from .logcpb import LogCPB
from .lookhere import LookHere
from .on_grid import OnGrid
from .registry import ENCODINGS, Builder, Dims, build, parse, parse_blocks
from .relative import RelativeBias
from .rope import AxialRoPE
from .rope_dinov3 import CentredRoPE
from .rope_golden import GoldenRoPE
from .rope_mixed import MixedRoPE
from .shaw import Shaw
from .sincos import SinCos
from .split import Position, split_shared_and_per_block
from .t5 import T5Bias
from .windowed import WindowedTable

__all__ = [
    "ENCODINGS",
    "IRPE",
    "Alibi",
    "AxialRoPE",
    "Builder",
    "CentredRoPE",
    "Cycle",
    "Decomposed",
    "Dims",
    "Factorized",
    "Fire",
    "Fourier",
    "GoldenRoPE",
    "Jitter",
    "Kerple",
    "LearnedTable",
    "LogCPB",
    "LookHere",
    "MixedRoPE",
    "NoPosition",
    "OnGrid",
    "Position",
    "PositionEncoding",
    "RelativeBias",
    "Shaw",
    "SinCos",
    "Sum",
    "T5Bias",
    "WindowedTable",
    "build",
    "encoding_parameters",
    "encodings_of",
    "modules_outside_encodings",
    "named_encodings",
    "parse",
    "parse_blocks",
    "split_shared_and_per_block",
    "terms",
]
