"""Arc-Graphs from files: five dialects of one model, and hundreds of malformed ones, none of which runs anything."""
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arc_nb.graph.build import build, complete, parameter_counts, shapes
from arc_nb.graph.catalogue import operations, register_layer
from arc_nb.graph.checks import faults
from arc_nb.graph.dryrun import dry_run
from arc_nb.graph.filling import expand
from arc_nb.graph.picture import picture
from arc_nb.graph.spec import Graph
from arc_nb.marks import read_yaml, write_yaml

DATA = Path(__file__).parent / "data" / "graphs"
GOOD = ["a", "b", "c", "e", "towers", "sequence"]

def read(name):
    "A graph of the data folder."
    return Graph.from_yaml(DATA / f"{name}.yaml", DATA / "d_trainer.yaml" if name == "d_model" else None)

# ---- what is good

def test_five_dialects_are_one_model():
    first = read("a")
    weights = build(first).state_dict()
    for name in ("b", "c", "d_model", "e"):
        graph = read(name)
        state = build(graph).state_dict()
        assert [(k, v.shape) for k, v in state.items()] == [(k, v.shape) for k, v in weights.items()]
        assert graph.graph == first.graph and graph.inputs == first.inputs and graph.outputs == first.outputs
        trainer = graph.trainer.model_copy(update={"loss": [loss.model_copy(update={"input": None}) for loss in graph.trainer.loss]})
        assert trainer == first.trainer
    assert read("d_model").name == "diabetes"

@pytest.mark.parametrize("name", [*GOOD, "d_model"])
def test_there_and_back(name):
    graph = read(name).check()
    again = Graph.from_yaml(graph.to_yaml())
    assert again == graph and again.to_yaml() == graph.to_yaml() and "model:" not in graph.to_yaml().splitlines()

def test_the_guides_fragment_has_its_weights_and_trains():
    graph = read("fragment")
    assert sum(p.numel() for p in build(graph).parameters()) == 8 * 64 + 64 == sum(parameter_counts(graph).values())
    whole = expand(complete(graph.with_target("outcome")), ["outcome", "age", "bmi", "glucose", *"abcde"])
    assert len(whole.inputs["features"].columns) == 8 and whole.notes and build(whole)(torch.rand(3, 8)).shape == (3, 1)
    assert dry_run(whole, torch.rand(16, 8), torch.arange(16) % 2).success

@pytest.mark.parametrize("name", GOOD)
def test_shapes_without_memory_are_those_of_a_run(name):
    graph = read(name)
    inputs = {k: torch.randint(3, (6, *i.shape[1:])) if i.categorical else torch.rand(6, *i.shape[1:]) for k, i in graph.inputs.items()}
    state = torch.get_rng_state()
    sizes, model = shapes(graph), None
    assert torch.equal(state, torch.get_rng_state())  # looking draws no random numbers
    model = build(graph)
    out = model(**inputs)
    out = out if isinstance(out, dict) else {next(iter(graph.outputs)): out}
    for key, value in out.items(): assert sizes[graph.outputs[key].split(".")[0]] == (None, *value.shape[1:])
    torch.manual_seed(1)
    again = build(graph)
    again.load_state_dict(model.state_dict())
    model.eval(), again.eval()
    first = model(*inputs.values())
    second = again(**inputs)
    for a, b in zip(first.values(), second.values()) if isinstance(first, dict) else [(first, second)]: assert torch.equal(a, b)

def test_every_layer_of_the_table_answers_for_its_parameters():
    functions = [op for op in operations().values() if op.function]
    assert len(operations()) - len(functions) >= 94 and len(functions) >= 53
    for op in operations().values(): assert "self" not in op.params and op.args, op.type

def test_a_registered_layer_is_used_by_its_name():
    class Twice(torch.nn.Module):
        def forward(self, x): return 2 * x
    register_layer("Twice", Twice)
    graph = Graph.from_yaml("inputs: {x: {shape: [null, 2]}}\ngraph: [{name: t, type: custom.Twice, inputs: {x: x}}]")
    assert build(graph)(torch.ones(1, 2)).tolist() == [[2, 2]]
    for wrong in (torch.nn.ReLU(), "a b", print):
        with pytest.raises((TypeError, ValueError)): register_layer(wrong) if not isinstance(wrong, str) else register_layer(wrong, Twice)

@pytest.mark.parametrize("name", [*GOOD, "fragment"])
def test_pictures_are_drawn(name):
    text = picture(read(name))
    assert text.startswith("<svg") and "<script" not in text and len(text) < 40_000

def test_names_from_a_file_stay_text_in_the_picture():
    head = "name: '<script>alert(1)</script>'\ninputs: {x: {shape: [null, 2]}}\n"
    text = picture(Graph.from_yaml(head + "graph: [{name: t, type: '<b>', inputs: [x]}]"))
    assert "<script>" not in text and "<b>" not in text

# ---- what is malformed

EVIL = ["os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "torch.load", "torch.hub.load", "torch.nn.Module",
        "torch.nn.Linaer", "__import__('os').system('touch pwned')", "torch.ops.aten.add", "custom.Nope", "module.Nope",
        "torch.nn.functional",
        "torch", "", "arc.stac", "torch.nn.utils.skip_init", "torch.compile", "numpy.load", "torch.nn.Sequential"]

def places(value, path=()):
    "Every place in plain data."
    yield path, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs: yield from places(inner, (*path, key))

def changed(value, path, new):
    "A copy with another value at a place; DROP takes the key out, a function is called with the old value."
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]: inner = inner[key]
    if new is DROP: del inner[path[-1]]
    else: inner[path[-1]] = new(inner[path[-1]]) if callable(new) else new
    return value

def renamed(value, path, new):
    "A copy with another key at a place."
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]: inner = inner[key]
    items = [(new if k == path[-1] else k, v) for k, v in inner.items()]
    inner.clear(), inner.update(items)
    return value

DROP = object()
PIECES = read_yaml(DATA / "mutations.yaml").value
CODE = ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', 'pwned']]",
        "!!python/module:os", "!!python/object/apply:builtins.eval ['open(\"pwned\", \"w\")']", "!!set {a}", "!Ref x", "!!binary aGk="]

NAMED = ("type", "name", "graph", "inputs", "shape", "in_features", "out_features", "input_size", "embed_dim", "module", "vocab_size")
PLAIN = ("params", "config", "columns", "betas", "metrics", "shape", "inputs", "tensors", "outputs", "modules")

def needed(path):
    "Whether the key at a place cannot be left out."
    key = path[-1]
    spare = key == "name" and len(path) == 1 or key == "inputs" and "loss" in path or key == "type" and "optimizer" in path
    return key in NAMED and not spare

def free(path):
    "Whether the key at a place is a name that the file chooses."
    above = path[-2:-1]
    entry = above == ("inputs",) and len(path) < 4 and "graph" not in path
    return not isinstance(path[-1], str) or above in (("outputs",), ("modules",), ("columns",)) or entry or path[-1] == "model"

def reference(path, value):
    "Whether a reference stands at a place."
    named = path[0] == "modules" and len(path) == 4  # the arguments of a module
    return isinstance(value, str) and path[-2:-1] in (("inputs",), ("outputs",), ("tensors",)) and "loss" not in path and not named

def mutations():
    "Name, text, and the place that the message has to tell of, for every malformed graph."
    for base in ("a", "c", "e", "towers", "sequence"):
        data = read_yaml(DATA / f"{base}.yaml").value
        for path, value in [p for p in places(data) if p[0]]:
            for name, new in mutants(data, path, value): yield f"{base}: {'.'.join(map(str, path))} {name}", *new

def mutants(data, path, value):
    "The malformed graphs that one place gives."
    key = path[-1]
    if key == "type" and "graph" in path: yield from ((f"= {evil}", (changed(data, path, evil), path)) for evil in EVIL)
    if needed(path): yield "dropped", (changed(data, path, DROP), path[:-1])
    if not free(path): yield "misspelt", (renamed(data, path, key + "q"), (*path[:-1], key + "q"))
    if reference(path, value):
        for ref in ("nothing.output", value.split(".")[0] + ".banana", "__class__", value + ".9.x", "", "../../etc/passwd"):
            yield f"-> {ref!r}", (changed(data, path, ref), path)
    for new in PIECES["wrong"].get(key, []): yield f"= {str(new)[:30]}", (changed(data, path, new), path)
    if isinstance(value, (dict, list)) and key not in PLAIN: yield "a word", (changed(data, path, "word"), path)

def malformed():
    "All of them: places of good graphs, tags that ask for code, and texts that are wrong as a whole."
    yield from mutations()
    text = (DATA / "a.yaml").read_text()
    for k, code in enumerate(CODE):
        yield f"tag {k} as a type", text.replace("type: torch.nn.ReLU", f"type: {code}"), ("tag",)
        yield f"tag {k} as a parameter", text.replace("out_features: 16", f"out_features: {code}"), ("tag",)
    for k, pair in enumerate(PIECES["replace"]):
        yield f"text {k}: {pair['new'][:40]!r}", text.replace(pair["old"], pair["new"]), ("text",)
    for k, whole in enumerate([*PIECES["whole"], "[" * 5000, "{" * 5000, "\x00"]):
        yield f"whole {k}", whole, ("text",)

MUTANTS = list(malformed())
WATCHED: list[str] = []
WATCH = False
ACTS = ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.spawn", "shutil.rmtree", "os.remove", "os.mkdir", "socket.connect")

def _audit(event, args):
    writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
    if WATCH and (writes or event in ACTS): WATCHED.append(f"{event} {args}")
sys.addaudithook(_audit)

def refused(text):
    "The message of a graph that should be refused; None where it was not."
    global WATCH
    WATCHED.clear()
    WATCH = True
    try: Graph.from_yaml(text).check()
    except ValueError as error: return str(error)
    finally: WATCH = False
    return None

def test_there_are_hundreds():
    assert len(MUTANTS[::5]) >= 300
    print(f"{len(MUTANTS)} malformed graphs")

@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_malformed_graphs_are_refused_with_their_place(monkeypatch, tmp_path, every):
    monkeypatch.chdir(tmp_path)
    bad = []
    for name in GOOD: build(read(name))  # what torch imports when it is first used is none of a file's doing
    for name, value, path in MUTANTS[::every]:
        text = value if isinstance(value, str) else write_yaml(value)
        try: message = refused(text)
        except Exception as error: bad.append(f"{name}: raised {type(error).__name__}: {error}"); continue
        if message is None: bad.append(f"{name}: accepted"); continue
        if WATCHED: bad.append(f"{name}: did {WATCHED}")
        if path in (("tag",), ("text",)):
            if name.startswith(("tag", "text")) and "line " not in message: bad.append(f"{name}: no line in {message!r}")
            continue
        marked = read_yaml(text)
        inside = [p for p, _ in places(value_at(marked.value, path))]
        lines = {marked.line(path[:k]) for k in range(1, len(path) + 1)} | {marked.line((*path, *p)) for p in inside}
        told = {f"line {n}" for n in lines} | {repr(key) for key in path if isinstance(key, str)}
        around = [value_at(marked.value, path[:k]) for k in range(len(path), 0, -1)]
        node = next((part.get("name") for part in around if isinstance(part, dict)), None)
        if not any(t in message for t in told) and not (node and repr(node) in message) and "is missing" not in message:
            bad.append(f"{name}: the place is not told (lines {sorted(lines)}): {message[:300]}")
    assert not list(tmp_path.iterdir())
    assert not bad, f"{len(bad)} of {len(MUTANTS)}:\n" + "\n".join(bad[:60])

def value_at(value, path):
    "What is at a place, or None."
    for key in path:
        try: value = value[key]
        except (KeyError, IndexError, TypeError): return None
    return value

def test_all_faults_are_told_at_once():
    text = (DATA / "a.yaml").read_text()
    for old, new in [("relu.output", "rlu.output"), ("torch.nn.ReLU", "torch.nn.RELUU"), ("BCELoss", "BCELos")]:
        text = text.replace(old, new)
    found = faults(Graph.from_yaml(text))
    assert len(found) == 3 and all("line " in line for line in found) and "did you mean 'relu'" in " ".join(found)

def test_a_trainers_file_is_named(tmp_path):
    (tmp_path / "t.yaml").write_text((DATA / "d_trainer.yaml").read_text().replace("  type:", "  tpye:"))
    with pytest.raises(ValueError, match="t.yaml, line 4, optimizer.tpye"): Graph.from_yaml(DATA / "d_model.yaml", tmp_path / "t.yaml")

def test_reading_imports_nothing_heavy():
    code = ("import sys, arc_nb.graph.spec as s; s.Graph.from_yaml(sys.argv[1]); "
            "print([m for m in ('duckdb', 'plotly', 'sklearn', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, str(DATA / "a.yaml")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def told(more, rows):
    """A small graph with more lines, and the profile of a table that it is for."""
    import pandas as pd

    from arc_nb.tables.profile import profile_frame
    graph = Graph.from_yaml("""
inputs: {x: {dtype: float32, shape: [null, 1], columns: [a]}}
graph:
  - {name: o, type: torch.nn.Linear, params: {in_features: 1, out_features: 1}, inputs: {input: x}}
outputs: {logits: o.output}
trainer: {loss: torch.nn.BCEWithLogitsLoss, target: y}
""" + more)
    return graph, profile_frame(pd.DataFrame(rows))


def test_an_evaluator_says_what_it_does_not_do():
    graph, profile = told("evaluator: {metrics: [auc], dataset: other, version: 3, target_column: y}\n", {"a": [1., 2, 3], "y": [0, 1, 0]})
    with pytest.warns(UserWarning) as heard: graph.check(profile)
    assert {str(w.message).split(":")[0] for w in heard} == {"evaluator.dataset", "evaluator.version", "evaluator.target_column"}


def test_a_column_that_splits_says_so_in_its_words():
    rows = {"a": [1., 2, 3], "y": [0, 1, 0], "part": ["train", "Val ", "later"]}
    graph, profile = told("preprocessing: {split: {by: column, column: part}}\n", rows)
    found, = faults(graph, profile)
    assert found.startswith("line 7, preprocessing.split.column: 'part' says 'later', and may say train")
    graph, profile = told("preprocessing: {split: {by: column, column: part}}\n", rows | {"part": ["train", "Val ", "TEST"]})
    assert not faults(graph, profile)


def test_a_binary_loss_on_a_quantity_is_told_of_both_ways():
    graph, profile = told("", {"a": [1., 2, 3], "y": [.5, 1.5, 2.5]})
    assert "MSELoss for quantities" in faults(graph, profile)[0]


def test_sequences_that_would_mix_the_rows_are_told():
    text = """
inputs: {days: {dtype: float32, shape: [null, 7, 4]}}
graph:
  - {name: lstm, type: torch.nn.LSTM, params: {input_size: 4, hidden_size: 8}, inputs: {input: days}}
  - {name: last, type: torch.select, params: {dim: 1, index: -1}, inputs: {input: lstm.output.0}}
  - {name: head, type: torch.nn.Linear, params: {in_features: 8, out_features: 1}, inputs: {input: last.output}}
outputs: {y: head.output}
"""
    with pytest.warns(UserWarning, match="batch_first: true"): Graph.from_yaml(text).check()
    Graph.from_yaml(text.replace("hidden_size: 8", "hidden_size: 8, batch_first: true")).check()


@pytest.mark.parametrize("old, new, said", [
    ("shape: [null, 2]", "shape: [2]", r"set shape: \[null, 2\]"),
    ("epochs: 3", "epochs: 3, early_stopping_monitor: val_f2", "is not measured"),
    ("epochs: 3", "epochs: 3, metrics: [accuracy], early_stopping_monitor: val_f1, early_stopping_patience: 2", "add f1 to metrics"),
    ("params: {pos_weight: 3}", "params: {posweight: 3}", "did you mean 'pos_weight'")])
def test_mistakes_of_a_person_have_their_next_step(old, new, said):
    text = """
inputs: {features: {dtype: float32, shape: [null, 2], columns: [a, b]}}
graph:
  - {name: l, type: torch.nn.Linear, params: {in_features: 2, out_features: 1}, inputs: {input: features}}
outputs: {logits: l.output}
trainer: {optimizer: adam, loss: {type: bce_with_logits, target: y, params: {pos_weight: 3}}, epochs: 3}
"""
    assert Graph.from_yaml(text).check() is not None and "batches of 32" in str(Graph.from_yaml(text))
    with pytest.raises(ValueError, match=said): Graph.from_yaml(text.replace(old, new)).check()
