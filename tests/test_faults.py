"""A process that is silent, or killed, and what is left of its work: the checkpoint."""

import copy
import os
import signal
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from kfqn_core import KFQN
from kfqn_core.lab.ranks import run
from tests.test_optimizer import batches, closure_for, error, snapshot, square_loss, tanh_network, train

SAVED, STEPS = 3, 6  # steps before the checkpoint, and of the whole run
SECONDS = 120
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def made(rank=0, ranks=1):
    """A model, its optimizer, and this rank's part of the mini-batches."""
    model = tanh_network()
    wrapped = model if ranks == 1 else DistributedDataParallel(model)
    optimizer = KFQN(wrapped, lr=0.05, activation_factor="action")
    return wrapped, optimizer, [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in batches(count=STEPS)]


def save(model, optimizer, folder):
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)


def load(model, optimizer, folder):
    """Into copies: what is read goes to where it is to stand, and half of a file would be half of a state."""
    state = copy.deepcopy(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def said_by(call):
    """What an error says, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        call()
    return str(raised.value), time.monotonic() - began


def unlucky(rank, folder):
    """Rank 1 says nothing for a while; then both train and save; then rank 1 is killed between two messages."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), rank=rank, world_size=2)
    said, impatient = {}, distributed.new_group(timeout=timedelta(seconds=2))
    model, data = tanh_network(), batches()
    optimizer = KFQN(model, lr=0.05, process_group=impatient)
    closure = closure_for(model, optimizer, square_loss, *data[0])
    if rank == 0:
        before = snapshot(model, optimizer)
        said["silent"] = said_by(lambda: optimizer.step(closure))
        said["unmoved"] = all(torch.equal(before[key], value) for key, value in snapshot(model, optimizer).items())
    distributed.barrier()

    model, optimizer, data = made(rank, 2)
    train(model, optimizer, data, SAVED)
    save(model, optimizer, f"{folder}/checkpoint")
    sent = []

    def all_reduce(*args, right=distributed.all_reduce, **kwargs):
        sent.append(None)
        if rank == 1 and len(sent) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    with mock.patch.object(distributed, "all_reduce", all_reduce):
        said["killed"] = said_by(lambda: train(model, optimizer, data[SAVED:], 1))
    torch.save(said, f"{folder}/said.pt")
    os._exit(0)  # nobody is left to say goodbye to


def resumed(rank, folder, ranks):
    """The state that was loaded; that after the remaining steps; and that of a run which nothing happened to."""
    model, optimizer, data = made(rank, ranks)
    load(model, optimizer, f"{folder}/checkpoint")
    loaded = list(snapshot(model, optimizer).values())
    train(model, optimizer, data[SAVED:], STEPS - SAVED)
    end = list(snapshot(model, optimizer).values())
    model, optimizer, data = made(rank, ranks)
    train(model, optimizer, data, STEPS)
    return loaded, end, list(snapshot(model, optimizer).values())


def both(rank, folder):
    return resumed(rank, folder, 2)


def all_four(rank, folder):
    return resumed(rank, folder, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    start = multiprocessing.get_context("spawn")
    processes = [start.Process(target=unlucky, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        hangs = process.is_alive()
        process.kill()
        assert not hangs, "a rank was still waiting for another that was killed"
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return run(both, 2, str(folder), seconds=SECONDS)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_rank_that_is_silent_or_killed_stops_the_others_with_a_sentence(folder):
    said = torch.load(folder / "said.pt")
    for how in ("silent", "killed"):
        sentence, seconds = said[how]
        assert "did not answer" in sentence
        assert "start all of them again from the last checkpoint" in sentence
        assert seconds < 30  # the limit of the process group is 2 s, and a killed process closes its connections
    assert said["unmoved"]


def test_killed_processes_resume_to_the_bit(two):
    for loaded, end, uninterrupted in two:
        assert not same(loaded, end)
        assert same(end, uninterrupted)
    assert same(two[0][1], two[1][1])


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(folder, two):
    """The state is the same bits; what follows differs by the order in which sums are rounded."""
    one = resumed(0, str(folder), 1)
    of_four = run(all_four, 4, str(folder), seconds=SECONDS)
    for loaded, end, _ in (one, *of_four):
        assert same(loaded, two[0][0])
        for value, expected in zip(end, two[0][1], strict=True):
            assert error(value, expected) < 1e-10  # three steps of float64 rounding, amplified by the condition of H


@pytest.mark.parametrize("how", ["torch.save", "distributed"])
def test_half_a_checkpoint_is_refused_and_nothing_changes(how, folder, tmp_path):
    model, optimizer, data = made()
    train(model, optimizer, data, 2)
    file = tmp_path / "checkpoint"
    if how == "torch.save":
        torch.save(optimizer.state_dict(), file)
    else:
        save(model, optimizer, file)
        train(model, optimizer, data, 1)
    before = snapshot(model, optimizer)
    torn = file if file.is_file() else max(file.glob("*.distcp"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    read = (
        (lambda: optimizer.load_state_dict(torch.load(file)))
        if file.is_file()
        else lambda: load(model, optimizer, file)
    )
    with pytest.raises((RuntimeError, CheckpointException), match=r"corrupted|central directory"):
        read()
    assert same(before.values(), snapshot(model, optimizer).values())


def test_a_state_whose_tensors_are_gone_is_refused_and_nothing_changes():
    """As whoever gathers the parts of a state by hand may lose some."""
    model, optimizer, data = made()
    train(model, optimizer, data, 2)
    state = copy.deepcopy(optimizer.state_dict())
    before = snapshot(model, optimizer)
    del state["state"][2]["H_a"]
    with pytest.raises(ValueError, match="does not fit the weight of layer '2'"):
        optimizer.load_state_dict(state)
    assert same(before.values(), snapshot(model, optimizer).values())
