"""What the optimizer says about itself: how much of a model its factors cover, and what its state costs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from kfqn_core.estimate.statistics import Record
from kfqn_core.training.fallback import Fallback
from kfqn_core.training.plan import Plan, adam_bytes

if TYPE_CHECKING:
    from kfqn_core.training.optimizer import KFQN

FEW = 0.5  # the share of weights with curvature below which a word is due


def covered_share(plan: Plan) -> float:
    """The share of the trainable numbers that move with curvature."""
    covered = sum(p.numel() for group, _ in plan.groups for layer in group.layers for p in layer.parameters)
    rest = sum(p.numel() for params in plan.rest for p in params)
    return covered / max(1, covered + rest)


def summary(plan: Plan, fallback: Fallback) -> str:
    """One line: coverage, layers, and the state against Adam's."""
    params = [p for group, _ in plan.groups for layer in group.layers for p in layer.parameters]
    params += [p for of_group in plan.rest for p in of_group]
    shapes = {(*group.size[1:], group.M.b is not None) for group, _ in plan.groups}
    ratio = plan.state_bytes(fallback) / max(1, adam_bytes(params))
    return (
        f"curvature for {covered_share(plan):.0%} of the weights, in {len(plan.places)} layers of "
        f"{len(shapes)} shapes; state {ratio:.2f} of Adam's"
    )


def judge_coverage(plan: Plan, fallback: Fallback, model: nn.Module) -> None:
    """Warn if less than half of the trainable weights have curvature, naming the kinds that hold the rest.

    Raises:
        ValueError: if none has.
    """
    if not plan.places:
        raise ValueError(
            f"{type(model).__name__} has no layer with trainable parameters of its own that is h = W a, so there is "
            "nothing for KFQN to do: unfreeze a layer, name one in params, or use another optimizer"
        )
    say_coverage(plan, fallback, model, stacklevel=4)


def say_coverage(
    plan: Plan, fallback: Fallback, model: nn.Module, *, before: float = 1.0, stacklevel: int
) -> None:  # fmt: skip
    """Warn if less than half of the trainable weights have curvature, naming the kinds that hold the rest.

    Args:
        plan, fallback, model: of the optimizer.
        before: the share that had curvature until now; where that was less than half it has been said.
        stacklevel: of the user's line.
    """
    share = covered_share(plan)
    if share >= FEW or before < FEW:
        return
    rest = {id(p) for params in plan.rest for p in params}
    kinds: Counter[str] = Counter()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) in rest:
                kinds[type(module).__name__] += p.numel()
    named = ", ".join(kind for kind, _ in kinds.most_common(3))
    warnings.warn(
        f"KFQN has curvature for {share:.0%} of this model's weights; the rest, mostly in {named}, moves "
        f"{fallback.how}. kfqn_core.layers.register adds a kind of layer; describe(model) lists every parameter",
        stacklevel=stacklevel,
    )


def judge_unseen(optimizer: KFQN, records: Mapping[str, Record]) -> set[str]:
    """Leave layers to the fallback, and say so, whose weight has a gradient that none of their forwards explains.

    Args:
        optimizer: whose layers they are.
        records: of what was seen.

    Returns:
        Names of the layers without a first estimate that some rank has seen.

    Raises:
        RuntimeError: if no layer was ever seen; else it is a warning.
    """
    plan, before = optimizer.plan, optimizer.history.refused
    unseen, elsewhere = plan.survey(records)
    anew, optimizer.history.anew = optimizer.history.anew, False
    names = [] if anew else plan.unexplained(unseen)
    if not names:
        return elsewhere
    errors = "; ".join(sorted({plan.hooks[name].error for name in names} - {""}))
    if not before and len(names) == len(plan.places):
        raise RuntimeError(
            f"no forward of any layer was seen before this step (of {names[0]!r}, for instance): run forward and "
            "backward through the model that KFQN was given, and through its modules, not copies of them; a model that "
            f"was compiled and run before KFQN was made must be compiled anew (torch.compiler.reset()). {errors}"
        )
    warnings.warn(
        f"{', '.join(names)}: the weight has a gradient, but no forward of the layer explains it (something else reads "
        f"the weight, or its input is no h = W a): it moves {optimizer.fallback.how}. {errors}",
        stacklevel=6,
    )
    optimizer.leave(names)
    return elsewhere
