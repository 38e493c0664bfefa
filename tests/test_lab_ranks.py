"""lab.ranks and lab.parts: several processes of this machine."""

import time

import pytest
import torch
from torch import distributed
from torch.multiprocessing import ProcessRaisedException

from kfqn_core.lab import parts
from kfqn_core.lab.ranks import alike, messages, run


def failing(rank):
    assert rank == 0, "rank 1 does not like this"
    time.sleep(60)


def waiting(rank):
    time.sleep(60)


def works(rank, cases):
    with messages() as sent:
        distributed.all_reduce(torch.zeros(3, dtype=torch.float64))
        distributed.broadcast(torch.zeros(2), 0)
        distributed.barrier()
    return {
        "sent": sent,
        "states": parts.several(rank, cases),
        "broken": parts.trained(rank, {}, broken="share"),
        "story": parts.story(rank, [8], [1]),
    }


def test_what_a_rank_raises_is_raised_and_the_others_are_ended():
    began = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="rank 1 does not like this"):
        run(failing, 2)
    assert time.monotonic() - began < 50


def test_ranks_that_take_too_long_are_ended():
    with pytest.raises(TimeoutError, match="still at work after 3 s: give them more"):
        run(waiting, 1, seconds=3)


def test_work_is_that_of_one_process_or_not_if_it_is_broken():
    cases = {"default": {}, "pairs": {"pairs": "next_batch"}}
    one, two = run(works, 2, cases)
    assert one["sent"] == [24, 8, 0]
    for name, options in cases.items():
        assert torch.equal(one["states"][name], two["states"][name])
        assert torch.allclose(one["states"][name], parts.trained(0, options), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(one["broken"], two["broken"], rtol=1e-3)
    of_one, of_two = one["story"], two["story"]
    assert of_one["accident"] == of_two["accident"] == {"unchanged": True, "skipped": 1}
    assert torch.equal(of_one["run"]["end"], of_one["again"])
    assert of_one["traffic"][0]["between"] == [4]
    assert of_one["traffic"][0]["update"] == [4 * (1 + 3 + 3 * 9), 4 * 3 * 9]
    assert of_one["traffic"][0]["gradients"] == [4 * 3 * 8 * 9]


def test_one_process_can_count_as_several():
    with alike(3) as sent:
        message = torch.ones(2)
        distributed.all_reduce(message)
    assert sent == [8]
    assert message.tolist() == [3, 3]
    with alike(3, refusing=2):
        distributed.all_reduce(message)
    assert message.tolist() == [7, 9]
