// The page: who is shown, the tabs, and what is said when nobody answers.
import { cleared, clock, duration, el, plain, shown } from "./dom.js";
import { EventList } from "./events.js";
import { Overview } from "./overview.js";
import { SampleBrowser } from "./samples.js";
import { RunStore, Unauthorized, ask } from "./store.js";

const byId = (id) => document.getElementById(id);
const TABS = ["overview", "samples", "events"];
const silent = new Map();

async function begin() {
  for (let wait = 1000; ; wait = Math.min(wait * 1.5, 10000)) {
    try {
      return await ask("runs");
    } catch (error) {
      if (error instanceof Unauthorized) { logIn(); return null; }
      trouble(`no answer: ${error.message}. Trying again.`);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

function logIn() {
  byId("login").hidden = false;
  document.querySelector("main").hidden = true;
  byId("login").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("rlx-token", new FormData(event.target).get("token").trim());
    location.reload();
  });
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

function drawHead(stores) {
  cleared(byId("runs"), ...stores.map((store, i) => {
    const { name, step, total_steps: total, state, eta_s: left, updated, notes } = store.run;
    const done = el("progress", { "aria-label": "steps done" });
    if (total) { done.max = total; done.value = step; }
    return el("div", { className: `run r${i}` }, stores.length > 1 ? el("span", { className: "key" }) : null, el("span", { className: "name" }, shown(name || "run")), el("span", { className: `state ${state || ""}` }, state || ""),
      total ? done : null, el("span", {}, total ? `step ${step} of ${total}` : `step ${step ?? 0}`), left ? el("span", { className: "soft" }, `${duration(left)} left`) : null,
      updated ? el("span", { className: "soft" }, `last step at ${clock(updated)}`) : null, ...(notes || []).map((note) => el("span", { className: "soft" }, shown(note))));
  }));
  const { name, step, state } = stores[0].run;
  document.title = state === "running" ? `${step} · ${plain(name)} · rlx` : `${plain(name || "run")} · rlx`;
}

function choose(name) {
  for (const tab of TABS) {
    const chosen = tab === name;
    byId(tab).hidden = !chosen;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
  }
  history.replaceState(null, "", `#${name}`);
}

function heard(stores) {
  return (store, error) => {
    if (error instanceof Unauthorized) { logIn(); return; }
    if (!error) { silent.delete(store); store.answered = Date.now(); }
    else if (!silent.has(store)) silent.set(store, store.answered || Date.now());
    const since = Math.min(...silent.values());
    trouble(silent.size ? `No answer since ${clock(since / 1000)}. What is shown is from then; trying again.` : "");
  };
}

async function main() {
  const runs = await begin();
  if (runs === null) return;
  trouble("");
  const stores = [], tell = heard(stores);
  let overview = null, browser = null, events = null, drawn = false;
  const draw = (store, fresh) => {
    drawHead(stores);
    if (fresh || !drawn) { overview.draw(); events.draw(); drawn = stores.every((each) => each.generation); }
    else overview.drawWorkers();
    browser.wentOn();
    if (!browser.loaded && !byId("samples").hidden) { browser.loaded = true; browser.load(true); }
  };
  runs.forEach((run, i) => { const store = new RunStore(i, draw, tell); store.run = { name: run.name }; stores.push(store); });
  overview = new Overview(stores);
  events = new EventList(byId("events"), stores);
  browser = new SampleBrowser(byId("samples"), stores);
  const show = (name) => { choose(name); if (name === "overview") overview.draw(); if (name === "samples" && !browser.loaded) { browser.loaded = true; browser.load(true); } };
  TABS.forEach((tab, i) => {
    byId(`tab-${tab}`).addEventListener("click", () => show(tab));
    byId(`tab-${tab}`).addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = TABS[(i + move + TABS.length) % TABS.length];
      byId(`tab-${next}`).focus();
      show(next);
    });
  });
  const wanted = location.hash.slice(1);
  drawHead(stores);
  show(TABS.includes(wanted) ? wanted : "overview");
  for (const store of stores) store.follow();
}

main();
