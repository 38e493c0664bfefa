"""KFQN: the Kronecker-factored quasi-Newton optimizer (chapter 8).

Three strata: pure kernels (`maths`), the state and the part of layers of one shape (`groups`, with `factors`), and here
what fixes the order of things. A layer `h = W a` moves along `D = H_g M H_a`, where `M` is the momentum of its gradient
matrix: `vec(D) = (H_a (x) H_g) vec(M)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.registered import before_forward
from kfqn_core.estimate.statistics import Record
from kfqn_core.training import checkpoint, parameters
from kfqn_core.training.fallback import Fallback
from kfqn_core.training.finite import Skips, look_at_gradients
from kfqn_core.training.layer import Layer
from kfqn_core.training.options import Options, refreshes
from kfqn_core.training.owned import ranks_of, refuse_copies, whole
from kfqn_core.training.pairs import SamePoint, source
from kfqn_core.training.plan import Plan
from kfqn_core.training.report import covered_share, judge_coverage, judge_unseen, say_coverage, summary
from kfqn_core.training.rounds import first_round, second_round, seen, update
from kfqn_core.training.warm_start import warm_start

OWN = ("_options", "_model", "_whole", "ranks", "fallback", "plan", "history", "pairs", "skips", "_names", "_removed")


class KFQN(torch.optim.Optimizer):
    """Kronecker-factored quasi-Newton for the layers of a model that are `h = W a`, and Adam for the rest.

    By default it is used as Adam is: `loss.backward(); optimizer.step()`. With `pairs="second_pass"`, the papers'
    method, `step` takes a closure as `torch.optim.LBFGS` does, one that zeroes gradients, computes the loss, calls
    backward and returns the loss, and evaluates it twice on the same mini-batch.

    Args:
        model: whose layers are observed; `describe(model)` says which get factors.
        lr: step length of these layers; a number, or a tensor with one.
        params: what `torch.optim` takes: parameters, named parameters, or group dicts with an `lr`, `momentum`,
            `weight_decay`, `fallback_lr`, `betas` or `eps` of their own; `"curvature": False` leaves a group to Adam,
            with the group's `lr` as Adam's. `None` is every parameter that the model has, now or later.
        momentum: weight of the past in the running average of the gradient (not bias-corrected). The heavy ball
            `M <- momentum M + G` takes the same raw steps at the rate `lr (1 - momentum)`, the same normalised ones
            (of full length) at the same rate.
        weight_decay: tau.
        decoupled_weight_decay: multiply parameters by `1 - lr tau`; else `tau [W | b]` is added to the gradient.
        fallback_lr: Adam's rate for parameters without factors. It follows the schedule of `lr`: it is multiplied by
            `lr` over the largest `lr` that the group has had.
        betas, eps: Adam's.
        process_group: the processes that average this model's gradients, if neither `DistributedDataParallel` nor
            `fully_shard` does it.
        method: the options of the method, by name: see `options.Options`.

    Raises:
        TypeError: for something else than a model, an unknown option, or parameters that are sharded in another way
            than `fully_shard` does over a mesh of one dimension (`FullyShardedDataParallel`, tensor parallelism).
        ValueError: for an option out of range, or a model without a layer to be observed.

    `loss` must be a mean over samples, since mean per-sample gradients are recovered from it; where micro-batches are
    accumulated, scale each loss so that the gradients add up to that of the mean. Every row that a fully connected
    layer sees is a sample, whatever axes they are arranged in. A step whose loss or gradient is not finite changes
    neither parameters nor curvature and is counted in `skipped_steps`.

    Whatever has a gradient moves, whenever it was unfrozen, added or replaced. A model is copied and pickled without
    its optimizer; `copy.deepcopy((model, optimizer))`, or a pickle of both, goes on as the originals do. Wrappers
    (`torch.compile`, `DistributedDataParallel`) may come before or after: a compiled model leaves its graph at every
    watched layer, and statistics are averaged over ranks as gradients are. `fully_shard` comes before.
    """

    _device: torch.device | None = None  # of the state, if not that of the parameters
    _unlook: Any = None  # ends the look before every forward; copies take it up with their first step

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.03,
        params: Iterable[Any] | None = None,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        fallback_lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        process_group: Any = None,
        **method: Any,
    ):
        parameters.require_model(model)
        self._options = Options.of_keywords(method)
        self._model, self._whole = model, params is None
        self.ranks = ranks_of(model, process_group, self._options)
        self.fallback = Fallback(by_adam=self._options.step_length != "raw")
        self.plan: Plan = None  # type: ignore[assignment]
        self.history, self._removed = checkpoint.History(), False
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fallback_lr": fallback_lr, "betas": betas,
            "decoupled_weight_decay": decoupled_weight_decay, "eps": eps, "curvature": True,
        }  # fmt: skip
        super().__init__(parameters.groups_of(model, params), defaults)
        self.skips = Skips(self._device or parameters.device_of(self._params()))
        self.pairs = source(self._options, model, self._params, self.ranks)
        self.make_plan()
        judge_coverage(self.plan, self.fallback, model)
        self._require_hooks()

    @property
    def layers(self) -> dict[str, Layer]:
        """The curvature layers by name: parameters, momentum `M` and both factors."""
        return {name: Layer(group, i) for name, (group, i) in self.plan.places.items()}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over its scale: the gradients in the pairs are as backward left them."""
        return self._options.pairs is not None

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose loss or gradient was not finite. Reading it waits for the device."""
        return int(self.skips.counts[0])

    def __repr__(self) -> str:
        return f"KFQN: {summary(self.plan, self.fallback)}\n{super().__repr__()}"

    def remove_hooks(self) -> None:
        """Take every hook off the model; the optimizer cannot step afterwards."""
        self._removed = True
        if self._unlook is not None:
            self._unlook()
        self.plan.hooks.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; with `"curvature": False` the group moves by Adam.

        Raises:
            ValueError: for a value out of range.
        """
        group = parameters.completed(param_group, self.defaults)
        super().add_param_group({**group, **dict.fromkeys(checkpoint.COUNTERS, 0)})

    def warm_start(self, batches: Iterable[Any]) -> None:
        """Estimate every `A` from `batches` before the first step, as the 2020 method does over the whole training set.

        One forward pass each, without gradients; buffers and random generators are restored. `A` is the mean over
        samples, and `H_a = (A + lambda_A I)^-1`.

        Args:
            batches: mini-batches of model inputs (not of pairs with targets): a tensor, a tuple of positional
                arguments, or a dict of keywords.

        Raises:
            RuntimeError: after the first step, if a layer was not used, or in one of several processes if nothing has
                told which of them train the model: ranks must start from the same `A`.
            ValueError: if `batches` is empty.
        """
        self._require_hooks()
        if self.history.steps:
            raise RuntimeError("warm_start comes before the first step; this optimizer has already stepped")
        self.follow()
        with self.plan.no_autocast(), whole(self.plan.layer_groups):
            warm_start(self._model, self.plan, self.ranks, batches)
        self.history.warm_started = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss at the point before it, or None without a closure.

        Raises:
            RuntimeError: before anything moved: without a closure if `pairs="second_pass"`; if no layer was ever seen
                in a forward; if a gradient is sparse; or if nobody said whether other processes train this model.
        """
        refresh = refreshes(self.history.steps, self._options.refresh)
        loss = self.pairs.evaluate(closure, refresh or bool(self.plan.late))
        records, moving, elsewhere = self._prepare()
        finite, lengths = look_at_gradients(self, moving, records, loss)
        due = self.plan.due(records, refresh=refresh)
        parameters.follow_peaks(self.param_groups)
        groups, history = self.plan.layer_groups, self.history
        average = history.steps > 0 or not history.warm_started  # that A sits one step out

        with self.plan.no_autocast():
            batches = seen(groups, records, elsewhere, average=average, due=due)
            finite = first_round(self.ranks, [*batches.values(), *self.pairs.before(groups, records, due)], finite)
            self.skips.count(finite)
            for group, batch in batches.items():
                group.observe(batch, finite.to(group.started.device), average=average, elsewhere=elsewhere)
            lengths = self.plan.whole_lengths(lengths)
            for moves in self.plan.moves:
                moves.average(self.param_groups, finite, lengths, drop=refresh)  # M <- mu M + (1 - mu) (G + tau W)
                moves.move(self.param_groups, finite)  # D = H_g M H_a; W <- W - lr length(D)
            for params, settings in zip(self.plan.rest, self.param_groups, strict=True):
                self.fallback.move([p for p in params if p.grad is not None], settings, finite)
        pairs = self.pairs.after(groups, self.plan.hooks, records, due)
        with self.plan.no_autocast():
            probes = second_round(self.ranks, batches, due, pairs)
            self.pairs.learn(finite, due)  # H_g <- BFGS(H_g, pair)
            update(batches, finite, due, probes)  # H_a <- BFGS(H_a, pair)
        self.advance()
        return loss

    def advance(self) -> None:
        """A step was taken: look at what the next one needs, and say so if too many were skipped."""
        self.history.steps += 1
        self.plan.watch(refreshes(self.history.steps, self._options.refresh), every_step=self.pairs.every_step)
        self.skips.warn(self.history.steps)

    def _prepare(self) -> tuple[dict[str, Record], list[nn.Parameter], set[str]]:
        """Whatever may fail, fails here. What was seen, parameters with a gradient, and names: see `Plan.survey`."""
        self._require_hooks()
        for p in self.follow():
            p.grad = None  # of before it was held: not seen, nor unscaled by a GradScaler
        records = self.plan.hooks.pop()
        self.ranks.require_group()
        elsewhere = judge_unseen(self, records)
        parameters.refuse_sparse(moving := self.plan.moving())
        return records, moving, elsewhere

    def _require_hooks(self) -> None:
        if self._removed:
            raise RuntimeError("the hooks of this optimizer were removed, so that it sees nothing: make a new KFQN")
        if self._unlook is None:
            self._unlook = before_forward(self._model, self)

    def follow(self, *, running: bool = False) -> list[nn.Parameter]:
        """A new plan, if model or groups have changed; see `Plan.holds`. Returns parameters that were not there."""
        if self.plan.holds(self.param_groups, running=running):
            return []
        covered = covered_share(self.plan)
        added = parameters.follow(self._model, self.param_groups, self._names, self.fallback.replace, whole=self._whole)
        self.make_plan()
        self.skips.follow(self._device or parameters.device_of(self._params()))
        self.history.anew = True  # uses may have come before the hooks that would have seen them
        say_coverage(self.plan, self.fallback, self._model, before=covered, stacklevel=7)
        return added

    def leave(self, names: Iterable[str]) -> None:
        """Leave layers to the fallback, by name."""
        if names := frozenset(names):
            self.history.refused |= names
            self.make_plan()

    def make_plan(self) -> None:
        """A plan for the model and the parameter groups as they are, to which goes along what was learnt."""
        self.plan = Plan(self._model, self._options, self.param_groups, self.ranks, self.fallback, self.history.refused,
                         self.plan, self._device)  # fmt: skip
        self._names = parameters.owned(self._model)

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; what was seen of passes not stepped on is forgotten with them."""
        if isinstance(self.pairs, SamePoint) and self.pairs.evaluating:
            return  # the gradients of the first evaluation are still needed, and the second makes none
        super().zero_grad(set_to_none)
        self.plan.hooks.clear()
        self.follow(running=True)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of every parameter by name: views of what groups own; on "meta" what other ranks keep."""
        return checkpoint.states(self)

    @state.setter
    def state(self, value: Any) -> None:
        """An empty one begins anew, as it does with Adam: momenta, curvature and counted steps are forgotten."""
        if self.plan is not None:  # else torch's own, while this object is made
            checkpoint.begin_anew(self, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: as `torch.optim.Optimizer`, with the model, so that both must be copied together."""
        refuse_copies(self.plan.layer_groups)
        return {k: v for k, v in super().__getstate__().items() if k != "state"} | {key: vars(self)[key] for key in OWN}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with counters in groups; loads under `weights_only=True`. With `owners` every rank calls it."""
        self.follow()  # before torch numbers the parameters
        checkpoint.write_counters(self)
        with whole(self.plan.layer_groups):
            return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`. Factors keep the dtype and device they have here.

        Raises:
            ValueError: if the state was saved by another optimizer, with other options, or for another model.
        """
        self.follow()
        with checkpoint.changed_by_hooks(self, state_dict) as state_dict:
            saved, groups, counters = checkpoint.unpacked(state_dict, self.param_groups, self.defaults)
            checkpoint.adopt_history(self, saved)
            super().load_state_dict({"state": {}, "param_groups": groups})
        checkpoint.load(self.plan, self.fallback, saved)
        checkpoint.read_counters(self, counters)
