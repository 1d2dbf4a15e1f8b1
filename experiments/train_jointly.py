"""Experts and gate trained together: experts for the mixture in closed form by back-fitting, the gate on what they predict.

    python -m experiments.train_jointly                  about 26 min on 2 cores, 6.1 GiB
    python -m experiments.train_jointly --preset smoke   small; about two minutes

Every choice (penalty, round, gradient steps) is made on stars that were held out. A run that was stopped goes on where it was,
from the cache. Results go to results/train_jointly/PRESET.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, ComparisonConfig, draw_keys
from experiments.pipeline.gates import mix_by_class
from experiments.pipeline.observation import observe_surveys
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import group, run_command
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import AnyArray
from moe_jax.experts.fit import assign_folds
from moe_jax.experts.joint import Backfit, backfit_mixture_experts
from moe_jax.experts.ridge import Ridge, predict_ridge
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.optimize import Adam, GateFit, Params, Rows, minimize
from moe_jax.gates.routing import route_soft
from moe_jax.gates.training import GateConfig, fit_gate


@dataclass(frozen=True)
class JointConfig(ComparisonConfig):
    """Alternation, and training by gradient."""

    joint_alphas: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Penalties of the joint experts to choose from, in the first round."""
    n_rounds: int = 3
    """Alternations of experts and gate, at most."""
    least_improvement: float = 0.005
    """A round that lowers the held-out loss by less than this part of it is the last."""
    max_sweeps: int = 60
    """Sweeps of back-fitting in a round, at most."""
    tolerance: float = 1e-3
    """Back-fitting ends where a sweep lowers its objective by less than this part of it."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    gradient_epochs: int = 20
    """Epochs of the training of experts and gate by gradient, at most."""
    gradient_rates: tuple[float, ...] = (1e-6, 1e-5)
    """Learning rates of the training by gradient to choose from."""
    mlp: MLPGate = group(MLPGate())


PRESETS = {
    "default": JointConfig(),
    "smoke": JointConfig(
        preset="smoke",
        data=dataclasses.replace(SMALL, experts=dataclasses.replace(SMALL.experts, n_folds=2)),
        joint_alphas=(3.0,),
        n_rounds=2,
        max_sweeps=3,
        gate=GateConfig(epochs=30),
        gradient_epochs=3,
        gradient_rates=(1e-5,),
    ),
}


class Data(NamedTuple):
    """The covered training and test stars with their spectra."""

    flux: jax.Array
    y: jax.Array
    features: jax.Array
    folds: np.ndarray
    test_flux: jax.Array
    test_y: jax.Array
    test_features: jax.Array


class Round(NamedTuple):
    """One alternation: experts for the previous gate's weights, and a gate for these experts."""

    backfit: Backfit
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
        experts = Ridge(**params["experts"])
        gate = {name: leaf for name, leaf in params.items() if name != "experts"}
        penalty = self.alpha / self.n_stars * jnp.sum(experts.coef**2)
        return (y - route_soft(self.gate.apply(gate, features), predict_ridge(experts, x))) ** 2 + penalty


def load_data(config: JointConfig, prepared: Prepared) -> Data:
    """Observes the surveys again, and keeps the covered stars."""
    train, test = prepared.train.covered(), prepared.test.covered()
    flux, test_flux = (o.flux()[np.flatnonzero(np.asarray(o.cell) >= 0)] for o in observe_surveys(config.data))
    folds = np.asarray(assign_folds(draw_keys(config.data.seed).folds, train.cell, config.data.experts.n_folds))
    y, features, test_y, test_features = map(jnp.asarray, (train.log_g, train.features, test.log_g, test.features))
    return Data(flux, y, features, folds, test_flux, test_y, test_features)


def alternate(config: JointConfig, data: Data, weights: jax.Array, alpha: float, start: Params) -> Round:
    """Experts for the weights, with and without each fold; then a gate for their out-of-fold predictions."""
    backfit = backfit_mixture_experts(
        data.flux, data.y, weights, alpha, folds=data.folds, max_sweeps=config.max_sweeps, tolerance=config.tolerance
    )
    key = draw_keys(config.data.seed).gates
    gate = fit_gate(key, config.mlp, data.features, backfit.out_of_fold, data.y, config.gate, start=start)
    return Round(backfit, gate)


def held_out_loss(fit: GateFit) -> float:
    """Loss on the stars that neither the gate's training nor, as they are out of fold, their experts have seen."""
    return float(np.asarray(fit.validation_loss)[int(fit.best_epoch)])


def train_by_gradient(
    config: JointConfig, data: Data, best: Round, alpha: float, stages: Stages
) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """Trains experts and gate together by Adam from the best round; the rate and the number of epochs are chosen on a fold.

    First from the experts fitted without the first fold, and a gate that has not seen it either, on the other folds; then, for
    the chosen rate and number of epochs, from the experts of all stars on all stars. None where no epoch lowers the held-out
    loss.
    """
    gate, key = config.mlp, draw_keys(config.data.seed).gates
    train, held = np.flatnonzero(data.folds != 0), np.flatnonzero(data.folds == 0)

    def params_of(experts: Ridge, gate_params: Params) -> Params:
        return {"experts": jax.tree.map(jnp.asarray, experts._asdict())} | gate_params

    def part(rows: np.ndarray) -> tuple[jax.Array, ...]:
        return data.flux[rows], data.features[rows], data.y[rows]

    with stages("gradient: choosing rate and epochs"):
        blind_experts = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], best.backfit.by_fold)
        out_of_fold = jnp.asarray(best.backfit.out_of_fold)
        blind = fit_gate(key, gate, data.features[train], out_of_fold[train], data.y[train], config.gate)
        start = params_of(blind_experts, blind.params)
        mixture = route_soft(gate.apply(blind.params, data.features[held]), predict_ridge(blind_experts, data.flux[held]))
        before = float(jnp.mean((data.y[held] - mixture) ** 2))
        tried = []
        penalty = alpha / len(train) * float(jnp.sum(blind_experts.coef**2))
        for rate in config.gradient_rates:
            adam = Adam(rate, config.gradient_epochs, patience=5)
            fit = minimize(key, JointObjective(gate, alpha, len(train)), start, part(train), adam, validation=part(held))
            after = float(fit.validation_loss[fit.best_epoch])
            # The objective carries the ridge penalty, which is no part of the error.
            tried.append({"rate": rate, "n_epochs": int(fit.best_epoch) + 1, "before": before + penalty, "after": after})
    chosen = min(tried, key=lambda row: row["after"])
    if chosen["after"] >= chosen["before"]:
        return None, tried
    with stages("gradient: all stars"):
        n_epochs = int(chosen["n_epochs"])
        adam = Adam(chosen["rate"], n_epochs, patience=n_epochs + 1)
        everything = params_of(best.backfit.experts, jax.tree.map(jnp.asarray, best.gate.params))
        rows = np.arange(len(data.y))
        fit = minimize(key, JointObjective(gate, alpha, len(rows)), everything, part(rows), adam, validation=0.0)
        gate_params = {name: leaf for name, leaf in fit.params.items() if name != "experts"}
        prediction = route_soft(
            gate.apply(gate_params, data.test_features), predict_ridge(Ridge(**fit.params["experts"]), data.test_flux)
        )
    return np.asarray(prediction)[None, :], tried


def predict_round(config: JointConfig, fitted: Round, features: jax.Array, flux: jax.Array) -> jax.Array:
    """(N,) predictions of a round's mixture."""
    weights = config.mlp.apply(jax.tree.map(jnp.asarray, fitted.gate.params), features)
    experts = jax.tree.map(jnp.asarray, fitted.backfit.experts)
    return route_soft(weights, predict_ridge(experts, flux))


class Rounds(NamedTuple):
    """All alternations, and what was chosen of them."""

    alpha: float
    first: Round
    best: Round
    table: pd.DataFrame  #: a row for each round, and of the first for each alpha


def alternate_rounds(config: JointConfig, data: Data, frozen: GateFit, stages: Stages) -> Rounds:
    """Chooses alpha in the first round, then alternates until the held-out loss hardly falls."""
    settings = {"data": dataclasses.asdict(config.data), "gate": dataclasses.asdict(config.gate), "hidden": config.mlp.hidden}
    settings |= {"max_sweeps": config.max_sweeps, "tolerance": config.tolerance}
    rows: list[dict[str, Any]] = []

    def run_round(path: list[float], params: Params) -> Round:
        """The round after those of the alphas ``path[:-1]``, which ended with the gate ``params``."""
        number, alpha = len(path), path[-1]
        weights = config.mlp.apply(params, data.features)
        with stages(f"round {number}, alpha {alpha:g}"):
            fitted, _ = config.output.cache.load_or_compute(
                "joint", settings | {"path": path}, [__file__], Round, lambda: alternate(config, data, weights, alpha, params)
            )
        loss, sweeps = held_out_loss(fitted.gate), int(fitted.backfit.n_sweeps)
        row = {"round": number, "alpha": alpha, "held_out_loss": loss, "sweeps": sweeps}
        row |= {"converged": bool(fitted.backfit.converged), "objective": float(np.asarray(fitted.backfit.objective)[sweeps])}
        errors = data.y - predict_round(config, fitted, data.features, data.flux)
        rows.append(row | {"training_mse": float(jnp.mean(errors**2))})
        console.print(f"round {number}, alpha {alpha:g}: held-out loss {loss:.5f}, {sweeps} sweeps", highlight=False)
        return fitted

    rounds = {alpha: run_round([alpha], frozen.params) for alpha in config.joint_alphas}
    alpha = min(rounds, key=lambda a: held_out_loss(rounds[a].gate))
    first = best = rounds[alpha]
    for number in range(2, config.n_rounds + 1):
        following = run_round([alpha] * number, jax.tree.map(jnp.asarray, best.gate.params))
        improvement = 1.0 - held_out_loss(following.gate) / held_out_loss(best.gate)
        best = following if improvement > 0 else best
        if improvement < config.least_improvement:
            break
    return Rounds(alpha, first, best, pd.DataFrame(rows))


def compute(config: JointConfig, stages: Stages) -> Results:
    """Trains gates of frozen experts, then experts and gate together."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("spectra"):
        data = jax.block_until_ready(load_data(config, prepared))
    longer = dataclasses.replace(config.gate, epochs=config.gate.epochs * (config.n_rounds + 1))
    with stages("gates of the frozen experts"):
        stars, test = prepared.gate_stars(), prepared.test.covered()
        x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
        key = draw_keys(config.data.seed).gates
        frozen, trained_longer = (fit_gate(key, config.mlp, x, yhat, y, training) for training in (config.gate, longer))
    rounds = alternate_rounds(config, data, frozen, stages)

    def frozen_mixture(fit: GateFit) -> AnyArray:
        return route_soft(config.mlp.apply(fit.params, test.features), test.predictions)[None, :]

    def joint_mixture(fitted: Round) -> AnyArray:
        return predict_round(config, fitted, data.test_features, data.test_flux)[None, :]

    variants = {
        "frozen experts, classification gate": mix_by_class(prepared, test),
        "frozen experts, MLP gate": frozen_mixture(frozen),
        f"frozen experts, MLP gate, {longer.epochs} epochs": frozen_mixture(trained_longer),
        "joint experts, one round": joint_mixture(rounds.first),
        "joint experts, best round": joint_mixture(rounds.best),
    }
    by_gradient, tried = train_by_gradient(config, data, rounds.best, rounds.alpha, stages)
    if by_gradient is not None:
        variants["all by gradient from the best round"] = by_gradient
    with stages("bootstrap"):
        table = compare_by(config, data.test_y, variants, variants["frozen experts, MLP gate"])
    gradient = pd.DataFrame(tried)
    outcome = "" if by_gradient is not None else " No epoch lowered the held-out loss, so nothing was trained by gradient."
    return variants_results(
        "Experts and gate trained together",
        config.bootstrap,
        table,
        setup=f"{len(data.y):,} covered training stars; {len(data.test_y):,} covered test stars. In a round all nine experts are "
        "fitted to the mixture, given the previous gate's weights (back-fitting, with and without each of "
        f"{config.data.experts.n_folds} folds); then the gate is trained on their out-of-fold predictions. Penalty and round are "
        "those of the lowest loss on stars that the gate did not train on, predicted by experts that did not see them.",
        against="frozen experts, MLP gate",
        sections=[
            "## Rounds",
            table_markdown(rounds.table, {"alpha": "g", "held_out_loss": ".5f", "training_mse": ".5f", "objective": ".1f"}),
            f"Frozen experts: held-out loss {held_out_loss(frozen):.5f}, with {longer.epochs} epochs "
            f"{held_out_loss(trained_longer):.5f} (their validation stars are the same). *training mse*: of the mixture on the "
            "stars that its experts were fitted to.",
            "## By gradient",
            table_markdown(gradient, {"rate": "g", "before": ".5f", "after": ".5f"}),
            f"Objective on the first fold, which neither experts nor gate had seen, before and after the best epoch.{outcome}",
        ],
        tables={"rounds": rounds.table, "gradient": gradient},
        fields={"alpha": rounds.alpha, "frozen_held_out_loss": held_out_loss(frozen)},
    )


main = Study("train_jointly", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
