"""Kronecker algebra: everything a layer's curvature needs from `A (x) G`, without ever forming it.

Conventions of the whole project: a weight matrix `W` is `[d_out, d_in]`; `vec` stacks its **columns**, so entry
`W[k, i]` sits at position `i * d_out + k`; and `A (x) G` (`torch.kron(A, G)`) has `A [d_in, d_in]` outside and
`G [d_out, d_out]` inside. Leading dimensions are batch dimensions (one factor pair per group of a convolution) and
broadcast. Nothing here assumes that a matrix is symmetric, and nothing reads a tensor's value on the host.
"""

import torch
from torch import Tensor

__all__ = ["kron_matvec", "kron_solve", "nearest_kronecker", "rearrange", "unvec", "vec"]


def vec(W: Tensor) -> Tensor:
    """Stack the columns of each matrix: `[..., d_out, d_in]` -> `[..., d_out * d_in]`.

    Raises `TypeError` for anything but a tensor and `ValueError` below two dimensions. Source: derived in chapter 1.
    """
    _require_matrix("W", W)
    return W.mT.flatten(-2)


def unvec(v: Tensor, d_out: int) -> Tensor:
    """Inverse of `vec`: `[..., d_out * d_in]` -> `[..., d_out, d_in]`, contiguous.

    Raises `TypeError`/`ValueError` if `v` is no tensor with at least one dimension, or if its last dimension is not a
    multiple of the integer `d_out`. Source: derived in chapter 1.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"v is a {type(v).__name__}; expected a tensor [..., d_out * d_in]")
    _require_size("d_out", d_out)
    if v.ndim == 0 or v.shape[-1] % d_out:
        raise ValueError(
            f"v has shape {list(v.shape)}; expected [..., d_out * d_in] with a last dimension that d_out = {d_out} "
            "divides: pass the number of rows of the matrix that was stacked"
        )
    return v.unflatten(-1, (v.shape[-1] // d_out, d_out)).mT.contiguous()  # torch.kron refuses two kinds of strides


def kron_matvec(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """`(A (x) G) vec(V)`, unstacked: `G V A^T`.

    `A [..., d_in, d_in]`, `G [..., d_out, d_out]`, `V [..., d_out, d_in]` -> `[..., d_out, d_in]`, in
    `2 d_out d_in (d_in + d_out)` floating-point operations. Raises `TypeError`/`ValueError` for tensors that do not
    fit together. Source: derived in chapter 1.
    """
    _require_factors(A, G, V)
    return G @ V @ A.mT


def kron_solve(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """`(A (x) G)^-1 vec(V)`, unstacked: the `X [..., d_out, d_in]` with `G X A^T = V`.

    Two LU solves; no inverse is formed. Shapes and errors as in `kron_matvec`. A singular factor is not looked for,
    because that would read its value on the host: the result then holds non-finite entries. Source: derived in
    chapter 1.
    """
    _require_factors(A, G, V)
    # With batched factors and a bare matrix V of shape [batch, n], torch.linalg takes V for a batch of vectors.
    V = V.expand(torch.broadcast_shapes(A.shape[:-2], G.shape[:-2], V.shape[:-2]) + V.shape[-2:])
    left = torch.linalg.solve_ex(G, V).result  # G^-1 V
    return torch.linalg.solve_ex(A, left.mT).result.mT  # (A^-1 (G^-1 V)^T)^T = G^-1 V A^-T


def rearrange(H: Tensor, d_in: int, d_out: int) -> Tensor:
    """The rearrangement `R(H)` under which Kronecker products are the matrices of rank one.

    `H [..., d_in * d_out, d_in * d_out]` -> `[..., d_in**2, d_out**2]`; row `j * d_in + i` is `vec` of the
    `[d_out, d_out]` block `(i, j)` of `H`, so `R(A (x) G) = vec(A) vec(G)^T`. The entries are only moved: norms and
    inner products stay. Raises `TypeError`/`ValueError` if `H` is not of that shape. Source: Van Loan and Pitsianis
    (1993); derived in chapter 1.
    """
    _require_matrix("H", H)
    _require_size("d_in", d_in)
    _require_size("d_out", d_out)
    size = d_in * d_out
    if H.shape[-2:] != (size, size):
        raise ValueError(
            f"H has shape {list(H.shape)}; expected [..., {size}, {size}], because d_in * d_out = {d_in} * {d_out}: "
            "pass the sizes of the two factors, d_in for A first"
        )
    blocks = H.unflatten(-1, (d_in, d_out)).unflatten(-3, (d_in, d_out))  # [..., i, k, j, l] = A[i, j] G[k, l]
    blocks = blocks.movedim((-2, -4, -1, -3), (-4, -3, -2, -1))  # [..., j, i, l, k]: vec has the column index outside
    return blocks.flatten(-4, -3).flatten(-2)


def nearest_kronecker(H: Tensor, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Factors `(A [..., d_in, d_in], G [..., d_out, d_out])` that minimise `||H - A (x) G||_F`.

    They are the leading singular pair of `rearrange(H)`; the error is the root of the sum of the other squared
    singular values. Only the product is determined by `H`; this function returns factors of equal norm with
    `trace(A) >= 0`. If the largest singular value is simple, a positive semi-definite `H` gives positive semi-definite
    factors and a symmetric `H` gives two symmetric or two skew-symmetric factors, up to rounding; if it is repeated,
    any of the equally good minimisers may come back.

    Raises `TypeError`/`ValueError` as `rearrange`, and for a dtype other than float32 or float64. Source: Van Loan and
    Pitsianis (1993); derived in chapter 1.
    """
    rearranged = rearrange(H, d_in, d_out)
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"H is {H.dtype}; expected torch.float32 or torch.float64: convert it first")
    left, singular_values, right = torch.linalg.svd(rearranged, full_matrices=False)
    scale = singular_values[..., :1].sqrt()
    A = unvec(scale * left[..., :, 0], d_in)
    G = unvec(scale * right[..., 0, :], d_out)
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    sign = torch.where(trace < 0, -1.0, 1.0).to(H.dtype)
    return sign * A, sign * G


def _require_matrix(name: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} is a {type(matrix).__name__}; expected a tensor [..., rows, columns]")
    if matrix.ndim < 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; expected a matrix [..., rows, columns]")


def _require_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} is {size!r}; expected a positive integer")
    if size < 1:
        raise ValueError(f"{name} is {size}; expected a positive integer")


def _require_factors(A: Tensor, G: Tensor, V: Tensor) -> None:
    """A and G square, V of their sizes, one real dtype, one device, batch dimensions that broadcast."""
    named = {"A": A, "G": G, "V": V}
    for name, matrix in named.items():
        _require_matrix(name, matrix)
        if not matrix.is_floating_point():
            raise TypeError(f"{name} is {matrix.dtype}; expected a real floating-point dtype: convert it first")
        if (matrix.dtype, matrix.device) != (V.dtype, V.device):
            raise TypeError(
                f"{name} is {matrix.dtype} on {matrix.device}, V is {V.dtype} on {V.device}; expected one dtype and "
                "one device: convert the factors to those of V"
            )
    for name, matrix in (("A", A), ("G", G)):
        if matrix.shape[-2] != matrix.shape[-1]:
            raise ValueError(f"{name} has shape {list(matrix.shape)}; expected a square factor [..., n, n]")
    expected = (G.shape[-1], A.shape[-1])
    if V.shape[-2:] != expected:
        raise ValueError(
            f"V has shape {list(V.shape)}; expected [..., {expected[0]}, {expected[1]}], rows as G and columns as A: "
            "transpose V or exchange the factors"
        )
    try:
        torch.broadcast_shapes(*(matrix.shape[:-2] for matrix in named.values()))
    except RuntimeError:
        shapes = {name: list(matrix.shape[:-2]) for name, matrix in named.items()}
        raise ValueError(f"batch dimensions {shapes} do not broadcast; make them equal or one") from None
