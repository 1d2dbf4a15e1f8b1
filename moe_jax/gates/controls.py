"""Controls: simpler methods with the same inputs as a gate. Constant weights, one temperature, a network that regresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, mean_and_scale, scale_columns
from moe_jax.core.convert import convert_arguments
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.optimize import GateFit, Objective, Params, Rows, minimize
from moe_jax.gates.routing import route_soft, sharpen
from moe_jax.gates.training import GateConfig


@convert_arguments("predictions", "y", finite=("predictions", "y"))
def simplex_weights(predictions: Float[AnyArray, "N K"], y: Float[AnyArray, " N"]) -> Float[np.ndarray, " K"]:
    """The constant weights w of least squared error, with sum_k w_k = 1 and w_k >= 0; exact, in float64.

    The weights sum to 1, so the residual is -(predictions - y) w, and w minimises w' G w, where G is the Gram matrix of the
    experts' errors. Let u >= 0 minimise u' G u / 2 - sum(u). Up to a factor, u meets the same conditions of Karush, Kuhn and
    Tucker as w: w = u / sum(u). With G = L L' this is the non-negative least squares problem |L' u - L^-1 1|^2 (Lawson & Hanson
    1974).

    Raises:
        InputError: shapes that disagree, or experts whose errors are linearly dependent.
    """
    error = np.asarray(predictions, np.float64) - np.asarray(y, np.float64)[:, None]
    gram = error.T @ error / len(error)
    try:
        factor = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError as reason:
        raise InputError("predictions: found experts whose errors are linearly dependent, expected independent ones") from reason
    solution, _ = scipy.optimize.nnls(factor.T, np.linalg.solve(factor, np.ones(len(gram))))
    return solution / solution.sum()


@convert_arguments("weights", "predictions", "y", finite=("weights", "predictions", "y"))
def fit_temperature(weights: Float[AnyArray, "N K"], predictions: Float[AnyArray, "N K"], y: Float[AnyArray, " N"]) -> float:
    """The temperature, between 0.05 and 20, at which the mixture has the least squared error; one for all stars."""

    def loss(log_temperature: float) -> float:
        mixture = route_soft(sharpen(weights, np.exp(log_temperature)), jnp.asarray(predictions))
        return float(jnp.mean((jnp.asarray(y) - mixture) ** 2))

    bounds = (np.log(0.05), np.log(20.0))
    optimum = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return float(np.exp(optimum.x))


@jax.tree_util.register_static
@dataclass(frozen=True)
class SquaredError:
    """(y - network(x))^2 of each star; the network is that of a gate with one output."""

    network: MLPGate

    def __call__(self, params: Params, rows: Rows) -> jax.Array:
        """(N,) losses."""
        x, y = rows
        return (y - self.network.logits(params, x)[:, 0]) ** 2


class Regressor(NamedTuple):
    """A network, and the scales of its input and output."""

    params: Params
    x_mean: Float[jax.Array, " F"]
    x_scale: Float[jax.Array, " F"]
    y_mean: Float[jax.Array, ""]
    y_scale: Float[jax.Array, ""]

    def predict(self, network: Callable[[Params, Any], Any], x: Float[AnyArray, "N F"]) -> Float[jax.Array, " N"]:
        """What the network makes of standardised columns, in the unit of y."""
        return network(self.params, scale_columns(x, self.x_mean, self.x_scale)) * self.y_scale + self.y_mean


def fit_regressor(
    key: PRNGKeyArray, objective: Objective, params: Params, x: Float[AnyArray, "N F"], y: Float[AnyArray, " N"], config: GateConfig
) -> tuple[Regressor, GateFit]:
    """Fits params to x and y, which are standardised, as a gate is trained; the objective takes them as its two rows."""
    (x_mean, x_scale), ((y_mean,), (y_scale,)) = mean_and_scale(x), mean_and_scale(y[:, None])
    data = (scale_columns(x, x_mean, x_scale), (y - y_mean) / y_scale)
    validation, decay = config.validation_fraction, config.weight_decay
    fit = minimize(key, objective, params, data, config.method(), validation=validation, weight_decay=decay)
    return Regressor(fit.params, x_mean, x_scale, y_mean, y_scale), fit


@convert_arguments(finite=("x", "y"))
def fit_mlp_regressor(
    key: PRNGKeyArray,
    x: Float[AnyArray, "N F"],
    y: Float[AnyArray, " N"],
    *,
    hidden: int = 64,
    config: GateConfig | None = None,
) -> tuple[Regressor, GateFit]:
    """Regresses y on x with the network of an MLP gate, which is trained as a gate is; x and y are standardised inside.

    Args:
        key: draws the initial params, the validation stars and the batches.
        x: columns that the network sees.
        y: target.
        hidden: units of the network.
        config: ``GateConfig()`` by default. ``init`` and ``entropy_penalty`` do not apply: there are no weights.

    Raises:
        InputError: shapes that disagree, or too few stars.
    """
    x, y, config = jnp.asarray(x), jnp.asarray(y), GateConfig() if config is None else config
    network = MLPGate(hidden)
    key_init, key_train = jax.random.split(key)
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), network.init(key_init, x.shape[1], 1))
    return fit_regressor(key_train, SquaredError(network), params, x, y, config)


@convert_arguments()
def predict_mlp_regressor(model: Regressor, x: Float[AnyArray, "N F"]) -> Float[jax.Array, " N"]:
    """Predictions of a fitted network."""
    network = MLPGate(hidden=model.params["head"]["kernel"].shape[0])
    return model.predict(lambda params, x: network.logits(params, x)[:, 0], x)
