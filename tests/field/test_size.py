"""What it costs: the state against Adam's, memory while training, a first estimate without a large matrix."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kfqn_core import KFQN, describe
from tests.field.programs import error, heard, inverse_of, mlp, randn, silence, train

# -- the state


def lora():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(128, 128).requires_grad_(False)
            self.down, self.up = nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False)

    return nn.ModuleList([Adapted() for _ in range(3)])


def convnext():
    return nn.ModuleList([
        nn.Sequential(
            nn.Conv2d(64, 64, 7, groups=64), nn.GroupNorm(1, 64), nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 1)
        )
        for _ in range(2)
    ])  # fmt: skip


MODELS = {
    "Linear(4096, 1)": lambda: nn.Linear(4096, 1),
    "Linear(4096, 2) without bias": lambda: nn.Linear(4096, 2, bias=False),
    "Linear(700, 20)": lambda: nn.Linear(700, 20),
    "thin tower": lambda: mlp(300, 4, 300, 4, 300),
    "depthwise 5x5": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 5, groups=32)),
    "depthwise 1d, multiplier 2": lambda: nn.Conv1d(48, 96, 7, groups=48),
    "grouped 3d": lambda: nn.Conv3d(16, 32, 3, groups=4),
    "pointwise": lambda: nn.Conv2d(128, 8, 1),
    "LoRA": lora,
    "ConvNeXt": convnext,
    "encoder": lambda: nn.TransformerEncoderLayer(32, 4, 64),
    "decoder": lambda: nn.TransformerDecoderLayer(32, 4, 64, bias=False),
    "embedding and head": lambda: nn.Sequential(nn.Embedding(2000, 16), nn.Linear(16, 2000)),
    "narrow embedding": lambda: nn.Sequential(nn.Embedding(5000, 1), nn.Linear(1, 3)),
    "transposed, grouped": lambda: nn.ConvTranspose2d(32, 32, 4, stride=2, groups=8),
    "many small": lambda: mlp(*[3] * 30),
    "autoencoder": lambda: mlp(784, 100, 10, 100, 784),
    "scalar": lambda: nn.Linear(1, 1),
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_is_at_most_adams_and_the_table_says_what_is_held(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    with heard():
        table = describe(model)
        optimizer = KFQN(model)
    held = sum(t.numel() * t.element_size() for of in optimizer.state.values() for t in of.values())
    assert held == table.state_bytes
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    adam.step()
    of_adam = sum(t.numel() * t.element_size() for of in adam.state.values() for t in of.values())
    assert of_adam == table.adam_bytes
    # A flag and two numbers of every layer, in place of Adam's counters.
    assert held <= of_adam + 9 * len(optimizer.layers)


def test_the_state_of_a_layer_that_is_added_is_at_most_adams_too():
    model, x = mlp(12, 16, 3), randn(16, 12)
    optimizer = KFQN(model)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
        model.append(nn.Linear(3, 1)), model.append(nn.Linear(1, 30))
        train(optimizer, lambda: model(x).square().mean(), 2)
    held = sum(t.numel() * t.element_size() for of in optimizer.state.values() for t in of.values())
    assert held <= sum(2 * p.numel() * p.element_size() + 4 for p in model.parameters())


@pytest.mark.parametrize("warm", [False, True])
def test_the_state_of_a_head_whose_backbone_is_frozen_later_is_at_most_adams(warm):
    """The forms of H_a were chosen for all layers together; what has learnt nothing by then is no part of it."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(16, 600), nn.Tanh(), nn.Linear(600, 256), nn.Tanh(), nn.Linear(256, 4)),
        randn(8, 16),
    )
    optimizer = KFQN(model)
    assert optimizer.plan.kinds["4"] == "action"
    if warm:
        optimizer.warm_start([x])
    model[:4].requires_grad_(False)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 2)
    held = sum(t.numel() * t.element_size() for of in optimizer.state.values() for t in of.values())
    if warm:  # which is learnt
        assert optimizer.plan.kinds["4"] == "action"
    else:
        assert held <= sum(2 * p.numel() * p.element_size() + 4 for p in model[4].parameters())


# -- memory while training


class Storages(TorchDispatchMode):
    """The storages that live, of those that were made inside and are not small; and the most bytes of them at once."""

    def __init__(self):
        super().__init__()
        self._made, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 2**17:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(self.live()))
        return out

    def live(self, at_least=0):
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return [size for _, size in self._made.values() if size >= at_least]


PEAKS = textwrap.dedent(
    """
    import sys, torch
    from torch import nn
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(512, 512), nn.ReLU())])
    if sys.argv[1] == "adam":
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
    else:
        from kfqn_core import KFQN
        optimizer = KFQN(model, refresh=1)

    def resident():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

    start = resident()
    for k in (1, 1, 3, 6):
        for _ in range(k):
            x = torch.randn(1024, 512)
            (model(x).square().mean() / k).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(resident() - start)
    """
)


def peaks(kind):
    """MiB above what there was before the first pass, for 1, 3 and 6 micro-batches, in a process of its own."""
    # Memory that is freed goes back at once: what is measured is what is held, and not how malloc cuts its heap.
    kept = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    run = subprocess.run([sys.executable, "-c", PEAKS, kind], capture_output=True, text=True, check=True, env=kept)
    return [float(line) for line in run.stdout.split()][1:]


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    """With all inputs kept, six micro-batches of these six layers are 60 MiB more than one."""
    for own, adams in zip(peaks("kfqn"), peaks("adam"), strict=True):
        assert own <= 1.05 * adams + 12  # workspaces of the processor's libraries differ by some MiB


@pytest.mark.parametrize("use", ["backward", "autograd.grad"])
def test_after_backward_no_more_is_held_than_one_micro_batch_has(use):
    """Storages of 2 MiB that are alive when all backwards are done."""
    counts = []
    for k in (1, 2, 5):
        model = mlp(256, 256, 256, 256)
        optimizer = KFQN(model)
        with Storages() as storages:
            for _ in range(k):
                x = torch.randn(2048, 256)
                loss = model(x).square().mean() / k
                if use == "backward":
                    loss.backward()
                else:
                    gradients = torch.autograd.grad(loss, list(model.parameters()))
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p.grad = g if p.grad is None else p.grad + g
                del x, loss
            counts.append(len(storages.live(2**21)))
        with silence():
            optimizer.step()
    assert counts[0] <= 3
    assert max(counts) <= max(3, counts[0])


class Deep(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList([mlp(256, 256, 256) for _ in range(4)]), reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("batches", [1, 3])
def test_checkpointing_keeps_its_saving(reentrant, batches):
    peaks = {}
    for kind in ("kfqn", "adam", "plain"):
        torch.manual_seed(0)
        model = Deep(reentrant)
        optimizer = KFQN(model, refresh=1) if kind != "adam" else torch.optim.Adam(model.parameters())
        if kind == "plain":
            model.forward = lambda x, model=model: [x := x + block(x) for block in model.blocks][-1]
        with Storages() as storages:
            for _ in range(2):
                for _ in range(batches):
                    x = torch.randn(4096, 256, requires_grad=reentrant)
                    (model(x).square().mean() / batches).backward()
                    del x
                optimizer.step()
                optimizer.zero_grad()
        peaks[kind] = storages.most
    assert peaks["kfqn"] <= 1.1 * peaks["adam"]
    assert peaks["kfqn"] < 0.9 * peaks["plain"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_curvature_under_checkpointing_is_that_of_the_inputs(reentrant):
    torch.manual_seed(0)
    model = Deep(reentrant)
    optimizer, x = KFQN(model, lr=0.0, activation_factor="action"), randn(200, 256, requires_grad=reentrant)
    with silence():
        train(optimizer, lambda: model(x).square().mean(), 1)
    assert error(optimizer.layers["blocks.0.0"].activation.H[0], inverse_of(x)) < 1e-3


# -- a first estimate, and a table, without a large matrix

WIDE = textwrap.dedent(
    """
    import sys, torch
    from torch import nn
    from kfqn_core import KFQN, describe
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.table = nn.Linear(12_000, 8), nn.Embedding(12_000, 4)
        def forward(self, x, ids):
            return self.wide(x) + self.table(ids).sum(-1, keepdim=True)
    model = Net()
    def resident():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
    batches = [{"x": torch.randn(4, 12_000), "ids": torch.arange(4)}, (torch.randn(4, 12_000), torch.arange(4))]
    (model(*batches[1]).mean()).backward(); model.zero_grad()
    start = resident()
    describe(model, batches[0]); describe(model, batches[1])
    for optimizer in (KFQN(model), KFQN(model)):
        optimizer.warm_start(batches)
        for _ in range(2):
            model(*batches[1]).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
    print(resident() - start)
    """
)


def test_no_matrix_of_all_inputs_exists():
    run = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 100  # MiB; a matrix would be 550


def test_the_table_of_models_that_cannot_be_copied_or_take_more_than_a_tensor():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Embedding(30, 6), nn.Conv2d(3, 6, 3)
            self.mix = parametrizations.weight_norm(nn.Linear(6, 6))
            self.out, self.file = nn.Linear(6, 2), open(__file__)  # noqa: SIM115
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids, image=None, *, scale=1.0):
            self.calls += 1
            self.kept = self.text(ids).mean(1) + scale * self.image(image).mean((2, 3))
            return {"logits": self.out(self.mix(self.kept)), "more": [self.kept]}

    torch.manual_seed(0)
    model = Net()
    ids, image = torch.arange(8).view(2, 4), randn(2, 3, 6, 5)
    model(ids, image)
    stream = torch.get_rng_state()
    with silence():
        tables = [
            describe(model, {"ids": ids, "image": image, "scale": 2.0}),
            describe(model, (ids, image)),
            describe(model),
        ]
    model.file.close()
    assert torch.equal(stream, torch.get_rng_state())
    assert model.calls == 1
    assert all(p.grad is None for p in model.parameters())
    assert [{row.name: row.T for row in table.rows}["image"] for table in tables] == [12, 12, None]
    assert len({table.state_bytes for table in tables}) == 1
    assert {row.kind for row in tables[0].rows if row.name.startswith("mix")} == {"Adam"}


@pytest.mark.parametrize("kind", ["dict", "tuple", "list"])
@pytest.mark.parametrize("factors", ["action", "diagonal", "low_rank"])
def test_a_warm_start_takes_what_the_model_takes(kind, factors):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.other = nn.Linear(6, 8), nn.Linear(3, 8)

        def forward(self, a, b):
            return self.fc(a) + self.other(b)

    parts = [(randn(8, 6, seed=i), randn(8, 3, seed=i + 9)) for i in range(3)]
    form = {"dict": lambda a, b: {"b": b, "a": a}, "tuple": lambda a, b: (a, b), "list": lambda a, b: [a, b]}[kind]
    model = Net()
    optimizer = KFQN(model, activation_factor=factors, rank=3)
    with silence():
        optimizer.warm_start(form(*part) for part in parts)
    truth = inverse_of(torch.cat([a for a, _ in parts]))
    H = optimizer.layers["fc"].activation.H[0]
    if factors == "action":
        assert error(H, truth) < 1e-4
    elif factors == "diagonal":
        a = torch.cat([torch.cat([a for a, _ in parts]), torch.ones(24, 1)], 1)
        assert error(H.diagonal(), 1 / (a.square().mean(0) + 0.03)) < 1e-4
    else:
        assert torch.linalg.eigvalsh(H).min() > 0
    assert all(layer.started for layer in optimizer.layers.values())
    with silence():
        train(optimizer, lambda: model(*parts[0]).square().mean(), 3)
