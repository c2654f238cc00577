// The learning rate finder of arc_nb: an anywidget without a view. Its model says which picture of the page is meant and where the chart lies
// in it (see `told` in arc_nb/watch/lr_finder.py); a line is laid over that picture, which follows the pointer, and a click sends the rate.
import css from "./finder.css";

const KEYS = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
const WAITED = 1500;  // milliseconds after which a choice that has not been answered is said to wait

export function rate(x) {  // as in draw/svg.py
  if (!Number.isFinite(x) || x === 0) return String(x);
  if (Math.abs(x) >= 0.01 && Math.abs(x) < 1000) return String(Number(x.toPrecision(3)));
  const [mantissa, power] = x.toExponential(2).split("e");
  return `${mantissa.endsWith("0") ? mantissa.slice(0, -1) : mantissa}e${Number(power)}`;
}

function number(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  return x === 0 ? "0" : size >= 1e7 || size < 1e-3 ? rate(x) : size >= 999.5 ? Math.round(x).toLocaleString("en-US") : x.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

// ---------------------------------------------------------------- the line
const make = (kind, cls, parent) => {
  const node = document.createElement(kind);
  node.className = cls;
  if (parent) parent.appendChild(node);
  return node;
};

// What stays when JupyterLab draws an output anew; elsewhere what holds the picture.
const homeOf = (image) => image.closest(".jp-RenderedSVG")?.parentElement || image.parentElement;

// The line over one picture.
class Overlay {
  constructor(image, choose) {
    Object.assign(this, { choose, at: null, down: false, asked: null, state: null, home: homeOf(image) });
    const box = this.box = make("div", "arc-finder");
    box.tabIndex = 0;
    for (const [name, value] of [["role", "slider"], ["aria-label", "learning rate"], ["aria-orientation", "horizontal"]]) box.setAttribute(name, value);
    make("style", "", box).textContent = css;
    this.rule = make("div", "rule", box);
    this.spot = make("div", "spot", box);
    this.tip = make("div", "tip", box);
    this.quiet(true);
    box.addEventListener("pointerdown", (e) => { if (e.button) return; this.down = true; box.setPointerCapture(e.pointerId); box.focus({ preventScroll: true }); this.follow(e); e.preventDefault(); });
    box.addEventListener("pointermove", (e) => this.follow(e));
    box.addEventListener("pointerup", (e) => { if (!this.down) return; this.down = false; this.follow(e); this.send(); });
    box.addEventListener("pointercancel", () => { this.down = false; });
    box.addEventListener("pointerleave", () => { if (!this.down && document.activeElement !== box) this.quiet(true); });
    for (const name of ["mousedown", "click", "dblclick"]) box.addEventListener(name, (e) => e.stopPropagation());  // the notebook would take the focus away
    box.addEventListener("focus", () => { if (this.at === null) this.at = this.begin(); this.draw(); });
    box.addEventListener("blur", () => { if (!box.matches(":hover")) this.quiet(true); });
    box.addEventListener("keydown", (e) => this.key(e));
    if (getComputedStyle(this.home).position === "static") this.home.style.position = "relative";
    this.home.appendChild(box);
    this.resize = new ResizeObserver(() => this.lay());
    this.resize.observe(this.home);
    this.take(image);
  }
  take(image) {  // the picture, or the one that has been drawn in its place
    if (this.image) this.resize.unobserve(this.image);
    this.image = image;
    this.resize.observe(image);
    image.addEventListener("load", () => this.lay());
    this.lay();
  }
  quiet(yes) { this.box.toggleAttribute("data-quiet", yes); }

  tell(state) {  // new numbers, or an answer
    if (this.state && state.chosen !== this.state.chosen) this.asked = null;
    if (state.complaint) this.asked = null;
    this.state = state;
    this.box.dataset.chosen = state.chosen === null ? "" : String(state.chosen);
    this.box.setAttribute("aria-valuemin", "0");
    this.box.setAttribute("aria-valuemax", String(Math.max(0, state.rates.length - 1)));
    this.lay();
  }

  lay() {  // where the chart of the picture is on the page
    const { image, box, state } = this;
    if (!state || !image.isConnected) return;
    const own = image.getBoundingClientRect(), home = box.offsetParent ? box.offsetParent.getBoundingClientRect() : null;
    if (!home || !own.width) return;
    const scale = own.width / state.size[0], [left, top, right, bottom] = state.box.map((v) => v * scale);
    const parent = box.offsetParent;
    Object.assign(box.style, { left: `${own.left - home.left - parent.clientLeft + parent.scrollLeft + left}px`, top: `${own.top - home.top - parent.clientTop + parent.scrollTop + top}px`,
      width: `${right - left}px`, height: `${bottom - top}px` });
    this.scale = scale;
    if (!box.hasAttribute("data-quiet")) this.draw();
  }

  position(lr) {  // share of the chart's width
    const [lo, hi] = this.state.ends.map(Math.log);
    return (Math.log(lr) - lo) / (hi - lo);
  }
  nearest(share) {
    let best = 0;
    this.state.rates.forEach((lr, i) => { if (Math.abs(this.position(lr) - share) < Math.abs(this.position(this.state.rates[best]) - share)) best = i; });
    return best;
  }
  begin() {
    const { chosen, marks } = this.state, lr = chosen || marks.suggestion || marks.now;
    return lr && this.state.rates.length ? this.nearest(this.position(lr)) : 0;
  }

  follow(e) {
    if (!this.state.rates.length) return;
    const own = this.box.getBoundingClientRect();
    this.at = this.nearest((e.clientX - own.left) / own.width);
    this.draw();
  }
  key(e) {
    if (e.altKey || e.ctrlKey || e.metaKey || !this.state.rates.length) return;
    const last = this.state.rates.length - 1;
    if (e.key in KEYS) this.at = Math.min(last, Math.max(0, (this.at ?? this.begin()) + KEYS[e.key]));
    else if (e.key === "Enter" || e.key === " ") { if (this.at === null) this.at = this.begin(); this.send(); }
    else return;
    e.preventDefault(); e.stopPropagation();  // the notebook would move its cursor
    this.draw();
  }
  send() {
    const lr = this.state.rates[this.at];
    this.asked = { lr, since: Date.now() };
    setTimeout(() => { if (this.asked && this.box.isConnected) this.draw(); }, WAITED + 50);
    this.state.complaint = "";
    this.choose(lr);
    this.draw();
  }

  draw() {
    const { state, at, scale } = this;
    if (!state || at === null || !state.rates.length) return;
    const index = Math.min(at, state.rates.length - 1), lr = state.rates[index], wide = this.box.clientWidth, x = this.position(lr) * wide;
    this.quiet(false);
    this.box.dataset.theme = state.theme === "auto" ? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light") : state.theme;  // as the picture
    this.rule.style.left = `${x - 0.75}px`;
    this.spot.style.left = `${x}px`;
    this.spot.style.top = `${(state.tops[index] - state.box[1]) * scale}px`;
    const name = make("span", ""), value = make("b", ""), loss = make("span", ""), below = make("div", state.complaint ? "bad" : "");
    name.textContent = "lr"; value.textContent = rate(lr); loss.textContent = `smoothed loss ${number(state.losses[index])}`;
    below.textContent = state.complaint || (this.asked ? (Date.now() - this.asked.since > WAITED ? `${rate(this.asked.lr)} waits until the kernel is free` : `choosing ${rate(this.asked.lr)} …`)
      : state.chosen && this.position(state.chosen).toFixed(4) === this.position(lr).toFixed(4) ? "chosen" : "click or Enter chooses");
    this.tip.replaceChildren(name, value, loss, below);
    const room = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(wide - room, x > wide / 2 ? x - room - 10 : x + 10))}px`;
    this.box.setAttribute("aria-valuenow", String(index));
    this.box.setAttribute("aria-valuetext", `${rate(lr)}, ${loss.textContent}${below.textContent ? `, ${below.textContent}` : ""}`);
  }
  remove() {
    this.resize.disconnect();
    this.box.remove();
  }
}

// All pictures of one finder on the page, as they come and go.
class Finder {
  constructor(model) {
    Object.assign(this, { model, overlays: new Map(), due: 0 });
    this.observer = new MutationObserver(() => this.soon());
    this.observer.observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["src"] });
    this.changed = () => this.update();
    this.lost = () => this.end();
    this.status = (_, status) => { if (["restarting", "autorestarting", "terminating", "dead"].includes(status)) this.end(); };
    model.on("change:state", this.changed);
    model.on("comm_live_update", this.lost);
    this.kernel = model.widget_manager?.kernel;  // JupyterLab's; nothing elsewhere
    this.kernel?.statusChanged?.connect(this.status);
    this.kernel?.disposed?.connect(this.lost);
    this.update();
  }
  soon() { if (!this.due) this.due = requestAnimationFrame(() => { this.due = 0; this.look(); }); }

  update() {
    const text = this.model.get("state");
    if (!text) return;
    this.state = JSON.parse(text);
    this.look();
    for (const overlay of this.overlays.values()) overlay.tell({ ...this.state });
  }
  pictures() {
    const id = `arc-finder-${this.state.id}`, inline = [...document.querySelectorAll(`g[id="${id}"]`)].map((g) => g.ownerSVGElement);
    return new Set([...document.querySelectorAll('img[src^="data:image/svg+xml"]')].filter((img) => img.src.includes(id)).concat(inline));
  }
  look() {
    if (!this.state) return;
    const found = this.pictures(), free = [...found].filter((image) => !this.overlays.has(image));
    for (const [image, overlay] of [...this.overlays]) if (!found.has(image) || !overlay.box.isConnected) {
      const k = overlay.box.isConnected ? free.findIndex((other) => homeOf(other) === overlay.home) : -1;
      this.overlays.delete(image);
      if (k < 0) overlay.remove();
      else { this.overlays.set(free[k], overlay); overlay.take(free[k]); }
    }
    for (const image of found) if (!this.overlays.has(image)) {
      const overlay = new Overlay(image, (lr) => this.model.send({ do: "lr", lr }));
      this.overlays.set(image, overlay);
      overlay.tell({ ...this.state });
    }
  }
  end() {
    this.observer.disconnect();
    cancelAnimationFrame(this.due);
    this.model.off("change:state", this.changed);
    this.model.off("comm_live_update", this.lost);
    this.kernel?.statusChanged?.disconnect(this.status);
    this.kernel?.disposed?.disconnect(this.lost);
    for (const overlay of this.overlays.values()) overlay.remove();
    this.overlays.clear();
  }
}

function initialize({ model }) {
  const finder = new Finder(model);
  return () => finder.end();
}

export default { initialize, render() {} };
