"""Which method predicts log g best from the same noisy spectra, and why does a mixture of nine ridges lose?

    python -m experiments.compare_methods                    about 5 min on 2 cores
    python -m experiments.compare_methods --preset smoke     small; about a minute
    python -m experiments.compare_methods --noise-level 1 --n-train 100000

All methods are fitted to the covered training stars, choose what they have to choose on a held-out fifth of these, and predict the
same covered test stars. Results go to results/compare_methods/PRESET.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy

from experiments.pipeline.config import SMALL, ComparisonConfig, DataConfig, OutputOptions, draw_keys
from experiments.pipeline.gates import GateRun, fit_run
from experiments.pipeline.prepare import prepare
from experiments.pipeline.rivals import rival_methods
from experiments.pipeline.stars import Prepared
from experiments.pipeline.surveys import Observation, observe_surveys, require_grid_pixels
from experiments.report.claims import LIKELIHOOD, LOCAL, MIXTURE, NETWORK
from experiments.report.markdown import intervals, table_markdown
from experiments.report.results import Results, Study
from experiments.report.tables import pair_table
from experiments.report.variants import compare_by, variants_results
from experiments.runner.cache import Cache
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray
from moe_jax.core.pca import fit_pca
from moe_jax.experts import Ridge, fit_local, fit_weighted_ridge, median_error, predict_experts, predict_local, predict_ridge
from moe_jax.experts.local import error_template
from moe_jax.gates.controls import fit_mlp_regressor, predict_mlp_regressor
from moe_jax.gates.features import compute_features
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.routing import route_soft
from moe_jax.gates.training import GateConfig, fit_gate
from moe_jax.mixture import fit_moe, predict_moe
from moe_jax.spectra import Labels, cramer_rao, fit_labels, load_grid
from moe_jax.spectra.broadening import broaden_grid
from moe_jax.spectra.fisher import LABEL_UNITS


@dataclass(frozen=True)
class CompareConfig(ComparisonConfig):
    """The comparison."""

    n_components: tuple[int, ...] = (8, 13, 20, 40)
    """Numbers of principal components to choose from."""
    n_gate_components: int = 20
    """Components that a gate sees instead of line features."""
    n_landmarks: int = 1_000
    """Landmarks of the Nystroem kernel."""
    n_cells: tuple[int, ...] = (9, 25, 64, 256, 1_024)
    """Numbers of local linear experts; the last is the mixture of the table."""
    degree: int = 7
    """Degree of the polynomial of the labels behind the local experts."""
    n_floor: int = 1_000
    """Test stars of the Cramer-Rao floor."""
    network: GateConfig = group(GateConfig(epochs=300, patience=20), prefix=True)
    data: DataConfig = group(DataConfig(), without=("chunk_stars",))
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_components=1, n_cells=1, n_gate_components=1, n_landmarks=1, degree=1, n_floor=1)
        self.data.experts.require_nine_experts()


PRESETS = {
    "default": CompareConfig(),
    "smoke": CompareConfig(
        preset="smoke",
        data=dataclasses.replace(SMALL, experts=dataclasses.replace(SMALL.experts, n_folds=2)),
        n_components=(5, 13),
        n_landmarks=100,
        n_cells=(9, 64),
        degree=3,
        n_floor=100,
        network=GateConfig(epochs=5),
    ),
}

FLOOR = "Cramer-Rao floor"
PAIRS = ((NETWORK, MIXTURE), (LOCAL, NETWORK), (LOCAL, LIKELIHOOD))  # of the claims in FINDINGS


class Spectra(NamedTuple):
    """The covered stars of a survey."""

    flux: jax.Array  #: (N, P) noisy
    error: jax.Array  #: (N, P) standard deviation of the noise
    labels: Labels


Predict = Callable[[Spectra], Any]
"""From spectra to log g (N,), or to numbers (N, ...) that others are computed from."""


class Fitted(NamedTuple):
    """A method, its predictions, and its time."""

    prediction: np.ndarray  #: (N,) of the test stars
    seconds: float  #: to fit, with the choices and the compilation
    rate: float  #: stars predicted in a second, from spectra


def read_covered(observation: Observation) -> Spectra:
    """The noisy spectra and errors of the covered stars."""
    covered = np.asarray(observation.cell) >= 0
    flux, error = map(jnp.asarray, observation.read_covered())
    return Spectra(flux, error, Labels(*(np.asarray(label)[covered] for label in observation.labels)))


def choose(candidates: Sequence[Any], fit: Callable[[Any, np.ndarray], Predict], train: Spectra) -> Predict:
    """Fits each candidate to four fifths of the stars, and the best on the last fifth to all of them."""
    rows = np.arange(len(train.labels.log_g))
    if len(candidates) == 1:
        return fit(candidates[0], rows)
    held: Spectra = jax.tree.map(lambda array: array[::5], train)
    kept = rows[rows % 5 > 0]
    errors = [np.mean((np.asarray(fit(candidate, kept)(held)) - held.labels.log_g) ** 2) for candidate in candidates]
    return fit(candidates[int(np.argmin(errors))], rows)


def fit_bases(config: CompareConfig, train: Spectra) -> dict[str, Predict]:
    """Principal components of the training stars, as functions of any spectra.

    "plain": those of the noisy flux; "weighted": those of stars weighted by 1 / error^2, in units of the error of the pixel.
    """
    key, number = draw_keys(config.data.seed).pca, max(config.n_components)
    plain = fit_pca(key, train.flux, number)
    noise = median_error(train.error)
    template = error_template(train.error, noise)
    weight = 1 / noise
    mean = jnp.sum(train.flux * (weight**2)[:, None], axis=0) / jnp.sum(weight**2)
    scaled = (train.flux - mean[None, :]) * (weight[:, None] / template[None, :])
    vectors = fit_pca(jax.random.clone(key), scaled, number).components / template[None, :]
    return {
        "plain": lambda stars: stars.flux @ plain.components.T - (plain.components @ plain.mean)[None, :],
        "weighted": lambda stars: stars.flux @ vectors.T - (vectors @ mean)[None, :],
    }


def label_columns(stars: Spectra) -> np.ndarray:
    """(N, 4) labels that shape the spectra."""
    return np.stack([getattr(stars.labels, name) for name in LABEL_UNITS], axis=1)


def log_noise(stars: Spectra) -> jax.Array:
    """(N,) log of the median error of each star."""
    return jnp.log(median_error(stars.error))


def component_methods(config: CompareConfig, bases: dict[str, Predict], train: Spectra) -> dict[str, Callable[[], Predict]]:
    """Methods that regress on components; with each, how it is fitted."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import Ridge as RidgeRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures, StandardScaler

    y, key = train.labels.log_g, draw_keys(config.data.seed).gates
    z = {name: np.asarray(basis(train)) for name, basis in bases.items()}
    noise = np.log(np.asarray(median_error(train.error)))

    def on_components(basis: str, number: int, rows: np.ndarray, model: Any) -> Predict:
        model.fit(z[basis][rows, :number].astype(np.float64), y[rows])
        return lambda stars: model.predict(np.asarray(bases[basis](stars))[:, :number].astype(np.float64))

    def mlp(basis: str, with_noise: bool, number: int, rows: np.ndarray) -> Predict:
        def inputs(z: AnyArray, noise: AnyArray) -> jax.Array:
            x = jnp.asarray(z)[:, :number]
            return jnp.concatenate([x, jnp.asarray(noise)[:, None]], axis=1) if with_noise else x

        x = inputs(z[basis][rows], noise[rows])
        model, _ = fit_mlp_regressor(jax.random.clone(key), x, y[rows], hidden=64, config=config.network)
        return lambda stars: predict_mlp_regressor(model, inputs(bases[basis](stars), log_noise(stars)))

    def kernel(candidate: tuple[int, float], rows: np.ndarray) -> Predict:
        number, gamma = candidate
        # Columns are divided by the root of their scale: the leading components keep more weight in the distances.
        root = np.sqrt(z["plain"][rows, :number].std(axis=0)).astype(np.float64)
        kernel_map = Nystroem(gamma=gamma / (2 * np.sum(root**2)), n_components=config.n_landmarks, random_state=config.data.seed)
        model = make_pipeline(FunctionTransformer(lambda x: x / root), kernel_map, RidgeRegression(1e-2))
        return on_components("plain", number, rows, model)

    def quadratic(candidate: tuple[int, float], rows: np.ndarray) -> Predict:
        number, alpha = candidate
        model = make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False), RidgeRegression(alpha))
        return on_components("plain", number, rows, model)

    boostings: dict[str, Any] = {"HistGradientBoosting": HistGradientBoostingRegressor(random_state=config.data.seed)}
    if importlib.util.find_spec("lightgbm"):
        lightgbm = importlib.import_module("lightgbm")
        boostings["LightGBM"] = lightgbm.LGBMRegressor(n_estimators=500, learning_rate=0.05, verbose=-1)
    networks = {
        NETWORK: ("plain", False),
        "MLP on weighted components": ("weighted", False),
        "MLP on weighted components and noise": ("weighted", True),
    }
    numbers, everyone = config.n_components, np.arange(len(y))
    return {
        "quadratic ridge on components": partial(choose, [*itertools.product(numbers, (1.0, 100.0))], quadratic, train),
        "Nystroem kernel ridge on components": partial(choose, [*itertools.product(numbers, (1.0, 4.0))], kernel, train),
        **{f"{name} on components": partial(on_components, "plain", numbers[-1], everyone, m) for name, m in boostings.items()},
        **{name: partial(choose, numbers, partial(mlp, *inputs), train) for name, inputs in networks.items()},
    }


def fit_pls(x: np.ndarray, y: np.ndarray, n_components: int) -> Ridge:
    """Partial least squares: after m steps from 0, LSQR on centred data has its solution with m components (Elden 2004)."""
    x_mean, y_mean = x.mean(axis=0), y.mean()
    coef = scipy.sparse.linalg.lsqr(x - x_mean[None, :], y - y_mean, atol=0, btol=0, conlim=0, iter_lim=n_components)[0]
    return Ridge(jnp.asarray(coef, jnp.float32), jnp.asarray(y_mean - x_mean @ coef, jnp.float32))


def pixel_methods(config: CompareConfig, train: Spectra) -> dict[str, Callable[[], Predict]]:
    """Methods that see all pixels; with each, how it is fitted."""
    y = np.asarray(train.labels.log_g)
    labels = label_columns(train)

    def pls(number: int, rows: np.ndarray) -> Predict:
        ridge = fit_pls(np.asarray(train.flux)[rows], y[rows], number)
        return lambda stars: predict_ridge(ridge, stars.flux)

    def local(n_cells: int) -> Predict:
        mixture = fit_local(train.flux, train.error, labels, y, n_cells=n_cells, degree=config.degree, seed=config.data.seed)
        return lambda stars: predict_local(mixture, stars.flux, median_error(stars.error)).y

    sizes = [min(n_cells, len(y) // 4) for n_cells in config.n_cells]
    names = {n: f"{n:,} local linear experts" for n in sizes[:-1]} | {sizes[-1]: LOCAL}
    return {
        "partial least squares": partial(choose, [10, 20, 30, 45, 60], pls, train),
        **{name: partial(local, n) for n, name in names.items()},
    }


def line_features(prepared: Prepared, stars: Spectra) -> AnyArray:
    """(N, F) what a gate sees of spectra."""
    return compute_features(prepared.model, stars.flux, prepared.wave)


def mix_experts(prepared: Prepared, gate: LinearGate | MLPGate, params: Any, inputs: Predict) -> Predict:
    """The nine ridges, mixed by a gate on inputs."""
    return lambda stars: route_soft(gate.apply(params, inputs(stars)), predict_experts(prepared.experts, stars.flux))


def prepared_methods(config: CompareConfig, prepared: Prepared, stages: Stages) -> dict[str, tuple[Callable[[], Predict], float]]:
    """The methods of the other commands; with each, how it is finished, and the seconds that it took before."""
    seconds, features = stages.seconds, partial(line_features, prepared)
    before = seconds["experts, cross-validated"] + seconds["features"]

    def mlp_gate() -> Predict:
        fit = fit_run(draw_keys(config.data.seed).gates, config.data, prepared, GateRun(MLPGate()))
        return mix_experts(prepared, MLPGate(), fit.params, features)

    one_ridge: dict[str, tuple[Callable[[], Predict], float]] = {
        "one ridge for all stars": (
            lambda: lambda stars: predict_ridge(prepared.global_ridge.ridge, stars.flux),
            seconds["global ridge, cross-validated"],
        ),
    }
    return (one_ridge if prepared.has_global_ridge else {}) | {
        "nine ridges, classification gate": (
            lambda: mix_experts(prepared, LinearGate(), prepared.classifier.params, features),
            before + seconds["classification gate"],
        ),
        MIXTURE: (mlp_gate, before),
    }


def explanations(
    config: CompareConfig, prepared: Prepared, bases: dict[str, Predict], train: Spectra
) -> dict[str, Callable[[], Predict]]:
    """The mixture with one thing changed at a time; with each, how it is fitted."""
    stars, cell, key = prepared.gate_stars(), np.asarray(prepared.train.covered().cell), draw_keys(config.data.seed).gates
    y, n_folds, gate = jnp.asarray(stars.log_g), config.data.experts.n_folds, MLPGate()
    features, plain_basis, weighted_basis = partial(line_features, prepared), bases["plain"], bases["weighted"]
    plain, weighted = plain_basis(train), weighted_basis(train)
    wide = min(config.n_gate_components, plain.shape[1])

    def on_components(basis: Predict, x: AnyArray, gate_inputs: Predict) -> Predict:
        """Nine ridges on components, with a gate on other inputs."""
        alphas = tuple(float(a) for a in np.var(np.asarray(x[:, -1])) * np.array([1.0, 10.0, 100.0, 1_000.0]))
        mixture = fit_moe(key, x, y, cell, gate_inputs(train), alphas=alphas, n_folds=n_folds)
        return lambda stars: predict_moe(mixture, basis(stars), gate_inputs(stars)).y

    def by_weight() -> Predict:
        """Nine ridges with star weights. Each is fitted to thousands of stars in few columns: in-sample predictions will do."""
        alpha, noise = 10.0 * float(jnp.var(plain[:, -1])), median_error(train.error)
        weight = 1 / noise**2 / jnp.mean(1 / noise**2)
        cells = [np.flatnonzero(cell == k) for k in range(cell.max() + 1)]
        fits = [fit_weighted_ridge(plain[rows], y[rows], weight[rows], alpha) for rows in cells]
        ridges: Ridge = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)
        params = fit_gate(key, gate, stars.features, predict_ridge(ridges, plain), y).params
        return lambda stars: route_soft(gate.apply(params, features(stars)), predict_ridge(ridges, plain_basis(stars)))

    def residual_head() -> Predict:
        """The mixture's weights p, and one ridge on [p_k, p_k z]: all experts at once, free to leave each other's range."""
        mixture = fit_moe(key, plain, y, cell, stars.features, n_folds=n_folds)

        def columns(stars: Spectra) -> jax.Array:
            z = plain_basis(stars)
            p = predict_moe(mixture, z, features(stars)).weights
            z = jnp.concatenate([jnp.ones_like(z[:, :1]), z], axis=1)
            return (p[:, :, None] * z[:, None, :]).reshape(len(z), -1)

        ridge = fit_weighted_ridge(columns(train), y, jnp.ones_like(y), float(10 * jnp.var(plain[:, -1])))
        return lambda stars: predict_ridge(ridge, columns(stars))

    def gate_on_components() -> Predict:
        mean, scale = plain[:, :wide].mean(axis=0), plain[:, :wide].std(axis=0)

        def inputs(z: jax.Array) -> jax.Array:
            return (z[:, :wide] - mean[None, :]) / scale[None, :]

        params = fit_gate(key, gate, inputs(plain), stars.predictions, y).params
        return mix_experts(prepared, gate, params, lambda stars: inputs(plain_basis(stars)))

    def with_noise(stars: Spectra) -> jax.Array:
        return jnp.concatenate([weighted_basis(stars)[:, :wide], log_noise(stars)[:, None]], axis=1)

    number = plain.shape[1]
    return {
        f"(a) experts on {number} components": partial(on_components, plain_basis, plain, features),
        f"(a, b) experts on {number} components of weighted stars": partial(on_components, weighted_basis, weighted, features),
        "(b) as (a), stars weighted by 1 / error^2": by_weight,
        "(d) as (a), then one ridge on (p, p z)": residual_head,
        f"(e) gate on {wide} components": gate_on_components,
        "(a, b, e) experts and gate on weighted components and noise": partial(on_components, weighted_basis, weighted, with_noise),
    }


def fit_grid(stars: Spectra) -> AnyArray:
    """The likelihood fit of the model grid to stars at rest, their flux calibrated. It knows the grid, and no training star."""
    at_rest = np.zeros(len(stars.flux))
    return fit_labels(stars.flux, stars.error, velocity=at_rest, n_continuum=1, broadening=False).labels[:, 1]


def run(fit: Callable[[], Predict], test: Spectra, seconds: float) -> Fitted:
    """Fits a method, predicts the test stars twice, and times the fit and the second prediction."""
    start = time.perf_counter()
    predict = fit()
    seconds += time.perf_counter() - start
    np.asarray(predict(test))
    start = time.perf_counter()
    prediction = np.asarray(predict(test), np.float32)
    return Fitted(prediction, seconds, len(prediction) / (time.perf_counter() - start))


def floor_row(config: CompareConfig, test: Spectra) -> dict[str, Any]:
    """The row of the Cramer-Rao floor, from the first test stars."""
    n = min(config.n_floor, len(test.flux))
    grid = broaden_grid(load_grid(), config.data.resolution)
    floor = cramer_rao(jax.tree.map(lambda label: label[:n], test.labels), test.error[:n], grid, prior=True)
    mse = float(np.mean(floor**2))
    return {"variant": FLOOR, "r2": 1 - mse / float(np.var(test.labels.log_g)), "rms": mse**0.5}


def table_of(config: CompareConfig, fitted: Mapping[str, Fitted], y: np.ndarray) -> pd.DataFrame:
    """R2, rms, time, and the differences from both mixtures."""
    variants = {name: fit.prediction[None, :] for name, fit in fitted.items()}
    table = compare_by(config, y, variants, variants[MIXTURE])
    from_local = compare_by(config, y, variants, variants[LOCAL])
    table["rms"] = [float(np.sqrt(np.mean((fit.prediction - y) ** 2))) for fit in fitted.values()]
    for column in ("delta_r2", "low", "high"):
        table[f"{column}_from_local"] = from_local[column]
    table["seconds"], table["stars_per_second"] = [f.seconds for f in fitted.values()], [f.rate for f in fitted.values()]
    return table


def compute(config: CompareConfig, stages: Stages) -> Results:
    """Fits all methods."""
    require_grid_pixels(config.data)
    prepared = prepare(config.data, stages, Cache(None))
    with stages("spectra"):
        train, test = map(read_covered, observe_surveys(config.data))
    with stages("components"):
        bases = fit_bases(config, train)
    y = np.asarray(test.labels.log_g)
    others = component_methods(config, bases, train) | pixel_methods(config, train)
    others |= rival_methods(
        draw_keys(config.data.seed).gates,
        train,
        label_columns(train),
        lambda stars: jnp.concatenate([bases["weighted"](stars), log_noise(stars)[:, None]], axis=1),
        config.network,
    )
    others[LIKELIHOOD] = lambda: fit_grid
    changed = explanations(config, prepared, bases, train)
    begun = prepared_methods(config, prepared, stages)
    fitted: dict[str, Fitted] = {}
    for name, (fit, seconds) in (begun | {name: (fit, 0.0) for name, fit in (others | changed).items()}).items():
        with stages(name):
            fitted[name] = run(fit, test, seconds)
    with stages("bootstrap and floor"):
        table = table_of(config, fitted, y)
        floor = floor_row(config, test)
        predictions = {name: fit.prediction for name, fit in fitted.items()}
        cell = np.asarray(prepared.test.covered().cell)
        key = draw_keys(config.data.seed).bootstrap
        pairs = pair_table(key, config.bootstrap, y, predictions, PAIRS, cell, test.labels.mag)
    main_rows = table["variant"].isin([*begun, *others]) & ~table["variant"].str.endswith("local linear experts")
    shown = pd.concat([_shown(table[main_rows]), pd.DataFrame([floor])]).fillna("")
    why = _shown(table[~main_rows | table["variant"].isin([MIXTURE, LOCAL])])
    missing = "" if importlib.util.find_spec("lightgbm") else " LightGBM is not installed, so its row is left out."
    percent = f"{100 * config.bootstrap.confidence_level:g} %"
    sections = [
        f"{len(train.flux):,} covered training stars, {len(y):,} covered test stars, noise level "
        f"{config.data.noise_level:g}. Choices are made on a fifth of the training stars. Seconds to fit include choices and "
        f"compilation, but not the {stages.seconds['components']:.0f} s of the components; stars per second are predicted from "
        "spectra.",
        table_markdown(shown),
        f"Differences of R2 with {percent} intervals (paired {config.bootstrap.interval_method} bootstrap over the test stars). "
        "Weighted components: of stars weighted by 1 / error^2, in units of the error of the pixel. "
        f"{FLOOR}: root mean square of the floor with the knowledge of the survey's ranges of labels, of "
        f"{min(config.n_floor, len(y)):,} test stars.{missing}",
        "![Differences of R2](delta_r2.png)",
        "## Why the mixture loses",
        table_markdown(why),
        "(a) A ridge on pixels spends its penalty on noise. (b) Bright and faint stars count alike. (c) Nine cells are too coarse: "
        "the number of local linear experts. (d) A convex combination cannot leave the range of its experts. (e) Line features "
        "starve the gate. Each row changes the mixture in that only, and all but (c) keep the nine cells.",
    ]
    results = variants_results("Every method on the same spectra", config.bootstrap, table[main_rows], setup="", against=MIXTURE)
    tables = {"methods": table, "floor": pd.DataFrame([floor]), "pairs": pairs}
    return dataclasses.replace(results, sections=sections, tables=tables)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it stands in the report."""
    shown = table[["variant", "r2", "rms"]].copy()
    for title, suffix in (("from the mixture", ""), ("from the new mixture", "_from_local")):
        shown[title] = intervals(table, *(f"{name}{suffix}" for name in ("delta_r2", "low", "high")))
    shown["seconds to fit"] = table["seconds"].map("{:.1f}".format)
    shown["stars per second"] = table["stars_per_second"].map("{:,.0f}".format)
    return shown


main = Study("compare_methods", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
