import io

import numpy as np
import pandas as pd

from moe_jax.apply.catalogue import open_catalogue


def test_a_csv_file_is_what_pandas_writes(tmp_path, rng):
    """Two parts; NaN, infinities, all sizes of numbers, text with commas and quotation marks."""
    numbers = (10 ** rng.uniform(-30, 30, 200) * rng.choice([-1, 1], 200)).reshape(100, 2)
    numbers[::7, 0], numbers[::11, 1], numbers[5], numbers[6] = np.nan, np.inf, 0.0, 4500.0
    names = [("plain", 'one, "two"', "", "a|b")[i % 4] for i in range(100)]
    table = pd.DataFrame({"star": np.arange(100), "log_g": numbers[:, 0], "chi2": numbers[:, 1].astype("f4"), "flags": names})
    with open_catalogue(tmp_path / "stars.csv") as add_rows:
        add_rows(table[:60])
        add_rows(table[60:])
    expected = io.StringIO()
    table.to_csv(expected, index=False, float_format="%.6g", lineterminator="\n")
    assert (tmp_path / "stars.csv").read_text() == expected.getvalue()
