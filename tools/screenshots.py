"""Photographs of the live board for the README and the chapters: a real training in JupyterLab.  python tools/screenshots.py"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_browser import BOARD, CHROMIUM, FLAGS, Page, jupyter, notebook  # noqa: E402

CELLS = ["""\
import time, torch
from sklearn.datasets import load_digits
from arc_nb import Trainer, Callback
from arc_nb.watch.board import Board, Watching
torch.set_num_threads(1)
X, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
X = (X / 16).float()
class Slowly(Callback):
    pause = 0.
    def on_step_end(self, trainer): time.sleep(self.pause)
class Behind(Callback):
    def on_fit_start(self, trainer):
        self.board = Watching(Board(trainer).compare("runs/baseline"))
        self.board.on_fit_start(trainer)
    def on_tick(self, trainer): self.board.on_tick(trainer)
    def cleanup(self, trainer): self.board.cleanup(trainer)
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
train, valid = (X[:1400], y[:1400]), (X[1400:], y[1400:])
Trainer(model(), train, valid, loss="cross_entropy", optimizer="sgd", lr=.05, board=False, run="runs/baseline").fit(epochs=12);
""", """\
t = Trainer(model(), train, valid, loss="cross_entropy", metrics=["accuracy"], lr=3e-3, schedule="one_cycle", board=False,
            callbacks=[Slowly(), Behind()], run="runs/digits")
Slowly.pause = .02
t.fit(epochs=12);"""]


def main(folder: Path) -> None:
    from playwright.sync_api import sync_playwright
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root, jupyter(Path(root)) as base, sync_playwright() as playwright:
        notebook(Path(root), "digits.ipynb", CELLS)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        p = Page(chromium, base, scale=1.5)
        p.open("digits.ipynb")
        p.command("notebook:run-all-cells")
        try: p.points(330)
        except Exception: p.shot(folder / "failed.png", whole=True); raise
        p.page.locator(BOARD).scroll_into_view_if_needed()
        p.page.click(f"{BOARD} .log"); p.page.click(f"{BOARD} .log"); p.page.mouse.move(5, 5)
        p.shot(folder / "board-light.png")
        p.theme("JupyterLab Dark")
        p.page.wait_for_selector("#jupyterlab-splash", state="detached")
        p.shot(folder / "board-dark.png")
        p.page.click(f"{BOARD} .stop"); p.done(1)
        assert not p.errors, p.errors
        chromium.close()
    print(*sorted(folder.glob("board-*.png")), sep="\n")


if __name__ == "__main__": main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs" / "images")
