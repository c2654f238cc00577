"""The wheel holds all of the house, and works away from its sources."""
import json
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

IMPORT_ALL = """
import importlib, json, pkgutil, arc_nb
names = ["arc_nb"] + [m.name for m in pkgutil.walk_packages(arc_nb.__path__, "arc_nb.") if not m.name.endswith("__main__")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


@pytest.fixture
def wheel(project_copy: Path, tmp_path: Path, call) -> Path:
    "Built without the network: the build tools are those of this .venv."
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", project_copy)
    return next((tmp_path / "dist").glob("*.whl"))


def installed(wheel: Path, venv: Path, call) -> Path:
    "The Python of a new environment with the wheel in it; the libraries are this .venv's, its own arc_nb is not."
    call(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin/python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # A folder named in a .pth file is searched, but .pth files inside it (the editable arc_nb among them) are not read.
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})))
    return python


def test_every_module_of_the_installed_wheel_imports(wheel, tmp_path, root, call):
    files = set(ZipFile(wheel).namelist())
    scripts = {f"arc_nb/static/{name}.js" for name in ("board", "finder")}
    missing = {str(p.relative_to(root)) for p in (root / "arc_nb").rglob("*.py")} | {"arc_nb/py.typed"} | scripts
    assert sorted(missing - files) == []
    python = installed(wheel, tmp_path / "venv", call)
    imported = json.loads(call(python, "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    assert len(imported) == len([f for f in files if f.startswith("arc_nb/") and f.endswith(".py")])
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in imported.values())
