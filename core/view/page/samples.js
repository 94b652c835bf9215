// The sample browser: a list by filters, page by page from the server, and one sample with its tokens in colour.
import { cleared, el, number, shown } from "./dom.js";
import { ask } from "./store.js";

const STATUSES = ["ok", "truncated", "timeout", "env_lost", "aborted"];
const PAGE = 30, FIRST_CHARS = 8000, MOST_CHARS = 100_000_000;
const AGAIN_MS = 150;

export class SampleBrowser {
  constructor(root, stores) {
    Object.assign(this, { root, stores, place: 0, next: null, mode: "text", request: null, opened: null });
    this.form = this.filters();
    this.counted = el("p", { className: "counted", role: "status" });
    this.list = el("div", { className: "list" });
    this.more = el("button", { className: "button", type: "button", hidden: true }, "Show more");
    this.details = el("div", { className: "details" }, el("p", { className: "empty" }, "Choose a sample to read it."));
    this.newer = el("button", { className: "button", type: "button", hidden: true }, "Show newer samples");
    this.newer.addEventListener("click", () => this.load(true));
    this.more.addEventListener("click", () => this.load(false));
    this.list.addEventListener("keydown", (event) => this.key(event));
    root.append(this.form, this.counted, el("div", { className: "browser" }, el("div", {}, this.newer, this.list, this.more), this.details));
  }

  filters() {
    const field = (label, name, properties = {}) => el("label", {}, label, el("input", { name, autocomplete: "off", ...properties }));
    const select = (label, name, options) => el("label", {}, label, el("select", { name }, ...options.map(([value, text]) => el("option", { value }, text))));
    const form = el("form", { className: "filters" },
      this.stores.length > 1 ? select("run", "run", this.stores.map((store, i) => [i, `${i + 1}: ${store.run.name || ""}`])) : null,
      select("order", "order", [["newest", "newest first"], ["best", "best first"], ["worst", "worst first"]]),
      field("step", "step", { placeholder: "12 or 3:8" }),
      select("status", "status", [["", "any"], ...STATUSES.map((status) => [status, status])]),
      field("reward from", "low", { type: "number", step: "any" }), field("to", "high", { type: "number", step: "any" }),
      field("group", "group", { className: "long" }), field("text", "text", { className: "long", type: "search", placeholder: "in prompt or completion" }),
      el("button", { className: "button", type: "reset" }, "Clear"));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.load(true)));
    form.addEventListener("input", () => { clearTimeout(this.typing); this.typing = setTimeout(() => this.load(true), 250); });
    return form;
  }

  /** The run went on: what is listed is not the newest any more. */
  wentOn() {
    const step = this.stores[this.place].run.step;
    this.newer.hidden = this.loadedAt === undefined || step === this.loadedAt;
  }

  /** First page (`anew`), or the next. Goes on by itself while the server still looks. */
  async load(anew) {
    this.request?.abort();
    const request = (this.request = new AbortController());
    const query = Object.fromEntries(new FormData(this.form));
    this.place = Number(query.run || 0);
    if (anew) { this.next = null; this.seen = new Set(); this.loadedAt = this.stores[this.place].run.step; this.newer.hidden = true; }
    let found = 0, cleaned = !anew;
    try {
      for (;;) {
        const answer = await ask("samples", { ...query, run: this.place, after: this.next, limit: PAGE - found }, request.signal);
        const provisional = anew && query.order !== "newest" && answer.indexed < 1;
        if (!cleaned || provisional) { cleared(this.list); this.seen.clear(); cleaned = true; }
        this.add(answer.samples);
        found = provisional ? 0 : found + answer.samples.length;
        this.next = provisional ? null : answer.next;
        this.count(answer);
        if (!provisional && (found >= PAGE || this.next === null)) break;
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
        if (request.signal.aborted) return;
      }
      this.more.hidden = this.next === null;
      if (!this.list.children.length) this.list.append(el("p", { className: "empty" }, "No sample matches."));
    } catch (error) {
      if (error.name !== "AbortError") this.counted.textContent = `${error.message || error}`;
    }
  }

  count({ matching, total, indexed }) {
    const part = indexed < 1 ? `, ${Math.round(indexed * 100)} % of the file looked at` : "";
    this.counted.textContent = total ? `${matching.toLocaleString()} of ${total.toLocaleString()} samples${this.form.elements.text.value ? " before the text search" : ""}${part}` : "no samples yet";
  }

  add(samples) {
    for (const sample of samples) {
      if (this.seen.has(sample.id)) continue;
      this.seen.add(sample.id);
      const item = el("button", { className: "item", type: "button" },
        el("div", { className: "facts" }, `step ${sample.step}`, el("span", {}, sample.status === "ok" ? "" : sample.status), el("span", {}, `${sample.tokens ?? "–"} token${sample.tokens === 1 ? "" : "s"}`), el("b", {}, number(sample.reward))),
        el("div", { className: "line asked", dir: "auto" }, shown(sample.prompt.replaceAll("\n", " ⏎ "))), el("div", { className: "line", dir: "auto" }, shown(sample.text.replaceAll("\n", " ⏎ "))));
      item.addEventListener("click", () => this.open(item, sample));
      this.list.append(item);
    }
  }

  key(event) {
    const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const items = [...this.list.querySelectorAll(".item")];
    const next = items[items.indexOf(document.activeElement) + move];
    if (!move || !next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }

  async open(item, sample) {
    for (const other of this.list.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    item.setAttribute("aria-current", "true");
    const opened = (this.opened = {});
    try {
      const view = new SampleView(this, this.place, sample.id);
      await view.load(FIRST_CHARS);
      if (this.opened !== opened) return;
      cleared(this.details, view.root).className = "details";
      this.details.scrollTop = 0;
      if (this.stores.length > 1) await this.compare(view, opened);
    } catch (error) {
      if (this.opened === opened) cleared(this.details, el("p", { className: "empty" }, `${error.message || error}`));
    }
  }

  /** The newest sample of the same prompt in the other run, beside. */
  async compare(view, opened) {
    const other = 1 - this.place, asked = view.sample.prompt_messages.at(-1)?.text || "";
    let after = null;
    for (let tries = 0; tries < 20; tries++) {
      const answer = await ask("samples", { run: other, text: asked.slice(0, 500), limit: 1, after });
      if (this.opened !== opened) return;
      if (answer.samples.length) {
        const beside = new SampleView(this, other, answer.samples[0].id);
        await beside.load(FIRST_CHARS);
        if (this.opened === opened) { this.details.append(beside.root); this.details.className = "details two"; }
        return;
      }
      if ((after = answer.next) === null) break;
    }
    if (this.opened === opened) this.details.append(el("p", { className: "soft" }, "The other run has no sample of this prompt."));
  }
}

class SampleView {
  constructor(browser, place, id) {
    Object.assign(this, { browser, place, id });
    this.root = el("article", { className: "sample" });
  }

  async load(chars) {
    const sample = (this.sample = await ask("sample", { run: this.place, id: this.id, chars }));
    const fact = (name, value) => el("div", {}, el("span", {}, name, " "), value);
    const versions = sample.by_version.filter(([version]) => version >= 0).map(([version, count]) => `${version} (${count})`).join(", ");
    const times = Object.entries(sample.timings).filter(([, value]) => typeof value === "number").map(([name, value]) => `${name.replace(/_s$/, "")} ${number(value)} s`);
    cleared(this.root,
      this.browser.stores.length > 1 ? el("h2", {}, shown(this.browser.stores[this.place].run.name)) : null,
      el("div", { className: "facts" }, fact("step", String(sample.step)), fact("status", shown(sample.status)), fact("reward", el("b", {}, number(sample.reward))), fact("advantage", number(sample.advantage)),
        ...Object.entries(sample.rewards).map(([name, value]) => fact(shown(name), number(value))), fact("tokens", String(sample.tokens)), fact("weight versions", versions || "none"),
        fact("group", shown(sample.group)), fact("sample", String(sample.index)), fact("worker", shown(sample.worker || "–")), sample.turns > 1 ? fact("turns", String(sample.turns)) : null,
        sample.exact ? null : fact("not exact:", "what it sampled is hidden"), times.length ? fact("time", shown(times.join(", "))) : null),
      ...sample.prompt_messages.map((message) => this.block(message.role, message)), this.completion(),
      ...sample.messages.map((message) => this.block(message.role, message, message.role === "assistant" ? "sampled" : "")),
      ...sample.values.map(([name, value]) => this.block(name, value)),
      sample.step_rewards.length ? this.block("step rewards", { text: sample.step_rewards.map((step) => `${step.name}${step.turn === null ? "" : ` (turn ${step.turn})`}: ${number(step.value)}`).join("\n"), length: 0 }) : null,
      sample.error.text ? this.block("error", sample.error, "error") : null);
  }

  block(role, { text, length }, kind = "") {
    const block = el("div", { className: `block ${kind}` }, el("div", { className: "role" }, shown(role)), el("div", { className: "text", dir: "auto" }, text ? shown(text) : el("span", { className: "soft" }, "(nothing)")));
    if (length > text.length) block.append(this.allOf(length - text.length));
    return block;
  }

  allOf(left) {
    const button = el("button", { className: "button", type: "button" }, `Show more (${left.toLocaleString()} characters)`);
    button.addEventListener("click", () => this.load(MOST_CHARS));
    return button;
  }

  completion() {
    const holder = el("div", {}), body = el("div", {});
    const modes = [["text", "text"], ["mask", "trained"], ["logprob", "log-prob"], ["gap", "log-prob gap"], ["version", "weight version"]];
    const group = `mode-${this.place}-${this.id}`;
    holder.append(el("div", { className: "modes", role: "radiogroup", "aria-label": "Colour the tokens by" }, ...modes.map(([value, name]) => {
      const radio = el("input", { type: "radio", name: group, value, checked: value === this.browser.mode });
      radio.addEventListener("change", () => { this.browser.mode = value; this.show(body, value); });
      return el("label", {}, radio, name);
    })), body);
    this.show(body, this.browser.mode);
    return holder;
  }

  show(body, mode) {
    const { completion, rows } = this.sample;
    if (mode === "text" || !rows.length) { cleared(body, this.block("sampled", completion, "sampled")); return; }
    const info = el("div", { className: "tokeninfo", role: "status" });
    cleared(body, el("div", { className: "scale" }, ...SCALES[mode]()), ...rows.map((length, row) => new TokenRow(this, row, length, mode, rows.length, info).root), info);
  }
}

const swatch = (style, text) => el("i", { className: style }, text);
const SCALES = {
  mask: () => [swatch("trained", "sampled and trained"), swatch("context", "context")],
  logprob: () => ["log-probability of the sampled token:", swatch("", "near 0"), swatch("h2", "−1"), swatch("h3", "−2"), swatch("h4", "−4"), swatch("h5", "below −7")],
  gap: () => ["learner − worker:", swatch("b4", "the learner finds it likelier"), swatch("h4", "less likely"), swatch("", "equal")],
  version: () => ["the colour changes where newer weights went on"],
};

class TokenRow {
  constructor(view, row, length, mode, numRows, info) {
    Object.assign(this, { view, row, mode, info, changes: 0, lastVersion: null });
    this.text = el("div", { className: "text", dir: "auto" });
    this.more = el("button", { className: "button", type: "button", hidden: true });
    this.root = el("div", { className: "block sampled" }, el("div", { className: "role" }, numRows > 1 ? `training row ${row + 1} of ${numRows}, ${length.toLocaleString()} tokens` : `${length.toLocaleString()} tokens`), this.text, this.more);
    this.length = length;
    this.more.addEventListener("click", () => this.load(this.next));
    this.text.addEventListener("pointerover", (event) => { const told = this.told?.get(event.target); if (told) this.info.textContent = told; });
    this.load(0);
  }

  async load(start) {
    this.more.disabled = true;
    try {
      const found = await ask("tokens", { run: this.view.place, id: this.view.id, row: this.row, start });
      this.told ||= new Map();
      const parts = [];
      let at = 0;
      for (const [text, count] of found.pieces) {
        const piece = el("span", { className: `t ${this.style(found, at)}` }, shown(text || ""));
        this.told.set(piece, this.tell(found, at, start, count));
        parts.push(piece);
        at += count;
      }
      this.text.append(...parts);
      if (this.mode === "gap" && !found.gaps.length) cleared(this.info, "this run did not record the learner's log-probabilities");
      this.next = found.next;
      this.more.hidden = found.next === null;
      this.more.textContent = `Show more (${(this.length - (found.next || 0)).toLocaleString()} tokens)`;
    } catch (error) {
      this.info.textContent = `${error.message || error}`;
    }
    this.more.disabled = false;
  }

  style(found, at) {
    const version = found.versions[at] ?? -1;
    if (version < 0) return "context";
    if (this.mode === "mask") return "trained";
    if (this.mode === "logprob") return heat("h", -(found.logprobs[at] ?? 0), [0.5, 1, 2, 4, 7]);
    if (this.mode === "gap") { const gap = found.gaps[at] ?? 0; return heat(gap < 0 ? "h" : "b", Math.abs(gap), [0.005, 0.02, 0.1, 0.3, 1]); }
    if (version !== this.lastVersion) { this.changes += this.lastVersion === null ? 0 : 1; this.lastVersion = version; }
    return `v${this.changes % 6}`;
  }

  tell(found, at, start, count) {
    const version = found.versions[at] ?? -1, logprob = found.logprobs[at], gap = found.gaps[at];
    return [`token ${start + at + 1}${count > 1 ? ` to ${start + at + count}` : ""}`, version < 0 ? "context, not trained" : `weight version ${version}`,
      logprob === null || logprob === undefined ? "" : `log-prob ${logprob.toFixed(4)} (p ${Math.exp(logprob).toPrecision(3)})`, gap === null || gap === undefined ? "" : `gap ${gap.toFixed(4)}`].filter(Boolean).join(" · ");
  }
}

function heat(letter, value, bounds) {
  const level = bounds.filter((bound) => value >= bound).length;
  return level ? `${letter}${level}` : "";
}
