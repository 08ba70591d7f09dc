# SPDX-License-Identifier: Apache-2.0
"""Functions of a covariance that is given by its products, for each element of a batch.

The covariance comes from the Jacobian of a network. For an exact denoiser it is symmetric without
negative eigenvalues; the asymmetry and the negative eigenvalues of a trained one measure its error.
No iteration waits for a device. Travels with the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each element of the batch, (B, 1, ...)."""
    return (x * y).sum(dim=tuple(range(1, x.ndim)), keepdim=True)


@dataclass(frozen=True)
class KrylovSpace:
    """A covariance C on the span of v, A v, ..., A^(k-1) v, where A is C on some of the values.

    Attributes:
        length: norm of v, (B,) float64.
        basis: orthonormal vectors, the first along v, (B, k, ...).
        images: C times each of them, same shape.
        eigenvalues, eigenvectors: of the symmetric part of A in the basis, (B, k) and (B, k, k)
            float64. NaN where a product is not finite.
        error: the largest of the most negative eigenvalue and sqrt(1/2) of the Frobenius norm of
            the antisymmetric part, whose eigenvalues come in pairs, (B,) float64.
    """

    length: Tensor
    basis: Tensor
    images: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    error: Tensor

    @classmethod
    def of(
        cls, product: Product, start: Tensor, num_iterations: int, mask: Tensor | None = None
    ) -> "KrylovSpace":
        """The space after some products.

        Args:
            product: x -> C x, for x of norm 1.
            start: v, (B, ...); 0 where `mask` is.
            num_iterations: k, at most the number of values.
            mask: 1 for the values that A acts on; None for all.
        """
        length = dot(start, start).sqrt()
        basis, images = [torch.where(length > 0, start / length, 0)], []
        for _ in range(min(num_iterations, start[0].numel())):
            images.append(product(basis[-1]))
            vector = images[-1] if mask is None else images[-1] * mask
            before = dot(vector, vector).sqrt()
            for _ in range(2):  # the second pass removes the rounding errors of the first
                for other in basis:
                    vector = vector - dot(vector, other) * other
            norm = dot(vector, vector).sqrt()
            # A space that A does not leave: the following vectors are 0.
            basis.append(torch.where(norm > 1e-6 * before, vector / norm, 0))
        q, c_q = torch.stack(basis[:-1], dim=1), torch.stack(images, dim=1)
        rows, columns = (x.reshape(*x.shape[:2], -1) for x in (q, c_q))
        projected = (rows @ columns.mT).double()  # q is 0 outside of the mask
        is_finite = projected.isfinite().all(dim=2).all(dim=1)
        safe = projected.nan_to_num(0, 0, 0)  # eigh raises an error for values that are not finite
        values, vectors = torch.linalg.eigh((safe + safe.mT) / 2)
        asymmetry = torch.linalg.matrix_norm(safe - safe.mT) / 8**0.5
        return cls(
            length.flatten().double(),
            q,
            c_q,
            torch.where(is_finite[:, None], values, torch.nan),
            vectors,
            torch.maximum(asymmetry, -values[:, 0]),
        )

    def square_root(self) -> Tensor:
        """(C (C + s^2)^-1 C)^(1/2) v, (B, ...), with s^2 as for `regression`: C^(1/2) v."""
        values = self.eigenvalues.clamp(min=0)
        return self._function(values * self._inverse(values).sqrt(), self.basis)

    def regression(self) -> Tensor:
        """C (A + s^2)^-1 v, (B, ...), where s^2 is twice the error of C: 0 for an exact C."""
        return self._function(self._inverse(self.eigenvalues), self.images)

    def _inverse(self, eigenvalues: Tensor) -> Tensor:
        shifted = eigenvalues + 2 * self.error[:, None]
        is_zero = shifted <= 1e-12 * shifted.amax(dim=1, keepdim=True)
        return torch.where(is_zero, 0, 1 / shifted)

    def _function(self, of_eigenvalues: Tensor, vectors: Tensor) -> Tensor:
        """f(A) v in terms of the basis, applied to `vectors`."""
        weights = of_eigenvalues * self.eigenvectors[:, 0] * self.length[:, None]
        weights = (self.eigenvectors @ weights[..., None])[..., 0].to(vectors.dtype)
        result: Tensor = torch.einsum("bk,bk...->b...", weights, vectors)
        return result
