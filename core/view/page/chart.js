// One chart: lines, or areas on top of each other, over the steps, as SVG. A step under the pointer is marked in all.
import { el, number, svg } from "./dom.js";

const HEIGHT = 176, LEFT = 48, RIGHT = 12, TOP = 8, BOTTOM = 24;
const SMOOTHED_FROM = 60;
const MOST_OVER = 3; // of stacked areas: how far above what is usual the scale goes; higher peaks are cut
const charts = new Set();
let marked = null;

function mark(step) {
  if (step === marked) return;
  marked = step;
  for (const chart of charts) chart.showMark();
}

export class Chart {
  /** `lines` of `set`: [{name, xs, ys, hue, dash, dots}]; `stacked` puts their areas on top of each other, `exact` is never smoothed. */
  constructor(title, unit = "", { stacked = false, fromZero = false, exact = false } = {}) {
    this.stacked = stacked;
    this.fromZero = fromZero || stacked;
    this.exact = exact;
    this.lines = [];
    this.smooth = true;
    this.plot = svg("svg", { class: "plot", height: HEIGHT, role: "img", "aria-label": title });
    this.legend = el("div", { className: "legend" });
    this.root = el("figure", { className: "chart", tabIndex: 0 },
      el("figcaption", {}, el("div", { className: "title" }, title, el("span", {}, unit ? ` ${unit}` : "")), this.legend), this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => mark(null));
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("blur", () => mark(null));
    charts.add(this);
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  set(lines, smooth) {
    this.lines = lines.filter((line) => line.ys.some((y) => y !== null));
    this.smooth = smooth && !this.exact;
    this.root.hidden = !this.lines.length;
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || !this.lines.length) return;
    const drawn = this.stacked ? stack(this.lines) : this.lines.map((line) => ({ ...line, tops: line.ys }));
    const [x0, x1] = extent(drawn.flatMap((line) => [line.xs[0], line.xs[line.xs.length - 1]]), 1, null);
    const [y0, highest] = extent(drawn.flatMap((line) => line.tops), 0, this.fromZero ? 0 : null);
    const y1 = this.stacked ? Math.min(highest, MOST_OVER * usual(drawn[drawn.length - 1].tops)) : highest;
    const x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - (Math.min(value, y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    this.scale = { x, x0, x1, width };
    const parts = [];
    const levels = ticks(y0, y1, 4);
    for (const tick of levels) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }), label(level(tick, levels[1] - levels[0]), LEFT - 6, y(tick) + 4, "end"));
    }
    for (const tick of ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter((step) => Number.isInteger(step) && x(step) < width - RIGHT - 34)) {
      parts.push(label(String(tick), x(tick), HEIGHT - 8, "middle"));
    }
    parts.push(label("step", width - RIGHT, HEIGHT - 8, "end"));
    for (const line of drawn) parts.push(...this.stacked ? [area(line, x, y)] : curves(line, x, y, this.smooth));
    this.cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.plot.replaceChildren(...parts, this.cross);
    this.showMark();
  }

  showMark() {
    if (!this.scale || !this.lines.length) return;
    const { x, x0, x1 } = this.scale, inside = marked !== null && marked >= x0 && marked <= x1;
    this.cross.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { this.cross.setAttribute("x1", x(marked)); this.cross.setAttribute("x2", x(marked)); }
    const named = Map.groupBy(this.lines, (line) => line.name);
    const entries = [...named].map(([name, lines]) => el("span", {}, this.keyOf(lines), `${name} `, ...lines.map((line) => {
      const place = inside ? nearest(line.xs, marked) : lastKnown(line.ys);
      return el("b", { className: lines.length > 1 ? `i${line.hue}` : "" }, number(line.ys[place]));
    })));
    if (inside) entries.unshift(el("span", { className: "at" }, `step ${Math.round(marked)}`));
    this.legend.replaceChildren(...entries);
  }

  keyOf(lines) {
    const key = svg("svg", { viewBox: "0 0 16 8" }), { hue, dash } = lines[0];
    key.append(this.stacked ? svg("rect", { class: `f${hue} area`, width: 16, height: 8, rx: 1 })
      : svg("line", { class: `${lines.length > 1 ? "several" : `k${hue}`} curve ${dash || ""}`, x1: 0, x2: 16, y1: 4, y2: 4 }));
    return key;
  }

  point(event) {
    if (!this.scale) return;
    const { x0, x1, width } = this.scale;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    const step = x0 + ((at - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    const xs = this.lines[0].xs;
    mark(xs[nearest(xs, step)]);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") mark(null);
    if (!move || !this.lines.length) return;
    event.preventDefault();
    const xs = this.lines[0].xs;
    const at = marked === null ? xs.length - 1 : nearest(xs, marked) + move;
    mark(xs[Math.max(0, Math.min(xs.length - 1, at))]);
  }
}

function label(text, x, y, anchor) {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = text;
  return element;
}

function curves(line, x, y, smooth) {
  if (line.dots) {
    return [svg("path", { class: `curve k${line.hue} ${line.dash || ""}`, d: path(line.xs, line.ys, x, y) }),
      ...line.xs.flatMap((step, i) => line.ys[i] === null ? [] : [svg("circle", { class: `dot f${line.hue}`, cx: x(step), cy: y(line.ys[i]), r: 3.5 })])];
  }
  const soft = smooth && line.xs.length >= SMOOTHED_FROM;
  const raw = svg("path", { class: `curve k${line.hue} ${soft ? "raw" : line.dash || ""}`, d: path(line.xs, line.ys, x, y) });
  return soft ? [raw, svg("path", { class: `curve k${line.hue} ${line.dash || ""}`, d: path(line.xs, smoothed(line.ys), x, y) })] : [raw];
}

function path(xs, ys, x, y) {
  const parts = [];
  let pen = "M";
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || ys[i] === undefined) { pen = "M"; continue; }
    parts.push(`${pen}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`);
    pen = "L";
  }
  return parts.join("");
}

function area(line, x, y) {
  const up = line.xs.map((step, i) => `${x(step).toFixed(1)} ${y(line.tops[i]).toFixed(1)}`);
  const down = line.xs.map((step, i) => `${x(step).toFixed(1)} ${y(line.bottoms[i]).toFixed(1)}`).reverse();
  return svg("path", { class: `area f${line.hue}`, d: `M${up.join("L")}L${down.join("L")}Z` });
}

function stack(lines) {
  let below = lines[0].xs.map(() => 0);
  return lines.map((line) => {
    const bottoms = below;
    below = below.map((value, i) => value + (line.ys[i] || 0));
    return { ...line, bottoms, tops: below };
  });
}

/** An average that forgets: over about a thirtieth of the curve. */
function smoothed(ys) {
  const keep = 1 - 1 / Math.max(4, ys.length / 30);
  let mean = 0, weight = 0;
  return ys.map((y) => {
    if (y === null || y === undefined) return null;
    mean = keep * mean + (1 - keep) * y;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

function extent(values, least, floor) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (typeof value === "number") { low = Math.min(low, value); high = Math.max(high, value); }
  if (floor !== null) low = Math.min(floor, low);
  if (low === high) { const margin = least || Math.abs(low) * 0.1 || 1; return floor !== null ? [low, high + margin] : [low - (least ? 0 : margin), high + margin]; }
  if (least) return [low, high];
  const margin = (high - low) * 0.05;
  return [floor !== null && low >= floor ? floor : low - margin, high + margin];
}

/** What nine of ten are below. */
function usual(values) {
  const sorted = values.filter((value) => value > 0).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length * 0.9)] : 1;
}

export function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** A tick's number, with the decimals that tell it from the next one. */
function level(tick, step) {
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return decimals && decimals <= 4 && Math.abs(tick) < 1000 ? String(Number(tick.toFixed(decimals))) : number(tick);
}

function nearest(xs, step) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= step) low = middle; else high = middle;
  }
  return step - xs[low] <= xs[high] - step ? low : high;
}

function lastKnown(ys) {
  for (let i = ys.length - 1; i >= 0; i--) if (ys[i] !== null && ys[i] !== undefined) return i;
  return 0;
}
