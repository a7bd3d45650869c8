// An answer in the making: its text, what made it, how fast.

import { streamChat } from "./api.js";
import { announce, count, el, hallmark } from "./dom.js";

export class Answer {
  text = "";
  receipt = null;
  #shown = document.createTextNode("");
  #frame = null;

  constructor(model) {
    this.model = model;
    this.words = el("div", { className: "words", dir: "auto" }, this.#shown);
    this.foot = el("p", { className: "receipt" });
    this.element = el("article", { className: "answer", "aria-busy": "true", "aria-label": `Answer of ${model.id}` },
      el("header", {}, hallmark(model.lorasmith?.digest), el("span", { className: "name" }, model.id)),
      this.words, this.foot);
    this.element.dataset.state = "waiting";
  }

  /** Stream it; resolves when it is over, however it ends. Returns the error, if there was one. */
  async run(body, signal) {
    const began = performance.now();
    const times = { first: null, tokens: 0, finish: null };
    try {
      for await (const event of streamChat({ ...body, model: this.model.id }, signal)) {
        this.#take(event, times, began);
      }
      this.#end("done", this.#summary(times, performance.now() - began));
      return null;
    } catch (error) {
      const isStopped = error.name === "AbortError";
      this.#end(isStopped ? "stopped" : "failed", isStopped ? "stopped" : error.message);
      return isStopped ? null : error;
    }
  }

  #take(event, times, began) {
    if (event.lorasmith) this.receipt = event.lorasmith;
    if (event.usage) times.tokens = event.usage.completion_tokens;
    for (const choice of event.choices ?? []) {
      times.finish = choice.finish_reason ?? times.finish;
      const more = choice.delta?.content ?? "";
      if (!more) continue;
      times.first ??= performance.now() - began;
      this.element.dataset.state = "writing";
      this.text += more;
      this.#frame ??= requestAnimationFrame(() => this.#show());
    }
  }

  /** At most once a frame, however fast the tokens come. */
  #show() {
    this.#frame = null;
    this.#shown.appendData(this.text.slice(this.#shown.length));
  }

  #summary({ first, tokens, finish }, total) {
    const parts = [`${count(tokens)} tokens`];
    if (first !== null) {
      parts.push(`first after ${seconds(first)}`);
      if (tokens > 1) parts.push(`${((tokens - 1) / ((total - first) / 1000)).toFixed(0)} a second`);
    }
    if (finish === "length") parts.push("cut at the length limit");
    return parts.join(" · ");
  }

  #end(state, summary) {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#show();
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", "false");
    if (state === "done" && !this.text) this.words.append(el("em", { className: "faint" }, "an empty answer"));
    const digest = this.receipt?.adapter_digest;
    const made = this.receipt && (digest
      ? el("span", {}, `${this.receipt.adapter}@${this.receipt.adapter_version} `, el("code", { title: digest }, digest.slice(0, 12)))
      : el("span", {}, "the plain base"));
    this.foot.replaceChildren(...[made, el("span", {}, summary)].filter(Boolean));
    announce(state === "done" ? `${this.model.id} says: ${this.text}` : `${this.model.id}: ${summary}`);
  }
}

/** Under each answer: whether its text is the first one's. */
export function markDifferences(answers) {
  const [first, ...others] = answers.filter((answer) => answer.element.dataset.state === "done");
  for (const other of others) {
    const isSame = other.text === first.text;
    const text = isSame ? `same text as ${first.model.id}` : `differs from ${first.model.id} ${where(first.text, other.text)}`;
    other.foot.append(el("span", { className: isSame ? "same" : "differs" }, text));
  }
}

function where(a, b) {
  let i = 0;
  while (i < a.length && i < b.length && a[i] === b[i]) i += 1;
  return i === 0 ? "from the start" : `after ${count(i)} characters`;
}

const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);
