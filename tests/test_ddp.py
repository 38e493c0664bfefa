"""Several processes, each with a part of every mini-batch, take the steps of one process with the whole.

Real processes over gloo on the CPU. All cases run in one pair of them and some in a group of four, because starting a
process costs seconds; the results are compared here, where a failure is a failed test.
"""

import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from kfqn_core import KFQN, presets
from kfqn_core.lab.ranks import gradient_messages, messages, run
from tests.measures import assert_close, same_bits
from tests.test_optimizer import METHODS, batches, closure_for, snapshot, square_loss, tanh_network, train
from tests.test_optimizer_cnn import image_network, images

STEPS, LONG = 5, 20
SECONDS = 240  # for all cases of a group, which take about twenty
EXACT = 1e-10  # twenty steps of float64 rounding, amplified by the conditioning of H
SINGLE = 5e-5  # of float32, 6e-8 a step: measured up to 4e-6, on another order of sums perhaps more


class Unused(nn.Module):
    """A layer that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = tanh_network(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.used(x)


def float_batches():
    return batches(dtype=torch.float32)


VECTORS = (tanh_network, batches, square_loss)
FLOATS = (lambda: tanh_network(dtype=torch.float32), float_batches, square_loss)
IMAGES = (lambda: image_network("grouped"), images, nn.functional.cross_entropy)
OPTIONS = {**METHODS, "average": {"activation_decay": 0.9}, "refresh": {**presets.KBFGS_2020, "refresh": 2}}
# Name -> model, data, loss; options of KFQN; options of the wrapper; what KFQN is given: the wrapper, or the model
# before or after it is wrapped; and the number of steps.
ON_TWO = {
    **{f"vectors-{name}": (VECTORS, options, {}, "wrapper", LONG) for name, options in OPTIONS.items()},
    **{f"images-{name}": (IMAGES, OPTIONS[name], {}, "wrapper", LONG) for name in ("default", "KFQN_2022")},
    "images-next_batch": (IMAGES, OPTIONS["next_batch"], {}, "wrapper", STEPS),
    **{f"floats-{name}": (FLOATS, OPTIONS[name], {}, "wrapper", LONG) for name in ("default", "low_rank")},
    **{
        f"{name}-{given}": ((model, *VECTORS[1:]), presets.KBFGS_2020, wrapper, given, STEPS)
        for given in ("wrapper", "model_before", "model_after")
        for name, model, wrapper in (
            ("plain", tanh_network, {}),
            ("bucket_views", tanh_network, {"gradient_as_bucket_view": True}),
            ("static_graph", tanh_network, {"static_graph": True}),
            ("unused_layer", Unused, {"find_unused_parameters": True}),
        )
    },
}  # fmt: skip
PRESETS = ("default", "KBFGS_2020", "KBFGS_L_2020", "low_rank", "next_batch")
ON_FOUR = {
    **{f"vectors-{name}": (VECTORS, OPTIONS[name], {}, "wrapper", LONG) for name in PRESETS},
    **{f"images-{name}": (IMAGES, OPTIONS[name], {}, "wrapper", LONG) for name in ("KFQN_CNN_2021", "KFQN_2022")},
}
CASES = {2: ON_TWO, 4: ON_FOUR}


def build(case, rank=None, ranks=2):
    """Model and optimizer of one rank, or those of a single process; the first mini-batches; the loss."""
    (make, data, loss_fn), options, wrapper, given, _ = case
    torch.manual_seed(0)
    model, data = make(), [(x[: len(x) // 4 * 4], y[: len(x) // 4 * 4]) for x, y in data()]
    if rank is None:
        return model, KFQN(model, lr=0.05, **options), data, loss_fn
    early = KFQN(model, lr=0.05, **options) if given == "model_before" else None
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = early or KFQN(wrapped if given == "wrapper" else model, lr=0.05, **options)
    return wrapped, optimizer, [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in data], loss_fn


def history(case, rank=None, ranks=2):
    """Parameters and curvature after each step."""
    model, optimizer, data, loss_fn = build(case, rank, ranks)
    if case[3] == "wrapper" and not isinstance(case[0][0], type):  # `Unused` has a layer that cannot be warmed
        optimizer.warm_start(x for x, _ in data)
    steps = []
    for k in range(case[4]):
        train(model, optimizer, [data[k % len(data)]], 1, loss_fn)
        steps.append(snapshot(model, optimizer))
    return [list(step.values()) for step in steps]


def mean_loss(output, target):
    """Of no samples it is zero."""
    return 0.5 * ((output - target) ** 2).sum() / max(1, len(output))


UNEVEN = {"action": {"activation_factor": "action"}, "KBFGS_2020": presets.KBFGS_2020, "low_rank": OPTIONS["low_rank"]}


def uneven(rank=None):
    """Parts of four and two samples, the ranks counting alike: as if every sample of the second stood there twice."""
    results = {}
    for name, options in UNEVEN.items():
        model, data = tanh_network(), [(x[:6], y[:6]) for x, y in batches()]
        if rank is None:
            data = [tuple(torch.cat([t[:4], t[4:], t[4:]]) for t in pair) for pair in data]
        else:
            model = DistributedDataParallel(model)
            data = [tuple(t.split([4, 2])[rank] for t in pair) for pair in data]
        optimizer = KFQN(model, lr=0.05, **options)
        train(model, optimizer, data, LONG, mean_loss)
        results[name] = list(snapshot(model, optimizer).values())
    return results


def parts_of_batches(rank):
    """This rank's part of every mini-batch, all of it for None, and its weight; rank 1 has nothing of every third."""
    data = batches()
    for k in range(LONG):
        (x, y), alone = data[k % len(data)], k % 3 == 0
        if alone:
            x, y = (t[: len(t) // 2] if rank != 1 else t[:0] for t in (x, y))
        elif rank is not None:
            x, y = x.chunk(2)[rank], y.chunk(2)[rank]
        yield x, y, 0.5 if alone and rank is None else 1.0


def empty(rank=None):
    """Rank 1 has no samples in every third step: half the gradient is left, and the statistics are those of rank 0."""
    model = tanh_network()
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = KFQN(wrapped, lr=0.05, activation_factor="action")
    for x, y, scale in parts_of_batches(rank):
        optimizer.zero_grad()
        (scale * mean_loss(wrapped(x), y)).backward()
        optimizer.step()
    return list(snapshot(model, optimizer).values())


def accumulated(rank=None):
    """Two micro-batches for each step, of which the wrapper is to notice the second alone."""
    model, data = tanh_network(), batches()
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = KFQN(wrapped, lr=0.05, activation_factor="action")
    for k in range(LONG):
        optimizer.zero_grad()
        for last in (False, True):
            x, y = data[(2 * k + last) % len(data)]
            if rank is not None:
                x, y = x.chunk(2)[rank], y.chunk(2)[rank]
            with nullcontext() if last or rank is None else wrapped.no_sync():
                (square_loss(wrapped(x), y) / 2).backward()
        optimizer.step()
    return list(snapshot(model, optimizer).values())


class Routed(nn.Module):
    """A second layer that the samples of rank 1 alone go through."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.rank, self.first, self.second = rank, nn.Linear(6, 5).double(), nn.Linear(5, 5).double()

    def forward(self, x):
        h = self.first(x).tanh()
        return self.second(h) if self.rank == 1 else h


def routed(rank):
    """A layer is started by the rank that sees it, on all."""
    model = DistributedDataParallel(Routed(rank), find_unused_parameters=True)
    optimizer = KFQN(model, lr=0.05, activation_factor="action")
    train(model, optimizer, [(x, y) for x, y in batches()], STEPS)
    started = [layer.started for layer in optimizer.layers.values()]
    return started, list(snapshot(model, optimizer).values())


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
    train(model, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches()], STEPS)
    return seen[True], seen[False]


def accidents(rank):
    """A loss that is infinite on rank 1 alone, though its gradient is not; and images whose size is the rank's own."""
    model, optimizer, data, loss_fn = build(ON_TWO["vectors-KBFGS_2020"], rank)
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
    every_third = ((tanh_network, batches, square_loss), {"refresh": 3}, {}, "wrapper", STEPS)
    model, optimizer, data, loss_fn = build(every_third, rank)
    train(model, optimizer, data, 1, loss_fn)
    kept = optimizer.state_dict()
    model, optimizer, data, loss_fn = build(every_third, rank)
    optimizer.load_state_dict(kept)
    closure = closure_for(model, optimizer, loss_fn, *data[0])
    optimizer.step(lambda: closure() + (torch.inf if rank == 1 else 0.0))
    return unmoved, (skipped, optimizer.skipped_steps), states


def spoiled(rank):
    """A NaN among the inputs of rank 1, in the first step or the third: what it changes, and what comes after."""
    results = []
    for at in (0, 2):
        model, optimizer, data, _ = build(ON_TWO["vectors-default"], rank)
        for k in range(STEPS):
            x, y = data[k]
            before = snapshot(model, optimizer)
            if k == at and rank == 1:
                x = x.clone()
                x[0, 0] = torch.nan
            train(model, optimizer, [(x, y)], 1)
            if k == at:
                same = all(torch.equal(before[key], value) for key, value in snapshot(model, optimizer).items())
        results.append((same, optimizer.skipped_steps, list(snapshot(model, optimizer).values())))
    return results


def half_evaluated(rank):
    """The second evaluation of a step fails on rank 1 alone: the others wait for its losses and means."""
    model, _, data, loss_fn = build(ON_TWO["vectors-default"], rank)
    optimizer = KFQN(model, lr=0.05, safeguard=True, **presets.KBFGS_2020)
    calls = []

    def closure(k):
        calls.append(k)
        assert not (rank == 1 and len(calls) == 4), "the second evaluation of the second step"
        return closure_for(model, optimizer, loss_fn, *data[k])()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(4):
            optimizer.step(lambda k=k: closure(k))
    return list(snapshot(model, optimizer).values())


def refusals(rank):
    """What is said where ranks would drift apart, or have parts of a matrix."""
    said = {}
    optimizer = KFQN(tanh_network())
    with pytest.raises(RuntimeError) as raised:
        optimizer.warm_start([batches()[0][0]])
    said["warm start"] = str(raised.value)

    model, optimizer, data, _ = build(ON_TWO["vectors-default"], rank)
    before = snapshot(model, optimizer)
    with model.join(), pytest.raises(RuntimeError) as raised:
        train(model, optimizer, data, 1)
    said["join"] = str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in snapshot(model, optimizer).items())

    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tanh_network()
    with pytest.raises(TypeError) as raised:
        KFQN(parallelize_module(tanh_network(), mesh, {"0": ColwiseParallel()}))
    said["tensor parallel"] = str(raised.value)
    optimizer = KFQN(model, process_group=mesh.get_group())
    closure = closure_for(model, optimizer, square_loss, *batches()[0])
    closure()
    before, whole = snapshot(model, optimizer), model[2].weight
    model[2].weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(1)]))
    with pytest.raises(TypeError) as raised:
        optimizer.step()
    said["by hand, later"] = str(raised.value)
    model[2].weight = whole
    assert same_bits(before.values(), snapshot(model, optimizer).values())
    optimizer.step(closure)  # goes on
    return said


def pickles(rank):
    """A checkpoint of the model inside and its optimizer needs no process group to be read."""
    model, optimizer, data, loss_fn = build(ON_TWO["plain-model_after"], rank)
    train(model, optimizer, data, 2, loss_fn)
    return pickle.dumps((model.module, optimizer))


def traffic(rank):
    """The messages of each step, of the optimizer and of the wrapper, in bytes."""
    model, _, data, loss_fn = build(ON_TWO["floats-default"], rank)
    optimizer, gradients = KFQN(model, lr=0.05, refresh=2, activation_factor="action"), gradient_messages(model)
    sent = []
    for k in range(4):
        with messages() as own:
            train(model, optimizer, [data[k]], 1, loss_fn)
        sent.append((list(own), sum(gradients)))
        gradients.clear()
    return sent


def two(rank):
    results = {name: history(case, rank) for name, case in ON_TWO.items()}
    extras = (
        uneven,
        empty,
        accumulated,
        routed,
        buffers,
        accidents,
        half_evaluated,
        spoiled,
        refusals,
        pickles,
        traffic,
    )
    return results | {extra.__name__: extra(rank) for extra in extras}


def four(rank):
    return {name: history(case, rank, 4) for name, case in ON_FOUR.items()}


@pytest.fixture(scope="module")
def ranks():
    """The results of each of two ranks. A rank that fails or hangs fails every test."""
    return run(two, 2, seconds=SECONDS)


@pytest.fixture(scope="module")
def of_four():
    return run(four, 4, seconds=SECONDS)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_ranks_with_parts_of_batches_are_one_with_the_whole(size, name, request):
    results = request.getfixturevalue("ranks" if size == 2 else "of_four")
    tolerance = SINGLE if name.startswith("floats") else EXACT
    for *of_ranks, whole in zip(*(rank[name] for rank in results), history(CASES[size][name]), strict=True):
        assert all(same_bits(of_ranks[0], other) for other in of_ranks[1:])
        assert_close(of_ranks[0], whole, tolerance)


@pytest.mark.parametrize("name", UNEVEN)
def test_ranks_count_alike_whatever_they_have(name, ranks):
    assert same_bits(ranks[0]["uneven"][name], ranks[1]["uneven"][name])
    assert_close(ranks[0]["uneven"][name], uneven()[name], EXACT)


def test_a_rank_without_samples_has_no_say_in_the_statistics(ranks):
    assert same_bits(ranks[0]["empty"], ranks[1]["empty"])
    assert_close(ranks[0]["empty"], empty(), EXACT)


def test_micro_batches_without_synchronisation_count(ranks):
    assert same_bits(ranks[0]["accumulated"], ranks[1]["accumulated"])
    assert_close(ranks[0]["accumulated"], accumulated(), EXACT)


def test_a_layer_that_one_rank_alone_sees_is_started_on_all(ranks):
    assert ranks[0]["routed"][0] == ranks[1]["routed"][0] == [True, True]
    assert same_bits(ranks[0]["routed"][1], ranks[1]["routed"][1])


def test_the_wrapper_does_not_notice_a_second_pass(ranks):
    """It broadcasts the buffers of rank 0 before every first pass, as always, and before no second one."""
    (first, again), (first_1, again_1) = (rank["buffers"] for rank in ranks)
    assert len(first) == len(again) == STEPS
    assert same_bits(first, first_1)
    assert not any(torch.equal(one, other) for one, other in zip(again, again_1, strict=True))


def test_ranks_agree_on_skipping_a_step_and_on_locations(ranks):
    for unmoved, skipped, _ in (rank["accidents"] for rank in ranks):
        assert unmoved
        assert skipped == (1, 1)
    assert same_bits(ranks[0]["accidents"][2], ranks[1]["accidents"][2])


def test_a_second_evaluation_that_fails_on_one_rank_keeps_nobody_waiting(ranks):
    assert same_bits(ranks[0]["half_evaluated"], ranks[1]["half_evaluated"])
    assert all(value.isfinite().all() for value in ranks[0]["half_evaluated"])


def test_a_nan_on_one_rank_changes_nothing_on_any(ranks):
    for first, second in zip(ranks[0]["spoiled"], ranks[1]["spoiled"], strict=True):
        for unmoved, skipped, values in (first, second):
            assert unmoved
            assert skipped == 1
            assert all(value.isfinite().all() for value in values)
        assert same_bits(first[2], second[2])


def test_what_cannot_be_is_refused_with_a_sentence_before_anything_moves(ranks):
    for said in (rank["refusals"] for rank in ranks):
        assert "wrap it in DistributedDataParallel" in said["warm start"]
        assert "give every rank the same number of mini-batches" in said["join"]
        for name in ("tensor parallel", "by hand, later"):
            assert "sharded over processes (S(" in said[name]
            assert "instead of FullyShardedDataParallel, a mesh with replicas, or tensor parallelism" in said[name]


def test_a_checkpoint_can_be_read_by_one_process(ranks):
    first, second = (pickle.loads(rank["pickles"]) for rank in ranks)
    for model, optimizer in (first, second):
        train(model, optimizer, batches(), 2)
    assert same_bits(snapshot(*first).values(), snapshot(*second).values())


def test_a_step_sends_little_beside_the_gradients(ranks):
    """Counted on the wire, in float32: a flag; or a flag, how many have seen each layer, abar, and A s."""
    model = tanh_network(dtype=torch.float32)
    inputs = [layer.in_features + 1 for layer in model if isinstance(layer, nn.Linear)]
    first = 4 * (1 + len(inputs) + sum(inputs))
    for rank in ranks:
        sent = [own for own, _ in rank["traffic"]]
        assert sent[1:] == [[4], [first, 4 * sum(inputs)], [4]]
        assert len(sent[0]) == 3  # and a question about layers that have no first estimate
        assert {gradients for _, gradients in rank["traffic"]} == {4 * sum(p.numel() for p in model.parameters())}


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
