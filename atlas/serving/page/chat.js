// The page at /chat: a conversation with one model or with two side by side, and the tokens that the model reads.
import { element, loadModels, number, say, stream } from "./common.js";
import { alternativeRows, tokenElement, tokenFacts } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const ALTERNATIVES = 10;
const ENDS = { stop: "the answer ended", length: "the token limit was reached" };

let models = [];
let turns = []; // {user: text, answers: {model: {text, tokens}}}
let shown = null; // {turn, model}: the answer whose tokens the right side shows
let writing = null; // an AbortController during generation, otherwise null

const chosenModels = () => [...new Set([$("model").value, $("beside").value].filter(Boolean))];

// ---- The conversation

/** Return the messages up to and with the user's message of a turn, as this model saw the conversation. */
function messagesFor(model, last) {
  const messages = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  turns.slice(0, last + 1).forEach(({ user, answers }, index) => {
    messages.push({ role: "user", content: user });
    if (index < last) messages.push({ role: "assistant", content: answers[model]?.text ?? "" });
  });
  return messages;
}

function draw() {
  const names = chosenModels();
  $("columns").replaceChildren(
    ...names.map((model) => {
      const title = names.length > 1 ? [element("h2", { textContent: model })] : [];
      const items = turns.flatMap((turn, index) => [userElement(turn, index), answerElement(turn, index, model)]);
      const log = element("div", { className: "log", role: "log" }, ...items);
      log.setAttribute("aria-label", `Conversation with ${model}`);
      return element("div", { className: "column" }, ...title, log);
    }),
  );
  drawRaw();
}

function userElement(turn, index) {
  const text = element("div", { className: "said", textContent: turn.user });
  const edit = element("button", { type: "button", textContent: "Edit", className: "small", disabled: writing !== null });
  edit.addEventListener("click", () => editMessage(article, turn, index));
  const article = element("article", { className: "message user" }, element("b", { textContent: "You" }), text, edit);
  return article;
}

function answerElement(turn, index, model) {
  const answer = turn.answers[model];
  const text = element("div", { className: "said", textContent: answer?.text ?? "…" });
  const look = element("button", { type: "button", textContent: "Tokens", className: "small", disabled: !answer?.tokens.length });
  look.addEventListener("click", () => {
    shown = { turn, model };
    drawRaw();
  });
  const article = element("article", { className: "message" }, element("b", { textContent: model }), text, look);
  if (answer) answer.element = text;
  return article;
}

/** Replace a message by a field. Sending it drops all later turns and asks again. */
function editMessage(article, turn, index) {
  const field = element("textarea", { value: turn.user, rows: 2 });
  field.setAttribute("aria-label", "Edit your message");
  const send = element("button", { type: "button", className: "main", textContent: "Send again" });
  const cancel = element("button", { type: "button", textContent: "Cancel" });
  cancel.addEventListener("click", draw);
  send.addEventListener("click", () => {
    if (!field.value.trim()) return;
    turns = turns.slice(0, index);
    sendMessage(field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.stopPropagation();
    send.click();
  });
  article.replaceChildren(field, element("div", { className: "buttons" }, send, cancel));
  field.focus();
}

// ---- Generation

function params() {
  const form = new FormData($("settings"));
  const values = { alternatives: ALTERNATIVES, truncation: "auto" };
  for (const name of ["temperature", "top_k", "top_p", "repetition_penalty", "max_tokens"]) values[name] = Number(form.get(name));
  if (form.get("seed") !== "") values.seed = Number(form.get("seed"));
  return values;
}

async function sendMessage(user) {
  if (!models.length) return begin();
  if (!$("settings").checkValidity()) $("setup").open = true;
  if (!$("settings").reportValidity()) return;
  writing?.abort();
  const mine = (writing = new AbortController());
  const turn = { user, answers: {} };
  turns.push(turn);
  const names = chosenModels();
  shown = { turn, model: names[0] };
  for (const model of names) turn.answers[model] = { text: "", tokens: [] };
  busy(true);
  draw();
  say("");
  const start = performance.now();
  let written = 0;
  const rate = () => `${written} tokens, ${number(written / ((performance.now() - start) / 1000))} tokens/s`;
  const count = () => {
    written += 1;
    say(rate(), { aloud: false });
  };
  const ends = await Promise.allSettled(names.map((model) => answerWith(turn, model, mine.signal, count)));
  if (writing !== mine) return;
  writing = null;
  busy(false);
  const failed = ends.map((end) => end.reason).find((error) => error && error.name !== "AbortError");
  if (failed && names.every((model) => !turn.answers[model].text)) {
    turns = turns.filter((each) => each !== turn);
    $("message").value ||= user; // so that it can be sent again
  }
  if (failed) say(failed.message, { isBad: true });
  else say(`${rate()}; ${ends.map((end) => ENDS[end.value] ?? "stopped").join(" and ")}`);
  draw();
}

async function answerWith(turn, model, signal, count) {
  const answer = turn.answers[model];
  const body = { model, messages: messagesFor(model, turns.indexOf(turn)), ...params() };
  for await (const event of stream("api/chat", body, signal)) {
    if (event.kind === "prompt") answer.tokens = event.tokens.map((token) => ({ ...token, given: true }));
    if (event.kind === "token") {
      answer.tokens.push(event);
      count();
    }
    if (event.kind === "token") answer.text += event.shown;
    if (answer.element) answer.element.textContent = answer.text;
    if (shown?.turn === turn && shown.model === model) addRaw(answer);
    if (event.kind === "end") {
      answer.text = answer.text.trim();
      return event.finish;
    }
  }
}

function busy(isBusy) {
  if (!isBusy && document.activeElement === $("stop")) $("message").focus();
  $("stop").disabled = !isBusy;
  $("columns").setAttribute("aria-busy", isBusy);
}

// ---- The tokens

/** Show the tokens of the chosen answer and of its prompt. */
function drawRaw() {
  $("raw").replaceChildren();
  $("view").replaceChildren();
  const answer = shown?.turn.answers[shown.model];
  if (answer) addRaw(answer);
}

/** Add the elements of the tokens that are not shown yet. */
function addRaw(answer) {
  const from = $("raw").children.length;
  $("raw").append(...answer.tokens.slice(from).map((token, index) => tokenElement(token, from + index)));
}

function chooseToken(span) {
  const token = shown?.turn.answers[shown.model]?.tokens[Number(span.dataset.index)];
  if (!token) return;
  for (const each of $("raw").children) {
    each.setAttribute("aria-pressed", each === span);
    each.tabIndex = each === span ? 0 : -1;
  }
  if (!token.alternatives.length) {
    $("view").replaceChildren(tokenFacts(token, ": its probability is not known."));
    return;
  }
  const piece = ({ text }) => element("span", { className: "piece", textContent: JSON.stringify(text).slice(1, -1) });
  const rows = alternativeRows(token.alternatives, token.id, piece);
  const who = token.given ? "read by the model" : "written by the model";
  $("view").replaceChildren(
    tokenFacts(token, `: ${who}, with a probability of ${(100 * token.probability).toPrecision(2)} %.`),
    element("table", { className: "bars", id: "alternatives" }, element("tbody", {}, ...rows)),
  );
}

function moveInTokens(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const all = $("raw").children;
  const at = Number(document.activeElement?.dataset.index ?? 0);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1, Enter: at, " ": at }[event.key];
  if (to === undefined || !all[to]) return;
  chooseToken(all[to]);
  all[to].focus();
  event.preventDefault();
}

// ---- Wiring

function submit() {
  const text = $("message").value;
  if (!text.trim() || writing) return;
  $("message").value = "";
  sendMessage(text);
}

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", () => writing?.abort());
$("reset").addEventListener("click", () => {
  writing?.abort();
  turns = [];
  shown = null;
  say("");
  draw();
  $("message").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") writing?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
$("raw").addEventListener("click", (event) => {
  const span = event.target.closest(".token");
  if (span) chooseToken(span);
});
$("raw").addEventListener("keydown", moveInTokens);
for (const select of [$("model"), $("beside")]) select.addEventListener("change", draw);

async function begin() {
  models = await loadModels(begin);
  if (models.length) draw();
}

begin();
