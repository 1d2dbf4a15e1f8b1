"""Does a test fail when the code is wrong? Each mutation is applied to a copy, and the tests that mirror its module are run.

    python tests/mutants.py                 all mutations, several at a time; about 40 minutes on 2 cores
    python tests/mutants.py variance ridge  those of modules whose path holds one of these words
    python tests/mutants.py --check         only looks whether each text is found exactly once

Prints who survives, and ends with 1 if any does. A survivor needs a test; a text that is not found needs a new mutation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # by module, where the test file is not tests/<folder>/test_<module>.py alone
    "experiments/report/tables.py": ["tests/experiments/test_tables.py"],
    "experiments/report/claims.py": ["tests/experiments/test_findings.py"],
    "moe_jax/apply/robust.py": ["tests/apply/test_robust.py", "tests/apply/test_predict.py"],
    "moe_jax/spectra/label_start.py": ["tests/spectra/test_label_fit.py"],
    "moe_jax/core/convert.py": ["tests/test_api.py"],
    "moe_jax/core/cholesky.py": ["tests/core/test_cholesky.py", "tests/test_numerics.py"],
    "moe_jax/evaluate/bootstrap.py": ["tests/evaluate/test_bootstrap.py", "tests/evaluate/test_intervals.py"],
    "moe_jax/gates/optimize.py": ["tests/gates/test_optimize.py", "tests/gates/test_training.py"],
    "moe_jax/gates/training.py": ["tests/gates/test_training.py", "tests/gates/test_optimize.py"],
    "moe_jax/experts/ridge.py": ["tests/experts/test_ridge.py", "tests/test_numerics.py"],
}
#: Module, text, and what it becomes.
MUTATIONS = [
    ("moe_jax/experts/ridge.py", "y_mean = (y * weight).sum() / n", "y_mean = (y * weight).sum() / len(y)"),
    ("moe_jax/experts/ridge.py", "weight = mask**2\n", "weight = mask\n"),
    ("moe_jax/experts/ridge.py", "data.y_mean - (data.x_mean * coef).sum()", "data.y_mean"),
    ("moe_jax/experts/ridge.py", "residual[:, None])[:, 0] - alpha * coef", "residual[:, None])[:, 0]"),
    ("moe_jax/experts/ridge.py", "apply_inverse((residual - alpha * a)[:, None])", "apply_inverse(residual[:, None])"),
    ("moe_jax/experts/ridge.py", "+ ridge.intercept[None]", ""),
    ("moe_jax/experts/ridge.py", "namespace(sample_weight).sqrt(sample_weight)", "sample_weight"),
    ("moe_jax/experts/ridge.py", "if not isinstance(ridge.coef, jax.core.Tracer) and not", "if False and not"),
    ("moe_jax/core/cholesky.py", "(32 * state[0], is_bad(", "(32 * state[0], ~is_bad("),
    ("moe_jax/core/cholesky.py", "factor.diagonal().min() ** 2 >= LEAST_PIVOT *", "factor.diagonal().min() ** 2 >= 0 *"),
    ("moe_jax/core/cholesky.py", "jnp.all(pivots >= LEAST_PIVOT *", "jnp.all(pivots >= 0 *"),
    ("moe_jax/experts/local.py", "logs += jnp.log(ratio)", "logs = jnp.log(ratio)"),
    ("moe_jax/experts/local.py", "square -= u_j**2 * (1 - 1 / ratio)", "square -= u_j**2"),
    ("moe_jax/experts/alphas.py", "(alpha == smallest) | (alpha == largest)", "alpha == largest"),
    ("moe_jax/experts/alphas.py", "(alpha == smallest) | (alpha == largest)", "alpha == smallest"),
    ("moe_jax/experts/alphas.py", "xp.nanmin(mse)", "xp.min(mse)"),
    ("moe_jax/experts/alphas.py", "xp.argmax(xp.where(mse ==", "xp.argmin(xp.where(mse !="),
    ("moe_jax/experts/alphas.py", "smallest / 10 if", "smallest * 10 if"),
    ("moe_jax/experts/cross_validation.py", "xp.outer(mask, mask) / n_stars", "xp.outer(mask, mask) * 0"),
    ("moe_jax/experts/cross_validation.py", "(data.y + data.y_mean)[None, :] - stacked", "data.y[None, :] - stacked"),
    ("moe_jax/experts/cross_validation.py", " - xp.outer(column, column) / total", ""),
    ("moe_jax/experts/cross_validation.py", " - ones**2 / total)", ")"),
    ("moe_jax/experts/cross_validation.py", "_gather(data.x, rows) - train.x_mean[None, :]", "_gather(data.x, rows)"),
    ("moe_jax/experts/cross_validation.py", "total = (data.mask * ones).sum()", "total = 1.0"),
    ("moe_jax/experts/streaming.py", "fold.n * intercept**2", "intercept**2"),
    ("moe_jax/experts/streaming.py", "- 2.0 * (coef * fold.xy).sum()", "- (coef * fold.xy).sum()"),
    ("moe_jax/experts/streaming.py", "fit.intercept + y_offset - shift", "fit.intercept + y_offset"),
    ("moe_jax/experts/streaming.py", "errors.sum(axis=0) / by_fold.n.sum()", "errors.sum(axis=0)"),
    ("moe_jax/experts/sums.py", "sums.xx - n * xp.outer(x_mean, x_mean)", "sums.xx"),
    ("moe_jax/experts/sums.py", "evaluate(part, jax.tree.map(operator.sub, total, part))", "evaluate(part, total)"),
    ("moe_jax/experts/joint.py", "matmul(weights, weights.T) * kernel", "kernel"),
    ("moe_jax/experts/joint.py", "* kernel, alpha)", "* kernel, 2 * alpha)"),
    ("moe_jax/experts/joint.py", "intercept - matmul(coef, mean[:, None])[:, 0]", "intercept"),
    ("moe_jax/experts/joint.py", "(weights * a[:, None]).T", "weights.T"),
    ("moe_jax/experts/joint.py", "solved[:, -1] - matmul(solved[:, :-1], intercept[:, None])[:, 0]", "solved[:, -1]"),
    ("moe_jax/gates/optimize.py", "if leaf.ndim > 1)", ")"),
    ("moe_jax/gates/optimize.py", "better = candidate.loss < best.loss", "better = candidate.loss > best.loss"),
    ("moe_jax/gates/optimize.py", "held = tuple(array[order[:n_held]]", "held = tuple(array[order[n_held:]]"),
    ("moe_jax/gates/optimize.py", "epoch - best.epoch >= optimizer.patience", "epoch >= optimizer.patience"),
    ("moe_jax/gates/optimize.py", "norm <= optimizer.gradient_tolerance, *losses", "norm >= optimizer.gradient_tolerance, *losses"),
    ("moe_jax/gates/optimize.py", "start) % n_batches\n", "start) % (n_batches + 1)\n"),
    ("moe_jax/gates/training.py", "expert_predictions)) ** 2\n", "expert_predictions))\n"),
    ("moe_jax/gates/training.py", "return -jnp.sum(weights * jnp.log", "return jnp.sum(weights * jnp.log"),
    ("moe_jax/evaluate/bootstrap.py", "((y - baseline) + (y - prediction))", "(2 * (y - baseline))"),
    ("moe_jax/evaluate/bootstrap.py", "(17, 29, 16, 24))[group % 2]", "(17, 29, 16, 24))[0]"),
    ("moe_jax/evaluate/bootstrap.py", "d2 - d1 * m, 1.0)", "d2, 1.0)"),
    ("moe_jax/evaluate/bootstrap.py", "- 4.0 * m * d3", "+ 4.0 * m * d3"),
    ("moe_jax/evaluate/bootstrap.py", "gd2 - 2.0 * m * gd", "gd2"),
    ("moe_jax/evaluate/bootstrap.py", "6.0 * square**1.5", "square**1.5"),
    ("moe_jax/evaluate/bootstrap.py", "g - estimate[:, None] * d**2", "g"),
    ("moe_jax/evaluate/intervals.py", "2.0 * estimate - high, 2.0 * estimate - low", "low, high"),
    ("moe_jax/evaluate/intervals.py", "estimate - high * resampled", "estimate + low * resampled"),
    ("moe_jax/evaluate/intervals.py", "1.0 - resampled.acc", "1.0 + resampled.acc"),
    ("moe_jax/evaluate/intervals.py", "ndtr(bias + shifted / stretch)", "ndtr(shifted / stretch)"),
    ("moe_jax/evaluate/intervals.py", "jnp.stack([1.0 - level, level]))[1]", "tails)[1]"),
    ("moe_jax/evaluate/intervals.py", "smallest, 1.0 - smallest))", "0.0, 1.0))"),
    ("moe_jax/evaluate/intervals.py", "largest = jnp.max(", "largest = jnp.mean("),
    ("moe_jax/evaluate/variance.py", "max(combined**2 / spread, 1.0) if", "1e9 if"),
    ("moe_jax/evaluate/variance.py", ', "survey x test": -1 / y.size}', "}"),
    ("moe_jax/evaluate/variance.py", "_half_width(total + mean_variance, total_df", "_half_width(total, total_df"),
    ("moe_jax/evaluate/variance.py", "(variance[name] > 0) * c / size", "c"),
    ("moe_jax/evaluate/variance.py", '"noise draw": (G * T * np.sum', '"noise draw": (T * np.sum'),
    ("moe_jax/evaluate/variance.py", '"gate seed": ({"gate seed": 1, "seed x test": -1}, T)', '"gate seed": ({"gate seed": 1}, T)'),
    ("moe_jax/evaluate/variance.py", "total / rng.chisquare(df, N_PIVOTS)", "total / df"),
    ("moe_jax/evaluate/variance.py", "ppf(0.5 * (1 + confidence_level)) + scipy.stats.norm.ppf(power)", "ppf(power)"),
    ("moe_jax/evaluate/variance.py", "standard_error**2 + values.var(ddof=1) / len(values)", "values.var(ddof=1)"),
    ("moe_jax/evaluate/variance.py", "(len(values) - 1) * (variance / of_seeds) ** 2", "(len(values) - 1)"),
    ("moe_jax/evaluate/metrics.py", "y[None, :], jnp.inf), axis=1)", "y[None, :], 0.0), axis=1)"),
    ("moe_jax/evaluate/metrics.py", "(r2 - r2_global) / gain", "(r2 - r2_global)"),
    ("moe_jax/apply/uncertainty.py", "jnp.outer(z, z)) * n_stars", "jnp.outer(z, z)) * n"),
    ("moe_jax/apply/uncertainty.py", "mean**2) * n_stars", "mean**2) * n"),
    ("moe_jax/apply/uncertainty.py", "return 1.0 / n_stars[None, :] + jnp.maximum", "return jnp.maximum"),
    ("moe_jax/apply/uncertainty.py", " - 2 * matmul(x, (inverse * shift).T)", ""),
    ("moe_jax/apply/uncertainty.py", "- matmul(directions, shift[:, :, None])[:, None, :, 0]", ""),
    ("experiments/stress_predict.py", "distance - scipy.special.ndtri(1 - FALSE_ALARMS)", "distance"),
    ("experiments/stress_predict.py", "fit.labels[:, 2]) < 0", "fit.labels[:, 2]) < -1"),
    ("moe_jax/apply/uncertainty.py", "jnp.asarray(mse) / (1.0 + mean)", "jnp.asarray(mse)"),
    ("moe_jax/apply/uncertainty.py", "weights * (expert_predictions - mixture) ** 2", "(expert_predictions - mixture) ** 2"),
    ("moe_jax/apply/uncertainty.py", "np.log(total) + squared / total", "np.log(total) + squared"),
    ("moe_jax/apply/conformal.py", "(n_stars + 1) * level - 1e-9", "n_stars * level"),
    ("moe_jax/apply/conformal.py", "_rank(int(counts[k]), level) <= counts[k] else score", "True else score"),
    ("moe_jax/apply/conformal.py", "group.min() < 0 or group.max() >= n_groups", "group.max() >= n_groups"),
    ("moe_jax/apply/conformal.py", "proportion_ci(0.95)", "proportion_ci(0.90)"),
    ("moe_jax/spectra/fisher.py", "/ error[:, :, None]\n", "/ jnp.sqrt(error)[:, :, None]\n"),
    ("moe_jax/spectra/fisher.py", "np.linalg.inv(information)[:, 1, 1]", "1.0 / information[:, 1, 1]"),
    ("moe_jax/spectra/fisher.py", "12.0 / np.square(widths)", "1.0 / np.square(widths)"),
    ("moe_jax/spectra/fisher.py", "flux * (MEDIAN_FLUX / jnp.median(flux))", "flux * MEDIAN_FLUX"),
    ("experiments/report/tables.py", 'low > 0 else "worse" if high < 0', 'low > 0 else "worse" if low < 0'),
    ("experiments/report/tables.py", "r2 > r2_baseline + MARGIN", "r2 > r2_baseline"),
    ("experiments/report/tables.py", "(defined > 0).mean()", "(defined < 0).mean()"),
    ("experiments/report/tables.py", "bootstrap.simultaneous)):", "bootstrap.groups)):"),
    ("experiments/report/claims.py", 'leads["high"].min()', 'leads["high"].max()'),
    ("experiments/report/claims.py", 'judge(-row["mean_high"], -row["mean_low"])', 'judge(row["mean_low"], row["mean_high"])'),
    ("experiments/report/claims.py", "low > -MARGIN and high < MARGIN", "high < MARGIN"),
    ("moe_jax/core/convert.py", "strict=False)) | sizes\n", "strict=False))\n"),
    ("moe_jax/core/convert.py", "if name in finite and not isinstance(array, jax.core.Tracer) and not", "if False and not"),
    ("moe_jax/apply/robust.py", "(ratio < LIMITS).all(axis=1) & (local.max", "(local.max"),
    ("moe_jax/apply/robust.py", "error * np.sqrt(local)", "error * local"),
    ("moe_jax/apply/robust.py", "< np.count_nonzero(good, axis=1)", "< 0 * np.count_nonzero(good, axis=1)"),
    ("moe_jax/apply/robust.py", "put = (new_ratio < LIMITS).all(", "put = (new_ratio < np.inf).all("),
    ("moe_jax/apply/robust.py", "good[rows] & keep(good[rows] & ~fit.good[rows])", "good[rows]"),
    ("moe_jax/apply/robust.py", "other.n_masked[:] = (good[rows] & ~other.good).sum(axis=1)", "pass"),
    ("moe_jax/apply/robust.py", "without_rows, N_WAVY,", "without_rows, N_CONTINUUM,"),
    ("moe_jax/apply/robust.py", "without_rows(out) & ~bands", "without_rows(out)"),
    ("moe_jax/apply/robust.py", "(self.scale_chi2 > LIMITS).any(", "(self.scale_chi2 > LIMITS).all("),
    ("moe_jax/apply/robust.py", "matters = self.at_edge | (self.plain_error > TOO_UNCERTAIN)", "matters = self.at_edge"),
    ("moe_jax/apply/robust.py", "(misfit & matters) | self.too_broad |", "(misfit & matters) |"),
    ("moe_jax/apply/robust.py", " | (self.second_gain > SECOND_VELOCITY)", ""),
    ("moe_jax/spectra/label_start.py", "- velocity[:, None]) > SEPARATION", "- velocity[:, None]) > -1.0"),
    ("moe_jax/spectra/label_steps.py", "coef = coef - constant[:, None] * constant_coef", "coef = coef + 0.0 * constant_coef"),
    ("moe_jax/spectra/label_steps.py", "products - jnp.einsum(", "products - 0.0 * jnp.einsum("),
    ("moe_jax/spectra/label_steps.py", "products - along[", "products - 0.0 * along["),
    ("moe_jax/apply/robust.py", " - 0.5 * np.linalg.slogdet(inner)[1]", ""),
    ("moe_jax/apply/robust.py", "square - mean[:, :, None] * mean[:, None, :]", "square"),
    ("moe_jax/apply/robust.py", "(alike + eye) / (deviation", "eye / (deviation"),
    ("moe_jax/apply/robust.py", " & ~cores[rows]", ""),
    ("moe_jax/apply/robust.py", "widening = fit.chi2 * np.maximum(ratio, 1.0).max(axis=1) *", "widening = fit.chi2 *"),
    ("moe_jax/apply/robust.py", "in_grid, in_cells = below", "in_cells, in_grid = below"),
    ("moe_jax/apply/robust.py", "posterior = np.linalg.inv(information + eye)", "posterior = np.linalg.inv(information)"),
]  # fmt: skip


def require_found() -> None:
    """Raises a sentence for the texts that do not stand exactly once in their module."""
    wrong = [(file, old, (ROOT / file).read_text().count(old)) for file, old, _ in MUTATIONS]
    if wrong := [f"{file}: found {n} times, expected once: {old!r}" for file, old, n in wrong if n != 1]:
        raise SystemExit("\n".join(wrong))


def tests_of(file: str) -> list[str]:
    return TESTS.get(file, [f"tests/{Path(file).parent.name}/test_{Path(file).stem}.py"])


def passes(tests: list[str], file: str = "pyproject.toml", old: str = "", new: str = "") -> bool:
    """Whether the tests pass on a copy, with a mutation or as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("moe_jax", "experiments", "tests", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        (copy / "results").symlink_to(ROOT / "results")
        if old:
            (copy / file).write_text((copy / file).read_text().replace(old, new))
        environment = os.environ | {"PYTHONPATH": folder, "JAX_PLATFORMS": "cpu"}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "moe_jax_mutants"))
        for marker in ("not slow", "slow"):  # most mutations fail a quick test
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", marker, *tests]
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1_200)
            if done.returncode not in (0, 1, 5):  # 1: a test failed; 2: a module cannot be imported; 5: no test has the marker
                print(f"{file}: the tests did not run: {done.stdout[-300:]}", flush=True)
            if done.returncode not in (0, 5):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the paths of modules")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    options = parser.parse_args()
    require_found()
    chosen = [m for m in MUTATIONS if not options.words or any(word in m[0] for word in options.words)]
    survivors = 0
    if not options.check:
        with ThreadPoolExecutor(max(os.cpu_count() or 1, 2) // 2) as pool:
            files = sorted({file for file, *_ in chosen})
            if failing := [file for file, good in zip(files, pool.map(passes, map(tests_of, files)), strict=True) if not good]:
                raise SystemExit(f"tests fail without a mutation: {', '.join(failing)}")
            alive_of = pool.map(lambda mutation: passes(tests_of(mutation[0]), *mutation), chosen)
            for (file, old, new), alive in zip(chosen, alive_of, strict=True):
                survivors += alive
                print(f"{'SURVIVES' if alive else 'killed  '}  {file}: {old!r} -> {new!r}", flush=True)
    print(f"{len(chosen)} mutations" + ("" if options.check else f", {survivors} survive"))
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
