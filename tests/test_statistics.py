"""Statistics of what was seen, against their definitions from patches, in float64."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfqn_core.estimate.statistics import Batch, Record, Use, thin
from kfqn_core.lab.checks import relative_error
from kfqn_core.layers import view

F64 = torch.float64
LIKE = torch.empty(0, dtype=F64)
LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "no bias": lambda: nn.Linear(5, 3, bias=False),
    "conv": lambda: nn.Conv2d(2, 3, 2),
    "groups": lambda: nn.Conv2d(4, 6, 2, groups=2),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def use(layer, samples, seed, size=4, **known):
    """A use of that many samples with everything known; `size` is of the images."""
    v = view(layer)
    shape = (samples, layer.in_features) if isinstance(layer, nn.Linear) else (samples, layer.in_channels, size, size)
    x = drawn(*shape, seed=seed)
    h_sum, g_sum = (drawn(v.groups, v.d_out, seed=seed + k) for k in (1, 2))
    return Use(x, v.locations(x), h_sum=h_sum, g_sum=g_sum, **known)


def record_of(layer, *uses):
    return Record(view(layer), list(uses))


def expected(record):
    """From all patches: abar, A, its diagonal; from the sums: hbar and gbar."""
    patches = [record.view.patches(use.x) for use in record.uses]
    N = sum(len(a) for a in patches)
    A = sum(torch.einsum("nuti,nutj->uij", a, a) for a in patches) / N
    locations = sum(a.shape[0] * a.shape[2] for a in patches)
    return {
        "mean_input": sum(a.sum((0, 2)) for a in patches) / locations,
        "second_moment": A,
        "diagonal": A.diagonal(dim1=-2, dim2=-1),
        "mean_output": sum(use.h_sum for use in record.uses) / locations,
        "mean_gradient": sum(use.g_sum for use in record.uses) / (locations / N),
    }


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("samples", [(6,), (6, 1, 3)])
def test_statistics_of_several_uses_are_those_of_all_their_samples(kind, samples):
    """Also where images of different size make a different number of locations; a mean over samples of sums."""
    layer = LAYERS[kind]().double()
    record = record_of(layer, *(use(layer, n, 10 * i, size=4 + i) for i, n in enumerate(samples)))
    found = expected(record)
    for name, value in found.items():
        assert relative_error(getattr(record, name)(), value) < 1e-14
    for shape in ((), (3,)):
        v = drawn(record.view.groups, record.view.d_in, *shape, seed=5)
        action = torch.einsum("uij,uj...->ui...", found["second_moment"], v)
        assert relative_error(record.activation_action(v), action) < 1e-13
    assert record.samples == sum(samples)


def test_gradients_are_divided_by_the_scale_of_the_loss_and_nothing_else_is():
    layer = LAYERS["groups"]().double()
    record, scaled = (record_of(layer, use(layer, 5, 0)) for _ in range(2))
    scaled.scale = torch.tensor(1024.0, dtype=F64)  # a power of two divides without rounding
    assert torch.equal(1024 * scaled.mean_gradient(), record.mean_gradient())
    for name in ("mean_input", "second_moment", "diagonal", "mean_output"):
        assert torch.equal(getattr(scaled, name)(), getattr(record, name)())


def test_since_keeps_the_uses_from_a_number_on_with_the_scale():
    layer = LAYERS["linear"]().double()
    uses = [use(layer, 4, i, serial=i) for i in range(3)]
    record = record_of(layer, *uses)
    record.scale = 4.0
    assert record.since(1).uses == uses[1:]
    assert record.since(1).scale == 4.0
    assert record.since(0).uses == record.uses
    assert not record.since(3).uses
    assert len(record.uses) == 3  # as it was


@pytest.mark.parametrize(
    ("uses", "alike"),
    [
        ([(4, 3), (2, 1)], True),
        ([(4, 3)], False),
        ([(2, 1), (4, 3)], False),  # in another order
        ([(4, 2), (2, 1)], False),
        ([(5, 3), (2, 1)], False),
        ([], False),
    ],
)
def test_uses_are_alike_if_samples_and_locations_are(uses, alike):
    v = view(nn.Linear(2, 2))
    one, other = (Record(v, [Use(None, T, samples=N) for N, T in of]) for of in ([(4, 3), (2, 1)], uses))
    assert one.uses_alike(other) is other.uses_alike(one) is alike


@pytest.mark.parametrize("vectors", [1000, 40, 13, 5, 1])
@pytest.mark.parametrize("samples", [(20,), (7, 5, 8), (1, 1, 1, 17)])
def test_thinned_uses_hold_every_kth_of_all_samples(samples, vectors):
    """Over all uses, as if they were one, k an odd prime; the statistics are those of the samples that were kept."""
    layer = nn.Conv1d(2, 3, 2).double()  # three locations
    view_ = view(layer)
    xs = drawn(sum(samples), 2, 4).split(list(samples))
    record = record_of(layer, *(Use(x, 3) for x in xs))
    least = -(-3 * sum(samples) // vectors)
    every = least if least == 1 else next(k for k in (3, 5, 7, 11, 13, 17, 19, 23, 61) if k >= least)
    kept = torch.cat(xs)[::every]
    before = [use.x for use in record.uses]
    thin(record.uses, vectors=vectors)
    assert torch.equal(torch.cat([use.x for use in record.uses if use.x is not None]), kept)
    assert record.samples == sum(samples)
    assert 3 * len(kept) < vectors + 3  # samples are kept whole
    if every == 1:
        assert all(now.x is then for now, then in zip(record.uses, before, strict=True))
    else:  # copies: what was dropped can be freed
        storages = {x.untyped_storage().data_ptr() for x in before if x.numel()}
        assert all(use.x is None or use.x.untyped_storage().data_ptr() not in storages for use in record.uses)
    a = view_.patches(kept)
    assert relative_error(record.second_moment(), torch.einsum("nuti,nutj->uij", a, a) / len(a)) < 1e-13
    assert relative_error(record.mean_input(), a.mean((0, 2))) < 1e-13


def test_a_use_that_was_thinned_weighs_as_much_as_before():
    """Beside one that was not: as if every sample that is left had been seen several times."""
    layer = LAYERS["conv"]().double()
    long, short = use(layer, 12, 0), use(layer, 5, 1)
    thin([long], vectors=3 * long.T)
    assert long.each == 5  # every fourth would be enough
    repeated = Use(long.x.repeat_interleave(5, 0), long.T)
    record, as_if = record_of(layer, long, short), record_of(layer, repeated, short)
    for name in ("mean_input", "second_moment", "diagonal"):
        assert relative_error(getattr(record, name)(), getattr(as_if, name)()) < 1e-14


def test_thinning_twice_keeps_the_weight_of_every_sample():
    layer = nn.Linear(3, 2).double()
    uses = [Use(drawn(24, 3), 1), Use(drawn(12, 3, seed=1), 1)]
    every_third = torch.cat([use.x for use in uses])[::3]
    thin(uses, vectors=18)
    assert torch.equal(torch.cat([use.x for use in uses]), every_third)
    thin(uses, vectors=3)
    assert torch.equal(torch.cat([use.x for use in uses if use.x is not None]), every_third[::5])
    assert {use.each for use in uses} == {15}
    assert record_of(layer, *uses).samples == 36


@pytest.mark.parametrize("T", [2, 4, 6, 8, 9, 12, 49, 64, 100, 197, 1024])
def test_thinned_positions_of_sequences_are_all_there(T):
    """Rows `[N T, d]`, of which the d-th of all positions must not be forgotten by a k that divides T."""
    use = Use(torch.arange(T).repeat(4096 // T * 16)[:, None].double(), 1)
    rows = len(use.x)
    thin([use], vectors=4096)
    counts = use.x.long().flatten().bincount(minlength=T)
    assert counts.min() >= 0.9 * rows / T / use.each - 1
    assert len(use.x) <= 4096


def test_what_was_written_over_is_not_thinned_but_forgotten():
    """A copy could not be told from what the layer has seen."""
    whole, spoilt, of_some_past = (torch.ones(40, 3) for _ in range(3))
    of_some_past.add_(1)  # before the layer has seen it
    uses = [Use(x, T=1, version=x._version) for x in (whole, spoilt, of_some_past)]
    spoilt.mul_(7)
    thin(uses, vectors=20)
    for use in uses:
        use.check()
    assert [use.x is not None for use in uses] == [True, False, True]
    assert sum(use.known for use in uses) == pytest.approx(80, abs=3)


def test_what_is_not_known_is_asked_for_by_name():
    layer = LAYERS["linear"]().double()
    blind = record_of(layer, Use(None, 1, samples=3))
    assert (blind.has_inputs, blind.has_outputs) == (False, False)
    for name in ("mean_input", "second_moment", "diagonal"):
        with pytest.raises(ValueError, match="inputs of this layer are not known"):
            getattr(blind, name)()
    for name in ("mean_output", "mean_gradient"):
        with pytest.raises(ValueError, match="no output or no gradient"):
            getattr(blind, name)()
    # One use whose input was lost: the others speak for it.
    known = use(layer, 4, 0)
    partly = record_of(layer, known, Use(None, 1, samples=3))
    assert (partly.has_inputs, partly.has_outputs) == (True, False)
    assert relative_error(partly.mean_input(), record_of(layer, known).mean_input()) < 1e-15


BATCHES = {
    "inputs alike": [(6,), (6,), (6,)],  # fully connected layers are then taken side by side
    "of different size": [(6,), (4,), (5,)],
    "used twice": [(6,), (3, 3), (6,)],
    "not seen": [(6,), (), (6,)],
    "one layer": [(6,)],
}
STATISTICS = ("mean_input", "second_moment", "diagonal", "mean_output", "mean_gradient")


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_layers_has_the_statistics_of_each(kind, samples):
    layers = [LAYERS[kind]().double() for _ in samples]
    records = [
        record_of(layer, *(use(layer, n, 10 * i + j) for j, n in enumerate(of)))
        for i, (layer, of) in enumerate(zip(layers, samples, strict=True))
    ]
    views = [view(layer) for layer in layers]
    u, d_in = views[0].groups, views[0].d_in
    for outputs in (False, True):
        batch = Batch(views, [r if r.uses else None for r in records], LIKE, outputs=outputs)
        assert batch.seen == [bool(of) for of in samples]
        v = drawn(len(layers) * u, d_in, seed=3)
        for statistic in STATISTICS[3:] if outputs else STATISTICS[:3]:
            together = getattr(batch, statistic)()
            for i, record in enumerate(records):
                alone = getattr(record, statistic)() if record.uses else torch.zeros_like(together[:u])
                assert relative_error(together[i * u : (i + 1) * u], alone) < 1e-13  # sums in another order
    batch = Batch(views, [r if r.uses else None for r in records], LIKE)
    for vectors in (v, torch.stack([v, -2 * v, v.square()], -1)):
        together = batch.activation_action(vectors)
        for i, record in enumerate(records):
            rows = slice(i * u, (i + 1) * u)
            alone = record.activation_action(vectors[rows]) if record.uses else torch.zeros_like(vectors[rows])
            assert relative_error(together[rows], alone) < 1e-13
    if all(samples):
        assert batch.present is None
    else:
        assert batch.present.tolist() == [float(bool(of)) for of in samples for _ in range(u)]


def test_a_batch_says_where_layers_act():
    layer = LAYERS["conv"]().double()
    records = [record_of(layer, use(layer, 3, 0)), None, record_of(layer, use(layer, 2, 0), use(layer, 4, 1, size=5))]
    assert Batch([view(layer)] * 3, records, LIKE).locations() == [9, 1, (2 * 9 + 4 * 16) / 6]


@pytest.mark.parametrize("missing", ["g_sum", "h_sum"])
def test_a_layer_counts_as_seen_if_what_is_asked_for_is_known(missing):
    layer = LAYERS["linear"]().double()
    partly, blind = record_of(layer, use(layer, 3, 0)), record_of(layer, use(layer, 3, 0))
    setattr(partly.uses[0], missing, None)
    blind.uses[0].x = None
    views, records = [view(layer)] * 2, [partly, blind]
    assert Batch(views, records, LIKE).seen == [True, False]
    assert Batch(views, records, LIKE, outputs=True).seen == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_the_dtype_of_the_factors(dtype):
    """Whether layers are taken side by side or one by one; float32 is exact for products of 8 or 11 bits."""
    layers = [nn.Linear(5, 3).to(dtype) for _ in range(2)]
    inputs = [drawn(300, 5, seed=i).to(dtype) for i in range(2)]
    views, like = [view(layer) for layer in layers], torch.empty(0)
    for records in ([[Use(inputs[0], 1)], [Use(inputs[1], 1)]], [[Use(x, 1)] for x in (inputs[0], inputs[1][:299])]):
        batch = Batch(views, [Record(v, uses) for v, uses in zip(views, records, strict=True)], like)
        for i, (v, uses) in enumerate(zip(views, records, strict=True)):
            exact = expected(Record(v, [Use(uses[0].x.double(), 1, h_sum=LIKE, g_sum=LIKE)]))
            for name in STATISTICS[:3]:
                found = getattr(batch, name)()
                assert found.dtype == torch.float32
                assert relative_error(found[i], exact[name][0]) < 1e-5  # three hundred float32 roundings


def test_no_tensor_is_read_on_the_host():
    layer = nn.Linear(5, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # holds shapes and no values: reading one raises
        for seen in ((True, True), (True, False)):
            records = [Record(view(layer), [Use(torch.randn(6, 5), 1)]) if known else None for known in seen]
            batch = Batch([view(layer)] * 2, records, torch.empty(0))
            assert batch.activation_action(batch.mean_input()).shape == (2, 6)
            assert batch.present is None or batch.present.shape == (2,)


def test_vectors_counts_the_inputs_that_are_known():
    layer = LAYERS["conv"]().double()
    known = [use(layer, 3, 0), use(layer, 2, 1, size=5)]
    T = [view(layer).locations(of.x) for of in known]
    record = record_of(layer, known[0], Use(None, 7, samples=4), known[1])
    assert record.vectors() == 3 * T[0] + 2 * T[1]
