"""How much of a gradient its running average keeps, and what share of a full step that is worth.

`M` averages `G` over the last `1 / (1 - momentum)` mini-batches. Of a gradient that stays as it is `M` keeps the whole
length, of pure noise `sqrt((1 - mu) / (1 + mu))` of it, 0.23 for `mu = 0.9`; a normalised step is as long for both. So
small mini-batches, and every run towards its end, would be led by noise. Layer by layer the rate is therefore at most

    share * (largest rate so far),   share = min(1, ||M|| / (KEPT rms ||G||)):

steps shorten where a schedule would have to shorten them, and where a schedule has done so they are as it says. All of
it comes from lengths that are known, or are found in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

KEPT = 0.3  # of the gradient's length: from there on steps have their full length (benchmarks/NOTES.md)


def observe(kept: Tensor, squares: Tensor, momentum: float | Tensor, where: Tensor) -> None:
    """Take in a mini-batch.

    Args:
        kept: `[layers]`, averages of `||G||^2` from zero, with the weights that M has. Changed in place.
        squares: `[layers]`, `||G||^2`.
        momentum: a number, or `[layers]`.
        where: bool, `[layers]` or a scalar; elsewhere nothing changes, whatever stands in `squares`.
    """
    kept.copy_(torch.where(where, kept.lerp(squares, 1 - momentum), kept))


def shares(kept: Tensor, squares: Tensor) -> Tensor:
    """Of the full length of a step, what every layer takes, `[layers]`; all of it where nothing was seen.

    Both averages begin at zero. What that does to their quotient, `sqrt(1 - momentum^t)`, is over after two steps.

    Args:
        kept: `[layers]`.
        squares: `[layers]`, squared lengths of `M`; written over.
    """
    return squares.div_(kept).sqrt_().div_(KEPT).nan_to_num_(nan=1.0).clamp_max_(1.0)


class Steadiness:
    """What is kept of several layers, with their parameters and momenta.

    Args:
        kept: `[layers]`, changed in place.
        weights: of the layers.
        biases: of those that have one, by the position of the layer.
        M: momenta of the weights, then of the biases.
    """

    def __init__(
        self, kept: Tensor, weights: Sequence[nn.Parameter], biases: Mapping[int, nn.Parameter], M: Sequence[Tensor]
    ):
        self.kept, self._weights, self._biases, self._M = kept, weights, biases, list(M)
        self._params = [*weights, *biases.values()]
        self._of_bias = torch.tensor(list(biases), dtype=torch.long, device=kept.device)
        self._momenta: dict[tuple[float, ...], Tensor] = {}  # `[layers]`, made once: a copy waits for the device

    def observe(self, lengths: Mapping[nn.Parameter, Tensor], momenta: Sequence[float], finite: Tensor) -> None:
        """Take in a mini-batch where the bool scalar `finite` holds, for layers whose weight has a gradient.

        Args:
            lengths: of gradients, scalars by parameter.
            momenta: of every layer.
            finite: bool scalar.
        """
        if all(p.grad is not None for p in self._params):
            of_params, where = [lengths[p] for p in self._params], finite.to(self.kept.device)
        else:
            none = self.kept.new_zeros(())
            of_params = [none if p.grad is None else lengths[p] for p in self._params]
            moving = torch.tensor([p.grad is not None for p in self._weights], device=self.kept.device)
            where = finite.to(self.kept.device) & moving
        observe(self.kept, self._squares(of_params), self._momentum(tuple(momenta)), where)

    def shares(self) -> Tensor:
        """`[layers]`, of the full length of a step."""
        return shares(self.kept, self._squares(torch._foreach_norm(self._M)))

    def _momentum(self, momenta: tuple[float, ...]) -> float | Tensor:
        if len(set(momenta)) == 1:
            return momenta[0]
        if momenta not in self._momenta:
            self._momenta = {momenta: self.kept.new_tensor(momenta)}
        return self._momenta[momenta]

    def _squares(self, lengths: Sequence[Tensor]) -> Tensor:
        """Squared lengths of weights and biases together, `[layers]`."""
        squares = torch.stack(list(lengths)).to(self.kept.dtype).square_()
        own = squares[: len(self._weights)]
        return own.index_add_(0, self._of_bias, squares[len(self._weights) :]) if self._biases else own
