// The side panels: one model's card, and what the server does now.

import { getJSON } from "./api.js";
import { byId, bytes, count, el, facts, hallmark } from "./dom.js";

const POLL_MS = 2000;
const POINTS = 40;
const RUN_NAMES = {
  method: "Method", learning_rate: "Learning rate", epochs: "Epochs", max_steps: "Most steps",
  batch_size: "Batch", batch_tokens: "Batch tokens", seed: "Seed", init: "A starts", dropout: "Dropout",
  data: "Data", made_by: "Made by", lorasmith: "lorasmith", torch: "torch",
};

let shown = null;

/** Fill the card with one model. The last one asked for wins. */
export async function showCard(model) {
  if (shown === model.id) return;
  shown = model.id;
  const place = byId("card");
  try {
    const card = await getJSON(`/playground/api/card?model=${encodeURIComponent(model.id)}`);
    if (shown === model.id) place.replaceChildren(...(card.digest ? adapterCard(model, card) : baseCard(card)));
  } catch (error) {
    if (shown !== model.id) return;
    shown = null;
    place.replaceChildren(el("p", { className: "hint" }, error.message));
  }
}

function title(name, digest, about) {
  return el("div", { className: "card-title" }, hallmark(digest),
    el("div", {}, el("h3", {}, name), el("p", { className: "faint" }, about)));
}

function baseCard(card) {
  return [
    title(card.name, null, "the frozen base"),
    el("dl", { className: "facts" }, ...facts([
      ["Fingerprint", mono(card.fingerprint)],
      ["Weights", card.dtypes.join(", ")],
      ["Context", `${count(card.context_tokens)} tokens`],
    ])),
  ];
}

function adapterCard(model, card) {
  const canary = model.lorasmith?.canary;
  const targets = card.targets.map((t) =>
    el("li", {}, t.name, " ", el("span", { className: "faint" }, `× ${t.modules}`)));
  const run = Object.entries(card.run).map(([key, value]) =>
    [RUN_NAMES[key] ?? key, key === "data" ? mono(String(value)) : value]);
  return [
    title(model.id, card.digest, card.model),
    el("dl", { className: "facts" }, ...facts([
      ["Rank", span(card.ranks)],
      ["Scaling", span(card.scalings.map((s) => Number(s.toPrecision(4))))],
      ["Parameters", count(card.params)],
      ["Size", `${bytes(card.bytes)}, ${card.dtypes.join(", ")}`],
      ["Besides", card.beyond_linear],
      ["Base", card.base_name],
      ["Canary", canary && `version ${canary.version}, ${(100 * canary.share).toFixed(0)} % of users`],
      ["Digest", mono(card.digest)],
    ])),
    el("h4", {}, "Targets"),
    el("ul", { className: "targets" }, ...targets),
    el("h4", {}, "Training run"),
    run.length
      ? el("dl", { className: "facts" }, ...facts(run))
      : el("p", { className: "hint" }, "Its files do not say how it was trained."),
  ];
}

const span = (values) => (values.length > 1 ? `${values[0]} to ${values.at(-1)}` : values[0]);
const mono = (text) => (text ? el("code", { className: "digest" }, text) : null);

/** What the server does, every two seconds while somebody looks. */
export class Live {
  #rates = Array(POINTS).fill(0);
  #last = null;

  start(onState) {
    const tick = async () => {
      if (!document.hidden) await this.#read(onState);
      setTimeout(tick, POLL_MS);
    };
    tick();
  }

  async #read(onState) {
    try {
      const state = await getJSON("/playground/api/live");
      this.#show(state);
      onState(state.ready ? "ready" : "not-ready", state.ready ? "ready" : state.why_not ?? "not ready");
    } catch (error) {
      this.#last = null;
      onState(error.status === 401 ? "key" : "off", error.status === 401 ? "needs a key" : "no answer");
    }
  }

  #show(state) {
    const made = state.generated_tokens + state.running_tokens;
    const now = performance.now();
    if (this.#last) this.#rates.push(Math.max(0, (made - this.#last.made) / ((now - this.#last.now) / 1000)));
    this.#last = { made, now };
    this.#rates = this.#rates.slice(-POINTS);
    byId("rate").textContent = (this.#rates.at(-1) ?? 0).toFixed(0);
    byId("spark").setAttribute("points", points(this.#rates));
    byId("live").replaceChildren(...facts([
      ["Running", `${state.running_rows} of ${state.max_rows} rows`],
      ["Waiting", state.waiting],
      ["In memory", state.loaded_adapters === undefined ? null : `${state.loaded_adapters} adapters`],
      ["Answers", count(state.requests)],
      ["Tokens written", count(state.generated_tokens)],
      ["Prompt reused", state.prompt_tokens ? `${((100 * state.reused_tokens) / state.prompt_tokens).toFixed(0)} %` : "0 %"],
      ["Isolation", isolation(state)],
      ["Engine restarts", state.engine_restarts || null],
    ]));
    byId("live-note").textContent = "loaded_adapters" in state ? "" : "Your own requests and tokens.";
  }
}

function isolation(state) {
  if (!("isolation_mismatches" in state)) return null;
  return state.isolation_mismatches ? `${state.isolation_mismatches} mismatches` : "no mismatch";
}

function points(rates) {
  const top = Math.max(1, ...rates);
  return rates
    .map((rate, i) => `${((120 * i) / (POINTS - 1)).toFixed(1)},${(31 - (29 * rate) / top).toFixed(1)}`)
    .join(" ");
}
