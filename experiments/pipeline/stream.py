"""The stages before the regression gates, chunk by chunk: for surveys that do not fit into memory; resumable.

Two passes. The first adds up sums by cell and fold, from which all experts are fitted; the second applies them and computes
features. What a chunk gives is kept in the cache folder, so that a run that was stopped at any point goes on from its last
chunk. Several processes take turns at the chunks, on all their devices; they must share the cache folder.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.stars import Prepared, Stars, finish
from experiments.pipeline.surveys import Observation, observe_surveys, slices
from experiments.runner.cache import Cache
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.pca import PCA, fit_pca_scatter
from moe_jax.core.trees import load_tree, save_tree
from moe_jax.experts import CrossValidatedRidge, Ridge, assign_folds, predict_ridge
from moe_jax.experts.streaming import STARS, Blocks, add_block, collect, device_mesh, empty_sums, fit_sums, sum_processes
from moe_jax.experts.sums import Sums, moments
from moe_jax.gates.features import N_COMPONENTS, N_FEATURES, line_pixels, raw_features

BLOCK_ROWS = 512


class StreamedFit(NamedTuple):
    """All that the first pass gives."""

    cells: CrossValidatedRidge  #: the K experts
    cells_by_fold: Ridge  #: (K, folds, P) fitted without each fold
    whole: CrossValidatedRidge  #: the global ridge; NaN where none was asked for
    whole_by_fold: Ridge  #: (folds, P)
    pca: PCA

    def ridges(self) -> Ridge:
        """(R, P) all experts, the global ridge, and both fitted without each fold; R = K + 1 + (K + 1) * folds."""
        fits = (self.cells.ridge, self.whole.ridge, self.cells_by_fold, self.whole_by_fold)
        coef = [fit.coef.reshape(-1, fit.coef.shape[-1]) for fit in fits]
        return Ridge(jnp.concatenate(coef), jnp.concatenate([fit.intercept.reshape(-1) for fit in fits]))


class Applied(NamedTuple):
    """What the second pass gives for the stars of a chunk, or of a survey."""

    features: AnyArray  #: (N, F) raw
    predictions: AnyArray  #: (N, R) of ``StreamedFit.ridges``


def fit_by_chunks(config: DataConfig, stages: Stages, cache: Cache) -> Prepared:
    """All stages before the regression gates, chunk by chunk."""
    keys, n_experts, (train, test) = draw_keys(config.seed), config.n_experts, observe_surveys(config)
    folds = assign_folds(keys.folds, train.cell, config.experts.n_folds)
    group = jnp.where(train.cell < 0, n_experts, train.cell) * config.experts.n_folds + folds
    settings = asdict(config) | {"processes": jax.process_count(), "devices": device_mesh().size}
    saved = cache.path("sums", settings | {"process": jax.process_index()}, [__file__])

    def fit() -> StreamedFit:
        sums, *offsets = accumulate(config, train, np.asarray(group), saved, stages)
        with stages("experts and global ridge from sums"):
            return jax.block_until_ready(fit_from_sums(config, sums, *offsets))

    fitted, from_cache = cache.load_or_compute("streamed-experts", settings, [__file__], StreamedFit, fit)
    if from_cache:
        stages.note("experts: found in the cache")
    if saved is not None:
        saved.unlink(missing_ok=True)
    fitted = jax.tree.map(jnp.asarray, fitted)
    stars, predictions = [], []
    for name, survey in (("train", train), ("test", test)):
        seen = apply_ridges(survey, fitted, config.chunk_stars, cache, settings | {"survey": name}, stages)
        log_g, predicted = jax.device_put(survey.labels.log_g), jnp.asarray(seen.predictions)
        stars.append(Stars(seen.features, predicted[:, :n_experts], predicted[:, n_experts], log_g, survey.cell))
        predictions.append(predicted)
    # The first K + 1 columns are those of all stars; then each group has its own.
    columns = n_experts + 1 + jnp.stack([group, n_experts * config.experts.n_folds + folds], axis=1)
    of_cell, of_whole = jnp.take_along_axis(predictions[0], columns, axis=1).T
    experts = fitted.cells._replace(out_of_fold=jnp.where(train.cell >= 0, of_cell, jnp.nan))
    global_ridge = fitted.whole._replace(out_of_fold=of_whole)
    return finish(config, stars[0], stars[1], experts, global_ridge, fitted.pca, np.asarray(train.wave), stages)


def chunks_of_process(n_stars: int, chunk_stars: int) -> list[tuple[int, int]]:
    """First and last star (exclusive) of the chunks that are this process's turn."""
    starts = range(0, n_stars, chunk_stars)[jax.process_index() :: jax.process_count()]
    return [(start, min(start + chunk_stars, n_stars)) for start in starts]


class SavedSums(NamedTuple):
    """The sums of the chunks that are done, as they are kept on disk."""

    n_chunks: int
    sums: Sums


def accumulate(
    config: DataConfig, train: Observation, group: np.ndarray, saved: Path | None, stages: Stages
) -> tuple[Sums, jax.Array, jax.Array]:
    """Sums of the training stars of each group, and what is subtracted from x and y before: means of the first stars.

    ``group`` (N,) has the number of each star's group; chunks that are done are in ``saved``.
    """
    mesh, log_g = device_mesh(), np.asarray(train.labels.log_g, np.float32)
    n_groups, n_pixels = (config.n_experts + 1) * config.experts.n_folds, len(np.asarray(train.wave))
    first = next(slices(0, train.n_stars))
    x_offset, y_offset = jnp.mean(train.flux(first.start, first.stop), axis=0), jnp.asarray(log_g[first].mean())
    done, sums = load_sums(saved, mesh, stages) or SavedSums(0, empty_sums(n_groups, n_pixels, mesh))
    blocks = Blocks(BLOCK_ROWS * mesh.size, n_pixels)
    chunks = chunks_of_process(train.n_stars, config.chunk_stars)
    n_stars, n_done = (sum(stop - start for start, stop in part) for part in (chunks, chunks[:done]))
    with stages.chunks("sums of the training stars", n_stars, n_done) as advance:
        for i, (start, stop) in enumerate(chunks[done:], done + 1):
            for rows in slices(start, stop):
                x = np.asarray(train.flux(rows.start, rows.stop) - x_offset[None, :])
                for block in blocks.add(x, log_g[rows] - np.asarray(y_offset), group[rows]):
                    sums = add_block(sums, block, mesh)
            for block in blocks.flush():
                sums = add_block(sums, block, mesh)
            jax.block_until_ready(sums)
            if saved is not None and i < len(chunks):
                save_tree(saved, SavedSums(i, sums))
            advance(stop - start)
    return sums, x_offset, y_offset


def load_sums(path: Path | None, mesh: Mesh, stages: Stages) -> SavedSums | None:
    """The sums of a run that was stopped, on the devices of the mesh; None where there are none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        saved = load_tree(path, SavedSums)
    except (OSError, InputError):
        stages.note(f"{path}: cannot be read, starts from the first chunk")
        return None
    stages.note(f"goes on after {saved.n_chunks} chunk{'s' * (saved.n_chunks > 1)}")
    return saved._replace(sums=jax.device_put(saved.sums, NamedSharding(mesh, PartitionSpec(STARS))))


def fit_from_sums(config: DataConfig, sums: Sums, x_offset: jax.Array, y_offset: jax.Array) -> StreamedFit:
    """Experts, global ridge and principal components from the sums of the groups."""
    n_folds, n_cells = config.experts.n_folds, config.n_experts
    group = np.arange((n_cells + 1) * n_folds).reshape(n_cells + 1, n_folds)
    fit = functools.partial(fit_sums, x_offset=x_offset, y_offset=y_offset, extend_decades=config.experts.extend_decades)
    fits = [fit(collect(sums, group[k][:, None]), jnp.array(config.experts.alphas)) for k in range(n_cells)]
    everyone = collect(sums, group.T)
    if config.experts.global_alphas:
        whole = fit(everyone, jnp.array(config.experts.global_alphas))
    else:
        whole = jax.tree.map(lambda leaf: jnp.full_like(leaf, False if leaf.dtype == bool else jnp.nan), fits[0])
    total = moments(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), everyone))
    pca = fit_pca_scatter(draw_keys(config.seed).pca, total.x_mean, total.xx, N_COMPONENTS)
    cells, cells_by_fold = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)
    return StreamedFit(cells, cells_by_fold, *whole, pca._replace(mean=pca.mean + x_offset))


def apply_ridges(
    observation: Observation, fitted: StreamedFit, chunk_stars: int, cache: Cache, settings: dict[str, Any], stages: Stages
) -> Applied:
    """Raw features and all predictions of a survey's stars; each chunk's are cached under the settings."""
    pixels, ridges = line_pixels(observation.wave), fitted.ridges()
    whole = Applied(*(np.zeros((observation.n_stars, n), np.float32) for n in (N_FEATURES, len(ridges.intercept))))

    def apply_to(start: int, stop: int) -> Applied:
        fluxes = (observation.flux(rows.start, rows.stop) for rows in slices(start, stop))
        parts = [(raw_features(flux, pixels, fitted.pca), predict_ridge(ridges, flux)) for flux in fluxes]
        return Applied(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    chunks = chunks_of_process(observation.n_stars, chunk_stars)
    title = f"features and predictions, {settings['survey']} stars"
    with stages.chunks(title, sum(stop - start for start, stop in chunks)) as advance:
        for start, stop in chunks:
            compute = functools.partial(apply_to, start, stop)
            chunk, _ = cache.load_or_compute("seen", settings | {"start": start, "stop": stop}, [__file__], Applied, compute)
            for array, part in zip(whole, chunk, strict=True):
                array[start:stop] = part
            advance(stop - start)
    return sum_processes(whole)
