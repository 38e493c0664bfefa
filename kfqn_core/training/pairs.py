"""Where the secant pairs of `H_g` come from: nowhere, from the next mini-batch, or from a second look at this one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfqn_core.estimate.hooks import Hooks
from kfqn_core.estimate.shared import AnyBatch, SharedBatch
from kfqn_core.estimate.statistics import Record, serials
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import local
from kfqn_core.training.groups import Group
from kfqn_core.training.options import Options
from kfqn_core.training.rounds import learns, where_due
from kfqn_core.training.second_pass import SecondPass


class Pairs(Protocol):
    """A source of pairs.

    Attributes:
        every_step: whether it looks at every mini-batch, and not only when curvature is updated.
        share: of a step that is taken, if it is less than one: where steps are guarded.
    """

    every_step: bool
    share: float

    def evaluate(self, closure: Callable[[], Any] | None, again: bool) -> Any:
        """Run the closure, if there is one, and return its loss; `again` if an update may follow.

        Raises:
            RuntimeError: if a closure is needed.
        """

    def before(
        self, groups: Sequence[Group], records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """Before the move: the statistics of this mini-batch that it will need, wanted; `due` are names of layers."""

    def after(
        self, groups: Sequence[Group], hooks: Hooks, records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """After the move: look again, if a layer is due; the statistics that it needs besides, wanted."""

    def learn(self, finite: Tensor, due: Collection[str]) -> None:
        """Then: update every `H_g` that is due, by the names of the layers, where the bool scalar `finite` holds."""


def source(options: Options, model: nn.Module, parameters: Callable[[], Sequence[nn.Parameter]], ranks: Ranks) -> Pairs:
    """The source that `options.pairs` names: see `options.Options`."""
    if options.pairs == "second_pass":
        return SamePoint(model, parameters, ranks, safeguard=options.safeguard)
    return NoPairs() if options.pairs is None else NextBatch()


OUTPUTS = "mean_output", "mean_gradient"


class NoPairs:
    """`H_g` is the identity."""

    every_step = False
    share: float = 1.0

    def evaluate(self, closure: Callable[[], Any] | None, again: bool) -> Any:
        """The closure's loss, or None."""
        with torch.enable_grad():
            return closure and closure()

    def before(
        self, groups: Sequence[Group], records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """Nothing."""
        return ()

    def after(
        self, groups: Sequence[Group], hooks: Hooks, records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """Nothing."""
        return ()

    def learn(self, finite: Tensor, due: Collection[str]) -> None:
        """Nothing."""


class NextBatch(NoPairs):
    """Differences of consecutive mini-batches, which cost nothing and are noisy (chapter 2)."""

    every_step = True

    def __init__(self) -> None:
        self._batches: dict[Group, AnyBatch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_batches": {}}

    def before(
        self, groups: Sequence[Group], records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """The means of outputs and gradients."""
        batches = {group: group.batch(records, outputs=True) for group in groups}
        self._batches = {group: _wanting(batch) for group, batch in batches.items() if batch is not None}
        return list(self._batches.values())

    def learn(self, finite: Tensor, due: Collection[str]) -> None:
        """Compare with the mini-batch before, and remember this one."""
        for group, batch in self._batches.items():
            taken = finite.to(group.started.device)
            where = where_due(group, due, taken) if learns(group, due) else None
            if where is not None:
                group.learn_from_next(batch, True, where)
            if where is not taken:
                group.learn_from_next(batch, False, taken)  # the others are remembered, too
        self._batches = {}


LEAST, MOST = 2.0**-20, 2.0  # of the share


class SamePoint(NoPairs):
    """The same mini-batch evaluated before and after the step: the papers' rule (chapter 8).

    Args:
        model: that the closure evaluates.
        parameters: gives the parameters of the optimizer.
        ranks: that must not notice the second evaluation.
        safeguard: whether a step that raised the loss is taken back.

    Attributes:
        share: of a step that is taken, at most the whole. It halves with every step that raised the loss, and doubles,
            up to `MOST`, with every other: one such step alone changes nothing. Several in a row do, else a method that
            has learnt a far too large `H_g` would try the same step for ever.
    """

    def __init__(
        self, model: nn.Module, parameters: Callable[[], Sequence[nn.Parameter]], ranks: Ranks, *, safeguard: bool
    ):  # fmt: skip
        self._model, self._parameters, self._ranks, self._safeguard = model, parameters, ranks, safeguard
        self._before: list[tuple[Tensor, Tensor]] = []  # parameters before the step, if it may be taken back
        self._share: float | Tensor = MOST
        self._loss: Any = None
        self._loss_after: Any = None
        self._closure: Callable[[], Any] | None = None
        self._began = 0  # the serial number of the first use of the evaluation before
        self._again: SecondPass | None = None
        self._batches: dict[Group, list[AnyBatch]] = {}  # before and after the move
        self.evaluating = False  # for the second time

    def __getstate__(self) -> dict[str, Any]:
        passing: dict[str, Any] = {
            "_closure": None,
            "_again": None,
            "_before": [],
            "_loss": None,
            "_loss_after": None,
            "_batches": {},
        }
        return {**vars(self), **passing}

    def evaluate(self, closure: Callable[[], Any] | None, again: bool) -> Any:
        """The closure's loss, for the first time.

        Raises:
            RuntimeError: without a closure, or with a safeguard and without a loss.
        """
        if closure is None:
            raise RuntimeError(
                'pairs="second_pass" evaluates the mini-batch again after the step: call step(closure) with a closure '
                "that zeroes gradients, computes the loss, calls backward and returns the loss"
            )
        self._closure, self._began, self._loss_after = closure, next(serials), None
        self._again = SecondPass(self._model, self._parameters()) if again else None
        with torch.enable_grad():
            loss = closure()
        if self._again is not None:
            self._again.protect(loss)
        if self._safeguard and again:
            if loss is None:
                raise RuntimeError("safeguard compares losses: the closure must return the loss")
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    def before(
        self, groups: Sequence[Group], records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """Nothing; where the step may be taken back, the parameters are kept: not while a layer only waits."""
        if self._safeguard and self._again is not None and due:
            self._before = [(own := local(p.detach()), own.clone()) for p in self._parameters() if p.requires_grad]
        return ()

    def after(
        self, groups: Sequence[Group], hooks: Hooks, records: Mapping[str, Record], due: Collection[str]
    ) -> Sequence[AnyBatch]:  # fmt: skip
        """Evaluate again: the means of outputs and gradients of what ran inside the closure, both times."""
        if self._again is None or self._closure is None or not due:
            self._again, self._closure = None, None
            return ()
        self._shorten()
        after = self._evaluate_again(hooks)
        self._take_back()
        before = {name: record.since(self._began) for name, record in records.items()}
        # A layer of which the two evaluations show different uses has no pair: they are not comparable.
        alike = [name for name in due if name in before and name in after and before[name].uses_alike(after[name])]
        for group in groups:
            batches = [group.batch({n: of[n] for n in alike}, outputs=True) for of in (before, after)]
            known = [_wanting(batch) for batch in batches if batch is not None]
            if len(known) == 2:
                self._batches[group] = known
        return [batch for both in self._batches.values() for batch in both]

    def learn(self, finite: Tensor, due: Collection[str]) -> None:
        """Compare."""
        for group, (before, after) in self._batches.items():
            group.learn(before, after, finite.to(group.started.device))
        self._batches = {}

    def _evaluate_again(self, hooks: Hooks) -> dict[str, Record]:
        assert self._again is not None
        assert self._closure is not None
        self.evaluating = True
        try:
            with hooks.second_pass(), self._ranks.apart():
                self._loss_after = self._again.evaluate(self._closure)
                return hooks.pop()
        except Exception as error:  # the weights have moved: a step is not half done
            warnings.warn(
                f"the second evaluation of the closure failed ({type(error).__name__}: {error}), so this step has no "
                'pair for H_g: a closure for pairs="second_pass" must be able to run twice, the second time with '
                "frozen parameters",
                stacklevel=6,
            )
            return {}
        finally:
            self.evaluating, self._again, self._closure = False, None, None

    @property
    def share(self) -> float:
        """Reading it waits for the device."""
        return float(self._share)

    @share.setter
    def share(self, value: float) -> None:
        self._share = value

    def _shorten(self) -> None:
        """Only the share of the step that is taken."""
        for p, old in self._before:
            share = torch.as_tensor(self._share, device=p.device)
            p.copy_(torch.where(share < 1, old.lerp(p, share.to(p.dtype)), p))

    def _take_back(self) -> None:
        """Every parameter as it was before the step, if the loss after it is larger than before or not a number."""
        before, self._before = self._before, []
        if not before:
            return
        device = before[0][0].device
        # A rank that could not evaluate again has no objection; it has to speak, for the others wait.
        after = self._loss if self._loss_after is None else self._loss_after
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which that device does not have
        losses = [torch.as_tensor(loss).detach().to(device, dtype) for loss in (self._loss, after)]
        first, second = self._ranks.means([torch.stack(losses)])[0].unbind()
        worse = ~(second <= first)
        for p, old in before:
            p.copy_(torch.where(worse.to(p.device), old, p))
        share = torch.as_tensor(self._share, device=device)
        changed = torch.where(worse, share / 2, share * 2).clamp(LEAST, MOST)
        self._share = torch.where(torch.isfinite(first), changed, share)  # else the loss says nothing about the step


def _wanting(batch: AnyBatch) -> AnyBatch:
    """A batch of outputs, which ranks are to share."""
    if isinstance(batch, SharedBatch):
        batch.want(*OUTPUTS)
    return batch
