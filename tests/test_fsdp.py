"""Processes that hold the rows of every matrix in parts, by `fully_shard`, take the steps of one process with all.

Real processes over gloo on the CPU, each with its part of every mini-batch. No number of outputs here is a multiple of
the number of ranks: parts are of different size, and of four ranks one often has none. All cases run in one pair of
processes and some in a group of four, because starting a process costs seconds; the results are compared here.
"""

from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from kfqn_core import KFQN, describe, presets
from kfqn_core.lab.ranks import messages, run
from kfqn_core.parallel.shards import local, whole
from tests.measures import assert_close, same_bits
from tests.test_ddp import parts_of_batches
from tests.test_faults import load, save
from tests.test_optimizer import METHODS, batches, closure_for, square_loss, tanh_network, train
from tests.test_optimizer_cnn import image_network, images

STEPS, LONG = 6, 20
SECONDS = 240  # for all cases of a group, which take about twenty
EXACT = 1e-10  # twenty steps of float64 rounding, amplified by the conditioning of H
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 has no fully_shard on a CPU; 2.13.0 is tried"),
]


class Orders(nn.Module):
    """Weights that are stored in another order than by outputs, and parameters without factors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.attention = nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)
        self.up = nn.ConvTranspose1d(6, 10, 2, groups=2)
        self.norm = nn.GroupNorm(2, 10)
        self.double()

    def forward(self, x):
        return self.norm(self.up(self.attention(self.embedding(x)).mT).tanh()).sum(2)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(7, (16, 5), generator=generator), torch.randint(10, (16,), generator=generator))
        for _ in range(5)
    ]  # fmt: skip


VECTORS = (tanh_network, batches, square_loss)
IMAGES = (lambda: image_network("grouped"), images, nn.functional.cross_entropy)
ORDERS = (Orders, tokens, nn.functional.cross_entropy)
COUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": False}
SAFE = {**presets.KBFGS_2020, "safeguard": True}
ON_TWO = {
    **{f"vectors-{name}": (VECTORS, options) for name, options in METHODS.items()},
    **{f"images-{name}": (IMAGES, METHODS[name]) for name in ("default", "KFQN_2022", "next_batch")},
    "orders-default": (ORDERS, {}),
    "orders-action": (ORDERS, {"activation_factor": "action", "weight_decay": 0.1}),
    "orders-coupled": (ORDERS, COUPLED),
    "orders-raw": (ORDERS, {"step_length": "raw", **COUPLED}),
    "orders-safeguard": (ORDERS, {**SAFE, "refresh": 2}),
}
ON_FOUR = {
    **{f"vectors-{name}": (VECTORS, METHODS[name]) for name in ("default", "KBFGS_2020", "next_batch", "low_rank")},
    "images-default": (IMAGES, {}),
    "orders-coupled": (ORDERS, COUPLED),
}
CASES = {2: ON_TWO, 4: ON_FOUR}


def shard(model, **policy):
    """Every child by itself, and what is left of the model."""
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, **policy)
    return fully_shard(model, **policy)


def start(case=(VECTORS, {}), rank=None, ranks=2):
    """Model and optimizer of one rank, or those of a single process; its part of the mini-batches; the loss."""
    (make, data, loss_fn), options = case
    torch.manual_seed(0)
    model, data = make(), [(x[: len(x) // 4 * 4], y[: len(x) // 4 * 4]) for x, y in data()]
    if rank is not None:
        shard(model)
        data = [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in data]
    return model, KFQN(model, lr=0.05, **options), data, loss_fn


def snapshot(model, optimizer):
    """Everything that lives from one step to the next, as a whole; every rank has to ask."""
    params = [whole(p.detach()).clone() for p in model.parameters()]
    layers = [t.detach().clone() for layer in optimizer.layers.values() for t in layer.tensors().values()]
    rest = [whole(t).clone() for params in optimizer.plan.rest for p in params for t in optimizer.state[p].values()]
    return params + layers + rest


def history(case, rank=None, ranks=2):
    """The state after some steps, the last of twenty among them: looking at parts costs messages."""
    model, optimizer, data, loss_fn = start(case, rank, ranks)
    if "pairs" in case[1]:
        optimizer.warm_start(x for x, _ in data)
    steps = []
    for k in range(LONG):
        train(model, optimizer, [data[k % len(data)]], 1, loss_fn)
        if k in (0, 1, 9, LONG - 1):
            steps.append(snapshot(model, optimizer))
    return steps


def accumulated(rank=None, *, each=True):
    """Three micro-batches for a step, whose gradients are averaged over ranks after each or after the last alone."""
    model, optimizer, data, _ = start((VECTORS, {"activation_factor": "action"}), rank)
    for k in range(LONG):
        optimizer.zero_grad()
        for part in range(3):
            if rank is not None:
                model.set_requires_gradient_sync(each or part == 2)
            x, y = data[(3 * k + part) % len(data)]
            (square_loss(model(x), y) / 3).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def accumulated_once(rank):
    return accumulated(rank, each=False)


def empty(rank=None):
    """Rank 1 has no samples in every third step: half the gradient is left, and the statistics are those of rank 0."""
    model, optimizer, _, _ = start((VECTORS, {"activation_factor": "action"}), rank)
    for x, y, scale in parts_of_batches(rank):
        optimizer.zero_grad()
        (scale * 0.5 * ((model(x) - y) ** 2).sum() / max(1, len(y))).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def kept(rank):
    """How many input vectors are kept of four micro-batches of eight, if two are enough where memory is short."""
    model, optimizer, data, _ = start(rank=rank)
    with mock.patch("kfqn_core.estimate.hooks.FEW", 2):
        for part, (x, y) in enumerate(data[:4]):
            model.set_requires_gradient_sync(part == 3)
            square_loss(model(x), y).backward()
    return sum(len(use.x) for use in optimizer.plan.hooks.pop()["0"].uses if use.x is not None)


def changing(rank=None):
    """Frozen in part, in groups with rates of their own, with gradients that are cleared."""
    model, _, data, loss_fn = start(ORDERS_BY_ACTION, rank)
    small = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    groups += [{"params": small[:4], "lr": 0.01}, {"params": small[4:], "curvature": False, "lr": 0.003}]
    optimizer = KFQN(model, lr=0.05, params=groups, activation_factor="action", refresh=3)
    for k in range(LONG):
        if k in (5, 9):
            model.attention.requires_grad_(k == 9)
            train(model, optimizer, [data[k % len(data)]], 1, loss_fn)
        for x, y in (data[1], data[k % len(data)]):
            model.zero_grad(set_to_none=k % 2 == 0)
            loss_fn(model(x), y).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def looked_at(rank=None):
    """A forward without a backward, before the optimizer is made and before every step, leaves whole weights behind."""
    model, data = tanh_network(), batches()
    if rank is not None:
        fully_shard(model)
        data = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in data]
    model(data[0][0])
    optimizer = KFQN(model, lr=0.05, activation_factor="action")
    plan = optimizer.plan
    for k in range(STEPS):
        closure_for(model, optimizer, square_loss, *data[k % len(data)])()
        with torch.no_grad():
            model(data[0][0])
        optimizer.step()
    assert optimizer.plan is plan
    return snapshot(model, optimizer)


ORDERS_BY_ACTION = (ORDERS, {"activation_factor": "action"})


def spoiled(rank):
    """A NaN among the inputs of rank 1, or a loss that is infinite there alone: what it changes, what comes after."""
    results = []
    for options in ({}, {"pairs": "next_batch"}):
        model, optimizer, data, loss_fn = start((VECTORS, options), rank)
        for k in range(STEPS):
            x, y = (t.clone() for t in data[k % len(data)])
            before = snapshot(model, optimizer)
            x[0, 0] = torch.nan if k == 2 and rank == 1 else x[0, 0]
            closure = closure_for(model, optimizer, loss_fn, x, y)
            optimizer.step(lambda k=k, closure=closure: closure() + (torch.inf if k == 4 and rank == 1 else 0.0))
            if k in (2, 4):
                results.append(same_bits(before, snapshot(model, optimizer)))
        results += [optimizer.skipped_steps == 2, all(t.isfinite().all() for t in snapshot(model, optimizer))]
    return results


def scaled(rank=None, **options):
    """With losses scaled by a power of two: as without."""
    model, optimizer, data, _ = start((VECTORS, options), rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for k in range(STEPS):
        x, y = data[k % len(data)]
        optimizer.zero_grad()
        loss = square_loss(model(x), y)
        if rank is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return snapshot(model, optimizer)


def scaled_pairs(rank=None):
    return scaled(rank, pairs="next_batch")


def half(rank):
    """Forward and backward in bfloat16: parts and momenta stay in float32."""
    model = shard(tanh_network(dtype=torch.float32), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = KFQN(model, lr=0.02)
    data = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(dtype=torch.float32)]
    losses = train(model, optimizer, data, 40)
    assert {t.dtype for t in snapshot(model, optimizer)} == {torch.float32}
    return sum(losses[:5]), sum(losses[-5:]), snapshot(model, optimizer)


def traffic(rank):
    """The messages of a step, backward not included, in bytes; and what the optimizer holds, by its own account."""
    model, _, data, loss_fn = start((VECTORS, {}), rank)
    optimizer, sent = KFQN(model, lr=0.05, refresh=2, activation_factor="action"), []
    for k in range(4):
        closure_for(model, optimizer, loss_fn, *data[k])()
        with messages() as own:
            optimizer.step()
        sent.append(list(own))
    held = sum(local(t).numel() for state in optimizer.state.values() for key, t in state.items() if key == "M")
    numbers = optimizer.plan.state_bytes(optimizer.fallback)
    by_key = [local(t) for state in optimizer.state.values() for t in state.values()]
    counted = sum(t.numel() * t.element_size() for t in by_key)
    table = describe(model, activation_factor="action")
    return sent, held, (numbers, counted, table.state_bytes), table.adam_bytes, str(optimizer)


def saved(rank, folder):
    """A run that is saved in the middle, and those that go on from its `state_dict`, in shards and put together."""
    model, optimizer, data, loss_fn = start(ORDERS_BY_ACTION, rank)
    train(model, optimizer, data, STEPS, loss_fn)
    save(model, optimizer, f"{folder}/checkpoint")
    torch.save((model.state_dict(), optimizer.state_dict()), f"{folder}/{rank}.pt")
    kept = snapshot(model, optimizer)
    train(model, optimizer, data, STEPS, loss_fn)
    end = snapshot(model, optimizer)

    twin, other, _, _ = start(ORDERS_BY_ACTION, rank)
    state, of_optimizer = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    twin.load_state_dict(state)
    other.load_state_dict(of_optimizer)
    loaded = snapshot(twin, other)
    of_optimizer["state"] = {i: {key: whole(t) for key, t in of.items()} for i, of in of_optimizer["state"].items()}
    other = KFQN(twin, lr=0.05, **ORDERS_BY_ACTION[1])
    other.load_state_dict(of_optimizer)
    assert same_bits(loaded, snapshot(twin, other))
    train(twin, other, data, STEPS, loss_fn)
    return kept, end, loaded, snapshot(twin, other), resumed(folder, rank)


def resumed(folder, rank=None, ranks=2):
    """What is read of the checkpoint, and where the run ends."""
    model, optimizer, data, loss_fn = start(ORDERS_BY_ACTION, rank, ranks)
    load(model, optimizer, f"{folder}/checkpoint")
    kept = snapshot(model, optimizer)
    train(model, optimizer, data, STEPS, loss_fn)
    return kept, snapshot(model, optimizer)


def refusal(kind, call):
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def refusals(rank):
    """What is said of parameters that are spread in another way, or at another time."""
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    said = {
        "tensor parallel": parallelize_module(tanh_network(), mesh, {"0": ColwiseParallel()}),
        "replicas": fully_shard(tanh_network(), mesh=square),
        "columns": fully_shard(tanh_network((6, 8, 4)), shard_placement_fn=lambda p: Shard(p.dim() - 1)),
        "flat": FullyShardedDataParallel(tanh_network(), device_id=torch.device("cpu"), use_orig_params=True),
    }
    by_hand = tanh_network()
    by_hand[2].weight = nn.Parameter(distribute_tensor(by_hand[2].weight.detach(), mesh, [Shard(0)]))
    in_part, in_rows = tanh_network(), shard(tanh_network())
    said["by hand"], said["in part"] = by_hand, fully_shard(in_part, ignored_params={in_part[0].bias})
    said = {name: refusal(TypeError, lambda model=model: KFQN(model)) for name, model in said.items()}
    with mock.patch.object(DeviceMesh, "device_type", "cuda"):  # where the parameters themselves lie on the CPU
        said["offloaded"] = refusal(TypeError, lambda: KFQN(in_rows))

    alone = distributed.new_group([rank], use_local_synchronization=True)
    said["group"] = refusal(ValueError, lambda: KFQN(shard(tanh_network()), process_group=alone))
    KFQN(shard(tanh_network()), process_group=distributed.group.WORLD)  # which it is

    model, data = tanh_network(), batches()
    optimizer = KFQN(model, lr=0.05)
    shard(model)
    closure = closure_for(model, optimizer, square_loss, *data[0])
    said["later"] = refusal(TypeError, lambda: optimizer.step(closure))
    said["later, warm"] = refusal(TypeError, lambda: optimizer.warm_start([data[0][0]]))

    model, optimizer, data, loss_fn = start((VECTORS, {"pairs": "next_batch"}), rank)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_fn(model(data[0][0]), data[0][1])).backward()
    scaler.unscale_(optimizer)
    before = snapshot(model, optimizer)
    said["unscaled"] = refusal(RuntimeError, lambda: scaler.step(optimizer))
    assert same_bits(before, snapshot(model, optimizer))
    return said


EXTRAS = (
    accumulated,
    accumulated_once,
    empty,
    kept,
    changing,
    looked_at,
    spoiled,
    scaled,
    scaled_pairs,
    half,
    traffic,
    refusals,
)


def two(rank, folder):
    results = {name: history(case, rank) for name, case in ON_TWO.items()}
    return results | {extra.__name__: extra(rank) for extra in EXTRAS} | {"saved": saved(rank, folder)}


def four(rank, folder):
    results = {name: history(case, rank, 4) for name, case in ON_FOUR.items()}
    _, of_optimizer = torch.load(f"{folder}/{rank % 2}.pt", weights_only=True)
    _, optimizer, _, _ = start(ORDERS_BY_ACTION, rank, 4)
    said = refusal(ValueError, lambda: optimizer.load_state_dict(of_optimizer))
    return results | {"resumed": resumed(folder, rank, 4), "other shards": said}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def ranks(folder):
    """The results of each of two ranks. A rank that fails or hangs fails every test."""
    return run(two, 2, folder, seconds=SECONDS)


@pytest.fixture(scope="module")
def of_four(ranks, folder):
    return run(four, 4, folder, seconds=SECONDS)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_ranks_with_parts_of_matrices_and_of_batches_are_one_with_the_whole(size, name, request):
    results = request.getfixturevalue("ranks" if size == 2 else "of_four")
    for first, *others, right in zip(*(rank[name] for rank in results), history(CASES[size][name]), strict=True):
        assert all(same_bits(first, other) for other in others)
        assert_close(first, right, EXACT)


PROGRAMS = {
    "accumulated": accumulated,
    "accumulated_once": accumulated,
    "empty": empty,
    "changing": changing,
    "looked_at": looked_at,
    "scaled": scaled,
    "scaled_pairs": scaled_pairs,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_users_take_the_steps_of_one_process(name, ranks):
    assert same_bits(ranks[0][name], ranks[1][name])
    assert_close(ranks[0][name], PROGRAMS[name](), EXACT)


def test_inputs_of_micro_batches_make_room_for_the_next(ranks):
    assert all(8 < rank["kept"] <= 8 + 2 for rank in ranks)  # all of the last, and two of those before


def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(ranks):
    for rank in ranks:
        assert len(rank["spoiled"]) == 8
        assert all(rank["spoiled"])


def test_in_half_precision_ranks_stay_the_same_and_learn(ranks):
    (first, last, state), (_, _, other) = (rank["half"] for rank in ranks)
    assert last < 0.7 * first
    assert same_bits(state, other)


def test_a_step_sends_no_more_than_its_momentum_and_small_messages(ranks):
    """In float64: a length for each layer, momenta, and what is sent where parameters are whole."""
    shapes = [(layer.out_features, layer.in_features) for layer in tanh_network() if isinstance(layer, nn.Linear)]
    lengths, ins = 8 * len(shapes), sum(d_in + 1 for _, d_in in shapes)
    momenta = 8 * sum(2 * -(-d_out // 2) * (d_in + 1) for d_out, d_in in shapes)  # of two equal parts, filled up
    for sent, *_ in (rank["traffic"] for rank in ranks):
        assert sorted(sent[1]) == sorted(sent[3]) == sorted([4, lengths, momenta])
        assert sorted(sent[2]) == sorted([8 * (1 + len(shapes) + ins), lengths, momenta, 8 * ins])


def test_a_rank_holds_its_part_of_the_momentum_and_says_so(ranks):
    of_ranks = [rank["traffic"] for rank in ranks]
    assert sum(held for _, held, *_ in of_ranks) == sum(p.numel() for p in tanh_network().parameters())
    for _, held, (of_summary, counted, described), of_adam, printed in of_ranks:
        assert of_summary == counted == described
        assert f"state {described / of_adam:.2f} of Adam's" in printed
        assert of_adam == 2 * 8 * held + 4 * 6  # two moments of every number, and a counter for each of six parameters


def test_shards_are_loaded_by_as_many_ranks_to_the_bit(ranks):
    for kept, end, loaded, end_of_loaded, (read, end_of_read) in (rank["saved"] for rank in ranks):
        assert not same_bits(kept, end)
        assert same_bits(kept, loaded)
        assert same_bits(kept, read)
        assert same_bits(end, end_of_loaded)
        assert same_bits(end, end_of_read)


def test_a_checkpoint_of_two_ranks_goes_on_with_four_and_with_one(ranks, of_four, folder):
    """What is read is the same bits; what follows differs by the order in which sums are rounded."""
    kept, end, *_ = ranks[0]["saved"]
    for read, further in (*(rank["resumed"] for rank in of_four), resumed(folder)):
        assert same_bits(kept, read)
        assert_close(further, end, EXACT)


def test_shards_of_two_ranks_are_no_shards_of_four(of_four):
    for rank in of_four:
        assert "saved in shards is read through torch.distributed.checkpoint" in rank["other shards"]


def test_what_is_spread_in_another_way_is_refused_with_a_sentence(ranks):
    for said in (rank["refusals"] for rank in ranks):
        for name in ("tensor parallel", "replicas", "columns", "by hand"):
            assert "sharded over processes (" in said[name]
        for name in ("tensor parallel", "replicas", "columns", "by hand", "offloaded", "flat", "in part"):
            assert "sharded over processes" in said[name]
            assert "as fully_shard spreads them over a mesh of one dimension" in said[name]
        assert "process_group is not the group of the mesh" in said["group"]
        for name in ("later", "later, warm"):
            assert "call fully_shard first and make KFQN then" in said[name]
        assert "GradScaler.unscale_" in said["unscaled"]
