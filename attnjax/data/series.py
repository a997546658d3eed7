# SPDX-License-Identifier: Apache-2.0
"""Long series cut into a past and a future: CSV files of the Informer release, seasonal series.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
arXiv 2012.07436. Columns are standardised with mean and deviation of the training rows. A window
of validation or test forecasts rows of its own split only; its past may reach into the split
before, as in the release. Nothing is downloaded.
"""

import dataclasses
import os
import pathlib

import numpy as np

from attnjax import registry
from attnjax.data.sources import check_split
from attnjax.errors import RecipeError

SPLITS = ("train", "val", "test")
FEATURES = ("M", "S")
PERIODS = (12, 24, 168)
"""Hours of the seasons of `SeasonalSeries`: half a day, a day, a week."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a CSV file must look like.

    Attributes:
      file: its name.
      target: the column of univariate forecasts.
      channels: number of columns besides `date`.
      header: their names in order; empty where only the number and the target are known.
      rows_per_hour: 1 or 4.
      months: rows of train, validation and test in months of 30 days; empty: 70, 10, 20 percent.
    """

    file: str
    target: str
    channels: int
    header: tuple[str, ...] = ()
    rows_per_hour: int = 1
    months: tuple[int, ...] = ()


_ETT = dict(
    target="OT",
    channels=7,
    header=("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"),
    months=(12, 4, 4),
)
LAYOUTS = {
    "ECL": Layout("ECL.csv", "MT_320", 321),
    "ETTh1": Layout("ETTh1.csv", **_ETT),
    "ETTh2": Layout("ETTh2.csv", **_ETT),
    "ETTm1": Layout("ETTm1.csv", **_ETT, rows_per_hour=4),
    "WTH": Layout("WTH.csv", "WetBulbCelsius", 12),
}
"""Data set -> layout of its file."""


class Windows:
    """All windows of one split of a series that lies in memory.

    An example holds `past [s,c]`, `past_time [s,f]`, `future [h,c]`, `future_time [h,f]`, and `mean
    [c]` and `scale [c]`, with which `value * scale + mean` is in the units of the data.

    Args:
      values: `[rows, c]` in the units of the data.
      times: datetime64 `[rows]`.
      bounds: first row and row after the last one of train, validation and test.
      split: member of `SPLITS`.
      length: s, rows of the past.
      horizon: h, rows of the future.
      minutes: time features with the minute.

    Raises:
      RecipeError: a window does not fit into the split.
    """

    def __init__(
        self,
        values: np.ndarray,
        times: np.ndarray,
        bounds: tuple[tuple[int, int], ...],
        split: str,
        length: int,
        horizon: int,
        minutes: bool = False,
    ):
        for name, value in (("length", length), ("horizon", horizon)):
            if value < 1:
                raise RecipeError(f"source.{name}={value}: must be at least 1")
        first, last = bounds[SPLITS.index(check_split(split, SPLITS))]
        start = first if split == "train" else first - length
        if start < 0 or last > len(values) or last - start < length + horizon:
            raise RecipeError(
                f"source.length={length}, source.horizon={horizon}: split {split!r} has rows "
                f"{first} to {last - 1} of {len(values)}, too few for one window"
            )
        train = values[slice(*bounds[0])].astype(np.float64)
        self.mean = train.mean(axis=0)
        deviation = train.std(axis=0)
        # A constant column, such as a client who consumes nothing yet, is only centred.
        self.scale = np.where(deviation > 0, deviation, 1.0)
        standard = (values[start:last] - self.mean) / self.scale
        self._values = standard.astype(np.float32)
        self._times = time_features(times[start:last], minutes=minutes)
        self._length, self._horizon, self._start = length, horizon, start
        self.channels = values.shape[1]

    def __len__(self) -> int:
        return len(self._values) - self._length - self._horizon + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        middle = index + self._length
        end = middle + self._horizon
        return {
            "past": self._values[index:middle],
            "past_time": self._times[index:middle],
            "future": self._values[middle:end],
            "future_time": self._times[middle:end],
            "mean": self.mean.astype(np.float32),
            "scale": self.scale.astype(np.float32),
        }


class SeriesFile(Windows):
    """ETTh1, ETTh2, ETTm1, ECL or WTH (weather) from its CSV file, `date,...` with a header.

    Args:
      root: folder of the file; `~` and environment variables are expanded.
      dataset: key of `LAYOUTS`.
      split: "train", "val" or "test".
      features: "M" forecasts all columns, "S" the target column from itself.
      length: rows of the past.
      horizon: rows of the future.
      minutes: five time features instead of four; the CAB release leaves the minute out for the
        quarter hours of ETTm1, too.

    Raises:
      RecipeError: no such file, or a header, line, date or number that makes no sense (file and
        line are named), or too few rows.
    """

    def __init__(
        self,
        root: str,
        dataset: str = "ETTh1",
        split: str = "train",
        features: str = "M",
        length: int = 336,
        horizon: int = 720,
        minutes: bool = False,
    ):
        for name, value, choices in (
            ("dataset", dataset, LAYOUTS),
            ("features", features, FEATURES),
            ("split", split, SPLITS),
        ):
            if value not in choices:
                raise RecipeError(f"source.{name}={value!r}: {registry.nearest(value, choices)}")
        layout = LAYOUTS[dataset]
        path = pathlib.Path(os.path.expandvars(root)).expanduser() / layout.file
        columns, values, times = read_csv(path, layout)
        if features == "S":
            place = columns.index(layout.target)
            values = values[:, place : place + 1]
        super().__init__(
            values, times, split_bounds(len(values), layout, path), split, length, horizon, minutes
        )


class SeasonalSeries(Windows):
    """Hourly sums of three sines and autoregressive noise: no forecast beats a known error.

        y_t = sum_k a_k sin(2 pi t / P_k + phi_k) + e_t,   e_t = r e_{t-1} + sigma n_t

    with P = 12, 24 and 168 hours, a_k uniform in 0.5 to 1.5, phi_k uniform, n_t normal, all drawn
    once for each channel. The hour and the weekday tell the phase of every sine, and the last value
    of the past tells e_t, so that what nobody can know is the noise after it.

    Args:
      split: "train", "val" or "test": 70, 10 and 20 percent of one series.
      seed: a different series for every value.
      rows: hours of the series.
      channels: c, series side by side.
      length: rows of the past.
      horizon: rows of the future.
      correlation: r, in (-1, 1).
      noise: sigma, above 0.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        rows: int = 8_760,
        channels: int = 2,
        length: int = 96,
        horizon: int = 48,
        correlation: float = 0.7,
        noise: float = 0.3,
    ):
        for name, value, fine in (
            ("rows", rows, rows >= 10),
            ("channels", channels, channels >= 1),
            ("correlation", correlation, -1 < correlation < 1),
            ("noise", noise, noise > 0),
        ):
            if not fine:
                raise RecipeError(f"source.{name}={value!r} is out of range")
        rng = np.random.default_rng(seed % 2**64)
        amplitude = rng.uniform(0.5, 1.5, (3, channels))
        phase = rng.uniform(0, 2 * np.pi, (3, channels))
        angle = 2 * np.pi * np.arange(rows)[:, None, None] / np.array(PERIODS)[:, None] + phase
        season = np.sum(amplitude * np.sin(angle), axis=1)
        rest = noise * rng.standard_normal((rows, channels))
        rest[0] /= np.sqrt(1 - correlation**2)  # stationary from the first row on
        for t in range(1, rows):
            rest[t] += correlation * rest[t - 1]
        super().__init__(
            season + rest, _hours(rows), _share_bounds(rows), split, length, horizon, minutes=False
        )
        self._season, self._rest = season, rest
        self._correlation, self._noise = correlation, noise

    @property
    def floor(self) -> float:
        """Expected squared error of the best forecast of standardised values."""
        floor = forecast_floor(self._horizon, self._correlation, self._noise)
        return float(np.mean(floor / self.scale**2))

    @property
    def absolute_floor(self) -> float:
        """Expected absolute error of that forecast."""
        variance = forecast_variance(self._horizon, self._correlation, self._noise)
        mean = np.mean(np.sqrt(2 / np.pi * variance))
        return float(np.mean(mean / self.scale))

    def best_forecast(self, index: int) -> np.ndarray:
        """Return what is expected after a past, knowing the process: `[h,c]`, standardised."""
        now = self._start + index + self._length - 1
        steps = np.arange(1, self._horizon + 1)
        expected = self._season[now + steps]
        expected = expected + self._correlation ** steps[:, None] * self._rest[now]
        return ((expected - self.mean) / self.scale).astype(np.float32)


class LaggedSeries(Windows):
    """Noise that comes again after a fixed lag: what is known of a step stands at one place.

        y_t = r y_{t-P} + sqrt(1 - r^2) n_t,   n_t normal

    A seasonal autoregression of variance 1. Steps less than P apart are independent, so that only
    the value P steps before tells anything of a step of the future, and no forecast has a squared
    error below 1 - r^2; one that does not look there has 1.

    Args:
      split: "train", "val" or "test": 70, 10 and 20 percent of one series.
      seed: a different series for every value.
      rows: hours of the series.
      channels: c, independent series side by side.
      length: rows of the past.
      horizon: rows of the future.
      lag: P, from `horizon` to `length`.
      correlation: r, in [0, 1).
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        rows: int = 8_760,
        channels: int = 2,
        length: int = 32,
        horizon: int = 8,
        lag: int = 16,
        correlation: float = 0.95,
    ):
        for name, value, fine in (
            ("rows", rows, rows >= 10),
            ("channels", channels, channels >= 1),
            ("lag", lag, horizon <= lag <= length),
            ("correlation", correlation, 0 <= correlation < 1),
        ):
            if not fine:
                raise RecipeError(f"source.{name}={value!r} is out of range")
        rng = np.random.default_rng(seed % 2**64)
        values = rng.standard_normal((rows, channels))
        values[lag:] *= np.sqrt(1 - correlation**2)
        for t in range(lag, rows):
            values[t] += correlation * values[t - lag]
        super().__init__(
            values, _hours(rows), _share_bounds(rows), split, length, horizon, minutes=False
        )
        self._lag, self._correlation = lag, correlation

    @property
    def floor(self) -> float:
        """Expected squared error of the best forecast of standardised values."""
        return float(np.mean((1 - self._correlation**2) / self.scale**2))

    def best_forecast(self, index: int) -> np.ndarray:
        """Return what is expected after a past, knowing the process: `[h,c]`, standardised."""
        first = self._length - self._lag
        past = self[index]["past"][first : first + self._horizon]
        expected = self._correlation * (past * self.scale + self.mean)
        return ((expected - self.mean) / self.scale).astype(np.float32)


def forecast_variance(horizon: int, correlation: float, noise: float) -> np.ndarray:
    """Return what remains unknown of autoregressive noise 1 to `horizon` steps ahead.

    Var(e_{t+i} | e_t) = sigma^2 (1 - r^{2 i}) / (1 - r^2)

    Args:
      horizon: largest number of steps.
      correlation: r, in (-1, 1).
      noise: sigma.

    Returns:
      float64 `[horizon]`.
    """
    steps = np.arange(1, horizon + 1)
    return noise**2 * (1 - correlation ** (2 * steps)) / (1 - correlation**2)


def forecast_floor(horizon: int, correlation: float, noise: float) -> float:
    """Return the mean squared error of the best forecast of `SeasonalSeries`, in its own units.

    The mean of `forecast_variance` over the horizon h,

        sigma^2 / (1 - r^2) * (1 - r^2 (1 - r^{2 h}) / (h (1 - r^2)))

    Args:
      horizon: h.
      correlation: r, in (-1, 1).
      noise: sigma.
    """
    square = correlation**2
    known = square * (1 - square**horizon) / (horizon * (1 - square))
    return noise**2 / (1 - square) * (1 - known)


def time_features(times: np.ndarray, *, minutes: bool = False) -> np.ndarray:
    """Return hour of day, weekday, day of month and day of year, each scaled to [-0.5, 0.5].

    Args:
      times: datetime64 `[t]`.
      minutes: with the minute of the hour, as first column.

    Returns:
      float32 `[t, 4]`, or `[t, 5]`.
    """
    seconds = times.astype("datetime64[s]")
    days = seconds.astype("datetime64[D]")
    of_day = (seconds - days).astype(np.int64)
    first = lambda unit: days.astype(f"datetime64[{unit}]").astype("datetime64[D]")
    since = lambda unit: (days - first(unit)).astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1970 began on a Thursday; Monday is 0
    columns = [of_day // 60 % 60 / 59] if minutes else []
    columns += [of_day // 3600 / 23, weekday / 6, since("M") / 30, since("Y") / 365]
    return (np.stack(columns, axis=-1) - 0.5).astype(np.float32)


def read_csv(path: pathlib.Path, layout: Layout) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Read a file and check it.

    Args:
      path: the file.
      layout: what it must look like.

    Returns:
      Names of the columns besides the date, float64 `[rows, columns]`, datetime64[s] `[rows]`.

    Raises:
      RecipeError: names the file, and the line where there is one.
    """
    if not path.is_file():
        present = sorted(f.name for f in path.parent.glob("*.csv")) if path.parent.is_dir() else []
        raise RecipeError(f"no file {path}: {registry.nearest(path.name, present[:20])}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = [name.strip().strip('"') for name in file.readline().split(",")]
        lines = file.read().rstrip().splitlines()
    _check_header(path, header, layout)
    if not lines:
        raise RecipeError(f"{path}: no line after the header")
    where = lambda row: f"{path}:{row + 2}"
    dates, _, cells = zip(*(line.partition(",") for line in lines), strict=True)
    for row, rest in enumerate(cells):
        if rest.count(",") != layout.channels - 1:
            raise RecipeError(
                f"{where(row)}: {rest.count(',') + 2} columns, expected {layout.channels + 1}"
            )
    values = _parse(cells, lambda part: np.loadtxt(part, delimiter=",", ndmin=2), "numbers", where)
    # NumPy takes an empty date for "not a time" and warns of time zones; both are refused here.
    times = _parse([d.strip().strip('"') or "-" for d in dates],
                   lambda part: np.array(part, "datetime64[s]"), "a date", where)  # fmt: skip
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1) | np.isnat(times))
    if wrong.size:
        raise RecipeError(f"{where(wrong[0])}: {lines[wrong[0]][:60]!r} holds no number or date")
    wrong = np.flatnonzero(np.diff(times) <= np.timedelta64(0, "s"))
    if wrong.size:
        raise RecipeError(
            f"{where(wrong[0] + 1)}: {dates[wrong[0] + 1]!r} is not after {dates[wrong[0]]!r}"
        )
    return header[1:], values, times


def split_bounds(
    rows: int, layout: Layout, path: pathlib.Path | str = "the file"
) -> tuple[tuple[int, int], ...]:
    """Return first row and row after the last one of train, validation and test.

    Raises:
      RecipeError: the file has fewer rows than the splits need.
    """
    if not layout.months:
        return _share_bounds(rows)
    ends = np.cumsum(layout.months) * 30 * 24 * layout.rows_per_hour
    if ends[-1] > rows:
        raise RecipeError(f"{path}: {rows} rows, the splits of {layout.file} need {ends[-1]}")
    return tuple(zip((0, *map(int, ends[:-1])), map(int, ends), strict=True))


def _hours(rows):
    return np.datetime64("2016-07-01T00", "s") + np.arange(rows) * np.timedelta64(3600, "s")


def _share_bounds(rows):
    train, test = int(rows * 0.7), int(rows * 0.2)
    return (0, train), (train, rows - test), (rows - test, rows)


def _check_header(path, header, layout):
    expected = ["date", *layout.header] if layout.header else None
    if expected and header != expected:
        raise RecipeError(f"{path}:1: header {','.join(header)!r}, expected {','.join(expected)!r}")
    if header[:1] != ["date"] or len(header) != layout.channels + 1:
        raise RecipeError(
            f"{path}:1: {len(header)} columns, the first one {header[:1]}; expected 'date' and "
            f"{layout.channels} others"
        )
    if layout.target not in header:
        known = registry.nearest(layout.target, header[1:])
        raise RecipeError(f"{path}:1: no target column {layout.target!r}; {known}")


def _parse(lines, parse, what, where):
    """Parse all lines at once; if that fails, say which one is to blame."""
    try:
        return parse(lines)
    except ValueError:
        for row, line in enumerate(lines):
            try:
                parse([line])
            except ValueError as error:
                raise RecipeError(f"{where(row)}: {line[:60]!r} is not {what}") from error
        raise
