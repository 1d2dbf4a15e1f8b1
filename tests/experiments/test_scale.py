"""What the study of numbers of stars says of edges and of linear gates that lose."""

import numpy as np
import pandas as pd
import pytest

from experiments import scale
from moe_jax.experts.cross_validation import CrossValidatedRidge
from moe_jax.experts.ridge import Ridge


def experts_of(alpha, at_edge, alphas, mse):
    ridge = Ridge(np.zeros((len(alpha), 2)), np.zeros(len(alpha)))
    return CrossValidatedRidge(ridge, *map(np.array, (alpha, at_edge, alphas, mse)), np.zeros(0))


def test_last_step_is_that_of_experts_at_the_edge():
    alphas = [[1.0, 10.0, 0.1, np.nan]] * 3  # in the order in which they were tried
    mse = [[2.0, 3.0, 1.6, np.nan], [5.0, 4.0, 6.0, np.nan], [1.0, 2.0, 3.0, np.nan]]
    experts = experts_of([0.1, 10.0, 1.0], [True, True, False], alphas, mse)
    assert scale.last_step(experts) == pytest.approx(0.25)  # 2 / 1.6 and 5 / 4; the third does not count
    assert scale.last_step(experts_of([1.0], [False], [[1.0, 10.0]], [[1.0, 9.0]])) == 0


@pytest.mark.parametrize(
    ("train_mse", "said"),
    [
        (0.5, ", as it is fitted too closely: its test error is 60% above its training error"),
        (0.9, ", but is not fitted more closely: its test error is 11% below its training error"),
    ],
)
def test_overfit(train_mse, said):
    columns = ["method", "train_mse", "test_mse", "r2"]
    rows = [("soft", 0.6, 0.72, 0.5), ("linear", train_mse, 0.8, 0.4), ("linear, penalised", 0.6, 0.7, 0.55)]
    table = pd.DataFrame(rows, columns=columns)
    text = scale.overfit((1.0, 4000), table)
    assert text.startswith("With 4,000 stars and noise 1 the converged linear gate is worse than the classification gate, ")
    assert said in text
    assert "(classification gate: +20%), and the penalty changes its R2 by +0.1500." in text
    table.loc[1, "test_mse"] = 0.7
    assert scale.overfit((1.0, 4000), table) == ""
