"""Processes that keep a share of the factors each take the steps of one process that keeps all.

Real processes over gloo on the CPU, each with its part of every mini-batch. All cases run in one pair of processes and
some in a group of four, because starting a process costs seconds; the results are compared here.
"""

import copy
import pickle
import tempfile
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kfqn_core import KFQN, describe
from kfqn_core.lab.ranks import alike, messages, run
from kfqn_core.parallel.owners import shares
from kfqn_core.training import plan
from kfqn_core.training.owned import sent
from tests.measures import assert_close, same_bits
from tests.test_ddp import mean_loss, parts_of_batches
from tests.test_faults import load, save
from tests.test_optimizer import METHODS, batches, closure_for, square_loss, tanh_network, train
from tests.test_optimizer_cnn import image_network, images

LONG = 20
SECONDS = 240  # for all cases of a group, which take about twenty
EXACT = 1e-10  # twenty steps of float64 rounding, amplified by the conditioning of H
VECTORS = (tanh_network, batches, square_loss)
IMAGES = (lambda: image_network("grouped"), images, nn.functional.cross_entropy)
# Wide layers of few outputs, of which `D` is sent, and narrow ones of many, of which the factor is.
BOTH = (lambda: tanh_network((4, 9, 3, 9, 4)), lambda: [(x[:, :4], y[:, :4]) for x, y in batches()], square_loss)
EQUAL = (lambda: tanh_network((5,) * 6), lambda: [(x[:, :5], y[:, :5]) for x, y in batches()], square_loss)
ACTION = {"activation_factor": "action"}
ON_TWO = {
    **{f"vectors-{name}": (VECTORS, options) for name, options in METHODS.items()},
    **{f"images-{name}": (IMAGES, METHODS[name]) for name in ("default", "KFQN_2022", "next_batch")},
    **{f"equal-{name}": (EQUAL, METHODS[name]) for name in ("default", "KBFGS_2020", "low_rank")},
    "both": (BOTH, ACTION),
    "both-average": (BOTH, {**ACTION, "activation_decay": 0.9, "refresh": 3}),
    "both-diagonal": (BOTH, {"activation_factor": "diagonal"}),
}
ON_FOUR = {
    **{f"vectors-{name}": (VECTORS, METHODS[name]) for name in ("default", "KBFGS_2020", "next_batch", "low_rank")},
    "images-default": (IMAGES, {}),
    "equal-KBFGS_2020": (EQUAL, METHODS["KBFGS_2020"]),
    "both": (BOTH, ACTION),
}
CASES = {2: ON_TWO, 4: ON_FOUR}


def state_of(model, optimizer):
    """Everything that lives from one step to the next; every rank has to ask."""
    state = sorted(optimizer.state_dict()["state"].items())  # by parameter: groups are not those of one process
    factors = [t.detach().clone() for _, of in state for name, t in of.items() if name != "started"]
    return [p.detach().clone() for p in model.parameters()] + factors


def start(case=(VECTORS, {}), rank=None, ranks=2, **more):
    """Model, what is called in its place, optimizer and its part of the mini-batches, of one rank or one process."""
    (make, data, _), options = case
    torch.manual_seed(0)
    model, data = make(), [(x[: len(x) // 4 * 4], y[: len(x) // 4 * 4]) for x, y in data()]
    if rank is None:
        return model, model, KFQN(model, lr=0.05, **options, **more), data
    wrapped = DistributedDataParallel(model)
    optimizer = KFQN(wrapped, lr=0.05, **{"owners": True, **options, **more})
    return model, wrapped, optimizer, [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in data]


def history(case, rank=None, ranks=2):
    model, wrapped, optimizer, data = start(case, rank, ranks)
    if "pairs" in case[1]:
        optimizer.warm_start(x for x, _ in data)
    steps = []
    for k in range(LONG):
        train(wrapped, optimizer, [data[k % len(data)]], 1, case[0][2])
        if k in (0, 1, 9, LONG - 1):
            steps.append(state_of(model, optimizer))
    return steps


def uneven(rank=None):
    """Parts of four and two samples, the ranks counting alike: as if every sample of the second stood there twice."""
    model, wrapped, optimizer, _ = start((VECTORS, ACTION), rank)
    for k in range(LONG):
        x, y = (t[:6] for t in batches()[k % len(batches())])
        if rank is None:
            x, y = (torch.cat([t[:4], t[4:], t[4:]]) for t in (x, y))
        else:
            x, y = (t.split([4, 2])[rank] for t in (x, y))
        train(wrapped, optimizer, [(x, y)], 1, mean_loss)
    return state_of(model, optimizer)


def empty(rank=None):
    """Rank 1 has no samples in every third step: half the gradient is left, and the statistics are those of rank 0."""
    model, wrapped, optimizer, _ = start((VECTORS, ACTION), rank)
    for x, y, scale in parts_of_batches(rank):
        optimizer.zero_grad()
        (scale * mean_loss(wrapped(x), y)).backward()
        optimizer.step()
    return state_of(model, optimizer)


def spoiled(rank):
    """A NaN among the inputs of rank 1, in the first step or the third: what it changes, and what comes after."""
    results = []
    for at in (0, 2):
        model, wrapped, optimizer, data = start((VECTORS, {}), rank)
        for k in range(5):
            x, y = data[k]
            before = state_of(model, optimizer)
            if k == at and rank == 1:
                x = x.clone()
                x[0, 0] = torch.nan
            train(wrapped, optimizer, [(x, y)], 1)
            if k == at:
                unmoved = same_bits(before, state_of(model, optimizer))
        results.append((unmoved, optimizer.skipped_steps, state_of(model, optimizer)))
    return results


def changed(rank=None):
    """A layer is frozen for some steps, and one is added: who has an owner keeps it."""
    model, wrapped, optimizer, data = start((VECTORS, {}), rank)
    train(wrapped, optimizer, data, 3)
    before = owners(optimizer)
    model[2].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model.append(nn.Linear(model[-1].out_features, model[-1].out_features).double())
    with torch.no_grad():
        model[-1].weight.copy_(torch.eye(len(model[-1].weight)))
        model[-1].bias.zero_()
    wrapped = model if rank is None else DistributedDataParallel(model)
    train(wrapped, optimizer, data, 3)
    model[2].weight.requires_grad_(True)
    model[2].bias.requires_grad_(True)
    wrapped = model if rank is None else DistributedDataParallel(model)
    train(wrapped, optimizer, data, 3)
    kept = before.items() <= owners(optimizer).items() and len(owners(optimizer)) == len(before) + 1
    return kept, state_of(model, optimizer)


def owners(optimizer):
    return {name: group.owner for name, (group, _) in optimizer.plan.places.items()}


def in_turns(rank=None):
    """As if the layers were too large to move at once."""
    with mock.patch.object(plan, "LARGE", 60):
        return history(ON_TWO["equal-KBFGS_2020"], rank)


def saved(rank):
    """The state after five steps, whose tensors pass through a file of torch's; and three more steps."""
    model, wrapped, optimizer, data = start((VECTORS, METHODS["next_batch"]), rank)
    train(wrapped, optimizer, data, 5)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder)  # a checkpoint lies where all can read it
        save(wrapped, optimizer, folder[0])
        again, wrapped_again, other, _ = start((VECTORS, METHODS["next_batch"]), rank)
        load(wrapped_again, other, folder[0])
        distributed.barrier()
    for m, w, o in ((model, wrapped, optimizer), (again, wrapped_again, other)):
        train(w, o, data[1:], 3)
        if m is model:
            end = state_of(m, o)
    return kept, end, same_bits(end, state_of(again, other))


def resumed(rank, kept, ranks=2, owners=True):
    """Three steps from what `saved` has saved."""
    model, wrapped, optimizer, data = start((VECTORS, METHODS["next_batch"]), rank, ranks, owners=owners)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    train(wrapped, optimizer, data[1:], 3)
    return state_of(model, optimizer)


def resumed_by_two(rank, kept):
    return resumed(rank, kept, owners=False), resumed(rank, kept)


def resumed_by_four(rank, kept):
    return resumed(rank, kept, 4)


def alike_layers(layers=8, width=12):
    """Eight layers of one shape, which four ranks share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).double()


def held(optimizer):
    """Bytes of the factors in this process: of tensors that have memory, wherever in a group they are."""
    return sum(
        t.numel() * t.element_size()
        for group in optimizer.plan.layer_groups for t in group.tensors().values() if not t.is_meta
    )  # fmt: skip


def memory(rank):
    """Bytes of the factors of this rank and what the summary counts, with owners and without."""
    found = {}
    for name, options in {"action": ACTION, "KBFGS_2020": METHODS["KBFGS_2020"]}.items():
        sizes = []
        for owned in (True, False):
            model = DistributedDataParallel(alike_layers())
            optimizer = KFQN(model, owners=owned, **options)
            optimizer.warm_start([torch.ones(3, 12).double()])
            train(model, optimizer, [(torch.ones(3, 12).double(), torch.zeros(3, 12).double())], 2)
            optimizer.state_dict()
            sizes.append((held(optimizer), optimizer.plan.state_bytes(optimizer.fallback)))
        found[name] = sizes
    return found


def traffic(rank):
    """The messages of a step without an update and of one with it; and of every group its owner and what that sends."""
    found = {}
    for name in ("both", "both-diagonal", "vectors-default", "vectors-KBFGS_2020"):
        (make, data, loss_fn), options = ON_TWO[name]
        _, wrapped, optimizer, data = start(((make, data, loss_fn), {**options, "refresh": 2}), rank)
        for k in range(3):
            with messages() as own:
                train(wrapped, optimizer, [data[k]], 1, loss_fn)
            if k:
                found.setdefault(name, []).append(list(own))
        groups = optimizer.plan.layer_groups
        found[name].append([(group.owner, list(sent(group)), group.kind, group.size) for group in groups])
    return found


def refusals(rank):
    """What is said where something would lack the factors of others."""
    said = {}
    model, _, optimizer, _ = start((VECTORS, {}), rank)
    for name, call in {"pickle": pickle.dumps, "copy": copy.deepcopy}.items():
        with pytest.raises(RuntimeError) as raised:
            call((model, optimizer))
        said[name] = str(raised.value)
    others = [name for name, owner in owners(optimizer).items() if owner != rank]
    for part in ("activation", "gradient"):
        with pytest.raises(RuntimeError) as raised:
            getattr(optimizer.layers[others[0]], part)
        said[part] = str(raised.value)
    with pytest.raises(ValueError, match="owners=True") as raised:
        KFQN(tanh_network(), owners=True)
    said["unknown"] = str(raised.value)
    if torch.__version__ >= "2.7":  # torch 2.6 has no fully_shard on a CPU
        with pytest.raises(ValueError, match="owners=True") as raised:
            KFQN(fully_shard(tanh_network()), owners=True)
        said["sharded"] = str(raised.value)
    return said


def two(rank):
    extras = (uneven, empty, in_turns, spoiled, changed, saved, traffic, refusals)
    results = {name: history(case, rank) for name, case in ON_TWO.items()}
    return results | {extra.__name__: extra(rank) for extra in extras}


def four(rank):
    return {name: history(case, rank, 4) for name, case in ON_FOUR.items()} | {"memory": memory(rank)}


@pytest.fixture(scope="module")
def ranks():
    """The results of each of two ranks. A rank that fails or hangs fails every test."""
    return run(two, 2, seconds=SECONDS)


@pytest.fixture(scope="module")
def of_four():
    return run(four, 4, seconds=SECONDS)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_ranks_with_a_share_of_the_factors_are_one_process_with_all(size, name, request):
    results = request.getfixturevalue("ranks" if size == 2 else "of_four")
    for *of_ranks, alone in zip(*(rank[name] for rank in results), history(CASES[size][name]), strict=True):
        assert all(same_bits(of_ranks[0], other) for other in of_ranks[1:])
        assert_close(of_ranks[0], alone, EXACT)


@pytest.mark.parametrize("work", [uneven, empty])
def test_ranks_count_alike_whatever_they_have(work, ranks):
    first, second = (rank[work.__name__] for rank in ranks)
    assert same_bits(first, second)
    assert_close(first, work(), EXACT)


def test_layers_that_move_in_turns_are_sent_in_turns(ranks):
    for one, other, alone in zip(ranks[0]["in_turns"], ranks[1]["in_turns"], in_turns(), strict=True):
        assert same_bits(one, other)
        assert_close(one, alone, EXACT)


def test_a_nan_on_one_rank_changes_nothing_on_any(ranks):
    for first, second in zip(ranks[0]["spoiled"], ranks[1]["spoiled"], strict=True):
        for unmoved, skipped, values in (first, second):
            assert unmoved
            assert skipped == 1
            assert all(value.isfinite().all() for value in values)
        assert same_bits(first[2], second[2])


def test_a_layer_keeps_its_owner_when_the_model_changes(ranks):
    expected = changed()[1]
    for kept, values in (rank["changed"] for rank in ranks):
        assert kept
        assert_close(values, expected, EXACT)


def test_a_state_is_whole_and_loads_onto_any_number_of_ranks(ranks):
    (kept, end, from_checkpoint), (kept_by_other, *_) = (rank["saved"] for rank in ranks)
    assert from_checkpoint
    for one, other in zip(kept[1]["state"].values(), kept_by_other[1]["state"].values(), strict=True):
        assert one.keys() == other.keys()
        assert same_bits(one.values(), other.values())
    assert_close(resumed(None, kept, owners=False), end, EXACT)
    for without, again in run(resumed_by_two, 2, kept):
        assert same_bits(without, end)  # the same sums, whoever does the arithmetic
        assert same_bits(again, end)
    for values in run(resumed_by_four, 4, kept):
        assert_close(values, end, EXACT)


def test_each_of_four_ranks_keeps_a_quarter_of_the_factors(of_four):
    for rank in of_four:
        for (own, counted), (everything, counted_all) in rank["memory"].values():
            assert own == everything / 4
            assert counted_all - counted == everything - own


def test_what_is_sent_is_what_the_formula_counts(ranks):
    """Of each owner `D` or what it is made from, whichever is less, padded to the largest; with an update, `s` too."""
    for name, (between, update, layers) in ranks[0]["traffic"].items():
        step, probes, of_all = [0, 0], [0, 0], set()
        for owner, parts, kind, (L, groups, d_out, d_in) in layers:
            by_parts = (d_in if kind == "diagonal" else d_in**2) + d_out**2 * ("KBFGS" in name)
            assert (parts == ["D"]) == (d_out * d_in <= by_parts)
            step[owner] += L * groups * min(d_out * d_in, by_parts)
            probes[owner] += L * groups * d_in * (kind != "diagonal")
            of_all.add(parts[0])
        if name == "both":
            assert of_all == {"D", "H_a"}
        own = 2 * 8 * max(step)  # two ranks, float64
        if name != "vectors-KBFGS_2020":  # which sends its A in every step
            assert between == [4, own]
        assert own in update
        assert len(update) == (4 if name in ("both", "vectors-default") else 3 if "KBFGS" in name else 2)
        if len(update) == 4:  # what is asked along, before the answers
            assert update[2] == 2 * 8 * max(probes)


def test_what_would_lack_the_factors_of_others_is_refused(ranks):
    for rank, said in enumerate(result["refusals"] for result in ranks):
        for name in ("pickle", "copy"):
            assert "call state_dict() on every rank" in said[name]
        for name in ("activation", "gradient"):
            assert f"kept by rank {1 - rank} alone" in said[name]
        assert "give KFQN the wrapper" in said["unknown"]
        assert "sharded by fully_shard" in said.get("sharded", "sharded by fully_shard")


def test_one_process_owns_everything():
    model = tanh_network()
    optimizer = KFQN(model, owners=True)
    assert set(owners(optimizer).values()) == {None}
    optimizer.step(closure_for(model, optimizer, square_loss, *batches()[0]))
    copy.deepcopy((model, optimizer))


def test_shares_are_even_stable_and_keep_what_is_given():
    costs = {name: cost for name, cost in zip("abcdefg", (7, 5, 4, 4, 3, 2, 1), strict=True)}
    found = shares(costs, 2)
    loads = [sum(costs[name] for name in costs if found[name] == rank) for rank in (0, 1)]
    assert loads == [13, 13]
    assert found == shares(costs, 2)
    assert shares({"a": 1, "b": 1}, 4) == {"a": 0, "b": 1}
    assert shares(costs, 2, {"b": 0, "gone": 1})["b"] == 0


def test_the_table_says_who_sends_what():
    """Of one that believes itself the first of four."""
    model = tanh_network((4, 9, 3, 9, 4))
    with alike(4):
        table = describe(model, owners=True, **ACTION)
    assert "rank 0 sends D, " in str(table) or "rank 0 sends H_a, " in str(table)
    assert all("; rank " in row.factors for row in table.rows)
    assert sum("sends H_a" in row.factors for row in table.rows) == 2
    assert table.state_bytes < describe(model, **ACTION).state_bytes
