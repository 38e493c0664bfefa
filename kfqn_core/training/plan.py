"""Which parameter moves how: layers in groups, and the rest. Made anew whenever the model is no longer what it was.

A parameter may be frozen, unfrozen, moved to another device, cast, replaced (`load_state_dict(assign=True)`) or added
(an adapter) after the optimizer was made. The plan notices by looking, once a step, at objects and flags that the host
holds; what was learnt of a layer goes along into the next plan with its weight. A layer that has been trained stays in
the plan while it is frozen, as torch's optimizers keep its state.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.hooks import Hooks
from kfqn_core.estimate.statistics import Record
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import is_shard, local, reshard, whole
from kfqn_core.training.answer import Answer
from kfqn_core.training.fallback import Fallback
from kfqn_core.training.groups import Group
from kfqn_core.training.moves import Bench, Moves
from kfqn_core.training.options import Options
from kfqn_core.training.owned import owners_of
from kfqn_core.training.parameters import trains
from kfqn_core.training.selection import Selected, activation_factors, curvature_layers, shape_key
from kfqn_core.training.sharded import lengths_over_ranks

# Numbers that a step handles at once. Beyond, fewer calls save no time on a CPU, and on a GPU little. While a step runs
# it holds about twice as many beside the state, 270 MB on a GPU.
LARGE, LARGE_ON_GPU = 2**21, 2**25
SMALL = 2**17  # numbers of a step whose place is kept: making it anew would take longer than filling it
ROWS = 4096  # input vectors that "auto", and a low-rank factor, look at in a mini-batch: more cost time and add little


class Plan:
    """Groups of layers, the rest, and the hooks.

    Args:
        model: any module.
        options: of the method.
        param_groups: those of the optimizer.
        ranks: over which statistics are averaged.
        fallback: what moves the rest; it keeps its state.
        refused: names of layers that are left to the fallback.
        last: the plan before, from which states are taken over.
        device: of the state, if not that of the parameters: on "meta" this is a plan and nothing more.

    Attributes:
        groups: of layers of one shape; each with the indices of the parameter groups of its weights and biases.
        places: by layer name, its group and its number there.
        kinds: by layer name, the form of its activation factor.
        moves: what a step does to all layers of so many groups at once as are not large.
        rest: the parameters that the fallback moves, by parameter group.
        sharded: whether parameters are spread over processes.
        moved: names of layers that a step has moved.
        late: names of layers that the last update of curvature did not reach, nor a step since.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        param_groups: Sequence[Mapping[str, Any]],
        ranks: Ranks,
        fallback: Fallback,
        refused: frozenset[str] = frozenset(),
        last: Plan | None = None,
        device: torch.device | None = None,
    ):
        self.model, self.options, self._ranks = model, options, ranks
        where = {id(p): i for i, group in enumerate(param_groups) for p in group["params"]}

        resting = set() if last is None else last.resting()

        def may_move(p: nn.Parameter) -> bool:
            return (trains(p) or id(p) in resting) and id(p) in where and param_groups[where[id(p)]]["curvature"]

        layers = curvature_layers(model, may_move)
        former = {} if last is None else _former_names(layers, last)
        moved = set() if last is None else {name for name, old in former.items() if old in last.moved}
        layers = {
            name: layer for name, layer in layers.items()
            if name not in refused and (trains(layer.weight) or name in moved)
        }  # fmt: skip
        if options.pairs is not None:
            layers = {name: layer for name, layer in layers.items() if layer.part.shows_h}
        self.kinds = self._kinds(layers, last, former)
        given = {} if last is None else {name: last.places[old][0].owner for name, old in former.items()}
        owners = owners_of(layers, self.kinds, options, ranks, given)
        members: dict[tuple[Any, ...], list[Selected]] = {}
        for name, layer in layers.items():
            of = tuple(where[id(p)] for p in (layer.weight, layer.bias if layer.bias is not None else layer.weight))
            own = options.of(layer.view)
            members.setdefault((*shape_key(layer), self.kinds[name], own, owners[name], of), []).append(layer)
        self.groups = [
            (Group(alike, key[-4], key[-3], ranks, device, key[-2]), key[-1])
            for key, layers_of_key in members.items() for alike in _pieces(layers_of_key)
        ]  # fmt: skip
        places = {layer.name: (group, i) for group, _ in self.groups for i, layer in enumerate(group.layers)}
        self.places: dict[str, tuple[Group, int]] = {name: places[name] for name in layers}  # in the order of the model
        covered = {id(p) for layer in layers.values() for p in layer.parameters}
        self.rest = [
            [p for p in group["params"] if (trains(p) or p in fallback.state) and id(p) not in covered]
            for group in param_groups
        ]
        for p in (p for params in self.rest for p in params):
            fallback.adopt(p, device)
        self.sharded = any(is_shard(p) for group in param_groups for p in group["params"])
        self._fingerprint = self._look(param_groups)
        self._training = {p for group in param_groups for p in group["params"] if trains(p)}
        self.moves = _moves(self.groups)
        watched = {} if device is not None else {n: (layer.module, layer.part) for n, layer in layers.items()}
        last_hooks = None if last is None else last.hooks
        self.hooks: Hooks = Hooks(watched, outputs=options.pairs is not None, ranks=ranks, last=last_hooks)
        few = options.activation_factor in ("auto", "low_rank", "diagonal")
        for name in self.hooks:
            self.hooks[name].vectors = ROWS if few else None
        self.moved: set[str] = moved & self.places.keys()
        late = () if last is None else (name for name, old in former.items() if old in last.late)
        self.late: set[str] = self.places.keys() & set(late)
        self._watched: dict[int, Any] = {}  # by group, what its hooks were told last
        if last is not None:
            self._take_over(last, former)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("moves", "_watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._watched = {}
        self.moves = _moves(self.groups)  # anew: views do not come out of a pickle as views

    def _kinds(self, layers: Mapping[str, Selected], last: Plan | None, former: Mapping[str, str]) -> dict[str, str]:
        views = [layer.view for layer in layers.values()]
        if self.options.activation_factor != "auto":
            kinds = ["diagonal" if view.diagonal_only else self.options.activation_factor for view in views]
        else:
            # A layer that has been trained keeps the form of its factor, if it is still the same matrix.
            given = {
                i: last.kinds[old] for i, (name, layer) in enumerate(layers.items())
                if last is not None and (old := former.get(name)) is not None and last.has_learnt(old)
                and last.layer(old).view.d_in == layer.view.d_in
            }  # fmt: skip
            kinds = activation_factors(views, self.options.rank, given)
        return dict(zip(layers, kinds, strict=True))

    def _take_over(self, last: Plan, former: Mapping[str, str]) -> None:
        """What was learnt of a layer goes along; of another matrix in its place (a bias was frozen), the momentum."""
        for name, (group, i) in self.places.items():
            if name not in former:
                continue
            old, j = last.places[former[name]]
            weight, bias = old.state(j)
            alike = (old.kind, old.size[1:]) == (group.kind, group.size[1:])
            if alike and weight["M"].shape == group.layers[i].weight.shape and not old.started.is_meta:
                group.load(i, weight, bias)
                if j not in old.unsettled:
                    group.unsettled.discard(i)
                continue
            for side, (own, saved) in enumerate(zip(group.state(i), (weight, bias), strict=True)):
                if "M" in own and "M" in saved and own["M"].shape == saved["M"].shape and not saved["M"].is_meta:
                    group.load_momentum(i, side, saved["M"])

    def has_learnt(self, name: str) -> bool:
        """Whether the layer of that name was moved, or has a first estimate."""
        group, i = self.places[name]
        return name in self.moved or i not in group.unsettled

    def resting(self) -> set[int]:
        """The parameters, by `id`, of layers that were trained and are frozen now: what was learnt of them is kept."""
        layers = [self.layer(name) for name in self.moved]
        return {
            id(p) for layer in layers for p in layer.parameters if not any(q.requires_grad for q in layer.parameters)
        }

    def survey(self, records: Mapping[str, Record]) -> tuple[list[str], set[str]]:
        """Look at the layers without a first estimate. Ranks must go on with the same plan, and do the same.

        Returns:
            Those whose weight has a gradient, on every rank, and of which no rank has seen a use; and those that some
            rank has seen.
        """
        if not self._ranks.alone:
            for group in self.layer_groups:
                group.ask()
        names = [name for name, (group, i) in self.places.items() if i in group.unsettled]
        flags = [
            self.layer(name).weight.grad is not None and name not in records and not self.hooks[name].empty
            for name in names
        ]  # fmt: skip
        seen = [name in records and records[name].has_inputs for name in names]
        if names and not self._ranks.alone:
            device = self.places[names[0]][0].started.device
            [counts] = self._ranks.sums([torch.tensor([flags, seen], dtype=torch.float32, device=device)])
            of_all, of_some = counts.tolist()  # waits, in the first steps
            flags, seen = [count == self._ranks.size for count in of_all], [count > 0 for count in of_some]
        unseen = [name for name, flag in zip(names, flags, strict=True) if flag]
        return unseen, {name for name, some in zip(names, seen, strict=True) if some}

    def whole_lengths(self, lengths: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Lengths of gradients over all ranks, where a rank has some rows of them, and the length of a step asks."""
        if not self.sharded:
            return lengths
        groups = [group for group in self.layer_groups if group.steady is not None]
        return lengths_over_ranks(self._ranks, [layer.weight for group in groups for layer in group.layers], lengths)

    def unexplained(self, unseen: list[str]) -> list[str]:
        """Those of the layers whose gradient is not zero. Looking waits for the device, and is rare."""
        if not unseen:
            return []
        gradients = [whole(g) for name in unseen if (g := self.layer(name).weight.grad) is not None]
        sizes = torch._foreach_norm(gradients, torch.inf)
        some = Answer(torch.stack([size != 0 for size in sizes])).known(wait=True)
        return [name for name, differs in zip(unseen, some or [True] * len(unseen), strict=True) if differs]

    def due(self, records: Mapping[str, Record], *, refresh: bool) -> set[str]:
        """Names of the layers whose curvature this step updates: those that an update reaches, or has missed.

        Every `refresh` steps that is all of them. One that has no part in such a step follows in the next that it has a
        part in: tasks that alternate would else, with an interval that fits, teach one of them alone. Ranks must
        agree: what they have in common are the gradients.

        Args:
            records: of what was seen on this rank.
            refresh: whether this step updates all.
        """
        waiting = self.places.keys() if refresh else self.late
        reached = {
            name for name in waiting
            if (name in records and records[name].has_inputs if self._ranks.alone
                else self.layer(name).weight.grad is not None)
        }  # fmt: skip
        self.late = set(waiting) - reached
        return set(waiting) if refresh else reached

    def watch(self, refresh: bool, *, every_step: bool) -> None:
        """Look at the mini-batches of the next step only where it needs them: between updates gradients are enough."""
        for group, _ in self.groups:
            if self._ranks.alone:
                group.ask()
            always = refresh or every_step or group.activation.every_step
            late = () if always or not self.late else (i for i, of in enumerate(group.layers) if of.name in self.late)
            now = (always, frozenset(group.unsettled.union(late)))
            if self._watched.get(id(group)) == now:
                continue
            self._watched[id(group)] = now
            for i, layer in enumerate(group.layers):
                self.hooks[layer.name].watching = always or i in now[1]

    def watch_all(self) -> None:
        """Look at the mini-batches of the next step, whatever it needs."""
        self._watched.clear()
        for name in self.hooks:
            self.hooks[name].watching = True

    def layer(self, name: str) -> Selected:
        """The layer of that name."""
        group, i = self.places[name]
        return group.layers[i]

    def holds(self, param_groups: Sequence[Mapping[str, Any]], *, running: bool = False) -> bool:
        """Whether model and parameter groups are what this plan was made for.

        Where the model is about to run (`running`), whether nothing is in it that it did not have: a part that is
        frozen for the moment, as critics are, changes nothing until a step.
        """
        if self.sharded and running:
            return True  # its parameters may stand there whole
        if self.sharded:
            reshard(self._modules)
        objects, flags = self._look(param_groups, self._modules)
        known_objects, known_flags = self._fingerprint
        unchanged = (
            len(objects) == len(known_objects)
            and all(map(operator.is_, objects, known_objects))
            and flags == known_flags
        )
        return unchanged or (running and not self._lacks(param_groups))

    def _lacks(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a parameter trains that was frozen, or not there, when the plan was made.

        One of the optimizer's, or that of a new module: what other optimizers train in the same model changes nothing.
        A new parameter of a known module may be there for this one forward (`torch.func.functional_call`).
        """
        modules = set(map(id, self._modules))
        new = (p for module in self.model.modules() if id(module) not in modules for p in module._parameters.values())
        own = (p for group in param_groups for p in group["params"] if p not in self._training)
        return any(p is not None and trains(p) for p in itertools.chain(own, new))

    def _look(
        self, param_groups: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Every module and parameter of the model, and all flags that the plan depends on."""
        if modules is None:
            self._modules = modules = list(self.model.modules())
        named = [item for module in modules for item in module._parameters.items()]
        params, names = [p for _, p in named], [name for name, _ in named]  # pruning only gives a weight another name
        children = [child for module in modules for child in module._modules.values()]
        flags = [None if p is None else (trains(p), p.dtype, p.device) for p in params]
        forwards = ["forward" in vars(module) for module in modules]  # replaced: no layer that is known
        groups: list[Any] = [(len(group["params"]), group["curvature"]) for group in param_groups]
        loose = [trains(p) for group in param_groups for p in group["params"]]
        return params + children, flags + groups + loose + names + forwards

    def no_autocast(self) -> torch.autocast:
        """Curvature needs its digits, also where a user's whole training step stands under autocast."""
        return torch.autocast(self.groups[0][0].started.device.type if self.groups else "cpu", enabled=False)

    @property
    def layer_groups(self) -> list[Group]:
        """The groups alone."""
        return [group for group, _ in self.groups]

    def moving(self) -> list[nn.Parameter]:
        """Every parameter of the plan that has a gradient; layers of which one has are noted as `moved`."""
        found = []
        for name, (group, i) in self.places.items():
            own = [p for p in group.layers[i].parameters if p.grad is not None]
            if own:
                self.moved.add(name)
            found += own
        return found + [p for params in self.rest for p in params if p.grad is not None]

    def state_bytes(self, fallback: Fallback) -> int:
        """Bytes of everything that lives from one step to the next, in this process."""
        layers = [t for group, _ in self.groups for t in (*group.momenta, group.started, group.steady)]
        layers += [t for group, _ in self.groups if group.held for t in group.tensors().values()]
        rest = [local(t) for params in self.rest for p in params for t in fallback.state[p].values()]
        return sum(t.numel() * t.element_size() for t in (*layers, *rest) if isinstance(t, Tensor))


def _former_names(layers: Mapping[str, Selected], last: Plan) -> dict[str, str]:
    """By name, what layers were called in the last plan, if they were there.

    A layer is where its weight is, under whatever name; or, where the weight of a module was replaced, under the name
    it had. A new module in its place begins anew, and one that was frozen and put somewhere else (into an adapter) is
    let go.
    """
    names = {id(last.layer(name).weight): name for name in last.places}
    here = {id(layer.weight) for layer in layers.values()}
    former = {
        name: old for name, layer in layers.items()
        if (old := names.get(id(layer.weight))) is not None and (trains(layer.weight) or name == old)
    }  # fmt: skip
    replaced = (
        name for name, layer in layers.items()
        if name not in former and name in last.places and last.layer(name).module is layer.module
    )  # fmt: skip
    return former | {name: name for name in replaced if id(last.layer(name).weight) not in here}


def _pieces(layers: list[Selected]) -> Iterator[list[Selected]]:
    """Layers of one shape, so many at a time as are not large."""
    view = layers[0].view
    at_once = max(1, _large(layers[0].weight) // (view.groups * view.d_out * view.d_in))
    for i in range(0, len(layers), at_once):
        yield layers[i : i + at_once]


def _large(like: Tensor) -> int:
    """How many numbers are handled at once where `like` is."""
    return LARGE_ON_GPU if like.is_cuda else LARGE


def _moves(groups: Sequence[tuple[Group, tuple[int, int]]]) -> list[Moves]:
    """The moves of groups, so many at a time as are not large."""
    together: list[list[tuple[Group, tuple[int, int]]]] = []
    numbers = LARGE_ON_GPU
    for group, indices in groups:
        size = math.prod(group.size)
        if numbers + size > _large(group.M.W):
            together.append([])
            numbers = 0
        together[-1].append((group, indices))
        numbers += size
    bench, depth = Bench(), sum(len(group.layers) for group, _ in groups)
    return [
        Moves(some, depth, bench if sum(math.prod(group.size) for group, _ in some) <= SMALL else None)
        for some in together
    ]


def adam_bytes(parameters: Sequence[Tensor]) -> int:
    """Bytes of Adam's state for these parameters, in this process: two moments, and a counter."""
    counter = torch.empty((), dtype=torch.float32).element_size()
    return sum(2 * local(p).numel() * p.element_size() + counter for p in parameters)
