// The map of item vectors on a canvas: items as points, the user, the recommended items outlined.

const SHOWN = 6; // groups with a colour; the rest is grey
const NEAR = 12; // CSS pixels around a point that select it

/** `add(id, liked)`: an item is chosen. `hover(id or null)`: the pointer is on an item. `label(rank, id)`: the keyboard
 *  selects an item. */
export class Map2d {
  constructor(canvas, tip, { add, hover, label }) {
    Object.assign(this, { canvas, tip, add, hover, label });
    this.data = null;
    this.best = []; // ids, best first
    this.user = null; // {now: [x, y], stored: [x, y] or null, name}
    this.alone = null; // the group that is shown alone
    this.near = false; // the view is around the answer
    this.lit = null; // the id that is pointed at
    this.at = -1; // the place among the best that has the keyboard
    this.index = new Map();
    canvas.addEventListener("pointermove", (e) => this.light(this.hit(e)));
    canvas.addEventListener("pointerleave", () => this.light(null));
    canvas.addEventListener("click", (e) => {
      const id = this.hit(e);
      if (id !== null) this.add(id, !e.shiftKey);
    });
    canvas.addEventListener("keydown", (e) => this.key(e));
    canvas.addEventListener("focus", () => this.go(Math.max(this.at, 0)));
    canvas.addEventListener("blur", () => this.light(null));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show({ data = this.data, best = this.best, user = this.user }) {
    if (data !== this.data) {
      this.data = data;
      this.alone = null;
      this.index = new Map(data.ids.map((id, n) => [id, n]));
    }
    Object.assign(this, { best, user });
    this.at = Math.min(this.at, best.length - 1);
    this.draw();
  }

  get groups() {
    return this.data ? this.data.groups.slice(0, SHOWN) : [];
  }

  go(n) {
    if (!this.best.length) return;
    this.at = (n + this.best.length) % this.best.length;
    const id = this.best[this.at];
    this.light(id);
    this.label(this.at + 1, id);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) this.go(this.at + step);
    else if (event.key === "Home") this.go(0);
    else if (event.key === "End") this.go(this.best.length - 1);
    else if (event.key === "Enter" && this.at >= 0 && this.best.length) this.add(this.best[this.at], !event.shiftKey);
    else if (event.key === "Escape") this.light(null);
    else return;
    event.preventDefault();
  }

  light(id, tell = true) {
    if (id === this.lit) return;
    this.lit = id;
    this.draw();
    if (tell) this.hover(id);
  }

  hit(event) {
    if (!this.place || !this.data) return null;
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const best = new Set(this.best);
    let found = null, least = NEAR * NEAR;
    this.data.points.forEach(([px, py, group], n) => {
      const id = this.data.ids[n];
      if (this.alone !== null && group !== this.alone && !best.has(id)) return;
      const [cx, cy] = this.place(px, py);
      const d = (cx - x) ** 2 + (cy - y) ** 2 - (best.has(id) ? 30 : 0); // outlined items come first
      if (d < least) [found, least] = [id, d];
    });
    return found;
  }

  /** The visible part of the plane: [x0, y0, x1, y1]. */
  window() {
    let points = this.data.points;
    if (this.near) {
      const chosen = this.best.filter((id) => this.index.has(id)).map((id) => points[this.index.get(id)]);
      if (this.user) chosen.push(this.user.now);
      if (this.user?.stored) chosen.push(this.user.stored);
      if (chosen.length) points = chosen;
    } else if (this.user) points = [...points, this.user.now, ...(this.user.stored ? [this.user.stored] : [])];
    let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const [x, y] of points) {
      x0 = Math.min(x0, x); x1 = Math.max(x1, x);
      y0 = Math.min(y0, y); y1 = Math.max(y1, y);
    }
    const grow = this.near ? 0.15 : 0.02, least = this.near ? 0.05 : 0.01;
    const dx = Math.max((x1 - x0) * grow, least), dy = Math.max((y1 - y0) * grow, least);
    return [x0 - dx, y0 - dy, x1 + dx, y1 + dy];
  }

  draw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => {
      this.asked = 0;
      this.paint();
    });
  }

  paint() {
    const { canvas, data } = this;
    const width = canvas.clientWidth, height = canvas.clientHeight, dots = devicePixelRatio || 1;
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * dots)) canvas.width = Math.round(width * dots);
    if (canvas.height !== Math.round(height * dots)) canvas.height = Math.round(height * dots);
    const c = canvas.getContext("2d");
    c.setTransform(dots, 0, 0, dots, 0, 0);
    c.clearRect(0, 0, width, height);
    this.tip.hidden = true;
    if (!data) return;
    const colour = palette(canvas);
    const [x0, y0, x1, y1] = this.window();
    const pad = 14;
    this.place = (x, y) => [pad + ((x - x0) / (x1 - x0)) * (width - 2 * pad), height - pad - ((y - y0) / (y1 - y0)) * (height - 2 * pad)];
    const dot = (x, y, r) => {
      c.beginPath();
      c.arc(x, y, r, 0, 7);
    };

    const size = this.near ? 3 : 2;
    for (let group = -1; group < SHOWN; group++) { // grey lies lowest
      const faint = this.alone !== null && group !== this.alone;
      c.fillStyle = group < 0 || faint ? colour.other : colour.groups[group];
      c.globalAlpha = faint ? 0.25 : group < 0 ? 0.5 : 0.8;
      for (const [px, py, g] of data.points) {
        if ((g < SHOWN ? g : -1) !== group) continue;
        const [x, y] = this.place(px, py);
        dot(x, y, size);
        c.fill();
      }
    }
    c.globalAlpha = 1;

    const spot = (id) => {
      const n = this.index.get(id);
      return n === undefined ? null : this.place(data.points[n][0], data.points[n][1]);
    };
    for (const id of [...this.best].reverse()) {
      const p = spot(id);
      if (!p) continue;
      const g = data.points[this.index.get(id)][2];
      dot(...p, 5.5);
      c.fillStyle = g >= 0 && g < SHOWN ? colour.groups[g] : colour.other;
      c.fill();
      c.lineWidth = 4.5;
      c.strokeStyle = colour.back;
      c.stroke();
      c.lineWidth = 1.75;
      c.strokeStyle = colour.ink;
      c.stroke();
    }
    if (this.user) this.paintUser(c, colour);

    const p = this.lit === null ? null : spot(this.lit);
    if (p) {
      dot(...p, 8);
      c.lineWidth = 5;
      c.strokeStyle = colour.back;
      c.stroke();
      c.lineWidth = 2.5;
      c.strokeStyle = colour.accent;
      c.stroke();
      const rank = this.best.indexOf(this.lit);
      const title = data.titles[this.index.get(this.lit)];
      this.tip.textContent = (rank < 0 ? "" : `${rank + 1}  `) + title + (title === this.lit ? "" : ` (${this.lit})`);
      this.tip.hidden = false;
      const half = this.tip.offsetWidth / 2 + 4;
      const x = Math.min(Math.max(p[0], half), width - half);
      const y = p[1] < 48 ? p[1] + 16 : p[1] - 16 - this.tip.offsetHeight;
      this.tip.style.transform = `translate(${Math.round(x - half + 4)}px, ${Math.round(y)}px)`;
    }
    canvas.dataset.points = data.points.length;
    canvas.dataset.best = this.best.filter((id) => this.index.has(id)).length;
    canvas.dataset.user = this.user ? this.place(...this.user.now).map(Math.round).join(",") : "";
  }

  paintUser(c, colour) {
    const [x, y] = this.place(...this.user.now);
    const diamond = (x, y, r) => {
      c.beginPath();
      c.moveTo(x, y - r); c.lineTo(x + r, y); c.lineTo(x, y + r); c.lineTo(x - r, y);
      c.closePath();
    };
    if (this.user.stored) {
      const [sx, sy] = this.place(...this.user.stored);
      if (Math.hypot(sx - x, sy - y) > 6) { // the user without the recent events
        for (const [w, s] of [[5, colour.back], [2, colour.accent]]) {
          c.beginPath();
          c.moveTo(sx, sy); c.lineTo(x, y);
          c.lineWidth = w;
          c.strokeStyle = s;
          c.stroke();
        }
        diamond(sx, sy, 6);
        c.fillStyle = colour.back;
        c.fill();
        c.lineWidth = 2;
        c.strokeStyle = colour.accent;
        c.stroke();
      }
    }
    diamond(x, y, 9);
    c.lineWidth = 5;
    c.strokeStyle = colour.back;
    c.stroke();
    c.fillStyle = colour.accent;
    c.fill();
    this.tag(c, colour, x, y);
  }

  /** Draws the user's name beside the diamond, on the side where it covers the fewest recommended items. */
  tag(c, colour, x, y) {
    c.font = `600 12px ${getComputedStyle(this.canvas).fontFamily}`;
    const wide = c.measureText(this.user.name).width + 14, high = 21;
    const others = this.best.filter((id) => this.index.has(id)).map((id) => this.place(...this.data.points[this.index.get(id)]));
    let chosen = null, least = Infinity;
    for (const [left, top] of [[x + 13, y - high / 2], [x - 13 - wide, y - high / 2], [x - wide / 2, y + 13], [x - wide / 2, y - 13 - high]]) {
      const outside = left < 2 || top < 2 || left + wide > this.canvas.clientWidth - 2 || top + high > this.canvas.clientHeight - 2;
      const covered = others.filter(([ox, oy]) => ox > left - 8 && ox < left + wide + 8 && oy > top - 8 && oy < top + high + 8).length;
      const cost = covered + (outside ? 100 : 0);
      if (cost < least) [chosen, least] = [[left, top], cost];
    }
    c.beginPath();
    c.roundRect(...chosen, wide, high, 6);
    c.fillStyle = colour.accent;
    c.fill();
    c.fillStyle = colour.on;
    c.textAlign = "left";
    c.textBaseline = "middle";
    c.fillText(this.user.name, chosen[0] + 7, chosen[1] + high / 2 + 0.5);
  }
}

/** The colours of the style sheet in the current theme. */
function palette(near) {
  const probe = near.parentElement.appendChild(document.createElement("span"));
  const of = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const colours = {
    groups: Array.from({ length: SHOWN }, (_, n) => of(`group-${n}`)),
    other: of("group-other"), back: of("panel"), ink: of("ink"), accent: of("accent"), on: of("on-accent"),
  };
  probe.remove();
  return colours;
}
