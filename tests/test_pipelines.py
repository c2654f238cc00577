"""Malformed Arc-Pipelines: mutations of good ones. Each is refused with its place, leaves every table as it was, and reaches no file."""
import hashlib
import os
import re

import pandas as pd
import pytest

from arc_nb.tables.pipeline import read_pipeline
from arc_nb.tables.steps import Steps, versions
from arc_nb.tables.store import Tables

GOOD = """name: features
description: what a model needs
vars:
  least: 3
steps:
  - name: clean
    type: table
    depends_on: [raw]
    sql: SELECT * FROM raw WHERE x >= ${least}
  - name: facts
    type: view
    depends_on: [clean]
    sql: SELECT avg(x) AS mean FROM clean
  - name: features
    depends_on: [clean, facts]
    sql: |
      SELECT x - mean AS centred, t
      FROM clean, facts
  - name: tidy
    type: execute
    depends_on: [features]
    sql: DELETE FROM features WHERE centred IS NULL
outputs: [features]
"""


def changed(*pairs):
    "The good pipeline with texts replaced; each has to be there."
    text = GOOD
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def cases():
    "(name, text) of every mutation."
    # fields: left out, of another type, unknown, twice
    for key, line in {"steps[0].name": "  - name: clean\n", "outputs": "outputs: [features]\n"}.items():
        yield f"without {key}", changed((line, "  - description: x\n" if "name" in key else ""))
    yield "without sql", changed(("    sql: SELECT avg(x) AS mean FROM clean\n", ""))
    yield "without steps", "name: a\noutputs: []\n"
    for value in ("3", "null", "[a]", "{a: 1}", "true", '""', "../up", "a b", '"a;b"', "a" * 64):
        yield f"name {value[:9]}", changed(("name: features\n", f"name: {value}\n"))
    for value in ("3", "null", "x", "[1]", "{a: [1]}", "{a: {b: 1}}", "{a: null}"):
        yield f"vars {value}", changed(("vars:\n  least: 3\n", f"vars: {value}\n"))
    for value in ("[]", "null", "{}", "x", "[3]", "[[]]", "[null]"): yield f"steps {value}", f"name: a\nsteps: {value}\noutputs: []\n"
    for value in ("null", "features", "{a: b}", "[3]", "[null]", "[featurs]", "[tidy]", "[raw]", "[features, features]",
                  "[features, FEATURES]"):
        yield f"outputs {value}", changed(("outputs: [features]", f"outputs: {value}"))
    for value in ("macro", "TABLE", "3", "null", "[table]", '""'): yield f"type {value}", changed(("type: view", f"type: {value}"))
    for value in ("clean", "{clean: 1}", "[3]", "[null]", "[[clean]]", "null", "[clean, clean]", "[facts]", "[nowhere]",
                  '["clean; DROP TABLE raw"]', "[features]", "[tidy]"):
        yield f"depends_on {value}", changed(("    depends_on: [clean]\n", f"    depends_on: {value}\n"))
    for value in ("3", "null", "[SELECT 1]", "{a: b}", '""', '"   "', '"-- nothing"', "true"):
        yield f"sql {value}", changed(("sql: SELECT avg(x) AS mean FROM clean", f"sql: {value}"))
    for key in ("stepz: []", "transforms: []", "sources: [raw]", "__class__: x", "python: print(1)", "Name: a"):
        yield f"key {key}", key + "\n" + GOOD
    for key in ("sqll: x", "params: {}", "script: import os", "depend_on: [raw]", "materialized: table", "post_hook: x"):
        yield f"step key {key}", changed(("    type: view\n", f"    type: view\n    {key}\n"))
    yield "a key twice", changed(("outputs: [features]", "outputs: []\noutputs: [features]"))
    yield "a step key twice", changed(("    type: view\n", "    type: view\n    type: table\n"))
    # names
    for name in ("a b", "2nd", "a-b", '"x\\"; DROP TABLE raw; --"', "a.b", "main.facts", '"a\\nb"', "ü", "a" * 64, "clean", "CLEAN",
                 "arc_pipelines", "arc_frame", "''"):
        yield f"step name {name[:12]}", changed(("name: facts", f"name: {name}"), (", facts]", "]"), ("FROM clean, facts", "FROM clean"))
    # dependencies
    yield "a circle of two", changed(("depends_on: [raw]", "depends_on: [facts]"))
    yield "a circle of three", changed(("depends_on: [raw]", "depends_on: [tidy]"))
    yield "itself", changed(("depends_on: [raw]", "depends_on: [clean]"))
    yield "reads what it doesn't name", changed(("depends_on: [clean, facts]", "depends_on: [clean]"))
    yield "reads what comes later", changed(("SELECT * FROM raw", "SELECT * FROM features"))
    yield "reads itself", changed(("SELECT avg(x) AS mean FROM clean", "SELECT avg(mean) AS mean FROM facts"))
    yield "a table that isn't there", changed(("depends_on: [raw]", "depends_on: [row]"))
    yield "replaces somebody's table", changed(("name: facts", "name: other"), (", facts]", ", other]"),
                                               ("clean, facts\n", "clean, other\n"), ("x - mean", "x"))
    # variables
    for value in ("${most}", "${}", "${least.x}", "${__class__}", "${least", "${env:HOME}", "$least"):
        yield f"variable {value}", changed(("${least}", value))
    yield "a variable that ends the statement", changed(("  least: 3", '  least: "3; DROP TABLE raw"'))
    yield "a variable with another query", changed(("  least: 3", "  least: \"3 UNION SELECT * FROM read_csv('CANARY')\""))
    # statements that no step may be, as a table and as what is executed
    for sql in FORBIDDEN:
        yield f"table: {sql[:40]}", changed(("SELECT avg(x) AS mean FROM clean", f'"{sql}"'))
        yield f"execute: {sql[:40]}", changed(("DELETE FROM features WHERE centred IS NULL", f'"{sql}"'))
    for sql in QUERIES: yield f"query: {sql[:40]}", changed(("SELECT avg(x) AS mean FROM clean", f'"{sql}"'))
    for sql in CHANGES: yield f"change: {sql[:40]}", changed(("DELETE FROM features WHERE centred IS NULL", f'"{sql}"'))
    for sql in ("DELETE FROM clean", "DROP TABLE clean", "CREATE TABLE z (i INT)", "INSERT INTO clean SELECT * FROM clean"):
        yield f"a change as a view: {sql}", changed(("SELECT avg(x) AS mean FROM clean", sql))
    yield "a query that is executed", changed(("DELETE FROM features WHERE centred IS NULL", "SELECT 1"))
    # what only YAML can do
    for text in ("a: [", "\tname: x", "name: !!python/object/apply:os.system ['touch CANARY']\nsteps: []\noutputs: []",
                 "!!python/name:os.system", "- 1\n- 2", "3", "",
                 "a: &a [*a]", "---\na: 1\n---\nb: 2", "{{ x }}", "name: [&x a, &x b", "<<: {a: 1}\n" + GOOD, "name: 'x\n"):
        yield f"yaml {text[:20]!r}", text
    yield "a bomb", "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p,
                                                                    c in zip("abcdefg", "bcdefgh"))
    # what only the data show
    for sql in ("SELECT avg(y) AS mean FROM clean", "SELECT avg(x, x, x) AS mean FROM clean", "SELECT nofunction(x) AS mean FROM clean",
                "SELECT x FROM clean GROUP BY t",
                "SELECT ('a' || t)::INT AS mean FROM clean", "SELECT 1 AS other FROM clean",
                "SELECT (SELECT x FROM clean WHERE f(x)) AS mean"):
        yield f"data: {sql}", changed(("SELECT avg(x) AS mean FROM clean", sql))


FORBIDDEN = """
COPY clean TO 'CANARY'
COPY (SELECT 1) TO 'CANARY' (FORMAT csv)
ATTACH 'CANARY'
ATTACH ':memory:' AS m
DETACH arc_file
INSTALL httpfs
LOAD httpfs
FORCE INSTALL spatial
SET threads = 1
SET enable_external_access = true
RESET threads
PRAGMA version
PRAGMA threads = 1
CALL pragma_version()
EXPORT DATABASE 'CANARY'
IMPORT DATABASE 'CANARY'
USE arc_file
BEGIN
COMMIT
ROLLBACK
CHECKPOINT
VACUUM
PREPARE p AS SELECT 1
EXECUTE p
CREATE MACRO m(a) AS a + 1
CREATE FUNCTION m() AS TABLE SELECT 1
CREATE SECRET (TYPE s3)
CREATE PERSISTENT SECRET s (TYPE s3)
CREATE SCHEMA s
CREATE TYPE t AS ENUM ('a')
CREATE SEQUENCE s
CREATE INDEX i ON clean (x)
CREATE VIEW v AS SELECT 1
DROP SCHEMA main
DROP MACRO sum
SET VARIABLE a = 1
EXPLAIN SELECT 1
COPY FROM DATABASE a TO b
UPDATE EXTENSIONS
SELECT 1; SELECT 2
SELECT 1; DROP TABLE raw
SELEC 1
import os
__import__('os').system('touch CANARY')
/* */ COPY clean TO 'CANARY'
-- x\\nATTACH 'CANARY'
""".strip().splitlines()
QUERIES = """
SELECT * FROM read_csv('CANARY')
SELECT * FROM read_text('CANARY')
SELECT * FROM read_blob('CANARY')
SELECT * FROM read_parquet('CANARY')
SELECT * FROM read_json('CANARY')
SELECT * FROM glob('*')
SELECT * FROM 'CANARY'
SELECT * FROM '/etc/passwd'
SELECT * FROM sniff_csv('CANARY')
SELECT * FROM query('DROP TABLE raw')
SELECT * FROM query_table('raw')
SELECT * FROM duckdb_secrets()
SELECT * FROM duckdb_settings()
SELECT * FROM information_schema.tables
SELECT * FROM arc_file.main.raw
SELECT * FROM pragma_version()
SELECT * FROM clean WHERE x IN (SELECT column0 FROM read_csv('CANARY'))
WITH q AS (SELECT * FROM read_csv('CANARY')) SELECT * FROM q
WITH q AS (DELETE FROM clean RETURNING *) SELECT * FROM q
SELECT getenv('HOME') AS mean
SELECT ? AS mean
SELECT $1 AS mean
SELECT * FROM parquet_metadata('CANARY')
SELECT * FROM which_secret('s3://a', 's3')
""".strip().splitlines()
CHANGES = """
DELETE FROM raw
DROP TABLE raw
DROP VIEW raw
TRUNCATE raw
UPDATE raw SET x = 0
ALTER TABLE raw ADD COLUMN z INT
ALTER TABLE raw RENAME TO gone
INSERT INTO raw SELECT * FROM raw
CREATE OR REPLACE TABLE arc_file.main.raw AS SELECT 1 AS a
DROP TABLE arc_file.main.raw
INSERT INTO features SELECT * FROM read_csv('CANARY')
CREATE TABLE z AS SELECT * FROM 'CANARY'
CREATE TABLE z AS SELECT * FROM read_text('/etc/passwd')
DELETE FROM features WHERE t IN (SELECT content FROM read_text('CANARY'))
DELETE FROM features WHERE nothing = 1
INSERT INTO features VALUES ('no', 'number', 'at', 'all')
MERGE INTO raw USING features ON true WHEN MATCHED THEN DELETE
DROP TABLE nowhere
CREATE TABLE features (a INT)
""".strip().splitlines()
CASES = list(cases())


def state(tables):
    "Every table, every view, and all that is in them."
    with tables.open() as connection:
        made = connection.execute("SELECT table_name, sql FROM duckdb_tables() "
                                  "UNION ALL SELECT view_name, sql FROM duckdb_views() WHERE NOT internal UNION ALL "
                                  "SELECT function_name, macro_definition FROM duckdb_functions() WHERE NOT internal ORDER BY 1").fetchall()
        return made, [connection.execute(f'SELECT * FROM "{name}" ORDER BY ALL').fetchall() for name in ("other", "raw")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    tables = Tables(folder / "arc.duckdb")
    tables.load(pd.DataFrame({"x": [1., 3., 5., 7.], "t": ["a", "b", "c", "d"]}), "raw")
    tables.load(pd.DataFrame({"mean": [1]}), "other")
    work = folder / "work"
    work.mkdir()
    (work / "CANARY").write_text("content of the canary\n1\n")
    return tables, work, state(tables)


@pytest.mark.filterwarnings("ignore:.*no step uses")
@pytest.mark.parametrize("text", [text for _, text in CASES], ids=[f"{i}-{name}"[:60] for i, (name, _) in enumerate(CASES)])
def test_a_malformed_pipeline_is_refused_with_its_place(home, monkeypatch, text):
    tables, work, before = home
    monkeypatch.chdir(work)
    digest = hashlib.sha256((work / "CANARY").read_bytes()).hexdigest()
    with pytest.raises(ValueError) as caught: Steps.from_yaml(text).run(tables)
    said = str(caught.value)
    assert re.search(r"line \d+", said) and "content of" not in said and "root:" not in said, said
    assert state(tables) == before and os.listdir(work) == ["CANARY"]
    assert hashlib.sha256((work / "CANARY").read_bytes()).hexdigest() == digest


def test_there_are_enough_of_them():
    assert len({text for _, text in CASES}) >= 200
    print(f"{len(CASES)} malformed pipelines")


@pytest.fixture
def tables(tmp_path):
    made = Tables(tmp_path / "arc.duckdb")
    made.load(pd.DataFrame({"x": [1., 3., 5., 7.], "t": ["a", "b", "c", "d"]}), "raw")
    return made


def test_the_good_one_runs(tables):
    checked = Steps.from_yaml(GOOD).check(tables)
    assert tables.names() == ["raw"] and checked.id == "" and [m.name for m in checked.made] == ["clean", "facts", "features", "tidy"]
    ran = Steps.from_yaml(GOOD).run(tables)
    assert ran.id == "features-v1" and ran.output("features").rows == 3
    assert ran.output("features").columns == {"centred": "DOUBLE", "t": "VARCHAR"}
    assert tables.frame("features").centred.tolist() == [-2., 0., 2.] and tables.list().set_index("table").kind["facts"] == "view"
    assert Steps.from_yaml(GOOD).run(tables).id == "features-v2" and versions(tables).version.tolist() == [2, 1]
    assert read_pipeline(versions(tables).yaml[0]).pipeline == Steps.from_yaml(GOOD).plan.pipeline


def test_any_order_of_the_steps_gives_the_same(tables, tmp_path):
    head, _, rest = GOOD.partition("steps:\n")
    body, _, tail = rest.partition("outputs:")
    parts = ["  - " + p for p in body.split("  - ")[1:]]
    file = tmp_path / "p.yaml"
    file.write_text(head + "steps:\n" + "".join(reversed(parts)) + "outputs:" + tail)
    ran = Steps.from_yaml(file).run(tables)
    assert [m.name for m in ran.made] == ["clean", "facts", "features",
                                          "tidy"] and "<svg" in ran.picture and "<svg" in Steps.from_yaml(file)._repr_html_()


def test_a_failure_in_the_last_step_leaves_the_last_run(tables):
    Steps.from_yaml(GOOD).run(tables)
    before = state_of(tables)
    tables.append("raw", pd.DataFrame({"x": [9.], "t": ["late"]}))
    bad = changed(("DELETE FROM features WHERE centred IS NULL",
                   "DELETE FROM features WHERE (CASE WHEN t = 'late' THEN error('stop') END) IS NOT NULL"))
    with pytest.raises(ValueError, match=r"line 22, steps\[3\]"): Steps.from_yaml(bad).run(tables)
    assert state_of(tables) == before


def state_of(tables):
    "What the good pipeline has made."
    return tables.frame("features").values.tolist(), tables.frame("clean").values.tolist(), len(versions(tables)), tables.names()


def test_change_lets_it_change(tables):
    text = """
steps:
  - {name: cut, type: execute, depends_on: [raw], sql: DELETE FROM raw WHERE x > 4}
  - {name: b, depends_on: [raw, cut], sql: SELECT * FROM raw}
outputs: [b]
"""
    with pytest.raises(ValueError, match=r"change=\["): Steps.from_yaml(text).run(tables)
    assert len(tables.frame("raw")) == 4
    with pytest.raises(ValueError, match="is no table"): Steps.from_yaml(text).run(tables, change=["rwa"])
    assert Steps.from_yaml(text).run(tables, change=["raw"]).output("b").rows == 2 and len(tables.frame("raw")) == 2


def test_a_variable_without_effect_is_said(tables):
    with pytest.warns(UserWarning, match="line 5: no step uses 'most'|line 5, vars.most: no step uses 'most'"):
        Steps.from_yaml(changed(("  least: 3\n", "  least: 3\n  most: 4\n")))


def test_pivots_ctes_and_comments_are_queries(tables):
    text = """
steps:
  - {name: p, depends_on: [raw], sql: "PIVOT raw ON t USING sum(x)"}
  - name: q
    depends_on: [p]
    sql: |
      -- what is seen
      WITH r AS (SELECT * FROM p) SELECT * FROM r, range(2) ORDER BY 1; -- twice
outputs: [p, q]
"""
    ran = Steps.from_yaml(text).run(tables)
    assert ran.output("p").columns.keys() == set("abcd") and ran.output("q").rows == 2
