"""What a user would write otherwise: the same experiment with scikit-learn and a PyTorch loop, and its pieces; for benchmarks.

python -m experiments.timing.peers train.h5 test.h5     the whole pipeline, its seconds by stage on the last line as JSON

PyTorch comes with the extra ``benchmark``; nothing else of this project needs it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import scipy

from moe_jax.experts.cells import M_H_EDGES, N_CELLS, T_EFF_EDGES
from moe_jax.gates.features import LINE_WINDOWS, SIDEBAND

if TYPE_CHECKING:
    from sklearn.linear_model import Ridge

ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
GLOBAL_ALPHAS = (1.0, 10.0, 100.0)
C_GRID = (10.0, 100.0, 1000.0)
BATCH = 256  # stars of a batch
SCIPY_OPTIONS = {"paired": True, "vectorized": True, "method": "percentile", "rng": 0}


def grid_search_ridge(x: np.ndarray, y: np.ndarray, alphas: tuple[float, ...], n_folds: int) -> Ridge:
    """Ridge with its alpha by ``GridSearchCV``."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ill-conditioned matrices, at the smallest alphas in float32
        search = GridSearchCV(Ridge(), {"alpha": list(alphas)}, cv=n_folds, scoring="neg_mean_squared_error").fit(x, y)
    best: Ridge = search.best_estimator_
    return best


def torch_gate(
    features: np.ndarray,
    expert_predictions: np.ndarray,
    y: np.ndarray,
    *,
    hidden: int | None,
    epochs: int,
    patience: int,
    use_loader: bool,
) -> Callable[[np.ndarray], np.ndarray]:
    """A gate trained in PyTorch on the squared error of the mixture, as the function from features (N, F) to weights (N, K).

    A fifth of the stars is held out to choose the epoch. ``hidden`` is None for a linear gate. Batches come from a ``DataLoader``
    (shuffled, as in the original experiment) or are slices of a permutation.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    data = [torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in (features, expert_predictions, y)]
    n_features, n_experts = features.shape[1], expert_predictions.shape[1]
    hidden_layers = [] if hidden is None else [nn.Linear(n_features, hidden), nn.ReLU()]
    net = nn.Sequential(*hidden_layers, nn.Linear(hidden or n_features, n_experts), nn.Softmax(dim=1))
    order = torch.randperm(len(y))
    n_held = round(0.2 * len(y))
    held, train = ([array[rows] for array in data] for rows in (order[:n_held], order[n_held:]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def loss_of(x: Any, predictions: Any, target: Any) -> Any:
        return torch.mean((target - torch.sum(net(x) * predictions, dim=1)) ** 2)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=BATCH, shuffle=True)
    best, best_epoch, kept = np.inf, 0, net.state_dict()
    for epoch in range(epochs):
        if use_loader:
            batches: Iterable[Any] = loader
        else:
            shuffled = torch.randperm(len(train[0]))
            batches = ([array[rows] for array in train] for rows in shuffled.split(BATCH))
        for batch in batches:
            optimizer.zero_grad()
            loss_of(*batch).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_of(*held))
        if loss < best:
            best, best_epoch = loss, epoch
            kept = {name: value.clone() for name, value in net.state_dict().items()}
        if epoch - best_epoch >= patience:
            break
    net.load_state_dict(kept)

    def weights(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            result: np.ndarray = net(torch.from_numpy(np.ascontiguousarray(x, np.float32))).numpy()
        return result

    return weights


def loop_bootstrap(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray, n_resamples: int) -> np.ndarray:
    """Delta R2 overall and by cell, a loop over ``r2_score``; (B, 1 + cells)."""
    from sklearn.metrics import r2_score

    rng = np.random.default_rng(0)
    samples = np.full((n_resamples, 1 + N_CELLS), np.nan)
    for i in range(n_resamples):
        rows = rng.integers(0, len(y), len(y))
        parts = [rows, *(rows[cell[rows] == k] for k in range(N_CELLS))]
        for j, part in enumerate(parts):
            if len(part) > 1:
                samples[i, j] = r2_score(y[part], prediction[part]) - r2_score(y[part], baseline[part])
    return samples


def _delta(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
    """Delta R2 along an axis."""
    total = np.sum((y - np.mean(y, axis=axis, keepdims=True)) ** 2, axis=axis)
    gain = np.sum((prediction - baseline) * (2.0 * y - baseline - prediction), axis=axis)
    return np.asarray(gain / total)


def scipy_bootstrap(
    y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray, n_resamples: int, batch: int | None = None
) -> list[Any]:
    """Delta R2 overall and by cell by vectorised ``scipy.stats.bootstrap``: ten calls, a cell resampled by itself."""
    options: dict[str, Any] = SCIPY_OPTIONS | {"n_resamples": n_resamples, "batch": batch}
    parts = [slice(None), *(cell == k for k in range(N_CELLS))]
    return [scipy.stats.bootstrap((y[part], prediction[part], baseline[part]), _delta, **options) for part in parts]


def scipy_joint_bootstrap(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray, n_resamples: int) -> Any:
    """As ``bootstrap_delta_r2`` does: overall and all cells from the same resamples, in one call of ``scipy.stats.bootstrap``."""

    def statistics(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray, axis: int = -1) -> np.ndarray:
        gain = (prediction - baseline) * (2.0 * y - baseline - prediction)
        values = [_delta(y, prediction, baseline, axis)]
        for k in range(N_CELLS):
            in_cell = cell == k
            mean = np.sum(y, axis=axis, where=in_cell, keepdims=True) / np.sum(in_cell, axis=axis, keepdims=True)
            total = np.sum((y - mean) ** 2, axis=axis, where=in_cell)
            values.append(np.sum(gain, axis=axis, where=in_cell) / total)
        return np.stack(values)

    options: dict[str, Any] = SCIPY_OPTIONS | {"n_resamples": n_resamples}
    return scipy.stats.bootstrap((y, prediction, baseline, cell), statistics, **options)


def arch_bootstrap(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray, n_resamples: int) -> np.ndarray:
    """Delta R2 overall and by cell by ``arch.bootstrap.IIDBootstrap``; (B, 1 + cells)."""
    from arch.bootstrap import IIDBootstrap

    def statistics(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, cell: np.ndarray) -> np.ndarray:
        parts = [slice(None), *(cell == k for k in range(N_CELLS))]
        return np.array([_delta(y[part], prediction[part], baseline[part]) for part in parts])

    samples: np.ndarray = IIDBootstrap(y, prediction, baseline, cell, seed=0).apply(statistics, n_resamples)
    return samples


def read_survey(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Wavelengths, flux with noise of level 0.2, and labels."""
    with h5py.File(path) as file:
        wave = file["spectrumdataset/wave"][:]
        flux, error = file["dataset/arrays/flux/value"][:], file["dataset/arrays/error/value"][:]
    noise = np.random.default_rng(seed).standard_normal(flux.shape, np.float32)
    return wave, flux + np.float32(0.2) * error * noise, pd.read_hdf(path)


def line_features(flux: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Depths and equivalent widths of the lines."""
    columns = []
    for low, high in LINE_WINDOWS.values():
        window = (wave >= low) & (wave <= high)
        beside = (wave >= low - SIDEBAND) & (wave <= high + SIDEBAND) & ~window
        continuum = np.median(flux[:, beside], axis=1, keepdims=True)
        absorbed = 1.0 - flux[:, window] / continuum
        columns += [absorbed.max(axis=1), absorbed.sum(axis=1)]
    return np.stack([*columns[:6], columns[1] + columns[3] + columns[5], *columns[6:]], axis=1)


def pipeline(train_file: Path, test_file: Path) -> dict[str, Any]:
    """The experiment of ``regress_gate`` with its defaults; seconds by stage and R2 by method."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = round(now - last, 3), now

    (wave, x, labels), (_, x_test, test_labels) = read_survey(train_file, 0), read_survey(test_file, 1)
    y, y_test = (table["log_g"].to_numpy(np.float32) for table in (labels, test_labels))
    done("data")
    cell, test_cell = _cells(labels), _cells(test_labels)
    experts, out_of_fold = [], np.full(len(y), np.nan, np.float32)
    for k in range(N_CELLS):
        in_cell = cell == k
        experts.append(grid_search_ridge(x[in_cell], y[in_cell], ALPHAS, 5))
        out_of_fold[in_cell] = cross_val_predict(Ridge(alpha=experts[-1].alpha), x[in_cell], y[in_cell], cv=5)
    done("experts")
    whole = grid_search_ridge(x, y, GLOBAL_ALPHAS, 5)
    done("global ridge")
    pca = PCA(4, svd_solver="randomized", random_state=0).fit(x)
    raw = [np.hstack([line_features(flux, wave), pca.transform(flux)]) for flux in (x, x_test)]
    scaler = StandardScaler().fit(raw[0])
    features, test_features = map(scaler.transform, raw)
    predictions, test_predictions = (np.stack([expert.predict(flux) for expert in experts], axis=1) for flux in (x, x_test))
    done("features and predictions")
    covered, test_covered = cell >= 0, test_cell >= 0
    divided = StratifiedKFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(LogisticRegression(max_iter=5_000), {"C": list(C_GRID)}, cv=divided)
    search.fit(features[covered], cell[covered])
    done("classification gate")
    cross_fitted = np.where(cell[:, None] == np.arange(N_CELLS), out_of_fold[:, None], predictions)
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(covered))
    target, seen = y_test[test_covered], test_predictions[test_covered]
    mixtures = {"classify": np.sum(search.predict_proba(test_features[test_covered]) * seen, axis=1)}
    protocols = {"in-sample": (drawn[: round(0.2 * len(drawn))], predictions), "cross-fitted": (drawn, cross_fitted)}
    for name, (stars, outputs) in protocols.items():
        for kind, hidden in (("mlp", 64), ("linear", None)):
            weights = torch_gate(features[stars], outputs[stars], y[stars], hidden=hidden, epochs=100, patience=10, use_loader=True)
            mixtures[f"{kind}, {name}"] = np.sum(weights(test_features[test_covered]) * seen, axis=1)
    done("regression gates")
    for name in mixtures:
        if name != "classify":
            loop_bootstrap(target, mixtures[name], mixtures["classify"], test_cell[test_covered], 1_000)
    done("bootstrap")
    scores = {"global": whole.predict(x_test[test_covered])} | mixtures
    r2 = {name: float(r2_score(target, prediction)) for name, prediction in scores.items()}
    return {"seconds": seconds | {"total": round(sum(seconds.values()), 3)}, "r2": r2}


def _cells(labels: pd.DataFrame) -> np.ndarray:
    """Cell of each star, -1 outside."""
    places = []
    for name, edges in (("T_eff", T_EFF_EDGES), ("M_H", M_H_EDGES)):
        values = labels[name].to_numpy()
        place = np.minimum(np.searchsorted(edges, values, side="right") - 1, 2)
        places.append(np.where((values >= edges[0]) & (values <= edges[-1]), place, -1))
    return np.where((places[0] >= 0) & (places[1] >= 0), 3 * places[0] + places[1], -1)


if __name__ == "__main__":
    print(json.dumps(pipeline(Path(sys.argv[1]), Path(sys.argv[2]))))
