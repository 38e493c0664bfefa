"""The state of the optimizer in torch's form: an entry for every parameter, counters in the parameter groups.

So it passes through everything that knows `torch.optim`: `torch.save`, `torch.distributed.checkpoint`, trainers.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfqn_core.parallel.shards import RESHARDED, fits, local, part_for
from kfqn_core.training.fallback import Fallback
from kfqn_core.training.pairs import MOST
from kfqn_core.training.plan import Plan

if TYPE_CHECKING:
    from kfqn_core.training.optimizer import KFQN

COUNTERS = ("steps", "skipped_steps", "warm_started")
# Older states say nothing of the share of a guarded step, and of the layers that wait for an update.
SHARE, LATE = "step_share", "late"


@dataclass
class History:
    """What an optimizer has been through, as far as its plan and the updates of curvature depend on it.

    Attributes:
        steps: taken or skipped.
        warm_started: whether every `A` was estimated before the first of them.
        refused: names of the layers that were left to the fallback.
        anew: whether layers may have been used before there were hooks to see it, since a plan or a state is new.
    """

    steps: int = 0
    warm_started: bool = False
    refused: frozenset[str] = frozenset()
    anew: bool = False


class States(defaultdict[Tensor, Any]):
    """What is kept of every parameter. To clear it begins anew; to take one entry out would change nothing: refused."""

    def __init__(self, optimizer: KFQN):
        super().__init__(dict)
        self._optimizer = optimizer

    def clear(self) -> None:
        """Forget all that was learnt."""
        super().clear()
        self._optimizer.state = self

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "the entries of KFQN's state are views of what its layers share, and cannot be taken out one by one: "
            "clear() forgets all of them; to leave parameters to Adam, give them a group with curvature=False"
        )

    pop = popitem = __delitem__ = _refuse

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


def states(optimizer: KFQN) -> defaultdict[Tensor, Any]:
    """The state of every parameter by name, views of what the groups hold: made here, and not kept.

    Of every parameter that may move now: who loads a state asks here what there is to be loaded.
    """
    state = States(optimizer)
    if optimizer.plan is None:
        return state
    optimizer.follow()
    plan, fallback = optimizer.plan, optimizer.fallback
    for group, _ in plan.groups:
        for i, layer in enumerate(group.layers):
            state[layer.weight], bias = group.state(i)
            if layer.bias is not None:
                state[layer.bias] = bias
    for params in plan.rest:
        state.update({p: fallback.state[p] for p in params})
    return state


def begin_anew(optimizer: KFQN, state: Any) -> None:
    """What assigning an empty state means, as with Adam: momenta, curvature and counted steps are forgotten.

    Raises:
        ValueError: if the state is not empty.
    """
    if state:
        raise ValueError(
            f"the state of KFQN cannot be assigned, and got {len(state)} entries: load_state_dict restores a saved "
            "one, and an empty one forgets all that was learnt"
        )
    optimizer.plan.hooks.remove()
    optimizer.fallback = Fallback(by_adam=optimizer.fallback.by_adam)
    optimizer.plan, optimizer.history = None, History(anew=True)  # type: ignore[assignment]
    optimizer.make_plan()


def write_counters(optimizer: KFQN) -> None:
    """Into the parameter groups, where a saved state has them."""
    counters = optimizer.history.steps, optimizer.skipped_steps, optimizer.history.warm_started
    for group in optimizer.param_groups:
        group.update(dict(zip(COUNTERS, counters, strict=True)))
        group.update({SHARE: optimizer.pairs.share, LATE: tuple(sorted(optimizer.plan.late))})


def read_counters(optimizer: KFQN, counters: tuple[Any, ...]) -> None:
    """Go on from counters as `unpacked` returns them."""
    history = optimizer.history
    history.steps, skipped, history.warm_started, optimizer.pairs.share, late = counters
    optimizer.plan.late = optimizer.plan.places.keys() & set(late)
    optimizer.skips.counts.copy_(torch.tensor([skipped, 0], device="cpu"))
    history.anew = True
    optimizer.plan.watch_all()  # the first pass also tells which ranks there are


def unpacked(
    state_dict: Mapping[str, Any], own: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> tuple[dict[Tensor, Mapping[str, Tensor]], list[dict[str, Any]], tuple[Any, ...]]:
    """A saved state as the state of parameters in their order, the parameter groups, and the counters.

    Args:
        state_dict: as it was saved.
        own: the parameter groups of the optimizer that loads it.
        defaults: what stands for a setting that a saved group says nothing of, since it was saved before there was one.

    Raises:
        ValueError: if it is no state of KFQN that can be loaded, or one for other parameter groups.
    """
    if "kfqn" in state_dict:
        raise ValueError(
            "this state was saved by an earlier kfqn-core, which kept every layer by itself: load it there and save "
            "the model, or start the optimizer anew (its factors are estimated again within a few steps)"
        )
    groups = [dict(group) for group in state_dict.get("param_groups", [])]
    if not groups or any(counter not in group for group in groups for counter in COUNTERS):
        raise ValueError(
            f"this is not a state of KFQN: its keys are {sorted(state_dict)}, and a parameter group that counts "
            f"{', '.join(COUNTERS)} is needed; load what the state_dict() of a KFQN has returned"
        )
    sizes, needed = ([len(group["params"]) for group in of] for of in (groups, own))
    if sizes != needed:
        raise ValueError(
            f"the saved state is of {sum(sizes)} parameters, in groups of {sizes}, and this optimizer has "
            f"{sum(needed)}, in groups of {needed}: create KFQN with the model and the groups that it was saved with"
        )
    groups = [{**defaults, "peak_lr": group.get("lr", defaults["lr"]), **group} for group in groups]
    counters = [
        (*(group[counter] for counter in COUNTERS), group.get(SHARE, MOST), group.get(LATE, ())) for group in groups
    ]
    params, indices = ([p for group in of for p in group["params"]] for of in (own, groups))
    saved = {p: state_dict["state"].get(i, {}) for i, p in zip(indices, params, strict=True)}
    return saved, groups, counters[0]


@contextmanager
def changed_by_hooks(optimizer: KFQN, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the user's `register_load_state_dict_pre_hook` make of a saved state. Inside, torch calls them no more."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    state_dict = state_dict.copy()
    for hook in hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        yield state_dict
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


def adopt_history(optimizer: KFQN, saved: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """A plan with the layers left to Adam, and the forms of `H_a`, that a saved state has: both depend on its history.

    Raises:
        ValueError: if the state does not fit; the optimizer is then as it was.
    """
    history = optimizer.history
    before = optimizer.plan, history.refused
    try:
        with _trainable(p for p, state in saved.items() if state):
            history.refused = frozenset()
            optimizer.make_plan()
            plan = optimizer.plan
            kinds, left = forms(plan, saved)
            plan.kinds |= kinds
            plan.moved |= {name for name in plan.places if saved[plan.layer(name).weight]} - left
            history.refused = frozenset(left)
            optimizer.make_plan()
            check(optimizer.plan, optimizer.fallback, saved)
    except Exception:  # of whatever kind, where an entry is broken
        optimizer.plan, history.refused = before
        optimizer.make_plan()
        raise


@contextmanager
def _trainable(params: Iterable[Tensor]) -> Iterator[None]:
    """Inside, none of these is frozen: what was saved of one was learnt when it was not, and is kept while it is."""
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def forms(plan: Plan, saved: Mapping[Any, Mapping[str, Tensor]]) -> tuple[dict[str, str], set[str]]:
    """What a saved state says of layers that may have either form: how `H_a` was kept, and which were left to Adam.

    Returns:
        The forms by name of the layers that were saved with factors; and the names of those saved without.
    """
    kinds, left = {}, set()
    for name in plan.places:
        keys = saved[plan.layer(name).weight].keys()
        if not keys:
            continue
        if "started" not in keys:
            left.add(name)
        elif plan.options.activation_factor == "auto":
            kinds[name] = "action" if "H_a" in keys else "low_rank" if "F" in keys else "diagonal"
    return kinds, left


def check(plan: Plan, fallback: Fallback, saved: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Raise ValueError if a saved state was made with other options or for another model.

    Nothing saved of a parameter is no fault: it was frozen, and starts now.
    """
    for group, _ in plan.groups:
        for i, layer in enumerate(group.layers):
            if saved[layer.weight]:
                group.check(i, saved[layer.weight], saved[layer.bias] if layer.bias is not None else {})
    for p in (p for params in plan.rest for p in params):
        own = fallback.state[p]
        if saved[p] and (own.keys() != saved[p].keys() or not all(fits(own[key], saved[p][key]) for key in own)):
            raise ValueError(
                f"the saved state does not fit a parameter of shape {tuple(p.shape)}: it holds {sorted(saved[p])}, and "
                f"{sorted(own)} is needed; create KFQN with the model and the options it was saved with; {RESHARDED}"
            )


@torch.no_grad()
def load(plan: Plan, fallback: Fallback, saved: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Copy the saved state of every parameter. Factors keep the dtype and device they have here."""
    for group, _ in plan.groups:
        for i, layer in enumerate(group.layers):
            if saved[layer.weight]:
                group.load(i, saved[layer.weight], saved[layer.bias] if layer.bias is not None else {})
    for p in (p for params in plan.rest for p in params):
        for key, value in saved[p].items():
            own = fallback.state[p][key]
            local(own).copy_(part_for(own, value))
