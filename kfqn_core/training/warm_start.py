"""Estimate every `A` from forward passes alone, before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.activation import ActivationFactor
from kfqn_core.layers.attention import graph_of_its_own, out_projection
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.training.plan import Plan
from kfqn_core.training.preserve import cuda_devices, restored, run_on


@torch.no_grad()
def warm_start(model: nn.Module, plan: Plan, ranks: Ranks, batches: Iterable[Any]) -> None:
    """First estimates of all factors from the mean of `A` over `batches`; see `KFQN.warm_start`.

    A matrix is summed up and inverted once; smaller forms see one mini-batch after the other, all with equal weight.

    An `out_proj` of attention whose input stays hidden (in a compiled module, or under hooks of one's own on saved
    tensors) is left as it is: it starts from its first mini-batch, as all layers do without a warm start.

    Raises:
        RuntimeError: if another layer was not used by a mini-batch.
        ValueError: if there is no mini-batch.
    """
    sums: dict[str, Tensor] = {}
    samples = dict.fromkeys(plan.places, 0)
    locations = dict.fromkeys(plan.places, 0.0)
    layers = {name: plan.layer(name) for name in plan.places}
    hidden = {name: layer.module for name, layer in layers.items() if layer.part.call is out_projection}
    # In this order: what `graph_of_its_own` takes away in a hook, the hooks of the plan have seen before.
    with (
        restored(model, cuda_devices(model.parameters())),
        plan.hooks.inputs_only(),
        graph_of_its_own(hidden.values()),
    ):
        for batch in batches:
            run_on(model, batch)
            records = plan.hooks.pop()
            ranks.require_group()
            for name, (group, i) in plan.places.items():
                if name not in records:
                    if name in hidden:
                        continue
                    error = plan.hooks[name].error
                    raise RuntimeError(
                        f"layer {name!r} was not used in the forward pass: freeze or remove it"
                        + (f" (its input was not understood: {error})" if error else "")
                    )
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
            means = [locations[name] / samples[name] if samples[name] else 1.0 for name in names]
            T = torch.tensor(means, dtype=torch.float64)
            group.split_damping(ranks.means([T.to(group.started.device)])[0].tolist())
        for i, name in enumerate(names):
            if name in sums:
                group.start_from(i, ranks.means([sums[name] / samples[name]])[0])
            if samples[name]:
                group.settle(i)
