"""``fit_moe`` and ``predict_moe`` as a scikit-learn estimator, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from moe_jax.core.arrays import InputError, mean_and_scale, require_whole, scale_columns
from moe_jax.gates.networks import Gate, LinearGate, MLPGate
from moe_jax.gates.training import GateConfig
from moe_jax.mixture import ALPHAS, MixtureOfExperts, fit_moe, predict_moe


class RidgeMixtureRegressor(RegressorMixin, BaseEstimator):
    """Ridge experts, one for each cell of the data, mixed by a gate that is trained on the squared error of the mixture.

    Columns and target are standardised inside. Unless ``fit`` is given cells, they are clusters of the rows (k-means). The rows
    of a cluster with fewer than two rows for each fold go to the nearest larger cluster.

    Args:
        n_experts: largest number of clusters.
        alphas: ridge penalties to choose from, for each expert.
        gate: ``"mlp"`` or ``"linear"``.
        hidden: units of the MLP.
        epochs: largest number of epochs of the gate's training, which ends earlier by the loss of a fifth of the rows.
        learning_rate: step size of the gate's training.
        n_folds: folds within each cell.
        random_state: int, ``RandomState`` or None.

    Attributes:
        mixture_: the fitted ``MixtureOfExperts``, for standardised columns and target.
        cell_: cell of each training row.
        n_features_in_: number of columns.
    """

    def __init__(
        self,
        n_experts: int = 4,
        *,
        alphas: Sequence[float] = ALPHAS,
        gate: Literal["mlp", "linear"] = "mlp",
        hidden: int = 32,
        epochs: int = 300,
        learning_rate: float = 1e-3,
        n_folds: int = 5,
        random_state: Any = None,
    ) -> None:
        self.n_experts = n_experts
        self.alphas = alphas
        self.gate = gate
        self.hidden = hidden
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.n_folds = n_folds
        self.random_state = random_state

    def fit(self, X: Any, y: Any, cell: Any = None) -> RidgeMixtureRegressor:
        """Fits experts and gate.

        Args:
            X: (N, P) columns.
            y: (N,) target.
            cell: (N,) expert of each row, 0 .. K - 1; clusters of the rows by default.

        Raises:
            ValueError: input that no estimator accepts, fewer than 4 rows, parameters out of range, or a constant target.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        gate = self._gate()
        state = check_random_state(self.random_state)
        n_folds = min(self.n_folds, len(y) // 2)
        config = GateConfig(epochs=self.epochs, learning_rate=self.learning_rate, batch_size=min(256, len(y)), patience=20)
        with jax.enable_x64(True):
            self._x_scaling, self._y_scaling = (tuple(map(np.asarray, mean_and_scale(columns))) for columns in (X, y[:, None]))
            x, target = self._standardise(X), scale_columns(y[:, None], *self._y_scaling)[:, 0]
            self.cell_ = self._clusters(x, n_folds, state) if cell is None else np.asarray(cell)
            key, alphas = jax.random.key(state.randint(2**31)), tuple(self.alphas)
            fitted = fit_moe(key, x, target, self.cell_, alphas=alphas, n_folds=n_folds, gate=gate, config=config)
            self.mixture_ = jax.tree.map(np.asarray, fitted)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(N,) predictions."""
        return self._predict(X)[0]

    def predict_weights(self, X: Any) -> np.ndarray:
        """(N, K) weights of the experts."""
        return self._predict(X)[1]

    def _predict(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        mixture: MixtureOfExperts = self.mixture_
        (y_mean,), (y_scale,) = self._y_scaling
        with jax.enable_x64(True):
            prediction = predict_moe(mixture, jnp.asarray(self._standardise(X)))
            return np.asarray(prediction.y) * y_scale + y_mean, np.asarray(prediction.weights)

    def _standardise(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(scale_columns(X, *self._x_scaling))

    def _gate(self) -> Gate:
        require_whole("n_experts", self.n_experts, 1)
        require_whole("n_folds", self.n_folds, 2)
        if self.gate == "mlp":
            return MLPGate(self.hidden)
        if self.gate == "linear":
            return LinearGate()
        raise InputError(f"gate is {self.gate!r}, expected 'mlp' or 'linear'")

    def _clusters(self, x: np.ndarray, n_folds: int, state: np.random.RandomState) -> np.ndarray:
        """Clusters of the rows, each with at least two rows for each fold."""
        n_clusters = min(self.n_experts, max(1, len(x) // (2 * n_folds)))
        distinct = len(np.unique(x, axis=0))
        model = KMeans(min(n_clusters, distinct), n_init=1, random_state=state).fit(x)
        counts = np.bincount(model.labels_, minlength=model.n_clusters)
        large = np.flatnonzero(counts >= 2 * n_folds)
        if len(large) == 0:
            return np.zeros(len(x), int)
        # The large clusters are numbered anew; the rows of a small one go to the large one with the nearest centre.
        number = np.minimum(np.searchsorted(large, model.labels_), len(large) - 1)
        distance = np.square(x[:, None, :] - model.cluster_centers_[large][None]).sum(axis=2)
        return np.where(np.isin(model.labels_, large), number, distance.argmin(axis=1))
