// An input with a list of options, after the ARIA pattern "editable combobox with list autocomplete".

import { debounce } from "./service.js";
import { t } from "./words.js";

/** `find(text)` -> {options: [{id, text, more}], total}, or null if a newer search aborted it; `choose(option)` is called with
 *  the chosen one; `rest()` is the text shown without a search. */
export function combobox(input, { find, choose, rest = () => "" }) {
  const list = document.createElement("ul");
  list.id = `${input.id}-list`;
  list.className = "options";
  list.hidden = true;
  list.setAttribute("role", "listbox");
  const status = document.createElement("p");
  status.className = "unseen";
  status.setAttribute("role", "status");
  input.after(list, status);
  for (const [name, value] of Object.entries({ role: "combobox", "aria-autocomplete": "list", "aria-controls": list.id, "aria-expanded": "false" }))
    input.setAttribute(name, value);

  let options = [], at = -1, wanted = 0;

  const mark = (n) => {
    at = n;
    [...list.querySelectorAll("[role=option]")].forEach((e, i) => {
      e.setAttribute("aria-selected", String(i === n));
      if (i === n) e.scrollIntoView({ block: "nearest" });
    });
    if (n >= 0) input.setAttribute("aria-activedescendant", `${list.id}-${n}`);
    else input.removeAttribute("aria-activedescendant");
  };

  const show = (open) => {
    list.hidden = !open;
    input.setAttribute("aria-expanded", String(open));
    if (!open) {
      mark(-1);
      status.textContent = "";
    }
  };

  const close = () => {
    wanted++;
    show(false);
    input.value = rest();
  };

  const take = (n) => {
    const option = options[n];
    options = [];
    close();
    if (option) choose(option);
    input.value = rest();
  };

  const search = async (text, first) => {
    const mine = ++wanted;
    let found;
    try {
      found = await find(text);
    } catch {
      return show(false); // `find` has shown the problem
    }
    if (!found || mine !== wanted || document.activeElement !== input) return;
    options = found.options;
    list.setAttribute("aria-label", input.getAttribute("aria-label"));
    list.replaceChildren(...options.map((o, i) => {
      const e = document.createElement("li");
      e.id = `${list.id}-${i}`;
      e.setAttribute("role", "option");
      const name = document.createElement("span");
      name.textContent = o.text;
      e.append(name);
      if (o.more) {
        const more = document.createElement("span");
        more.className = "more";
        more.textContent = o.more;
        e.append(more);
      }
      e.addEventListener("pointerdown", (event) => event.preventDefault()); // the input keeps the focus
      e.addEventListener("click", () => take(i));
      return e;
    }));
    status.textContent = options.length ? t("options_n", { shown: options.length, total: found.total }) : t("no_options");
    if (!options.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.setAttribute("role", "presentation");
      none.textContent = t("no_options");
      list.append(none);
    }
    show(true);
    mark(options.length ? Math.min(Math.max(first, -1), options.length - 1) : -1);
  };
  const soon = debounce(150, search);

  input.addEventListener("input", () => {
    wanted++;
    options = [];
    mark(-1);
    soon(input.value.trim(), -1);
  });
  input.addEventListener("focus", () => input.select());
  input.addEventListener("click", () => list.hidden && search(input.value === rest() ? "" : input.value.trim(), -1));
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const n = options.length;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && list.hidden) search(input.value === rest() ? "" : input.value.trim(), step > 0 ? 0 : 1e9);
    else if (step && n) mark((at + step + n + (at < 0 && step < 0 ? 1 : 0)) % n);
    else if (event.key === "Enter" && !list.hidden && n) take(Math.max(at, 0));
    else if (event.key === "Escape" && (!list.hidden || input.value !== rest())) close();
    else return;
    event.preventDefault();
  });
}
