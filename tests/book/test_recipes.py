"""The recipes: every block of the page, and of README's part on the optimizer, runs; every message is explained."""

import ast
import importlib.util
import re
import socket
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfqn_core
from kfqn_core import KFQN, describe
from tools.manifest import ROOT

PAGE = (ROOT / "chapters" / "recipes.md").read_text(encoding="utf-8")
README = (
    (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use the optimizer")[2].partition("## Does it")[0]
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)
NAMES, LOOP, LOOK = BLOCKS[:3]
README_BLOCKS = BLOCK.findall(README)


class Tiny(nn.Module):
    """Says which class a few tokens belong to; with labels it returns the loss as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(self, x, labels=None):
        scores = self.head(self.body(self.norm(self.embedding(x).mean(1))))
        return scores if labels is None else {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Samples(TensorDataset):
    """Pairs; of transformers' trainer, dicts."""

    as_dicts = False

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "labels": y} if self.as_dicts else (x, y)


def names(**more):
    """What a program of the reader's has."""
    torch.manual_seed(0)
    x = torch.randint(0, 16, (640, 3))
    dataset = Samples(x, x[:, 0] % 4)
    loader = DataLoader(dataset, batch_size=32)
    model = Tiny()
    found = {"model": model, "dataset": dataset, "loader": loader, "steps": len(loader), "device": "cpu"}
    return {**found, "loss_fn": nn.functional.cross_entropy, **more}


def loss_of(model, dataset):
    x, y = dataset.tensors
    device = next(model.parameters()).device
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x.to(device)), y.to(device)).item()


def skip_unless_here(block):
    """Skip a block that needs a package or a GPU that is not here, or a newer torch."""
    for node in ast.walk(ast.parse(block)):
        found = [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for package in {(name or "").partition(".")[0] for name in found}:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed here, so its recipe is not tried")
    if '"cuda"' in block and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs a GPU")
    if "optim.Muon" in block and not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    if "torch.compile" in block and torch.__version__ < "2.7":
        pytest.skip("in a compiled model of torch 2.6 the hooks see no inputs")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A namespace to run blocks in: a folder of its own, a process group for one, and no C++ compiler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    space = names()
    exec(NAMES, space)
    yield space
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def started(block):
    """The first line that says what a block is about."""
    return next(line for line in block.splitlines() if line and not line.startswith(("import", "from", "@", " ")))


def titled(blocks):
    return pytest.mark.parametrize(
        "block", blocks, ids=[f"{i}-{started(block)[:40]}" for i, block in enumerate(blocks)]
    )


def run(block, space):
    """Run a block, and the page's loop after one that only makes an optimizer."""
    exec(block, space)
    if any(trains in block for trains in ("step(", ".fit(", ".train()")):
        return
    space.setdefault("scheduler", torch.optim.lr_scheduler.ConstantLR(space["optimizer"], 1.0))
    exec(LOOP, space)


@titled([block for block in BLOCKS[2:] if block != LOOK and "torch.save" not in block])
def test_a_block_trains(block, program):
    """Every parameter that has a gradient moves, and the loss falls."""
    skip_unless_here(block)
    program["dataset"].as_dicts = "transformers" in block
    before, model = loss_of(program["model"], program["dataset"]), program["model"]
    start = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        run(block, program)
    assert not [word for word in said if re.search("KFQN|fallback_lr|skipped_steps|pair for H_g", str(word.message))]
    assert loss_of(model, program["dataset"]) < before
    moved = [not torch.equal(p.detach().cpu(), old) for p, old in zip(model.parameters(), start, strict=False)]
    frozen = ["requires_grad_(False)" in block or "peft" in block for _ in moved]
    assert all(map(max, moved, frozen)), "a parameter stood still"


def test_the_description_is_printed(program, capsys):
    exec(LOOK, program)
    assert "curvature for 100% of the weights" not in capsys.readouterr().out.splitlines()[0]  # norms have none


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(program):
    """Saved and loaded after a few steps, both go the same way."""
    [block] = [block for block in BLOCKS if "torch.save" in block]
    saving, _, loading = block.partition("\n\n")
    made, _, saves = saving.rpartition("\n")
    exec(made, program)
    exec(LOOP, program)
    exec(saves, program)
    program["steps_done"] = [p.detach().clone() for p in program["model"].parameters()]
    exec(LOOP, program)
    end = [p.detach().clone() for p in program["model"].parameters()]
    again = names(**{key: program[key] for key in ("KFQN", "LinearLR", "torch")})
    exec(made, again)
    exec(loading, again)
    assert all(map(torch.equal, again["model"].parameters(), program["steps_done"]))
    exec(LOOP, again)
    assert all(map(torch.equal, again["model"].parameters(), end))


@titled([block for block in README_BLOCKS if '"cuda"' not in block])
def test_readmes_lines_run(block, program):
    """With its own loop where it has one, and that of the page elsewhere."""
    model, x = program["model"], program["dataset"].tensors[0]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    embeddings = list(model.embedding.parameters())
    decayed = [p for p in model.parameters() if p.ndim >= 2 and all(p is not q for q in embeddings)]
    program |= {"biases_and_norms": vectors, "embeddings": embeddings, "decayed": decayed}
    before = loss_of(model, program["dataset"])
    exec(block, program)
    if "register(" in block:
        layer = program["EqualizedLinear"](8, 4)
        described = describe(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)))
        assert [row.kind for row in described.rows] == ["Kronecker"] * 2
        kfqn_core.layers.kinds.SUPPORTED.pop(program["EqualizedLinear"])
        return
    if "loader:" not in block:
        program.setdefault("scheduler", torch.optim.lr_scheduler.ConstantLR(program["optimizer"], 1.0))
        exec(LOOP, program)
    assert x.shape == (640, 3)
    assert loss_of(model, program["dataset"]) < before


def test_readme_and_the_page_have_the_same_lines():
    """The loop, the rate and the schedule that a reader copies are one text."""
    [lines] = [block for block in README_BLOCKS if "scheduler" in block]
    shown = [re.sub(r"\s+#.*", "", line) for line in lines.splitlines()]
    assert LOOP.strip() in "\n".join(shown)
    adam = "optimizer = KFQN(model, lr=0.03)\nscheduler = "
    assert adam in "\n".join(shown)
    decay = "LinearLR(optimizer, 1.0, 0.0, total_iters=steps)"
    assert f"{adam}{decay}" in PAGE
    assert decay in lines
    assert "A rate that falls to zero along a line is best on most problems" in " ".join(README.split())
    assert "A rate that falls to zero along a line is best on most problems" in " ".join(PAGE.split())


def trained(scale=1.0, clip=None):
    """Weights after a few steps with a loss multiplied by `scale`, in float64."""
    space = names()
    model = space["model"].double()
    optimizer = KFQN(model, eps=0.0)
    for x, y in space["loader"]:
        optimizer.zero_grad()
        (scale * space["loss_fn"](model(x), y)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_larger_gradients_make_the_same_steps():
    """To rounding: lengths are divided out."""
    assert (trained(1000.0) - trained()).norm() < 1e-9 * trained().norm()
    assert (trained(clip=1e-3) - trained()).norm() > 1e-6 * trained().norm()  # mini-batches count alike, which is new


def test_both_rates_follow_a_schedule_that_begins_lower(program):
    """A warm-up holds Adam's rate down too, if KFQN was given the largest rate."""
    from kfqn_core.training.fallback import fallback_rate

    [block] = [block for block in BLOCKS if "SequentialLR" in block]
    exec(block.replace("max(1, steps // 50)", "4"), program)
    group = program["optimizer"].param_groups[0]
    seen = []
    for _ in range(program["steps"]):
        seen.append((group["lr"] / 0.03, fallback_rate(group) / 0.01))
        program["optimizer"].step()  # without a gradient
        program["scheduler"].step()
    assert seen[0] == pytest.approx((0.1, 0.1))
    assert max(seen) == pytest.approx((1.0, 1.0))
    assert all(one == pytest.approx(other) for one, other in seen)


def test_a_diagonal_takes_hardly_more_than_the_momentum():
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64))
    least = describe(model, activation_factor="diagonal")
    assert 0.5 <= least.state_bytes / least.adam_bytes < 0.52  # the momentum is half of Adam's state


def test_one_cycle_turns_betas_and_leaves_the_momentum():
    optimizer = KFQN(Tiny(), lr=0.03)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=9)
    group = optimizer.param_groups[0]
    assert group["momentum"] == 0.9
    assert group["betas"][0] != 0.9


# Messages -----------------------------------------------------------------------------------------------------------

FOLDERS = ("training", "parallel", "layers", "estimate")
DOTS = "…"


def messages():
    """Every message that a user of the optimizer may see, by place, with dots for what is filled in."""
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / "kfqn_core" / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                if re.fullmatch(r"warnings\.warn|[A-Z]\w*Error|(\w+\.)?UnsupportedLayer", ast.unparse(node.func)):
                    found[f"{file.name}:{node.lineno}"] = text_of(node.args[0])
    return found


def text_of(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else DOTS for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return f"{text_of(node.body)} {DOTS} {text_of(node.orelse)}" if isinstance(node, ast.IfExp) else DOTS


def pattern(said):
    """A row's text as an expression: each run of dots stands for anything."""
    parts = [re.escape(part.strip()) for part in said.split(DOTS)]
    return re.compile(".*".join(parts), re.DOTALL)


def rows():
    """What the tables of messages say, in the order of the page."""
    section = PAGE.partition("## Every warning and error")[2]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_every_message_of_the_code_has_a_row():
    known = [pattern(said) for said in rows()]
    for place, message in messages().items():
        assert any(row.match(message.lstrip(f"{DOTS}:, ")) or row.match(message) for row in known), (place, message)


def test_every_row_is_a_message_of_the_code():
    texts = list(messages().values())
    for said in rows():
        hits = [text for text in texts if pattern(said).match(text.lstrip(f"{DOTS}:, ")) or pattern(said).match(text)]
        assert hits, f"no message begins with {said!r}"


def test_the_table_of_expectations_is_that_of_the_committed_results():
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pytorch_optimizer", reason="the comparison's peers are not installed here")
    from benchmarks import readme, recipes
    from benchmarks.methods import METHODS
    from benchmarks.records import RESULTS, rounded
    from benchmarks.tables import summary

    frame = pd.DataFrame(rounded(summary(list(readme.PROBLEMS), list(METHODS), RESULTS).to_dict("records")))
    assert recipes.updated(frame) == PAGE, "run `python -m benchmarks report`"
