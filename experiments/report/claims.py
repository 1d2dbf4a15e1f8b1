"""The published report's claims, each judged from tables of our results, and what else those tables say, in sentences.

A function takes the tables that it needs and returns a ``Claim`` or a sentence. A claim says itself what its interval is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import scipy

from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE, PROTOCOLS
from experiments.report.markdown import interval, load_published
from experiments.report.tables import MARGIN, verdict
from moe_jax.core.arrays import InputError
from moe_jax.evaluate.variance import SOURCES_IN_TEST_STARS, required_stars
from moe_jax.experts.cells import CELL_NAMES

#: The MLP gates of both protocols in the tables of ``replicate``, and their lead over the converged linear gate.
REPLICATED = {IN_SAMPLE: "MLP, in-sample 20 %", CROSS_FITTED: "MLP, cross-fitted"}
NON_LINEAR = {IN_SAMPLE: "MLP - converged linear, in-sample 20 %", CROSS_FITTED: "MLP - converged linear, cross-fitted"}
REPORT_STARS = 816
HOT_METAL_POOR = CELL_NAMES.index("Hot Metal-poor")
#: R2 by which local linear experts may lie below the likelihood fit.
FIT_MARGIN = 0.005
#: Methods in the tables of ``compare_methods``.
MIXTURE, LOCAL = "nine ridges, MLP gate (the mixture)", "local linear experts (the new mixture)"
NETWORK, LIKELIHOOD = "MLP on components", "likelihood fit of the model grid"
#: Entropies in the tables of ``findings``.
ENTROPIES = ("of the mean weights", "of a star's weights, mean")
HOLDS, FAILS, UNKNOWN = "**holds**", "**does not hold**", "**cannot tell**"


class Claim(NamedTuple):
    """A row of the table of claims."""

    claim: str
    its_evidence: str
    our_result: str
    verdict: str
    interval_over: str
    source: str


def read(results_dir: Path, experiment: str, table: str) -> pd.DataFrame:
    """A table of another experiment's default results.

    Raises:
        InputError: if there is no such file.
    """
    path = results_dir / experiment / "default" / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the result of `python -m experiments.{experiment}`")
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
    rows.attrs["file"] = str(path)
    return rows


def row_of(table: pd.DataFrame, **values: object) -> dict[Any, Any]:
    """The row of a table whose columns have the given values.

    Raises:
        InputError: if a column is missing, or there is not exactly one such row.
    """
    name = table.attrs.get("file", "table")
    for column in set(values) - set(table.columns):
        raise InputError(f"{name}: found no column {column}, expected it: run the experiment again")
    rows = table[(table[list(values)] == pd.Series(values)).all(axis=1)]
    if len(rows) != 1:
        wanted = ", ".join(f"{column} {value}" for column, value in values.items())
        raise InputError(f"{name}: found {len(rows)} rows with {wanted}, expected one: run the experiment again")
    row: dict[Any, Any] = rows.iloc[0].to_dict()
    return row


def shown(row: Mapping[Any, Any], estimate: str = "delta_r2", prefix: str = "", form: str = "+.4f") -> str:
    """An estimate of a row with its interval."""
    return interval(row[estimate], row[f"{prefix}low"], row[f"{prefix}high"], form)


def expected(row: Mapping[Any, Any]) -> str:
    """A mean over repetitions with its interval."""
    return shown(row, "mean", "mean_")


def link(experiment: str) -> str:
    """A link to the report of another experiment."""
    return f"[{experiment}]({experiment}/default/report.md)"


def judge(low: float, high: float) -> str:
    """Whether a claim of a positive difference holds: the interval lies above 0, or below 0, or it holds 0."""
    return {"better": HOLDS, "worse": FAILS, "no difference shown": UNKNOWN}[verdict(low, high)]


def design(differences: pd.DataFrame) -> str:
    """What the repetitions of ``replicate`` vary."""
    n = differences[["survey", "noise_draw", "gate_seed"]].nunique()
    n_sets = sum(str(column).startswith("set_") for column in differences)
    return f"{n['survey']} surveys, {n['noise_draw']} noise draws, {n['gate_seed']} gate seeds, {n_sets} test sets"


def mlp_beats_classification(intervals: pd.DataFrame, over: str) -> Claim:
    """Claim 1, from the expected difference over repetitions in the report's protocol."""
    ours, cross_fitted = (row_of(intervals, gate=gate) for gate in REPLICATED.values())
    return Claim(
        "1. A regression gate (MLP) beats the classification gate",
        "+0.0096 [-0.0000, +0.0168]",
        f"{expected(ours)} in the report's protocol, {expected(cross_fitted)} cross-fitted (expected over repetitions)",
        judge(ours["mean_low"], ours["mean_high"]),
        over,
        link("replicate"),
    )


def linear_is_worse(intervals: pd.DataFrame, over: str) -> Claim:
    """Claim 2a, of a negative difference: from the linear gate in the report's protocol, as it was trained and converged."""
    ours = row_of(intervals, gate="linear, in-sample 20 %")
    converged, cross_fitted = (row_of(intervals, gate=f"linear, {how}, converged") for how in ("in-sample 20 %", CROSS_FITTED))
    trained, at_optimum = (judge(-row["mean_high"], -row["mean_low"]) for row in (ours, converged))
    return Claim(
        "2a. A linear regression gate is worse than the classification gate",
        "-0.0179 [-0.0335, -0.0049]",
        f"{expected(ours)} after the report's 100 epochs, below 0 in {1 - ours['fraction_above_0']:.0%} of the repetitions; "
        f"{expected(converged)} once it has converged (cross-fitted: {expected(cross_fitted)})",
        f"{trained} after 100 epochs, {at_optimum} once converged",
        over,
        link("replicate"),
    )


def non_linearity_adds(intervals: pd.DataFrame, over: str) -> Claim:
    """Claim 2b, from the MLP minus the converged linear gate on the same stars, in both protocols."""
    texts, verdicts = [], []
    for protocol in PROTOCOLS:
        lead, gain = row_of(intervals, gate=NON_LINEAR[protocol]), row_of(intervals, gate=REPLICATED[protocol])
        name = "in the report's protocol" if protocol == IN_SAMPLE else protocol
        texts.append(f"{expected(lead)} {name}, {lead['mean'] / gain['mean']:.0%} of the MLP's gain")
        verdicts.append(f"{judge(lead['mean_low'], lead['mean_high'])} {name}")
    return Claim(
        "2b. Non-linearity is the key: the MLP beats a linear gate that has converged",
        "(not tested)",
        "; ".join(texts),
        ", ".join(verdicts),
        over,
        link("replicate"),
    )


def hot_metal_poor_gain_most(cells: pd.DataFrame, rivals: pd.DataFrame) -> Claim:
    """Claim 3, from the lead over every other cell in the report's protocol: the smallest lead decides."""
    in_sample = cells[cells["protocol"] == IN_SAMPLE]
    ours = row_of(in_sample, cell=CELL_NAMES[HOT_METAL_POOR])
    top = in_sample.nlargest(1, "delta_r2").iloc[0].to_dict()
    leads = rivals[rivals["protocol"] == IN_SAMPLE]
    least, least_cross_fitted = (rivals[rivals["protocol"] == p].nsmallest(1, "lead").iloc[0].to_dict() for p in PROTOCOLS)
    return Claim(
        "3. Hot metal-poor stars gain most",
        "+0.0193 in that cell, no interval",
        f"{shown(ours)} in the report's protocol; {top['cell']} gains {shown(top)}; "
        f"the smallest lead, over {least['cell']}, is {shown(least, 'lead')} "
        f"(cross-fitted: over {least_cross_fitted['cell']}, {shown(least_cross_fitted, 'lead')})",
        judge(leads["low"].min(), leads["high"].min()),
        f"{in_sample['n_test'].sum():,} test stars; all cells at once",
        "[findings](findings/cells.png)",
    )


def weights_are_more_uniform(weights: pd.DataFrame) -> Claim:
    """Claim 4, from the entropy in the report's protocol: of the mean weights, and of the weights of single stars."""
    of_mean, of_star = (row_of(weights, protocol=IN_SAMPLE, entropy=entropy) for entropy in ENTROPIES)
    return Claim(
        "4. The regression gate's weights are more uniform",
        "mean weights by eye",
        f"entropy of the mean weights {shown(of_mean, 'difference')} nats (single gates: {of_mean['least_seed']:+.3f} to "
        f"{of_mean['largest_seed']:+.3f}), of a single star's weights {shown(of_star, 'difference')}",
        f"{judge(of_mean['low'], of_mean['high'])} of the mean weights, {judge(of_star['low'], of_star['high'])} star by star",
        f"{of_mean['n_test']:,} test stars, {of_mean['n_seeds']} gate seeds",
        "[findings](findings/weights.csv)",
    )


def soft_beats_hard(hard: Mapping[str, float]) -> Claim:
    """Claim 5, for the classification gate's weights; if it cannot be told, with the test stars that would be needed."""
    outcome = judge(hard["low"], hard["high"])
    if outcome == UNKNOWN:
        outcome += f" (about {hard['stars']:,.0f} test stars would be needed)"
    return Claim(
        "5. Soft mixing beats hard routing",
        "(in the reports before)",
        shown(hard, "estimate"),
        outcome,
        f"{hard['n_test']:,} test stars",
        "[findings](findings/run.json)",
    )


def gain_survives_noise(scale: pd.DataFrame, choices: pd.DataFrame, n_test: int) -> Claim:
    """Claim 6, from the MLP gate at noise 1 with the report's number of training stars."""
    noisy = scale[(scale["noise_level"] == 1.0) & (scale["method"] == "MLP")]
    texts = []
    for n_train in (32_000, noisy["n_train"].max()):
        at_edge = int(row_of(choices, noise_level=1.0, n_train=n_train)["cells_at_edge"])
        text = f"{shown(row_of(noisy, n_train=n_train), prefix='delta_r2_')} with {int(n_train):,} training stars"
        texts.append(text + (f" (alpha at an end of its grid in {at_edge} of {len(CELL_NAMES)} cells)" if at_edge else ""))
    ours = row_of(noisy, n_train=32_000)
    return Claim(
        "6. The gain survives at noise 1",
        "(not tested)",
        ", ".join(texts),
        judge(ours["delta_r2_low"], ours["delta_r2_high"]),
        f"the covered ones of {n_test:,} test stars",
        link("scale"),
    )


def mlp_converges(more: pd.DataFrame) -> Claim:
    """Claim 7, from what more training of the same kind changes in the report's protocol: held-out loss, and R2.

    Of the loss it holds unless the loss still falls. Of R2 it holds if the change is within the report's margin.
    """
    ours, lbfgs = (row_of(more, protocol=IN_SAMPLE, optimiser=name) for name in ("Adam, longer", "L-BFGS"))
    of_loss = judge(ours["delta_loss_low"], ours["delta_loss_high"])
    if ours["delta_loss_low"] == ours["delta_loss_high"] == 0:  # no seed found a better epoch
        of_loss = HOLDS
    low, high = ours["delta_r2_low"], ours["delta_r2_high"]
    of_r2 = HOLDS if low > -MARGIN and high < MARGIN else FAILS if high < -MARGIN or low > MARGIN else UNKNOWN
    changes = [
        f"the held-out loss by {shown(row, 'delta_loss', 'delta_loss_', '+.5f')}, R2 by {shown(row, 'delta_r2', 'delta_r2_')}"
        for row in (ours, lbfgs)
    ]
    return Claim(
        "7. The MLP converges within 100 epochs",
        "best epoch 99",
        f"up to 1,000 epochs change {changes[0]}; L-BFGS changes {changes[1]}",
        f"{of_loss} of the held-out loss, {of_r2} of R2 (to within {MARGIN})",
        f"{ours['n_seeds']} gate seeds; of R2 also {ours['n_test']:,} test stars",
        link("converge_gate"),
    )


def nine_ridges_compete(pairs: pd.DataFrame, methods: pd.DataFrame) -> Claim:
    """A claim of our own, from the mixture minus a small network on components: it holds unless the network is better."""
    network, mixture = (f"R2 {row_of(methods, variant=name)['r2']:.4f}" for name in (NETWORK, MIXTURE))
    ours = row_of(pairs, method=NETWORK, baseline=MIXTURE, by="all")
    return Claim(
        "8. A regression gate makes nine ridges competitive",
        "(ours)",
        f"a network on components ({network}) minus the mixture ({mixture}): {shown(ours)}; {by_group(pairs, NETWORK, MIXTURE)}",
        judge(-ours["high"], -ours["low"]),
        f"{ours['n_test']:,} test stars; by group, all groups at once",
        link("compare_methods"),
    )


def local_experts_suffice(pairs: pd.DataFrame, methods: pd.DataFrame) -> Claim:
    """A claim of our own: local linear experts beat the network, and are within a margin of the likelihood fit."""
    ours, fit = (row_of(pairs, method=LOCAL, baseline=other, by="all") for other in (NETWORK, LIKELIHOOD))
    within = HOLDS if fit["low"] > -FIT_MARGIN else FAILS if fit["high"] < -FIT_MARGIN else UNKNOWN
    return Claim(
        "9. Local linear experts suffice",
        "(ours)",
        f"local linear experts (R2 {row_of(methods, variant=LOCAL)['r2']:.4f}) minus the network: {shown(ours)}; "
        f"{by_group(pairs, LOCAL, NETWORK)}; minus the likelihood fit: {shown(fit)}; {by_group(pairs, LOCAL, LIKELIHOOD)}",
        f"{judge(ours['low'], ours['high'])} against the network, {within} against the fit (not below it by {FIT_MARGIN})",
        f"{ours['n_test']:,} test stars; by group, all groups at once",
        link("compare_methods"),
    )


def by_group(pairs: pd.DataFrame, method: str, baseline: str) -> str:
    """In how many magnitudes and cells the method is better, in how many worse, and its least difference in each."""
    texts = []
    for kind, name in (("magnitude", "magnitudes"), ("cell", "cells")):
        rows = pairs[(pairs["method"] == method) & (pairs["baseline"] == baseline) & (pairs["by"] == kind)]
        if rows.empty:
            raise InputError(f"{pairs.attrs.get('file', 'table')}: found no {name} of {method}, expected them: run it again")
        better, worse, least = (rows["low"] > 0).sum(), (rows["high"] < 0).sum(), rows.nsmallest(1, "delta_r2").iloc[0].to_dict()
        texts.append(f"better in {better} and worse in {worse} of {len(rows)} {name}, least {shown(least)} in {least['stars']}")
    return ", ".join(texts)


def repetitions(intervals: pd.DataFrame, components: pd.DataFrame, set_size: int) -> str:
    """What one more repetition would give, and whether the report had enough test stars, by our standard error and by its own."""
    ours, cross_fitted = (row_of(intervals, gate=gate) for gate in REPLICATED.values())
    sources = components[(components["gate"] == REPLICATED[IN_SAMPLE]) & components["source"].isin(SOURCES_IN_TEST_STARS)]
    variance = set_size * float(sources["variance"].clip(lower=0.0).sum())
    report = load_published()["bootstrap"]["regress_mlp"]
    effect, its_error = report["mean"], (report["high"] - report["low"]) / (2 * scipy.stats.norm.ppf(0.975))
    its_power = scipy.stats.norm.sf(scipy.stats.norm.ppf(0.975) - effect / its_error)
    return (
        f"One more repetition of claim 1 with {set_size} test stars will, with 95 % confidence, lie in "
        f"[{ours['repetition_low']:+.4f}, {ours['repetition_high']:+.4f}] (cross-fitted: "
        f"[{cross_fitted['repetition_low']:+.4f}, {cross_fitted['repetition_high']:+.4f}]). Were {REPORT_STARS} test stars enough? "
        f"To see {ours['mean']:+.4f} with 80 % power takes {required_stars(ours['mean'], variance):,.0f} stars by the spread of "
        f"our test sets. By the report's own effect and interval ({effect:+.4f}, standard error {its_error:.4f}) its power was "
        f"{its_power:.0%}, and 80 % takes {required_stars(effect, REPORT_STARS * its_error**2):,.0f} stars."
    )


#: The differences of ``train_jointly``.
JOINT_QUESTIONS = (
    "joint experts against frozen ones",
    "further rounds",
    "gradients after one round",
    "a gate that saw the held-out fold",
)


def corrected(row: Mapping[Any, Any], n_choices: int) -> str:
    """The difference of the best of several variants, with a 95 % interval that holds for all of them (Bonferroni)."""
    width = scipy.stats.norm.ppf(1 - 0.025 / n_choices) * row["standard_error"]
    return f"{interval(row['delta_r2'], row['delta_r2'] - width, row['delta_r2'] + width)}, corrected for {n_choices} choices"


def about_gates(
    converge: pd.DataFrame,
    leaks: pd.DataFrame,
    control: pd.DataFrame,
    ablate: pd.DataFrame,
    joint: pd.DataFrame,
    joint_n_train: int,
    cover: pd.DataFrame,
) -> list[str]:
    """Leakage, convergence, other uses of the experts, joint training, stars outside the cells, and changes of the gate."""
    seen = {"protocol": CROSS_FITTED, "stars": "all", "baseline_protocol": IN_SAMPLE, "baseline_stars": "all"}
    leak_mlp, leak_linear = (row_of(leaks, form=form, **seen) for form in ("MLP", "linear"))
    linear = [row_of(converge, form="linear", protocol=p, optimiser="L-BFGS", start="warm") for p in PROTOCOLS]
    cold = [row_of(converge, form="linear", protocol=p, optimiser="L-BFGS", start="cold") for p in PROTOCOLS]
    inputs = "features + expert predictions"
    stacked, mixture = row_of(control, form="MLP", inputs=inputs), row_of(control, form="MLP gate", inputs=inputs)
    alone, constant = row_of(control, form="MLP", inputs="features"), row_of(control, form="constant weights")
    title = "Mixing is not the best use of the experts" if stacked["low"] > 0 else "A simpler use of the experts"
    together, further, gradients, leak = (row_of(joint, question=question) for question in JOINT_QUESTIONS)
    adds = {HOLDS: "helps", FAILS: "harms", UNKNOWN: "shows no difference"}[judge(further["low"], further["high"])]
    treatments, untreated = cover[cover["standard_error"] > 0], row_of(cover, standard_error=0.0)["variant"]
    best, widths = treatments.nlargest(1, "r2").iloc[0].to_dict(), ablate[ablate["changed"] == "hidden units"]
    no_pca, width = row_of(ablate, changed="features", value="no PCA"), widths.nlargest(1, "r2").iloc[0].to_dict()
    return [
        "**Leakage.** A gate can be trained with predictions of experts that had not seen its stars, or that had. The first minus "
        f"the second: MLP {shown(leak_mlp)}, converged linear gate {shown(leak_linear)}. {link('measure_leakage')}",
        "**The linear gate has several optima.** Its loss is not convex. On all of its stars, from the classification gate it ends "
        f"at {shown(linear[0])} (in-sample) and {shown(linear[1])} (cross-fitted), from random params at {shown(cold[0])} and "
        f"{shown(cold[1])}. {link('converge_gate')}",
        f"**{title}.** A network of the same size that regresses log g on features and expert predictions differs from the mixture "
        f"by {shown(stacked)} (R2 {stacked['r2']:.4f} against {mixture['r2']:.4f}). From the 13 features alone it reaches "
        f"{alone['r2']:.4f}; constant weights reach {constant['r2']:.4f}. {link('control_gate')}",
        f"**Training experts and gate together** ({joint_n_train:,} training stars, {together['n_seeds']} gate seeds). One "
        f"closed-form round differs from frozen experts by {shown(together)}. Alternating {adds}: further rounds differ from the "
        f"first by {shown(further)}, gradients after it by {shown(gradients)}. Experts without a fold that are given the weights "
        f"of a gate which saw it differ from those without that leak by {shown(leak)}. {link('train_jointly')}",
        f"**All stars.** Best on covered and other stars together: {best['variant']}, R2 {best['r2']:.4f} "
        f"({corrected(best, len(treatments))}, against {untreated}). {link('cover_all')}",
        f"**One change at a time.** Without the principal components: {shown(no_pca)}. The best width is {width['variant']}: "
        f"{corrected(width, len(widths))}, against 64. {link('ablate_gate')}",
    ]


def about_intervals(components: pd.DataFrame, ranking: pd.DataFrame, coverage: pd.DataFrame) -> list[str]:
    """Where the variance of a repetition comes from, and which intervals hold what they promise."""
    shares = []
    for source in ("test stars", "survey", "noise draw", "gate seed"):
        row = row_of(components, gate=REPLICATED[IN_SAMPLE], source=source)
        shares.append(f"{source} {row['share']:.0%} [{row['share_low']:.0%}, {row['share_high']:.0%}]")
    texts = []
    for size in sorted(coverage["set_size"].unique()):
        at_95 = coverage[(coverage["level"] == 0.95) & (coverage["set_size"] == size)]
        overall, by_cell = (at_95[(at_95["stars"] == "all stars") == whole] for whole in (True, False))
        best, best_by_cell = (
            row_of(ranking, set_size=size, stars=stars, chosen=True)["method"] for stars in ("all stars", "by cell")
        )
        mean = overall.groupby("method")["coverage"].mean()
        safest = row_of(ranking, set_size=size, stars="by cell", safest=True)["method"]
        worst, worst_of_safest = (
            by_cell[by_cell["method"] == method].nsmallest(1, "coverage").iloc[0] for method in (best_by_cell, safest)
        )
        widths = by_cell.groupby("method")["mean_width"].mean()
        longer = widths[safest] / widths[best_by_cell] - 1
        texts.append(
            f"At {size:,} stars the report's percentile intervals hold the truth {mean['percentile']:.1%} of the time, the {best} "
            f"intervals {mean[best]:.1%}. By cell, the {best_by_cell} intervals do best; at worst ({worst['stars']}, "
            f"{worst['comparison']}) they hold it {worst['coverage']:.1%} of the time. The safest are called '{safest}': "
            f"{worst_of_safest['coverage']:.1%} at worst ({worst_of_safest['stars']}), and {longer:+.0%} in width on average."
        )
    return [
        f"**Where the variance of a repetition comes from**: {', '.join(shares)}; the rest are interactions. {link('replicate')}",
        f"**Intervals that promise 95 %.** {' '.join(texts)} Methods are chosen on one half of the population, coverage is that on "
        f"the other. {link('calibrate_bootstrap')}",
    ]


def table_of_claims(claims: Sequence[Claim]) -> pd.DataFrame:
    """One row for each claim."""
    return pd.DataFrame(claims).rename(columns={"claim": "claim of the report", "interval_over": "95 % interval over"})
