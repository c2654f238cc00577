"""The tables under load: hostile names, bad files, several threads and processes, a killed one; profiles against pandas."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pandas as pd
import pytest

from arc_nb.tables.association import associations
from arc_nb.tables.connection import connected
from arc_nb.tables.names import check_name, literal, quoted
from arc_nb.tables.profile import profile_frame
from arc_nb.tables.store import Tables, parquet_batches

NASTY = ['x"; DROP TABLE victim; --', "x'; DROP TABLE victim; --", 'a""b', "'", '"', "--", "/*", ";", "select", "a\nb", "名前 🙂",
         "main.victim", "$1", "${x}",
         "%s", "?", "\\", " ", "a" * 300, "0", "arc_frame"]


@pytest.fixture
def tables(tmp_path):
    made = Tables(tmp_path / "home" / "arc.duckdb", patience=20)
    made.load(pd.DataFrame({"a": [1, 2, 3]}), "victim")
    return made


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_one_identifier(tables, name):
    tables.sql(f"CREATE TABLE {quoted(name)} AS SELECT 7 AS {quoted(name)}")
    assert tables.frame(name, [name]).iloc[0, 0] == 7 and tables.columns(name) == {name: "INTEGER"}
    assert tables.describe(name).column(name).values == {7: 1}
    assert [len(b) for b in tables.batches(name)] == [1] and name in tables
    assert tables.sql("SELECT ? AS v", [name]).v[0] == name and tables.sql(f"SELECT {literal(name)} AS v").v[0] == name
    tables.drop(name)
    assert tables.names() == ["victim"] and tables.frame("victim").a.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", [n for n in NASTY if n not in ("select", "arc_frame")] + ["", "a" * 64, "\0", None, 3])
def test_new_names_are_plain(name):
    with pytest.raises((ValueError, TypeError)): check_name(name)


@pytest.mark.parametrize("name", [NASTY[0], "2 b", "", None])
def test_new_tables_have_plain_names(tables, name):
    frame = pd.DataFrame({"a": [1]})
    for make in (lambda: tables.write(name, frame), lambda: tables.append(name, frame), lambda: tables.load(frame, name)):
        with pytest.raises((ValueError, TypeError)): make()
    assert tables.names() == ["victim"] and len(tables.frame("victim")) == 3


@pytest.mark.parametrize("call",
                         [lambda t, n: t.frame(n), lambda t, n: t.describe(n), lambda t, n: t.drop(n), lambda t, n: list(t.batches(n)),
                                  lambda t, n: t.columns(n), lambda t, n: t.associations(n, "a"), lambda t,
                          n: t.snapshot(n, "never.parquet")])
@pytest.mark.parametrize("name", ["victims", 'victim"; DROP TABLE victim; --', "victim; DROP TABLE victim"])
def test_names_that_are_not_there(tables, call, name):
    with pytest.raises(ValueError, match="is no table"): call(tables, name)
    assert tables.names() == ["victim"]


BAD = {"long.csv": "a,b\n1,2\n1,2,3\n", "short.csv": "a,b\n1,2\n1\n", "quote.csv": 'a,b\n1,"2\n', "empty.csv": "", "x.json": "{",
       "x.jsonl": '{"a":1}\n{"a"', "x.parquet": "PAR1", "x.xlsx": "PK", "x.csv.gz": "a,b", "x.png": "a", "x.parquet.gz": "a", "x": "a",
       "cut.json": '[{"a":1},'}


@pytest.mark.parametrize("file", BAD)
def test_a_bad_file_is_one_sentence_and_no_table(tables, tmp_path, file):
    (tmp_path / file).write_text(BAD[file])
    for table, replace in (("new", False), ("victim", True)):
        with pytest.raises(ValueError) as caught: tables.load(tmp_path / file, table, replace=replace)
        assert file in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert tables.names() == ["victim"] and tables.frame("victim").a.tolist() == [1, 2, 3]


def test_a_file_says_that_it_is_utf_16(tables, tmp_path):
    (tmp_path / "u.csv").write_text("town,x\nZürich,n/a\n", encoding="utf-16")
    assert tables.load(tmp_path / "u.csv", "u") == 1 and tables.frame("u").town[0] == "Zürich"
    assert tables.describe("u").column("x").missing == 1


def test_a_batch_holds_a_row(tables, tmp_path):
    path = tables.snapshot("victim", tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="at least one row"): next(parquet_batches(path, 0))
    with pytest.raises(ValueError, match="at least one row"): next(tables.batches("victim", 0))


def test_kinds_survive_the_way_there_and_back(tables):
    frame = pd.DataFrame({"i": [1, 2], "f": [1.5, np.nan], "b": [True, False], "t": ["x", None],
                          "d": pd.to_datetime(["2024-01-01", "2024-05-01T10:30"], format="ISO8601"),
                          "z": pd.to_datetime(["2024-01-01", "2024-05-01"], utc=True), "c": pd.Categorical(["u", "v"]),
                          "u": np.array([1, 255], "uint8")})
    tables.load(frame, "kinds")
    back = tables.frame("kinds")
    assert back.dtypes.astype(str).to_dict() | {"t": "str"} == {"i": "int64", "f": "float64", "b": "bool", "t": "str",
                                                                "d": "datetime64[us]",
                                                               "z": str(back.z.dtype), "c": "category", "u": "uint8"}
    assert back.z[0].tz_convert("UTC") == frame.z[0] and back.f.isna().tolist() == [False, True] and back.d.tolist() == frame.d.tolist()
    asked = tables.sql("SELECT sum(i) AS s, count(*) AS n, avg(i) AS m FROM kinds")
    assert asked.dtypes.astype(str).tolist() == ["int64", "int64", "float64"]


def test_batches_are_the_table_in_its_order(tables):
    tables.load("SELECT range AS i, hash(range) AS h FROM range(123457)", "many")
    got = pd.concat(tables.batches("many", 10_000), ignore_index=True)
    assert got.equals(tables.frame("many")) and got.i.tolist() == list(range(123457))
    tables.write("copy", tables.batches("many", 7_001))
    assert tables.frame("copy").i.tolist() == list(range(123457))


def test_batches_leave_the_tables_free(tables):
    tables.load("SELECT range AS i FROM range(1000)", "many")
    stream = tables.batches("many", 100)
    next(stream)
    tables.drop("many")  # while the stream is under way
    assert sum(len(b) for b in stream) == 900
    assert [len(b) for b in tables.batches("victim", 1)] == [1, 1, 1]
    tables.sql("CREATE TABLE none (a INT)")
    assert [list(b.columns) for b in tables.batches("none")] == [["a"]]


def test_a_snapshot_is_the_table(tables, tmp_path):
    path = tables.snapshot("victim", tmp_path / "deep" / "v.parquet")
    assert pd.concat(parquet_batches(path)).a.tolist() == [1, 2, 3]
    assert len(pd.concat(parquet_batches(tables.snapshot("SELECT * FROM victim WHERE a > 1", path)))) == 2
    with pytest.raises(ValueError): tables.snapshot("SELECT 1/'x' FROM nowhere", path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["v.parquet"] and len(pd.concat(parquet_batches(path))) == 2


def test_frames_of_a_stream_have_the_same_columns(tables):
    with pytest.raises(ValueError, match="'b'"): tables.write("w", [pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1], "b": [2]})])
    with pytest.raises(ValueError, match="no frame"): tables.write("w", [])
    assert tables.write("w", [pd.DataFrame({"a": [1], "b": ["x"]}), pd.DataFrame({"b": ["y"], "a": [1.5]})]) == 2
    assert tables.frame("w").a.tolist() == [1., 1.5] and tables.frame("w").b.tolist() == ["x", "y"]


def test_a_failed_append_changes_nothing(tables):
    with pytest.raises(ValueError): tables.append("victim", pd.DataFrame({"a": ["no number"], "new": [1]}))
    assert tables.columns("victim") == {"a": "BIGINT"} and len(tables.frame("victim")) == 3


def test_replacing_a_view(tables):
    tables.sql("CREATE VIEW seen AS FROM victim")
    with pytest.raises(ValueError, match="there is a view 'seen'"): tables.load("SELECT 1 AS x", "seen")
    assert tables.load("SELECT 1 AS x", "SEEN", replace=True) == 1 and tables.list().kind.tolist() == ["table", "table"]


def test_python_variables_are_no_tables(tables):
    secret = pd.DataFrame({"a": [1]})
    with pytest.raises(ValueError, match="secret"): tables.sql("SELECT * FROM secret")
    assert len(secret) == 1


def test_threads_take_turns(tables):
    failed = []
    def work(k):
        try:
            for i in range(8): tables.append("log", pd.DataFrame({"who": [k], "i": [i]}))
        except Exception as error: failed.append(error)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed and len(tables.frame("log")) == 32


def test_processes_wait_for_each_other(tables):
    script = textwrap.dedent(f"""
        import sys, pandas as pd
        from arc_nb.tables.store import Tables
        t = Tables({str(tables.path)!r}, patience=60)
        for i in range(10): t.append("log", pd.DataFrame({{"who": [int(sys.argv[1])], "i": [i]}}))
    """)
    others = [subprocess.Popen([sys.executable, "-c", script, str(k)]) for k in range(2)]
    for i in range(10): tables.append("log", pd.DataFrame({"who": [9], "i": [i]}))
    assert [p.wait(120) for p in others] == [0, 0]
    assert tables.sql("SELECT who, count(*) AS n FROM log GROUP BY who ORDER BY who").n.tolist() == [10, 10, 10]


def test_who_holds_the_file_is_told(tables):
    hold = f"import duckdb, time; c = duckdb.connect({str(tables.path)!r}); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=str(other.pid)): Tables(tables.path, patience=.5).names()
        assert time.monotonic() - begin < 10
        other.kill()
    assert tables.names() == ["victim"]


@pytest.mark.parametrize("after", [.05, .3, .8])
def test_a_killed_load_leaves_the_old_table(tables, tmp_path, after):
    script = textwrap.dedent(f"""
        from arc_nb.tables.store import Tables
        t = Tables({str(tables.path)!r})
        print("go", flush=True)
        t.load("SELECT range AS a, hash(range) AS b, repeat('x', 50) AS c FROM range(30000000)", "victim", replace=True)
        print("done", flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "go\n"
        time.sleep(after)
        os.kill(other.pid, signal.SIGKILL)
        finished = "done" in other.stdout.read()
    assert finished or tables.frame("victim").a.tolist() == [1, 2, 3]
    assert tables.load("SELECT 1 AS a", "victim", replace=True) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_profile_says_what_pandas_says(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 3000))
    frame = pd.DataFrame({"normal": rng.normal(size=n), "int": rng.integers(-5, 5, n),
                          "gaps": np.where(rng.random(n) < .3, np.nan, rng.integers(0, 9, n).astype(float)),
                          "text": rng.choice(["a", "bb", "ccc"], n), "bool": rng.random(n) < .5,
                          "date": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 10**6, n), "s")})
    frame = pd.concat([frame, frame.sample(min(n, 5), random_state=seed)], ignore_index=True)
    found = profile_frame(frame)
    assert found.rows == len(frame) and found.duplicates == int(frame.duplicated().sum())
    for name, values in frame.items():
        column = found.column(name)
        counts = values.value_counts()
        assert (column.missing, column.distinct) == (int(values.isna().sum()), values.nunique())
        assert sorted(column.values.values(), reverse=True) == counts.head(20).tolist() and all(counts[k] == v for k,
                                                                                                v in column.values.items())
        if column.kind in ("number", "integer"):
            assert np.allclose([column.mean, column.std], [values.mean(), values.std()], equal_nan=True)
            assert (column.least, column.most) == (values.min(), values.max()) and sum(column.bins) == values.count()
            assert column.distinct < 20 or column.bins == np.histogram(values.dropna(), 20)[0].tolist()
        if column.kind == "date": assert (column.least, column.most) == (values.min(), values.max()) and sum(column.bins) == len(values)
    assert found.column("gaps").whole and not found.column("normal").whole and "<svg" in found._repr_html_()


ODD = [{"a": pd.Series([], dtype=float), "b": pd.Series([], dtype=object)}, {"a": [None]}, {"a": [np.nan, np.nan]}, {"a": [np.inf]},
       {"a": [np.inf, -np.inf]}, {"a": [1e308, -1e308]}, {"a": [2**63 - 1, -2**63]}, {"a": [True, None]}, {"a": [b"x"]}, {0: [1], 1.5: [2]},
       {"a": [5e-324, 1.]}, {"a": pd.to_datetime(["1677-10-01", "2262-01-01"])}, {"a": ["<b>", "x" * 10_000]}, {"a": [pd.Timedelta("1h")]}]


@pytest.mark.parametrize("columns", ODD)
def test_odd_frames_have_profiles(columns):
    frame = pd.DataFrame(columns)
    found = profile_frame(frame)
    html = found._repr_html_()
    assert found.rows == len(frame) and len(found.columns) == frame.shape[1] and "<table" in html and "<b>x" not in html
    assert len(found.frame()) == frame.shape[1]
    for column in found.columns.values():
        assert column.missing + sum(column.values.values()) <= column.rows
        assert column.mean is None or np.isfinite(column.mean)


def test_noise_tells_nothing_and_a_copy_tells_all():
    rng = np.random.default_rng(0)
    for target in (rng.integers(0, 2, 3000), rng.integers(0, 5, 3000), rng.normal(size=3000), rng.choice(["a", "b"], 3000)):
        frame = pd.DataFrame({"y": target, "copy": target, "noise": rng.normal(size=3000), "id": [f"k{i}" for i in range(3000)],
                              "pairs": np.repeat(np.arange(1500), 2).astype(str), "const": 1, "empty": np.nan,
                              "letters": rng.choice(list("abcdefghij"), 3000)})
        found = associations(frame, "y")
        assert found["copy"] == 1 and max(v for k, v in found.items() if k != "copy") < .08, found
        assert all(0 <= v <= 1 for v in found.values())
    frame["y"] = 1
    assert set(associations(frame, "y").values()) <= {0., 1.}


def test_a_locked_connection_reads_no_file(tables, tmp_path):
    (tmp_path / "s.csv").write_text("secret\n1\n")
    with tables.open(locked=True) as connection:
        assert connection.execute("SELECT count(*) FROM victim").fetchall() == [(3,)]
        for sql in (f"FROM '{tmp_path}/s.csv'", f"FROM read_text('{tmp_path}/s.csv')", f"COPY victim TO '{tmp_path}/out.csv'",
                    f"ATTACH '{tmp_path}/o.db'", "SET lock_configuration = false"):
            with pytest.raises(Exception, match="disabled|locked|does not exist"): connection.execute(sql)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.slow
def test_a_million_rows_are_profiled_in_seconds():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(1_000_000, 30)), columns=[f"x{i}" for i in range(30)])
    begin = time.process_time()
    assert profile_frame(frame).column("x3").distinct == 1_000_000
    print(f"profiled 1,000,000 x 30 in {time.process_time() - begin:.1f} s of CPU")
    assert time.process_time() - begin < 60


def test_opening_is_quick(tables):
    begin = time.perf_counter()
    for _ in range(10):
        with connected(tables.path) as connection: connection.execute("SELECT 1").fetchall()
    assert time.perf_counter() - begin < 10
