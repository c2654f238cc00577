// The live board of arc_nb: one anywidget. It draws what `arc_nb/watch/widget.py` puts into its traits and sends what is clicked.
//   board: JSON text, see `layout` in that chapter     data: float32 x and y of the run's lines, then of the cards     past: of the earlier runs     maps: of the layers' heat maps     texts: JSON, what the model wrote, the newest first
import uPlot from "uplot";
import uplotCss from "uplot/dist/uPlot.min.css";
import css from "./board.css";

const FONT = '11px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif';
const INKS = { training: "ok", validating: "train", paused: "warn", completed: "ok", stopped: "warn", interrupted: "warn", terminated: "warn", failed: "bad" };
const EMPTY = { title: "", run: "", state: "starting", progress: 0, facts: [], lines: [], past: [], cards: [], heats: [], epochs: [], bad: [], span: 1, log: true, lr: "", live: false, message: "" };

// ---------------------------------------------------------------- numbers and ticks, as in draw/svg.py
const trim = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);

function number(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (x === 0) return "0";
  if (size >= 1e7 || size < 1e-3) return x.toExponential(2).replace("e+", "e");
  if (size >= 999.5) return Math.round(x).toLocaleString("en-US");
  return x.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

function tick(value, all) {
  const big = Math.max(...all.map(Math.abs));
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3 || big < 1e-2 || big >= 1e7) return trim(value.toExponential(1).split("e")[0]) + "e" + Number(value.toExponential(1).split("e")[1]);
  return Number(value.toPrecision(10)).toLocaleString("en-US", { maximumFractionDigits: 10 });
}

function ticks(lo, hi, most) {
  const raw = (hi - lo) / most;
  if (!(raw > 0)) return [lo];
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10, 20].map((m) => m * base).find((s) => s >= raw * (1 - 1e-9));
  const out = [];
  for (let k = Math.ceil(lo / step - 1e-9); k <= Math.floor(hi / step + 1e-9); k++) out.push(Number((k * step).toPrecision(12)));
  return out;
}

function logTicks(lo, hi, most) {
  const first = Math.floor(Math.log10(lo)), last = Math.ceil(Math.log10(hi));
  const inside = (parts, every) => {
    const out = [];
    for (let p = first; p <= last; p += every) for (const m of parts) out.push(Number(`${m}e${p}`));
    return out.filter((v) => v >= lo * (1 - 1e-9) && v <= hi * (1 + 1e-9));
  };
  for (const parts of [[1, 2, 5], [1, 3], [1]]) {
    const found = inside(parts, 1);
    if (found.length <= most) return found.length > 2 ? found : ticks(lo, hi, most);
  }
  return inside([1], Math.ceil((last - first) / (most - 1)));
}

// ---------------------------------------------------------------- small helpers
const make = (kind, cls, parent, text) => {
  const node = document.createElement(kind);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
};
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const stressed = (node, text) => {  // "epoch **4** of 5"
  if (node.dataset.text === text) return;
  node.dataset.text = text;
  node.replaceChildren(...text.split("**").map((piece, i) => { const part = document.createElement(i % 2 ? "b" : "span"); part.textContent = piece; return part; }));
};
const ink = (role) => `var(--${role === "raw" ? "train" : role})`;

function pageIsDark() {  // what the notebook's front end says, then the system
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  if (body.dataset.vscodeThemeKind) return /dark|high-contrast$/.test(body.dataset.vscodeThemeKind);
  if (body.classList.contains("vscode-dark")) return true;
  if (body.classList.contains("vscode-light")) return false;
  if (document.documentElement.getAttribute("theme")) return document.documentElement.getAttribute("theme") === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function floats(view) {  // a trait of bytes as numbers; copied, for the offset may be odd
  if (!view || !view.byteLength) return new Float32Array(0);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function unpack(lines, numbers, start) {  // [{n, ..}] -> the same with x and y
  let at = start;
  for (const line of lines) {
    line.x = numbers.subarray(at, at + line.n);
    line.y = numbers.subarray(at + line.n, at + 2 * line.n);
    at += 2 * line.n;
  }
  return at;
}

function nearest(x, value) {  // index of the nearest in an ascending array
  let lo = 0, hi = x.length - 1;
  while (hi - lo > 1) { const mid = (lo + hi) >> 1; if (x[mid] <= value) lo = mid; else hi = mid; }
  return Math.abs(x[lo] - value) <= Math.abs(x[hi] - value) ? lo : hi;
}

// ---------------------------------------------------------------- the chart
class Chart {
  constructor(box, tip) {
    Object.assign(this, { box, tip, zoom: null, hidden: new Set(), log: true, view: EMPTY, plot: null, key: "" });
    this.resize = new ResizeObserver(() => this.fit());
    this.resize.observe(box);
  }
  fit() {  // a hidden page has no width: keep the last
    if (this.plot && this.box.clientWidth && this.plot.width !== this.size().width) this.plot.setSize(this.size());
  }
  size() { return { width: Math.max(200, this.box.clientWidth), height: 250 }; }
  color(role) { return getComputedStyle(this.box).getPropertyValue(`--${role === "raw" ? "train" : role}`).trim(); }
  shown(line) { return !this.hidden.has(line.role === "raw" ? "train" : line.name); }

  options(lines) {
    const log = this.log, faint = () => this.color("faint"), rule = () => this.color("line");
    const series = lines.map((line) => ({
      label: line.name, pxAlign: 0, show: this.shown(line), stroke: () => this.color(line.role), alpha: line.role === "raw" ? 0.3 : 1,
      width: line.role === "raw" ? 1 : line.role === "ghost" ? 1.4 : 1.8,
      points: line.dots ? { show: line.n <= 80, size: 7, width: 1.8, fill: () => this.color("bg"), stroke: () => this.color(line.role) } : { show: line.n === 1, size: 5 },
    }));
    return {
      ...this.size(), legend: { show: false }, padding: [8, 19, 0, 0],
      cursor: {
        y: false, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => { this.zoom = null; this.draw(); return null; } },
        points: { size: (u, i) => (lines[i - 1].role === "raw" ? 0 : 7) },
        dataIdx: (u, i, at) => {
          const ys = u.data[i];
          for (let d = 0; d < ys.length; d++) { if (ys[at - d] != null) return at - d; if (ys[at + d] != null) return at + d; }
          return at;
        },
      },
      scales: {
        x: { time: false, range: () => this.zoom || [0, this.view.span] },
        y: { distr: log ? 3 : 1, range: (u, lo, hi) => {
          if (lo == null || !Number.isFinite(lo)) return log ? [0.1, 1] : [0, 1];
          if (log) { const room = Math.max((hi / lo) ** 0.05, 1.02); return [lo / room, hi * room]; }
          const room = (hi - lo) * 0.05 || Math.abs(hi) * 0.1 || 1;
          return [lo - room, hi + room];
        } },
      },
      series: [{}, ...series],
      axes: [
        { stroke: faint, font: FONT, size: 28, gap: 6, grid: { show: false }, ticks: { show: false }, splits: (u, i, lo, hi) => ticks(lo, hi, Math.max(2, Math.floor(u.width / 80))),
          values: (u, at) => at.map((v) => tick(v, at)) },
        { stroke: faint, font: FONT, size: 46, gap: 8, grid: { stroke: rule, width: 1 }, ticks: { show: false }, splits: (u, i, lo, hi) => (log ? logTicks : ticks)(lo, hi, 5), filter: (u, at) => at,
          values: (u, at) => at.map((v) => tick(v, at)) },
      ],
      hooks: {
        setSelect: [(u) => {
          if (u.select.width <= 4) return;
          const [lo, hi] = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
          u.setSelect({ left: 0, width: 0 }, false);
          if (this.lines().some((line) => this.shown(line) && line.x.filter((at) => at >= lo && at <= hi).length > 1)) { this.zoom = [lo, hi]; this.draw(); }
        }],
        setCursor: [(u) => this.readout(u)],
        drawAxes: [(u) => this.marks(u)],
        draw: [(u) => this.ends(u, lines)],
      },
    };
  }

  marks(u) {  // the ends of epochs, dotted, with their names where there is room
    const { ctx, bbox } = u, px = uPlot.pxRatio, { epochs } = this.view;
    const every = Math.max(1, Math.ceil((epochs.length * 5 * px) / bbox.width));
    ctx.save();
    Object.assign(ctx, { strokeStyle: this.color("line"), fillStyle: this.color("faint"), lineWidth: px, textAlign: "right", textBaseline: "top" });
    ctx.font = FONT.replace("11px", `${10.5 * px}px`);
    let free = bbox.left;
    const [lo, hi] = [u.scales.x.min, u.scales.x.max];
    for (let i = every - 1; i < epochs.length; i += every) {
      const [at, name] = epochs[i];
      if (at < lo || at > hi) continue;
      const x = Math.round(u.valToPos(at, "x", true));
      ctx.setLineDash([2 * px, 3 * px]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      const wide = ctx.measureText(name).width;
      if (x - wide - 6 * px >= free) { ctx.fillText(name, x - 4 * px, bbox.top + 1 * px); free = x + 4 * px; }
    }
    ctx.setLineDash([]);
    Object.assign(ctx, { textBaseline: "alphabetic", font: FONT.replace("11px", `${11 * px}px`) });
    ctx.fillText("step", bbox.left - 8 * px, bbox.top + bbox.height + 14.5 * px);
    Object.assign(ctx, { fillStyle: this.color("bad"), textAlign: "center", font: FONT.replace("11px", `bold ${13 * px}px`) });
    for (const at of this.view.bad) if (at >= lo && at <= hi) ctx.fillText("×", u.valToPos(at, "x", true), bbox.top + bbox.height - 2 * px);
    ctx.restore();
  }

  ends(u, lines) {  // a dot: here we are
    const { ctx, bbox } = u, px = uPlot.pxRatio;
    for (const line of this.lines()) {
      if (!line.end || !line.n || !this.shown(line)) continue;
      const at = line.x[line.n - 1], y = line.y[line.n - 1];
      if (at < u.scales.x.min || at > u.scales.x.max || !Number.isFinite(y) || (this.log && y <= 0)) continue;
      ctx.save(); ctx.fillStyle = this.color(line.role); ctx.beginPath();
      ctx.arc(u.valToPos(at, "x", true), u.valToPos(y, "y", true), 3.6 * px, 0, 7); ctx.fill(); ctx.restore();
    }
  }

  readout(u) {
    const { left } = u.cursor;
    if (!(left >= 0)) { this.tip.hidden = true; return; }
    const x = u.posToVal(left, "x"), lines = this.lines().filter((line) => line.n && this.shown(line));
    if (!lines.length) { this.tip.hidden = true; return; }
    const lead = lines.find((line) => line.role === "raw") || lines[0];
    if (x > lead.x[lead.n - 1] + 0.04 * (u.scales.x.max - u.scales.x.min) && !this.view.past.length) { this.tip.hidden = true; return; }
    const step = Math.round(lead.x[nearest(lead.x, x)]);
    const epoch = this.view.epochs.filter(([at]) => at < step).length + 1;
    const at = make("div", "at", null, `step ${step.toLocaleString("en-US")} · epoch ${epoch}`);
    const rows = lines.map((line) => {
      const row = make("div"), mark = make("i", "", row);
      mark.style.setProperty("--ink", ink(line.role));
      if (line.role === "raw") mark.style.opacity = 0.4;
      make("span", "", row, line.name);
      make("b", "", row, number(line.y[nearest(line.x, x)]));
      return row;
    });
    this.tip.replaceChildren(at, ...rows);
    this.tip.hidden = false;
    const over = u.over.offsetLeft, wide = this.tip.offsetWidth;
    this.tip.style.left = `${left > u.over.offsetWidth / 2 ? over + left - wide - 12 : over + left + 12}px`;
  }

  lines() { return [...this.view.past, ...this.view.lines]; }  // earlier runs lie behind

  draw(view = this.view) {
    this.view = view;
    const lines = this.lines(), log = this.log && view.log;
    const key = JSON.stringify([log, ...lines.map((line) => [line.name, line.role, line.dots && line.n > 80, line.n === 1])]);
    const clean = (ys) => Array.from(ys, (v) => (Number.isFinite(v) && !(log && v <= 0) ? v : null));
    const tables = lines.map((line) => [Array.from(line.x), clean(line.y)]);
    const data = tables.length ? uPlot.join(tables) : [[]];
    if (key !== this.key) {
      if (this.plot) this.plot.destroy();
      const wish = this.log;
      this.log = log; this.key = key;
      this.plot = new uPlot(this.options(lines), data, this.box);
      this.log = wish;
    } else { this.plot.setData(data); this.fit(); }
  }
  toggle(name) {
    if (this.hidden.has(name)) this.hidden.delete(name); else this.hidden.add(name);
    this.key = ""; this.draw();
  }
  destroy() { this.resize.disconnect(); if (this.plot) this.plot.destroy(); }
}

// ---------------------------------------------------------------- the cards
function sparkline(svg, line, span) {
  const xs = line.x, ys = line.y;
  let lo = Infinity, hi = -Infinity;
  for (const y of ys) if (Number.isFinite(y)) { lo = Math.min(lo, y); hi = Math.max(hi, y); }
  if (hi === lo) { lo -= 1; hi += 1; }
  const points = [];
  for (let i = 0; i < xs.length; i++) if (Number.isFinite(ys[i])) points.push(`${((xs[i] / span) * 190).toFixed(1)},${(27 - ((ys[i] - lo) / (hi - lo)) * 24).toFixed(1)}`);
  svg.firstChild.setAttribute("points", points.join(" "));
}

function cards(box, list, span) {
  while (box.children.length > list.length) box.lastChild.remove();
  while (box.children.length < list.length) {
    const card = make("div", "card", box);
    make("div", "k", card); make("div", "v", card);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 190 30"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
    svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
    card.appendChild(svg);
  }
  box.classList.toggle("many", list.length > 4);
  list.forEach((card, i) => {
    const [k, v, svg] = box.children[i].children;
    put(k, card.title); k.title = card.title;
    if (v.dataset.text !== card.value + card.unit) {
      v.dataset.text = card.value + card.unit; v.textContent = card.value;
      if (card.unit) make("small", "", v, card.unit);
    }
    svg.style.setProperty("--ink", ink(card.role));
    sparkline(svg, card, span);
  });
}

// ---------------------------------------------------------------- the layers
const ROW = 13;  // pixels

class Maps {  // heat maps of the same layers, side by side; below each other where there is no room
  constructor(root) {
    this.root = root; this.key = ""; this.list = []; this.maps = [];
    this.names = make("div", "names", root); this.box = make("div", "maps", root);
    this.resize = new ResizeObserver(() => this.paint());
    this.resize.observe(this.box);
  }
  draw(list) {
    this.list = list; this.root.hidden = !list.length;
    if (!list.length) return;
    const key = JSON.stringify(list.map((map) => [map.title, map.unit, map.rows, map.left]));
    if (key !== this.key) { this.key = key; this.build(); }
    list.forEach((map, i) => this.legend(map, this.maps[i]));
    this.paint();
  }
  build() {
    const named = (parent, rows, left) => {
      parent.replaceChildren(...rows.map((row) => { const node = make("span", "", null, row); node.title = row; return node; }));
      if (left) make("span", "left", parent, `${left} left out`);
    };
    const { rows, left } = this.list[0];
    named(this.names, rows, left);
    this.box.replaceChildren();
    this.maps = this.list.map((map) => {
      const node = make("figure", "map", this.box), head = make("figcaption", "", node);
      make("b", "", head, map.title); make("span", "", head, map.unit);
      const key = make("span", "key", head), body = make("div", "body", node);
      named(make("div", "names own", body), rows, left);
      const canvas = make("canvas", "", body), axis = make("div", "axis", node), tip = make("div", "tip", body);
      canvas.setAttribute("role", "img"); canvas.height = 1;
      tip.hidden = true;
      const parts = { node, key, canvas, axis, tip };
      canvas.onpointermove = (event) => this.readout(event, parts);
      canvas.onpointerleave = () => { tip.hidden = true; };
      return parts;
    });
  }
  legend(map, { key, axis, canvas }) {
    const told = JSON.stringify([map.key, map.start, map.end]);
    if (key.dataset.told === told) return;
    key.dataset.told = told;
    const [lo, shades, hi] = map.key;
    key.replaceChildren(lo, ...shades.map(([role, dense]) => { const node = make("i"); node.style.setProperty("--ink", ink(role)); node.style.opacity = dense; return node; }), hi);
    axis.replaceChildren(...ticks(map.start, map.end, 3).map((at, i, all) => {
      const node = make("span", "", null, tick(at, all)), part = (at - map.start) / (map.end - map.start);
      node.style.left = `${100 * part}%`; node.style.transform = `translateX(${part < 0.04 ? 0 : part > 0.93 ? -100 : -50}%)`;
      return node;
    }));
    canvas.setAttribute("aria-label", `${map.title} of ${map.rows.length} layers, to step ${Math.round(map.end)}`);
  }
  paint() {
    const style = getComputedStyle(this.root), px = window.devicePixelRatio || 1;
    this.list.forEach((map, i) => {
      const { canvas } = this.maps[i] || {}, rows = map.rows.length, wide = canvas && canvas.clientWidth;
      if (!wide) return;
      const high = rows * ROW, ctx = canvas.getContext("2d");
      canvas.style.height = `${high}px`;
      canvas.width = Math.round(wide * px); canvas.height = Math.round(high * px);
      ctx.scale(px, px);
      const step = wide / map.columns, gap = step > 4 ? 0.8 : 0;
      for (let row = 0; row < rows; row++) for (let column = 0; column < map.columns; column++) {
        const shade = map.shades[map.codes[row * map.columns + column] - 1];
        if (!shade) continue;
        ctx.fillStyle = style.getPropertyValue(`--${shade[0]}`).trim(); ctx.globalAlpha = shade[1];
        ctx.fillRect(column * step, row * ROW + 0.7, step - gap, ROW - 1.4);
      }
      ctx.globalAlpha = 1;
    });
  }
  readout(event, { canvas, tip }) {
    const i = this.maps.findIndex((parts) => parts.canvas === canvas), map = this.list[i];
    if (!map) return;
    const column = Math.min(map.columns - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * map.columns)));
    const row = Math.min(map.rows.length - 1, Math.max(0, Math.floor(event.offsetY / ROW))), value = map.values[row * map.columns + column];
    if (!map.codes[row * map.columns + column]) { tip.hidden = true; return; }
    const at = map.start + ((column + 1) / map.columns) * (map.end - map.start);
    const said = map.scale === "share" ? `${(100 * value).toFixed(1)} %` : value === Infinity ? "not finite" : number(value);
    tip.replaceChildren(make("div", "at", null, `${map.rows[row]} · to step ${Math.round(at).toLocaleString("en-US")}`), make("b", "", null, said));
    tip.hidden = false;
    const left = canvas.offsetLeft + event.offsetX, over = event.offsetX > canvas.clientWidth / 2;
    tip.style.top = `${row * ROW + ROW + 4}px`; tip.style.left = `${over ? left - tip.offsetWidth - 8 : left + 8}px`;
  }
  destroy() { this.resize.disconnect(); }
}

function unmap(list, numbers) {  // [{rows, columns, ..}] -> the same with values and the numbers of their shades
  let at = 0;
  for (const map of list) {
    const n = map.rows.length * map.columns;
    map.values = numbers.subarray(at, at + n); map.codes = numbers.subarray(at + n, at + 2 * n);
    at += 2 * n;
  }
}

// ---------------------------------------------------------------- what the model wrote
class Texts {  // the newest first; earlier ones fainter, in a box that scrolls
  constructor(root) {
    this.root = root; this.told = ""; root.hidden = true;
    const head = make("div", "head", root);
    make("b", "", head, "Text"); make("span", "", head, "written by the model, newest first");
    this.list = make("div", "list", root);
    this.list.tabIndex = 0; this.list.setAttribute("role", "log"); this.list.setAttribute("aria-label", "texts that the model wrote, newest first");
  }
  draw(told) {
    if (told === this.told) return;
    this.told = told;
    const list = told ? JSON.parse(told) : [];
    this.root.hidden = !list.length;
    this.list.replaceChildren(...list.flatMap(([title, text]) => [make("span", "at", null, title), make("div", "text", null, text.replace(/^\n+/, "").trimEnd())]));
  }
}

// ---------------------------------------------------------------- the board
function render({ model, el }) {
  const root = make("div", "arc-board", el);
  make("style", "", root).textContent = uplotCss + css;
  const header = make("header", "", root), who = make("div", "who", header), does = make("div", "does", header);
  const title = make("b", "title", who), pill = make("span", "pill", who), dot = make("i", "", pill), state = make("span", "", pill), run = make("span", "run", who);
  pill.setAttribute("role", "status");
  const button = (cls, text, label, press) => {
    const node = make("button", cls, does, text);
    node.type = "button"; node.setAttribute("aria-label", label); node.onclick = press;
    return node;
  };
  const asked = { stop: false, save: 0, lr: false };
  let view = { ...EMPTY };
  const pause = button("pause", "Pause", "Pause training", () => model.send({ do: view.state === "paused" ? "resume" : "pause" }));
  const stop = button("stop", "Stop", "Stop training after this step", () => { asked.stop = true; model.send({ do: "stop" }); update(); });
  const save = button("save", "Save now", "Save a checkpoint now", () => {
    asked.save = 1; model.send({ do: "save" }); update();
    setTimeout(() => { asked.save = 0; update(); }, 800);
  });
  const label = make("label", "", does, "lr "), lr = make("input", "lr", label);
  lr.setAttribute("aria-label", "learning rate; Enter sets it"); lr.inputMode = "decimal"; lr.spellcheck = false; lr.autocomplete = "off";
  const flag = (bad) => { lr.classList.toggle("bad", bad); lr.setAttribute("aria-invalid", String(bad)); lr.title = bad ? "a learning rate is a positive number, such as 1e-3" : "Enter sets the learning rate"; };
  const wrong = () => { const value = Number(lr.value.trim().replace(",", ".")); return !(lr.value.trim() && Number.isFinite(value) && value > 0); };
  lr.oninput = () => flag(wrong());
  lr.onblur = () => { flag(false); lr.value = view.lr; };
  lr.onkeydown = (event) => {
    event.stopPropagation();  // the notebook's own keys
    if (event.key === "Escape") lr.blur();
    if (event.key !== "Enter") return;
    event.preventDefault(); flag(wrong());
    if (!wrong()) { const value = Number(lr.value.trim().replace(",", ".")); model.send({ do: "lr", lr: value }); view.lr = lr.value.trim(); lr.blur(); }
  };
  for (const kind of ["keyup", "keypress"]) lr.addEventListener(kind, (event) => event.stopPropagation());
  const bar = make("div", "", make("div", "bar", root)), facts = make("div", "facts", root), main = make("div", "main", root);
  bar.parentNode.setAttribute("role", "progressbar"); bar.parentNode.setAttribute("aria-label", "progress of the run");
  const section = make("section", "", main), head = make("div", "head", section);
  make("b", "", head, "Loss");
  const log = make("button", "log", head, "log"), legend = make("span", "legend", head), box = make("div", "chart", section);
  log.type = "button"; log.setAttribute("aria-label", "logarithmic axis");
  const quiet = make("div", "quiet", box, "waiting for the first step"), tip = make("div", "tip", box), aside = make("aside", "", main), maps = new Maps(make("div", "layers", root)), texts = new Texts(make("section", "texts", root)), note = make("div", "note", root);
  tip.hidden = true;
  const chart = new Chart(box, tip);
  chart.log = model.get("log");
  log.onclick = () => { chart.log = !chart.log; model.set("log", chart.log); model.save_changes(); update(); };

  const theme = () => {
    const wish = ["light", "dark"].includes(view.theme) ? view.theme : pageIsDark() ? "dark" : "light";
    if (root.dataset.theme === wish) return;
    root.dataset.theme = wish;
    if (chart.plot) { chart.key = ""; chart.draw(); }
    maps.paint();
  };
  const watcher = new MutationObserver(theme), system = matchMedia("(prefers-color-scheme: dark)");
  watcher.observe(document.body, { attributes: true }); watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["theme"] });
  system.addEventListener("change", theme);

  function names() {  // a button a line; the raw one goes with its smoothed line
    const list = [...view.lines, ...view.past].filter((line) => line.role !== "raw"), key = JSON.stringify([list.map((line) => [line.name, line.role]), [...chart.hidden]]);
    if (legend.dataset.key === key) return;
    legend.dataset.key = key;
    legend.replaceChildren(...list.map((line) => {
      const node = make("button"), mark = make("i", "", node);
      node.type = "button"; node.append(line.name); node.title = `show or hide ${line.name}`;
      mark.style.setProperty("--ink", ink(line.role));
      node.setAttribute("aria-pressed", String(!chart.hidden.has(line.name)));
      node.onclick = () => { chart.toggle(line.name); update(); };
      return node;
    }));
  }

  function update() {
    put(title, view.title); title.title = view.title; put(run, view.run === view.title ? "" : view.run); run.title = view.run;
    put(state, view.state); pill.dataset.ink = INKS[view.state] || "faint";
    const stopping = asked.stop || view.asked === "stop";
    put(pause, view.state === "paused" ? "Resume" : "Pause"); put(stop, stopping ? "Stopping…" : "Stop"); put(save, asked.save ? "Saving…" : "Save now");
    pause.setAttribute("aria-label", view.state === "paused" ? "Resume training" : "Pause training");
    for (const node of [pause, save, lr]) node.disabled = !view.live || stopping;
    stop.disabled = !view.live || stopping; save.disabled = save.disabled || Boolean(asked.save);
    if (document.activeElement !== lr && lr.value !== view.lr) lr.value = view.lr;
    bar.style.width = `${100 * Math.min(1, Math.max(0, view.progress || 0))}%`; bar.parentNode.setAttribute("aria-valuenow", String(Math.round(100 * (view.progress || 0))));
    while (facts.children.length > view.facts.length) facts.lastChild.remove();
    view.facts.forEach((fact, i) => stressed(facts.children[i] || make("span", "", facts), fact));
    log.disabled = !view.log; log.setAttribute("aria-pressed", String(chart.log && view.log));
    names();
    quiet.hidden = view.lines.some((line) => line.n); quiet.style.display = quiet.hidden ? "none" : "";
    cards(aside, view.cards, view.span); put(note, view.message);
    chart.draw(view); maps.draw(view.heats); texts.draw(model.get("texts") || "");
    root.dataset.step = String(view.step || 0); root.dataset.points = String(view.points || 0); root.dataset.state = view.state;
  }

  let frame = 0;
  const read = () => {
    frame = 0;
    let text = model.get("board");
    if (!text) return;
    const next = { ...EMPTY, ...JSON.parse(text) }, data = floats(model.get("data"));
    unpack(next.cards, data, unpack(next.lines, data, 0)); unpack(next.past, floats(model.get("past")), 0);
    unmap(next.heats, floats(model.get("maps")));
    view = next;
    if (root.dataset.wish !== String(view.theme)) { root.dataset.wish = String(view.theme); theme(); }
    update();
  };
  const soon = () => { if (!frame) frame = requestAnimationFrame(read); };
  for (const name of ["board", "data", "past", "maps", "texts"]) model.on(`change:${name}`, soon);
  theme(); read();
  return () => {
    for (const name of ["board", "data", "past", "maps", "texts"]) model.off(`change:${name}`, soon);
    cancelAnimationFrame(frame); watcher.disconnect(); system.removeEventListener("change", theme); chart.destroy(); maps.destroy();
  };
}

export default { render };
