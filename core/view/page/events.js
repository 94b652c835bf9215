// What happened, the newest first.
import { cleared, clock, el, plain, shown } from "./dom.js";

const BAD = /fail|lost|down|quarantin/, WARN = /discard|restart|removed|resumed/;
const ROUTINE = "publish"; // one a step
const UNTOLD = ["time", "kind", "step", "text", "source", "run", "n", "worker"]; // in the row, or in its text
const MOST = 500;

export class EventList {
  constructor(root, stores) {
    this.stores = stores;
    this.kinds = el("select", { name: "kind" });
    this.counted = el("span");
    this.card = el("div", { className: "card" });
    this.kinds.addEventListener("change", () => { cleared(this.card); this.draw(); });
    root.append(el("div", { className: "bar" }, el("label", {}, "show ", this.kinds), this.counted), this.card);
  }

  /** Rows stay as they are while one of them is unfolded. */
  draw() {
    const all = this.stores.flatMap((store) => store.events.map((event) => ({ ...event, kind: String(event.kind || "event"), run: store.run.name })));
    all.sort((a, b) => (b.time || 0) - (a.time || 0));
    this.fillKinds([...new Set(all.map((event) => event.kind))].sort());
    if (this.card.querySelector("details[open]")) return;
    const wanted = this.kinds.value;
    const events = all.filter(({ kind }) => wanted === "all" || (wanted ? wanted === `=${kind}` : kind !== ROUTINE));
    this.counted.textContent = `${events.length} of ${all.length} events${events.length > MOST ? `, the newest ${MOST} shown` : ""}`;
    cleared(this.card, ...(events.length ? events.slice(0, MOST).map((event) => this.row(event)) : [el("p", { className: "empty" }, "No events yet.")]));
  }

  fillKinds(kinds) {
    const values = ["", "all", ...kinds.map((kind) => `=${kind}`)];
    if (values.length === this.kinds.options.length) return;
    const chosen = this.kinds.value;
    const names = ["all but publishes", "all", ...kinds.map((kind) => plain(kind.replaceAll("_", " ")))];
    cleared(this.kinds, ...values.map((value, i) => el("option", { value }, names[i])));
    this.kinds.value = chosen;
  }

  row(event) {
    const { time, kind, step, text = "", source = "", run } = event;
    const told = Object.entries(event).filter(([name, value]) => !UNTOLD.includes(name) && value !== null && value !== "");
    const line = ([name, value]) => el("div", { className: "text" }, shown(`${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`));
    return el("div", { className: `event ${BAD.test(kind) ? "bad" : WARN.test(kind) ? "warn" : ""}` },
      el("span", { className: "soft" }, clock(time)),
      el("span", {}, el("span", { className: "kind" }, shown(kind.replaceAll("_", " "))), el("div", { className: "soft" }, shown(this.stores.length > 1 ? `${run}, ${source}` : source))),
      el("span", { className: "soft" }, step === null || step === undefined ? "" : `step ${step}`),
      el("div", { className: "said" }, el("div", { dir: "auto" }, shown(text)), told.length ? el("details", {}, el("summary", {}, "details"), ...told.map(line)) : null));
  }
}
