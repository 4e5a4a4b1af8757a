"""One file and one line: an encoding nobody here has seen keeps the contract and runs in the ViT and in the study."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.helpers import randn, read_csv
from vit2dpe import ENCODINGS, ViT, load_run
from vit2dpe.encodings import Builder
from vit2dpe.study import StudyConfig, study
from vit2dpe.testing import check_encoding, randomise

SOURCE = '''\
"""`kings`: a learned penalty for each move of a king, and learned waves of the ring around the first place.

    bias_h(q, k) = -softplus(slope_h) max_a |q_a - k_a|,    token(p) = wave · sin(max_a p_a)
"""

import torch
from torch import nn

from vit2dpe.encodings import PositionEncoding
from vit2dpe.positions import exact, offsets


class Kings(PositionEncoding):
    gives = frozenset({"token", "bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, dim, heads, *, steep=0.1):
        super().__init__()
        self.steep = steep
        self.slope = nn.Parameter(torch.empty(heads))
        self.wave = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.slope, self.steep)
        nn.init.normal_(self.wave, std=0.02)

    def token(self, at):
        return exact(at.coords).amax(-1, keepdim=True).sin() * self.wave

    def bias(self, q, k):
        moves = torch.stack([offsets(q, k, axis).abs() for axis in range(q.axes)]).amax(0)
        return -nn.functional.softplus(self.slope.double())[:, None, None] * moves[:, None]
'''


@pytest.fixture
def kings(tmp_path, monkeypatch):
    """The file, and its line in ENCODINGS; nothing else."""
    (tmp_path / "kings.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("kings")
    monkeypatch.setitem(ENCODINGS, "kings", Builder(module.Kings, lambda d: {"dim": d.width, "heads": d.heads}))
    yield module.Kings
    monkeypatch.delitem(importlib.sys.modules, "kings")


def test_it_keeps_the_contract(kings):
    assert len(SOURCE.splitlines()) <= 40
    check_encoding("kings(steep=0.3)")


@pytest.mark.parametrize("word", ["kings", "kings(steep=1)+rope+relative"])
@torch.no_grad()
def test_it_runs_in_a_vit_alone_and_with_others(kings, word):
    """At the training size and beyond it, shared and before every block; and it matters."""
    sizes = dict(img_size=(8, 12), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=8)
    x = randn(2, 3, 16, 20)
    for where in (dict(position=word), dict(position="none", block_position=word)):
        torch.manual_seed(0)
        model = randomise(ViT(**sizes, **where)).eval()
        found = [module for module in model.modules() if isinstance(module, kings)]
        assert len(found) == (1 if "block_position" not in where else 2)
        logits = model(x)
        assert logits.shape == (2, 8)
        for parameter in ("slope", "wave"):
            for encoding in found:
                getattr(encoding, parameter).mul_(-2.0)
            before, logits = logits, model(x)
            assert float((logits - before).abs().max()) > 1e-3, parameter


def test_it_runs_in_the_study(kings, tmp_path):
    """Trained, measured at other sizes under its two policies, saved and loaded again by its word."""
    config = StudyConfig.of(
        encodings="none,kings", sizes="16,24x32", epochs=1, limit_train=64, limit_test=40, width=16, depth=1, heads=2,
        batch_size=32, smoke=True, out=str(tmp_path / "out"),
    )  # fmt: skip
    study(config)
    rows = [row for row in read_csv(tmp_path / "out" / "results.csv") if row["encoding"] == "kings"]
    assert {row["policy"] for row in rows} == {"extrapolate", "interpolate"}
    assert {row["height"] for row in rows} == {"16.0", "24.0"}
    (folder,) = (tmp_path / "out" / "cells").glob("kings-*")
    assert isinstance(load_run(folder).position, kings)
