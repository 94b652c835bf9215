// What the page knows of one run, and how it keeps up: ask, take in what is new, wait, ask again.

const SOON_MS = 1000, LATER_MS = 5000, HIDDEN_MS = 15000, DEADLINE_MS = 15000;
const MOST_POINTS = 4000, MOST_EVENTS = 2000;

export class Unauthorized extends Error {}

export function token() {
  const given = new URLSearchParams(location.search).get("token") || new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("rlx-token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("rlx-token");
}

/** JSON of GET view/`path`. Throws Unauthorized, or an Error that says what is wrong. */
export async function ask(path, query = {}, signal = null) {
  const known = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const secret = token();
  const deadline = AbortSignal.timeout(DEADLINE_MS);
  const answer = await fetch(`view/${path}?${new URLSearchParams(known)}`, {
    headers: secret ? { authorization: `Bearer ${secret}` } : {},
    signal: signal ? AbortSignal.any([signal, deadline]) : deadline,
  });
  if (answer.status === 401 || answer.status === 403) throw new Unauthorized("the token is missing or another one");
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof body.detail === "string" ? body.detail : body.error?.message || `the answer was ${answer.status}`);
  return body;
}

export class RunStore {
  /** `changed` is called after every answer that had something new, `heard` after every try, with its error or null. */
  constructor(place, changed, heard) {
    Object.assign(this, { place, changed, heard, generation: "", count: 0, run: {}, columns: { step: [] }, evaluations: [], events: [], numEvents: 0, workers: null, texts: {} });
  }

  async follow() {
    let wait = SOON_MS;
    for (;;) {
      try {
        const fresh = this.take(await ask("state", { run: this.place, generation: this.generation, metrics: this.count, evaluations: this.evaluations.length, events: this.numEvents }));
        wait = fresh ? SOON_MS : Math.min(LATER_MS, wait * 1.5);
        this.heard(this, null);
        this.changed(this, fresh);
      } catch (error) {
        this.heard(this, error);
        if (error instanceof Unauthorized) return;
        wait = Math.min(LATER_MS, wait * 1.5);
      }
      await pause(wait);
    }
  }

  take(answer) {
    if (answer.reset) Object.assign(this, { columns: { step: [] }, evaluations: [], events: [] });
    const before = answer.reset ? -1 : this.count + this.evaluations.length + this.numEvents;
    this.append(answer.metrics.columns);
    this.evaluations.push(...answer.evaluations.records);
    this.events = [...this.events, ...answer.events.records].slice(-MOST_EVENTS);
    Object.assign(this, { generation: answer.generation, count: answer.metrics.count, numEvents: answer.events.count, run: answer.run, texts: answer.texts, workers: answer.workers || null });
    return before !== this.count + this.evaluations.length + this.numEvents;
  }

  append(columns) {
    const had = this.columns.step.length, more = columns.step.length;
    if (!more) return;
    for (const name of new Set([...Object.keys(this.columns), ...Object.keys(columns)])) {
      const column = this.columns[name] || (this.columns[name] = new Array(had).fill(null));
      for (const value of columns[name] || new Array(more).fill(null)) column.push(value);
    }
    if (this.columns.step.length > MOST_POINTS) for (const name of Object.keys(this.columns)) this.columns[name] = halved(this.columns[name], name === "step");
  }

  last(name, count = 1) {
    const known = (this.columns[name] || []).filter((value) => value !== null).slice(-count);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  }

  first(name) {
    return (this.columns[name] || []).find((value) => value !== null) ?? null;
  }
}

function halved(values, isStep) {
  const kept = [];
  for (let i = 0; i < values.length; i += 2) {
    const [a, b] = [values[i], values[i + 1]];
    kept.push(b === undefined || b === null ? a : isStep || a === null ? b : (a + b) / 2);
  }
  return kept;
}

/** Until `ms` are over, or the page is looked at again. */
function pause(ms) {
  return new Promise((resolve) => {
    const done = () => { clearTimeout(timer); document.removeEventListener("visibilitychange", seen); resolve(); };
    const seen = () => document.hidden || done();
    const timer = setTimeout(done, document.hidden ? Math.max(ms, HIDDEN_MS) : ms);
    document.addEventListener("visibilitychange", seen);
  });
}
