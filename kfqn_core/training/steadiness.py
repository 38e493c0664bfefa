"""How much of a gradient its running average keeps, and what share of a full step that is worth.

`M` averages `G` over the last `1 / (1 - momentum)` mini-batches. Of a gradient that stays as it is `M` keeps the whole
length, of pure noise `sqrt((1 - mu) / (1 + mu))` of it, 0.23 for `mu = 0.9`; a normalised step is as long for both. So
small mini-batches, and every run towards its end, would be led by noise. Layer by layer the rate is therefore at most

    share * (largest rate so far),   share = min(1, ||M|| / (KEPT rms ||G||)):

steps shorten where a schedule would have to shorten them, and where a schedule has done so they are as it says. All of
it comes from lengths that are known, or are found in one pass: those of the weights, without their biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

KEPT = 0.3  # of the gradient's length: from there on steps have their full length (benchmarks/NOTES.md)


def observe(squares: Tensor, lengths: Tensor, toward: float | Tensor, where: Tensor) -> None:
    """Take in a mini-batch.

    Args:
        squares: `[layers]`, averages of `||G||^2` from zero, with the weights that M has. Changed in place.
        lengths: `[layers]`, `||G||`; written over.
        toward: `1 - momentum`, a number or `[layers]`.
        where: bool, a scalar or `[layers]`; elsewhere nothing changes, whatever stands in `lengths`.
    """
    squares.lerp_(torch.where(where, lengths.square_(), squares), toward)


def kept(squares: Tensor, lengths: Tensor) -> Tensor:
    """What M keeps of the gradient, `||M|| / rms ||G||`, `[layers]`; not a number, or infinite, where nothing was seen.

    Both averages begin at zero. What that does to their quotient, `sqrt(1 - momentum^t)`, is over after two steps.

    Args:
        squares: `[layers]`, as `observe` leaves them.
        lengths: `[layers]`, `||M||`; written over.
    """
    return lengths.div_(squares.sqrt())


def rates(rate: Tensor, peak: float | Tensor, kept: Tensor) -> Tensor:
    """The rate of every layer, `[layers]`: `rate`, or less where M keeps little of the gradient.

    Since `rate` is at most `peak`, a share above one changes nothing.

    Args:
        rate: scalar, of this step; zero where it is skipped.
        peak: the largest rate so far.
        kept: `[layers]`; where it is not a number the rate is as it is.
    """
    return torch.fmin(rate, kept * (peak / KEPT))


class Steadiness:
    """What is kept of several layers, with their weights and momenta.

    Args:
        squares: `[layers]`, changed in place.
        weights: of the layers.
        M: momenta of the weights; may be replaced by others of the same shapes.
    """

    def __init__(self, squares: Tensor, weights: Sequence[nn.Parameter], M: Sequence[Tensor]):
        self._squares, self._weights, self.M = squares, weights, list(M)
        self._momenta: dict[tuple[float, ...], Tensor] = {}  # `[layers]`, made once: a copy waits for the device

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
            none = self._squares.new_zeros(())
            of_weights = [none if p.grad is None else lengths[p] for p in self._weights]
            taken = taken & torch.tensor([p.grad is not None for p in self._weights], device=taken.device)
        here = torch.stack(of_weights).to(self._squares.dtype)
        observe(self._squares, here, 1 - self._momentum(tuple(momenta)), taken)

    def kept(self) -> Tensor:
        """`[layers]`, of the gradient."""
        return kept(self._squares, torch.stack(torch._foreach_norm(self.M)))

    def _momentum(self, momenta: tuple[float, ...]) -> float | Tensor:
        if len(set(momenta)) == 1:
            return momenta[0]
        if momenta not in self._momenta:
            self._momenta = {momenta: self._squares.new_tensor(momenta)}
        return self._momenta[momenta]
