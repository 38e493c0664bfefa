"""How much of a gradient its running average keeps, and what share of a full step that is worth.

`M` averages `G` over the last `1 / (1 - momentum)` mini-batches. Of a gradient that stays as it is `M` keeps the whole
length, of pure noise `sqrt((1 - mu) / (1 + mu))` of it, 0.23 for `mu = 0.9`; a normalised step is as long for both. So
small mini-batches, and every run at a constant rate towards its end, would be led by noise. Layer by layer the rate is

    rate * share,   share = min(1, ||M|| / (KEPT mean ||G||)),

with the mean that has the weights of M; by the triangle inequality M keeps at most all. The share follows the gradients
while the rate stands at its largest so far. Once a schedule lowers the rate it stays as it is: steps then fall as the
schedule says, and not twice. All of it comes from lengths that are known, or are found in one pass: those of the
weights, without their biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

KEPT = 0.5  # of the gradient's length: from there on steps have their full length (benchmarks/NOTES.md)
# Of its largest value: from there on a rate stands at it. Less than one, since schedules round, and a constant rate
# that a warm-up has led to is to be known as one.
STANDS = 0.99


def observe(means: Tensor, lengths: Tensor, toward: float | Tensor, where: Tensor) -> None:
    """Take in a mini-batch.

    Args:
        means: `[layers]`, averages of `||G||` from zero, with the weights that M has. Changed in place.
        lengths: `[layers]`, `||G||`.
        toward: `1 - momentum`, a number or `[layers]`.
        where: bool, a scalar or `[layers]`; elsewhere nothing changes, whatever stands in `lengths`.
    """
    means.lerp_(torch.where(where, lengths, means), toward)


def kept(means: Tensor, lengths: Tensor) -> Tensor:
    """What M keeps of the gradient, `||M|| / mean ||G||`, `[layers]`; no finite number where nothing was seen.

    Args:
        means: `[layers]`, as `observe` leaves them.
        lengths: `[layers]`, `||M||`; written over.
    """
    return lengths.div_(means)


def shares(kept: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Of a full step, `[layers]`: one where M keeps `KEPT` or more, or where that is not a number; `kept` is written
    over."""
    return torch.fmin(kept.div_(KEPT), torch.ones((), dtype=kept.dtype, device=kept.device), out=out)


def stands(rate: float | Tensor, peak: float | Tensor) -> bool | Tensor:
    """Whether a rate stands at its largest value so far."""
    return rate >= STANDS * peak


class Steadiness:
    """What is kept of several layers, with their weights and momenta.

    Args:
        state: `[layers, 2]`, the mean length of the gradient and the share, changed in place.
        weights: of the layers.
        M: momenta of the weights; may be replaced by others of the same shapes.
    """

    def __init__(self, state: Tensor, weights: Sequence[nn.Parameter], M: Sequence[Tensor]):
        self._means, self._shares = state.unbind(-1)
        self._weights, self.M = weights, list(M)
        self._by_layer: dict[tuple[float, ...], Tensor] = {}  # `[layers]`, made once: a copy waits for the device

    def observe(self, lengths: Mapping[nn.Parameter, Tensor], momenta: Sequence[float], taken: Tensor) -> None:
        """Take in a mini-batch, for layers whose weight has a gradient.

        Args:
            lengths: of gradients, scalars by parameter.
            momenta: of every layer.
            taken: bool scalar, whether the step is taken.
        """
        if all(p.grad is not None for p in self._weights):
            of_weights = [lengths[p] for p in self._weights]
        else:
            none = self._means.new_zeros(())
            of_weights = [none if p.grad is None else lengths[p] for p in self._weights]
            taken = taken & torch.tensor([p.grad is not None for p in self._weights], device=taken.device)
        here = torch.stack(of_weights).to(self._means.dtype)
        observe(self._means, here, 1 - self._of_layers(momenta), taken)

    def shares(self, standing: Sequence[bool | Tensor]) -> Tensor:
        """Of a full step, `[layers]`: what the momenta are worth, or have been while the rate stood at its largest.

        Args:
            standing: of every layer, whether the rate of its weight does.
        """
        here = standing[0]
        if any(isinstance(value, Tensor) for value in standing):
            if any(value is not here for value in standing):
                device = self._shares.device
                here = torch.stack([torch.as_tensor(value, device=device).reshape(()) for value in standing])
        elif not any(standing):
            return self._shares
        elif not all(standing):
            here = self._of_layers([float(value) for value in standing]) > 0
        of_M = kept(self._means, torch.stack(torch._foreach_norm(self.M)))
        if isinstance(here, Tensor):
            self._shares.copy_(torch.where(here, shares(of_M), self._shares))
        else:
            shares(of_M, out=self._shares)
        return self._shares

    def _of_layers(self, numbers: Sequence[float]) -> float | Tensor:
        """One number, if it is that of every layer, else `[layers]`."""
        key = tuple(numbers)
        if len(set(key)) == 1:
            return key[0]
        if key not in self._by_layer:
            self._by_layer[key] = self._means.new_tensor(key)
        return self._by_layer[key]
