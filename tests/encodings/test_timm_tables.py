"""Tables are read and resized as timm's Swin, Swin V2, ViT, NaFlexVit, Hiera and SAM 2 read and resize theirs.

Lookups are compared to the bit; resized tables of about 1 to 2e-5, which is float32 in another order.
"""

import math

import pytest
import torch
from timm.layers import (
    RelPosBias,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_simple,
)
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2

from tests.encodings.originals import exchanged, same
from tests.helpers import randn
from vit2dpe import Dims, Positions, attend, build
from vit2dpe.encodings import Factorized, LearnedTable, LogCPB, RelativeBias, WindowedTable

# timm's RegularGridInterpolator, which the geometric resize runs through, indexes by a list and searches a view.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning"),
]

HEADS, WIDTH, ATOL = 3, 4, 2e-5


def offsets(window):
    return tuple(2 * size - 1 for size in window)


def dense(encoding, at):
    return encoding(at).bias[0].dense().detach()


def relative(window, resize="bicubic"):
    """Ours with a table of about 1, and the same table in Swin's layout: (offsets in row-major order, heads)."""
    ours = RelativeBias(HEADS, window, resize=resize)
    ours.relative_position_bias_table.data.copy_(randn(HEADS, *offsets(window)))
    return ours, ours.relative_position_bias_table.detach().flatten(1).t().contiguous()


@pytest.mark.parametrize("window", [(3, 5), (6, 2), (1, 4)])
def test_relative_bias_is_swins(window):
    """Different on purpose: head-major with the grid in its shape; a flat table is transposed on loading."""
    ours, flat = relative(window)
    at = Positions.grid(window)
    swin, bias = WindowAttention(2 * HEADS, HEADS, window_size=window), RelPosBias(window, HEADS)
    for timm in (swin, bias):
        timm.relative_position_bias_table.data.copy_(flat)
    wrong = dense(ours, exchanged(at))
    same(dense(ours, at), swin._get_rel_pos_bias().detach(), wrong, 0)
    same(dense(ours, at), bias.get_bias().detach(), wrong, 0)
    assert not torch.equal(dense(ours, at), dense(ours, at).transpose(-1, -2))  # keys minus queries is seen too


def test_prefix_tokens_have_no_entry_of_their_own():
    """Different on purpose: timm (BEiT) learns three numbers a head for a class token, ours is 0 for every prefix."""
    window = (3, 4)
    ours, flat = relative(window)
    timm = RelPosBias(window, HEADS, prefix_tokens=1)
    timm.relative_position_bias_table.data.copy_(torch.cat([flat, torch.zeros(3, HEADS)]))
    theirs = timm.get_bias().detach()
    assert torch.equal(dense(ours, Positions.grid(window).with_prefix(1)), theirs)
    assert not torch.equal(dense(ours, exchanged(Positions.grid(window)).with_prefix(1)), theirs)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_with_an_option_prefix_tokens_have_beits_entries(shared):
    """Class token to patch, patch to class token, class token to itself: the last three rows of timm's flat table."""
    window = (3, 4)
    ours = build(f"relative(prefix=true, shared={shared})", Dims(6, HEADS, window))
    timm = RelPosBias(window, HEADS, prefix_tokens=1)
    timm.relative_position_bias_table.data.copy_(randn(*timm.relative_position_bias_table.shape))
    flat = timm.relative_position_bias_table.detach().t()
    ours.relative_position_bias_table.data.copy_(flat[:, :-3].reshape(HEADS, *offsets(window)))
    ours.prefix_bias.data.copy_(flat[:, -3:])
    at = Positions.grid(window)
    same(dense(ours, at.with_prefix(1)), timm.get_bias().detach(), dense(ours, exchanged(at).with_prefix(1)), 0)
    two, one = dense(ours, at.with_prefix(2)), dense(ours, at.with_prefix(1))
    assert torch.equal(two[..., 1:, 1:], one)
    assert torch.equal(two[..., :1, 2:], one[..., :1, 1:])
    ours.reset_parameters()
    assert 0 < ours.prefix_bias.std() < 0.1
    assert torch.equal(dense(ours, at), dense(ours, at.with_prefix(1))[..., 1:, 1:])


def test_prefix_entries_are_seen_and_learned_in_training():
    """Whatever path serves a table in training, the entries of prefix tokens take part."""
    ours = build("relative(prefix=true)", Dims(6, HEADS, (3, 4)))
    ours.relative_position_bias_table.data.copy_(randn(HEADS, 5, 7))
    ours.prefix_bias.data.copy_(randn(HEADS, 3))
    signal, x = ours(Positions.grid((3, 4)).with_prefix(1)), randn(3, 2, HEADS, 13, 4)
    found = attend(*x, signal)
    expected = (x[0] @ x[1].mT / 2 + signal.bias[0].dense()).softmax(-1) @ x[2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert (ours.prefix_bias.grad.abs() > 1e-4).all()


def bias_of_table(table, window):
    """The bias of a table (H, 2 S_1 - 1, 2 S_2 - 1) on its own window; reading is proved above."""
    encoding = RelativeBias(HEADS, window)
    encoding.relative_position_bias_table.data.copy_(table)
    return dense(encoding, Positions.grid(window))


def geometric(ours, flat, old, new):
    shape = (math.prod(offsets(new)), HEADS)
    table = resize_rel_pos_bias_table(flat, new_window_size=new, new_bias_shape=shape, old_window_size=old)
    theirs = bias_of_table(table.t().reshape(HEADS, *offsets(new)), new)
    return dense(ours, Positions.grid(new)), theirs, dense(ours, exchanged(Positions.grid(new)))


@pytest.mark.parametrize(("old", "new"), [((7, 5), (9, 8)), ((6, 9), (13, 14)), ((8, 5), (6, 4)), ((7, 7), (12, 9))])
def test_geometric_resize_is_timms(old, new):
    """1e-4: the ratio of the progression is found by bisection to 1e-6, which moves the last of its sums by 3e-5."""
    same(*geometric(*relative(old, "geometric"), old, new), 1e-4)


@pytest.mark.parametrize(("old", "new"), [((2, 3), (4, 7)), ((4, 4), (8, 9)), ((1, 5), (3, 7))])
def test_geometric_resize_beyond_the_steepest_progression_is_timms(old, new):
    """The ratio ends at 1.5, so a small window cannot reach far: what lies beyond has the last entry, as in timm."""
    same(*geometric(*relative(old, "geometric"), old, new), 1e-4)


def test_geometric_resize_keeps_an_axis_that_keeps_its_size():
    """Different on purpose: timm resizes both axes as soon as one changes, with a ratio of at least 1.01."""
    old, new = (5, 6), (5, 10)
    ours, theirs, wrong = geometric(*relative(old, "geometric"), old, new)
    assert 1e-3 < (ours - theirs).abs().max() < 0.3
    assert (wrong - theirs).abs().max() > 1
    # Along a row of the grid there is no offset in rows, and the two agree.
    row = slice(0, new[1])
    same(ours[..., row, row], theirs[..., row, row], wrong[..., row, row], ATOL)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 9)), ((7, 7), (4, 6))])
def test_bicubic_resize_is_swins_for_a_flat_table(old, new):
    """The original takes square sources only: it guesses the window from a square root."""
    ours, flat = relative(old)
    table = resize_rel_pos_bias_table_simple(flat, new, (math.prod(offsets(new)), HEADS))
    theirs = bias_of_table(table.t().reshape(HEADS, *offsets(new)), new)
    same(dense(ours, Positions.grid(new)), theirs, dense(ours, exchanged(Positions.grid(new))), ATOL)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (6, 9)), ((7, 4), (5, 4)), ((3, 5), (5, 3))])
def test_bicubic_resize_is_swins_for_a_head_major_table(old, new):
    ours, _ = relative(old)
    table = ours.relative_position_bias_table.detach()
    theirs = bias_of_table(resize_rel_pos_bias_table_simple(table, new, (HEADS, *offsets(new))), new)
    same(dense(ours, Positions.grid(new)), theirs, dense(ours, exchanged(Positions.grid(new))), ATOL)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("old", "new"), [((7, 14), (14, 28)), ((8, 18), (12, 12)), ((9, 4), (5, 7)), ((3, 5), (3, 5)), ((6, 5), (6, 11))]
)
def test_learned_table_is_resized_as_timms(old, new, prefix):
    """Different on purpose: no row for prefix tokens, where timm's class token may have one."""
    ours, cls = LearnedTable(WIDTH, old), randn(1, prefix, WIDTH, seed=1)
    ours.pos_embed.data.copy_(randn(1, *old, WIDTH))
    flat = torch.cat([cls, ours.pos_embed.detach().flatten(1, 2)], 1)
    theirs = resample_abs_pos_embed(flat, list(new), list(old), num_prefix_tokens=prefix)
    at = Positions.grid(new).with_prefix(prefix)
    ours_token, wrong = ours(at).token, ours(exchanged(at)).token
    assert not ours_token[:, :prefix].any()
    same(ours_token[:, prefix:], theirs[:, prefix:], wrong[:, prefix:], 0 if old == new else ATOL)


@pytest.mark.parametrize(("old", "new"), [((4, 7), (4, 7)), ((4, 7), (9, 10)), ((8, 6), (5, 3)), ((4, 6), (6, 4))])
def test_factorized_is_naflexvits(old, new):
    timm = NaFlexEmbeds(2, embed_dim=WIDTH, pos_embed="factorized", pos_embed_grid_size=old)
    ours = Factorized(WIDTH, old)
    with torch.no_grad():
        for table, of_timm in zip(ours.tables, (timm.pos_embed_y, timm.pos_embed_x), strict=True):
            of_timm.copy_(randn(*of_timm.shape, seed=len(table)))
            table.copy_(of_timm[0])
        at = Positions.grid(new)
        image, packed = torch.zeros(2, 1, math.prod(new), WIDTH)
        timm._apply_factorized_pos_embed(image, grid_size=list(new))
        timm._apply_factorized_naflex_pos_embed(packed, patch_coord=at.coords.long())
    for theirs in (image, packed):
        same(ours(at).token.detach(), theirs, ours(exchanged(at)).token.detach(), ATOL)


@pytest.mark.parametrize(("old", "extent"), [((5, 7), (8, 16)), ((9, 3), (16, 8)), ((7, 7), (4, 12))])
def test_windowed_is_hieras(old, extent):
    timm = Hiera(
        img_size=tuple(4 * size for size in extent),
        embed_dim=WIDTH,
        num_heads=1,
        stages=(1, 1),
        q_pool=1,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, True),
        abs_win_pos_embed=True,
        global_pos_size=old,
    )
    ours = WindowedTable(WIDTH, old, window=4)
    with torch.no_grad():
        timm.pos_embed.copy_(randn(1, WIDTH, *old))
        timm.pos_embed_win.copy_(randn(1, WIDTH, 4, 4, seed=1))
        ours.pos_embed.copy_(timm.pos_embed.movedim(1, -1))
        ours.pos_embed_window.copy_(timm.pos_embed_win.movedim(1, -1))
        theirs = timm._pos_embed(torch.zeros(1, math.prod(extent), WIDTH))
        at = Positions.grid(extent)
        same(ours(at).token, theirs, ours(exchanged(at)).token, ATOL)


def test_windowed_is_sam2s_on_its_own_grid_only():
    """Different on purpose: SAM 2 resizes the global table without antialias, ours with it, as Hiera."""
    old, new = (4, 8), (8, 12)
    timm = HieraDet(embed_dim=WIDTH, num_heads=1, stages=(1, 1, 1, 1), global_pos_size=old, window_spec=(4, 4, 4, 4))
    ours = WindowedTable(WIDTH, old, window=4)
    with torch.no_grad():
        timm.pos_embed.copy_(randn(1, WIDTH, *old))
        timm.pos_embed_window.copy_(randn(1, WIDTH, 4, 4, seed=1))
        ours.pos_embed.copy_(timm.pos_embed.movedim(1, -1))
        ours.pos_embed_window.copy_(timm.pos_embed_window.movedim(1, -1))
        here, there = (timm._pos_embed(torch.zeros(1, *size, WIDTH)).flatten(1, 2) for size in (old, new))
        at = Positions.grid(old)
        same(ours(at).token, here, ours(exchanged(at)).token, 0)
        assert (ours(Positions.grid(new)).token - there).abs().max() > 0.05


@pytest.mark.parametrize(
    ("window", "trained"), [((4, 7), (4, 7)), ((6, 3), (8, 4)), ((5, 9), (3, 6)), ((1, 4), (1, 4))]
)
def test_logcpb_is_swin_v2s(window, trained):
    """What Swin V2 adds to its logits is seen where they enter the softmax, with queries of 0."""
    timm = WindowAttentionV2(2 * HEADS, window, HEADS, pretrained_window_size=trained)
    ours = LogCPB(HEADS, trained)
    ours.cpb_mlp.load_state_dict(timm.cpb_mlp.state_dict())
    seen = []
    timm.softmax.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        timm.qkv.weight.zero_()
        timm(torch.zeros(1, math.prod(window), 2 * HEADS))
    at = Positions.grid(window)
    wrong = LogCPB(HEADS, trained[::-1])
    wrong.cpb_mlp.load_state_dict(timm.cpb_mlp.state_dict())
    same(dense(ours, at), seen[0], dense(wrong, exchanged(at)), ATOL)
    plain = LogCPB(HEADS, window)
    plain.cpb_mlp.load_state_dict(timm.cpb_mlp.state_dict())
    assert torch.equal(dense(plain, at), dense(ours, at)) == (window == trained)
    plain.load_state_dict(ours.state_dict())  # ours says what it was trained on
    assert torch.equal(dense(plain, at), dense(ours, at))
