"""The parameters of an optimizer: what torch.optim takes, for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.parallel.shards import is_shard, require_spread
from kfqn_core.training.options import check_group


def require_model(model: Any) -> None:
    """Raise TypeError, with what to do, unless `model` is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"KFQN observes the layers of a model, and got a {type(model).__name__} as its first argument: pass the "
            "model, KFQN(model), and parameters or groups of them as KFQN(model, params=...)"
        )


def groups_of(model: nn.Module, params: Iterable[Any] | None) -> list[Any]:
    """What `torch.optim.Optimizer` is to get: `params`, or if that is None every parameter of the model.

    Raises:
        ValueError: if a parameter has no size yet.
        TypeError: if `params` is a single tensor.
    """
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"{lazy[0]!r} does not know its size yet: run one forward pass before the optimizer is made")
    if params is None:
        return [{"params": list(model.parameters())}]
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or of group dicts, got one tensor: pass [tensor]")
    return list(params)


def device_of(params: Sequence[Tensor]) -> torch.device:
    """That of the first; the CPU if there is none."""
    return params[0].device if params else torch.device("cpu")


def trains(p: nn.Parameter) -> bool:
    """Whether a parameter moves, or will: what has a gradient does, though it was frozen since, as with Adam."""
    return p.requires_grad or p.grad is not None


def completed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with the defaults for what it does not say, and the largest rate that it has had.

    Raises:
        ValueError: for a value out of range.
    """
    merged = {**defaults, **group}
    if not merged["curvature"] and "lr" not in group:
        merged["lr"] = merged["fallback_lr"]
    check_group(merged)
    peak = merged["lr"].clone() if isinstance(merged["lr"], Tensor) else merged["lr"]
    return {**merged, "peak_lr": peak}


def refuse_sparse(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError if a gradient is sparse."""
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which neither Adam nor KFQN moves: "
                "make its embedding with sparse=False, or leave it out (KFQN(model, params=[...])) and give it to "
                "torch.optim.SparseAdam"
            )


def owned(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """`named_parameters`, with the modules that hold them."""
    modules = dict(model.named_modules())
    return {name: (modules[name.rpartition(".")[0]], p) for name, p in model.named_parameters()}


def follow(
    model: nn.Module, groups: list[dict[str, Any]], known: Mapping[str, tuple[nn.Module, nn.Parameter]],
    replace: Callable[[nn.Parameter, nn.Parameter], None], *, whole: bool,
) -> list[nn.Parameter]:  # fmt: skip
    """Bring parameter groups up to date with the model: parameters that were replaced, and, if `whole`, added ones.

    Args:
        model: as it is now.
        groups: of the optimizer, changed in place.
        known: the parameters of the model by name, as they were (`owned`).
        replace: told of every parameter that is gone and the one that its module has in its place. What is new with its
            module takes the place in the groups alone.
        whole: whether the first group is every parameter of the model that is in no other.

    Returns:
        The parameters that are new in the groups, and in nobody's place.

    Raises:
        TypeError: if parameters are sharded over processes and were not, or the other way round.
    """
    require_spread(model, any(is_shard(p) for group in groups for p in group["params"]))
    now = owned(model)
    # What is still there under another name (a layer was inserted or taken out before it) was not replaced.
    here, before = {id(p) for _, p in now.values()}, {id(p) for _, p in known.values()}
    replaced = [
        (owner, old, *now[name]) for name, (owner, old) in known.items()
        if name in now and id(old) not in here and id(now[name][1]) not in before
    ]  # fmt: skip
    new_of = {id(old): new for _, old, _, new in replaced}
    held = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        group["params"] = [new_of.get(id(p), p) for p in group["params"]]
    if whole:
        others = {id(p) for group in groups[1:] for p in group["params"]}
        groups[0]["params"] = [p for p in model.parameters() if id(p) not in others]
        groups[0].pop("param_names", None)
    for owner, gone, now_owner, new in replaced:
        if owner is now_owner:
            replace(gone, new)
            held.add(id(new))
    return [p for group in groups for p in group["params"] if id(p) not in held]


def follow_peaks(groups: Sequence[dict[str, Any]]) -> None:
    """Keep the largest rate that every parameter group has had so far, a number or a tensor as the rate is."""
    for group in groups:
        rate, peak = group["lr"], group["peak_lr"]
        if isinstance(peak, Tensor):
            peak.copy_(torch.maximum(peak, torch.as_tensor(rate, dtype=peak.dtype, device=peak.device)))
        elif isinstance(rate, Tensor):
            group["peak_lr"] = rate.clone().clamp_min_(peak)
        else:
            group["peak_lr"] = max(peak, rate)
