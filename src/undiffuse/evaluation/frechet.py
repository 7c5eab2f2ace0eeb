"""Frechet distance: how far apart two Gaussians are, and so two sets of samples with their means and covariances."""

from __future__ import annotations

import numpy as np

from ..errors import UndiffuseError


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, at least 0 (Dowson & Landau 1982; Heusel et al. 2017,
    arXiv:1706.08500, who take it of Inception features and call it FID).

    In float64, and with symmetric matrices only: the eigenvalues of ``C_a C_b`` are those of
    ``C_a^(1/2) C_b C_a^(1/2)``, which is symmetric and has no negative or complex ones but for rounding.

    Args:
        mean_a, mean_b: ``[D]``.
        cov_a, cov_b: ``[D, D]``, symmetric, positive semidefinite.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(v, dtype=np.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.shape
    if len(size) != 1 or mean_b.shape != size or cov_a.shape != size * 2 or cov_b.shape != size * 2:
        shapes = [v.shape for v in (mean_a, cov_a, mean_b, cov_b)]
        raise UndiffuseError(f"a Frechet distance needs two means [D] and two covariances [D, D], got {shapes}")
    if not all(np.isfinite(v).all() for v in (mean_a, cov_a, mean_b, cov_b)):
        raise UndiffuseError("a mean or a covariance of the Frechet distance is not finite")
    values, vectors = np.linalg.eigh((cov_a + cov_a.T) / 2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    off = mean_a - mean_b
    return max(float(off @ off + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)
