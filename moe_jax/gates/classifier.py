"""The classification gate: multinomial logistic regression of a star's cell on its features, by scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, InputError, require_cell_sizes, require_whole
from moe_jax.core.convert import convert_arguments
from moe_jax.gates.networks import linear_params
from moe_jax.gates.optimize import Params

C_GRID = (10.0, 100.0, 1000.0)


class ClassifierFit(NamedTuple):
    """The classification gate: params for a ``LinearGate``."""

    params: Params
    C: float  #: inverse strength of the L2 penalty, chosen by cross-validation
    accuracy: float  #: cross-validated accuracy at that C
    at_edge: bool  #: whether C lies at an end of the grid
    converged: bool


@convert_arguments("features", "cell", finite=("features",))
def fit_classifier(
    features: Float[AnyArray, "N F"],
    cell: Int[AnyArray, " N"],
    *,
    C_grid: tuple[float, ...] = C_GRID,
    n_folds: int = 5,
    seed: int = 0,
) -> ClassifierFit:
    """Fits the classification gate in float64, with the C of the lowest cross-validated log loss; all arguments concrete.

    Args:
        features: standardised features of the covered training stars.
        cell: cell of each star, 0 .. K - 1; every cell must occur.
        C_grid: inverse penalties to choose from.
        n_folds: folds of the cross-validation.
        seed: seed of the shuffle into folds.

    Raises:
        InputError: shapes that disagree, a cell that is missing or holds fewer stars than folds, all stars in one cell, fewer than
            two folds, or penalties that are not positive.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    cell = np.asarray(cell)
    if cell.min() < 0:
        raise InputError(f"cell holds {cell.min()}, expected 0 to K - 1")
    require_whole("n_folds", n_folds, 2)
    if not len(C_grid) or not all(0 < C < np.inf for C in C_grid):
        raise InputError(f"C_grid is {C_grid}, expected positive numbers")
    if cell.max() == 0:
        raise InputError("cell is 0 for all stars, expected at least two cells")
    require_cell_sizes("cell", cell, int(cell.max()) + 1, n_folds)
    x, C_grid = np.asarray(features, np.float64), tuple(sorted(C_grid))
    # Newton steps on the exact Hessian need a dozen iterations where L-BFGS needs hundreds at large C. Each fit starts from that
    # of the next smaller C.
    model = LogisticRegression(solver="newton-cholesky", max_iter=200, warm_start=True)
    loss, accuracy = np.zeros((2, n_folds, len(C_grid)))
    for i, (train, held) in enumerate(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(x, cell)):
        for j, C in enumerate(C_grid):
            probabilities = model.set_params(C=C).fit(x[train], cell[train]).predict_proba(x[held])
            loss[i, j] = log_loss(cell[held], probabilities)
            accuracy[i, j] = np.mean(np.argmax(probabilities, axis=1) == cell[held])
    best = int(np.argmin(loss.mean(axis=0)))
    model.set_params(C=C_grid[best], tol=1e-8).fit(x, cell)
    features = jnp.asarray(features)
    kernel, bias = jnp.asarray(model.coef_.T, features.dtype), jnp.asarray(model.intercept_, features.dtype)
    return ClassifierFit(
        linear_params(kernel, bias),
        C=C_grid[best],
        accuracy=float(accuracy.mean(axis=0)[best]),
        at_edge=len(C_grid) > 1 and C_grid[best] in (min(C_grid), max(C_grid)),
        converged=bool(np.all(model.n_iter_ < model.max_iter)),
    )
