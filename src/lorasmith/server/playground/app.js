// The page: modes, the composer, the key.

import { Answer, markDifferences } from "./answers.js";
import { hasKey, setKey } from "./api.js";
import { announce, byId, el, hallmark } from "./dom.js";
import { Live, showCard } from "./panels.js";
import { Picker } from "./picker.js";

let mode = "chat";
let stopper = null;
const turns = []; // of the chat: {role, content}

const picker = new Picker({ onChange: choiceChanged, onShow: showCard });

function choiceChanged() {
  const chips = picker.chosen.map((model) =>
    el("span", { className: "chip" }, hallmark(model.lorasmith?.digest), model.id));
  byId("asking").replaceChildren(...(chips.length ? chips : [el("span", { className: "faint" }, "nobody yet")]));
  byId("send").disabled = !picker.chosen.length;
  if (picker.chosen.length) showCard(picker.chosen.at(-1));
}

async function loadModels() {
  try {
    await picker.load();
    problem("");
  } catch (error) {
    if (error.status === 401) openKey("This server asks for a key, or does not know the one given.");
    else problem(error.message);
  }
}

// -- asking --------------------------------------------------------------------------------------

function settings() {
  const seed = byId("seed").value;
  return {
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

function messages(text) {
  const system = byId("system").value.trim();
  const before = mode === "chat" ? turns : [];
  return [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: text }];
}

async function send(event) {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (stopper || !text || !picker.chosen.length) return;
  problem("");
  busy(true);
  const body = { messages: messages(text), ...settings() };
  byId("prompt").value = "";
  const errors = await (mode === "chat" ? chat(text, body) : compare(text, body));
  busy(false);
  const error = errors.find(Boolean);
  if (!error) return;
  problem(error.retryAfter ? `${error.message}. Ask again in ${error.retryAfter} s.` : error.message);
  if (!byId("prompt").value) byId("prompt").value = text;
  if (error.status === 401) openKey(error.message);
}

async function chat(text, body) {
  byId("welcome").hidden = true;
  const answer = new Answer(picker.chosen[0]);
  const asked = el("li", { className: "mine" }, el("p", { className: "words", dir: "auto" }, text));
  byId("log").append(asked, el("li", {}, answer.element));
  follow(answer);
  const error = await answer.run(body, stopper.signal);
  if (!error) turns.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
  return [error];
}

async function compare(text, body) {
  byId("compare-welcome").hidden = true;
  byId("asked").hidden = false;
  byId("asked").textContent = text;
  const answers = picker.chosen.map((model) => new Answer(model));
  byId("grid").replaceChildren(...answers.map((answer) => answer.element));
  const errors = await Promise.all(answers.map((answer) => answer.run(body, stopper.signal)));
  markDifferences(answers);
  return errors;
}

/** Keep the end in sight while it grows, unless the reader scrolled away. */
function follow(answer) {
  const place = byId("chat");
  place.scrollTop = place.scrollHeight;
  new ResizeObserver((_, observer) => {
    if (place.scrollHeight - place.scrollTop - place.clientHeight < 160) place.scrollTop = place.scrollHeight;
    if (!answer.element.isConnected) observer.disconnect();
  }).observe(answer.element);
}

function busy(isBusy) {
  stopper = isBusy ? new AbortController() : null;
  const hadFocus = document.activeElement === byId("stop") || document.activeElement === byId("send");
  byId("stop").hidden = !isBusy;
  byId("send").hidden = isBusy;
  if (hadFocus) byId(isBusy ? "stop" : "prompt").focus();
  if (isBusy) announce(`Asked ${picker.chosen.map((model) => model.id).join(", ")}.`);
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function clear() {
  stopper?.abort();
  turns.length = 0;
  for (const id of ["log", "grid"]) byId(id).replaceChildren();
  for (const id of ["welcome", "compare-welcome"]) byId(id).hidden = false;
  byId("asked").hidden = true;
  problem("");
  byId("prompt").focus();
}

// -- key -----------------------------------------------------------------------------------------

const WHY = byId("key-why").textContent;

function openKey(why = WHY) {
  byId("key-why").textContent = why;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function useKey(value) {
  setKey(value, { keep: byId("keep").checked });
  byId("key").value = "";
  byId("key-dialog").close();
  byId("key-open").textContent = hasKey() ? "API key in use" : "API key";
  loadModels();
}

// -- wiring --------------------------------------------------------------------------------------

function changeMode(event) {
  mode = event.target.value;
  stopper?.abort();
  byId("chat").hidden = mode !== "chat";
  byId("compare").hidden = mode === "chat";
  picker.mode = mode;
}

for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", changeMode);
byId("composer").addEventListener("submit", send);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => stopper?.abort());
byId("clear").addEventListener("click", clear);
byId("key-open").addEventListener("click", () => openKey());
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => useKey(""));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
});
if (matchMedia("(max-width: 60rem)").matches) {
  for (const panel of document.querySelectorAll(".panel")) panel.open = false;
}
byId("key-open").textContent = hasKey() ? "API key in use" : "API key";
loadModels();
new Live().start((state, text) => {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
});
