"""Each claim reaches each of its verdicts from made-up tables, whose other rows say the opposite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from small_run import SMALL, with_options

from experiments import calibrate_bootstrap, compare_methods, converge_gate, findings, replicate
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE, PROTOCOLS
from experiments.report import claims
from experiments.report.claims import FAILS, HOLDS, UNKNOWN
from moe_jax import InputError
from moe_jax.evaluate.bootstrap import resample_gain
from moe_jax.experts.cells import CELL_NAMES, N_CELLS

#: Intervals of a difference, and the verdict on the claim that it is positive.
OUTCOMES = [((0.01, 0.03), HOLDS), ((-0.03, -0.01), FAILS), ((-0.01, 0.02), UNKNOWN), ((0.0, 0.01), UNKNOWN)]
outcomes = pytest.mark.parametrize(("ends", "verdict"), OUTCOMES)


def difference(low, high, **columns):
    return columns | {"delta_r2": (low + high) / 2, "low": low, "high": high}


def converge_table():
    rows = [
        difference(low, low + 0.02, form=form, protocol=protocol, optimiser=optimiser, start=start)
        for form in ("linear", "MLP")
        for protocol, low in zip(PROTOCOLS, (0.1, 0.2), strict=True)
        for optimiser in ("Adam", "L-BFGS")
        for start in ("cold", "warm")
    ]
    return pd.DataFrame(rows)


def more_table(loss=(-0.2, -0.1), r2=(0.01, 0.02)):
    """Longer training in the report's protocol changes loss and R2 so; in the other, and by L-BFGS, it does the opposite."""
    ends = {(p, o): ((0.3, 0.4), (-0.4, -0.3)) for p in PROTOCOLS for o in ("Adam, longer", "L-BFGS")}
    ends[IN_SAMPLE, "Adam, longer"] = (loss, r2)
    rows = []
    for (protocol, optimiser), pair in ends.items():
        row = {"protocol": protocol, "optimiser": optimiser, "n_seeds": 4, "n_test": 8322}
        for name, (low, high) in zip(("loss", "r2"), pair, strict=True):
            row |= {f"delta_{name}": (low + high) / 2, f"delta_{name}_low": low, f"delta_{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def intervals_table(low=0.01, high=0.03, gate="MLP, in-sample 20 %"):
    """One gate has the given interval; that of every other lies elsewhere, above or below 0."""
    ends = {name: (-0.7, -0.5) if "linear" in name else (0.5, 0.7) for name in (*NAMES, *replicate.DIFFERENCES)}
    ends[gate] = (low, high)
    return pd.DataFrame(
        {"gate": gate, "mean": (a + b) / 2, "mean_low": a, "mean_high": b, "repetition_low": a - 0.1, "repetition_high": b + 0.1}
        | {"fraction_above_0": 0.25}
        for gate, (a, b) in ends.items()
    )


NAMES = tuple(replicate.gates_of(replicate.PRESETS["default"]))


def rivals_table(low, high, protocol=IN_SAMPLE):
    """Leads of one protocol, of which the given one is the smallest; the other protocol says the opposite."""
    others = [name for name in CELL_NAMES if name != "Hot Metal-poor"]
    ends = {protocol: [(low, high)] + [(0.05, 0.09)] * 7, "another": [(-0.4, -0.3)] * 8}
    ends |= {p: ends["another"] for p in PROTOCOLS if p != protocol}
    return pd.DataFrame(
        {"protocol": p, "cell": cell, "lead": (a + b) / 2, "low": a, "high": b}
        for p in PROTOCOLS
        for cell, (a, b) in zip(others, ends[p], strict=True)
    )


def cells_table():
    return pd.DataFrame(
        difference(0.01 * k, 0.01 * k + 0.02, protocol=protocol, cell=cell) | {"n_test": 90, "stars_needed_in_the_cell": 1234.5}
        for protocol in PROTOCOLS
        for k, cell in enumerate(CELL_NAMES)
    )


def weights_table(mean, star):
    ends = {
        (IN_SAMPLE, "of the mean weights"): mean,
        (IN_SAMPLE, "of a star's weights, mean"): star,
        (CROSS_FITTED, "of the mean weights"): (-9.0, -8.0),
        (CROSS_FITTED, "of a star's weights, mean"): (-9.0, 8.0),
    }
    return pd.DataFrame(
        {"protocol": p, "entropy": entropy, "difference": (low + high) / 2, "low": low, "high": high}
        | {"least_seed": low - 1, "largest_seed": high + 1, "n_seeds": 16, "n_test": 8322}
        for (p, entropy), (low, high) in ends.items()
    )


def scale_table(low, high):
    ends = {("MLP", 1.0, 32_000): (low, high), ("MLP", 1.0, 100_000): (0.5, 0.7), ("MLP", 1.0, 4_000): (-0.9, -0.8)}
    ends |= {("MLP", 0.2, 32_000): (-0.3, -0.2), ("linear", 1.0, 32_000): (0.2, 0.3), ("linear", 1.0, 200_000): (0.2, 0.3)}
    return pd.DataFrame(
        {"method": method, "noise_level": noise, "n_train": n, "delta_r2": (a + b) / 2, "delta_r2_low": a, "delta_r2_high": b}
        for (method, noise, n), (a, b) in ends.items()
    )


def choices_table():
    return pd.DataFrame({"noise_level": [1.0, 1.0, 0.2], "n_train": [32_000, 100_000, 32_000], "cells_at_edge": [0, 9, 5]})


@outcomes
def test_mlp_beats_classification(ends, verdict):
    claim = claims.mlp_beats_classification(intervals_table(*ends), "stars")
    assert claim.verdict == verdict
    assert claim.our_result.startswith(f"{sum(ends) / 2:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}] in the report's protocol, +0.6000 [")
    assert claim.interval_over == "stars"


@outcomes
@pytest.mark.parametrize("gate", ["linear, in-sample 20 %", "linear, in-sample 20 %, converged"])
def test_linear_is_worse(ends, verdict, gate):
    """The claim is of a negative difference, so that a gain of the linear gate refutes it."""
    low, high = ends
    claim = claims.linear_is_worse(intervals_table(-high, -low, gate), "stars")
    assert claim.verdict == (
        f"{HOLDS} after 100 epochs, {verdict} once converged"
        if "conv" in gate
        else f"{verdict} after 100 epochs, {HOLDS} once converged"
    )
    assert f"{-sum(ends) / 2:+.4f} [{-high:+.4f}, {-low:+.4f}] {'once' if 'conv' in gate else 'after'}" in claim.our_result
    assert "below 0 in 75% of the repetitions" in claim.our_result


@outcomes
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_non_linearity_adds(ends, verdict, protocol):
    """Each protocol is judged by its own difference, whose share is of the MLP's gain in that protocol."""
    claim = claims.non_linearity_adds(intervals_table(*ends, claims.NON_LINEAR[protocol]), "stars")
    names = {IN_SAMPLE: "in the report's protocol", CROSS_FITTED: "cross-fitted"}
    verdicts = {p: verdict if p == protocol else FAILS for p in PROTOCOLS}
    assert claim.verdict == ", ".join(f"{verdicts[p]} {names[p]}" for p in PROTOCOLS)
    assert f"{sum(ends) / 2:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}] {names[protocol]}, {sum(ends) / 1.2:.0%} of" in claim.our_result


@outcomes
def test_hot_metal_poor_gain_most(ends, verdict):
    claim = claims.hot_metal_poor_gain_most(cells_table(), rivals_table(*ends))
    assert claim.verdict == verdict
    assert claim.interval_over == "810 test stars; all cells at once"
    assert "+0.0700 [+0.0600, +0.0800] in the report's protocol; Hot Metal-rich gains +0.0900" in claim.our_result
    assert f"over Cool Metal-poor, is {sum(ends) / 2:+.4f}" in claim.our_result


def test_one_cell_with_a_larger_gain_refutes_the_third_claim_whatever_the_others_say():
    rivals = rivals_table(-0.03, -0.01)
    rivals.loc[1, ["low", "high"]] = [-0.01, 0.2]
    assert claims.hot_metal_poor_gain_most(cells_table(), rivals).verdict == FAILS


@pytest.mark.parametrize(("mean", "of_mean"), OUTCOMES)
@pytest.mark.parametrize(("star", "of_star"), OUTCOMES)
def test_weights_are_more_uniform(mean, of_mean, star, of_star):
    claim = claims.weights_are_more_uniform(weights_table(mean, star))
    assert claim.verdict == f"{of_mean} of the mean weights, {of_star} star by star"
    assert f"nats (single gates: {mean[0] - 1:+.3f} to {mean[1] + 1:+.3f})" in claim.our_result
    assert claim.interval_over == "8,322 test stars, 16 gate seeds"


@outcomes
def test_soft_beats_hard(ends, verdict):
    claim = claims.soft_beats_hard({"estimate": 0.0, "low": ends[0], "high": ends[1], "stars": 1234.5, "n_test": 8322})
    assert claim.verdict == verdict + " (about 1,234 test stars would be needed)" * (verdict == UNKNOWN)


@outcomes
def test_gain_survives_noise(ends, verdict):
    claim = claims.gain_survives_noise(scale_table(*ends), choices_table(), 10_000)
    assert claim.verdict == verdict
    many = "+0.6000 [+0.5000, +0.7000] with 100,000 training stars (alpha at an end of its grid in 9 of 9 cells)"
    assert claim.our_result.endswith(f"with 32,000 training stars, {many}")


@pytest.mark.parametrize(
    ("loss", "of_loss"),
    [((-0.2, -0.1), FAILS), ((0.1, 0.2), HOLDS), ((-0.1, 0.1), UNKNOWN), ((0.0, 0.0), HOLDS)],
)
@pytest.mark.parametrize(
    ("r2", "of_r2"),
    [
        ((-0.0029, 0.0029), HOLDS),
        ((0.001, 0.002), HOLDS),
        ((0.0031, 0.01), FAILS),
        ((-0.01, -0.0031), FAILS),
        ((-0.0031, 0.0), UNKNOWN),
        ((0.0, 0.0031), UNKNOWN),
        ((-0.01, 0.01), UNKNOWN),
    ],
)
def test_mlp_converges(loss, of_loss, r2, of_r2):
    claim = claims.mlp_converges(more_table(loss, r2))
    assert claim.verdict == f"{of_loss} of the held-out loss, {of_r2} of R2 (to within 0.003)"
    assert claim.our_result.startswith(f"up to 1,000 epochs change the held-out loss by {sum(loss) / 2:+.5f} [")
    assert claim.interval_over == "4 gate seeds; of R2 also 8,322 test stars"


def pairs_table(method, baseline, low, high):
    """One pair has the given interval of all stars; by group it is better in one magnitude, and worse in one of two cells."""
    ends = {("all", "all"): (low, high), ("magnitude", "20.5 to 21"): (0.1, 0.3)}
    ends |= {("cell", "Cool Solar"): (-0.3, -0.1), ("cell", "Mid Solar"): (-0.1, 0.2)}
    rows = [
        difference(*(ends[group] if pair == (method, baseline) else (0.4, 0.6)), method=pair[0], baseline=pair[1], n_test=8322)
        | dict(zip(("by", "stars"), group, strict=True))
        for pair in compare_methods.PAIRS
        for group in ends
    ]
    return pd.DataFrame(rows)


def methods_table():
    names = {claims.MIXTURE: 0.9, claims.NETWORK: 0.92, claims.LOCAL: 0.95}
    return pd.DataFrame({"variant": names.keys(), "r2": names.values()})


@outcomes
def test_nine_ridges_compete(ends, verdict):
    """The claim is of a negative difference, so that a gain of the network refutes it."""
    low, high = ends
    claim = claims.nine_ridges_compete(pairs_table(claims.NETWORK, claims.MIXTURE, -high, -low), methods_table())
    assert claim.verdict == verdict
    start = (
        f"a network on components (R2 0.9200) minus the mixture (R2 0.9000): {-sum(ends) / 2:+.4f} [{-high:+.4f}, {-low:+.4f}]; "
    )
    assert claim.our_result == (
        f"{start}better in 1 and worse in 0 of 1 magnitudes, least +0.2000 [+0.1000, +0.3000] in 20.5 to 21, "
        "better in 0 and worse in 1 of 2 cells, least -0.2000 [-0.3000, -0.1000] in Cool Solar"
    )


@outcomes
def test_local_experts_suffice_against_the_network(ends, verdict):
    claim = claims.local_experts_suffice(pairs_table(claims.LOCAL, claims.NETWORK, *ends), methods_table())
    assert claim.verdict == f"{verdict} against the network, {HOLDS} against the fit (not below it by 0.005)"


@pytest.mark.parametrize(
    ("ends", "verdict"), [((-0.004, 0.1), HOLDS), ((-0.02, -0.0051), FAILS), ((-0.0051, 0.0), UNKNOWN), ((-0.01, -0.004), UNKNOWN)]
)
def test_local_experts_suffice_against_the_fit(ends, verdict):
    claim = claims.local_experts_suffice(pairs_table(claims.LOCAL, claims.LIKELIHOOD, *ends), methods_table())
    assert claim.verdict == f"{HOLDS} against the network, {verdict} against the fit (not below it by 0.005)"


def test_groups_that_are_missing_are_named():
    pairs = pairs_table(claims.LOCAL, claims.NETWORK, 0.1, 0.2)
    with pytest.raises(InputError, match="found no cells of local linear experts"):
        claims.local_experts_suffice(pairs[pairs["by"] != "cell"], methods_table())


def test_power_by_both_standard_errors():
    """The report's +.0096 and its error .0168 / 3.92: z = 2.24, power P(Z > 1.96 - 2.24), and 816 (2.80 / 2.24)^2 stars."""
    components = pd.DataFrame({"gate": "MLP, in-sample 20 %", "source": ["test stars", "survey"], "variance": [1e-4, 1.0]})
    text = claims.repetitions(intervals_table(), components, 832)
    assert "its power was 61%, and 80 % takes 1,276 stars" in text
    # (1.96 + 0.84)^2 x 832 x 1e-4 / 0.02^2; the survey's part does not fall with more stars.
    assert "takes 1,633 stars by the spread of our test sets" in text


def test_the_best_of_several_is_corrected():
    row = {"delta_r2": 0.01, "standard_error": 0.001}
    assert claims.corrected(row, 1) == "+0.0100 [+0.0080, +0.0120], corrected for 1 choices"
    # Bonferroni: the quantile at 1 - 0.025 / 5 is 2.576
    assert claims.corrected(row, 5) == "+0.0100 [+0.0074, +0.0126], corrected for 5 choices"


def test_entropy_differences(rng):
    """Against a bootstrap over stars, for gates of one seed; then seeds alone, whose spread is known."""
    weights, classify = rng.dirichlet(np.ones(3), 500), rng.dirichlet([5.0, 1.0, 1.0], 500)

    def measures(w, c):
        of = [scipy.stats.entropy(w.mean(axis=0)), scipy.stats.entropy(w, axis=1).mean()]
        return np.subtract(of, [scipy.stats.entropy(c.mean(axis=0)), scipy.stats.entropy(c, axis=1).mean()])

    table = findings.entropy_differences(np.stack([weights] * 4), classify)
    np.testing.assert_allclose(table["difference"], measures(weights, classify), rtol=1e-5)
    rows = rng.integers(500, size=(1_000, 500))
    spread = np.std([measures(weights[r], classify[r]) for r in rows], axis=0)
    np.testing.assert_allclose((table["high"] - table["low"]) / 2, 1.96 * spread, rtol=0.1)
    other = rng.dirichlet(3 * np.ones(3), 500)
    table = findings.entropy_differences(np.stack([weights, other]), classify)
    both = np.stack([measures(w, classify) for w in (weights, other)])
    np.testing.assert_allclose(table[["least_seed", "largest_seed"]], np.sort(both, axis=0).T, rtol=1e-5)
    assert (table["high"] > both.max(axis=0)).all()  # two seeds: 12.7 standard errors, if they differ much
    assert table[["n_seeds", "n_test"]].to_numpy().tolist() == [[2, 500]] * 2


def test_the_design_is_counted():
    table = pd.DataFrame(list(np.ndindex(2, 3, 4)), columns=["survey", "noise_draw", "gate_seed"]).assign(set_0=0.0, set_1=0.0)
    assert claims.design(table) == "2 surveys, 3 noise draws, 4 gate seeds, 2 test sets"


@pytest.fixture
def results(tmp_path):
    """Made-up results of all experiments, in which a network on features and expert predictions beats the mixture."""
    seen = {"protocol": CROSS_FITTED, "stars": "all", "baseline_protocol": IN_SAMPLE, "baseline_stars": "all"}
    both = "features + expert predictions"
    controls = [
        ("MLP gate", both, 0.0),
        ("MLP", both, 0.1),
        ("MLP", "features", -0.1),
        ("constant weights", "expert predictions", -0.2),
    ]
    changes = [("features", "no PCA", 0.6), ("hidden units", "8", 0.7), ("hidden units", "256", 0.9), ("gate stars", "9", 0.95)]
    sources = {"test stars": 0.5, "survey": 0.2, "noise draw": -0.1, "gate seed": 0.1, "noise x test": 0.2}
    widths = {"standard_error": 0.01}
    tables = {
        "converge_gate/variants": converge_table(),
        "converge_gate/more_training": more_table(),
        "measure_leakage/differences": pd.DataFrame(difference(0.1, 0.2, form=form) | seen for form in ("MLP", "linear")),
        "replicate/intervals": intervals_table(),
        "replicate/differences": pd.DataFrame({"survey": [0, 1], "noise_draw": 0, "gate_seed": 0, "set_0": 0.0}),
        "replicate/components": pd.DataFrame(
            {"gate": "MLP, in-sample 20 %", "source": source, "share": max(share, 0), "variance": 1e-4 * share}
            | {"share_low": 0.0, "share_high": 0.9}
            for source, share in sources.items()
        ),
        "calibrate_bootstrap/ranking": pd.DataFrame(
            [
                (816, "all stars", "basic", True, False),
                (816, "all stars", "bca", False, True),
                (816, "by cell", "bca", True, False),
                (816, "by cell", "wide", False, True),
                (816, "by cell", "basic", False, False),
            ],
            columns=["set_size", "stars", "method", "chosen", "safest"],
        ),
        "calibrate_bootstrap/coverage": pd.DataFrame(
            [
                ("basic", "all stars", 0.951, 9.0),
                ("percentile", "all stars", 0.931, 9.0),
                ("bca", "Cool Solar", 0.8, 1.0),
                ("bca", "Hot Solar", 0.9, 3.0),
                ("wide", "Cool Solar", 0.97, 1.0),
                ("wide", "Hot Solar", 0.92, 4.0),
                ("basic", "Mid Solar", 0.1, 1.0),
            ],
            columns=["method", "stars", "coverage", "mean_width"],
        ).assign(level=0.95, set_size=816, comparison="MLP"),
        "control_gate/variants": pd.DataFrame(
            difference(d - 0.01, d + 0.01, form=form, inputs=inputs) | {"r2": 0.8 + d} for form, inputs, d in controls
        ),
        "ablate_gate/variants": pd.DataFrame(
            difference(r2 - 0.81, r2 - 0.79, changed=changed, value=value) | {"variant": f"{value} {changed}", "r2": r2} | widths
            for changed, value, r2 in changes
        ),
        "train_jointly/differences": pd.DataFrame(
            difference(low, low + 0.2, question=question) | {"n_seeds": 4, "n_test": 90}
            for question, low in zip(claims.JOINT_QUESTIONS, (0.1, -0.1, -0.4, 0.3), strict=True)
        ),
        "cover_all/variants": pd.DataFrame(
            difference(0.1, 0.2, variant=v) | {"r2": r2, "standard_error": e} for v, r2, e in (("a", 0.9, 0.01), ("b", 0.8, 0.0))
        ),
        "compare_methods/pairs": pairs_table(claims.NETWORK, claims.MIXTURE, 0.1, 0.2),
        "compare_methods/methods": methods_table(),
        "scale/scale": scale_table(0.01, 0.03),
        "scale/choices": choices_table(),
    }
    for name, table in tables.items():
        experiment, file = name.split("/")
        folder = tmp_path / experiment / "default"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{file}.csv", index=False)
    (tmp_path / "replicate" / "default" / "run.json").write_text(json.dumps({"stars_in_a_test_set": 832}))
    (tmp_path / "scale" / "default" / "run.json").write_text(json.dumps({"config": {"data": {"n_test": 10_000}}}))
    (tmp_path / "train_jointly" / "default" / "run.json").write_text(json.dumps({"config": {"data": {"n_train": 8_000}}}))
    return tmp_path


def test_the_whole_page(results):
    hard = {"estimate": 0.02, "low": 0.01, "high": 0.03, "stars": 10.0, "n_test": 8322}
    evidence = findings.Evidence(cells_table(), rivals_table(-0.01, 0.03), weights_table((0.1, 0.2), (-0.2, -0.1)), hard)
    text = findings.write_findings(findings.FindingsConfig(results_dir=results), evidence, "python -m experiments.findings")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[0].split(".")[0][2:] for row in rows] == ["1", "2a", "2b", "3", "4", "5", "6", "7", "8", "9"]
    assert [row[3] for row in rows] == [
        HOLDS,
        f"{HOLDS} after 100 epochs, {HOLDS} once converged",
        f"{FAILS} in the report's protocol, {FAILS} cross-fitted",
        UNKNOWN,
        f"{HOLDS} of the mean weights, {FAILS} star by star",
        HOLDS,
        HOLDS,
        f"{FAILS} of the held-out loss, {FAILS} of R2 (to within 0.003)",
        FAILS,
        f"{HOLDS} against the network, {HOLDS} against the fit (not below it by 0.005)",
    ]
    over = "2 surveys, 1 noise draws, 1 gate seeds, 1 test sets"
    assert [row[4] for row in rows][:3] == [over] * 3
    for sentence in (
        "first minus the second: MLP +0.1500 [+0.1000, +0.2000]",
        "at +0.1100 [+0.1000, +0.1200] (in-sample) and +0.2100 [+0.2000, +0.2200] (cross-fitted)",
        "**Mixing is not the best use of the experts.**",
        "(R2 0.9000 against 0.8000). From the 13 features alone it reaches 0.7000; constant weights reach 0.6000",
        "Without the principal components: -0.2000 [-0.2100, -0.1900]. The best width is 256 hidden units: +0.1000 [+0.0776, "
        "+0.1224], corrected for 2 choices",
        "together** (8,000 training stars, 4 gate seeds). One closed-form round differs from frozen experts by +0.2000 [",
        "Alternating shows no difference: further rounds differ from the first by +0.0000 [-0.1000, +0.1000], gradients after "
        "it by -0.3000 [-0.4000, -0.2000]. Experts without a fold that are given the weights of a gate which saw it differ from "
        "those without that leak by +0.4000",
        "together: a, R2 0.9000",
        "corrected for 1 choices, against b)",
        "test stars 50% [0%, 90%], survey 20% [0%, 90%], noise draw 0% [0%, 90%], gate seed 10% [0%, 90%]; the rest are",
        "At 816 stars the report's percentile intervals hold the truth 93.1% of the time, the basic intervals 95.1%. By cell, the "
        "bca intervals do best; at worst (Cool Solar, MLP) they hold it 80.0% of the time. The safest are called 'wide': "
        "92.0% at worst (Hot Solar), and +25% in width on average.",
        "| in-sample | Cool Metal-poor | 90 | +0.0100 [+0.0000, +0.0200] | 1,234 |",
    ):
        assert sentence in text
    # Components below 0 count as 0: (1.96 + 0.84)^2 x 832 x 0.7e-4 / 0.02^2.
    assert "takes 1,143 stars by the spread of our test sets" in text
    assert "nan" not in text


@pytest.mark.slow
def test_the_command_gathers_its_own_evidence(results, trained):
    """On the stars of the small run, whose tables have the same classification gate, soft and hard."""
    few = {"data": SMALL.data, "n_seeds": 2, "n_weight_seeds": 2, "n_resamples": 40, "results_dir": results}
    findings.main(with_options(findings.PRESETS["default"], **few, cache_dir=trained.parent / "cache"))
    hard = json.loads((results / "findings" / "run.json").read_text())["soft_minus_hard"]
    r2 = pd.read_csv(trained / "overall.csv").set_index("method")["r2"]
    assert hard["estimate"] == pytest.approx(r2["classify"] - r2["hard"], abs=1e-5)
    assert f"{hard['estimate']:+.4f} [{hard['low']:+.4f}, {hard['high']:+.4f}]" in (results / "FINDINGS.md").read_text()
    cells, rivals, weights = (pd.read_csv(results / "findings" / f"{name}.csv") for name in ("cells", "rivals", "weights"))
    assert (cells.groupby("protocol")["n_test"].sum() == hard["n_test"]).all()
    for protocol in PROTOCOLS:
        gain = cells[cells["protocol"] == protocol].set_index("cell")["delta_r2"]
        lead = rivals[rivals["protocol"] == protocol].set_index("cell")["lead"]
        np.testing.assert_allclose(lead, gain["Hot Metal-poor"] - gain[lead.index], atol=1e-5)
    assert weights["n_seeds"].tolist() == [2] * 4


@pytest.mark.slow
def test_the_leads_are_differences_of_the_cells(rng):
    y, gain = jnp.asarray(rng.normal(size=900)), jnp.asarray(rng.normal(size=900))
    resampled = resample_gain(jax.random.key(0), y, gain, jnp.arange(900) % N_CELLS, 50, N_CELLS).columns(slice(1, None))
    table = findings.lead(resampled)
    assert table["cell"].tolist() == [name for name in CELL_NAMES if name != "Hot Metal-poor"]
    gains = np.array([gain[k::9].mean() / np.var(y[k::9]) for k in range(9)])
    np.testing.assert_allclose(table["lead"], gains[6] - np.delete(gains, 6), rtol=1e-4)
    np.testing.assert_allclose((table["low"] + table["high"]) / 2, table["lead"], rtol=1e-4, atol=1e-5)


def test_the_gates_of_the_replication_have_the_names_that_are_looked_up():
    gates = replicate.gates_of(replicate.PRESETS["default"])
    for protocol, name in claims.REPLICATED.items():
        assert (gates[name].protocol, gates[name].fraction) == (protocol, findings.FRACTIONS[protocol])
        mlp, linear = (gates[gate] for gate in replicate.DIFFERENCES[claims.NON_LINEAR[protocol]])
        assert (mlp, linear.protocol, linear.fraction) == (gates[name], protocol, findings.FRACTIONS[protocol])
        assert linear.training.validation_fraction == mlp.training.validation_fraction  # the same stars
    runs = converge_gate.runs_of(converge_gate.PRESETS["default"])
    assert runs["MLP", IN_SAMPLE, "Adam, longer", "cold"].training.epochs == 1_000


def test_the_method_is_chosen_on_the_first_half():
    """Methods by their error on each half: percentile is best on the second, which has no say."""
    coverage = pd.DataFrame(
        {"half": half, "set_size": 816, "stars": stars, "method": method, "level": 0.95, "coverage": 0.95 - error}
        for half, errors in (("first half", (0.02, 0.01)), ("second half", (0.0, 0.03)))
        for stars in ("all stars", "Cool Solar", "Mid Solar")
        for method, error in zip(("percentile", "basic"), errors, strict=True)
    )
    ranking = calibrate_bootstrap.rank_methods(coverage, "first half")
    assert ranking[ranking["chosen"]][["stars", "method"]].to_numpy().tolist() == [["all stars", "basic"], ["by cell", "basic"]]
    np.testing.assert_allclose(ranking["rms_error"], [1, 2, 1, 2])


def test_rare_stars_that_carry_the_difference():
    """Two of 200 stars of the cell gain 99 each, the others 1: half of the difference. A test set misses both of 400 by chance."""
    cell = np.repeat([3, 5], 200)
    gain = np.where(np.arange(400) % 200 < 2, 99.0, 1.0)
    gain[200:] = 7.0
    pair = calibrate_bootstrap.PAIRS[1]
    population = calibrate_bootstrap.Population(np.zeros(400), cell, np.stack([np.zeros(400), gain, np.ones(400)]))
    text = calibrate_bootstrap.rare_stars(population, CELL_NAMES[3], pair, (100, 400))
    assert f"In {CELL_NAMES[3]}, the 2 stars of 200 that gain most carry 50% of the difference ({pair})" in text
    assert "and 61% of those of 100 and 13% of those of 400 test sets hold none of them" in text


def test_other_results_are_needed(tmp_path):
    with pytest.raises(InputError, match=r"variants.csv: found no such file, expected the result of `python -m experiments\."):
        claims.read(tmp_path, "converge_gate", "variants")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "MLP", "colour": "red"}, "variants.csv: found no column colour, expected it: run the experiment again"),
        ({"form": "MLP", "optimiser": "Adam"}, "variants.csv: found 4 rows with form MLP, optimiser Adam, expected one"),
        ({"form": "tree"}, "variants.csv: found 0 rows with form tree, expected one"),
    ],
)
def test_a_row_that_is_not_there(results, values, message):
    table = claims.read(results, "converge_gate", "variants")
    with pytest.raises(InputError, match=message):
        claims.row_of(table, **values)
