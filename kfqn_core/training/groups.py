"""Layers of one shape as one tensor: their momenta, factors and pairs (chapter 8).

A group holds L layers whose matrices `[W | b]` are `[groups, d_out, d_in]` alike. Their momenta, factors and pairs lie
side by side along axis 0, `B = L groups`, so that a step costs a few operations for each shape and not for each layer
(`moves`). The bias column lies apart (`maths.columns`). `plain_step` is the step of one layer, as the formulas say it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.activation import Activation
from kfqn_core.estimate.gradient import GradientFactor
from kfqn_core.estimate.shared import AnyBatch, SharedBatch
from kfqn_core.estimate.statistics import Batch, Record
from kfqn_core.maths.columns import Columns
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import RESHARDED, fits, is_shard, local, part_for, shard_like, whole
from kfqn_core.training.answer import Answer
from kfqn_core.training.factors import Factors, Sizes, restricted
from kfqn_core.training.options import Options
from kfqn_core.training.selection import Selected, dtype_of_factors


def plain_step(
    W: Tensor, M: Tensor, G: Tensor, H_a: Tensor, H_g: Tensor | None, *,
    lr: float, momentum: float, weight_decay: float, length: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of one layer, without a trick: the new `W` and `M`.

    Args:
        W, M, G: `[W | b]`, its momentum and its gradient, `[groups, d_out, d_in]`.
        H_a, H_g: the factors, `[groups, d_in, d_in]` and `[groups, d_out, d_out]`, or None for the identity.
        lr, momentum, weight_decay: of the parameter group; the decay is coupled.
        length: one of the plain forms in `length`.
    """
    M = momentum * M + (1 - momentum) * (G + weight_decay * W)
    D = M @ H_a if H_g is None else H_g @ M @ H_a
    return W - lr * length(D), M


class Group:
    """L layers of one shape, with the same options and parameter groups.

    Args:
        layers: what `selection` found, with equal `shape_key`.
        kind: the form of their activation factor.
        options: of these layers.
        ranks: over which statistics are averaged.
        device: of the state, if not that of the weights: on "meta" a group is a plan that takes no memory.
        owner: the rank that keeps the factors; None where all do.

    Attributes:
        M: the momentum, `[B, d_out, d]` with the bias column apart.
        factors: on "meta" where another rank keeps them.
        held: whether this rank keeps them.
        steady: `[L, 2]`, what `steadiness` keeps of every layer; None where the length of a step does not ask for it.
        started: bool `[L]`, whether `H_a` has had its first estimate.
        shards: where parameters are sharded, this rank's part of the momentum of each; empty where they are not.
        unsettled: the layers of which the host does not know that they have.
    """

    def __init__(
        self, layers: Sequence[Selected], kind: str, options: Options, ranks: Ranks,
        device: torch.device | None = None, owner: int | None = None,
    ):  # fmt: skip
        self.layers, self.kind, self.options, self.ranks = list(layers), kind, options, ranks
        view, weight = layers[0].view, layers[0].weight
        self.groups = view.groups
        B = len(layers) * view.groups
        device = device or weight.device
        like: dict[str, Any] = {"dtype": dtype_of_factors(weight), "device": device}
        self._T = [1.0] * len(layers)
        d = view.d_in - view.has_bias
        shapes = (B, view.d_out, d), (B, view.d_out, 1)
        self.shards = {
            p: torch.zeros(local(p).shape, **like) for layer in layers for p in layer.parameters if is_shard(p)
        }
        if self.shards:  # the whole is there while the layers move, else a number that takes its shape
            W, b = (torch.zeros((), **like).expand(shape) for shape in shapes)
        else:
            W, b = (torch.zeros(shape, **like) for shape in shapes)
        self.M = Columns(W, b if view.has_bias else None)
        self.owner, self.held = owner, owner is None or owner == ranks.rank
        self.factors = self._new_factors(device if self.held else torch.device("meta"))
        self.steady: Tensor | None = None
        if options.step_length == "normalised_rows":
            self.steady = torch.tensor([0.0, 1.0], **like).repeat(len(layers), 1)
        self.started = torch.zeros(len(layers), dtype=torch.bool, device=device)
        self.unsettled = set(range(len(layers)))
        self._answer: Answer | None = None

    def _new_factors(self, device: torch.device) -> Factors:
        """As they are before anything was seen."""
        B, view = len(self.layers) * self.groups, self.layers[0].view
        like = {"dtype": dtype_of_factors(self.layers[0].weight), "device": device}
        return Factors(self.kind, Sizes(B, view.d_in, view.d_out), self.options, like)

    @property
    def activation(self) -> Activation:
        """`H_a`."""
        return self.factors.activation

    @property
    def gradient(self) -> GradientFactor | None:
        """`H_g`, None where it is the identity."""
        return self.factors.gradient

    def momentum(self, side: int) -> Tensor:
        """Of the weights (side 0) or of the biases (1)."""
        M = self.M[side]
        assert M is not None
        return M

    def set_momentum(self, side: int, M: Tensor) -> None:
        """Another tensor in its place."""
        self.M = self.M._replace(b=M) if side else self.M._replace(W=M)

    def momentum_of(self, side: int, i: int) -> Tensor:
        """Of a parameter of layer i, shaped like it: a view where strides can say so; of a shard a copy, a shard."""
        p = self.parameters(side)[i]
        if p in self.shards:
            return shard_like(p, self.shards[p].clone())  # torch saves no DTensor that begins inside its memory
        return self.as_parameter(side, i, self.momentum(side)[self.rows(i)])

    def momentum_of_layer(self, i: int) -> Tensor:
        """Of `[W | b]` of layer i, `[groups, d_out, d_in]`; where it is sharded every rank has to ask."""
        parts = [self.as_rows(side, i, whole(self.momentum_of(side, i))) for side in range(1 + (self.M.b is not None))]
        return Columns(parts[0], parts[1] if len(parts) > 1 else None).joined()

    @property
    def momenta(self) -> list[Tensor]:
        """What is held of them."""
        return list(self.shards.values()) or [part for part in self.M if part is not None]

    def rows(self, i: int) -> slice:
        """Those of layer i along axis 0."""
        return slice(i * self.groups, (i + 1) * self.groups)

    def has_gradient(self) -> bool:
        """Whether any of its parameters has one."""
        return any(p.grad is not None for layer in self.layers for p in layer.parameters)

    # -- its part in the step

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Layers L, groups, d_out and d_in."""
        view = self.layers[0].view
        return len(self.layers), view.groups, view.d_out, view.d_in

    def direction(self, out: Tensor | None = None) -> Tensor:
        """`D = H_g M H_a`, `[B, d_out, d_in]`: the inverse of the Kronecker-factored Hessian applied to `M`."""
        if self.gradient is None:
            return self.activation.precondition(self.M, out=out)
        D = self.gradient.inverse.apply(self.activation.precondition(self.M))
        return D if out is None else out.copy_(D)

    def parameters(self, side: int) -> list[nn.Parameter | None]:
        """The weights (side 0) or the biases (1) of the layers."""
        return [layer.bias if side else layer.weight for layer in self.layers]

    def as_rows(self, side: int, i: int, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter of layer i as part of `[W | b]`: `[groups, d_out, d]` or `[..., 1]`."""
        view = self.layers[i].view
        return tensor.reshape(view.groups, view.d_out, 1) if side else view.rows_of(tensor)

    def as_parameter(self, side: int, i: int, rows: Tensor) -> Tensor:
        """The opposite of `as_rows`."""
        return rows.reshape(-1) if side else self.layers[i].view.weight_of(rows)

    # -- curvature

    def batch(self, records: Mapping[str, Record], *, outputs: bool = False) -> AnyBatch | None:
        """The statistics of these layers, of inputs or of `outputs`; None where no rank can have seen one."""
        if not records and self.ranks.alone:
            return None
        own = [records.get(layer.name) for layer in self.layers]
        batch = Batch([layer.view for layer in self.layers], own, self.M.W, outputs=outputs)
        if not self.ranks.alone:
            return SharedBatch(batch, self.ranks)
        return batch if any(batch.seen) else None

    def starts(self, batch: AnyBatch, elsewhere: Collection[str] = ()) -> bool:
        """Whether a layer without a first estimate was seen, here or, by its name, on another rank."""
        return any(batch.seen[i] or self.layers[i].name in elsewhere for i in self.unsettled)

    def observe(self, batch: AnyBatch, finite: Tensor, *, average: bool, elsewhere: Collection[str] = ()) -> None:
        """Damping for the locations of this mini-batch, first estimates, and the running `A` if `average`.

        Args:
            batch: the mini-batch.
            finite: bool scalar, where nothing is learnt if it does not hold.
            average: whether a running `A` takes it in.
            elsewhere: names of layers that some rank has seen: which start is the same on all.
        """
        if self.options.split:
            self.split_damping(batch.locations())
        averaging = self.activation.every_step and average
        settled = self._rows_started().clone() if averaging else None  # [B], before this mini-batch
        if self.starts(batch, elsewhere):
            self._start(batch, finite)
        if settled is not None and self.held:
            self.activation.average(batch, self._where(batch, finite) & settled)

    def ask(self) -> None:
        """Settle the layers of which the host has learnt by now that they have a first estimate."""
        # Ranks wait for it, as all have to go the same way; it was asked for a step ago.
        known = self._answer and self._answer.known(wait=not self.ranks.alone)
        if known:
            self.unsettled -= {i for i, started in enumerate(known) if started}
            self._answer = None

    def _start(self, batch: AnyBatch, finite: Tensor) -> None:
        """First estimates, where there are none; whether they were good is asked for and not waited for."""
        self.ask()
        if not self.unsettled:
            return
        where = self._where(batch, finite) & ~self._rows_started()
        # A first estimate depends on means alone, so all make it and know whether it is good; its owner keeps it.
        activation = self.activation if self.held else self._new_factors(self.started.device).activation
        activation.damping = self.activation.damping  # of the locations of this mini-batch
        good = activation.start(batch, where).view(-1, self.groups).all(1)  # [L]
        self.started |= good
        self._answer = Answer(self.started)

    def start_from(self, i: int, A: Tensor) -> None:
        """The first estimate of layer i from a formed `A` `[groups, d_in, d_in]`."""
        self.layer_activation(i).start_from(A, torch.ones(self.groups, dtype=torch.bool, device=A.device))
        self.settle(i)

    def see(self, i: int, record: Record, past: float) -> None:
        """Layer i's running estimate takes in a mini-batch; what came before weighs `past`, and 0 begins anew."""
        factor, here = self.layer_activation(i), Batch([self.layers[i].view], [record], self.M.W)
        batch = here if self.ranks.alone else SharedBatch(here, self.ranks)
        where = torch.ones(self.groups, dtype=torch.bool, device=self.started.device)
        if past == 0:
            factor.start(batch, where)
        else:
            factor.update(batch, where, past)

    def settle(self, i: int) -> None:
        """Layer i has its first estimate."""
        self.started[i] = True
        self.unsettled.discard(i)

    def learn(self, before: AnyBatch, after: AnyBatch, finite: Tensor) -> None:
        """What `H_g` learns from the same mini-batch before and after the step."""
        if not self.held:
            return
        assert self.gradient is not None
        with self.no_autocast():
            g_mean = before.mean_gradient()
            s, y = after.mean_output() - before.mean_output(), after.mean_gradient() - g_mean
            self.gradient.update(s, y, g_mean, self._where(after, self._where(before, finite)))

    def learn_from_next(self, batch: AnyBatch, refresh: bool, finite: Tensor) -> None:
        """What `H_g` learns from this mini-batch and the one before, if `refresh`; then this one is remembered."""
        if not self.held:
            return
        h_last, g_last = self.factors.h_last, self.factors.g_last
        assert self.gradient is not None
        assert h_last is not None
        assert g_last is not None
        with self.no_autocast():
            where = self._where(batch, finite)
            h, g = batch.mean_output(), batch.mean_gradient()
            if refresh:
                self.gradient.update(h - h_last, g - g_last, g_last, where)
            h_last.copy_(torch.where(where[:, None], h, h_last))
            g_last.copy_(torch.where(where[:, None], g, g_last))

    def no_autocast(self) -> torch.autocast:
        """Curvature needs its digits, also where a user's whole training step stands under autocast."""
        return torch.autocast(self.started.device.type, enabled=False)

    def split_damping(self, T: Sequence[float]) -> None:
        """`lambda_A` and `lambda_G` for layers with these numbers of locations."""
        if list(T) == self._T:
            return
        self._T = list(T)
        lambdas = [self.options.lambdas(t) for t in T for _ in range(self.groups)]
        alike = len(set(T)) == 1
        lambda_A = [a for a, _ in lambdas]
        self.activation.damping = lambda_A[0] if alike else self.M.W.new_tensor(lambda_A).unsqueeze(1)
        if self.gradient is not None:
            self.gradient.damping = lambdas[0][1] if alike else [b for _, b in lambdas]

    def updating(self, batch: AnyBatch, finite: Tensor) -> Tensor:
        """Bool `[B]`: where `finite` holds, and the layer was seen and has been started."""
        return self._where(batch, finite.to(self.started.device)) & self._rows_started()

    def _rows_started(self) -> Tensor:
        """`started` of the rows along axis 0, bool `[B]`."""
        return self.started if self.groups == 1 else self.started.repeat_interleave(self.groups)

    def _where(self, batch: AnyBatch, finite: Tensor) -> Tensor:
        """Bool `[B]`: where `finite` (a scalar or `[B]`) holds and the layer was seen."""
        everywhere = finite.expand(self.M.W.shape[0])
        return everywhere if batch.present is None else everywhere & (batch.present > 0)

    # -- state

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the momentum that lives from one step to the next, by name, `[B, ...]` each."""
        return self.factors.tensors()

    def state(self, i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Views of what belongs to the weight of layer i and to its bias, by name."""
        rows = self.rows(i)
        own = {name: tensor[rows] for name, tensor in self.tensors().items()}
        weight = {"M": self.momentum_of(0, i), **own, "started": self.started[i]}
        if self.steady is not None:
            weight["steady"] = self.steady[i]
        return weight, {} if self.M.b is None else {"M": self.momentum_of(1, i)}

    def check(self, i: int, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless these tensors are the state of layer i by name and shape."""
        for what, own, saved in zip(("weight", "bias"), self.state(i), (weight, bias), strict=True):
            differing = sorted(
                key for key in {*own, *saved} if key not in own or key not in saved or not fits(own[key], saved[key])
            )
            if differing:
                raise ValueError(
                    f"the saved state does not fit the {what} of layer {self.layers[i].name!r} (they differ in "
                    f"{', '.join(differing)}): create KFQN with the model and the options (pairs, memory, "
                    f"activation_factor, activation_decay) that it was saved with; {RESHARDED}"
                )

    def load(self, i: int, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor]) -> None:
        """Copy the state of layer i from tensors as `state` gives them, of whatever dtype and device."""
        own, _ = self.state(i)
        for side, saved in enumerate((weight, bias)):
            for key, value in saved.items():
                if key == "M":
                    self.load_momentum(i, side, value)
                else:
                    # H y is all that an update reads of H, which therefore has to be symmetric to the last bit.
                    own[key].copy_((value + value.mT) / 2 if key in ("H_a", "H_g") else value)
        self._answer = Answer(self.started)
        self.unsettled.add(i)

    def load_momentum(self, i: int, side: int, M: Tensor) -> None:
        """Copy the momentum of one parameter of layer i, shaped like it.

        What `state` gives of it is no view where the layer stores its weight in an order that strides do not describe.
        """
        p = self.parameters(side)[i]
        if p in self.shards:
            self.shards[p].copy_(part_for(p, M))
        else:
            self.momentum(side)[self.rows(i)].copy_(self.as_rows(side, i, M))

    def layer_activation(self, i: int) -> Activation:
        """The activation factor of layer i alone: views."""
        return restricted(self.activation, self.rows(i))

    def layer_gradient(self, i: int) -> GradientFactor | None:
        """The gradient factor of layer i alone: views."""
        return None if self.gradient is None else restricted(self.gradient, self.rows(i))
