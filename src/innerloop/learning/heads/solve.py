"""Many small positive definite systems at once, in float32 that really is float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_JITTERS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # of the mean of the diagonal


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and bfloat16 out of float32 products, whatever the process allows elsewhere.

    Ten bits of mantissa are enough for a layer, not for a system whose condition number is a thousand. The switch for
    products is the process's: threads that multiply meanwhile are exact too.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower factors of matrix [T, n, n], symmetric and in exact arithmetic positive definite.

    Where rounding has made one indefinite, the least jitter that helps is added to that one's diagonal alone. A matrix
    that isn't finite gives a factor that isn't: it spoils no other task's.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    for jitter in _JITTERS:
        if not bool((info > 0).any()):
            break
        failed = (info > 0) & matrix.isfinite().all(-1).all(-1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        level = jitter * matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).unsqueeze(-1)
        again, still = torch.linalg.cholesky_ex(matrix + level * eye)
        lower = torch.where(failed.unsqueeze(-1).unsqueeze(-1), again, lower)
        info = torch.where(failed, still, info)
    return lower


def whitened_step(z: Tensor, residual: Tensor) -> Tensor:
    """Solve (I + Z'Z) u = Z'r for u [T, d] by the smaller side, given z [T, S, d] and residual [T, S]."""
    examples, dimension = z.shape[1:]
    return dual(z, residual) if examples < dimension else primal(z, residual)


def primal(z: Tensor, residual: Tensor) -> Tensor:
    """(I + Z'Z) u = Z'r for z [T, S, d] and residual [T, S]; u [T, d]."""
    return _solve(information(z), z.mT @ residual.unsqueeze(-1)).squeeze(-1)


def dual(z: Tensor, residual: Tensor) -> Tensor:
    """Solve for the same u [T, d] as `primal`, from S x S systems (Woodbury): u = Z' inverse(I + ZZ') r."""
    kernel = z @ z.mT  # [T, S, S]
    kernel.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return (_solve(kernel, residual.unsqueeze(-1)).mT @ z).squeeze(1)


def information(z: Tensor) -> Tensor:
    """I + Z'Z [T, d, d] for z [T, S, d]: the posterior's precision, where the prior's is I."""
    gram = z.mT @ z
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return gram


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, cholesky(matrix))
