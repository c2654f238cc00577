"""README.md from nbs/index.ipynb. Plain Python and not a chapter: it runs before the package can be imported."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELATIVE_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])")
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
HIDDEN = re.compile(r"^#\s*\|\s*hide\s*$", re.M)


def visible(nb):
    "The notebook as a reader of README.md sees it: no hidden cells, no directives, links from the root."
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not HIDDEN.search(c.source)]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = RELATIVE_LINK.sub("nbs/", cell.source)
        else: cell.source = DIRECTIVE.sub("", cell.source)
    return nb


def render(
    root: Path = ROOT,  # the project's folder
) -> dict[str, bytes]:  # README.md, and the pictures of its outputs, by path from the root
    "What index.ipynb says, as files."
    import nbformat
    from nbconvert.exporters import MarkdownExporter
    nb = visible(nbformat.read(root / "nbs/index.ipynb", 4))
    resources = {"output_files_dir": "nbs/images", "unique_key": "index"}
    text, made = MarkdownExporter().from_notebook_node(nb, resources=resources)
    pictures: dict[str, bytes] = made["outputs"]
    warning = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n"
    readme = warning + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return {"README.md": readme.encode(), **pictures}


def main() -> int:
    "Write the files and say which."
    for name, content in render().items():
        (ROOT / name).write_bytes(content)
        print(f"   wrote {name}")
    return 0


if __name__ == "__main__": sys.exit(main())
