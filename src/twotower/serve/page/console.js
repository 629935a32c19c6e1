// The console of `twotower serve`: a user, an answer by both methods, and its explanation.

import { combobox } from "./combobox.js";
import { Map2d } from "./map.js";
import { Problem, ask, debounce, drop, keep } from "./service.js";
import { number, speak, spoken, t } from "./words.js";

const $ = (id) => document.getElementById(id);
const NEIGHBOURS = 200; // similar items in which those of the history are looked up

// ---- the state of the view, all of it in the URL

const state = read();
// ---- replies of the service
const known = { bundle: null, bundles: [], user: null, answers: {}, maps: {}, chosen: null, titles: new Map() };

function read() {
  const q = new URLSearchParams(location.hash.slice(1));
  const ids = (name) => (q.get(name) || "").split(",").filter(Boolean).map(decodeURIComponent);
  const [column, ...value] = (q.get("where") || "").split(":");
  const pairs = (key) => Object.fromEntries(q.getAll(key).map((pair) => {
    const [name, ...rest] = pair.split(":");
    return [name, rest.join(":")];
  }));
  return {
    user: q.get("user"), isNew: q.has("new"), k: Math.min(Math.max(Number.parseInt(q.get("k"), 10) || 10, 1), 100),
    method: q.get("method") === "1" ? 1 : 2,
    events: ids("events").map((e) => {
      if (e[0] !== "~") return { id: e.slice(1), liked: e[0] !== "-" };
      const [type, ...id] = e.slice(1).split("~");
      return { id: id.join("~"), liked: true, event: decodeURIComponent(type) };
    }),
    ban: ids("ban"), changed: pairs("f"), context: pairs("c"), where: { column, value: value.join(":") }, bundle: q.get("bundle") || "",
    column: q.get("column") || "", near: q.get("view") === "near", chosen: q.get("item") || "",
    lang: q.get("lang") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"),
  };
}

function write(step = false) {
  const q = new URLSearchParams();
  const list = (ids) => ids.map(encodeURIComponent).join(",");
  if (state.isNew) q.set("new", "1");
  else if (state.user !== null) q.set("user", state.user);
  if (state.k !== 10) q.set("k", state.k);
  if (state.method !== 2) q.set("method", state.method);
  if (state.events.length) q.set("events", list(state.events.map((e) => (e.event ? `~${encodeURIComponent(e.event).replaceAll("~", "%7E")}~` : e.liked ? "." : "-") + e.id)));
  if (state.ban.length) q.set("ban", list(state.ban));
  for (const [name, value] of Object.entries(state.changed)) q.append("f", `${name}:${value}`);
  for (const [name, value] of Object.entries(state.context)) q.append("c", `${name}:${value}`);
  if (state.where.column) q.set("where", `${state.where.column}:${state.where.value}`);
  for (const name of ["bundle", "column"]) if (state[name]) q.set(name, state[name]);
  if (state.near) q.set("view", "near");
  if (state.chosen) q.set("item", state.chosen);
  q.set("lang", state.lang);
  history[step ? "pushState" : "replaceState"](null, "", `#${q}`);
}

// ---- helpers

function make(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") e.className = value;
    else if (name.startsWith("on")) e.addEventListener(name.slice(2), value);
    else e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

const fill = (id, text) => ($(id).textContent = text);
const press = (id, on) => $(id).setAttribute("aria-pressed", String(on));
const say = (text) => fill("status", text);
const news = []; // changes, announced together with the next answer
const title = (id) => known.titles.get(id) || id;
const learn = (items) => items.forEach((i) => i.title && known.titles.set(i.id, i.title));
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// ---- problems

function complain(error, again = refresh) {
  if (!(error instanceof Problem)) throw error;
  const status = [0, 400, 401, 403, 404, 413, 429, 500, 503].includes(error.status) ? error.status : error.status < 500 ? 400 : 500;
  const more = [error.message, ...error.errors.map((e) => `${e.at}: ${e.detail}`)].filter(Boolean).join(" ");
  $("problem").replaceChildren(
    make("p", {}, make("strong", {}, t(`problem_${status}`, { seconds: error.seconds })), " ", make("span", {}, more),
      ...(error.request ? [" ", make("small", {}, `(${t("request_id", { id: error.request })})`)] : [])),
    make("button", { type: "button", onclick: () => { calm(); again(); } }, t("again")),
    make("button", { type: "button", onclick: calm }, t("close")),
  );
  if (error.status === 401 && !$("ask-key").open) $("ask-key").showModal();
}

const calm = () => $("problem").replaceChildren();

/** Runs `work`. Shows a problem and returns undefined if it fails. */
async function guard(work, again) {
  try {
    return await work();
  } catch (error) {
    complain(error, again);
    return undefined;
  }
}

// ---- requests

/** The events as requests have them: with their type, where one is chosen. */
const toldEvents = () => state.events.map(({ id, liked, event }) => (event ? { id, event } : { id, liked }));

function request(method, columns) {
  const body = { k: state.k, method };
  const changed = Object.entries(state.changed);
  if (!state.isNew) body.user_id = state.user;
  if (state.isNew && method === 1) { // an unknown user: popular items
    body.ban = known.bundle?.keep_seen ? state.ban : [...state.ban, ...state.events.map((e) => e.id)];
  } else {
    if (state.events.length) body.events = toldEvents();
    if (state.ban.length) body.ban = state.ban;
    // The precomputed vector takes no features.
    if (changed.length && method === 2) body.features = Object.fromEntries(changed.map(([name, value]) => [name, typed(name, value)]));
  }
  if (method === 2) { // the precomputed vector has the default context
    const given = context(columns);
    if (Object.keys(given).length) body.context = given;
  }
  if (state.where.column && state.where.value) body.where = { [state.where.column]: state.where.value };
  return body;
}

/** The values of the context in `columns`, by default all: those set here, else the ones that the bundle names. A time that nobody sets is the present. */
function context(columns) {
  const given = {};
  for (const [name, value] of Object.entries(known.bundle?.context || {})) {
    if (columns && !columns.includes(name)) continue;
    const text = state.context[name];
    if (text === undefined ? value !== null : text !== "") given[name] = text === undefined ? value : spelled(value, text);
  }
  return given;
}

/** A text as a value like another one: a number or a list if it is spelled so. */
function spelled(value, text) {
  if (typeof value === "number" && String(Number(text)) === text) return Number(text);
  if (typeof value !== "object" || value === null) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** The value of a feature with the type of the stored one: a number stays a number if it is spelled the same. */
function typed(name, text) {
  const own = known.user?.features?.[name];
  if (text === "") return null;
  return typeof own === "number" && String(Number(text)) === text ? Number(text) : text;
}

async function answer(n) {
  const box = $(`answer-${n}`);
  if (n === 1) {
    box.hidden = known.bundle !== null && !known.bundle.methods.includes(1);
    if (box.hidden) return;
  }
  if (n === 3) {
    box.hidden = !state.bundle;
    if (!state.bundle) {
      drop("answer-3");
      delete known.answers[3];
      return;
    }
  }
  box.classList.add("waiting");
  box.setAttribute("aria-busy", "true");
  const other = n === 3 ? `?bundle=${encodeURIComponent(state.bundle)}` : "";
  const columns = n === 3 ? known.bundles.find((b) => b.id === state.bundle)?.context : undefined;
  try {
    const data = await ask(`answer-${n}`, `/v1/console/explain${other}`, { method: "POST", body: request(n === 3 ? state.method : n, columns) });
    if (!data) return; // a newer request is under way
    known.answers[n] = data;
    learn([...data.reply.items, ...data.history, ...data.filtered.items]);
  } catch (error) {
    delete known.answers[n];
    complain(error);
  }
  box.classList.remove("waiting");
  box.removeAttribute("aria-busy");
}

async function refresh() {
  write();
  drawAdded();
  if (!state.isNew && state.user === null) return;
  const other = answer(3).then(drawColumns); // loading a bundle does not delay the other answers
  await Promise.all([answer(1), answer(2)]);
  draw();
  const two = known.answers[2]?.reply;
  if (two?.items.length && !$("answer-2").classList.contains("waiting"))
    say([...news.splice(0), t("status_answer", { n: two.items.length, title: two.items[0].title, change: change() })].join(" "));
  await other;
}
const soon = debounce(200, refresh);

async function person() {
  drop("person");
  known.user = null;
  if (!state.isNew && state.user !== null) {
    const data = await guard(() => ask("person", `/v1/console/user?user_id=${encodeURIComponent(state.user)}`), start);
    if (data === null) return;
    if (data) {
      known.user = data;
      learn([...data.history, ...data.recent_events]);
    }
  }
  drawPerson();
}

async function choose(user) {
  Object.assign(state, { user, isNew: user === null, events: [], changed: {} });
  known.answers = {};
  calm();
  write(true);
  await Promise.all([person(), refresh()]);
}

async function chart(column) {
  const data = known.maps[column] || (await ask(`map-${column}`, `/v1/console/map?limit=4000${column ? `&column=${encodeURIComponent(column)}` : ""}`));
  if (data) {
    known.maps[column] = known.maps[data.column] = data;
    data.ids.forEach((id, n) => known.titles.set(id, data.titles[n]));
  }
  return data;
}

async function look(id, focus = true) {
  state.chosen = id;
  write();
  $("chosen-card").hidden = !id;
  if (!id) return drop("chosen");
  const path = (k) => `/v1/items/similar?item_id=${encodeURIComponent(id)}&k=${k}`;
  const data = await guard(async () => {
    try {
      return await ask("chosen", path(NEIGHBOURS));
    } catch (error) { // the service may allow fewer
      if (![400, 422].includes(error.status)) throw error;
      return ask("chosen", path(10));
    }
  }, () => look(id, false));
  if (data === undefined) $("chosen-card").hidden = true;
  if (!data) return;
  known.chosen = { id, items: data.items };
  learn(data.items);
  drawChosen();
  if (focus) {
    $("chosen-h").focus({ preventScroll: true });
    $("chosen-card").scrollIntoView({ block: "nearest", behavior: still() ? "auto" : "smooth" });
  }
}

async function nameUnknown() {
  for (const id of [...state.events.map((e) => e.id), ...state.ban, ...(state.chosen ? [state.chosen] : [])]) {
    if (known.titles.has(id)) continue;
    const data = await guard(() => ask(`name-${id}`, `/v1/console/items?limit=20&query=${encodeURIComponent(id)}`));
    if (data) learn(data.items);
  }
  draw();
}

// ---- changes of the request

function add(id, liked) {
  state.events = [...state.events.filter((e) => e.id !== id), { id, liked }];
  news.push(t("status_added", { title: title(id), kind: t(liked ? "liked" : "disliked") }));
  refresh();
}

function remove(id) {
  state.events = state.events.filter((e) => e.id !== id);
  news.push(t("status_removed", { title: title(id) }));
  $("item").focus();
  refresh();
}

function ban(id, on = true) {
  state.ban = on ? [...state.ban.filter((b) => b !== id), id] : state.ban.filter((b) => b !== id);
  news.push(t(on ? "status_banned" : "status_removed", { title: title(id) }));
  refresh();
}

async function send() {
  const data = await guard(() => ask("events", "/v1/events", { method: "POST", body: { user_id: state.user, events: toldEvents() } }), send);
  if (!data) return;
  state.events = [];
  await Promise.all([person(), refresh()]);
  say(t("sent", { n: data.recent_events, id: state.user }));
}

async function forget() {
  const data = await guard(() => ask("events", `/v1/events?user_id=${encodeURIComponent(state.user)}`, { method: "DELETE" }), forget);
  if (!data) return;
  await Promise.all([person(), refresh()]);
  say(t("forgotten", { id: state.user }));
}

// ---- rows

function actions(id, names) {
  const all = {
    like: ["like", t("add_liked", { title: title(id) }), () => add(id, true)],
    dislike: ["dislike", t("add_disliked", { title: title(id) }), () => add(id, false)],
    ban: ["ban", t("ban", { title: title(id) }), () => ban(id)],
    look: ["near", t("look", { title: title(id) }), () => look(id)],
  };
  return make("span", { class: "actions" }, ...names.map((name) => {
    const [picture, label, act] = all[name];
    return make("button", { type: "button", "aria-label": label, title: label, onclick: act }, icon(picture));
  }));
}

function itemTitle(id) {
  return make("button", { type: "button", class: "title", title: title(id), "aria-label": t("add_liked", { title: title(id) }), onclick: () => add(id, true) }, icon("like"), title(id));
}

function row(id, ...children) {
  return make("li", { "data-id": id, onpointerenter: () => light(id), onpointerleave: () => light(null), onfocusin: () => light(id), onfocusout: () => light(null) }, ...children);
}

/** An item of a side list: a click on the title adds it. */
const plain = (id, extra, value) =>
  row(id, ...(extra ? [extra] : []), itemTitle(id), actions(id, ["look", "dislike"]), ...(value ? [make("span", { class: "value" }, value)] : []));

/** The mark of a liked or a disliked event; none of one that is neither. */
const kind = (liked) => {
  if (liked === null) return null;
  const e = make("span", { class: `kind ${liked ? "liked" : ""}`, role: "img", "aria-label": t(liked ? "liked" : "disliked") });
  e.append(icon(liked ? "like" : "dislike"));
  return e;
};

/** Roving tabindex: one Tab stop for a list; arrow keys move inside. */
function rove(list, at = list.querySelector("[tabindex='0']")) {
  const all = [...list.querySelectorAll("li[data-id] button")];
  const one = all.includes(at) ? at : all[0];
  for (const b of all) b.tabIndex = b === one ? 0 : -1;
}

document.addEventListener("keydown", (event) => {
  const button = event.target.closest?.("li[data-id] button");
  if (!button || event.altKey || event.ctrlKey || event.metaKey) return;
  const here = button.closest("li"), list = here.parentElement;
  const rows = [...list.querySelectorAll("li[data-id]")], at = rows.indexOf(here);
  const buttons = [...here.querySelectorAll("button")], n = buttons.indexOf(button);
  const to = { ArrowDown: rows[at + 1], ArrowUp: rows[at - 1], Home: rows[0], End: rows.at(-1) }[event.key];
  const next = to ? [...to.querySelectorAll("button")][n] : { ArrowRight: buttons[n + 1], ArrowLeft: buttons[n - 1] }[event.key];
  if (!next) return;
  event.preventDefault();
  rove(list, next);
  next.focus();
});

/** Replaces the rows of a list. Rows of items that stay slide to their place; the focus stays. */
function put(list, rows) {
  const held = list.contains(document.activeElement) ? document.activeElement : null;
  const place = held ? [...list.children].indexOf(held.closest("li")) : -1;
  const mate = held && [...held.parentElement.children].indexOf(held);
  const before = new Map([...list.children].map((e) => [e.dataset.id, e.offsetTop]));
  list.replaceChildren(...rows);
  rove(list);
  if (held && rows.length) {
    const to = rows[Math.min(place, rows.length - 1)];
    const at = (held.closest(".actions") ? to.querySelector(".actions") : to)?.children[mate];
    const next = at?.matches("button") ? at : to.querySelector("button");
    rove(list, next);
    next?.focus({ preventScroll: true });
  }
  if (!before.size || still() || !list.classList.contains("best")) return;
  for (const e of rows) {
    const was = before.get(e.dataset.id);
    if (was === undefined) e.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 320 });
    else if (was !== e.offsetTop)
      e.animate([{ transform: `translateY(${was - e.offsetTop}px)` }, { transform: "none" }], { duration: 260, easing: "cubic-bezier(.2,.7,.2,1)" });
  }
}

function light(id, from = "list") {
  for (const e of document.querySelectorAll("li.lit")) if (e.dataset.id !== id) e.classList.remove("lit");
  if (id !== null) for (const e of document.querySelectorAll(`li[data-id="${CSS.escape(id)}"]`)) e.classList.add("lit");
  if (from === "list") map.light(id, false);
}

// ---- drawing

function draw() {
  drawColumns();
  drawWhy();
  drawHistory();
  drawAdded();
  if (known.chosen && state.chosen) drawChosen();
}

const places = (n) => new Map((known.answers[n]?.reply.items || []).map((i, at) => [i.id, at + 1]));

function change() {
  const one = places(1), two = places(2);
  const fresh = [...two.keys()].filter((id) => !one.has(id)).length;
  if (fresh) return t("changed", { n: number(fresh) });
  if ([...two].some(([id, at]) => one.get(id) !== at)) return t("reordered");
  return t("same");
}

function drawColumns() {
  const named = state.isNew ? "by_popular" : "by_1";
  const heads = { 1: [t("method_1"), t(named)], 2: [t("method_2"), t("by_2")], 3: [t("other_bundle"), t("by_other", { method: state.method })] };
  for (const n of [1, 2, 3]) {
    const box = $(`answer-${n}`), data = known.answers[n];
    box.querySelector("h3").textContent = heads[n][0];
    box.querySelector(".by").textContent = heads[n][1];
    const list = box.querySelector(".best"), note = box.querySelector(".note"), meta = box.querySelector(".meta");
    if (!data) {
      const waits = box.classList.contains("waiting");
      meta.replaceChildren();
      note.textContent = waits ? t("waiting") : t("no_answer");
      list.replaceChildren();
      continue;
    }
    const { reply } = data;
    meta.replaceChildren(...[
      t(`source_${reply.source}`), t("ms", { n: number(reply.milliseconds, 1) }),
      ...(reply.recent_events ? [t("recent_used", { n: number(reply.recent_events) })] : []), reply.bundle_id,
    ].map((text) => make("span", {}, text)));
    const notes = [];
    if (n === 1 && state.isNew) notes.push(t("new_user_1"));
    if (n === 1 && !state.isNew && Object.keys(state.changed).length) notes.push(t("changed_1"));
    if (n === 2 && known.answers[1] && !state.isNew) notes.push(change());
    const rivals = places(n === 1 ? 2 : n === 2 ? 1 : state.method);
    if (n === 3) notes.push(t("overlap", { n: reply.items.filter((i) => rivals.has(i.id)).length, k: reply.items.length }));
    if (!reply.items.length) notes.push(t("nothing"));
    else if (reply.truncated) notes.push(t("truncated"));
    if (reply.unknown.length) notes.push(t("unknown", { names: reply.unknown.join(", ") }));
    note.textContent = notes.join(" · ");
    put(list, reply.items.map((item, at) => {
      const r = row(item.id, make("span", { class: "n" }, String(at + 1)), itemTitle(item.id), mark(n, at + 1, rivals, item.id),
        score(["popular", "fallback"].includes(reply.source) ? null : item.score),
        actions(item.id, ["look", "dislike", "ban"]));
      if (n === 1 && rivals.size && !rivals.has(item.id)) r.classList.add("out");
      return r;
    }));
  }
}

/** The score of an item; empty for popular items. */
function score(value) {
  if (value === null) return make("span", { class: "score" });
  return make("span", { class: "score", role: "img", "aria-label": t("score", { n: number(value, 3) }) }, number(value, 3));
}

function mark(n, at, rivals, id) {
  const from = rivals.get(id);
  const tell = (what, shown, text) => {
    const e = make("span", { class: `move ${what}`, role: "img", "aria-label": text, title: text });
    e.append(shown);
    return e;
  };
  if (!rivals.size) return make("span", { class: "move" });
  if (n === 1) return from ? make("span", { class: "move" }) : tell("gone", "–", t("gone"));
  if (!from) return tell("fresh", t("fresh"), t("fresh"));
  if (from > at) return tell("up", `▲ ${from - at}`, t("up", { n: from - at }));
  if (from < at) return tell("down", `▼ ${at - from}`, t("down", { n: at - from }));
  return make("span", { class: "move" });
}

function drawWhy() {
  press("method-1", state.method === 1);
  press("method-2", state.method === 2);
  const data = known.answers[state.method];
  const gates = data?.gates || [];
  fill("gates-note", !data ? "" : gates.length ? t("gates_note") : data.reply.source === "popular" ? t("gates_popular")
    : known.answers[2]?.gates.length ? t("gates_1") : t("gates_none"));
  // A bar is a share of 1, or of the largest weight if that exceeds 1.
  const whole = Math.max(1, ...gates.flatMap((g) => g.weights));
  const old = [...document.querySelectorAll("#gates .bar i")].map((e) => e.style.width);
  let nth = 0;
  $("gates").replaceChildren(...gates.map((gate) => make("div", { class: "gate" },
    ...(gates.length > 1 ? [make("h3", {}, gate.name)] : []),
    make("ul", { "aria-label": gate.name }, ...gate.fields.map((field, n) => {
      const bar = make("i");
      const width = `${(Math.max(gate.weights[n], 0) / whole) * 100}%`;
      bar.style.width = old[nth++] || width;
      requestAnimationFrame(() => (bar.style.width = width));
      return make("li", {}, make("span", { class: "name", title: field }, field), make("span", { class: "bar", "aria-hidden": "true" }, bar), make("span", { class: "value" }, number(gate.weights[n], 2)));
    })))));

  const f = data?.filtered;
  const sums = f ? [["sum_seen", f.seen], ["sum_banned", f.banned], ...(f.where === null || f.where === undefined ? [] : [["sum_where", f.where]])] : [];
  $("sums").replaceChildren(...sums.map(([name, n]) => make("div", {}, make("dt", {}, t(name)), make("dd", {}, number(n)))));
  const left = f?.items || [];
  put($("out"), left.map((i) => plain(i.id)));
  $("out-best-h").hidden = !f;
  if (f && !left.length) $("out").append(make("li", { class: "note" }, t("left_none")));

  const point = data?.point || null;
  const stored = state.method === 2 && !state.isNew ? known.answers[1]?.point || null : null;
  map.show({
    best: (data?.reply.items || []).map((i) => i.id),
    user: point && { now: point, stored, name: state.isNew ? t("new_point") : t("user_named", { id: state.user }) },
  });
  drawMapNote();
}

function drawMapNote() {
  const data = known.answers[state.method], chart = map.data;
  const all = known.bundle?.counts.items ?? 0, n = chart?.ids.length ?? 0;
  const best = map.best.filter((id) => map.index.has(id)).length;
  const shown = !chart ? "" : n < all ? t("map_some", { n: number(n), all: number(all), best: number(best) }) : t("map_all", { n: number(n) });
  const length = data?.vector_norm ? t("norm", { n: number(data.vector_norm, 2) }) : "";
  fill("map-note", [shown, length].filter(Boolean).join(" "));
}

function drawPerson() {
  press("new", state.isNew);
  $("user").value = state.user ?? "";
  fill("who-note", state.isNew ? t("new_note") : "");
  const own = known.user?.features || {};
  const named = known.bundle?.features.user || [];
  $("features").classList.toggle("empty", state.isNew);
  const names = [...new Set([...Object.keys(own), ...named])];
  const plainly = (v) => (v === null || v === undefined ? "" : typeof v === "object" ? JSON.stringify(v) : String(v));
  const held = $("features").contains(document.activeElement) ? document.activeElement.name : null;
  $("features").replaceChildren(...names.map((name) => {
    const stored = plainly(own[name]);
    const input = make("input", { type: "text", name, value: state.changed[name] ?? stored, autocomplete: "off", spellcheck: "false" });
    input.readOnly = !named.includes(name) || typeof (own[name] ?? "") === "object";
    input.addEventListener("change", () => {
      if (input.value === stored) delete state.changed[name];
      else state.changed[name] = input.value;
      drawPerson();
      refresh();
    });
    return make("label", { class: name in state.changed ? "changed" : "" }, make("span", { title: name }, name), input);
  }));
  if (Object.keys(state.changed).length) {
    $("features").append(make("button", { type: "button", class: "link", onclick: () => {
      state.changed = {};
      drawPerson();
      refresh();
    } }, t("features_restore")));
    if (!state.isNew) fill("who-note", t("features_changed"));
  }
  if (held) $("features").querySelector(`input[name="${CSS.escape(held)}"]`)?.focus();
  drawAdded();
  drawHistory();
}

function drawContext() {
  const columns = Object.entries(known.bundle?.context || {});
  $("context-card").hidden = !columns.length;
  $("context").replaceChildren(...columns.map(([name, value]) => {
    const first = value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    const input = make("input", { type: "text", name, value: state.context[name] ?? first, placeholder: value === null ? t("context_now") : "", autocomplete: "off", spellcheck: "false" });
    const label = make("label", { class: name in state.context ? "changed" : "" }, make("span", { title: name }, name), input);
    input.addEventListener("change", () => {
      if (input.value === first) delete state.context[name];
      else state.context[name] = input.value;
      label.className = name in state.context ? "changed" : "";
      refresh();
    });
    return label;
  }));
}

function drawAdded() {
  const events = state.events, recent = known.user?.recent_events || [];
  fill("added-n", events.length ? number(events.length) : "");
  put($("chips"), events.map((e) => {
    const name = title(e.id);
    const other = t(e.liked ? "now_liked" : "now_disliked", { title: name });
    const away = t("take_away", { title: name });
    const types = known.bundle?.events || [];
    const type = make("select", { class: "type", "aria-label": t("type_of", { title: name }), onchange: () => {
      e.event = type.value;
      refresh();
    } }, ...["", ...types].map((value) => make("option", { value }, value || t("type_untold"))));
    type.value = e.event || "";
    return make("li", { class: `chip ${e.liked ? "liked" : "disliked"}`, "data-id": e.id },
      ...(types.length ? [type] : []),
      ...(e.event ? [] : [make("button", { type: "button", class: "kind", "aria-label": other, title: other, onclick: () => {
        e.liked = !e.liked;
        refresh();
      } }, icon(e.liked ? "like" : "dislike"))]),
      make("span", { title: name }, name),
      make("button", { type: "button", class: "away", "aria-label": away, title: away, onclick: () => remove(e.id) }, icon("close")));
  }));
  const unread = known.bundle && !known.bundle.history;
  fill("added-note", unread ? t("history_unread") : events.length || recent.length ? "" : t("added_none"));
  $("recent-box").classList.toggle("some", recent.length > 0);
  fill("recent-n", recent.length ? number(recent.length) : "");
  put($("recent"), recent.map((e) => plain(e.id, kind(e.liked))));
  $("send").disabled = state.isNew || state.user === null || !events.length;
  $("forget").disabled = state.isNew || !recent.length;
  $("banned").classList.toggle("some", state.ban.length > 0);
  put($("banned").querySelector("ul"), state.ban.map((id) => {
    const label = t("unban", { title: title(id) });
    return make("li", { class: "chip", "data-id": id }, make("span", {}, title(id)),
      make("button", { type: "button", "aria-label": label, title: label, onclick: () => ban(id, false) }, icon("close")));
  }));
}

function drawHistory() {
  const user = known.user;
  const own = user?.history || [];
  const n = user?.events ?? own.length;
  fill("history-n", n ? number(n) : "");
  fill("history-note", !own.length ? t("history_none") : n > own.length ? t("history_last", { shown: number(own.length), n: number(n) }) : t("history_all"));
  const key = `${spoken()} ${own.map((e) => e.id)}`;
  if ($("history").dataset.key === key) return; // unchanged
  $("history").dataset.key = key;
  put($("history"), own.toReversed().map((e) => plain(e.id, kind(e.liked))));
}

function drawChosen() {
  const { id, items } = known.chosen;
  fill("chosen-h", title(id));
  const held = [...$("chosen-actions").querySelectorAll("button")].indexOf(document.activeElement);
  $("chosen-actions").replaceChildren(actions(id, ["like", "dislike", "ban"]));
  $("chosen-actions").querySelectorAll("button")[held]?.focus({ preventScroll: true });
  const rank = (n) => (places(n).has(id) ? t("rank", { n: places(n).get(id) }) : t("not_best"));
  fill("chosen-note", t("chosen_rank", { id, one: rank(1), two: rank(2) }));
  const read = known.answers[2]?.history || known.user?.history || [];
  const met = new Map(read.map((e) => [e.id, e.liked]));
  const near = items.filter((i) => met.has(i.id)).slice(0, 5);
  put($("similar-in-history"), near.map((i) => plain(i.id, kind(met.get(i.id)), number(i.score, 2))));
  fill("similar-in-history-note", near.length ? "" : t("similar_in_history_none", { n: items.length }));
  put($("similar"), items.slice(0, 10).map((i) => plain(i.id, null, number(i.score, 2))));
}

function drawLegend() {
  const column = known.maps[state.column]?.column;
  $("column").replaceChildren(...(known.maps[state.column]?.columns || []).map((c) => make("option", { value: c }, c)));
  if (column) $("column").value = column;
  $("legend").replaceChildren(...map.groups.map((group, n) => make("li", { class: `g${n}` },
    make("button", { type: "button", "aria-pressed": String(map.alone === n), onclick: () => {
      map.alone = map.alone === n ? null : n;
      map.draw();
      [...$("legend").querySelectorAll("button")].forEach((b, m) => b.setAttribute("aria-pressed", String(map.alone === m)));
    } }, make("i"), group))), make("li", {}, make("span", { class: "rest" }, make("i"), t("others"))));
}

function drawTools() {
  $("k").value = state.k;
  const columns = known.bundle?.features.item || [];
  $("where-column").replaceChildren(make("option", { value: "" }, t("where_any")), ...columns.map((c) => make("option", { value: c }, c)));
  $("where-column").value = state.where.column;
  $("where-value").value = state.where.value;
  $("where-value-box").hidden = !state.where.column;
  const current = known.bundle?.bundle_id;
  $("bundle").replaceChildren(make("option", { value: "" }, t("compare_none")), ...known.bundles.map((b) => {
    const served = b.id === current;
    const e = make("option", { value: b.id }, t(b.damaged ? "bundle_damaged" : served ? "bundle_current" : "bundle_plain", { id: b.id }));
    e.disabled = Boolean(b.damaged);
    return e;
  }));
  $("bundle").value = state.bundle;
  if (known.bundle) {
    const { counts, recall_check: check, bundle_id: id } = known.bundle;
    const recall = check?.recall;
    const facts = { users: number(counts.users), items: number(counts.items), recall: recall === undefined ? "" : number(recall, 3) };
    $("facts").replaceChildren(make("span", {}, t(recall === undefined ? "facts_bare" : "facts", facts)), make("span", {}, id));
  }
  press("whole", !state.near);
  press("close-up", state.near);
}

function drawAll() {
  speak(state.lang);
  fill("lang", t("other_language"));
  $("lang").lang = state.lang === "zh" ? "en" : "zh-CN";
  drawTools();
  drawPerson();
  drawContext();
  drawLegend();
  draw();
}

// ---- suggestions for the value of a filter, from the groups of the map

async function offer() {
  const column = state.where.column;
  $("where-values").replaceChildren();
  const columns = known.maps[""]?.columns || [];
  if (!columns.includes(column)) return;
  const data = await guard(() => chart(column));
  if (data && state.where.column === column) $("where-values").replaceChildren(...data.groups.map((g) => make("option", { value: g })));
}

async function colour() {
  const data = await guard(() => chart(state.column), colour);
  if (!data) return;
  map.show({ data: data });
  drawLegend();
  drawMapNote();
}

// ---- wiring

const map = new Map2d($("map"), $("tip"), {
  add,
  hover: (id) => light(id, "map"),
  label: (n, id) => say(`${t("rank", { n })}: ${title(id)}`),
});

combobox($("user"), {
  find: async (text) => {
    const data = await guard(() => ask("users", `/v1/console/users?limit=20&query=${encodeURIComponent(text)}`), () => $("user").focus());
    return data && { options: data.users.map((u) => ({ id: u.id, text: u.id, more: t("events_n", { n: number(u.events) }) })), total: number(data.total) };
  },
  choose: (option) => choose(option.id),
  rest: () => state.user ?? "",
});
combobox($("item"), {
  find: async (text) => {
    const data = await guard(() => ask("items", `/v1/console/items?limit=20&query=${encodeURIComponent(text)}`), () => $("item").focus());
    if (data) learn(data.items);
    return data && { options: data.items.map((i) => ({ id: i.id, text: i.title })), total: number(data.total) };
  },
  choose: (option) => add(option.id, true),
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the view's
  $("answers").focus();
  $("answers").scrollIntoView();
});
$("new").addEventListener("click", () => choose(null));
$("send").addEventListener("click", send);
$("forget").addEventListener("click", forget);
$("chosen-close").addEventListener("click", () => {
  known.chosen = null;
  look("");
  const back = document.querySelector("#answer-2 .best .title");
  back?.focus({ preventScroll: true });
});
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("k").addEventListener("input", () => {
  const k = Number($("k").value);
  if (!Number.isInteger(k) || k < 1 || k > 100) return;
  state.k = k;
  soon();
});
$("k").addEventListener("blur", () => ($("k").value = state.k));
$("where-column").addEventListener("change", () => {
  const asked = state.where.value;
  state.where = { column: $("where-column").value, value: "" };
  drawTools();
  offer();
  if (asked) refresh();
  else write();
});
$("where-value").addEventListener("input", () => {
  state.where.value = $("where-value").value.trim();
  soon();
});
$("bundle").addEventListener("change", async () => {
  state.bundle = $("bundle").value;
  delete known.answers[3];
  write();
  const asked = answer(3);
  drawColumns();
  await asked;
  drawColumns();
});
for (const n of [1, 2])
  $(`method-${n}`).addEventListener("click", async () => {
    state.method = n;
    write();
    drawWhy();
    await answer(3);
    drawColumns();
  });
$("column").addEventListener("change", () => {
  state.column = $("column").value;
  write();
  colour();
});
for (const [id, near] of [["whole", false], ["close-up", true]])
  $(id).addEventListener("click", () => {
    map.near = state.near = near;
    write();
    drawTools();
    map.draw();
  });
$("lang").addEventListener("click", () => {
  state.lang = state.lang === "zh" ? "en" : "zh";
  write();
  drawAll();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const themed = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
const keptTheme = () => {
  try {
    return localStorage.getItem("twotower-theme");
  } catch {
    return null;
  }
};
if (["light", "dark"].includes(keptTheme())) document.documentElement.dataset.theme = keptTheme();
press("theme", themed() === "dark");
$("theme").addEventListener("click", () => {
  const next = themed() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  press("theme", next === "dark");
  try {
    localStorage.setItem("twotower-theme", next);
  } catch {
    // a browser that keeps nothing still shows it
  }
  map.draw();
});
dark.addEventListener("change", () => {
  press("theme", themed() === "dark");
  map.draw();
});

$("ask-key").addEventListener("submit", () => {
  keep($("key").value.trim());
  $("key").value = "";
  calm();
  start();
});
$("key-cancel").addEventListener("click", () => $("ask-key").close());

addEventListener("popstate", () => { // also when the address is edited
  Object.assign(state, read());
  known.answers = {};
  start();
});

// ---- the beginning

async function start() {
  map.near = state.near;
  const data = await guard(() => Promise.all([ask("bundle", "/v1/bundle"), ask("bundles", "/v1/console/bundles")]), start);
  if (!data || data.includes(null)) return;
  known.bundle = data[0];
  known.bundles = data[1].bundles;
  if (state.user === null && !state.isNew) { // an example to begin with
    const first = await guard(() => ask("first", "/v1/console/users?limit=1"), start);
    if (!first) return;
    state.user = first.users[0]?.id ?? null;
    state.isNew = state.user === null;
  }
  drawAll();
  await Promise.all([person(), refresh(), colour().then(offer), ...(state.chosen ? [look(state.chosen, false)] : [])]);
  await nameUnknown();
}

$("past").open = matchMedia("(min-width: 901px)").matches;
drawAll();
start();
