"""What was seen: which uses of a layer reached its gradient (chapters 8 and 9).

A use of a layer counts when, and only when, a backward that accumulates into the layer's weight reaches *that use*.
One forward hook per layer notes the use; a tensor hook on the pre-activation `h` hears when backward comes by; and a
hook on the weight, after its gradient was accumulated, makes the use count. So a forward that nobody differentiates, a
gradient by the inputs, or an inner derivative of a penalty leave no trace, whichever part of a model was called. What
entered a gradient that was cleared since, by whomever, is forgotten with it.

Which forward a use belongs to does not matter: see `statistics`.

Until backward comes, the input belongs to the graph of its pass, as a saved tensor: it goes with the graph, and
activation checkpointing drops and recomputes it as it does with all others. Afterwards it is kept until the step,
thinned where its layer's factor can do with less, or where memory is the reason for what the user does: where
micro-batches are accumulated, and where activations are recomputed.

Where parameters are sharded, a forward has whole ones in their place, and uses count when the shard has its gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfqn_core.estimate import graph
from kfqn_core.estimate.registered import AccumulatedHook, ForwardHook, remove
from kfqn_core.estimate.statistics import Record, Use, serials, thin, version_of
from kfqn_core.layers import Call, Part
from kfqn_core.layers.view import dtype_of_sums
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import is_shard

FEW = 256  # input vectors, or as many numbers, that are kept of a layer where memory is short
SMALL = 2**22  # entries of an input that is copied rather than trusted not to be written over


class Hooks:
    """The hooks on all layers of a model, and what they have seen since `pop`.

    The modules know this object weakly, and only those that it was made for: neither a deleted optimizer nor a copy of
    the model writes anywhere. Nothing of this package is in a pickle of the model. Copies and pickles of this object
    hook themselves into the modules that were copied along.

    Under `torch.compile` a forward that is watched leaves the graph at every layer, so that `fullgraph=True` cannot be.
    Inside a transform of `torch.func` nothing is seen.

    Args:
        layers: by name, the module and which of its matrices (see `layers.parts`), each with the view that its
            statistics are taken with.
        outputs: whether sums of `h` and of its gradient are wanted; without them only inputs are kept.
        ranks: told which processes run the layers.
        last: those of before: who watches a matrix that is still there goes on, with what it has seen, under
            whatever name; the others are removed. If all of them were (`remove`), nothing is registered again.
    """

    def __init__(
        self, layers: Mapping[str, tuple[nn.Module, Part]], *, outputs: bool, ranks: Ranks | None = None,
        last: Hooks | None = None,
    ):  # fmt: skip
        self.ranks, self.removed = ranks or Ranks(), False
        before = {} if last is None else {watch.matrix: watch for watch in map(last.__getitem__, last)}
        self._watches: dict[str, Watch] = {}
        for name, (module, part) in layers.items():
            watch = before.get((module, part.weight))
            if watch is None or not watch.watches(part):
                watch = Watch(module, part, outputs=outputs, ranks=self.ranks)
            self._watches[name] = watch
        for watch in set(before.values()).difference(self._watches.values()):
            watch.remove()
        if last is not None and last.removed:
            self.remove()

    def __getitem__(self, name: str) -> Watch:
        return self._watches[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._watches)

    def pop(self) -> dict[str, Record]:
        """What was seen since the last call, by layer."""
        records = {name: watch.pop() for name, watch in self._watches.items()}
        return {name: record for name, record in records.items() if record is not None}

    def clear(self) -> None:
        """Forget what was seen."""
        for watch in self._watches.values():
            watch.clear()

    def remove(self) -> None:
        """Take every hook off the model, for good."""
        self.removed = True
        for watch in self._watches.values():
            watch.remove()

    @contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Every forward counts, with or without gradients: the warm start."""
        with self._mode("inputs"):
            yield

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """For a pass in which no parameter requires a gradient: its graph starts at the first layer's output."""
        with self._mode("second pass"):
            yield

    @contextmanager
    def _mode(self, mode: str) -> Iterator[None]:
        for watch in self._watches.values():
            watch.clear()
            watch.mode = mode
        try:
            yield
        finally:
            for watch in self._watches.values():
                watch.clear()
                watch.mode = "gradient"


class Watch:
    """One matrix of one module that is watched.

    Attributes:
        watching: while false, nothing is noted.
        vectors: how many input vectors are kept at most; None keeps all, where memory is not short.
        noticed: whether a forward was ever seen, with or without gradient.
        empty: whether a forward without samples was seen since the last step.
        error: what went wrong with the statistics last, if anything did; a user's forward and backward go on.
        mode: `"gradient"`: uses count whose gradient reaches the weight. `"second pass"`: uses that backward reaches.
            `"inputs"`: every forward.
    """

    # What keeps the tracer of torch.compile out costs more than the observation itself: only where there is one. Made
    # when first needed: it costs a second at import.
    observe_eagerly: Callable[..., Any] | None = None

    def __init__(self, module: nn.Module, part: Part, *, outputs: bool, ranks: Ranks):
        self.vectors: int | None = None
        self.part, self.outputs = part, outputs
        self._module, self._ranks = module, ranks
        self._register()

    def _register(self) -> None:
        self.watching, self.noticed = True, False  # the first pass also tells which ranks there are
        self.mode, self.error = "gradient", ""
        self.clear()
        self._weight = self._module.get_parameter(self.part.weight)
        self._sharded = is_shard(self._weight)
        if Watch.observe_eagerly is None:
            Watch.observe_eagerly = staticmethod(graph.uncompiled(Watch.observe))
        this = weakref.ref(self)
        handles = [
            # The first of all: what it sees is the output of the layer, before anybody's hook has changed it.
            self._module.register_forward_hook(ForwardHook(this), with_kwargs=True, prepend=True),
            graph.hear_accumulation(self._weight, AccumulatedHook(this)),
        ]
        self._memory = self._weight._cdata
        self.remove = weakref.finalize(self, remove, handles)  # at the latest when the optimizer is gone

    def __getstate__(self) -> dict[str, Any]:
        return {key: vars(self)[key] for key in ("vectors", "part", "outputs", "_module", "_ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    @property
    def matrix(self) -> tuple[nn.Module, str]:
        """Of which module, and by which weight."""
        return self._module, self.part.weight

    def watches(self, part: Part) -> bool:
        """Whether it can go on for this part of its module: the same weight, of the same size with its bias."""
        own, view = self.part.view, part.view
        alike = (own.groups, own.d_out, own.d_in) == (view.groups, view.d_out, view.d_in)
        return alike and self.remove.alive and self._module.get_parameter(part.weight) is self._weight

    def clear(self) -> None:
        """Forget what was seen; a pass that backward has yet to reach lives in its graph."""
        self.empty = False
        self._uses: list[Use] = []
        self._passing: dict[int, graph.Passing] = {}  # backwards that have yet to come to the weight, by their number
        self._captured: list[Use] = []  # by `autograd.grad` for the weight, which accumulates nothing
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None  # after the last accumulation, and its version
        self._accumulations = 0
        self._thinned = False
        self._size: Tensor | None = None  # norm of the gradient after the last accumulation, if outputs are wanted

    @property
    def pending(self) -> bool:
        """Whether something was seen that counts."""
        return bool(self._uses or self._captured or (self._sharded and self._passing))

    def pop(self) -> Record | None:
        """What was seen since the last call; None if that is nothing. `empty` stays."""
        uses = self._uses or self._captured  # the latter: gradients that were taken by autograd.grad, and assigned
        if self.mode == "gradient" and self._weight.grad is None:
            uses = []  # dropped since, or never assigned
        size, empty = self._size, self.empty
        # DistributedDataParallel writes every gradient; what it was before is known where outputs are wanted.
        touched = not self._sharded and (self.outputs or self._ranks.alone) and self._cleared(others=0)
        self.clear()
        self.empty = empty
        for use in uses:
            use.check()
        return Record(self.part.view, uses, size_then=size, touched=touched) if uses else None

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note a forward. Returns what is to replace the output, or None."""
        if self._foreign(module):
            return None
        call = self.part.call(module, args, kwargs, output)
        if call is None:
            return None
        self._ranks.notice()
        self.noticed = True
        if self._memory != self._weight._cdata:  # the parameter is the same, and what is in it was swapped
            graph.hear_again(self._weight)
            self._memory = self._weight._cdata
        if self.mode == "inputs":
            self._count_forward(call)
            return None
        h, replacement, zero = call.h, None, None
        if self.mode == "second pass" and h is output:
            # Parameters are frozen: the graph starts here, and what accumulates into this zero is the loss's backward.
            zero = h.new_zeros((), requires_grad=True)
            h = replacement = h + zero
        if not h.requires_grad or not (self._weight.requires_grad or self.mode == "second pass"):
            return replacement
        enclosing = torch._C._current_graph_task_id()  # of the backward that recomputes this forward, or -1
        if enclosing == -1 and self.pending and not self._thinned:
            # Another forward before the step: a micro-batch was accumulated. Its inputs make room for the next one's.
            of_shards = graph.together(self._passing.values()).uses if self._sharded else []
            thin(self._uses + self._captured + of_shards, entries=FEW * self.part.view.d_in)
            self._thinned = True
        leaf = self._read_by(module) if zero is None else zero
        sight = _Sight(self, call, leaf, recomputed=enclosing != -1)
        if sight.samples and isinstance(call.x, Tensor):
            graph.hear(h, sight)
        elif sight.samples:
            h.register_hook(sight)  # it reads the node below, which may not hold it: nobody frees that circle
        else:
            self.empty = True
        return replacement

    def _foreign(self, module: nn.Module) -> bool:
        """Whether this is not the layer: a replica, other weights in its place, a per-sample gradient."""
        weight = self._read_by(module)
        own = weight is self._weight or (self._sharded and isinstance(weight, nn.Parameter))
        return module is not self._module or not own or torch._C._are_functorch_transforms_active()

    def _read_by(self, module: nn.Module) -> Any:
        """The weight of a forward."""
        owner, _, name = self.part.weight.rpartition(".")
        return module.get_submodule(owner)._parameters.get(name)

    def _count_forward(self, call: Call) -> None:
        if not isinstance(call.x, Tensor):
            return
        x = self.part.view.batched(call.x.detach())
        if x.shape[0]:
            self._uses.append(Use(x, self.part.view.locations(x), version=version_of(x)))

    def reached(self, sight: _Sight, grad: Tensor) -> None:
        """Backward has come to a use: note it, and what the gradient is, until it has come to the weight."""
        counts = graph.reach(sight.leaf)
        if counts == "no":
            return
        task = torch._C._current_graph_task_id()
        passing = self._passing.setdefault(task, graph.Passing()) if counts == "yes" else graph.Passing()
        passing.accumulations = self._accumulations  # first: another thread may come between the two lines
        passing.stale = self._cleared(others=len(self._passing.keys() - {task}))
        last = None if sight.use is None else sight.use()
        known = not passing.stale and any(last is use for use in self._uses)  # an earlier backward has been here
        again = last is not None and known and counts != "captured"
        use = last if again and last is not None else sight.new_use(self.vectors)
        if self.outputs and sight.shows_h:
            g_sum = self.part.view.sum_output(self.part.view.batched(grad))
            use.g_sum = g_sum if use.g_sum is None else use.g_sum + g_sum  # several losses, several backwards
        if counts == "captured":
            self._captured.append(use)
            self._thinned = False
        elif use is not last:
            sight.use = weakref.ref(use)  # weak: the graph, which owns the sight, may live for long
            if self.mode == "second pass":
                self._uses.append(use)
            else:
                passing.uses.append(use)
                self._thinned = self._thinned and not self._sharded

    def _cleared(self, others: int) -> bool:
        """Whether the gradient is no longer the one that the uses so far have entered.

        So many `others` are on their way to the weight, and may have added to it, and not yet said so.
        """
        if self.mode == "second pass":
            return False
        grad = self._weight.grad
        if grad is None or self._gradient is None:
            return True
        last, version = self._gradient
        return last() is not grad or not 0 <= grad._version - version <= others

    def accumulated(self) -> None:
        """The gradient of the weight is there: what this backward has reached counts."""
        grad = self._weight.grad
        if self._sharded:  # its gradient is made of that of the whole when torch finds it time: after some backwards
            passing = graph.together(self._passing.values())
            self._passing.clear()
        else:
            passing = self._passing.pop(torch._C._current_graph_task_id(), graph.Passing())
        if grad is None or not (passing.uses or self.pending):
            return
        # Another backward, of another thread or of a checkpoint inside this one, may have come here since this one
        # looked at the gradient: what it has added is no sign that the gradient was cleared.
        cleared = passing.stale and passing.accumulations == self._accumulations
        # A gradient that has a graph of its own (create_graph) is added to by a new tensor.
        replaced = self._gradient is not None and self._gradient[0]() is not grad and not torch.is_grad_enabled()
        if cleared or replaced:
            self._uses.clear()
            self._captured.clear()
        self._uses += passing.uses
        self._thinned = False
        self._accumulations += 1
        self._gradient = weakref.ref(grad), grad._version
        if self.outputs and not self._sharded:
            self._size = torch.linalg.vector_norm(grad.detach(), dtype=dtype_of_sums(grad))


class _Sight:
    """A tensor hook on the `h` of one use, which hears of its gradient. The graph owns it, and through it the input."""

    def __init__(self, watch: Watch, call: Call, leaf: Tensor, *, recomputed: bool):
        view = watch.part.view
        self.leaf = leaf  # into which a backward that counts accumulates
        self.watch, self.view, self.shows_h, self.recomputed = weakref.ref(watch), view, call.shows_h, recomputed
        self.serial = next(serials)
        self.use: weakref.ref[Use] | None = None
        self.h_sum: Tensor | None = None
        self.input: Callable[[], Tensor] | None = None
        self.origin: StorageWeakRef | None = None  # the memory of the input, if the input is known in forward
        self.from_data = False
        self.samples = self.T = 1  # of an input that is known in backward only: until then
        if isinstance(call.x, Tensor):
            x = view.batched(call.x.detach())
            self.samples = x.shape[0]
            if self.samples == 0:
                return
            self.T = view.locations(x)
            self.from_data = call.x.grad_fn is None
            if watch.mode == "gradient":
                self.input, self.origin = graph.Saved(x), StorageWeakRef(x.untyped_storage())
        elif watch.mode == "gradient":
            self.input = call.x
        if watch.outputs and call.shows_h:
            self.h_sum = view.sum_output(view.batched(call.h.detach()))

    def __call__(self, grad: Tensor) -> None:
        watch = self.watch()
        if watch is None:
            return
        try:
            watch.reached(self, grad)
        except Exception as error:  # whatever is wrong with the statistics, the user's backward goes on
            watch.error = f"{type(error).__name__}: {error}"

    def new_use(self, vectors: int | None) -> Use:
        """The use, its input thinned to about `vectors`; without it if the input was written over since the forward."""
        use = Use(None, self.T, self.samples, h_sum=self.h_sum, serial=self.serial)
        if self.input is None:
            return use
        try:
            x = self.input()
        except RuntimeError:  # autograd's own check of versions
            return use
        if not isinstance(self.input, graph.Saved):
            x = self.view.batched(x)
            use.samples = x.shape[0]
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.input = None  # the graph is passed for the last time, and its other tensors are freed as well
        use.x, use.version = x, version_of(x)
        if self.recomputed or (self.origin is not None and self.origin.expired()):
            # It was dropped, packed or moved to the host since the forward: memory is short.
            thin([use], entries=FEW * self.view.d_in)
        if vectors is not None:
            thin([use], vectors=vectors)
        if self.from_data and use.each == 1 and x.numel() <= SMALL:
            use.x, use.version = x.clone(), 0  # a buffer of the user's, who may fill it again before the step
        return use
