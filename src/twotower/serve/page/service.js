// Questions to the service. A newer question of a slot ends the older one, so an old answer never comes last.

const KEY = "twotower-key";
const PATIENCE = 3; // times that a busy service is asked again
const BRIEF = 2; // seconds that it may ask to wait, and is waited for without a word
const running = new Map();

export class Problem extends Error {
  constructor(status, body = {}, seconds = 1) {
    super(body.detail || body.title || "");
    this.status = status;
    this.request = body.instance || "";
    this.errors = body.errors || [];
    this.seconds = seconds;
  }
}

export const keep = (key) => sessionStorage.setItem(KEY, key);

/** The JSON answer, or null if a newer question of the same slot has overtaken this one. Throws Problem.
 *  A service that is busy for a moment is asked again. */
export async function ask(slot, path, { method = "GET", body } = {}) {
  running.get(slot)?.abort();
  const control = new AbortController();
  running.set(slot, control);
  const headers = { Accept: "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const question = { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: control.signal };
  for (let left = PATIENCE; ; left--) {
    let reply, told;
    try {
      reply = await fetch(path, question);
      told = reply.status === 204 ? {} : await reply.json().catch(() => ({}));
    } catch {
      if (control.signal.aborted) return null;
      throw new Problem(0);
    }
    if (running.get(slot) !== control) return null;
    const seconds = Number(reply.headers.get("Retry-After")) || 1;
    if ([429, 503].includes(reply.status) && left && seconds <= BRIEF) {
      await new Promise((done) => setTimeout(done, seconds * 1000));
      if (running.get(slot) !== control) return null;
      continue;
    }
    running.delete(slot);
    if (!reply.ok) throw new Problem(reply.status, told, seconds);
    return told;
  }
}

export function drop(slot) {
  running.get(slot)?.abort();
  running.delete(slot);
}

export function debounce(wait, call) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(call, wait, ...values);
  };
}
