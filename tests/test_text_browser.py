"""A character model in a real JupyterLab: its samples on the live board change as it learns, and stay in the picture and in the folder."""
import nbformat
from test_browser import BOARD, PANEL, PICTURE, Page, browser, lab, notebook, out, outputs, pytestmark  # noqa: F401  # fixtures and marks

SET_UP = """\
import time, torch
from arc_nb import Callback, CharLM, show
torch.set_num_threads(1)
class Slower(Callback):
    def on_step_end(self, trainer): time.sleep(.01)
text = "Thus the hero spoke: <b>not bold</b>, and the sea was quiet.\\n" * 200
lm = CharLM.from_text(text, model_dim=64, num_layers=1, num_heads=2, max_seq_len=32)"""
LEARN = "lm.fit(epochs=30, learning_rate=1e-2, sample_every=10, output_dir='model', callbacks=[Slower()])"
AGAIN = "show('model')"
PLAY = "lm.play('Thus', seed=3, temperature=0.5, max_new_tokens=60)"
BACK = "import asyncio\nrunning = asyncio.ensure_future(lm.trainer.fit_async(epochs=400))"
STOP = "lm.trainer.stop()\nawait running\nprint('STATE', lm.trainer.status.state)"
TEXTS = f"{BOARD} .texts"
TOLD = "document.querySelector('.arc-play .told')?.innerText || ''"


def test_samples_on_the_board_and_playing(lab, browser, out):
    base, root = lab
    notebook(root, "text.ipynb", [SET_UP, LEARN, AGAIN, PLAY, BACK, STOP])
    p = Page(browser, base)
    p.open("text.ipynb")

    def run(cell):
        p.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = {cell} }}")
        p.command("notebook:run-cell")

    run(0); p.done(0); run(1)
    p.points(30)
    p.until(f"() => document.querySelectorAll('{TEXTS} .text').length > 0")
    first = p.page.inner_text(TEXTS)
    p.page.locator(TEXTS).scroll_into_view_if_needed()
    p.shot(out / "text-light.png")
    p.theme("JupyterLab Dark")
    p.until(f"(old) => document.querySelector('{TEXTS}').innerText !== old", first)
    p.until(f"() => document.querySelector('{TEXTS}').innerText.includes('<b>not')")    # it has learned, and markup is shown as it is
    assert p.page.evaluate(f"() => {PANEL}.content.widgets[1].model.executionState") == "running"
    assert not p.page.locator(f"{TEXTS} .text b").count()
    p.shot(out / "text-dark.png")
    inside = p.page.evaluate(f"() => {{ const r = document.querySelector('{BOARD}'); return [r.scrollWidth, r.clientWidth] }}")
    assert inside[0] <= inside[1]
    p.page.click(f"{BOARD} .stop"); p.done(1)
    cell = p.page.locator(".jp-CodeCell").nth(1)
    cell.locator(PICTURE).wait_for()
    p.shot(out / "text-end-dark.png", whole=True)
    p.theme("JupyterLab Light")
    run(2); p.done(2)
    run(3); p.done(3)
    p.page.wait_for_selector(".arc-play")
    p.page.click(".arc-play button.go")
    p.until(f"() => /done: 60 characters/.test({TOLD})")
    p.page.locator(".arc-play").screenshot(path=out / "text-play.png")
    run(4); p.done(4)
    p.page.click(".arc-play button.go")
    p.until("() => /trained/.test(document.querySelector('.arc-play .bad')?.innerText || '')")   # it says why not now
    p.shot(out / "text-async.png", whole=True)
    run(5); p.done(5)
    p.page.wait_for_selector("text=STATE stopped")
    p.page.click(".arc-play button.go")
    p.until(f"() => /done: 60 characters/.test({TOLD})")
    p.save()
    pictures = [data["image/svg+xml"] for data in outputs(nbformat.read(root / "text.ipynb", 4)) if "image/svg+xml" in data]
    assert len(pictures) >= 2 and all("sample" in one.lower() or "step" in one for one in pictures) and not p.errors, p.errors
    p.page.close()
