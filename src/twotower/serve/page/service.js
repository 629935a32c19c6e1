// Requests to the service. A new request of a slot aborts the older one, so an old answer never comes last.

const KEY = "twotower-key";
const MAX_RETRIES = 3; // of a request to a busy service
const MAX_RETRY_AFTER = 2; // seconds; a longer wait is shown as a problem
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

/** The JSON reply; null if a newer request of the same slot aborted this one. Throws Problem.
 *  Retries while the service is busy for a moment. */
export async function ask(slot, path, { method = "GET", body } = {}) {
  running.get(slot)?.abort();
  const control = new AbortController();
  running.set(slot, control);
  const headers = { Accept: "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: control.signal };
  for (let left = MAX_RETRIES; ; left--) {
    let reply, data;
    try {
      reply = await fetch(path, options);
      data = reply.status === 204 ? {} : await reply.json().catch(() => ({}));
    } catch {
      if (control.signal.aborted) return null;
      throw new Problem(0);
    }
    if (running.get(slot) !== control) return null;
    const seconds = Number(reply.headers.get("Retry-After")) || 1;
    if ([429, 503].includes(reply.status) && left && seconds <= MAX_RETRY_AFTER) {
      await new Promise((done) => setTimeout(done, seconds * 1000));
      if (running.get(slot) !== control) return null;
      continue;
    }
    running.delete(slot);
    if (!reply.ok) throw new Problem(reply.status, data, seconds);
    return data;
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
