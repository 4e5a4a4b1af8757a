"""How long processes wait for each other, and which errors mean that one is lost; real ranks die in tests/faults."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from vit2dpe.errors import TrainingError
from vit2dpe.training import distributed
from vit2dpe.training.distributed import is_lost, process_group


@pytest.fixture
def ranks(monkeypatch):
    """The arguments with which groups of two processes are made; none is."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    fake = mock.Mock(wraps=dist, DistError=dist.DistError, ProcessGroup=dist.ProcessGroup)
    for name in ("init_process_group", "get_rank", "new_group", "destroy_process_group"):
        setattr(fake, name, mock.Mock())
    monkeypatch.setattr(distributed, "dist", fake)
    return fake


@pytest.mark.parametrize(
    ("device", "how", "seconds"),
    [("cpu", {}, 60), ("cpu", dict(compiled=True), 1800), ("cuda", {}, 600), ("cuda", dict(compiled=True), 1800),
     ("cuda", dict(timeout_s=5.0, compiled=True), 5)],
)  # fmt: skip
def test_what_a_first_step_may_take_is_waited_for(device, how, seconds, ranks):
    with process_group(torch.device(device), wait_minutes=7, **how):
        pass
    backend = "gloo" if device == "cpu" else "nccl"
    ranks.init_process_group.assert_called_once_with(backend, timeout=timedelta(seconds=seconds))
    waits = [call.kwargs["timeout"] for call in ranks.new_group.mock_calls if call.kwargs]
    assert waits == [timedelta(minutes=7), timedelta(seconds=seconds)][: 1 + (device == "cuda")]


def raised(action):
    with pytest.raises(RuntimeError) as caught:
        action()
    return caught.value


def of_a_backward_pass(message):
    def fail(gradient):
        raise RuntimeError(message)

    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(fail)
    return raised(y.backward)


def other(message):
    def fail():
        raise RuntimeError(message)

    return raised(fail)


def test_an_exchange_that_failed_is_told_by_its_kind(ranks):
    assert is_lost(raised(mock.Mock(side_effect=dist.DistBackendError("NCCL error"))))
    assert is_lost(raised(lambda: dist.HashStore().wait(["never"], timedelta(milliseconds=1))))
    assert not is_lost(other("Connection refused by the tracker"))
    assert not is_lost(other("no gloo in the pot"))
    assert not is_lost(of_a_backward_pass("shapes differ"))

    def train(error):
        with process_group(torch.device("cpu")):
            raise error

    with pytest.raises(TrainingError, match=r"lost another process \(NCCL error\)"):
        train(dist.DistBackendError("NCCL error"))
    with pytest.raises(RuntimeError, match=r"^Connection refused"):
        train(RuntimeError("Connection refused by the tracker"))
