"""The play panel in a real JupyterLab: a text streams, Stop is heard, a busy kernel is waited for, and the call writes the same text."""
import re

from test_browser import PANEL, WAIT, Page, browser, lab, notebook, out, pytestmark  # noqa: F401  # fixtures and marks

SET_UP = """\
import time, torch
from arc_nb.tasks.text.generating import gathered, generate, stream
from arc_nb.tasks.text.play import play
from arc_nb.tasks.text.settings import ModelSettings
from arc_nb.tasks.text.tokens import CharTokenizer
from arc_nb.tasks.text.transformer import Transformer
torch.manual_seed(0); torch.set_num_threads(1)
tokenizer = CharTokenizer.fit(['abcdefghijklmnop <'])
model = Transformer(ModelSettings(model_dim=32, num_layers=2, num_heads=2, max_seq_len=64, vocab_size=18))
class LM:
    def stream(self, prompt, **options): return stream(model, tokenizer, prompt, **gathered(options))
    def generate(self, prompt, **options): return generate(model, tokenizer, prompt, **gathered(options))
lm = LM()"""
SHOWN = "panel = play(lm, prompt='abc', seed=7, max_new_tokens=1000)\npanel"
BUSY = "time.sleep(3)"
SAME = """\
import html, re
call = html.unescape(re.search('>(.*)</code>', panel.panel.call.value)[1])
print('SAME', eval(call) == 'abc' + panel.panel.hand.text)"""
TOLD = "document.querySelector('.arc-play .told')?.innerText || ''"


def test_the_panel_writes_while_the_kernel_is_free(lab, browser, out):
    base, root = lab
    notebook(root, "play.ipynb", [SET_UP, SHOWN, BUSY, SAME])
    p = Page(browser, base)
    p.open("play.ipynb")

    def run(cell):
        p.page.evaluate(f"() => {{ {PANEL}.content.activeCellIndex = {cell} }}")
        p.command("notebook:run-cell")

    def told(pattern): p.until(f"() => /{pattern}/.test({TOLD})")

    run(0); p.done(0); run(1); p.done(1)
    p.page.wait_for_selector(".arc-play", timeout=WAIT)
    box = p.page.locator(".arc-play").first
    box.scroll_into_view_if_needed()
    height = box.bounding_box()["height"]
    p.page.click(".arc-play button.go"); told("writing: [1-9]")
    p.page.click(".arc-play button.halt"); told("stopped")
    stopped = int(re.search(r"stopped: ([\d,]+) characters", p.page.inner_text(".arc-play .told"))[1].replace(",", ""))
    assert 0 < stopped < 1000
    run(2); p.until(f"() => {PANEL}.content.widgets[2].model.executionState === 'running'")
    p.page.click(".arc-play button.go"); told("waiting for the kernel")    # a cell runs: the click is kept ...
    told("done: 1,000 characters")                                          # ... and done when it has ended
    p.done(2); box.screenshot(path=out / "play.png")
    run(3); p.done(3); p.page.wait_for_selector("text=SAME True", timeout=WAIT)
    p.page.fill(".arc-play textarea", "<Ω>"); p.page.locator(".arc-play textarea").blur()
    p.page.click(".arc-play button.go"); p.page.wait_for_selector(".arc-play .bad", timeout=WAIT)
    assert "'Ω'" in p.page.inner_text(".arc-play .bad") and abs(box.bounding_box()["height"] - height) < 2    # nothing jumps
    p.theme("JupyterLab Dark")
    assert p.page.evaluate("() => getComputedStyle(document.querySelector('.arc-play')).backgroundColor") == "rgb(21, 24, 30)"
    box.screenshot(path=out / "play-dark.png")
    p.theme("JupyterLab Light")
    p.page.set_viewport_size({"width": 640, "height": 900})
    inside = p.page.evaluate("() => { const r = document.querySelector('.arc-play'); return [r.scrollWidth, r.clientWidth] }")
    assert inside[0] <= inside[1] and not p.errors, p.errors
    p.page.close()
