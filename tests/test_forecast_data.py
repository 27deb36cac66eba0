# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Series are what they are said to be, and no window of a split sees what it should not."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import forecast_data
from csv_columns import read_columns
from forecast_data import Series, named_series, read_series, split_series
from forecast_report import RECORD, read_run


def make_series(steps=200, channels=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(steps, channels)).cumsum(0)
    return Series("walk", values, [f"c{i}" for i in range(channels)], "step")


@pytest.mark.parametrize(
    ("name", "package", "shape", "missing", "season"),
    [
        ("seattle-temperature", "vega_datasets", (8760, 1), 1, 24),
        ("co2", "statsmodels", (2284, 1), 59, 52),
        ("elnino", "statsmodels", (732, 1), 0, 12),
        ("solar", "aeon", (289, 1), 0, 48),
        ("lorenz", "scipy", (10_000, 3), 0, None),
        ("mackey-glass", "scipy", (10_000, 1), 0, None),
    ],
)
def test_the_named_series(name, package, shape, missing, season):
    pytest.importorskip(package)
    series = named_series(name)
    assert (series.name, series.values.shape, series.missing) == (name, shape, missing)
    assert np.isfinite(series.values).all() and len(series.channels) == shape[1]
    if season is not None:  # the series is more like itself a season ago than half a season ago
        changes = [np.abs(series.values[lag:] - series.values[:-lag]).mean() for lag in (season, season // 2)]
        assert changes[0] < 0.7 * changes[1]


def test_lorenz_follows_its_equations():
    def derivative(_, u):
        return 10 * (u[1] - u[0]), u[0] * (28 - u[2]) - u[1], u[0] * u[1] - 8 / 3 * u[2]

    values = named_series("lorenz").values
    for start in (0, 4321):
        after = solve_ivp(derivative, (0, 1), values[start], rtol=1e-10, atol=1e-10).y[:, -1]
        assert after == pytest.approx(values[start + 100], abs=1e-5)
    assert not np.allclose(values[:50], forecast_data._lorenz(50, seed=1).values, atol=0.1)


def test_mackey_glass_follows_its_equation():
    """Against scipy, which solves the delay equation interval by interval, each driven by the one before."""
    start = 1.2 + 0.1 * np.random.default_rng(0).normal()
    past, solutions, x = (lambda t: start), [], start
    for interval in range(36):
        span = (17 * interval, 17 * (interval + 1))

        def derivative(t, x, past=past):
            delayed = past(t - 17)
            return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

        solution = solve_ivp(derivative, span, [x], "DOP853", rtol=1e-9, atol=1e-10, dense_output=True)
        past, x = (lambda t, at=solution.sol: at(t)[0]), solution.y[0, -1]
        solutions.append(solution.sol)
    values = forecast_data._mackey_glass(120).values[:, 0]
    # The first state of the integration is the last one of the constant past.
    times = (500 * 10 - 171) / 10 + np.arange(120)
    expected = [solutions[int(t // 17)](t)[0] for t in times]
    assert values == pytest.approx(expected, abs=1e-3)  # errors grow by e in about 150 units


def test_gaps_are_filled_between_neighbours_and_counted():
    values = np.array([[np.nan, 1.0], [2.0, 2.0], [np.nan, np.nan], [4.0, np.nan], [np.nan, 5.0]])
    series = Series.with_gaps("gaps", values, ["a", "b"], "step")
    assert series.values.tolist() == [[2, 1], [2, 2], [3, 3], [4, 4], [4, 5]] and series.missing == 5


def test_csv_and_npz_files(tmp_path):
    rows = [("2020-01-01", "calm", 1.5, 10), ("2020-01-02", "windy", "", 30), ("2020-01-03", "calm", 2.5, 20)]
    (tmp_path / "weather.csv").write_text("date,kind,wind,rain\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    series = read_series(str(tmp_path / "weather.csv"))
    assert (series.name, series.channels, series.missing) == ("weather", ["wind", "rain"], 1)
    assert series.values.tolist() == [[1.5, 10], [2.0, 30], [2.5, 20]]
    assert series.notes == (
        "Channels: wind, rain.",
        "Left out: date, times from 2020-01-01 to 2020-01-03.",
        "Left out: kind, text, such as 'calm'.",
        "Read as missing: 1 empty.",
    )
    assert read_series(str(tmp_path / "weather.csv"), ["rain"]).values.tolist() == [[10], [30], [20]]
    np.savez(tmp_path / "arrays.npz", level=np.arange(4), flow=np.arange(8.0).reshape(4, 2), note=np.array(["x"] * 4))
    series = read_series(str(tmp_path / "arrays.npz"))
    assert series.channels == ["level", "flow_0", "flow_1"] and series.values[3].tolist() == [3, 6, 7]
    assert series.notes == ("Channels: level, flow_0, flow_1.", "Left out: note, of <U1.")


# What is in the file, the channels, what is left out and why, and what is read as missing.
FILES = {
    "semicolons and decimal commas": ("a;b\n1,5;2\n-2,5;3\n3,25;9\n", {"a": [1.5, -2.5, 3.25], "b": [2, 3, 9]}, {}, {}),
    "tabs": ("a\tb\n1.5\t2\n2.5\t3\n3\t9\n", {"a": [1.5, 2.5, 3], "b": [2, 3, 9]}, {}, {}),
    "bars": ("a | b\n1.5 | 2\n2.5 | 3\n3|9\n", {"a": [1.5, 2.5, 3], "b": [2, 3, 9]}, {}, {}),
    "everything in quotes": ('"a;1";"b"\n"1,5";"2"\n"2,5";"3"\n', {"a;1": [1.5, 2.5], "b": [2, 3]}, {}, {}),
    "thousands, as a decimal point says": ('a\n"1,234"\n"2,345.5"\n3\n', {"a": [1234, 2345.5, 3]}, {}, {}),
    "thousands, as their number says": ('a\n"1,234,567"\n"2,345"\n3\n', {"a": [1234567, 2345, 3]}, {}, {}),
    "a comma that is decimal": ('a\n"1,234"\n"0,345"\n3\n', {"a": [1.234, 0.345, 3]}, {}, {}),
    "thousands and decimal commas": ("a;b\n1.234,5;1\n2.345;0\n", {"a": [1234.5, 2345], "b": [1, 0]}, {}, {}),
    "thousands apart": ("a;b\n1 234;1\n2\u202f345;0\n3'000;5\n", {"a": [1234, 2345, 3000], "b": [1, 0, 5]}, {}, {}),
    "three decimals": ("a\n1.234\n2.345\n1.230\n", {"a": [1.234, 2.345, 1.23]}, {}, {}),
    "three decimals in spite of decimal commas": (
        "a;b\n1,5;1.234\n2,5;2.345\n0,5;0.123\n", {"a": [1.5, 2.5, 0.5], "b": [1.234, 2.345, 0.123]}, {}, {}
    ),
    "exponents": ("a\n1e3\n-2.5E-1\n.5\n", {"a": [1000, -0.25, 0.5]}, {}, {}),
    "percentages": ("a,b\n5%,2\n6.5 %,3\n-,9\n", {"a (%)": [5, 6.5, None], "b": [2, 3, 9]}, {}, {"-": 1}),
    "missing": (
        "a,b\n1,NA\n?,2\n,3\n4,n/a\n", {"a": [1, None, None, 4], "b": [None, 2, 3, None]}, {},
        {"?": 1, "": 1, "NA": 1, "n/a": 1},
    ),
    "an empty line": ("a,b\n1,2\n\n0,3\n\n\n", {"a": [1, 0], "b": [2, 3]}, {}, {}),
    "a row without values": ("a,b\n1,2\n,\n0,3\n", {"a": [1, None, 0], "b": [2, None, 3]}, {}, {"": 2}),
    "a byte order mark": ("\ufeffa,b\r\n1,2\r\n0,3\r\n", {"a": [1, 0], "b": [2, 3]}, {}, {}),
    "lines of an old Mac": ("a,b\r1,2\r0,3\r", {"a": [1, 0], "b": [2, 3]}, {}, {}),
    "an index without a name": (",a\n0,5\n1,3\n2,9\n", {"a": [5, 3, 9]}, {"column 1": "rises by 1 with every row"}, {}),
    "an index with a name": (
        "Unnamed: 0,id,a\n0,1,5\n1,2,3\n2,3,9\n", {"a": [5, 3, 9]},
        {"Unnamed: 0": "rises by 1 with every row", "id": "rises by 1 with every row"}, {},
    ),
    "pandas' table without names": (
        ",0,1\n0,5,2.5\n1,3,0\n2,9,1\n", {"0": [5, 3, 9], "1": [2.5, 0, 1]}, {"column 1": "rises by 1"}, {}
    ),
    "years": ("month,2019,2020\njan,1,2\nfeb,3,1\n", {"2019": [1, 3], "2020": [2, 1]}, {"month": "text, such as"}, {}),
    "an empty column": ("a,b,\n1,2,\n0,3,\n", {"a": [1, 0], "b": [2, 3]}, {"column 3": "has no name and no"}, {}),
    "seconds": (
        "t,timestamp,a\n0.1,1577836800,5\n0.2,1577840400,3\n0.3,1577850000,9\n", {"a": [5, 3, 9]},
        {"t": "rises by 0.1 with every row", "timestamp": "rises with every row, as times do"}, {},
    ),
    "uneven times": (
        "time,a\n2020-01-01T00:00,5\n2020-01-01T01:00,3\n2020-01-01T02:00,2\n2020-01-01T09:00,9\n", {"a": [5, 3, 2, 9]},
        {"time": "times .* in steps from 0 days 01:00:00 to 0 days 07:00:00, which count as equal"}, {},
    ),
    "the day first": (
        "date;a\n01/06/2020;5\n13/06/2020;3\n01/07/2020;9\n", {"a": [5, 3, 9]},
        {"date": "times from 01/06/2020 to 01/07/2020$"}, {},
    ),
    "American times": (
        "Date,a\n6/30/2016 9:00,5\n6/30/2016 10:00,3\n6/30/2016 11:00,9\n", {"a": [5, 3, 9]},
        {"Date": "times from 6/30/2016 9:00 to 6/30/2016 11:00$"}, {},
    ),
    "German times": (
        "Zeit;a\n31.12.2015 23:50:00;5\n01.01.2016 00:00:00;3\n01.01.2016 00:10:00;9\n", {"a": [5, 3, 9]},
        {"Zeit": "times from 31.12.2015 23:50:00 to 01.01.2016 00:10:00$"}, {},
    ),
    "times of UTC": (
        "t,a\n2020-01-01 10:00:00 UTC,5\n2020-01-01 11:00:00 UTC,3\n2020-01-01 12:00:00 UTC,9\n", {"a": [5, 3, 9]},
        {"t": "times from 2020-01-01 10:00:00 UTC"}, {},
    ),
    "a time that is missing": (
        "date,a\n2020-01-01,5\n,3\n2020-01-03,2\n2020-01-05,9\n", {"a": [5, 3, 2, 9]},
        {"date": "times from 2020-01-01 to 2020-01-05, 1 of them missing$"}, {},
    ),
    "a year that is missing": (
        "year,a\n2018,5\n,3\n2020,2\n2021,9\n", {"a": [5, 3, 2, 9]}, {"year": "rises with every row, as times do"}, {},
    ),
    "months in words": (
        "date,a\nJan 2020,5\nFeb 2020,3\nMar 2020,9\n", {"a": [5, 3, 9]},
        {"date": "text, such as 'Jan 2020'; the order of time was not checked"}, {},
    ),
    "pandas' table of sensors": (
        ",773869,767541\n2012-03-01 00:00:00,64.4,67.6\n2012-03-01 00:05:00,62.7,68.5\n2012-03-01 00:10:00,66,0\n",
        {"773869": [64.4, 62.7, 66], "767541": [67.6, 68.5, 0]}, {"column 1": "times from 2012-03-01 00:00:00"}, {},
    ),
    "an index and years": (
        ",1990,1991\n0,5,2\n1,3,0\n2,9,1\n", {"1990": [5, 3, 9], "1991": [2, 0, 1]}, {"column 1": "rises by 1"}, {},
    ),
    "depths": (
        "date,0.5,1.0\n2020-01-01,5,2\n2020-01-02,3,0\n2020-01-03,9,1\n", {"0.5": [5, 3, 9], "1.0": [2, 0, 1]},
        {"date": "times from"}, {},
    ),
    "quantiles": (
        "date,10%,90%\n2020-01-01,5,2\n2020-01-02,3,0\n2020-01-03,9,1\n", {"10%": [5, 3, 9], "90%": [2, 0, 1]},
        {"date": "times from"}, {},
    ),
    "names that begin with digits": ("2T,1Z\n5,2\n3,0\n", {"2T": [5, 3], "1Z": [2, 0]}, {}, {}),
    "a filtered table": (
        ",Unnamed: 0,index,id,row,no,a\n" + "".join(f"{','.join([str(i * i)] * 6)},{i % 3}\n" for i in range(5)),
        {"a": [0, 1, 2, 0, 1]},
        dict.fromkeys(("column 1", "Unnamed: 0", "index", "id", "row", "no"), "rises with every row, as row numbers"),
        {},
    ),
    "names that have a time in them": (
        "candidates,uptime,utc_offset\n1,9,2\n4,7,2\n9,2,1\n",
        {"candidates": [1, 4, 9], "uptime": [9, 7, 2], "utc_offset": [2, 2, 1]}, {}, {},
    ),
    "times by other names": (
        "start_time,DateTime,eventTime,unixtime,a\n1,1,1,1,5\n4,4,4,4,3\n9,9,9,9,9\n", {"a": [5, 3, 9]},
        dict.fromkeys(("start_time", "DateTime", "eventTime", "unixtime"), "rises with every row, as times do"), {},
    ),
    "semicolons, and commas before three digits": (
        "a;b\n27,687;1\n28,012;.\n", {"a": [27.687, 28.012], "b": [1, None]}, {}, {".": 1}
    ),
    "semicolons, and thousands as their number says": (
        "a;b\n27,687;1\n1,028,012;0\n", {"a": [27687, 1028012], "b": [1, 0]}, {}, {}
    ),
    "the hour that comes twice": (
        "time,a\n" + "".join(f"2020-10-25T{hour:02}:00,{hour % 5}\n" for hour in (0, 1, 2, 2, *range(3, 18))),
        {"a": [hour % 5 for hour in (0, 1, 2, 2, *range(3, 18))]}, {"time": "times from 2020-10-25T00:00 to"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_csv_files_of_the_world_are_read_as_meant(kind, tmp_path):
    content, numbers, left_out, missing = FILES[kind]
    (tmp_path / "data.csv").write_bytes(content.encode())
    columns = read_columns(tmp_path / "data.csv")
    assert list(columns.numbers) == list(numbers)
    for name, expected in numbers.items():
        np.testing.assert_array_equal(columns.numbers[name], np.array(expected, float))
    assert list(columns.left_out) == list(left_out) and columns.missing == missing
    assert all(re.match(reason, columns.left_out[name]) for name, reason in left_out.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a\n5\n"1,234"\n"2,345"\n', "line 3, column 'a': '1,234' is 1.234 or 1234, and no other value .* decides"),
        ("a;b\n1,5;1.234\n2,5;2.345\n", "line 2, column 'b': '1.234' is a decimal number, or .* as 'a' has decimal"),
        (
            "a\n1,5\n2,5\n",
            "line 2 has 2 fields, .* and line 1, the names, 1; .* put numbers that have a comma in quotes",
        ),
        ('a\n"1,5"\n2.5\n', "line [23], column 'a': '[12][.,]5' is not a number"),
        ("a,b\n5%,1\n6,2\n7,4\n", "line 2, column 'a': '5%' is not a number, and 2 of the 3 values"),
        ("a,b\n1,2\n0,4\nTotal,7\n", "line 4, column 'a': 'Total' is not a number, .*remove the line"),
        ("a,b\n1,2\n0,4\nSource: a station\n", "line 4 has 1 fields, the first of them 'Source: a station'"),
        ("# of 2020\na,b\n1,2\n", "line 2 has 2 fields, .* and line 1, the names, 1; remove what is no row"),
        ("a,b\n[m],[s]\n1,2\n3,5\n", "line 2, column 'a': '\\[m\\]' is not a number"),
        ("a,b\n1,2,3\n", "line 2 has 3 fields"),
        ("a,b\n1,2\n3\n", "line 3 has 1 fields"),
        ("1.5,2\n3,4\n", "the first line has values, such as '1.5', where the names"),
        ("2020-01-01,2\n2020-01-02,4\n", "the first line has values, such as '2020-01-01'"),
        ("calm,2.5\nwindy,4\n", "the first line has values, such as '2.5'"),
        ("7\n8\n", "the first line has values, such as '7'"),
        ("a,b,a\n1,2,3\n", "2 columns have the name 'a'"),
        ("a,\n1,2\n3,5\n0,1\n", "column 2 has no name in the first line"),
        ("a;b,c\n1;2,3\n4;5,6\n", "what separates the columns of 'a;b,c'"),
        ("a\n1\n\n3\n", "line 3 is empty: remove it, or write `\\?`"),
        ("a,b\n1,2\n3,4\n,\n,\n", "line 5, the last, has no values"),
        ('a,b\n"1,2\n3,4\n', "line 3 is no line of a CSV file"),
        (
            "date,a\n2020-01-03,1\n2020-01-02,5\n2020-01-01,2\n",
            "line 3, column 'date': '2020-01-02' comes after '2020-01",
        ),
        ("day,a\n2020-01-01,1\n2020-01-02,5\n2020-01-01,2\n2020-01-02,3\n", "line 4, column 'day': .* give one series"),
        ("year,a\n2020,1\n2019,5\n2017,2\n", "the times in the column 'year' fall"),
        *(
            (f"{dates}{footer}\n", f"line 22, column 'date': '{first}' is no time, and 20 of the 21 values .* footer")
            for footer, first in (("Total,99", "Total"), ("Source: NOAA,", "Source: NOAA"), ("Mean,20", "Mean"))
            for dates in (
                "date,a\n" + "".join(f"2020-01-{day:02},{day % 7}\n" for day in range(1, 21)),
                "date,a\n" + "".join(f"01/{day:02}/2020,{day % 7}\n" for day in range(1, 21)),
            )
        ),
        ("date,a\n2020-01-04,1\n,5\n2020-01-03,2\n2020-01-01,1\n", "line 4, column 'date': '2020-01-03' comes after"),
        (
            "date,a\n2020-01-01,1\n2020-01-02,5\n2020-01-03,2\n,8\n",
            "line 5, column 'date': '' is no time, and 3 .* footer",
        ),
        ("date,a\n2020-01-01,1\n2020-01-32,5\n2020-02-01,2\n", "line 3, column 'date': '2020-01-32' is no time"),
        ("Year,a\n2020,1\n2019,5\n2018,2\n", "the times in the column 'Year' fall; sort the rows, the oldest first"),
        ("timestamp,a\n180,1\n120,5\n60,2\n", "the times in the column 'timestamp' fall"),
        ("year,a\n2020,1\n,7\n2019,5\n2018,2\n", "the times in the column 'year' fall"),
        ("year,month,a\n2020,2,1\n2020,1,5\n2019,12,2\n", "the times in the column 'year' fall"),
        ("day,a\n07/01/2016,1\n06/30/2016,5\n06/29/2016,2\n", "line 3, column 'day': '06/30/2016' comes after '07/01"),
        ("day,a\n01/07/2016,1\n30/06/2016,5\n29/06/2016,2\n", "line 3, column 'day': '30/06/2016' comes after '01/07"),
        ("day;a\n1.7.2016;1\n30.6.2016;5\n29.6.2016;2\n", "line 3, column 'day': '30.6.2016' comes after '1.7.2016'"),
        (
            "day,a\n01/06/2016,1\n02/06/2016,5\n01/07/2016,2\n02/07/2016,1\n",
            "line 4, column 'day': '01/07/2016' comes after '02/06/2016' if the day is first, or if the month",
        ),
        (
            "t,a\n2020-01-01 12:00:00 UTC,1\n2020-01-01 11:00:00 UTC,5\n2020-01-01 10:00:00 UTC,2\n",
            "line 3, column 't': '2020-01-01 11:00:00 UTC' comes after",
        ),
        ("2020-01-01T00:00Z,2\n2020-01-01T01:00Z,4\n", "the first line has values, such as '2020-01-01T00:00Z'"),
        ("NA,2.5\n3,4\n", "the first line has values, such as '2.5'"),
        ("a;b\n27,687;1.5\n28,012;2.5\n", "line 2, column 'a': '27,687' is a decimal .*, as 'b' has no decimal commas"),
        ("a;b\n27,687;1.234\n28,012;2.345\n", "line 2, column 'a': '27,687' is a decimal number, or"),
        (
            "a;b\n27,687;1,234,567\n28,012;1\n",
            "line 2, column 'a': '27,687' is a decimal .*, as 'b' has no decimal commas",
        ),
        ("a;b\n27,687;1\n1.234;2\n", "line 2, column 'a': '27,687' is 27.687 or 27687, and no other value"),
        ("a;b\n1,5;1.234\n2,5;.\n", "line 2, column 'b': '1.234' is a decimal number"),
        ("id,a\n12345678901234567891,1\n5,2\n", "line 2, column 'id': '12345678901234567891' has more digits"),
        ("Temp. \u00b0C;a\n1;2\n".encode("latin-1"), "line 1 is not UTF-8 \\(byte 0xb0\\); save the file as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), "it holds NUL characters"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
    ids=str,
)
def test_csv_files_that_can_be_read_in_two_ways_are_not(content, message, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"--data_file '{path}' could not be read: {message}"):
        read_series(str(path))


def test_columns_that_are_named_are_read_whatever_they_are(tmp_path):
    (tmp_path / "data.tsv").write_text("step\tyear\ta\n1\t2020\tx\n2\t2019\ty\n3\t2017\tz\n")
    series = read_series(str(tmp_path / "data.tsv"), ["year", "step"])
    assert series.channels == ["year", "step"] and series.values.tolist() == [[2020, 1], [2019, 2], [2017, 3]]
    with pytest.raises(ValueError, match=r"could not be read: the times in the column 'year' fall"):
        read_series(str(tmp_path / "data.tsv"))


def test_a_table_without_some_of_its_rows_keeps_its_row_numbers_if_wanted(tmp_path):
    (tmp_path / "data.csv").write_text(",a\n0,5\n1,3\n4,9\n")
    assert read_series(str(tmp_path / "data.csv")).channels == ["a"]
    series = read_series(str(tmp_path / "data.csv"), ["column 1", "a"])
    assert series.channels == ["column 1", "a"] and series.values.tolist() == [[0, 5], [1, 3], [4, 9]]


def test_a_file_of_row_numbers_only_says_why_it_has_none(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n1,x\n2,y\n3,z\n")
    with pytest.raises(
        ValueError, match="holds no numbers. Left out: a, rises by 1 with every row.* Left out: b, text"
    ):
        read_series(str(tmp_path / "data.csv"))


@pytest.mark.parametrize("rate", [1e-3, None])
def test_a_record_without_a_learning_rate_is_named(rate, tmp_path):
    """Of a model that does not learn it is null."""
    made = {list: [], dict: {}, str: "", int: 1, float: 0.5}
    record = {name: made.get(kind) for name, kind in RECORD.items()} | {"learning_rate": rate}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_run(tmp_path) == record
    del record["learning_rate"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run.json is not the record .* no 'learning_rate' of type float \| None"):
        read_run(tmp_path)


@pytest.mark.parametrize("origin", [1e9, -(2.0**40)])
def test_windows_are_the_same_wherever_the_series_is(origin):
    series = make_series(200)
    series = series._replace(values=np.round(series.values, 3))
    here, there = (split_series(series._replace(values=series.values + place), 30, 8) for place in (0, origin))
    assert here.train.values.dtype == there.train.values.dtype == torch.float32
    # Values of 2^40 are a multiple of 2^-12.
    assert there.train.values.numpy() == pytest.approx(here.train.values.numpy(), abs=1e-6 + abs(origin) * 1e-15)
    assert there.mean - origin == pytest.approx(here.mean, abs=abs(origin) * 1e-15)
    assert there.std == pytest.approx(here.std, rel=1e-5)


def test_the_same_values_have_the_same_fingerprint():
    series, other = make_series(), make_series()
    assert series.fingerprint() == other.fingerprint()
    other.values[-1, 0] += 1e-3
    assert series.fingerprint() != other.fingerprint()


def test_the_split_is_in_time_and_only_training_values_standardise():
    series = make_series(200)
    split = split_series(series, context_length=30, prediction_length=8)
    later = series.values.copy()
    later[140:] += 100
    assert np.array_equal(split.mean, split_series(series._replace(values=later), 30, 8).mean)
    values = split.mean + split.std * split.test.values.double().numpy()
    assert values == pytest.approx(series.values, abs=1e-5)
    assert split.train.values[:140].mean(0).abs().max() < 1e-5
    assert split.train.values[:140].std(0, correction=0).numpy() == pytest.approx([1, 1], abs=1e-5)
    # The futures, of 8 steps, cover their part and no more.
    for part, starts in (
        (split.train, range(30, 133)),
        (split.validation, range(140, 153)),
        (split.test, range(160, 193)),
    ):
        assert list(part.starts) == list(starts) and len(part) == len(starts)


def test_a_window_is_followed_by_its_future():
    split = split_series(make_series(200), context_length=30, prediction_length=8)
    row = split.validation[2]
    assert row["input_values"].shape == (30, 2) and row["future_values"].shape == (8, 2)
    assert row["input_values"].tolist() == split.validation.values[112:142].tolist()
    assert row["future_values"].tolist() == split.validation.values[142:150].tolist()


def test_spaced_windows_reach_from_the_first_to_the_last():
    split = split_series(make_series(200), context_length=30, prediction_length=8)
    assert split.test.spaced(3).starts == [160, 176, 192]
    assert split.test.spaced(1000).starts == list(range(160, 193))
    assert split.test.spaced(3)[1]["future_values"].tolist() == split.test[16]["future_values"].tolist()


@pytest.mark.parametrize(
    ("context", "ahead", "change", "message"),
    [
        (30, 21, None, "--prediction_length 21: the validation part of walk has 20 of its 200 steps"),
        (133, 8, None, "--context_length 133 and --prediction_length 8 exceed the training part of walk, 140"),
        (30, 8, "constant", "'c1' does not change in the training part"),
    ],
)
def test_a_series_that_cannot_be_split(context, ahead, change, message):
    series = make_series(200)
    if change == "constant":
        series.values[:140, 1] = 0.1
    with pytest.raises(ValueError, match=message):
        split_series(series, context, ahead)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (None, None, "does not exist"),
        ("", None, "could not be read"),
        ("a,b\nx,y\n", None, "holds no numbers"),
        ("a,b\n", None, "holds no numbers"),
        ("a,b\nx,1\n", ["c"], "there is no column 'c', only 'a', 'b'"),
        ("a,b\nx,1\n", ["a"], "line 2, column 'a': 'x' is not a number"),
        ("a,b\n1,\n2,\n", None, "the column 'b' holds no values"),
        ("a\n1\ninf\n", None, "line 3, column 'a': 'inf' is not a number"),
        ("a\n1\n1e999\n", None, "infinite values"),
        (f"a\n1\n{'7' * 400}\n", None, "infinite values"),
    ],
)
def test_files_that_cannot_be_used(content, columns, message, tmp_path):
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_series(str(path), columns)


def test_arrays_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "deep.npz", x=np.zeros((3, 2, 2)))
    np.savez(tmp_path / "lengths.npz", x=np.zeros(3), y=np.zeros(4))
    np.savez(tmp_path / "objects.npz", x=np.array([{}]))
    (tmp_path / "not.npz").write_text("text")
    (tmp_path / "data.parquet").write_text("text")
    np.savez(tmp_path / "large.npz", x=np.full(3, 2**60 + 1))
    np.savez(tmp_path / "twice.npz", x=np.zeros((3, 2)), x_1=np.zeros(3))
    np.savez(tmp_path / "complex.npz", x=np.zeros(3, complex))
    messages = {"deep.npz": "has shape", "lengths.npz": "different lengths", "objects.npz": "allow_pickle"}
    messages |= {"large.npz": "`x` holds 1152921504606846977, which float64", "twice.npz": "two arrays give .* 'x_1'"}
    messages |= {"complex.npz": "holds no numbers. Left out: x, of complex128"}
    messages |= {"not.npz": "could not be read", "data.parquet": "cannot read '.parquet', only .csv, .tsv, .npz"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_series(str(tmp_path / name))
