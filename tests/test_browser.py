"""The live board in a real browser: JupyterLab and Chromium, clicks while a cell is busy. Screenshots go to the folder that is printed."""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
ROOT = Path(__file__).resolve().parent.parent
BUNDLES = [ROOT / "arc_nb" / "static" / name for name in ("board.js", "finder.js")]
WAIT = 60_000  # milliseconds for anything that has to come
PANEL = "window.jupyterapp.shell.currentWidget"
BOARD = ".arc-board"
PICTURE = ".jp-RenderedSVG img, .jp-RenderedSVG svg"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no browser: {CHROMIUM} is missing (apt install chromium)"),
              pytest.mark.skipif(not all(map(Path.exists, BUNDLES)), reason=f"no bundles: {BUNDLES} (make setup)")]

SET_UP = """\
import time, torch
from arc_nb import Trainer, Callback
torch.set_num_threads(1)
X = torch.randn(4096, 20, generator=torch.Generator().manual_seed(0))
y = (X[:, :3].sum(1) > 0).long()
class Steps(Callback):                                # when each step ended, to count those after a click
    def __init__(self): self.at = []
    def on_step_end(self, trainer): self.at.append(time.time()); time.sleep(.004)
steps = Steps()
def trainer(name, epochs_lr=1e-3):
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    return Trainer(model, (X, y), (X[:512], y[:512]), loss="cross_entropy", metrics=["accuracy"], lr=epochs_lr,
                   batch_size=32, callbacks=[steps], run=f"runs/{name}")
"""
LONG = """\
t, asked = trainer('watched', 1e-4), []
def stop(*args, then=t.controls.stop, **options):     # stamps the request, and how many steps had ended by then
    asked.append((time.time(), len(steps.at)))
    then(*args, **options)
t.controls.stop = stop
t.fit(epochs=400)
ended = time.time()"""
RESULT = "print('RESULT', t.status.state, t.status.step, t.lr, len(steps.at) - asked[0][1], round(ended - asked[0][0], 3))"
LATER = "a = trainer('later')\nawait a.fit_async(epochs=2)\nassert a.status.state == 'completed'"
CELL = """\
class Net(torch.nn.Module):                           # classes and functions of a cell go to the processes too
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    def forward(self, x): return self.body(scaled(x))
scaled = lambda x: x / 2
def loss(output, target): return torch.nn.functional.cross_entropy(output, target)
t = Trainer(Net(), (X, y), (X[:512], y[:512]), loss=loss, lr=1e-3, batch_size=32, callbacks=[steps], run='runs/pair')
t.fit(epochs=1)                                       # this kernel has trained before
own, first = t.model, t.evaluate((X, y))['loss']"""
PAIR = "t.fit(epochs=400, processes=2)"
BACK = """\
before = t.step
t.fit(epochs=1, processes=2)
last = t.evaluate((X, y))['loss']
print('BACK', t.status.state, t.model is own, type(t.model) is Net, before, t.step - before, first, last, len(steps.at) >= t.step,
      t.history.latest('train_loss'))"""
FINDER = ".arc-finder"
FIND = "t = trainer('found')\nfound = t.lr_find(repeats=2)\nfound"
TOLD = "print('RATE', t.lr, found.lr, t.step, found.curve.ended)"
SHORT = "s = trainer('short')\ns.fit(epochs=2);"


@contextlib.contextmanager
def jupyter(root: Path):
    "A JupyterLab of its own: own settings, own port, own process group."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="jupyter-") as folder:
        home = Path(folder)
        dirs = {"JUPYTER_CONFIG_DIR": "c", "JUPYTER_RUNTIME_DIR": "r", "IPYTHONDIR": "i",
                "JUPYTERLAB_SETTINGS_DIR": "s", "JUPYTERLAB_WORKSPACES_DIR": "w"}
        env = {k: v for k, v in os.environ.items() if not k.startswith(("VSCODE", "COLAB"))}
        env |= {k: str(home / v) for k, v in dirs.items()} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        news = home / "s/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                   "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={root}",
                   "--LabApp.expose_app_in_browser=True"]
        with (home / "log").open("w") as log:
            server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            base = f"http://127.0.0.1:{port}"
            answer(f"{base}/api/status?token=t", server, home / "log")
            yield base
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try: server.wait(15)
            except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait(15)


server_busy = threading.Event()  # never set: a pause between two tries


def answer(url, server, log, seconds=60):
    "Waits until the server answers."
    end = time.monotonic() + seconds
    while True:
        try: return urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            server_busy.wait(.2)


@pytest.fixture(scope="module")
def out() -> Path:
    folder = Path(os.environ.get("BROWSER_OUT") or tempfile.mkdtemp(prefix="arc-browser-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nscreenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    with jupyter(root) as base: yield base, root


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


class Page:
    "A notebook in the browser."
    def __init__(self, browser, base, width=1240, height=820, scale=1):
        self.page, self.base = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale), base
        self.errors: list[str] = []                                       # of JavaScript
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {(error.stack or '')[:500]}"))

    def open(self, name):
        self.page.goto(f"{self.base}/lab/tree/{name}?token=t&reset")
        self.until("() => { const p = window.jupyterapp?.shell?.currentWidget, k = p?.sessionContext?.session?.kernel;"
                   " return p?.context?.isReady && k?.connectionStatus === 'connected' && k.status === 'idle' }")
        if self.page.evaluate("() => !window.jupyterapp.shell.leftCollapsed"): self.command("application:toggle-left-area")

    def command(self, name):  # not awaited: run-all ends with the run
        self.page.evaluate("(name) => { window.jupyterapp.commands.execute(name); return 1 }", name)

    def until(self, expression, arg=None): self.page.wait_for_function(expression, arg=arg, timeout=WAIT)

    def data(self, name): return self.page.locator(BOARD).first.get_attribute(f"data-{name}")

    def points(self, least): self.until(f"(n) => Number(document.querySelector('{BOARD}')?.dataset.points || 0) >= n", least)

    def state(self, name): self.until(f"(s) => document.querySelector('{BOARD}')?.dataset.state === s", name)

    def done(self, cell):
        self.until(f"(i) => {{ const c = {PANEL}.content.widgets[i].model;"
                   " return c.executionCount !== null && c.executionState !== 'running' }", cell)

    def save(self): self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save').then(() => 1)")

    def shot(self, path, whole=False):
        (self.page if whole else self.page.locator(BOARD).first).screenshot(path=path)

    def theme(self, name):
        self.page.evaluate("(t) => window.jupyterapp.commands.execute('apputils:change-theme', {theme: t}).then(() => 1)", name)
        self.until("(dark) => (document.body.dataset.jpThemeLight === 'false') === dark", "Dark" in name)


def notebook(root, name, cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), root / name)


def outputs(nb): return [o.get("data", {}) for cell in nb.cells for o in cell.get("outputs", [])]


def test_a_run_is_watched_steered_and_kept(lab, browser, out):
    base, root = lab
    notebook(root, "live.ipynb", [SET_UP, LONG, RESULT])
    p = Page(browser, base)
    p.open("live.ipynb")
    p.command("notebook:run-all-cells")
    p.page.wait_for_selector(BOARD, timeout=WAIT)
    p.page.locator(BOARD).scroll_into_view_if_needed()
    p.shot(out / "first.png")
    p.points(60)
    seen = int(p.data("points"))
    p.points(seen + 60)                                                   # the curve grows while the cell is busy
    assert p.page.evaluate(f"() => {PANEL}.content.widgets[1].model.executionState") == "running"
    p.points(700)
    p.page.hover(f"{BOARD} .u-over", position={"x": 300, "y": 90})
    p.page.wait_for_selector(f"{BOARD} .tip .at", timeout=WAIT)
    assert re.match(r"step [\d,]+ · epoch \d+", p.page.inner_text(f"{BOARD} .tip .at"))
    p.shot(out / "light.png"); p.shot(out / "page.png", whole=True)

    p.page.click(f"{BOARD} .pause"); p.state("paused")                     # Pause holds it
    held = int(p.data("step"))
    p.theme("JupyterLab Dark"); p.shot(out / "dark-paused.png")            # takes its time, while nothing may move
    assert int(p.data("step")) == held
    p.page.click(f"{BOARD} .pause"); p.state("training")                   # Resume goes on
    p.until(f"(n) => Number(document.querySelector('{BOARD}').dataset.step) > n", held + 50)
    p.shot(out / "dark.png")

    field = p.page.locator(f"{BOARD} input.lr")
    field.fill("-3"); field.press("Enter")
    assert "bad" in field.get_attribute("class")
    field.fill("2.5e-3"); field.press("Enter")
    p.until(f"() => document.querySelector('{BOARD} input.lr').value === '2.5e-3'")
    p.until(f"() => [...document.querySelectorAll('{BOARD} .card')].some(c => c.textContent.includes('2.5e-3'))")
    p.page.click(f"{BOARD} .log")
    p.until(f"() => document.querySelector('{BOARD} .log').getAttribute('aria-pressed') === 'false'"); p.shot(out / "linear.png")
    p.page.click(f"{BOARD} .log"); p.page.locator(f"{BOARD} .legend button", has_text="valid").click()
    box = p.page.locator(f"{BOARD} .u-over").bounding_box()
    p.page.mouse.move(box["x"] + 10, box["y"] + 80); p.page.mouse.down()
    p.page.mouse.move(box["x"] + 60, box["y"] + 90, steps=4); p.page.mouse.up()
    p.shot(out / "zoom.png"); p.page.mouse.dblclick(box["x"] + 60, box["y"] + 90)
    p.page.locator(f"{BOARD} .legend button", has_text="valid").click()

    clicked = time.time()
    p.page.click(f"{BOARD} .stop"); p.done(2)
    took = time.time() - clicked
    p.page.wait_for_selector("text=RESULT", timeout=WAIT)
    text = p.page.locator(".jp-CodeCell").nth(2).locator(".jp-Cell-outputArea").inner_text()
    state, step, lr, after, ended = re.search(r"RESULT (\w+) (\d+) (\S+) (\d+) (\S+)", text).groups()
    print(f"\nStop by a click in a busy cell: {after} step(s) after the request, the fit returned {ended} s after it, "
          f"picture drawn; {took:.2f} s seen from the browser")
    assert state == "stopped" and int(step) < 400 * 128 and float(lr) == pytest.approx(2.5e-3) and int(after) <= 2
    p.page.wait_for_selector(PICTURE, timeout=WAIT)
    p.shot(out / "end.png", whole=True)
    p.theme("JupyterLab Light")
    p.save()
    saved = nbformat.read(root / "live.ipynb", 4)
    pictures = [data for data in outputs(saved) if "image/svg+xml" in data]
    assert pictures and not any("widget" in kind for data in outputs(saved) for kind in data) and "widgets" not in saved.metadata
    for session in json.loads(urllib.request.urlopen(f"{base}/api/sessions?token=t").read()):     # a fresh kernel knows no widget
        urllib.request.urlopen(urllib.request.Request(f"{base}/api/sessions/{session['id']}?token=t", method="DELETE"))
    p.open("live.ipynb")
    p.page.wait_for_selector(PICTURE, timeout=WAIT)
    p.page.locator(".jp-RenderedSVG").first.scroll_into_view_if_needed()
    p.shot(out / "reopened.png", whole=True)
    assert p.page.locator(BOARD).count() == 0 and not p.errors, p.errors
    p.page.close()


def test_two_processes_from_a_cell(lab, browser, out):
    base, root = lab
    notebook(root, "pair.ipynb", [SET_UP, CELL, PAIR, BACK])
    p = Page(browser, base)
    p.open("pair.ipynb")
    p.command("notebook:run-all-cells")
    p.page.wait_for_selector(BOARD, timeout=WAIT)
    cell = p.page.locator(".jp-CodeCell").nth(2)
    p.until(f"() => document.querySelector('{BOARD}')?.textContent.includes('processes')")
    p.points(200)
    seen = int(p.data("points"))
    p.page.locator(BOARD).first.scroll_into_view_if_needed()
    p.points(seen + 100)                                                  # the curve grows while other processes train
    assert "2 processes on the CPU (gloo): 32 rows a step in all, 16 in each" in cell.inner_text()
    p.shot(out / "pair.png", whole=True)
    p.page.click(f"{BOARD} .stop"); p.done(2)
    p.done(3)
    p.page.wait_for_selector("text=BACK", timeout=WAIT)
    text = p.page.locator(".jp-CodeCell").nth(3).locator(".jp-Cell-outputArea").inner_text()
    said = re.search(r"BACK (\w+) (\w+) (\w+) (\d+) (\d+) (\S+) (\S+) (\w+) (\S+)", text).groups()
    state, same, kind, stopped, more, first, last, heard, train = said
    assert (state, same, kind, int(more), heard) == ("completed", "True", "True", 128, "True")
    assert 200 < int(stopped) < 401 * 128                                 # Stop was heard
    assert float(last) < float(first) - 0.05 and float(last) == pytest.approx(float(train), abs=.05)  # the weights are back
    p.page.locator(".jp-CodeCell").nth(2).scroll_into_view_if_needed()
    p.shot(out / "pair-end.png", whole=True)
    p.save()
    saved = nbformat.read(root / "pair.ipynb", 4)
    assert sum("image/svg+xml" in data for data in outputs(saved)) >= 3 and not p.errors, p.errors
    p.page.close()


ARC = """\
import os
os.environ['ARC_NB_HOME'] = os.path.abspath('home')
from sklearn.datasets import load_breast_cancer
from arc_nb import Arc
%load_ext arc_nb
arc = Arc()
frame = load_breast_cancer(as_frame=True).frame.rename(columns=lambda name: name.replace(' ', '_'))
arc.load(frame.assign(benign=frame.pop('target')), table='growths')"""
TRAIN = """\
/ml model --name benign
          --instruction "Predict whether a growth is benign with:
                        - 2 hidden layers (32, 16)
                        - 4000 epochs, no early stopping"
          --data-table growths
done = 1 + 1"""
LOAD = "import os\nos.environ['ARC_NB_HOME'] = os.path.abspath('home')\n%load_ext arc_nb"
ELSEWHERE = """\
/ml jobs list
job = arc.job(arc.jobs()['Job ID'][0])
print('ENDED', job.status, job.cancel().wait().status)"""


def test_commands_in_cells(lab, browser, out):
    "The guide's lines, between lines of Python: the plan, and the live board of a job that outlives its cell; another notebook ends it."
    base, root = lab
    notebook(root, "arc.ipynb", [ARC, TRAIN])
    p = Page(browser, base)
    p.open("arc.ipynb")
    p.command("notebook:run-all-cells")
    p.page.wait_for_selector(BOARD, timeout=WAIT)
    p.done(1)                                                             # the cell has ended ...
    p.points(200)
    seen = int(p.data("points"))
    p.points(seen + 100)                                                  # ... and the board of the job goes on
    cell = p.page.locator(".jp-CodeCell").nth(1)
    assert "From your words" in cell.inner_text() and "32, 16" in cell.inner_text()
    p.page.locator(BOARD).first.scroll_into_view_if_needed()
    p.shot(out / "arc-job.png", whole=True)
    notebook(root, "elsewhere.ipynb", [LOAD, ELSEWHERE])
    other = Page(browser, base)
    other.open("elsewhere.ipynb")
    other.command("notebook:run-all-cells")
    other.page.wait_for_selector("text=ENDED running cancelled", timeout=WAIT)
    assert "train_model" in other.page.locator(".jp-CodeCell").nth(1).inner_text()
    other.page.close()
    cell.locator(PICTURE).first.wait_for(timeout=WAIT)                    # the board became a picture
    for name, theme in (("arc-plan", "JupyterLab Light"), ("arc-plan-dark", "JupyterLab Dark")):
        p.theme(theme)
        p.until("() => !document.querySelector('.jp-Splash, #jupyterlab-splash')")
        cell.locator(".arc-plan h4").first.scroll_into_view_if_needed()
        p.shot(out / f"{name}.png", whole=True)
    p.theme("JupyterLab Light")
    assert not p.errors, p.errors
    p.page.close()


def test_narrow(lab, browser, out):
    base, root = lab
    notebook(root, "narrow.ipynb", [SET_UP, LONG])
    p = Page(browser, base, width=640)
    p.open("narrow.ipynb")
    p.command("notebook:run-all-cells")
    p.points(300)
    inside = p.page.evaluate(f"() => {{ const r = document.querySelector('{BOARD}'); return [r.scrollWidth, r.clientWidth] }}")
    p.page.locator(BOARD).scroll_into_view_if_needed()
    p.shot(out / "narrow.png")
    assert inside[0] <= inside[1]
    p.command("notebook:interrupt-kernel"); p.done(1)                      # the kernel's own interrupt ends it as well
    p.page.wait_for_selector(PICTURE, timeout=WAIT)
    p.page.close()


def test_a_click_on_the_curve_sets_the_learning_rate(lab, browser, out):
    base, root = lab
    notebook(root, "find.ipynb", [SET_UP, FIND, TOLD])
    p = Page(browser, base)
    p.open("find.ipynb")
    p.command("notebook:run-all-cells")
    p.done(2)
    p.page.wait_for_selector(FINDER, timeout=WAIT, state="attached")
    assert p.page.locator(f"{PICTURE}").count() == 1                       # shown once, though the cell ends with it
    p.page.locator(".jp-RenderedSVG").first.scroll_into_view_if_needed()
    line = p.page.locator(FINDER)
    chosen = lambda: float(line.get_attribute("data-chosen") or 0)
    other = f"(old) => {{ const now = Number(document.querySelector('{FINDER}')?.dataset.chosen || 0); return now && now !== old }}"
    there = lambda: p.until(other, old)

    def rate():  # what the kernel says
        p.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = 2; {PANEL}.content.widgets[2].model.clearExecution() }}")
        p.command("notebook:run-cell"); p.done(2)
        text = p.page.locator(".jp-CodeCell").nth(2).locator(".jp-Cell-outputArea").inner_text()
        return [float(v) for v in re.search(r"RATE (\S+) (\S+) 0 ", text).groups()]

    def at(share):  # on the page as it stands: a cell that runs may scroll it
        line.scroll_into_view_if_needed()
        box = line.bounding_box()
        return box["x"] + box["width"] * share, box["y"] + box["height"] * .4

    p.page.mouse.move(*at(.6)); p.page.wait_for_selector(f"{FINDER} .tip b", timeout=WAIT)
    assert re.search(r"lr\s*\S+\s*smoothed loss\s*\S+", line.locator(".tip").inner_text())
    p.shot(out / "finder-hover.png", whole=True)
    old = 0.
    p.page.mouse.click(*at(.6)); there()                                   # a click
    first = chosen()
    assert 10 ** (-7 + 8 * .6) == pytest.approx(first, rel=.15) and rate() == [pytest.approx(first)] * 2
    assert f"chosen {first:.2e}"[:11] in p.page.evaluate(f"() => decodeURIComponent(document.querySelector('{PICTURE}').src)")
    p.shot(out / "finder-clicked.png", whole=True)
    line.focus()
    for key in ("ArrowRight", "ArrowRight", "PageUp", "Enter"): p.page.keyboard.press(key)    # keys
    old = first; there()
    second = chosen()
    assert second == pytest.approx(first * 10 ** (12 * 8 / 99), rel=.02) and "chosen" in line.get_attribute("aria-valuetext")
    assert p.page.evaluate("() => document.activeElement.className") == "arc-finder"          # also on the picture that was drawn anew
    p.shot(out / "finder-keys.png", whole=True)
    p.page.mouse.move(*at(.3)); p.page.mouse.down(); p.page.mouse.move(*at(.5), steps=5); p.page.mouse.up()  # a drag
    old = second; there()
    assert rate() == [pytest.approx(10 ** (-7 + 8 * .5), rel=.15)] * 2
    p.theme("JupyterLab Dark"); p.page.emulate_media(color_scheme="dark")
    p.page.mouse.move(*at(.7)); p.shot(out / "finder-dark.png", whole=True)
    p.save()
    saved = nbformat.read(root / "find.ipynb", 4)
    shown = [data for data in outputs(saved) if "image/svg+xml" in data]
    assert len(shown) == 1 and "chosen" in shown[0]["image/svg+xml"] and "image/png" in shown[0]
    assert (root / "find.ipynb").stat().st_size < 150_000
    assert not any("widget" in kind for data in outputs(saved) for kind in data) and "widgets" not in saved.metadata
    p.page.evaluate(f"() => {PANEL}.sessionContext.session.kernel.restart().then(() => 1)")    # nobody is there to hear any more
    p.until(f"() => !document.querySelector('{FINDER}')")
    assert p.page.locator(PICTURE).count() == 1 and not p.errors, p.errors
    p.page.close()


def test_without_a_front_end(tmp_path, browser, out):
    notebook(tmp_path, "plain.ipynb", [SET_UP, SHORT, LATER])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VSCODE", "COLAB"))}
    env |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "i")}
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--execute", "--to", "html", "--output", "plain", "plain.ipynb"],
                   cwd=tmp_path, env=env, check=True, capture_output=True, timeout=180)
    page = browser.new_page(viewport={"width": 1100, "height": 1200})
    page.goto(f"file://{tmp_path}/plain.html", wait_until="domcontentloaded")
    assert page.locator(".jp-RenderedSVG").count() == 2
    size = page.locator(".jp-RenderedSVG").first.bounding_box()
    page.screenshot(path=out / "nbconvert.png")
    page.close()
    assert size and size["height"] > 250
