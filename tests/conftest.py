"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # `pytest -n 2` has a process for each core


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing")
    return folder


# Tests that take seconds for each encoding: one encoding of each kind by default, `-m slow` for the others.
KINDS = {"none", "learned", "relative", "alibi", "rope_mixed", "sincos+rope_mixed"}
EXPENSIVE = {
    "test_a_few_steps_lower_the_loss_and_leave_nothing_untrained",
    "test_any_size_runs_and_copies_and_loads_give_the_same",
    "test_one_batch_is_learned_by_heart",
    "test_export_with_dynamic_height_and_width",
    "test_fx_traces_exactly_and_serves_other_sizes",
    "test_trains_a_step_in_both_halves_and_at_another_rectangle",
    "test_trains_in_rectangles_and_sees_no_hidden_pixel",
    "test_copies_and_averages_after_a_forward",
    "test_compiles_whole",
    "test_half_precision_stays_near",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname in EXPENSIVE:
            words = {value for value in item.callspec.params.values() if isinstance(value, str)}
            if words and not words & KINDS:
                item.add_marker(pytest.mark.slow)
