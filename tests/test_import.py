"""What `import arc_nb` costs and loads: little, because a notebook is opened often."""
import json
import statistics
import sys

HEAVY = ("plotly", "ipywidgets", "anywidget", "pandas", "sklearn", "torchmetrics", "duckdb", "optuna", "tensorboard", "matplotlib")
LIMIT = 0.3  # seconds of CPU over `import torch`, from issue 2
CODE = """
import json, sys, time
t0 = time.process_time(); import torch
t1 = time.process_time(); import arc_nb
t2 = time.process_time(); from arc_nb import Trainer, Callback
t3 = time.process_time()
print(json.dumps(dict(torch=t1 - t0, arc_nb=t2 - t1, trainer=t3 - t1, loaded=sorted({n.split(".")[0] for n in sys.modules}))))
"""


def test_the_import_is_light(call, tmp_path):
    "Each process is one pair: torch first, arc_nb right after it, so that a busy machine slows both."
    runs = [json.loads(call(sys.executable, "-c", CODE, cwd=tmp_path).splitlines()[-1]) for _ in range(5)]
    cost = {name: statistics.median(r[name] for r in runs) for name in ("torch", "arc_nb", "trainer")}
    print({name: f"{seconds:.3f} s" for name, seconds in cost.items()})
    assert cost["arc_nb"] <= LIMIT
    assert cost["trainer"] <= LIMIT
    assert not set(HEAVY) & set(runs[0]["loaded"])
