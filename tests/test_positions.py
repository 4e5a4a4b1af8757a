"""Positions: row-major grids, lines with a start, subsets, prefixes; what cannot be is refused by a message."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch.utils import _pytree

from vit2dpe import Positions


@pytest.mark.parametrize("extent", [(7,), (2, 3), (3, 2), (1, 5), (2, 3, 4)])
def test_a_grid_is_row_major(extent):
    at = Positions.grid(extent)
    places = list(itertools.product(*(range(size) for size in extent)))
    assert at.coords.dtype == torch.float32
    assert at.coords.tolist() == [[list(map(float, place)) for place in places]]
    assert (at.extent, at.axes, at.prefix) == (extent, len(extent), 0)
    assert torch.equal(at.places(), at.coords.long())


def test_a_grid_may_be_named_by_a_list():
    assert Positions.grid([2, 3]).extent == (2, 3)


@pytest.mark.parametrize(
    ("n", "start", "length", "first", "extent"),
    [(4, 0, None, 0, 4), (3, 5, None, 5, 8), (1, 6, 9, 6, 9), (2, -1, 4, -1, 4)],
)
def test_a_line_from_a_number(n, start, length, first, extent):
    at = Positions.sequence(n, start=start, length=length)
    assert at.coords.dtype == torch.float32
    assert at.coords.tolist() == [[[float(first + i)] for i in range(n)]]
    assert at.extent == (extent,)


@pytest.mark.parametrize(("length", "extent"), [(None, 3), (8, 8)])
def test_a_line_from_a_start_of_each_sample(length, extent):
    at = Positions.sequence(3, start=torch.tensor([0, -2]), length=length)
    assert at.coords.tolist() == [[[0.0], [1.0], [2.0]], [[-2.0], [-1.0], [0.0]]]
    assert at.coords.dtype == torch.float32
    assert at.extent == (extent,)


def test_take_the_same_for_all_samples():
    at = Positions.grid((2, 3)).with_prefix(2)
    some = at.take(torch.tensor([5, 0, 4]))
    assert some.coords.tolist() == [[[1.0, 2.0], [0.0, 0.0], [1.0, 1.0]]]
    assert (some.extent, some.prefix) == ((2, 3), 2)


def test_take_for_each_sample_its_own():
    at = Positions.grid((2, 3)).with_prefix(1)
    some = at.take(torch.tensor([[5, 0], [1, 3]]))
    assert some.coords.tolist() == [[[1.0, 2.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]
    assert (some.extent, some.prefix) == ((2, 3), 1)
    again = some.take(torch.tensor([[1], [0]]))  # from places that differ per sample
    assert again.coords.tolist() == [[[0.0, 0.0]], [[0.0, 1.0]]]


def test_prefix_is_a_total_and_leaves_the_rest():
    at = Positions.grid((2, 3))
    more = at.with_prefix(4).with_prefix(1)
    assert (at.prefix, more.prefix, more.extent) == (0, 1, (2, 3))
    assert torch.equal(more.coords, at.coords)


def test_positions_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Positions.grid((2, 3)).prefix = 1


ERRORS = {
    "whole numbers": (lambda: Positions(torch.zeros(1, 3, 1).long(), (3,)), "float32 or float64.*torch.int64"),
    "no batch": (lambda: Positions(torch.zeros(3, 2), (3, 2)), r"\(B, N, d\).*\(3, 2\)"),
    "axes": (lambda: Positions(torch.zeros(1, 3, 2), (3,)), r"2 axes, extent=\(3,\)"),
    "index": (lambda: Positions.grid((2, 3)).take(torch.zeros(1, 1, 2).long()), r"\(K,\) or \(B, K\).*\(1, 1, 2\)"),
    "samples": (
        lambda: Positions(torch.zeros(3, 4, 1), (4,)).take(torch.zeros(2, 1).long()),
        "index is for 2 samples, coords for 3",
    ),
    "between": (lambda: Positions(torch.tensor([[[0.0], [0.5]]]), (2,)).places(), "whole coordinates only"),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [0.25, -1e-3, 2.999999])
def test_places_refuse_what_is_not_whole(value):
    with pytest.raises(ValueError, match="continuous encoding"):
        Positions(torch.tensor([[[1.0, 2.0], [1.0, value]]]), (3, 4)).places()


def test_a_pytree_there_and_back():
    at = Positions.grid((2, 3)).with_prefix(1).take(torch.tensor([[4, 1], [0, 5]]))
    leaves, spec = _pytree.tree_flatten({"at": (at, 3)})
    back = _pytree.tree_unflatten(leaves, spec)["at"][0]
    assert isinstance(back, Positions)
    assert any(leaf is at.coords for leaf in leaves)
    assert back.coords is at.coords
    assert (back.extent, back.prefix) == (at.extent, at.prefix)
    moved = _pytree.tree_map_only(torch.Tensor, lambda t: t + 1, at)
    assert torch.equal(moved.coords, at.coords + 1)
    assert (moved.extent, moved.prefix) == (at.extent, at.prefix)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda at: pickle.loads(pickle.dumps(at))])
def test_positions_survive_copies(copied):
    at = Positions.grid((2, 3)).with_prefix(1)
    again = copied(at)
    assert again.coords is not at.coords
    assert torch.equal(again.coords, at.coords)
    assert (again.extent, again.prefix) == (at.extent, at.prefix)


@pytest.mark.parametrize("extent", [(0, 4), (4, 0), (-1,), (2, 0, 2)])
def test_a_grid_has_a_place_on_every_axis(extent):
    with pytest.raises(ValueError, match="at least one place along each axis, got"):
        Positions.grid(extent)
