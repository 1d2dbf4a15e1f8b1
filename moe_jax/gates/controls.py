"""Simpler uses of what a mixture uses: constant weights, one temperature, and regressions stacked on features and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.typing import ArrayLike
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_same_length
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.optimize import GateConfig, GateFit, Params, minimize
from moe_jax.gates.routing import route_soft, sharpen


def simplex_weights(predictions: Float[AnyArray, "N K"], y: Float[AnyArray, " N"]) -> Float[np.ndarray, " K"]:
    """The constant weights of least squared error, sum_k w_k = 1 and w >= 0; exact, in float64.

    As the weights sum to 1, the residual is -(predictions - y) w, so w minimises w' G w with G the Gram matrix of the experts'
    errors. The non-negative u that minimises u' G u / 2 - sum(u) meets the same conditions of Karush, Kuhn and Tucker up to a
    factor: w = u / sum(u). With G = L L' that is the non-negative least squares |L' u - L^-1 1|^2 (Lawson & Hanson 1974).

    Raises:
        InputError: shapes that disagree, or experts whose errors are linearly dependent.
    """
    require_same_length(predictions=predictions, y=y)
    error = np.asarray(predictions, np.float64) - np.asarray(y, np.float64)[:, None]
    gram = error.T @ error / len(error)
    try:
        factor = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError as reason:
        raise InputError("predictions: found experts whose errors are linearly dependent, expected independent ones") from reason
    solution, _ = scipy.optimize.nnls(factor.T, np.linalg.solve(factor, np.ones(len(gram))))
    weights: np.ndarray = solution / solution.sum()
    return weights


def fit_temperature(weights: Float[AnyArray, "N K"], predictions: Float[AnyArray, "N K"], y: Float[AnyArray, " N"]) -> float:
    """The one temperature that makes a gate's mixture fit best: minimises the squared error over T in 0.05 to 20."""

    def loss(log_temperature: float) -> float:
        mixture = route_soft(sharpen(weights, np.exp(log_temperature)), jnp.asarray(predictions))
        return float(jnp.mean((jnp.asarray(y) - mixture) ** 2))

    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


@dataclass(frozen=True)
class SquaredError:
    """(y - network(x))^2 of each star, the network being a gate's with one output."""

    network: MLPGate

    def __call__(self, params: Params, entropy_penalty: ArrayLike, data: tuple[jax.Array, ...]) -> jax.Array:
        """(N,) losses; there are no weights whose entropy could be penalised."""
        x, y = data
        return (y - self.network.logits(params, x)[:, 0]) ** 2


class MLPRegressor(NamedTuple):
    """A network with one hidden layer, and the scales of its input and output."""

    params: Params
    x_mean: Float[jax.Array, " F"]
    x_scale: Float[jax.Array, " F"]
    y_mean: Float[jax.Array, ""]
    y_scale: Float[jax.Array, ""]


def fit_mlp_regressor(
    key: PRNGKeyArray,
    x: Float[AnyArray, "N F"],
    y: Float[AnyArray, " N"],
    *,
    hidden: int = 64,
    config: GateConfig | None = None,
) -> tuple[MLPRegressor, GateFit]:
    """Regresses y on x by a network of the MLP gate's size, trained as a gate is; inputs and target are standardised.

    Raises:
        InputError: shapes that disagree, or too few stars.
    """
    require_same_length(x=x, y=y)
    x, y = jnp.asarray(x), jnp.asarray(y)
    x_mean, x_scale, y_mean, y_scale = jnp.mean(x, axis=0), jnp.std(x, axis=0), jnp.mean(y), jnp.std(y)
    x_scale, y_scale = jnp.where(x_scale > 0, x_scale, 1.0), jnp.where(y_scale > 0, y_scale, 1.0)
    network = MLPGate(hidden)
    key_init, key_train = jax.random.split(key)
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), network.init(key_init, x.shape[1], 1))
    data = ((x - x_mean[None, :]) / x_scale[None, :], (y - y_mean) / y_scale)
    fit = minimize(key_train, SquaredError(network), params, data, GateConfig() if config is None else config)
    return MLPRegressor(fit.params, x_mean, x_scale, y_mean, y_scale), fit


def predict_mlp_regressor(model: MLPRegressor, x: Float[AnyArray, "N F"]) -> Float[jax.Array, " N"]:
    """Predictions of a fitted network."""
    standardised = (jnp.asarray(x) - model.x_mean[None, :]) / model.x_scale[None, :]
    hidden = model.params["head"]["kernel"].shape[0]
    return MLPGate(hidden).logits(model.params, standardised)[:, 0] * model.y_scale + model.y_mean
