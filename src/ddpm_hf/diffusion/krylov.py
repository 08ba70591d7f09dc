# SPDX-License-Identifier: Apache-2.0
"""Krylov methods for a symmetric matrix that is given by its products, for a batch at a time.

No iteration waits for a device. Travels with the weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each element of the batch, (B, 1, ...)."""
    return (x * y).sum(dim=tuple(range(1, x.ndim)), keepdim=True)


def conjugate_gradients(product: Product, target: Tensor, num_iterations: int) -> Tensor:
    """Solution x of A x = target, for each element of the batch.

    The iteration of an element ends where its residual is 0 to rounding, or where A is not positive
    along the search direction, as the Jacobian of a network can be.

    Args:
        product: x -> A x, symmetric and positive on the space of the targets.
        target: (B, ...).
        num_iterations: at most; not more than there are values.
    """
    x, residual, direction = torch.zeros_like(target), target, target
    square = dot(residual, residual)
    enough = square * torch.finfo(target.dtype).eps ** 2
    is_active = square > enough
    for _ in range(min(num_iterations, target[0].numel())):
        image = product(direction)
        curvature = dot(direction, image)
        is_active = is_active & (square > enough) & (curvature > 0)
        step = torch.where(is_active, square / curvature, 0)
        x = x + step * direction
        residual = residual - step * image
        before, square = square, dot(residual, residual)
        direction = residual + torch.where(is_active, square / before, 0) * direction
    return x


def lanczos_square_root(product: Product, noise: Tensor, num_iterations: int) -> Tensor:
    """A^(1/2) noise, for each element of the batch.

    Args:
        product: x -> A x, symmetric and positive.
        noise: (B, ...).
        num_iterations: dimension of the Krylov space; the result is exact at the number of values.
    """
    length = dot(noise, noise).sqrt()
    basis, diagonal, offdiagonal = [noise / length], [], []
    for i in range(min(num_iterations, noise[0].numel())):
        image = product(basis[i])
        diagonal.append(dot(image, basis[i]))
        for vector in basis:  # against the rounding errors of all earlier ones, too
            image = image - dot(image, vector) * vector
        norm = dot(image, image).sqrt()
        offdiagonal.append(norm)
        # A space that the product does not leave: the following vectors are 0.
        basis.append(torch.where(norm > 1e-7 * diagonal[0].abs(), image / norm, 0))
    tridiagonal = _tridiagonal(diagonal, offdiagonal[:-1])
    is_finite = tridiagonal.isfinite().all(dim=2).all(dim=1, keepdim=True)
    # eigh raises an error for values that are not finite; the result is NaN instead.
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num(0, 0, 0))
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    weights = torch.where(is_finite, root[:, :, 0], torch.nan).to(noise.dtype)
    weights = weights * length.flatten()[:, None]
    result: Tensor = torch.einsum("bk,bk...->b...", weights, torch.stack(basis[:-1], dim=1))
    return result


def _tridiagonal(diagonal: list[Tensor], offdiagonal: list[Tensor]) -> Tensor:
    """Symmetric matrices of both diagonals, (B, k, k) float64."""
    matrix = torch.diag_embed(torch.stack([x.flatten() for x in diagonal], dim=1))
    if offdiagonal:
        beside = torch.stack([x.flatten() for x in offdiagonal], dim=1)
        matrix = matrix + beside.diag_embed(1) + beside.diag_embed(-1)
    return matrix.double()
