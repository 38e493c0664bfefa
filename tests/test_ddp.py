"""Two processes, each with half of every mini-batch, take the steps of one process with the whole.

Real processes over gloo on the CPU. All cases run in one pair of them, because starting a process costs seconds; the
results are compared here, where a failure is a failed test.
"""

import pickle
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kfqn_core import KFQN, presets
from tests.test_optimizer import METHODS, batches, closure_for, error, snapshot, square_loss, tanh_network, train
from tests.test_optimizer_cnn import image_network, images

RANKS = 2
STEPS = 5
TIMEOUT = 180  # seconds for all cases, which take about fifteen


class Unused(nn.Module):
    """A layer that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = tanh_network(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.used(x)


VECTORS = (tanh_network, batches, square_loss)
IMAGES = (lambda: image_network("grouped"), images, nn.functional.cross_entropy)
OPTIONS = {**METHODS, "average": {"activation_decay": 0.9}, "refresh": {**presets.KBFGS_2020, "refresh": 2}}
# Name -> model, data, loss; options of KFQN; options of the wrapper; what KFQN is given: the wrapper, or the model
# before or after it is wrapped.
CASES = {
    **{f"vectors-{name}": (VECTORS, options, {}, "wrapper") for name, options in OPTIONS.items()},
    **{f"images-{name}": (IMAGES, OPTIONS[name], {}, "wrapper") for name in ("default", "KFQN_2022", "next_batch")},
    **{
        f"{name}-{given}": ((model, *VECTORS[1:]), presets.KBFGS_2020, wrapper, given)
        for given in ("wrapper", "model_before", "model_after")
        for name, model, wrapper in (
            ("plain", tanh_network, {}),
            ("bucket_views", tanh_network, {"gradient_as_bucket_view": True}),
            ("static_graph", tanh_network, {"static_graph": True}),
            ("unused_layer", Unused, {"find_unused_parameters": True}),
        )
    },
}


def build(case, rank=None):
    """Model and optimizer of one rank, or those of a single process; the first mini-batches; the loss."""
    (make, data, loss_fn), options, wrapper, given = case
    torch.manual_seed(0)
    model, data = make(), data()
    if rank is None:
        return model, KFQN(model, lr=0.05, **options), data, loss_fn
    early = KFQN(model, lr=0.05, **options) if given == "model_before" else None
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = early or KFQN(wrapped if given == "wrapper" else model, lr=0.05, **options)
    return wrapped, optimizer, [(x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]) for x, y in data], loss_fn


def history(case, rank=None):
    """Parameters and curvature after each step."""
    model, optimizer, data, loss_fn = build(case, rank)
    if case[3] == "wrapper" and not isinstance(case[0][0], type):  # `Unused` has a layer that cannot be warmed
        optimizer.warm_start(x for x, _ in data)
    steps = []
    for k in range(STEPS):
        train(model, optimizer, [data[k % len(data)]], 1, loss_fn)
        steps.append(snapshot(model, optimizer))
    return [list(step.values()) for step in steps]


def buffers(rank):
    """The statistics of batch norm with which each first and each second pass begins."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    model = DistributedDataParallel(inner)
    optimizer = KFQN(model, lr=0.05, **presets.KBFGS_2020)
    seen = {True: [], False: []}
    inner[1].register_forward_pre_hook(
        lambda norm, args: seen[norm.weight.requires_grad].append(norm.running_mean.clone())
    )
    train(model, optimizer, [(x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]) for x, y in batches()], STEPS)
    return seen[True], seen[False]


def accidents(rank):
    """A loss that is infinite on rank 1 alone, though its gradient is not; and images whose size is the rank's own."""
    model, optimizer, data, loss_fn = build(CASES["vectors-KBFGS_2020"], rank)
    train(model, optimizer, data, 2, loss_fn)
    before = snapshot(model, optimizer)
    closure = closure_for(model, optimizer, loss_fn, *data[0])
    optimizer.step(lambda: closure() + (torch.inf if rank == 1 else 0.0))
    unmoved = all(torch.equal(before[key], value) for key, value in snapshot(model, optimizer).items())
    skipped = optimizer.skipped_steps

    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).double()
    model = DistributedDataParallel(pooled)
    optimizer = KFQN(model, lr=0.05, **presets.KFQN_2022)
    crops = [(x[..., : 7 - rank], y) for x, y in images()]
    train(model, optimizer, crops, STEPS, nn.functional.cross_entropy)
    states = list(snapshot(model, optimizer).values())

    # A resumed run meets its first accident between two updates, before a mini-batch had to be looked at.
    every_third = ((tanh_network, batches, square_loss), {"refresh": 3}, {}, "wrapper")
    model, optimizer, data, loss_fn = build(every_third, rank)
    train(model, optimizer, data, 1, loss_fn)
    kept = optimizer.state_dict()
    model, optimizer, data, loss_fn = build(every_third, rank)
    optimizer.load_state_dict(kept)
    closure = closure_for(model, optimizer, loss_fn, *data[0])
    optimizer.step(lambda: closure() + (torch.inf if rank == 1 else 0.0))
    return unmoved, (skipped, optimizer.skipped_steps), states


def refusals(rank):
    """What is said where ranks would drift apart."""
    optimizer = KFQN(tanh_network())
    with pytest.raises(RuntimeError) as raised:
        optimizer.warm_start([batches()[0][0]])
    return str(raised.value)


def pickles(rank):
    """A checkpoint of the model inside and its optimizer needs no process group to be read."""
    model, optimizer, data, loss_fn = build(CASES["plain-model_after"], rank)
    train(model, optimizer, data, 2, loss_fn)
    return pickle.dumps((model.module, optimizer))


def worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=RANKS)
    results = {name: history(case, rank) for name, case in CASES.items()}
    results |= {extra.__name__: extra(rank) for extra in (buffers, accidents, refusals, pickles)}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank. A rank that fails or hangs fails every test."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not processes.join(timeout=max(0.0, deadline - time.monotonic())):  # raises what a rank raised
            assert time.monotonic() < deadline, f"the ranks were still at work after {TIMEOUT} s"
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes.processes] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def same(one, two):
    """Bitwise, a NaN being equal to itself: factors that wait for a first mini-batch hold them."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_half_batches_are_one_with_the_whole(name, ranks):
    for first, second, whole in zip(*(rank[name] for rank in ranks), history(CASES[name]), strict=True):
        assert same(first, second)
        for value, expected in zip(first, whole, strict=True):
            if expected.any() and not expected.isnan().any():
                assert error(value, expected) < 1e-10


def test_the_wrapper_does_not_notice_a_second_pass(ranks):
    """It broadcasts the buffers of rank 0 before every first pass, as always, and before no second one."""
    (first, again), (first_1, again_1) = (rank["buffers"] for rank in ranks)
    assert len(first) == len(again) == STEPS
    assert same(first, first_1)
    assert not any(torch.equal(one, other) for one, other in zip(again, again_1, strict=True))


def test_ranks_agree_on_skipping_a_step_and_on_locations(ranks):
    for unmoved, skipped, _ in (rank["accidents"] for rank in ranks):
        assert unmoved
        assert skipped == (1, 1)
    assert same(ranks[0]["accidents"][2], ranks[1]["accidents"][2])


def test_a_warm_start_before_ranks_know_each_other_is_refused(ranks):
    for rank in ranks:
        assert "wrap it in DistributedDataParallel" in rank["refusals"]


def test_a_checkpoint_can_be_read_by_one_process(ranks):
    first, second = (pickle.loads(rank["pickles"]) for rank in ranks)
    for model, optimizer in (first, second):
        train(model, optimizer, batches(), 2)
    assert same(snapshot(*first).values(), snapshot(*second).values())


def test_layers_are_named_as_in_the_model_that_is_given_and_states_fit_either():
    """A state saved by the optimizer of the wrapper fits that of the model, since torch's states go by position."""
    model = tanh_network()
    optimizer = KFQN(model)
    train(model, optimizer, batches(), 2)
    wrapper = nn.ModuleDict({"module": tanh_network(seed=3)})  # names as DistributedDataParallel's
    other = KFQN(wrapper)
    assert list(other.layers) == [f"module.{name}" for name in optimizer.layers]
    other.load_state_dict(optimizer.state_dict())
    for name, layer in optimizer.layers.items():
        assert torch.equal(other.layers[f"module.{name}"].activation.H, layer.activation.H)


def test_sharded_parameters_are_refused():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tanh_network()
        fully_shard(model)
        with pytest.raises(TypeError, match=r"sharded over processes.*DistributedDataParallel instead of FSDP"):
            KFQN(model)
    finally:
        distributed.destroy_process_group()
