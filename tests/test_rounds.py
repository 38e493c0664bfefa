"""What a step says to other processes: how often, and how many bytes.

Counted in one process that believes itself one of four, whose mini-batches are all the same: a sum over ranks is four
times the value. So a step is that of one process with four times the same mini-batch.
"""

import copy

import pytest
import torch
from torch import nn

from kfqn_core import KFQN, presets
from kfqn_core.estimate.shared import SharedBatch, share
from kfqn_core.estimate.statistics import Batch, Record, Use
from kfqn_core.lab.ranks import alike
from kfqn_core.layers import view
from kfqn_core.parallel.ranks import Ranks
from tests.test_optimizer import batches, closure_for, error, snapshot, square_loss, tanh_network
from tests.test_optimizer_cnn import image_network, images

SIZE = 4
F64 = torch.float64
VECTORS = (tanh_network, batches, square_loss)
IMAGES = (lambda: image_network("grouped"), images, nn.functional.cross_entropy)


@pytest.fixture
def messages():
    """The lengths in bytes of all messages since it was cleared."""
    with alike(SIZE) as sent:
        yield sent


def numbers(optimizer, update):
    """How many a step needs, from shapes and options alone: the first estimates are over. One is the flag."""
    total, options = 1, optimizer.plan.options
    for layer in optimizer.layers.values():
        groups, d_in, d_out = layer.view.groups, layer.view.d_in, layer.view.d_out
        own = options.of(layer.view)
        running = "A" in layer.activation.tensors()
        if update or running:
            total += 1 + options.split  # how many ranks have seen the layer, and T
        if running:
            total += groups * d_in**2
        if update:
            rank = layer.activation.F.shape[-1] if hasattr(layer.activation, "F") else 0
            total += groups * d_in * (1 + rank) * (own.activation_factor != "inverse")  # abar, or the diagonal; A Q
            total += groups * d_in * hasattr(layer.activation, "inverse") * (not running)  # A s
        if options.pairs == "next_batch":
            total += 1 + 2 * groups * d_out
        if options.pairs == "second_pass" and update:
            total += 2 * (1 + 2 * groups * d_out)
    return total


def asks_again(optimizer):
    """Whether an update asks what depends on another answer, or on the move."""
    factors = [layer.activation for layer in optimizer.layers.values()]
    acts = any("F" in own or ("H_a" in own and "A" not in own) for own in (factor.tensors() for factor in factors))
    return acts or optimizer.plan.options.pairs == "second_pass"


CASES = {
    "default": (VECTORS, {}),
    "default, diagonals": (IMAGES, {}),
    "action": (IMAGES, {"activation_factor": "action"}),
    "low rank": (VECTORS, {"activation_factor": "low_rank", "rank": 2}),
    "low rank, images": (IMAGES, {"activation_factor": "low_rank", "rank": 2}),
    "diagonal": (IMAGES, {"activation_factor": "diagonal"}),
    "inverse": (VECTORS, {"activation_factor": "inverse", "activation_decay": 0.9}),
    "next_batch": (IMAGES, {"pairs": "next_batch"}),
    "KBFGS_2020": (VECTORS, presets.KBFGS_2020),
    "KBFGS_L_2020": (VECTORS, presets.KBFGS_L_2020),
    "KFQN_CNN_2021": (IMAGES, presets.KFQN_CNN_2021),
    "KFQN_2022": (IMAGES, presets.KFQN_2022),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_two_messages_of_so_many_bytes_or_one(case, messages):
    """Two where curvature is updated, one elsewhere."""
    (make, data, loss_fn), options = CASES[case]
    model, data = make(), data()
    optimizer = KFQN(model, lr=0.05, **{**options, "refresh": 3})
    for k in range(9):
        messages.clear()
        optimizer.step(closure_for(model, optimizer, loss_fn, *data[k % len(data)]))
        if k > 0:  # the first step is that of the first estimates
            assert len(messages) == (2 if k % 3 == 0 and asks_again(optimizer) else 1)
            expected = numbers(optimizer, k % 3 == 0)
            assert sum(messages) == (4 if expected == 1 else 8 * expected)  # a flag by itself is a float32


@pytest.mark.parametrize(("options", "first", "later"), [({}, 3, 2), ({"activation_factor": "inverse"}, 2, 1)])
def test_a_first_estimate_adds_one_question_and_no_other_message(options, first, later, messages):
    """Whatever it needs, A and of how many inputs it is, travels with the flag; so does the A of an exact inverse."""
    make, data, loss_fn = VECTORS
    model, sent = make(), []
    optimizer = KFQN(model, lr=0.05, refresh=1, **options)
    for batch in data()[:3]:
        messages.clear()
        optimizer.step(closure_for(model, optimizer, loss_fn, *batch))
        sent.append(len(messages))
    assert sent == [first, later, later]


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_see_the_same_are_one_process(case, messages, monkeypatch):
    (make, data, loss_fn), options = CASES[case]
    results = []
    for repeated in (1, SIZE):
        monkeypatch.setattr(Ranks, "alone", repeated > 1)
        model, own = make(), [(torch.cat([x] * repeated), torch.cat([y] * repeated)) for x, y in data()]
        optimizer = KFQN(model, lr=0.05, **{**options, "refresh": 2})
        for k in range(6):
            optimizer.step(closure_for(model, optimizer, loss_fn, *own[k % len(own)]))
        results.append(snapshot(model, optimizer))
    for one, two in zip(*(result.values() for result in results), strict=True):
        if two.any():
            assert error(one, two) < 1e-10  # six steps of float64 rounding, amplified by the condition of H


def test_a_layer_that_is_never_used_sends_nothing_but_a_question(messages):
    """Though it has no first estimate, and waits for one."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = tanh_network(), nn.Linear(30, 3).double()

        def forward(self, x):
            return self.used(x)

    model, data = Unused(), batches()
    optimizer = KFQN(model, lr=0.05, activation_factor="action", refresh=2)
    for k in range(4):
        messages.clear()
        optimizer.step(closure_for(model, optimizer, square_loss, *data[k]))
        assert messages[0] == 4 * 2 * (4 if k == 0 else 1)  # about the layers without a first estimate
        if k % 2:
            assert messages[1:] == [4]


def test_factors_of_two_dtypes_send_two_messages_each_in_its_own(messages):
    sums = Ranks().sums([torch.ones(3), torch.ones(2, 2, dtype=F64), torch.full((), 2.0)])
    assert messages == [4 * 4, 8 * 4]
    assert [s.dtype for s in sums] == [torch.float32, F64, torch.float32]
    assert [s.shape for s in sums] == [(3,), (2, 2), ()]
    assert torch.equal(sums[2], torch.tensor(8.0))


def shared_batch(ranks, seen=(True, True), groups=2):
    """Two convolutions of two groups, of which a rank may not have seen one."""
    layers = [nn.Conv2d(4, 6, 2, groups=groups).double() for _ in seen]
    generator = torch.Generator().manual_seed(0)
    records = [
        Record(view(layer), [Use(torch.randn(3, 4, 4, 4, generator=generator, dtype=F64), 9)]) if known else None
        for layer, known in zip(layers, seen, strict=True)
    ]
    here = Batch([view(layer) for layer in layers], records, torch.empty(0, dtype=F64))
    return here, SharedBatch(here, ranks)


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_wanted_travels_together_and_is_the_same_as_what_is_not(wanted, messages):
    here, batch = shared_batch(Ranks(), seen=(True, False))
    names = ("mean_input", "diagonal", "second_moment", "vectors", "locations")
    v = torch.randn_like(here.mean_input())
    if wanted:
        batch.want(*names, along=v)
        share(Ranks(), [batch])
        assert len(messages) == 1
        messages.clear()
    for name in names[:3]:
        assert error(getattr(batch, name)(), getattr(here, name)()) < 1e-15
    assert batch.vectors().tolist() == [4 * 27, 4 * 27, 0, 0]
    assert batch.locations() == [9, 1]
    assert batch.present.tolist() == [1, 1, 0, 0]
    assert error(batch.activation_action(v), here.activation_action(v)) < 1e-15
    assert len(messages) == (0 if wanted else 6)
    assert error(batch.activation_action(2 * v), 2 * here.activation_action(v)) < 1e-15  # others are asked for anew
    assert len(messages) == (1 if wanted else 7)


def test_a_flag_travels_with_what_is_wanted(messages):
    _, batch = shared_batch(Ranks())
    batch.want("mean_input")
    assert share(Ranks(), [batch], torch.tensor(True))
    assert len(messages) == 1
    assert not share(Ranks(), [], torch.tensor(False))
    assert messages[1] == 4


def test_an_optimizer_that_shares_can_be_copied_between_steps(messages):
    model, data = tanh_network(), batches()
    optimizer = KFQN(model, lr=0.05, pairs="next_batch")
    optimizer.step(closure_for(model, optimizer, square_loss, *data[0]))
    twin, again = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, again)):
        o.step(closure_for(m, o, square_loss, *data[1]))
    for one, two in zip(snapshot(model, optimizer).values(), snapshot(twin, again).values(), strict=True):
        assert torch.equal(one, two)


def test_a_step_is_taken_on_all_ranks_or_on_none():
    model, data = tanh_network(), batches()
    optimizer = KFQN(model, lr=0.05, activation_factor="action", refresh=1)
    with alike(SIZE):
        for k in range(2):
            optimizer.step(closure_for(model, optimizer, square_loss, *data[k]))
    before = snapshot(model, optimizer)
    with alike(SIZE, refusing=1):
        optimizer.step(closure_for(model, optimizer, square_loss, *data[2]))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(before[key], value) for key, value in snapshot(model, optimizer).items())
