"""Experts and gate trained together: experts for the mixture in closed form, the gate on what they predict, and so on.

    python -m experiments.train_jointly                  8,000 training stars, 4 gate seeds
    python -m experiments.train_jointly --preset smoke   small; about a minute

Every choice (penalty, epochs and rate of the gradient) is made on stars that were held out. The time of a fit grows with the cube
of the training stars. Results go to results/train_jointly/PRESET.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, DataConfig, GateStudyConfig, draw_keys
from experiments.pipeline.gates import gate_keys, mix_by_class
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.pipeline.surveys import observe_surveys
from experiments.report.claims import JOINT_QUESTIONS
from experiments.report.markdown import intervals, table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, seed_interval, variants_results
from experiments.runner.command_line import group, require_at_least, require_positive, run_command
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import AnyArray, matmul
from moe_jax.experts import Ridge, assign_folds, fit_mixture_experts, predict_ridge
from moe_jax.gates import GateConfig, GateFit, MLPGate, fit_gate, route_soft
from moe_jax.gates.optimize import Adam, Params, Rows, minimize

FROZEN, ONE_ROUND, ALL_ROUNDS, GRADIENT, LEAKY = (
    "frozen experts, MLP gate",
    "joint experts, one round",
    "joint experts, all rounds",
    "joint experts, one round, then all by gradient",
    "joint experts, one round, by a gate that saw all folds",
)
#: Pairs that are compared over seeds and test stars, and what their difference says.
PAIRS = ((ONE_ROUND, FROZEN), (ALL_ROUNDS, ONE_ROUND), (GRADIENT, ONE_ROUND), (LEAKY, ONE_ROUND))
QUESTIONS = dict(zip(JOINT_QUESTIONS, PAIRS, strict=True))


@dataclass(frozen=True)
class JointConfig(GateStudyConfig):
    """Alternation, and training by gradient."""

    joint_alphas: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Penalties of the joint experts to choose from, in the first round of the first seed."""
    n_rounds: int = 3
    """Alternations of experts and gate."""
    gradient_epochs: int = 20
    """Epochs of the training of experts and gate by gradient, at most."""
    gradient_rates: tuple[float, ...] = (1e-6, 1e-5)
    """Learning rates of the training by gradient to choose from."""
    data: DataConfig = group(DataConfig(n_train=8_000))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=2, n_rounds=1, gradient_epochs=1)
        require_positive(self, "joint_alphas", "gradient_rates")


PRESETS = {
    "default": JointConfig(),
    "smoke": JointConfig(
        preset="smoke",
        n_seeds=2,
        data=dataclasses.replace(SMALL, experts=dataclasses.replace(SMALL.experts, n_folds=2)),
        joint_alphas=(3.0,),
        n_rounds=2,
        gate=GateConfig(epochs=30),
        gradient_epochs=3,
        gradient_rates=(1e-5,),
    ),
}


class Data(NamedTuple):
    """The covered training and test stars with their spectra, less the mean training spectrum."""

    flux: jax.Array
    kernel: np.ndarray  #: (N, N) products of the training fluxes
    y: jax.Array
    features: jax.Array
    folds: np.ndarray
    test_flux: jax.Array
    test_y: jax.Array
    test_features: jax.Array

    def without(self, fold: int) -> np.ndarray:
        """Rows of the training stars outside a fold; of all for fold -1."""
        return np.flatnonzero(self.folds != fold)


class Round(NamedTuple):
    """One alternation: experts for the previous gate's weights, and a gate for these experts."""

    experts: Ridge  #: fitted to all stars
    blind: Ridge  #: fitted without the first fold
    out_of_fold: jax.Array  #: (N, K) predictions for each star by experts that were fitted without its fold
    gate: GateFit


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("gate", "alpha", "n_stars"))
@dataclass(frozen=True)
class JointObjective:
    """Squared error of the mixture with experts and gate both free; the ridge penalty is shared out over the stars."""

    gate: MLPGate
    alpha: float
    n_stars: int

    def __call__(self, params: Params, rows: Rows) -> jax.Array:
        """(N,) losses; ``rows`` are spectra, features and target."""
        x, features, y = rows
        experts, gate = split_params(params)
        penalty = self.alpha / self.n_stars * jnp.sum(experts.coef**2)
        return (y - route_soft(self.gate.apply(gate, features), predict_ridge(experts, x))) ** 2 + penalty


def split_params(params: Params) -> tuple[Ridge, Params]:
    """Experts, and the gate's params."""
    return Ridge(**params["experts"]), {name: leaf for name, leaf in params.items() if name != "experts"}


def load_data(config: JointConfig, prepared: Prepared) -> Data:
    """Observes the surveys again, and keeps the covered stars."""
    train, test = prepared.train.covered(), prepared.test.covered()
    flux, test_flux = (o.flux()[np.flatnonzero(np.asarray(o.cell) >= 0)] for o in observe_surveys(config.data))
    folds = np.asarray(assign_folds(draw_keys(config.data.seed).folds, train.cell, config.data.experts.n_folds))
    y, features, test_y, test_features = map(jnp.asarray, (train.log_g, train.features, test.log_g, test.features))
    mean = jnp.mean(flux, axis=0)
    flux, test_flux = flux - mean[None, :], test_flux - mean[None, :]
    return Data(flux, np.asarray(matmul(flux, flux.T)), y, features, folds, test_flux, test_y, test_features)


def train_gate(config: JointConfig, data: Data, key: jax.Array, predictions: AnyArray, fold: int = -1) -> GateFit:
    """A gate for the experts' out-of-fold predictions, of all stars or of those outside a fold."""
    rows = data.without(fold)
    return fit_gate(key, config.mlp, data.features[rows], jnp.asarray(predictions)[rows], data.y[rows], config.gate)


def weights_by_fold(config: JointConfig, data: Data, key: jax.Array, predictions: AnyArray) -> list[jax.Array]:
    """The (N, K) weights of a gate that was trained without each fold, then of one that was trained on all stars."""
    folds = [*range(config.data.experts.n_folds), -1]
    return [config.mlp.apply(train_gate(config, data, key, predictions, fold).params, data.features) for fold in folds]


def alternate(config: JointConfig, data: Data, key: jax.Array, weights: list[jax.Array], alpha: float) -> Round:
    """Experts for the weights, without each fold and of all stars; then a gate for their out-of-fold predictions."""

    def fit(fold: int) -> Ridge:
        rows = data.without(fold)
        kernel = data.kernel[np.ix_(rows, rows)]
        return fit_mixture_experts(data.flux[rows], data.y[rows], weights[fold][rows], alpha, kernel=kernel)

    by_fold = [fit(fold) for fold in range(len(weights) - 1)]
    out_of_fold = np.zeros(weights[0].shape, np.float32)
    for fold, experts in enumerate(by_fold):
        held = data.folds == fold
        out_of_fold[held] = predict_ridge(experts, data.flux[held])
    return Round(fit(-1), by_fold[0], jnp.asarray(out_of_fold), train_gate(config, data, key, out_of_fold))


def held_out_loss(fit: GateFit) -> float:
    """Loss on the stars that neither the gate's training nor, as they are out of fold, their experts have seen."""
    return float(np.asarray(fit.validation_loss)[int(fit.best_epoch)])


def predict(config: JointConfig, data: Data, experts: Ridge, gate: Params) -> np.ndarray:
    """(N,) predictions of a mixture for the test stars."""
    return np.asarray(route_soft(config.mlp.apply(gate, data.test_features), predict_ridge(experts, data.test_flux)))


def train_by_gradient(
    config: JointConfig, data: Data, key: jax.Array, start: Round, alpha: float
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Trains experts and gate together by Adam from a round; the rate and the number of epochs are chosen on a fold.

    First from the experts fitted without the first fold, and a gate that has not seen it either, on the other folds; then, for
    the chosen rate and number of epochs, from the experts of all stars on all stars. Where no epoch lowers the held-out loss,
    the round stays as it is.
    """
    train, held = data.without(0), np.flatnonzero(data.folds == 0)

    def params_of(experts: Ridge, gate_params: Params) -> Params:
        return {"experts": experts._asdict()} | gate_params

    def part(rows: np.ndarray) -> tuple[jax.Array, ...]:
        return data.flux[rows], data.features[rows], data.y[rows]

    blind = params_of(start.blind, train_gate(config, data, key, start.out_of_fold, 0).params)
    objective = JointObjective(config.mlp, alpha, len(train))
    before = float(jnp.mean(objective(blind, part(held))))
    tried = []
    for rate in config.gradient_rates:
        fit = minimize(key, objective, blind, part(train), Adam(rate, config.gradient_epochs, patience=5), validation=part(held))
        after = float(fit.validation_loss[fit.best_epoch])
        tried.append({"rate": rate, "n_epochs": int(fit.best_epoch) + 1, "before": before, "after": after})
    chosen = min(tried, key=lambda row: row["after"])
    params = params_of(start.experts, start.gate.params)
    if chosen["after"] < before:
        n_epochs = int(chosen["n_epochs"])
        adam = Adam(chosen["rate"], n_epochs, patience=n_epochs + 1)
        everything = JointObjective(config.mlp, alpha, len(data.y))
        params = minimize(key, everything, params, part(np.arange(len(data.y))), adam, validation=0.0).params
    return predict(config, data, *split_params(params)), tried


def compare_seeds(config: JointConfig, y: jax.Array, variants: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The difference of R2 of each pair of variants, with an interval over gate seeds and test stars."""
    rows = []
    for question, (method, baseline) in QUESTIONS.items():
        ends = seed_interval(config, y, variants[method], variants[baseline])
        rows.append((question, method, baseline, len(variants[method]), len(y), *ends))
    return pd.DataFrame(rows, columns=["question", "method", "baseline", "n_seeds", "n_test", "delta_r2", "low", "high"])


def train(
    config: JointConfig, prepared: Prepared, data: Data, stages: Stages
) -> tuple[dict[str, np.ndarray], float, pd.DataFrame, pd.DataFrame]:
    """Trains gates of frozen experts, then experts and gate together, for each seed.

    Returns:
        Predictions of each variant by seed, the chosen penalty, and tables of the rounds and of the training by gradient.
    """
    frozen_predictions, test = prepared.gate_stars().predictions, prepared.test.covered()
    by_name: dict[str, list[np.ndarray]] = {name: [] for name in (FROZEN, ONE_ROUND, ALL_ROUNDS, GRADIENT, LEAKY)}
    rounds: list[dict[str, Any]] = []
    gradients: list[dict[str, float]] = []
    alpha = np.nan
    keys = gate_keys(config.data, config.n_seeds)

    def run_round(seed: int, protocol: str, number: int, weights: list[jax.Array], penalty: float) -> Round:
        with stages(f"seed {seed}, round {number}, alpha {penalty:g}, {protocol}"):
            fitted = alternate(config, data, keys[seed], weights, penalty)
        errors = data.test_y - predict(config, data, fitted.experts, fitted.gate.params)
        losses = {"held_out_loss": held_out_loss(fitted.gate), "test_loss": float(jnp.mean(errors**2))}
        rounds.append({"seed": seed, "round": number, "alpha": penalty, "gates": protocol} | losses)
        console.print(", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
        return fitted

    for seed, key in enumerate(keys):
        with stages(f"seed {seed}, gates of the frozen experts"):
            weights = weights_by_fold(config, data, key, frozen_predictions)
        frozen = config.mlp.apply(train_gate(config, data, key, frozen_predictions).params, test.features)
        by_name[FROZEN].append(np.asarray(route_soft(frozen, test.predictions)))
        if seed == 0:
            tried = {a: run_round(seed, "by fold", 1, weights, a) for a in config.joint_alphas}
            alpha = min(tried, key=lambda a: held_out_loss(tried[a].gate))
        first = last = tried[alpha] if seed == 0 else run_round(seed, "by fold", 1, weights, alpha)
        leaky = run_round(seed, "of all stars", 1, [weights[-1]] * len(weights), alpha)
        for number in range(2, config.n_rounds + 1):
            last = run_round(seed, "by fold", number, weights_by_fold(config, data, key, last.out_of_fold), alpha)
        for name, fitted in ((ONE_ROUND, first), (ALL_ROUNDS, last), (LEAKY, leaky)):
            by_name[name].append(predict(config, data, fitted.experts, fitted.gate.params))
        with stages(f"seed {seed}, by gradient"):
            prediction, rates = train_by_gradient(config, data, key, first, alpha)
        by_name[GRADIENT].append(prediction)
        gradients += [{"seed": seed} | row for row in rates]
    variants = {"frozen experts, classification gate": mix_by_class(prepared, test)}
    variants |= {name: np.stack(predictions) for name, predictions in by_name.items()}
    return variants, alpha, pd.DataFrame(rounds), pd.DataFrame(gradients)


def compute(config: JointConfig, stages: Stages) -> Results:
    """Trains all variants and compares them."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("spectra"):
        data = jax.block_until_ready(load_data(config, prepared))
    variants, alpha, rounds, gradients = train(config, prepared, data, stages)
    with stages("bootstrap"):
        table = compare_by(config, data.test_y, variants, variants[FROZEN])
        differences = compare_seeds(config, data.test_y, variants)
    shown = differences[["question", "method", "baseline"]].assign(**{"delta R2": intervals(differences)})
    chosen = rounds[rounds["alpha"] == alpha].groupby(["gates", "round"], sort=False)
    means = chosen[["held_out_loss", "test_loss"]].mean().reset_index()
    return variants_results(
        "Experts and gate trained together",
        config.bootstrap,
        table,
        setup=f"{len(data.y):,} covered training stars; {len(data.test_y):,} covered test stars; {config.n_seeds} gate seeds, each "
        "with experts of its own. In a round all nine experts are fitted to the mixture in closed form, given the previous gate's "
        f"weights, with and without each of {config.data.experts.n_folds} folds; then the gate is trained on their out-of-fold "
        "predictions. The experts without a fold are given the weights of a gate that was trained without it. The penalty "
        f"({alpha:g}) is that of the lowest loss, in the first round of the first seed, on stars that the gate did not train on.",
        against=FROZEN,
        sections=[
            "## Does more than one round help, and what does the leak do?",
            table_markdown(shown),
            f"Intervals: {100 * config.bootstrap.confidence_level:g} %, over gate seeds and test stars. *a gate that saw the "
            "held-out fold*: the experts without a fold are given the weights of one gate, trained on all stars.",
            "## Rounds",
            table_markdown(means, {"held_out_loss": ".5f", "test_loss": ".5f"}),
            "Means over seeds. *held out loss*: of the gate on its validation stars, with experts that did not see them; *test "
            "loss*: of the mixture, with experts of all stars. `rounds.csv` has each seed and penalty.",
            "## By gradient",
            table_markdown(gradients, {"rate": "g", "before": ".5f", "after": ".5f"}),
            "Objective on the first fold, which neither experts nor gate had seen, before and after the best epoch. Where no rate "
            "lowers it, nothing is trained by gradient.",
        ],
        tables={"differences": differences, "rounds": rounds, "gradient": gradients},
        fields={"alpha": alpha},
    )


main = Study("train_jointly", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
