"""KFQN: the Kronecker-factored quasi-Newton optimizer (chapter 8).

Three strata: pure kernels (`algebra`, `secant`, `damping`), the update of one layer (`factors`, `update`), and here
what owns parameters and state and fixes the order of things. A layer `h = W a` moves along `D = H_g M H_a`, where `M`
is the momentum of its gradient matrix: `vec(D) = (H_a (x) H_g) vec(M)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from kfqn_core.estimate.hooks import Capture, Record
from kfqn_core.estimate.inverses import Change, Pair, append_pairs, damped_pairs
from kfqn_core.layers import LinearView
from kfqn_core.parallel.ranks import refuse_shards
from kfqn_core.training.groups import Layer, activation_factors, average_gradients, curvature_layers, move
from kfqn_core.training.options import check_options, of_linear_layers, refreshes
from kfqn_core.training.second_pass import SecondPass, cuda_devices, restored

# Of the mean length of the rows of D: a unit whose gradient is smaller than that is hardly used, and moves less.
ROW_FLOOR = 1e-3
SHORTEST = 1e-19  # a shorter direction counts as none: divided by its length it would be infinite in float32
ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-8
OWN = ("_layers", "_step_length", "_model", "_pairs", "_refresh", "_steps", "_warm_started", "_skipped", "_capture")


class KFQN(torch.optim.Optimizer):
    """Kronecker-factored quasi-Newton for the linear and convolutional layers of a model.

    By default it is used as Adam is: `loss.backward(); optimizer.step()`. With `pairs="second_pass"`, the papers'
    method, `step` takes a closure as `torch.optim.LBFGS` does, and evaluates it twice on the same mini-batch:

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)     # a mean over the samples of the mini-batch
            loss.backward()
            return loss
        optimizer.step(closure)

    Args:
        model: its `nn.Linear` and `nn.Conv1d/2d/3d` layers with trainable parameters of their own become curvature
            layers (see `describe`).
        lr: step length.
        pairs: `None` leaves `H_g` the identity; `"second_pass"` measures its secant pair on the same mini-batch, after
            the step; `"next_batch"` takes the difference of consecutive mini-batches instead, which costs nothing and
            is noisy (chapter 2).
        damping: lambda. Without pairs `A` carries it all, `lambda_A = lambda`; with pairs it is split.
        damping_split: `"even"`, `lambda_A = lambda_G = sqrt(lambda)` (2020); or `"locations"`,
            `lambda_A = sqrt(lambda T)` and `lambda_G = sqrt(lambda / T)` for a layer with T locations (2022).
        pair_damping: how a pair is made safe: `"double"`, Powell on `H_g`, then on the identity (2020; needs
            `lambda_G < 1`), or `"levenberg-marquardt"`, Powell on `H_g`, then `y + lambda_G s` (2021).
        activation_factor: how `H_a` is kept. `"action"`, a matrix, by Hessian action (the papers); `"low_rank"`, as a
            diagonal and `rank` directions; `"auto"`, matrices as long as the state stays below Adam's, low rank for the
            largest (`activation_factors`); `"inverse"`, a matrix inverted at every update, the slow reference.
        rank: directions of a low-rank `H_a`.
        activation_decay: weight of the past in the running average of `A`; `None` takes the action of `A` from the
            current mini-batch and keeps no `A`.
        memory: pairs kept by a limited-memory `H_g` (K-BFGS(L)); `None` keeps a dense `H_g`.
        momentum: weight of the past in the running average of the gradient (not bias-corrected). The heavy ball
            `M <- momentum M + G` takes the same raw steps at the rate `lr (1 - momentum)`, the same normalised ones
            at the same rate.
        pair_momentum: weight of the past in the running average of the secant pairs. Use 0 with full-batch gradients.
        mu1: Powell's constant for `H_g`, in (0, 1).
        weight_decay: tau, added to the gradient as `tau [W | b]`, biases included.
        decoupled_weight_decay: multiply all parameters by `1 - lr tau` instead.
        refresh: curvature is updated every `refresh` steps; only these steps pay for a second pass. `None` begins with
            every step, where curvature changes fastest, and grows the interval to ten steps (`refreshes`).
        step_length: `"raw"` moves layers by `lr D`, and other parameters by `lr` times their averaged gradient (the
            papers); `"normalised"` moves layers by `lr 0.2 sqrt(numel D) / ||D||_F D`, and others by Adam, same lr;
            `"normalised_rows"` does so for each row of D, that is for the weights of each output unit, alone.
        linear: options that differ for fully connected layers, by name: any of `activation_decay`, `pair_damping`.

    Raises:
        ValueError: for an option out of range, or a model without a supported layer.
        TypeError: for a model whose parameters are sharded (FSDP).

    `loss` must be a mean over samples (axis 0), since mean per-sample gradients are recovered from it; where
    micro-batches are accumulated, scale each loss so that the gradients add up to that of the mean. A step whose loss
    or gradient is not finite changes neither parameters nor curvature and is counted in `skipped_steps`.

    Copies and pickles: a model is copied without its optimizer, and its hooks then do nothing; `copy.deepcopy((model,
    optimizer))`, or a pickle of both, goes on as the originals do. Otherwise use `state_dict`.

    Wrappers: `model` may be wrapped by `torch.compile` or `DistributedDataParallel`, before or after. A compiled model
    leaves its graph at every curvature layer in steps that look at the mini-batch (so no `fullgraph=True`), and never
    in evaluation.
    Under `DistributedDataParallel` the statistics of these steps are averaged over ranks as gradients are: `O(d)`
    numbers per layer, `d_in^2` where `A` is kept. Every rank takes the same steps through the same layers.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        *,
        pairs: str | None = None,
        damping: float = 0.03,
        damping_split: str = "even",
        pair_damping: str = "double",
        activation_factor: str = "auto",
        rank: int = 16,
        activation_decay: float | None = None,
        memory: int | None = None,
        momentum: float = 0.9,
        pair_momentum: float = 0.9,
        mu1: float = 0.2,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        refresh: int | None = None,
        step_length: str = "normalised_rows",
        linear: Mapping[str, Any] | None = None,
    ):
        kept = {
            "damping": damping, "damping_split": damping_split, "pairs": pairs, "activation_factor": activation_factor,
            "rank": rank, "activation_decay": activation_decay, "memory": memory, "pair_damping": pair_damping,
            "pair_momentum": pair_momentum, "mu1": mu1,
        }  # fmt: skip
        stepped = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "refresh": refresh,
            "step_length": step_length,
        }  # fmt: skip
        check_options(**kept, **stepped)
        kept_linear = {**kept, **of_linear_layers(linear)}
        check_options(**kept_linear, **stepped)
        refuse_shards(model)
        modules, rest = curvature_layers(model)
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no linear or convolutional layer with trainable parameters of its own, so "
                "there is nothing for KFQN to do: unfreeze a layer, or use another optimizer"
            )
        views = [layer_view for _, layer_view in modules.values()]
        kinds = activation_factors(views, rank) if activation_factor == "auto" else [activation_factor] * len(views)
        self._layers = [
            Layer.build(
                name, module, layer_view,
                **{**(kept_linear if isinstance(layer_view, LinearView) else kept), "activation_factor": kind},
            )
            for (name, (module, layer_view)), kind in zip(modules.items(), kinds, strict=True)
        ]  # fmt: skip
        curvature = [p for layer in self._layers for p in layer.parameters]
        groups: list[dict[str, Any]] = [{"params": curvature}]
        if rest:
            groups.append({"params": list(rest.values())})
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "decoupled_weight_decay": decoupled_weight_decay})
        self._step_length = step_length
        for layer in self._layers:
            self.state[layer.weight] = layer.tensors()
        for p in rest.values():
            self.state[p] = _adam_state(p) if step_length != "raw" else {"M": torch.zeros_like(p)}
        self._model = model
        self._pairs = pairs
        self._refresh = refresh
        self._steps = 0
        self._warm_started = False
        self._skipped = torch.zeros((), dtype=torch.int64, device=curvature[0].device)
        self._capture = Capture(model, modules, outputs=pairs is not None)

    @property
    def layers(self) -> dict[str, Layer]:
        """The curvature layers by name: parameters, momentum `M` and both factors."""
        return {layer.name: layer for layer in self._layers}

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose loss or gradient was not finite. Reading it waits for the device."""
        return int(self._skipped)

    def remove_hooks(self) -> None:
        """Take every hook off the model; the optimizer cannot step afterwards."""
        self._capture.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer stands: a layer's weight and bias belong together, and to one model.

        Raises:
            ValueError: make a new `KFQN` over a module that holds all layers instead.
        """
        if hasattr(self, "_capture"):
            raise ValueError(
                "KFQN takes its parameters from a model and cannot adopt more later: create a new KFQN over a module "
                "that holds all layers, or give the new parameters to an optimizer of their own"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Tensor]) -> None:
        """Estimate every `A` from `batches` before the first step, as the 2020 method does over the whole training set.

        Args:
            batches: mini-batches of model inputs (not of pairs with targets).

        One forward pass each, without gradients; buffers and random generators are restored. `A` is the mean over
        samples, and `H_a = (A + lambda_A I)^-1`.

        Raises:
            RuntimeError: after the first step, if a layer was not used, or in one of several processes if the model is
                not wrapped by `DistributedDataParallel`: ranks must start from the same `A`.
            ValueError: if `batches` is empty.
        """
        if self._steps:
            raise RuntimeError("warm_start comes before the first step; this optimizer has already stepped")
        sums = {layer.name: torch.zeros_like(layer.activation.H) for layer in self._layers}
        locations = dict.fromkeys(sums, 0.0)
        samples = 0
        with restored(self._model, cuda_devices(self._params())), self._capture.inputs_only():
            for x in batches:
                self._model(x)
                records = self._capture.take()
                for layer in self._layers:
                    if layer.name not in records:
                        raise RuntimeError(
                            f"layer {layer.name!r} was not used in the forward pass: freeze or remove it"
                        )
                    with self._no_autocast():
                        sums[layer.name] += len(x) * records[layer.name].second_moment()
                    locations[layer.name] += len(x) * records[layer.name].T
                samples += len(x)
        if samples == 0:
            raise ValueError("warm_start got no mini-batch; pass an iterable of inputs, e.g. (x for x, _ in loader)")
        self._capture.ranks.require_acquaintance()
        for layer in self._layers:
            layer.split_damping(self._locations(layer, locations[layer.name] / samples))
            layer.activation.start(self._capture.ranks.mean(sums[layer.name] / samples))
        self._warm_started = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. Returns the closure's loss at the point before it, or None without a closure.

        Raises:
            RuntimeError: if `pairs="second_pass"` and no closure is given; or if curvature is to be updated and no
                training forward was seen.
        """
        second_pass = self._pairs == "second_pass"
        if second_pass and closure is None:
            raise RuntimeError(
                'pairs="second_pass" evaluates the mini-batch again after the step: call step(closure) with a closure '
                "that zeroes gradients, computes the loss, calls backward and returns the loss"
            )
        refresh = refreshes(self._steps, self._refresh)
        again = SecondPass(self._model, self._params()) if second_pass and refresh else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = [layer for layer in self._layers if layer.weight.grad is not None]
        records = self._records(layers)
        finite = self._capture.ranks.all(self._all_finite(loss))
        self._skipped += ~finite

        with self._no_autocast():
            for layer in layers:
                if layer.name in records:
                    self._observe_inputs(layer, records[layer.name], finite)
            self._move(layers, finite)
            self._move_rest(finite)
        changes: list[Change] = []
        if again is not None and closure is not None:
            with self._capture.frozen_parameters(), self._capture.ranks.apart():
                again.evaluate(closure)
            after = self._records(layers)
            with self._no_autocast():
                changes += [layer.change(records[layer.name], after[layer.name]) for layer in layers]
        with self._no_autocast():
            activation_pairs: list[Pair] = []
            for layer in layers:
                if self._pairs == "next_batch":
                    changes += layer.change_since_last(records[layer.name], refresh, finite)
                if refresh:
                    activation_pairs += layer.activation_pairs(records[layer.name], finite)
            append_pairs([*activation_pairs, *damped_pairs(changes, finite)], finite)
        self._steps += 1
        self._decide_watching()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; what was captured of passes not stepped on is forgotten with them."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: as `torch.optim.Optimizer`, with the model, so that both must be copied together."""
        return {**super().__getstate__(), **{key: value for key, value in vars(self).items() if key in OWN}}

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with this optimizer's counters; loads under `weights_only=True`."""
        started = [layer.activation.started for layer in self._layers]
        counters = {"steps": self._steps, "warm_started": self._warm_started, "started": started}
        return {**super().state_dict(), "kfqn": {**counters, "skipped_steps": self.skipped_steps}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`. Factors keep the dtype and device they have here.

        Raises:
            ValueError: if the state was saved by another optimizer, with other options, or for another model.
        """
        if "kfqn" not in state_dict:
            raise ValueError(f"this is not a state of KFQN: its keys are {sorted(state_dict)}")
        current = super().state_dict()["state"]
        here, saved = ({(i, k): v.shape for i, tensors in state.items() for k, v in tensors.items()}
                       for state in (current, state_dict["state"]))  # fmt: skip
        if here != saved:
            differing = sorted({key for (_, key), _ in here.items() ^ saved.items()})
            raise ValueError(
                f"the saved state does not fit this optimizer (they differ in {', '.join(differing)}): create KFQN "
                "with the model and the options (pairs, memory, activation_decay) that it was saved with"
            )
        kept = dict(self.state)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(kept)
        # Copied in place: torch's own loading would cast factors to the dtype of the parameters.
        for i, tensors in state_dict["state"].items():
            for key, value in tensors.items():
                # H y is all that an update reads of H, which therefore has to be symmetric to the last bit.
                current[i][key].copy_((value + value.mT) / 2 if key in ("H_a", "H_g") else value)
        counters = state_dict["kfqn"]
        self._steps, self._warm_started = counters["steps"], counters["warm_started"]
        self._skipped.fill_(counters["skipped_steps"])
        for layer, started in zip(self._layers, counters["started"], strict=True):
            layer.activation.started = started
        self._capture.watching = True  # the first pass also tells which ranks there are

    def _decide_watching(self) -> None:
        """Look at the mini-batches of the next step only if it needs them: between updates gradients are enough."""
        every_step = self._pairs == "next_batch" or any(
            layer.activation.A is not None or not layer.activation.started for layer in self._layers
        )
        self._capture.watching = every_step or refreshes(self._steps, self._refresh)

    def _no_autocast(self) -> torch.autocast:
        """Curvature needs its digits, also where a user's whole training step stands under autocast."""
        return torch.autocast(self._skipped.device.type, enabled=False)

    def _locations(self, layer: Layer, T: float) -> float:
        """T, which ranks must agree on where the damping depends on it: their images may differ in size."""
        ranks = self._capture.ranks
        if layer.gradient is None or layer.damping_split == "even" or ranks.alone:
            return T
        return float(ranks.mean(torch.tensor(T, dtype=torch.float64, device=layer.M.device)))  # waits for the device

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _records(self, layers: list[Layer]) -> dict[str, Record]:
        records = self._capture.take()
        unseen = [layer.name for layer in layers if self._capture.watching and layer.name not in records]
        if unseen or not layers:
            raise RuntimeError(
                f"no training forward of {unseen or 'any layer'} was seen before this step: call model.train(), run "
                "forward and backward through the model that KFQN was given, then step (a model that was compiled and "
                "run before must be compiled anew: torch.compiler.reset())"
            )
        return records

    def _all_finite(self, loss: Tensor | None) -> Tensor:
        norms = torch._foreach_norm([p.grad for p in self._params() if p.grad is not None])
        scalars = [*norms, loss.detach().reshape(())] if loss is not None else norms
        device = self._skipped.device
        return (torch.stack([scalar.to(device, torch.float32) for scalar in scalars]).abs() < torch.inf).all()

    def _observe_inputs(self, layer: Layer, record: Record, finite: Tensor) -> None:
        """The running `A`; at the first step without a warm start also `H_a`. A warm-started `A` sits that step out."""
        layer.split_damping(self._locations(layer, record.T))
        if not layer.activation.started:
            layer.activation.start_from(record)
        elif layer.activation.A is not None and not (self._warm_started and self._steps == 0):
            layer.activation.average(record.second_moment(), finite)

    def _move(self, layers: list[Layer], finite: Tensor) -> None:
        group = self.param_groups[0]
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        average_gradients(layers, decay, group["momentum"], finite)
        # All at once, which takes as much memory as the gradients for the length of this call.
        directions = [layer.direction() for layer in layers]
        _shrink([p for layer in layers for p in layer.parameters], group, finite)
        divisors = self._divisors(directions, group["lr"])
        torch._foreach_div_(divisors, finite.to(directions[0].dtype))  # infinite where the step is skipped
        move(layers, directions, divisors)

    def _divisors(self, directions: list[Tensor], lr: float) -> list[Tensor]:
        """What each D is divided by, the rate included: of one entry, or `[groups, d_out, 1]`."""
        if self._step_length == "raw":
            return list(torch._foreach_div([D.new_ones(1) for D in directions], [lr] * len(directions)))
        if self._step_length == "normalised":
            norms = list(torch._foreach_norm(directions))
        else:
            norms = [torch.linalg.vector_norm(D, dim=-1, keepdim=True) for D in directions]
            floors = torch._foreach_norm(norms, 1)
            torch._foreach_mul_(floors, [ROW_FLOOR / n.numel() for n in norms])
            torch._foreach_add_(norms, floors)
        torch._foreach_clamp_min_(norms, SHORTEST)
        per_row = self._step_length == "normalised_rows"
        sizes = [D.shape[-1] if per_row else D.numel() for D in directions]
        torch._foreach_div_(norms, [lr * 0.2 * math.sqrt(size) for size in sizes])  # a rate of 0: nothing moves
        return norms

    def _move_rest(self, finite: Tensor) -> None:
        for group in self.param_groups[1:]:
            params = [p for p in group["params"] if p.grad is not None]
            decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            _shrink(params, group, finite)
            if self._step_length != "raw":
                self._move_by_adam(params, group["lr"], decay, finite)
                continue
            for p in params:
                M = self.state[p]["M"]
                M.lerp_(torch.where(finite, p.grad.add(p, alpha=decay), M), 1.0 - group["momentum"])
                p.sub_(torch.where(finite, group["lr"] * M, 0.0))

    def _move_by_adam(self, params: list[nn.Parameter], lr: float, decay: float, finite: Tensor) -> None:
        if not params:
            return
        states = [self.state[p] for p in params]
        adam(
            list(params), [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            # The fused kernel leaves everything as it was where found_inf is 1, without asking the host.
            fused=True, found_inf=(~finite).float(), amsgrad=False,
            beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], lr=lr, weight_decay=decay, eps=ADAM_EPS, maximize=False,
        )  # fmt: skip


def _adam_state(p: nn.Parameter) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _shrink(params: list[nn.Parameter], group: dict[str, Any], finite: Tensor) -> None:
    """Decoupled weight decay: `p <- (1 - lr tau) p`, where `finite` holds."""
    if group["decoupled_weight_decay"] and group["weight_decay"]:
        for p in params:
            p.sub_(torch.where(finite, group["lr"] * group["weight_decay"] * p, 0.0))
