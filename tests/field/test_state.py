"""State that is saved, loaded, copied and moved; hooks that go with their optimizer."""

import copy
import gc
import io
import pickle
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kfqn_core import KFQN, describe, presets
from tests.field.programs import difference, error, heard, mlp, newer_torch, randn, silence, still, train, values

x = randn(16, 5)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten(),
        nn.Linear(9, 3, bias=False), nn.PReLU(),
    )  # fmt: skip


def attention(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 8), nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0), nn.Flatten()
    )


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


METHODS = {
    "default": {},
    "next_batch": {"pairs": "next_batch", "memory": 3},
    "low rank": {"activation_factor": "low_rank", "rank": 1},
    "inverse": {"activation_factor": "inverse", "activation_decay": 0.9},
    "2020": {**presets.KBFGS_2020, "pairs": "next_batch"},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [network, attention])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_the_state_goes_round_through_distributed_checkpoint(options, make, strict, flat):
    model = make()
    with heard():
        optimizer = KFQN(model, lr=0.01, **options)
    loss = lambda net: (net(x) - 1).square().mean()  # noqa: E731
    with silence():
        train(optimizer, lambda: loss(model), 3)
        optimizer.zero_grad()
    kinds = dcp.StateDictOptions(strict=strict, flatten_optimizer_state_dict=flat)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=kinds)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    file = through_a_file(saved)
    twin = make(seed=3)
    with heard():
        of_twin = KFQN(twin, lr=0.01, **options)
    twin.load_state_dict(weights)
    dcp.set_optimizer_state_dict(twin, of_twin, file, options=kinds)
    with silence():
        train(optimizer, lambda: loss(model), 4)
        train(of_twin, lambda: loss(twin), 4)
    assert difference(model, twin) == 0
    assert of_twin.state_dict()["param_groups"][0]["steps"] == 7


def test_the_whole_of_model_and_optimizer_through_distributed_checkpoint():
    model = network()
    optimizer = KFQN(
        model, 0.01, [{"params": model[:4].parameters(), "weight_decay": 0.1}, {"params": model[4:].parameters()}]
    )
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 3)
        saved_model, saved = dcp.get_state_dict(model, optimizer)
        saved_model, saved = copy.deepcopy(saved_model), copy.deepcopy(saved)
        train(optimizer, lambda: model(x).square().mean(), 3)
        twin = network(3)
        of_twin = KFQN(twin, 0.01, [{"params": twin[:4].parameters()}, {"params": twin[4:].parameters()}])
        dcp.set_state_dict(twin, of_twin, model_state_dict=saved_model, optim_state_dict=saved)
        train(of_twin, lambda: twin(x).square().mean(), 3)
    assert difference(model, twin) == 0
    assert of_twin.param_groups[0]["weight_decay"] == 0.1


def test_an_entry_for_every_parameter_and_nothing_else():
    model = network()
    optimizer = KFQN(model)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"]) == set(range(len(list(model.parameters()))))
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("take", [lambda state, p: state.pop(p), lambda state, p: state.popitem(),
                                  lambda state, p: state.__delitem__(p)], ids=["pop", "popitem", "del"])  # fmt: skip
def test_what_would_change_nothing_is_refused(take):
    """Whoever takes an entry out means to begin anew with it, and must not go on with what was there."""
    model = network()
    optimizer = KFQN(model)
    train(optimizer, lambda: model(x).square().mean(), 2)
    with pytest.raises(RuntimeError, match="forgets all of them"):
        take(optimizer.state, next(model.parameters()))
    copy.deepcopy((model, optimizer))
    pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("stop", [0, 1, 27])
def test_a_run_that_is_resumed_is_bitwise_the_run_that_was_not(options, stop):
    model = network()
    with heard():
        optimizer = KFQN(model, lr=0.01, **options)
    with silence():
        train(optimizer, lambda: (model(x) - 1).square().mean(), stop)
        weights, state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    twin = network(3)
    with heard():
        of_twin = KFQN(twin, **options)
    with silence():
        of_twin.load_state_dict(state)  # the state may come first
        twin.load_state_dict(weights)
        train(of_twin, lambda: (twin(x) - 1).square().mean(), 3)
    assert difference(model, twin) == 0


def test_a_state_of_something_else_is_refused_and_nothing_changes():
    model = network()
    optimizer = KFQN(model)
    train(optimizer, lambda: model(x).square().mean(), 2)
    kept = copy.deepcopy(optimizer.state_dict())
    others = [
        torch.optim.Adam(model.parameters()).state_dict(), KFQN(mlp(5, 8, 3)).state_dict(),
        KFQN(network(), pairs="next_batch").state_dict(), KFQN(network(), activation_decay=0.9).state_dict(), {},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
            optimizer.load_state_dict(other)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    assert all(torch.equal(now["state"][i][k], v) for i, of in kept["state"].items() for k, v in of.items())


# -- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("make", [network, attention])
def test_model_and_optimizer_copied_together_go_on_and_apart(how, make):
    model = make()
    with heard():
        optimizer = KFQN(model, lr=0.01)
    with silence():
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
        if how == "deepcopy":
            twin, of_twin = copy.deepcopy((model, optimizer))
        elif how == "pickle":
            twin, of_twin = pickle.loads(pickle.dumps((model, optimizer)))
        else:
            file = io.BytesIO()
            torch.save({"m": model, "o": optimizer}, file)
            file.seek(0)
            both = torch.load(file, weights_only=False)
            twin, of_twin = both["m"], both["o"]
        before = values(model)
        train(of_twin, lambda: (twin(x) - 1).square().mean(), 3)
        assert len(still(model, before)) == len(before)
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert difference(model, twin) == 0


def test_a_copy_of_the_model_alone_trains_with_an_optimizer_of_its_own():
    model = network()
    optimizer = KFQN(model)
    teacher = copy.deepcopy(model)
    own = KFQN(teacher)
    with silence():
        train(own, lambda: teacher(x).square().mean(), 2)
        train(optimizer, lambda: (model(x) - teacher(x).detach()).square().mean(), 2)
        train(own, lambda: (teacher(x) - 1).square().mean(), 2)


@pytest.mark.parametrize("kind", ["AveragedModel", "by hand", "swap"])
def test_an_average_of_the_weights_beside_the_training(kind):
    model, plain = network(), network()
    optimizer, of_plain = KFQN(model), KFQN(plain)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if kind == "AveragedModel"
        else copy.deepcopy(model)
    )
    with silence():
        for _ in range(5):
            train(optimizer, lambda: model(x).square().mean(), 1)
            if kind == "AveragedModel":
                average.update_parameters(model)
            else:
                with torch.no_grad():
                    for p, q in zip(average.parameters(), model.parameters(), strict=True):
                        p.lerp_(q, 0.1)
            if kind == "swap":  # evaluated with the average in the model's place
                kept = {k: v.clone() for k, v in model.state_dict().items()}
                model.load_state_dict(average.state_dict())
                model(x)
                model.load_state_dict(kept)
            average(x).sum()
        train(of_plain, lambda: plain(x).square().mean(), 5)
    assert difference(model, plain) == 0


# -- hooks


def hooks_on(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("make", [network, attention])
def test_hooks_go_with_their_optimizer(make):
    model = make()
    for i in range(50):
        with heard():
            optimizer = KFQN(model)
        if i % 10 == 0:
            train(optimizer, lambda: model(x).square().mean(), 1)
    one = hooks_on(model)
    assert one > 0
    del optimizer
    gc.collect()
    assert hooks_on(model) == 0
    model(x).square().mean().backward()


def test_hooks_go_when_they_are_told_to_and_when_construction_fails():
    model = network()
    optimizer = KFQN(model)
    optimizer.remove_hooks()
    assert hooks_on(model) == 0
    with pytest.raises(RuntimeError, match="removed"):
        optimizer.step()
    for wrong in ({"damping": -1.0}, {"lr": -1.0}, {"colour": "red"}, {"params": [torch.zeros(3)], "momentum": 2.0}):
        with pytest.raises((ValueError, TypeError)):
            KFQN(model, **wrong)
    gc.collect()
    assert hooks_on(model) == 0
    describe(model)
    assert hooks_on(model) == 0


def test_one_dead_optimizer_does_not_disturb_the_next():
    model, plain = network(), network()
    for _ in range(3):
        train(KFQN(model, lr=0.0), lambda: model(x).square().mean(), 2)
    gc.collect()
    with silence():
        train(KFQN(model), lambda: model(x).square().mean(), 4)
        train(KFQN(plain), lambda: plain(x).square().mean(), 4)
    assert difference(model, plain) == 0


def test_a_saved_model_needs_nothing_of_this_package(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 8))
    optimizer = KFQN(model)
    train(optimizer, lambda: model(x).square().mean(), 2)
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    assert b"kfqn" not in (tmp_path / "model.pt").read_bytes()
    assert b"kfqn" not in (tmp_path / "model.pkl").read_bytes()
    loads = (
        "import sys, pickle; sys.modules['kfqn_core'] = None; import torch; "
        "m = torch.load('model.pt', weights_only=False); n = pickle.load(open('model.pkl', 'rb')); "
        "x = torch.zeros(3, 5); m(x).sum().backward(); n(x).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", loads], check=True, cwd=tmp_path)
    model(x).sum().backward()


SMALL = {
    "linear": lambda: mlp(5, 8, 3),
    "convolution": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 4, 1)),
}


@newer_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_model_is_traced_and_exported_while_its_optimizer_lives_and_scripted_afterwards(make):
    model = make()
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
    expected = model(x)
    others = [
        torch.jit.trace(model, x),
        torch.export.export(model.eval(), (x,)).module(),
        torch.fx.symbolic_trace(model),
    ]
    model.train()
    with silence():
        train(optimizer, lambda: 0.0 * model(x).square().mean(), 1)
    optimizer.remove_hooks()
    others.append(torch.jit.script(model))
    assert all(error(other(x), others[-1](x)) < 1e-6 or error(other(x), expected) < 1e-6 for other in others)


def test_another_default_device():
    model = mlp(600, 8, 3)
    optimizer = KFQN(model, pairs="next_batch", memory=2)
    inputs = randn(16, 600)
    with silence():
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            with torch.device("meta"):
                optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        with torch.device("meta"):
            optimizer.load_state_dict(state)
            KFQN(model)
            describe(model)
        train(optimizer, lambda: functional.mse_loss(model(inputs), torch.zeros(16, 3)), 2)


def assign(optimizer):
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("begin_anew", [assign, lambda optimizer: optimizer.state.clear()])
@pytest.mark.parametrize("make", [network, attention])
@pytest.mark.parametrize("pairs", [None, "next_batch"])
def test_an_empty_state_is_a_new_beginning(begin_anew, make, pairs):
    """As with Adam, whose state users clear for the next task."""
    model = make()
    optimizer = KFQN(model, pairs=pairs)
    train(optimizer, lambda: (model(x) - 1).square().mean(), 12)
    twin = copy.deepcopy(model)
    fresh = KFQN(twin, pairs=pairs)
    with silence():
        begin_anew(optimizer)
        train(optimizer, lambda: (model(x) - 1).square().mean(), 12)
        train(fresh, lambda: (twin(x) - 1).square().mean(), 12)
    assert difference(model, twin) == 0.0
    assert len(model[0]._forward_hooks) <= 1


@pytest.mark.parametrize("begin_anew", [assign, lambda optimizer: optimizer.state.clear()])
def test_a_new_beginning_in_the_middle_of_a_step(begin_anew):
    """Between backward and step: the gradients are there, and what was seen of them is not."""
    model = network()
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
        (model(x) - 1).square().mean().backward()
        begin_anew(optimizer)
        before = values(model)
        optimizer.step()
        assert still(model, before) <= {"7.weight"}  # whose inputs are all positive
        train(optimizer, lambda: (model(x) - 1).square().mean(), 3)
    assert all(layer.started for layer in optimizer.layers.values())


def test_another_state_is_not_assigned_in_silence():
    model = network()
    optimizer = KFQN(model)
    train(optimizer, lambda: model(x).square().mean(), 2)
    kept = copy.deepcopy(optimizer.state)
    assert type(kept) is defaultdict
    with pytest.raises(ValueError, match="load_state_dict"):
        optimizer.state = kept
