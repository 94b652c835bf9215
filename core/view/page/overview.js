// The overview: numbers, curves, step times, workers.
import { Chart } from "./chart.js";
import { cleared, clock, duration, el, number, plain, shown } from "./dom.js";

const names = (...pairs) => (columns) => pairs.filter(([key]) => columns[key]).map(([key, name]) => ({ key, name }));
const matching = (pattern) => (columns) => Object.keys(columns).filter((key) => pattern.test(key)).map((key) => ({ key, name: plain(key.match(pattern)[1]) }));

const CURVES = [
  { title: "Reward", lines: names(["reward", "training prompts"]), evaluations: ["reward", "held-out prompts"] },
  { title: "Reward by function", lines: matching(/^rewards\/(.+)\/mean$/) },
  { title: "Held-out pass@k", lines: () => [], passes: true },
  { title: "Completion length", unit: "tokens", fromZero: true, lines: names(["completions/mean_length", "mean"], ["completions/max_length", "longest"]), exact: true },
  { title: "KL to the reference", lines: names(["kl", "KL"]) },
  { title: "Entropy", unit: "nats", lines: names(["entropy", "entropy"]) },
  { title: "Loss", lines: names(["loss", "loss"]) },
  { title: "Gradient norm", fromZero: true, lines: names(["grad_norm", "norm"]) },
  { title: "Learning rate", fromZero: true, exact: true, lines: names(["learning_rate", "rate"]) },
  { title: "Staleness", unit: "versions", fromZero: true, exact: true, lines: names(["sample/staleness_mean", "mean"], ["sample/staleness_max", "oldest"]) },
  { title: "Log-prob gap", unit: "nats", fromZero: true, lines: names(["sampling/sampling_logp_difference/mean", "mean"], ["sampling/sampling_logp_difference/p95", "p95"], ["sampling/sampling_logp_difference/max", "max"]) },
  { title: "Generated", unit: "tokens/s", fromZero: true, lines: names(["rollout/generated_tok_s", "tokens/s"]) },
  { title: "Groups without a signal", fromZero: true, lines: names(["frac_reward_zero_std", "all rewards equal"], ["frac_reward_none", "no reward"]) },
];
const STEP = [["perf/rollout_wait_s", "waits for rollouts"], ["perf/fwd_bwd_s", "trains"], ["perf/weight_sync_wait_s", "waits for publishing"]];
const HUES = 8, DASHES = ["", "dashed", "dotted"];
const MOST_WORKERS = 100;

export class Overview {
  constructor(stores) {
    this.stores = stores;
    this.smooth = document.getElementById("smooth");
    this.extra = document.getElementById("extra");
    this.charts = CURVES.map((what) => ({ what, chart: new Chart(what.title, what.unit, what) }));
    this.times = stores.map((store) => new Chart("Step time", stores.length > 1 ? `s, ${plain(store.run.name)}` : "s", { stacked: true }));
    this.own = new Chart("Metric of your choice");
    const shownCharts = this.charts.map(({ chart }) => chart.root);
    shownCharts.splice(2, 0, ...this.times.map((chart) => chart.root));
    document.getElementById("charts").append(...shownCharts, this.own.root);
    this.smooth.addEventListener("change", () => this.draw());
    this.extra.addEventListener("change", () => this.draw());
  }

  draw() {
    const several = this.stores.length > 1;
    for (const { what, chart } of this.charts) chart.set(this.stores.flatMap((store, i) => linesOf(what, store, several ? i : null)), this.smooth.checked);
    this.times.forEach((chart, i) => chart.set(stepLines(this.stores[i].columns), false));
    this.fillExtra();
    const key = this.extra.value;
    this.own.set(key ? this.stores.flatMap((store, i) => (store.columns[key] ? [{ name: plain(key), xs: store.columns.step, ys: store.columns[key], hue: i }] : [])) : [], this.smooth.checked);
    this.drawTiles();
    this.drawWorkers();
    cleared(document.getElementById("bottleneck"), ...this.stores.flatMap((store) => store.texts.bottleneck ? [several ? el("span", { className: "soft" }, shown(`${store.run.name}: `)) : null, el("b", {}, "Bottleneck: "), shown(store.texts.bottleneck), el("br")] : []));
  }

  fillExtra() {
    const keys = [...new Set(this.stores.flatMap((store) => Object.keys(store.columns)))].filter((key) => key !== "step" && key !== "time").sort();
    if (keys.length + 1 === this.extra.options.length) return;
    const chosen = this.extra.value;
    cleared(this.extra, el("option", { value: "" }, "–"), ...keys.map((key) => el("option", { value: key }, plain(key))));
    this.extra.value = chosen;
  }

  drawTiles() {
    const tiles = [
      ["Reward", (s) => [s.last("reward", 10), change(s.first("reward"), s.last("reward", 10), "from")]],
      ["Held-out reward", (s) => { const known = s.evaluations.map((e) => e.reward).filter((v) => typeof v === "number"); return known.length ? [known.at(-1), change(known[0], known.at(-1), "from")] : null; }],
      ["KL", (s) => [s.last("kl", 10), ""]],
      ["Entropy", (s) => [s.last("entropy", 10), change(s.first("entropy"), s.last("entropy", 10), "from")]],
      ["Completion length", (s) => [s.last("completions/mean_length", 10), "tokens"]],
      ["Step time", (s) => [s.last("perf/step_s", 10), share(s)], " s"],
      ["Generated", (s) => [s.last("rollout/generated_tok_s", 10), "tokens/s"]],
      ["Staleness", (s) => [s.last("sample/staleness_mean", 10), `versions; oldest ${number(s.last("sample/staleness_max"))}`]],
    ];
    cleared(document.getElementById("tiles"), ...tiles.map(([label, values, unit = ""]) => {
      const found = this.stores.map(values);
      if (found.every((pair) => !pair || pair[0] === null)) return null;
      return el("div", { className: "tile" }, el("div", { className: "label" }, label), ...found.map((pair, i) =>
        el("div", { className: i ? "other" : "" }, el("div", { className: "value" }, pair && pair[0] !== null ? `${number(pair[0])}${unit}` : "–"), el("div", { className: "more" }, pair && pair[0] !== null ? pair[1] : ""))));
    }));
  }

  drawWorkers() {
    const cards = this.stores.flatMap((store) => {
      const rows = store.workers || lastKnown(store.events);
      if (!rows.length) return [];
      const told = store.workers ? "Workers" : "Workers, as last told";
      const first = store.workers ? rows.toSorted((a, b) => (a.state === "ready") - (b.state === "ready")).slice(0, MOST_WORKERS) : rows.slice(0, MOST_WORKERS);
      const states = Map.groupBy(rows, (row) => row.state || String(row.kind).replace("worker_", ""));
      const summary = [...states].map(([state, some]) => `${some.length} ${state}`).join(", ");
      return [el("div", { className: "card" }, el("h2", {}, told, this.stores.length > 1 ? shown(` of ${store.run.name}`) : "", el("span", { className: "soft" }, shown(`  ${summary}`))),
        store.workers ? liveTable(first) : toldTable(first), rows.length > first.length ? el("p", { className: "soft" }, `and ${rows.length - first.length} more`) : null)];
    });
    cleared(document.getElementById("workers"), ...cards);
  }
}

/** Of one run every line has its hue; of several the run has, and the lines differ by their dashes. */
function linesOf(what, store, runNumber) {
  const alone = runNumber === null;
  const look = (i) => ({ hue: (alone ? i : runNumber) % HUES, dash: alone ? "" : DASHES[i % DASHES.length] });
  const lines = what.lines(store.columns).map(({ key, name }, i) => ({ name, xs: store.columns.step, ys: store.columns[key], ...look(i) }));
  const told = (value, name, i) => ({ name, xs: store.evaluations.map((e) => e.step), ys: store.evaluations.map((e) => numeric(value(e))), dots: true, ...look(i) });
  if (store.evaluations.length && what.evaluations) lines.push(told((e) => e[what.evaluations[0]], what.evaluations[1], 1));
  if (what.passes) Object.keys(store.evaluations.at(-1)?.pass_at_k || {}).forEach((k, i) => lines.push(told((e) => e.pass_at_k?.[k], `pass@${plain(k)}`, i)));
  return lines;
}

function numeric(value) {
  return typeof value === "number" ? value : null;
}

function stepLines(columns) {
  const parts = STEP.filter(([key]) => columns[key]).map(([key, name], hue) => ({ name, hue, xs: columns.step, ys: columns[key] }));
  if (!parts.length || !columns["perf/step_s"]) return parts;
  const rest = columns["perf/step_s"].map((whole, i) => Math.max(0, whole - parts.reduce((sum, part) => sum + (part.ys[i] || 0), 0)));
  return [...parts, { name: "other", hue: 7, xs: columns.step, ys: rest }];
}

function change(before, now, word) {
  return before === null || now === null ? "" : `${word} ${number(before)}`;
}

function share(store) {
  const [whole, waits] = [store.last("perf/step_s", 10), store.last("perf/rollout_wait_s", 10)];
  return whole ? `${Math.round((100 * (waits || 0)) / whole)} % waits for rollouts` : "";
}

/** Of files: each worker's newest event. */
function lastKnown(events) {
  const rows = new Map();
  for (const event of events) if (typeof event.kind === "string" && event.kind.startsWith("worker_") && event.worker) rows.set(event.worker, event);
  return [...rows.values()].sort((a, b) => String(a.worker).localeCompare(String(b.worker), undefined, { numeric: true }));
}

function toldTable(rows) {
  return table(["worker", "last told", "at", ""], rows.map((event) => [shown(event.worker), event.kind.replace("worker_", ""), clock(event.time), shown(event.text || "")]), [3]);
}

function liveTable(rows) {
  const cells = rows.map((worker) => [
    shown(worker.name), el("span", { className: /^[a-z]+$/.test(worker.state) ? worker.state : "" }, shown(worker.state)), String(worker.weight_version ?? "–"), String(worker.in_flight ?? "–"),
    worker.load?.kv_cache_usage !== undefined ? `${Math.round(100 * worker.load.kv_cache_usage)} %` : "–",
    typeof worker.token_age_s === "number" ? duration(worker.token_age_s) : "–", String(worker.restarts ?? 0), shown(worker.node || ""), shown(worker.cause || ""),
  ]);
  return table(["worker", "state", "weights", "in flight", "KV cache", "last token", "restarts", "node", ""], cells, [8], [2, 3, 4, 5, 6]);
}

function table(heads, rows, wide = [], numbers = []) {
  const style = (i) => (numbers.includes(i) ? "num" : wide.includes(i) ? "wide" : "");
  return el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head, i) => el("th", { className: style(i), scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => el("td", { className: style(i) }, cell))))));
}
