"""The bias of torchvision's shifted-window attention, V1 and V2, is RelativeBias and LogCPB; V1's to the bit."""

import pytest
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from tests.encodings.originals import exchanged, same
from tests.helpers import randn
from vit2dpe import Positions
from vit2dpe.encodings import LogCPB, RelativeBias
from vit2dpe.signal import Table

HEADS = 2
WINDOWS = [(3, 5), (6, 2), (4, 4)]


@pytest.mark.parametrize("window", WINDOWS)
def test_index_of_swin(window):
    """The index itself: a table that holds its own row-major index, so the bias is the index."""
    swin = ShiftedWindowAttention(2 * HEADS, list(window), [0, 0], HEADS)
    rows, columns = (2 * size - 1 for size in window)
    at = Positions.grid(window)
    numbers = swin.relative_position_bias_table.new_tensor(range(rows * columns))
    ours = Table(numbers.view(1, rows, columns), at, at).dense()[0, 0]
    theirs = swin.relative_position_index.view(len(ours), -1).float()
    wrong = Table(numbers.view(1, columns, rows), exchanged(at), exchanged(at)).dense()[0, 0]
    same(ours, theirs, wrong, 0)


@pytest.mark.parametrize("window", WINDOWS)
def test_bias_of_swin(window):
    swin, ours, at = (
        ShiftedWindowAttention(2 * HEADS, list(window), [0, 0], HEADS),
        RelativeBias(HEADS, window),
        Positions.grid(window),
    )
    swin.relative_position_bias_table.data.copy_(randn(*swin.relative_position_bias_table.shape))
    table = swin.relative_position_bias_table.detach().t().reshape(ours.relative_position_bias_table.shape)
    ours.relative_position_bias_table.data.copy_(table)
    bias, wrong = (ours(where).bias[0].dense().detach() for where in (at, exchanged(at)))
    same(bias, swin.get_relative_position_bias().detach(), wrong, 0)


@pytest.mark.parametrize("window", WINDOWS)
def test_bias_of_swin_v2(window):
    """2e-5 on biases of up to 16: c is float64 here until the network, float32 there."""
    swin = ShiftedWindowAttentionV2(2 * HEADS, list(window), [0, 0], HEADS)
    ours, at = LogCPB(HEADS, window), Positions.grid(window)
    ours.cpb_mlp.load_state_dict(swin.cpb_mlp.state_dict())
    wrong = LogCPB(HEADS, window[::-1])
    wrong.load_state_dict(ours.state_dict())
    bias, wrong = ours(at).bias[0].dense().detach(), wrong(exchanged(at)).bias[0].dense().detach()
    same(bias, swin.get_relative_position_bias().detach(), wrong, 2e-5)
