"""Damping: change a secant pair `(s, y)` as little as needed for a safe BFGS update.

A loss that is not convex, or one measured on a mini-batch, gives pairs with `s^T y <= 0`, after which the inverse
estimate would not be positive definite. Each function takes vectors `[..., n]` (leading dimensions are a batch of
independent pairs) and returns the damped `(s, y)`; where nothing needs to change, it returns the values it was given.
A pair of zeros stays a pair of zeros. Nothing here reads a tensor's value on the host.

All raise TypeError for vectors that are no tensors of one real dtype on one device or a `mu` that is no Python number,
and ValueError for vectors of different shapes or a `mu` out of its range. What a damping guarantees is in `bounds`.
"""

import math

import torch
from torch import Tensor


def powell_on_inverse(H_y: Tensor, s: Tensor, y: Tensor, mu1: float) -> tuple[Tensor, Tensor]:
    """Powell's damping applied to the inverse estimate `H`: move `s` towards `H y` until `s^T y >= mu1 y^T H y`.

    Where `s^T y < mu1 y^T H y`, the new step is `theta s + (1 - theta) H y` with the largest `theta` that reaches
    equality (D_P of K-BFGS, Goldfarb, Ren & Bahamou 2020; bounds in chapter 7). `H` is positive definite; `H_y` is
    `H y`, so that a limited-memory `H` serves as well as a matrix. `mu1` in (0, 1), usually 0.2.
    """
    check_vectors(H_y=H_y, s=s, y=y)
    _check_fraction(mu1, "mu1", "0.2 is the usual value")
    yHy = (y * H_y).sum(-1, keepdim=True)
    return _interpolate(s, H_y, (s * y).sum(-1, keepdim=True), yHy, mu1), y


def powell_on_identity(s: Tensor, y: Tensor, mu2: float) -> tuple[Tensor, Tensor]:
    """Powell's damping with the identity as Hessian estimate: move `y` towards `s` until `s^T y >= mu2 |s|^2`.

    Where `s^T y < mu2 |s|^2`, the new difference is `theta y + (1 - theta) s` with the largest `theta` that reaches
    equality (Powell 1978, with B = I). `mu2` must be in (0, 1): from 1 on, the `theta` of the formula leaves [0, 1] and
    `y` is extrapolated instead of damped, without bound where `s^T y` is near `|s|^2`.
    """
    check_vectors(s=s, y=y)
    _check_fraction(
        mu2,
        "mu2",
        "from 1 on, theta leaves [0, 1] and y is extrapolated instead of damped; "
        "lower the damping of G, or use levenberg_marquardt, which takes any positive mu2",
    )
    ss = (s * s).sum(-1, keepdim=True)
    return s, _interpolate(y, s, (s * y).sum(-1, keepdim=True), ss, mu2)


def levenberg_marquardt(s: Tensor, y: Tensor, mu2: float) -> tuple[Tensor, Tensor]:
    """Add `mu2` I to the Hessian that the pair measures: `y + mu2 s`, always, for any `mu2 > 0`.

    It raises `s^T y` by `mu2 |s|^2` and so makes it positive only where `s^T y > -mu2 |s|^2` (D_LM of Ren, Bahamou &
    Goldfarb 2021; chapter 7).
    """
    check_vectors(s=s, y=y)
    if not isinstance(mu2, (int, float)):
        raise TypeError(f"mu2 must be a Python number, got {type(mu2).__name__}")
    if not (0 < mu2 < math.inf):
        raise ValueError(f"mu2 must be positive and finite, got {mu2!r}")
    return s, y + mu2 * s


def double_damping(H_y: Tensor, s: Tensor, y: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """`powell_on_inverse`, then `powell_on_identity` on its result: the damping of K-BFGS (2020).

    Afterwards `s^T y >= mu2 |s|^2`, whatever the pair was, and `y^T H y <= (1/sqrt(mu1) + sqrt(mu2 |H|))^2 s^T y`.
    """
    s, y = powell_on_inverse(H_y, s, y, mu1)
    return powell_on_identity(s, y, mu2)


def _interpolate(vector: Tensor, safe: Tensor, product: Tensor, safe_product: Tensor, mu: float) -> Tensor:
    """`theta vector + (1 - theta) safe`, so that `theta product + (1 - theta) safe_product = mu safe_product`."""
    triggered = product < mu * safe_product
    # Where triggered, the divisor is at least (1 - mu) safe_product; elsewhere it may be zero, and theta is not used.
    # Not vector + (1 - theta)(safe - vector): for a very negative product that loses theta to rounding.
    theta = (1 - mu) * safe_product / (safe_product - product)
    return torch.where(triggered, theta * vector + (1 - theta) * safe, vector)


def check_vectors(**vectors: Tensor) -> None:
    """Raise unless all are tensors `[..., n]` of one shape, of one real dtype and on one device.

    Raises:
        TypeError: for something else than a tensor, or for another dtype or device.
        ValueError: for another shape.
    """
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} is a {type(vector).__name__}; expected a tensor [..., n]")
    kinds = {(vector.dtype, vector.device) for vector in vectors.values()}
    if len(kinds) > 1 or not all(dtype.is_floating_point for dtype, _ in kinds):
        found = ", ".join(f"{name} {vector.dtype} on {vector.device}" for name, vector in vectors.items())
        raise TypeError(
            f"{', '.join(vectors)} must share a real floating dtype and a device, got {found}: convert to one"
        )
    shapes = {name: list(vector.shape) for name, vector in vectors.items()}
    if any(shape != shapes["s"] or not shape for shape in shapes.values()):
        raise ValueError(
            f"{', '.join(vectors)} must have the same shape [..., n], got {shapes}: give all the same leading batch "
            "dimensions"
        )


def _check_fraction(value: float, name: str, advice: str) -> None:
    # A tensor would have to be read on the host to be compared.
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}; {advice}")
