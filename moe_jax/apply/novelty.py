"""Is a star like those that a model was trained on? By its distance from the training stars in feature space."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, require_same_length

QUANTILE = 0.999  # of the training stars lie within the limit
SHRINKAGE = 1e-3  # of the covariance towards unity: EW_CaT is the sum of three features


class FeatureRange(NamedTuple):
    """The training stars in feature space: an ellipsoid for each cell."""

    mean: Float[AnyArray, "K F"]
    precision: Float[AnyArray, "K F F"]  #: inverse covariance
    limit: Float[AnyArray, ""]  #: distance within which all but 0.1 % of the training stars lie


def fit_feature_range(features: Float[AnyArray, "N F"], cell: Int[AnyArray, " N"], n_cells: int) -> FeatureRange:
    """Mean and covariance of each cell's training stars, and the limit.

    Args:
        features: standardised, of the training stars.
        cell: of each, 0 .. n_cells - 1; every cell occurs.
        n_cells: K.
    """
    require_same_length(features=features, cell=cell)
    x, cell = np.asarray(features, np.float64), np.asarray(cell)
    means, precisions = [], []
    for k in range(n_cells):
        own = x[cell == k]
        centred = own - own.mean(axis=0)
        covariance = centred.T @ centred / len(own) + SHRINKAGE * np.eye(x.shape[1])
        means.append(own.mean(axis=0))
        precisions.append(np.linalg.inv(covariance))
    dtype = np.asarray(features).dtype
    found = FeatureRange(np.array(means, dtype), np.array(precisions, dtype), np.ones((), dtype))
    limit = np.quantile(np.asarray(feature_distance(found, features)), QUANTILE)
    return found._replace(limit=np.asarray(limit, dtype))


@jax.jit
def feature_distance(known: FeatureRange, features: Float[AnyArray, "N F"]) -> Float[jax.Array, " N"]:
    """Mahalanobis distance to the nearest cell, in units of the limit: above 1 a star is unlike the training stars."""
    offset = jnp.asarray(features)[:, None, :] - known.mean[None]
    squared = jnp.einsum("nkf,kfg,nkg->nk", offset, known.precision, offset, precision="highest")
    return jnp.sqrt(jnp.maximum(jnp.min(squared, axis=1), 0.0)) / known.limit
