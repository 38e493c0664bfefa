"""Inverse Hessian estimates from secant pairs: the BFGS update, and its limited-memory form.

A pair `(s, y)` is a step and the change of the gradient over it. Every estimate `H` here is symmetric and sends the
newest `y` to its `s`, which the true inverse Hessian of a quadratic does. Vectors are `[..., n]` and matrices
`[..., n, n]` with the same leading batch dimensions. Nothing here reads a tensor's value on the host.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfqn_core.maths.damping import check_vectors


def bfgs_inverse_update(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of an inverse Hessian estimate: a new `H+` with `H+ y = s`.

    H+ = (I - rho s y^T) H (I - rho y s^T) + rho s s^T with rho = 1 / s^T y (chapter 2; Nocedal & Wright, eq. 6.17).

    Args:
        H: `[..., n, n]`, symmetric; of a slightly unsymmetric `H` the symmetric part is used. It is not changed.
        s, y: `[..., n]`, the step and the change of the gradient, with the leading dimensions of `H`.

    Returns:
        `H+`, `[..., n, n]`. Eagerly computed it equals its own transpose bit for bit; a compiler that fuses
        multiplications into additions may leave a rounding error. For a positive definite `H`, `H+` is positive
        definite if and only if `s^T y > 0`. That is **not checked**, since a check would wait for the device: the
        caller damps the pair, or drops `H+` with `torch.where`. For `s^T y = 0` the entries are infinite or NaN.

    Raises:
        TypeError, ValueError: for tensors whose dtypes or shapes do not fit together.
    """
    _check_update(H, s, y)
    H = (H + H.mT) / 2
    left, right = _rank_two(times(H, y), s, y)
    half = left.unsqueeze(-1) * right.unsqueeze(-2)
    return H + (half + half.mT)


def bfgs_inverse_update_(H: Tensor, s: Tensor, y: Tensor, keep: Tensor) -> None:
    """`bfgs_inverse_update` in place: each matrix becomes its `H+` where `keep` holds and `H+` is finite.

    The change of H is a difference of two squares (`two_squares`), so that H is read three times and written twice,
    where the plain form passes ten times over it. What the coefficients are follows from a few inner products, and so
    does whether H+ is finite: nobody looks at it. A symmetric H stays symmetric **to the last bit**, since `p_i p_j`
    is `p_j p_i`. It has to: of an H that is not symmetric `H y` is not the gradient of `y^T H y / 2`, and nothing would
    ever take the difference away.

    Args:
        H: `[..., n, n]`, symmetric; changed in place.
        s, y: `[..., n]`, the pairs. One that is not kept may hold anything, NaN included.
        keep: bool, `[...]`.

    Raises:
        TypeError, ValueError: for tensors whose dtypes or shapes do not fit together.
    """
    _check_update(H, s, y)
    V, products = inner_products(s, times(H, y), y)
    C, largest = two_squares(products, H.dtype)
    add_squares_(H, V, C, keep & (2 * largest + trace(H) < torch.finfo(H.dtype).max))


def inner_products(*vectors: Tensor) -> tuple[Tensor, Tensor]:
    """k vectors `[..., n]` as the rows of `V` `[..., k, n]`, and `V V^T` `[..., k, k]` in float64.

    In float64 squares of float32 numbers neither overflow nor vanish, and their differences keep float32's digits.
    """
    V = torch.stack(vectors, dim=-2)
    wide = V.to(torch.float32 if V.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64
    return V, torch.bmm(wide, wide.mT) if V.dim() == 3 else wide @ wide.mT


def two_squares(products: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The BFGS update as two squares, `H+ = H + p p^T - q q^T` with `p` and `q` sums of multiples of `s` and `H y`.

    Args:
        products: `[..., k, k]`, inner products of `s`, `H y`, `y` and perhaps more, in this order.
        dtype: of the vectors.

    Returns:
        `C` `[..., 2, 2]` of `dtype`, whose rows hold the multiples for `p` and for `q`; and an upper bound `[...]` of
        `p_i p_j` and `q_i q_j`. Not finite for `s^T y = 0`.
    """
    ss, sHy, sy = products[..., 0, 0], products[..., 0, 1], products[..., 0, 2]  # [...] each
    HyHy, yHy = products[..., 1, 1], products[..., 1, 2]
    # H+ = H + l r^T + r l^T with l = c s - H y and r = s / s^T y.
    c = (1 + yHy / sy) / 2
    # Below its own rounding errors the square of a length tells nothing: too long is harmless, too short is not.
    length_l = (c * c * ss - 2 * c * sHy + HyHy).clamp_min(16 * torch.finfo(products.dtype).eps * c * c * ss).sqrt()
    length_r = ss.sqrt() / sy
    # l r^T + r l^T = p p^T - q q^T with p, q = (a l +- r / a) / sqrt 2 for every a. This one makes a l and r / a
    # equally long, or the difference would lose digits.
    a = (length_r / length_l).sqrt()
    of_s, of_r = a * c, 1 / (a * sy)
    C = torch.stack([of_s + of_r, -a, of_s - of_r, -a], dim=-1).unflatten(-1, (2, 2)) * math.sqrt(0.5)
    largest = ((C @ products[..., :2, :2]) * C).sum(-1).amax(-1)  # squared lengths of p and q
    return C.to(dtype), largest


def add_squares_(H: Tensor, V: Tensor, C: Tensor, keep: Tensor) -> None:
    """`H <- H + p p^T - q q^T` where `keep` `[...]` holds.

    Args:
        H: `[..., n, n]`.
        V: `[..., k, n]`, with `s` and `H y` as its first rows; elsewhere than where `keep` holds it may be anything.
        C: `[..., 2, 2]`, from `two_squares`.
        keep: bool.
    """
    pair = V[..., :2, :]
    squares = torch.bmm(C, pair) if V.dim() == 3 else C @ pair  # [..., 2, n]
    p, q = squares.masked_fill_(~keep[..., None, None], 0.0).unsqueeze(-1).unbind(-3)  # [..., n, 1] each
    H.addcmul_(p, p.mT)
    H.addcmul_(q, q.mT, value=-1.0)


def times(H: Tensor, v: Tensor) -> Tensor:
    """`H v` for `H` `[..., n, n]` and `v` `[..., n]`."""
    column = v.unsqueeze(-1)
    return (torch.bmm(H, column) if H.dim() == 3 else H @ column).squeeze(-1)


def trace(H: Tensor) -> Tensor:
    """Of matrices `[..., n, n]`. No entry of a positive definite one is larger."""
    return H.diagonal(dim1=-2, dim2=-1).sum(-1)


class LimitedMemoryInverse:
    """The inverse BFGS estimate of the last `memory` pairs, started from `gamma` I, without forming a matrix of `size`.

    With the pairs as rows of `S` and `Y`, oldest first, `R = triu(S Y^T)` and `D = diag(S Y^T)` (chapter 2; Byrd,
    Nocedal & Schnabel 1994, Theorem 2.2),

        H = gamma I + S^T R^-T (D + gamma Y Y^T) R^-1 S - gamma S^T R^-T Y - gamma Y^T R^-1 S.

    The state has fixed shapes and changes in place, and nothing is counted on the host: a CUDA graph can replay
    `append` and `apply`. Without a pair, `H = gamma I`.

    Args:
        size: length n of the vectors.
        memory: number of pairs kept.
        gamma: positive scale of the initial matrix.
        batch: leading dimensions, one independent estimate per entry.
        dtype, device: of the state, as in `torch.zeros`.

    Attributes:
        S, Y: `[*batch, memory, size]`, oldest pair first; slots not yet filled are zero rows at the front.
        R_inv: `[*batch, memory, memory]`, the inverse of `R`, with the identity on empty slots.
        gamma: as given; it may be set to another positive number at any time, since only `apply` reads it.
    """

    def __init__(
        self,
        size: int,
        memory: int,
        gamma: float = 1.0,
        *,
        batch: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("size", size), ("memory", memory)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be positive and finite, got {gamma!r}; H = gamma I must be positive definite")
        self.gamma = float(gamma)
        self.S = torch.zeros(*batch, memory, size, dtype=dtype, device=device)
        self.Y = torch.zeros_like(self.S)
        self.R_inv = torch.eye(memory, dtype=dtype, device=device).expand(*batch, memory, memory).contiguous()

    def append(self, s: Tensor, y: Tensor, keep: Tensor | None = None) -> None:
        """Put the pair `s, y` (`[*batch, size]`) last and drop the oldest slot; where `keep` is False, change nothing.

        `keep` is a bool tensor of shape `[*batch]`; None keeps every pair. As for `bfgs_inverse_update`, the caller
        answers for `s^T y > 0`. A pair that is not kept may hold anything, NaN included.
        """
        _check_pair(s, y)
        expected = (*self.S.shape[:-2], self.S.shape[-1])
        if s.shape != expected:
            raise ValueError(f"a pair of this estimate has shape {list(expected)}, got {list(s.shape)}")
        if s.dtype != self.S.dtype:
            raise TypeError(f"this estimate holds {self.S.dtype}, got a pair of {s.dtype}; convert the pair")
        if keep is not None and (keep.dtype != torch.bool or keep.shape != expected[:-1]):
            raise ValueError(
                f"keep must be a bool tensor of shape {list(expected[:-1])}, got {keep.dtype} {list(keep.shape)}"
            )
        # R is upper triangular: without its first row and column, its inverse is R^-1 without first row and column.
        # An entry of R^-1 depends only on entries between its row and its column, so nothing of a dropped pair, not
        # even its rounding error, survives: the running inverse is as good as one computed afresh.
        sy = (s * y).sum(-1)[..., None, None]
        kept = self.R_inv[..., 1:, 1:]
        column = -kept @ (self.S[..., 1:, :] @ y.unsqueeze(-1)) / sy
        last_row = torch.cat([torch.zeros_like(column.mT), 1 / sy], dim=-1)
        R_inv = torch.cat([torch.cat([kept, column], dim=-1), last_row], dim=-2)
        S = torch.cat([self.S[..., 1:, :], s.unsqueeze(-2)], dim=-2)
        Y = torch.cat([self.Y[..., 1:, :], y.unsqueeze(-2)], dim=-2)
        for state, new in ((self.S, S), (self.Y, Y), (self.R_inv, R_inv)):
            state.copy_(new if keep is None else torch.where(keep[..., None, None], new, state))

    def apply(self, V: Tensor) -> Tensor:
        """`H V` for `V` of shape `[*batch, size, k]`, in about `8 memory size k` flops (`size > memory`)."""
        if V.dim() < 2 or V.shape[:-1] != (*self.S.shape[:-2], self.S.shape[-1]):
            raise ValueError(f"V must be {[*self.S.shape[:-2], self.S.shape[-1], 'k']}, got {list(V.shape)}")
        if V.dtype != self.S.dtype:
            raise TypeError(f"this estimate holds {self.S.dtype}, got V of {V.dtype}; convert V")
        # The compact form, grouped so that Y Y^T is never formed: with w = R^-1 S V and U = V - Y^T w,
        # H V = gamma U + S^T R^-T (D w - gamma Y U).
        diagonal = (self.S * self.Y).sum(-1, keepdim=True)
        w = self.R_inv @ (self.S @ V)
        U = V - self.Y.mT @ w
        return self.gamma * U + self.S.mT @ (self.R_inv.mT @ (diagonal * w - self.gamma * (self.Y @ U)))

    def dense(self) -> Tensor:
        """`H` as a matrix `[*batch, size, size]`, for inspection and tests."""
        size = self.S.shape[-1]
        identity = torch.eye(size, dtype=self.S.dtype, device=self.S.device)
        return self.apply(identity.expand(*self.S.shape[:-2], size, size))


def _rank_two(Hy: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`l`, `r` `[..., n]` with `H+ = H + l r^T + r l^T` (chapter 2); `Hy` is `H y`."""
    sy = torch.linalg.vecdot(s, y).unsqueeze(-1)
    yHy = torch.linalg.vecdot(y, Hy).unsqueeze(-1)
    # rho appears once in each factor, never squared: rho^2 y^T H y overflows long before H+ does.
    return (1 + yHy / sy) / 2 * s - Hy, s / sy


def _check_update(H: Tensor, s: Tensor, y: Tensor) -> None:
    _check_pair(s, y)
    if not isinstance(H, Tensor):
        raise TypeError(f"H is a {type(H).__name__}; expected a tensor [..., n, n]")
    if H.dim() < 2 or H.shape[-1] != H.shape[-2] or H.shape[:-1] != s.shape:
        raise ValueError(
            f"H must be [..., n, n] for pairs [..., n], got H {list(H.shape)} and s {list(s.shape)}; "
            "give all three the same leading batch dimensions"
        )
    if (H.dtype, H.device) != (s.dtype, s.device):
        raise TypeError(
            f"H and the pair must share a dtype and a device, got {H.dtype} and {s.dtype}, {H.device} and {s.device}; "
            "convert the pair"
        )


def _check_pair(s: Tensor, y: Tensor) -> None:
    check_vectors(s=s, y=y)
