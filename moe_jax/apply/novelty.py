"""Tells whether a star is unlike the training stars, by its distance from them in feature space."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray
from moe_jax.core.convert import convert_arguments

QUANTILE = 0.999  # part of the training stars within the limit
SHRINKAGE = 1e-3  # added to the diagonal of the covariance, which is singular: EW_CaT is the sum of three features


class FeatureRange(NamedTuple):
    """The training stars in feature space: an ellipsoid for each cell."""

    mean: Float[AnyArray, "K F"]
    precision: Float[AnyArray, "K F F"]  #: inverse covariance
    limit: Float[AnyArray, ""]  #: distance within which all but 0.1 % of the training stars lie


@convert_arguments("features", "cell")
def fit_feature_range(features: Float[AnyArray, "N F"], cell: Int[AnyArray, " N"], n_cells: int) -> FeatureRange:
    """Fits an ellipsoid to the training stars of each cell 0 .. n_cells - 1, which must all occur, and the limit to all stars.

    Raises:
        InputError: shapes that disagree.
    """
    x, cell = np.asarray(features, np.float64), np.asarray(cell)
    means = [x[cell == k].mean(axis=0) for k in range(n_cells)]
    offsets = [x[cell == k] - mean for k, mean in enumerate(means)]
    precisions = [np.linalg.inv(offset.T @ offset / len(offset) + SHRINKAGE * np.eye(x.shape[1])) for offset in offsets]
    dtype = np.asarray(features).dtype
    unlimited = FeatureRange(np.array(means, dtype), np.array(precisions, dtype), np.ones((), dtype))
    limit = np.quantile(np.asarray(feature_distance(unlimited, features)), QUANTILE)
    return unlimited._replace(limit=np.asarray(limit, dtype))


@jax.jit
def feature_distance(feature_range: FeatureRange, features: Float[AnyArray, "N F"]) -> Float[jax.Array, " N"]:
    """Mahalanobis distance to the nearest cell, in units of the limit: above 1 a star is unlike the training stars."""
    offset = jnp.asarray(features)[:, None, :] - feature_range.mean[None]
    squared = jnp.einsum("nkf,kfg,nkg->nk", offset, feature_range.precision, offset, precision="highest")
    return jnp.sqrt(jnp.maximum(jnp.min(squared, axis=1), 0.0)) / feature_range.limit
