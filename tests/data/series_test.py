# SPDX-License-Identifier: Apache-2.0
"""Series: splits and windows, standardising, time features, known floors, faulty files."""

import numpy as np
import pytest

from attnjax.data import series
from attnjax.errors import RecipeError

HEADER = "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"


def write(path, rows, header=HEADER, minutes=60, columns=7):
    """A file whose value in row i and column j is i + j / 100."""
    start = np.datetime64("2016-07-01T00:00", "m")
    lines = [header]
    for i in range(rows):
        stamp = str(start + i * np.timedelta64(minutes, "m")).replace("T", " ") + ":00"
        lines.append(",".join([stamp, *(f"{i + j / 100:.2f}" for j in range(columns))]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def hourly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ett")
    write(folder / "ETTh1.csv", 14_500)
    return folder


def test_hourly_splits_are_12_4_4_months_of_30_days(hourly):
    month, s, h = 720, 48, 24
    starts = {"train": 0, "val": 12 * month - s, "test": 16 * month - s}
    rows = {"train": 12 * month, "val": 4 * month + s, "test": 4 * month + s}
    raw = np.arange(14_500)[:, None] + np.arange(7) / 100
    mean, scale = raw[: 12 * month].mean(axis=0), raw[: 12 * month].std(axis=0)
    for split, start in starts.items():
        source = series.SeriesFile(str(hourly), "ETTh1", split, length=s, horizon=h)
        assert len(source) == rows[split] - s - h + 1
        for index in (0, len(source) - 1):
            window = source[index]
            assert {k: v.shape for k, v in window.items()} == {
                "past": (s, 7), "past_time": (s, 4), "future": (h, 7), "future_time": (h, 4),
                "mean": (7,), "scale": (7,),
            }  # fmt: skip
            assert {v.dtype for v in window.values()} == {np.dtype("float32")}
            both = np.concatenate([window["past"], window["future"]])
            first = start + index
            np.testing.assert_allclose(both, (raw[first : first + s + h] - mean) / scale, atol=1e-5)
            np.testing.assert_allclose(
                both * window["scale"] + window["mean"], raw[first : first + s + h], rtol=1e-5,
                atol=1e-2,
            )  # fmt: skip
    with pytest.raises(IndexError):
        _ = source[0]["past"][s]


def test_univariate_is_the_target_column(hourly):
    source = series.SeriesFile(str(hourly), "ETTh1", features="S", length=4, horizon=2)
    window = source[3]
    values = window["past"] * window["scale"] + window["mean"]
    np.testing.assert_allclose(values[:, 0], np.arange(3, 7) + 0.06, atol=2e-3)


def test_quarter_hours_have_four_times_the_rows():
    bounds = series.split_bounds(69_681, series.LAYOUTS["ETTm1"])
    assert bounds == ((0, 34_560), (34_560, 46_080), (46_080, 57_600))
    assert series.split_bounds(26_304, series.LAYOUTS["ECL"]) == (
        (0, 18_412), (18_412, 21_044), (21_044, 26_304),
    )  # fmt: skip


def test_other_sets_are_split_by_shares(tmp_path):
    header = ",".join(["date", *(f"f{i}" for i in range(11)), "WetBulbCelsius"])
    write(tmp_path / "WTH.csv", 100, header, columns=12)
    sizes = {}
    for split in series.SPLITS:
        source = series.SeriesFile(str(tmp_path), "WTH", split, length=5, horizon=3)
        sizes[split] = len(source)
        assert source.channels == 12
    assert sizes == {"train": 70 - 7, "val": 10 - 2, "test": 20 - 2}


def test_time_features_by_hand():
    times = np.array(["2016-07-01T00:00", "2016-12-31T23:45", "2017-01-02T11:30"], "datetime64[s]")
    # A Friday, a Saturday (day 366 of a leap year), a Monday.
    expected = [[0, 4 / 6, 0, 182 / 365], [1, 5 / 6, 1, 1], [11 / 23, 0, 1 / 30, 1 / 365]]
    np.testing.assert_allclose(series.time_features(times), np.array(expected) - 0.5, atol=1e-6)
    minute = series.time_features(times, minutes=True)
    assert minute.shape == (3, 5)
    np.testing.assert_allclose(minute[:, 0], np.array([0, 45, 30]) / 59 - 0.5, atol=1e-6)
    np.testing.assert_allclose(minute[:, 1:], series.time_features(times))


def test_floor_is_the_mean_of_what_remains_unknown():
    for horizon, correlation, noise in ((1, 0.9, 0.5), (24, 0.7, 0.3), (5, 0.0, 2.0), (7, -0.5, 1)):
        variance = series.forecast_variance(horizon, correlation, noise)
        by_hand = [noise**2 * sum(correlation ** (2 * j) for j in range(i + 1))
                   for i in range(horizon)]  # fmt: skip
        np.testing.assert_allclose(variance, by_hand)
        floor = series.forecast_floor(horizon, correlation, noise)
        np.testing.assert_allclose(floor, np.mean(by_hand))
    assert series.forecast_floor(1, 0.9, 0.5) == pytest.approx(0.25)


def test_best_forecast_reaches_the_floor_and_others_do_not():
    source = series.SeasonalSeries("test", rows=60_000, horizon=12, length=24)
    squared, absolute, last = [], [], []
    for index in range(0, len(source), 12):
        window = source[index]
        error = window["future"] - source.best_forecast(index)
        squared.append(np.mean(error**2))
        absolute.append(np.mean(np.abs(error)))
        last.append(np.mean((window["future"] - window["past"][-1]) ** 2))
    # Thousand windows of correlated errors: a standard error of about one percent.
    assert np.mean(squared) == pytest.approx(source.floor, rel=0.05)
    assert np.mean(absolute) == pytest.approx(source.absolute_floor, rel=0.03)
    assert np.mean(last) > 5 * source.floor
    assert np.var(source._values) == pytest.approx(1, rel=0.1)


def test_what_is_known_of_a_lagged_series_stands_at_one_place():
    source = series.LaggedSeries("test", rows=60_000, channels=1, correlation=0.5)
    windows = [source[index] for index in range(0, len(source), 8)]
    future = np.stack([window["future"] for window in windows])
    error = future - np.stack([source.best_forecast(8 * i) for i in range(len(windows))])
    assert source.floor == pytest.approx(0.75, rel=0.05)
    assert np.mean(error**2) == pytest.approx(source.floor, rel=0.05)
    past = np.stack([window["past"] for window in windows])[..., 0]
    for step in (0, 7):
        told = [np.corrcoef(future[:, step, 0], past[:, place])[0, 1] for place in range(32)]
        np.testing.assert_allclose(told[16 + step], 0.5, atol=0.1)
        others = np.delete(told, [step, 16 + step])  # `step` stands two lags before
        np.testing.assert_allclose(others, 0, atol=0.1)


def test_seasonal_splits_follow_each_other_and_seeds_differ():
    make = lambda split, seed=0: series.SeasonalSeries(
        split, seed, rows=200, length=10, horizon=5, channels=1
    )
    train, val, test = (make(split) for split in series.SPLITS)
    assert [len(x) for x in (train, val, test)] == [126, 16, 36]
    np.testing.assert_array_equal(train[125]["future"][-5:], val[0]["past"][-5:])
    np.testing.assert_array_equal(val[15]["future"][-5:], test[0]["past"][-5:])
    assert np.abs(make("train", 1)[0]["past"] - train[0]["past"]).max() > 0.1
    np.testing.assert_array_equal(make("train")[3]["past"], train[3]["past"])


FAULTS = [
    (1, HEADER.replace("OT", "TO"), "ETTh2.csv:1: header 'date,HUFL.*expected 'date,HUFL"),
    (5, "2016-07-01 03:00:00,1,2,3,4,5,6", "ETTh2.csv:5: 7 columns, expected 8"),
    (5, "2016-07-01 03:00:00,1,2,x,4,5,6,7", "ETTh2.csv:5: '1,2,x,4,5,6,7' is not numbers"),
    (5, "2016-07-01 03:00:00,1,2,nan,4,5,6,7", "ETTh2.csv:5: .* holds no number or date"),
    (5, "2016-07-01 03:00:00,1,2,,4,5,6,7", "ETTh2.csv:5: '1,2,,4,5,6,7' is not numbers"),
    (5, "yesterday,1,2,3,4,5,6,7", "ETTh2.csv:5: 'yesterday' is not a date"),
    (5, ",1,2,3,4,5,6,7", "ETTh2.csv:5: .* is not a date"),
    (5, "2016-06-01 03:00:00,1,2,3,4,5,6,7", "ETTh2.csv:5: '2016-06-01 03:00:00' is not after"),
]


@pytest.mark.parametrize(("line", "text", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faulty_files_are_refused(tmp_path, line, text, message):
    path = write(tmp_path / "ETTh2.csv", 10)
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=message):
        series.SeriesFile(str(tmp_path), "ETTh2")


def test_wrong_arguments_are_refused(tmp_path, hourly):
    root = str(hourly)
    write(tmp_path / "ETTh2.csv", 30)
    (tmp_path / "ETTm1.csv").write_text(HEADER + "\n")
    (tmp_path / "ECL.csv").write_text("date,MT_1\n")
    for arguments, message in (
        (dict(dataset="ETTh3"), "source.dataset='ETTh3': did you mean 'ETTh"),
        (dict(features="MS"), "source.features='MS'"),
        (dict(split="valid"), "source.split='valid': did you mean 'val'"),
        (dict(dataset="ETTm1"), "no file .*ETTm1.csv: did you mean 'ETTh1.csv'"),
        (dict(length=0), "source.length=0"),
        (dict(length=8_000), "too few for one window"),
        (dict(split="val", length=9_000), "split 'val' has rows 8640 to 11519 of 14500"),
        (dict(root=str(tmp_path), dataset="ETTh2"), "30 rows, the splits of ETTh2.csv need 14400"),
        (dict(root=str(tmp_path), dataset="ETTm1"), "no line after the header"),
        (dict(root=str(tmp_path), dataset="ECL"), "ECL.csv:1: 2 columns"),
    ):
        with pytest.raises(RecipeError, match=message):
            series.SeriesFile(**{"root": root, **arguments})
    for arguments in (dict(correlation=1.0), dict(noise=0.0), dict(rows=1), dict(channels=0)):
        with pytest.raises(RecipeError, match="is out of range"):
            series.SeasonalSeries(**arguments)
    for arguments in (dict(correlation=1.0), dict(lag=7), dict(lag=33), dict(rows=1)):
        with pytest.raises(RecipeError, match="is out of range"):
            series.LaggedSeries(**arguments)
