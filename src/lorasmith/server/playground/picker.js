// Which models answer: one in a chat, several side by side.

import { getJSON } from "./api.js";
import { byId, el, hallmark } from "./dom.js";

export const MOST_SIDE_BY_SIDE = 6;

export class Picker {
  #models = [];
  #one = null;
  #several = new Set();
  #mode = "chat";

  /** `onChange` is called with no arguments whenever the choice changes; `onShow` with a model to show. */
  constructor({ onChange, onShow }) {
    this.onChange = onChange;
    this.onShow = onShow;
    byId("filter").addEventListener("input", () => this.#draw());
  }

  get chosen() {
    const wanted = this.#mode === "chat" ? [this.#one] : [...this.#several];
    return this.#models.filter((model) => wanted.includes(model.id));
  }

  set mode(mode) {
    this.#mode = mode;
    this.#draw();
    this.onChange();
  }

  /** Ask the server again; what is chosen stays chosen while it exists. */
  async load() {
    this.#models = (await getJSON("/v1/models")).data;
    const ids = this.#models.map((model) => model.id);
    if (!ids.includes(this.#one)) this.#one = ids[1] ?? ids[0] ?? null;
    this.#several = new Set([...this.#several].filter((id) => ids.includes(id)));
    if (!this.#several.size) this.#several = new Set(ids.slice(0, 3));
    this.#draw();
    this.onChange();
  }

  #draw() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const shown = this.#models.filter((model) => model.id.toLowerCase().includes(wanted));
    byId("models").replaceChildren(...shown.map((model) => this.#row(model)));
    byId("model-count").textContent = this.#models.length ? String(this.#models.length) : "";
    byId("picker-legend").textContent =
      this.#mode === "chat" ? "Who answers" : `Who answers, up to ${MOST_SIDE_BY_SIDE}`;
    byId("picker-note").textContent = this.#note(shown.length);
  }

  #note(shown) {
    if (!this.#models.length) return "No model is here for this key.";
    return shown ? "" : "No model has that in its name.";
  }

  #row(model) {
    const isChat = this.#mode === "chat";
    const input = el("input", {
      type: isChat ? "radio" : "checkbox",
      name: "model",
      value: model.id,
      checked: isChat ? model.id === this.#one : this.#several.has(model.id),
      onchange: (event) => this.#choose(model, event.target),
    });
    const about = model.lorasmith ?? {};
    const kind = model.parent === null ? "base" : `v${about.version}${about.canary ? " + canary" : ""}`;
    return el("li", {},
      el("label", {}, input, hallmark(about.digest), el("span", { className: "name" }, model.id),
        el("span", { className: "faint" }, kind)));
  }

  #choose(model, input) {
    if (this.#mode === "chat") this.#one = model.id;
    else if (!input.checked) this.#several.delete(model.id);
    else if (this.#several.size < MOST_SIDE_BY_SIDE) this.#several.add(model.id);
    else {
      input.checked = false;
      byId("picker-note").textContent = `At most ${MOST_SIDE_BY_SIDE} at once: take one away first.`;
      return;
    }
    byId("picker-note").textContent = "";
    this.onShow(model);
    this.onChange();
  }
}
