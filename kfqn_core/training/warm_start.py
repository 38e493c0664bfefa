"""Estimate every `A` from forward passes alone, before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.activation import ActivationFactor
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.training.plan import Plan
from kfqn_core.training.preserve import cuda_devices, restored, run_on


@torch.no_grad()
def warm_start(model: nn.Module, plan: Plan, ranks: Ranks, batches: Iterable[Any]) -> None:
    """First estimates of all factors from the mean of `A` over `batches`; see `KFQN.warm_start`.

    A matrix is summed up and inverted once; smaller forms see one mini-batch after the other, all with equal weight.
    """
    sums: dict[str, Tensor] = {}
    samples = dict.fromkeys(plan.places, 0)
    locations = dict.fromkeys(plan.places, 0.0)
    with restored(model, cuda_devices(model.parameters())), plan.hooks.inputs_only():
        for batch in batches:
            run_on(model, batch)
            records = plan.hooks.pop()
            ranks.require_group()
            for name, (group, i) in plan.places.items():
                if name not in records:
                    raise RuntimeError(f"layer {name!r} was not used in the forward pass: freeze or remove it")
                record = records[name]
                before, samples[name] = samples[name], samples[name] + record.samples
                locations[name] += record.samples * record.T
                if isinstance(group.activation, ActivationFactor):
                    A = record.samples * record.second_moment().to(group.M.W.dtype)
                    sums[name] = sums[name] + A if name in sums else A
                else:
                    group.see(i, record, before / samples[name])
    if not any(samples.values()):
        raise ValueError("warm_start got no mini-batch; pass an iterable of inputs, e.g. (x for x, _ in loader)")
    for group in plan.layer_groups:
        names = [layer.name for layer in group.layers]
        if group.options.split:
            T = torch.tensor([locations[name] / samples[name] for name in names], dtype=torch.float64)
            group.split_damping(ranks.mean(T.to(group.started.device)).tolist())
        for i, name in enumerate(names):
            if name in sums:
                group.start_from(i, ranks.mean(sums[name] / samples[name]))
            group.settle(i)
