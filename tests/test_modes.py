"""Evaluation mode for a while."""

import pytest
from torch import nn

from vit2dpe.modes import evaluating


def test_each_part_has_its_own_mode_again():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()  # a frozen part
    modes = [part.training for part in model.modules()]
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == modes == [True, True, False, False]


def test_after_an_error_too():
    model = nn.Dropout().train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError("an error")
    assert model.training
