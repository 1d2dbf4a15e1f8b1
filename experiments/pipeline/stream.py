"""The stages before the regression gates, chunk by chunk: for surveys that do not fit into memory; resumable.

Two passes. The first adds up sums by cell and fold, from which all experts are fitted; the second applies them and computes
features. What a chunk gives is kept in the cache folder, so that a run that was stopped at any point goes on from its last
chunk. Several processes take turns at the chunks, on all their devices; they must share the cache folder.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.observation import SLICE, Observation
from experiments.pipeline.stars import Prepared, Stars, classify, no_ridge
from experiments.pipeline.surveys import experts_of, open_surveys, require_covered, require_finite_features
from experiments.runner.cache import Cache
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray
from moe_jax.core.files import temporary_beside
from moe_jax.core.pca import PCA, fit_pca_scatter
from moe_jax.experts.cross_validation import CrossValidatedRidge
from moe_jax.experts.fit import Experts, assign_folds
from moe_jax.experts.ridge import Ridge, predict_ridges
from moe_jax.experts.streaming import Blocks, SumsFit, add_block, collect, device_mesh, empty_sums, fit_sums, sum_processes
from moe_jax.experts.sums import Sums, moments
from moe_jax.gates.features import N_COMPONENTS, N_FEATURES, raw_features, scale_features, standardize

BLOCK_ROWS = 512


class StreamedExperts(NamedTuple):
    """All that the first pass gives."""

    cells: SumsFit  #: stacked over the K experts
    whole: SumsFit  #: the global ridge; NaN where none was asked for
    pca: PCA


_LEAF = np.zeros(0)
_FIT = SumsFit(*[_LEAF] * 7)  # type: ignore[arg-type]
_SKELETON = StreamedExperts(_FIT, _FIT, PCA(_LEAF, _LEAF))  # type: ignore[arg-type]


def stream_stages(config: DataConfig, stages: Stages, cache: Cache) -> Prepared:
    """All stages before the regression gates, chunk by chunk."""
    keys = draw_keys(config.seed)
    sources = open_surveys(config)
    cells = [experts_of(source.labels, config) for source in sources]
    require_covered(config, *cells)
    train, test = (
        Observation.of(source, key, config) for source, key in zip(sources, (keys.train_noise, keys.test_noise), strict=True)
    )
    folds = assign_folds(keys.folds, cells[0], config.experts.n_folds)
    group = np.asarray(jnp.where(cells[0] < 0, config.n_experts, cells[0]) * config.experts.n_folds + folds)
    settings = asdict(config) | {"processes": jax.process_count(), "devices": device_mesh().size}

    def fit() -> StreamedExperts:
        sums, offsets = accumulate(config, train, group, saved, stages)
        with stages("experts and global ridge from sums"):
            return jax.block_until_ready(fit_experts_from_sums(config, sums, offsets))

    saved = SavedSums(cache, settings)
    fitted, found = cache.load_or_compute("streamed-experts", settings, [__file__], _SKELETON, fit)
    if found:
        stages.note("experts: found in the cache")
    saved.clear()
    fitted = jax.tree.map(jnp.asarray, fitted)
    seen_train, seen_test = (
        see(config, name, observation, fitted, cache, settings, stages) for name, observation in (("train", train), ("test", test))
    )
    model = standardize(fitted.pca, seen_train.raw_features)
    features = [scale_features(model, seen.raw_features) for seen in (seen_train, seen_test)]
    require_finite_features(config, *features)
    stars = []
    for x, seen, source, cell in zip(features, (seen_train, seen_test), sources, cells, strict=True):
        T_eff, M_H, log_g = (jnp.asarray(getattr(source.labels, name)) for name in ("T_eff", "M_H", "log_g"))
        stars.append(Stars(x, seen.predictions, seen.global_prediction, T_eff, M_H, log_g, cell))
    own = jnp.where(cells[0] >= 0, seen_train.held_out(jnp.asarray(group)), jnp.nan)
    fits = fitted.cells
    experts = Experts(fits.coef, fits.intercept, fits.alpha, fits.at_edge, fits.mse, own)
    if config.experts.global_alphas:
        whole = fitted.whole
        held_out = seen_train.global_held_out(folds)
        global_ridge = CrossValidatedRidge(Ridge(whole.coef, whole.intercept), whole.alpha, whole.at_edge, whole.mse, held_out)
    else:
        global_ridge = no_ridge(train.spectra.n_stars, len(np.asarray(train.spectra.wave)))
    wave = np.asarray(train.spectra.wave)
    return Prepared(stars[0], stars[1], experts, global_ridge, model, wave, classify(config, stars[0], stages))


class Offsets(NamedTuple):
    """What is subtracted before the stars are added up: the means of the first of them."""

    x: AnyArray  #: (P,)
    y: AnyArray


def accumulate(config: DataConfig, train: Observation, group: np.ndarray, saved: SavedSums, stages: Stages) -> tuple[Sums, Offsets]:
    """Sums of the training stars of each group: those of each cell's folds, and of the stars without an expert by fold."""
    mesh, log_g = device_mesh(), np.asarray(train.spectra.labels.log_g, np.float32)
    n_groups, n_pixels = (config.n_experts + 1) * config.experts.n_folds, len(np.asarray(train.spectra.wave))
    part, first = next(train.slices(0, min(SLICE, train.spectra.n_stars)))
    offsets = Offsets(jnp.mean(first, axis=0), jnp.asarray(log_g[part].mean()))
    done, sums = saved.load(empty_sums(n_groups, n_pixels, mesh), stages)
    blocks = Blocks(n_groups, BLOCK_ROWS * mesh.size, n_pixels)
    chunks = train.own_chunks()
    with stages.chunks(
        "sums of the training stars", sum(b - a for a, b in chunks), sum(b - a for a, b in chunks[:done])
    ) as advance:
        for i, (start, stop) in enumerate(chunks[done:], done):
            for part, flux in train.slices(start, stop):
                x, y = np.asarray(flux - offsets.x[None, :]), log_g[part] - np.asarray(offsets.y)
                for block in blocks.add(x, y, group[part]):
                    sums = add_block(sums, block, mesh)
            for block in blocks.flush():
                sums = add_block(sums, block, mesh)
            jax.block_until_ready(sums)
            if i + 1 < len(chunks):
                saved.save(sums, i + 1)
            advance(stop - start)
    return sums, offsets


class SavedSums:
    """The sums of the chunks that are done, on disk: whole or absent. The folder is cleared when the experts are fitted."""

    def __init__(self, cache: Cache, settings: dict[str, Any]) -> None:
        path = cache.path("sums", settings | {"process": jax.process_index()}, [__file__])
        self._folder = None if path is None else path.with_suffix("")

    def load(self, empty: Sums, stages: Stages) -> tuple[int, Sums]:
        """How many chunks are done, and their sums."""
        if self._folder is None or not (saved := sorted(self._folder.glob("chunks-*[0-9]"))):
            return 0, empty
        done = int(saved[-1].name.removeprefix("chunks-"))
        try:
            leaves = [np.load(saved[-1] / f"{name}.npy", mmap_mode="r") for name in Sums._fields]
        except (OSError, ValueError, EOFError):
            stages.note(f"{saved[-1]}: cannot be read, starts from the first chunk")
            return 0, empty
        stages.note(f"goes on after {done} chunk{'s' * (done > 1)}")
        return done, Sums(*(jax.device_put(leaf, old.sharding) for leaf, old in zip(leaves, empty, strict=True)))

    def save(self, sums: Sums, done: int) -> None:
        """Keeps the sums of so many chunks, and drops older ones."""
        if self._folder is None:
            return
        final = self._folder / f"chunks-{done:08}"
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = temporary_beside(final)
        partial.mkdir()
        for name, leaf in sums._asdict().items():
            np.save(partial / f"{name}.npy", np.asarray(leaf))
        partial.rename(final)
        for other in self._folder.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def clear(self) -> None:
        """Drops what was kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def fit_experts_from_sums(config: DataConfig, sums: Sums, offsets: Offsets) -> StreamedExperts:
    """Experts, global ridge and principal components from the sums of the groups."""
    n_folds, n_cells = config.experts.n_folds, config.n_experts
    group = np.arange((n_cells + 1) * n_folds).reshape(n_cells + 1, n_folds)
    cells = [fit_sums(collect(sums, group[k][:, None]), jnp.array(config.experts.alphas), *offsets) for k in range(n_cells)]
    everyone = collect(sums, group.T)
    if config.experts.global_alphas:
        whole = fit_sums(everyone, jnp.array(config.experts.global_alphas), *offsets)
    else:
        whole = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype != bool else leaf, cells[0])
    total = moments(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), everyone))
    pca = fit_pca_scatter(draw_keys(config.seed).pca, total.x_mean, total.xx, N_COMPONENTS)
    return StreamedExperts(jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells), whole, pca._replace(mean=pca.mean + offsets.x))


class Seen(NamedTuple):
    """What the second pass gives of a survey's stars."""

    raw_features: AnyArray  #: (N, F)
    outputs: AnyArray  #: (N, K + 1 + (K + 1) * folds) of all experts, the global ridge, and those fitted without each fold
    n_experts: int

    @property
    def predictions(self) -> jax.Array:
        """(N, K) of all experts."""
        return jnp.asarray(self.outputs)[:, : self.n_experts]

    @property
    def global_prediction(self) -> jax.Array:
        """(N,) of the global ridge."""
        return jnp.asarray(self.outputs)[:, self.n_experts]

    def held_out(self, group: jax.Array) -> jax.Array:
        """(N,) each star by the expert that was fitted without the star's group: its cell's fold."""
        return jnp.take_along_axis(jnp.asarray(self.outputs), self.n_experts + 1 + group[:, None], axis=1)[:, 0]

    def global_held_out(self, folds: jax.Array) -> jax.Array:
        """(N,) each star by the global ridge that was fitted without its fold."""
        n_folds = self.outputs.shape[1] // (self.n_experts + 1) - 1
        return self.held_out(self.n_experts * n_folds + folds)


def see(
    config: DataConfig,
    name: str,
    observation: Observation,
    fitted: StreamedExperts,
    cache: Cache,
    settings: dict[str, Any],
    stages: Stages,
) -> Seen:
    """Raw features and all predictions of a survey's stars."""
    wave = np.asarray(observation.spectra.wave)
    fits = (fitted.cells.coef, fitted.whole.coef[None, :], fitted.cells.fold_coef.reshape(-1, len(wave)), fitted.whole.fold_coef)
    coef = jnp.concatenate(fits)
    intercepts = (fitted.cells.intercept, fitted.whole.intercept[None], fitted.cells.fold_intercept, fitted.whole.fold_intercept)
    intercept = jnp.concatenate([part.reshape(-1) for part in intercepts])
    ridges, n_stars = Ridge(coef, intercept), observation.spectra.n_stars
    raw, outputs = np.zeros((n_stars, N_FEATURES), np.float32), np.zeros((n_stars, len(coef)), np.float32)

    def see_chunk(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        seen = [(raw_features(flux, wave, fitted.pca), predict_ridges(ridges, flux)) for _, flux in observation.slices(start, stop)]
        features, predictions = zip(*seen, strict=True)
        return np.concatenate(features), np.concatenate(predictions)

    with stages.chunks(f"features and predictions, {name} stars", sum(b - a for a, b in observation.own_chunks())) as advance:
        for start, stop in observation.own_chunks():
            own = settings | {"survey": name, "start": start, "stop": stop}
            found, _ = cache.load_or_compute("seen", own, [__file__], (_LEAF, _LEAF), functools.partial(see_chunk, start, stop))
            raw[start:stop], outputs[start:stop] = found
            advance(stop - start)
    return Seen(*sum_processes((raw, outputs)), config.n_experts)
