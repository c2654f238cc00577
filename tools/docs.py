"""The site from the notebooks, in _proc/_docs: nbdev's processing, then Quarto where it is installed, else smalldocs.

Plain Python and not a chapter: it builds the chapters' pages. It ends with an error when a page is missing or was warned about.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from fastcore.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml

ROOT = Path(__file__).resolve().parents[1]
PLOTLY = "application/vnd.plotly.v1+json"
# Written by nbdev for Quarto, unknown to smalldocs, without effect on a page.
HARMLESS = ("format-links", "output-file")


def still_picture(data: dict) -> str:
    "The picture inside a figure's place, for readers without JavaScript."
    text = {k: "".join(v) if isinstance(v, list) else v for k, v in data.items() if k.startswith("image/")}
    if "image/svg+xml" in text: return text["image/svg+xml"]
    if "image/png" in text: return f'<img src="data:image/png;base64,{text["image/png"].strip()}">'
    raise ValueError("a plotly figure without a still picture beside it: store image/png or image/svg+xml in the same output")


def figure_html(data: dict, ident: str, script: str) -> str:
    "A figure that shares the site's one plotly.js; its still picture stays where no JavaScript runs."
    figure = json.dumps({k: data[PLOTLY].get(k, {}) for k in ("data", "layout", "config")}).replace("</", "<\\/")
    return (f'<div id="{ident}">{still_picture(data)}</div>\n<script src="{script}"></script>\n'
            f'<script>(() => {{ const place = document.getElementById("{ident}"), figure = {figure};\n'
            'place.replaceChildren(); Plotly.newPlot(place, figure.data, figure.layout, figure.config); })();</script>')


def share_plotly(notebooks: list[Path], proc: Path) -> int:
    "Turn the plotly outputs of the processed notebooks into HTML; returns how many there were."
    found = 0
    for path in notebooks:
        nb = json.loads(path.read_text())
        outputs = [o for c in nb["cells"] for o in c.get("outputs", []) if PLOTLY in o.get("data", {})]
        script = "../" * (len(path.relative_to(proc).parts) - 1) + "plotly.min.js"
        for output in outputs:
            found += 1
            try: output["data"] = {"text/html": figure_html(output["data"], f"plotly-{found}", script)}
            except ValueError as e: raise ValueError(f"{path.relative_to(proc)}: {e}") from None
        if outputs: path.write_text(json.dumps(nb))
    return found


def needed(cell) -> bool:
    "Whether a cell's documentation needs it executed: exported code, plain imports, and what asks for show_doc."
    if cell.cell_type != "code" or not cell.source.strip(): return False
    if set(cell.directives_) & {"export", "exports", "exporti", "exec_doc"}: return True
    tree = cell.parsed_() or []
    return "show_doc" in cell.source or all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree)


class Needed(exec_show_docs):
    "nbdev executes every cell with an import in it, lessons too, and those fail without the lessons before them."
    def __call__(self, cell) -> None:
        if not needed(cell): return
        super().__call__(cell)
        for node in cell.parsed_() or []:  # show_doc evaluates annotations, which may name what only type checkers import
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                self.k.run_cell(ast.unparse(ast.Module(node.body, type_ignores=[])))


class Pages(FilterDefaults):
    "nbdev's processors, with fewer cells executed."
    def base_procs(self) -> list: return [Needed if p is exec_show_docs else p for p in super().base_procs()]


def place(entry: str | dict) -> tuple[bool, bool, str]:
    "Where an entry of the sidebar belongs: the front page, the tutorials, then all by the number of their (first) chapter."
    path = entry if isinstance(entry, str) else min(e for e in entry["contents"] if isinstance(e, str))
    return path != "index.ipynb", not path.startswith("tutorials/"), path.rsplit("/")[-1]


def write_sidebar(path: Path) -> None:
    "nbdev's sidebar in the order in which the house is read."
    nbdev_sidebar.__wrapped__(path=path.parent)
    sidebar = yaml.safe_load(path.read_text())
    sidebar["website"]["sidebar"]["contents"].sort(key=place)
    path.write_text(yaml.safe_dump(sidebar, sort_keys=False))


def process(proc: Path = ROOT / "_proc") -> list[Path]:
    "nbdev's own part: exported cells become documentation, and the sidebar is written; returns the processed notebooks."
    os.chdir(ROOT)
    os.environ["IN_TEST"] = "1"
    refresh_quarto_yml()
    write_sidebar(ROOT / "nbs/sidebar.yml")
    shutil.rmtree(proc, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", proc, ignore=shutil.ignore_patterns(".*", "runs", "_*.ipynb", "__pycache__"))
    paths = sorted(proc.rglob("*.ipynb"))
    for path in paths:
        nb = read_nb(path)
        try: Pages()(nb)
        except Exception as e:
            e.add_note(f"while {path.relative_to(proc)} was made a page")
            raise
        write_nb(nb, path)
    return paths


def render(proc: Path) -> list[str]:
    "Pages from the processed notebooks; returns the warnings that matter."
    if shutil.which("quarto"):
        print("   rendering with Quarto")
        subprocess.run(["quarto", "render", str(proc), "--no-execute"], check=True)
        return []
    print("   rendering with smalldocs (Quarto is not installed)")
    done = subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", str(proc), "--quiet"], text=True, capture_output=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not any(h in line for h in HARMLESS)]
    if done.returncode: raise RuntimeError("smalldocs failed:\n" + done.stdout + done.stderr)
    return said


def unnumbered(page: Path) -> Path:
    "A page's name without the number of its chapter: what nbdev calls it, and Quarto too."
    return page.with_name(re.sub(r"^\d+[a-z]*_", "", page.name))


def keep_links_inside(site: Path) -> None:
    "nbdev links names to the published site; here they lead to the pages just built."
    cfg = get_config()
    published = re.compile(re.escape(f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/")) + r"/([\w/]+\.html)")
    pages = {unnumbered(p.relative_to(site)).as_posix(): p for p in site.rglob("*.html")}
    for page in pages.values():
        def local(m: re.Match, folder: Path = page.parent) -> str:
            return os.path.relpath(pages[m[1]], folder) if m[1] in pages else m[0]
        page.write_text(published.sub(local, page.read_text()))


def main() -> int:
    "Build the site; 1 when anything is wrong with it."
    proc = ROOT / "_proc"
    notebooks, site = process(proc), proc / "_docs"
    figures = share_plotly(notebooks, proc)
    wrong = render(proc)
    if figures:
        from plotly.offline import get_plotlyjs
        (site / "plotly.min.js").write_text(get_plotlyjs())
    keep_links_inside(site)
    pages = {unnumbered(p.relative_to(site)) for p in site.rglob("*.html")}
    wrong += [f"no page for {p.relative_to(proc)}" for p in notebooks if unnumbered(p.relative_to(proc)).with_suffix(".html") not in pages]
    for line in wrong: print(f"   {line}", file=sys.stderr)
    if wrong: return 1
    print(f"   {len(notebooks)} pages, {figures} plotly figures: {site / 'index.html'}")
    return 0


if __name__ == "__main__": sys.exit(main())
