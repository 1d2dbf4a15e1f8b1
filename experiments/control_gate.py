"""What does a mixture gain that a simpler use of the same information does not?

    python -m experiments.control_gate                  about 2 min on 2 cores
    python -m experiments.control_gate --preset smoke   small; about a minute

Results go to results/control_gate/PRESET.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, ComparisonConfig, draw_keys
from experiments.pipeline.gates import CONVERGED_LINEAR, GateRun, gate_keys, mix_by_class, run_gates, train_gates
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared, Stars
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import group, require_at_least, require_positive, run_command
from experiments.runner.stages import Stages
from moe_jax.experts import CELL_NAMES, cross_validate_ridge, fit_ridge, predict_ridge, select_alpha
from moe_jax.gates.controls import fit_mlp_regressor, fit_temperature, predict_mlp_regressor, simplex_weights
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.routing import route_soft, sharpen
from moe_jax.gates.training import GateConfig

VANISHING = 0.01
"""An expert whose mean weight is below this is flagged."""


@dataclass(frozen=True)
class ControlConfig(ComparisonConfig):
    """The controls."""

    n_seeds: int = 4
    """Networks of each kind."""
    network: GateConfig = group(GateConfig(epochs=500, patience=30), prefix=True)
    stack_alphas: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
    """Ridge penalties of the stacked ridges to choose from."""
    mlp: MLPGate = group(MLPGate())

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1)
        require_positive(self, "stack_alphas")
        self.data.experts.require_nine_experts()


PRESETS = {
    "default": ControlConfig(),
    "smoke": ControlConfig(preset="smoke", data=SMALL, n_seeds=2, network=GateConfig(epochs=5)),
}


def fit_controls(config: ControlConfig, prepared: Prepared, stages: Stages) -> dict[tuple[str, str, str], np.ndarray]:
    """Predictions of each control for the covered test stars, by seed; named by variant, form and inputs."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    train, test = prepared.gate_stars(), prepared.test.covered()
    y = jnp.asarray(train.log_g)
    keys = gate_keys(config.data, config.n_seeds)
    predictions: dict[tuple[str, str, str], np.ndarray] = {}

    def keep(name: str, form: str, inputs: str, prediction: object) -> None:
        predictions[name, form, inputs] = np.atleast_2d(np.asarray(prediction))

    constant = simplex_weights(train.predictions, train.log_g)
    weighted = np.asarray(test.predictions) @ constant.astype(np.float32)
    keep("constant weights (simplex least squares)", "constant weights", "expert predictions", weighted)
    params = prepared.classifier.params
    temperature = fit_temperature(LinearGate().apply(params, train.features), train.predictions, train.log_g)
    sharpened = sharpen(LinearGate().apply(params, test.features), temperature)
    name = f"classification gate at temperature {temperature:.2f}"
    keep(name, "classification gate", "features + expert predictions", route_soft(sharpened, test.predictions))
    inputs = {"features": ("features",), "features + expert predictions": ("features", "predictions")}
    folds = np.arange(len(y)) % config.data.experts.n_folds  # the stars are in random order
    for name, columns in inputs.items():
        x, x_test = (jnp.concatenate([jnp.asarray(getattr(s, c)) for c in columns], axis=1) for s in (train, test))
        with stages(f"controls from {name}"):
            alphas = jnp.array(config.stack_alphas)
            alpha = select_alpha(alphas, cross_validate_ridge(x, y, alphas, folds).mse).alpha
            keep(f"ridge on {name}", "ridge", name, predict_ridge(fit_ridge(x, y, alpha), x_test))

            networks = jax.vmap(lambda key, x=x: fit_mlp_regressor(key, x, y, hidden=config.mlp.hidden, config=config.network)[0])
            predicted = jax.vmap(lambda model, x=x_test: predict_mlp_regressor(model, x))(networks(keys))
            keep(f"MLP on {name}", "MLP", name, predicted)
            boosted = HistGradientBoostingRegressor(random_state=config.data.seed).fit(np.asarray(x), np.asarray(y))
            predicted = boosted.predict(np.asarray(x_test)).astype(np.float32)
            keep(f"gradient boosting on {name}", "gradient boosting", name, predicted)
    with stages("gate on permuted features"):
        key_train, key_test = jax.random.split(draw_keys(config.data.seed).in_sample)
        mixed_train, mixed_test = _permute(key_train, train), _permute(key_test, test)
        sweep = train_gates(keys, params, mixed_train, mixed_test, config.mlp, config.network)
        keep("MLP gate on permuted features", "MLP gate", "permuted features + expert predictions", sweep.predictions)
    return predictions


def _permute(key: jax.Array, stars: Stars) -> Stars:
    """Gives each star the features of another."""
    return stars._replace(features=jax.random.permutation(key, jnp.asarray(stars.features), axis=0))


def compute(config: ControlConfig, stages: Stages) -> Results:
    """Trains the gates and fits all controls."""
    cache = config.output.cache
    prepared = prepare(config.data, stages, cache)
    test = prepared.test.covered()
    classify = LinearGate().apply(prepared.classifier.params, test.features)
    with stages("gates"):
        mlp = run_gates(config.data, prepared, GateRun(config.mlp, config.network, n_seeds=config.n_seeds), cache)
        linear = run_gates(config.data, prepared, CONVERGED_LINEAR, cache)
    inputs = "features + expert predictions"
    variants = {
        ("mixture, classification gate", "classification gate", inputs): mix_by_class(prepared, test),
        ("mixture, linear regression gate", "linear gate", inputs): linear.predictions,
        ("mixture, MLP regression gate", "MLP gate", inputs): mlp.predictions,
    }
    n_mixtures = len(variants)
    variants |= fit_controls(config, prepared, stages)
    with stages("bootstrap"):
        named = {name: predictions for (name, _, _), predictions in variants.items()}
        table = compare_by(config, test.log_g, named, mlp.predictions)
    table[["form", "inputs"]] = [(form, inputs) for _, form, inputs in variants]
    weights = pd.DataFrame(
        {
            "cell": CELL_NAMES,
            "classification gate": np.asarray(classify).mean(axis=0),
            "linear regression gate": linear.mean_weights.mean(axis=0),
            "MLP regression gate": mlp.mean_weights.mean(axis=0),
            "MLP, lowest of the seeds": mlp.mean_weights.min(axis=0),
        }
    )
    weights["vanishes"] = [
        ", ".join(name for name in weights.columns[1:] if row[name] < VANISHING) for row in weights.to_dict("records")
    ]
    return variants_results(
        "What the mixture gains over simpler uses of the same information",
        config.bootstrap,
        table,
        setup=f"All are fitted on the same {prepared.n_covered:,} covered training stars with cross-fitted expert predictions, and "
        f"judged on {len(test.log_g):,} covered test stars. All networks have {config.mlp.hidden} hidden units and stop early on "
        "held-out stars.",
        against="the mixture with the MLP regression gate",
        groups=["mixtures"] * n_mixtures + ["controls"] * (len(variants) - n_mixtures),
        sections=[
            "## Mean weight by expert, covered test stars",
            table_markdown(weights, dict.fromkeys(weights.columns[1:5], ".3f")),
            f"*vanishes*: gates whose mean weight of the expert is below {VANISHING:g}.",
        ],
        tables={"mean_weights": weights},
    )


main = Study("control_gate", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
