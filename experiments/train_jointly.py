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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, StudyConfig, draw_keys
from experiments.pipeline.gates import mix_by_class
from experiments.pipeline.observation import observe_surveys
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.markdown import table_markdown
from experiments.report.results import output_folder
from experiments.report.variants import compare_by, write_variants
from experiments.runner.command_line import run_command
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
class JointConfig(StudyConfig):
    """Alternation, and training by gradient."""

    preset: Literal["default", "smoke"] = "default"
    """What the other options start from."""
    joint_alphas: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Penalties of the joint experts to choose from, in the first round."""
    n_rounds: int = 3
    """Most alternations of experts and gate."""
    least_improvement: float = 0.005
    """A round that lowers the held-out loss by less than this part of it is the last."""
    max_sweeps: int = 60
    """Most sweeps of back-fitting in a round."""
    tolerance: float = 1e-3
    """Back-fitting ends where a sweep lowers its objective by less than this part of it."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    gradient_epochs: int = 20
    """Most epochs of the training of everything by gradient."""
    gradient_rates: tuple[float, ...] = (1e-6, 1e-5)
    """Its learning rates to choose from."""


PRESETS = {
    "default": JointConfig(),
    "smoke": JointConfig(
        preset="smoke",
        **SMALL,
        n_folds=2,
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
    folds = np.asarray(assign_folds(draw_keys(config.seed).folds, train.cell, config.n_folds))
    y, features, test_y, test_features = map(jnp.asarray, (train.log_g, train.features, test.log_g, test.features))
    return Data(flux, y, features, folds, test_flux, test_y, test_features)


def alternate(config: JointConfig, data: Data, weights: jax.Array, alpha: float, start: Params) -> Round:
    """Experts for the weights, with and without each fold; then a gate for their out-of-fold predictions."""
    backfit = backfit_mixture_experts(
        data.flux, data.y, weights, alpha, folds=data.folds, max_sweeps=config.max_sweeps, tolerance=config.tolerance
    )
    key = draw_keys(config.seed).gates
    gate = fit_gate(key, MLPGate(config.hidden), data.features, backfit.out_of_fold, data.y, config.gate, start=start)
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
    gate = MLPGate(config.hidden)
    key = draw_keys(config.seed).gates
    train, held = np.flatnonzero(data.folds != 0), np.flatnonzero(data.folds == 0)

    def params_of(experts: Ridge, gate_params: Params) -> Params:
        return {"experts": jax.tree.map(jnp.asarray, experts._asdict())} | gate_params

    def part(rows: np.ndarray) -> tuple[jax.Array, ...]:
        return data.flux[rows], data.features[rows], data.y[rows]

    with stages("gradient: choosing rate and epochs"):
        own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], best.backfit.by_fold)
        out_of_fold = jnp.asarray(best.backfit.out_of_fold)
        blind = fit_gate(key, gate, data.features[train], out_of_fold[train], data.y[train], config.gate)
        start = params_of(own, blind.params)
        mixture = route_soft(gate.apply(blind.params, data.features[held]), predict_ridge(own, data.flux[held]))
        before = float(jnp.mean((data.y[held] - mixture) ** 2))
        tried = []
        penalty = alpha / len(train) * float(jnp.sum(own.coef**2))
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


def predict_round(config: JointConfig, data: Data, found: Round) -> np.ndarray:
    """(1, N) predictions of a round's mixture for the test stars."""
    weights = MLPGate(config.hidden).apply(jax.tree.map(jnp.asarray, found.gate.params), data.test_features)
    experts = jax.tree.map(jnp.asarray, found.backfit.experts)
    return np.asarray(route_soft(weights, predict_ridge(experts, data.test_flux)))[None, :]


def main(config: JointConfig) -> pd.DataFrame:
    """Trains experts and gate together and writes the results."""
    stages = Stages()
    output_folder(config, "train_jointly")
    prepared = prepare(config.data, stages, config.cache)
    with stages("spectra"):
        data = jax.block_until_ready(load_data(config, prepared))
    gate = MLPGate(config.hidden)
    with stages("gates of the frozen experts"):
        frozen_stars = prepared.gate_stars()
        x, yhat, y = (jnp.asarray(array) for array in (frozen_stars.features, frozen_stars.predictions, frozen_stars.log_g))
        frozen = fit_gate(draw_keys(config.seed).gates, gate, x, yhat, y, config.gate)
        longer = dataclasses.replace(config.gate, epochs=config.gate.epochs * (config.n_rounds + 1))
        trained_longer = fit_gate(draw_keys(config.seed).gates, gate, x, yhat, y, longer)
    settings = {"data": dataclasses.asdict(config.data), "gate": dataclasses.asdict(config.gate), "hidden": config.hidden}
    settings |= {"max_sweeps": config.max_sweeps, "tolerance": config.tolerance}

    def run_round(weights: jax.Array, start: Params, path: list[float]) -> Round:
        return config.cache.load_or_compute(
            "joint", settings | {"path": path}, [__file__], Round, lambda: alternate(config, data, weights, path[-1], start)
        )[0]

    history: list[dict[str, Any]] = []

    def note(number: int, alpha: float, found: Round) -> None:
        sweeps = int(found.backfit.n_sweeps)
        objective = float(np.asarray(found.backfit.objective)[sweeps])
        row = {
            "round": number,
            "alpha": alpha,
            "held_out_loss": held_out_loss(found.gate),
            "sweeps": sweeps,
            "converged": bool(found.backfit.converged),
            "objective": objective,
        }
        history.append(row | {"training_mse": training_mse(data, found, gate)})
        console.print(
            f"round {number}, alpha {alpha:g}: held-out loss {row['held_out_loss']:.5f}, {sweeps} sweeps", highlight=False
        )

    weights, start = gate.apply(frozen.params, data.features), frozen.params
    rounds: dict[float, Round] = {}
    for alpha in config.joint_alphas:
        with stages(f"round 1, alpha {alpha:g}"):
            rounds[alpha] = run_round(weights, start, [alpha])
        note(1, alpha, rounds[alpha])
    alpha = min(rounds, key=lambda a: held_out_loss(rounds[a].gate))
    best = rounds[alpha]
    first = best
    path = [alpha]
    for number in range(2, config.n_rounds + 1):
        params = jax.tree.map(jnp.asarray, best.gate.params)
        path = [*path, alpha]
        with stages(f"round {number}, alpha {alpha:g}"):
            following = run_round(gate.apply(params, data.features), params, path)
        note(number, alpha, following)
        improvement = 1.0 - held_out_loss(following.gate) / held_out_loss(best.gate)
        best = following if improvement > 0 else best
        if improvement < config.least_improvement:
            break
    variants = {
        "frozen experts, classification gate": mix_by_class(prepared, prepared.test.covered()),
        "frozen experts, MLP gate": _mixture(gate, frozen, prepared),
        f"frozen experts, MLP gate, {longer.epochs} epochs": _mixture(gate, trained_longer, prepared),
        "joint experts, one round": predict_round(config, data, first),
        "joint experts, best round": predict_round(config, data, best),
    }
    by_gradient, tried = train_by_gradient(config, data, best, alpha, stages)
    if by_gradient is not None:
        variants["all by gradient from the best round"] = by_gradient
    with stages("bootstrap"):
        table = compare_by(
            config,
            data.test_y,
            variants,
            variants["frozen experts, MLP gate"],
        )
    rounds_table, gradient_table = pd.DataFrame(history), pd.DataFrame(tried)
    outcome = "" if by_gradient is not None else " No epoch lowered the held-out loss, so nothing was trained by gradient."
    write_variants(
        "train_jointly",
        "Experts and gate trained together",
        config,
        PRESETS,
        stages,
        table,
        setup=f"{len(data.y):,} covered training stars; {len(data.test_y):,} covered test stars. In a round all nine experts are "
        "fitted to the mixture, given the previous gate's weights (back-fitting, with and without each of "
        f"{config.n_folds} folds); then the gate is trained on their out-of-fold predictions. Penalty and round are those of the "
        "lowest loss on stars that the gate did not train on, predicted by experts that did not see them.",
        against="frozen experts, MLP gate",
        sections=[
            "## Rounds",
            table_markdown(rounds_table, {"alpha": "g", "held_out_loss": ".5f", "training_mse": ".5f", "objective": ".1f"}),
            f"Frozen experts: held-out loss {held_out_loss(frozen):.5f}, with {longer.epochs} epochs "
            f"{held_out_loss(trained_longer):.5f} (their validation stars are the same). *training mse*: of the mixture on the "
            "stars that its experts were fitted to.",
            "## By gradient",
            table_markdown(gradient_table, {"rate": "g", "before": ".5f", "after": ".5f"}),
            f"Objective on the first fold, which neither experts nor gate had seen, before and after the best epoch.{outcome}",
        ],
        tables={"rounds": rounds_table, "gradient": gradient_table},
        found={"alpha": alpha, "frozen_held_out_loss": held_out_loss(frozen)},
    )
    return table


def _mixture(gate: MLPGate, fit: GateFit, prepared: Prepared) -> np.ndarray:
    test = prepared.test.covered()
    return np.asarray(route_soft(gate.apply(fit.params, test.features), test.predictions))[None, :]


def training_mse(data: Data, found: Round, gate: MLPGate) -> float:
    """Mean squared error of a round's mixture on the stars that its experts were fitted to."""
    weights = gate.apply(jax.tree.map(jnp.asarray, found.gate.params), data.features)
    experts: AnyArray = predict_ridge(jax.tree.map(jnp.asarray, found.backfit.experts), data.flux)
    return float(jnp.mean((data.y - route_soft(weights, experts)) ** 2))


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
