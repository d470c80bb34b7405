// The page at /: generate text with a model, and look at each token. The code needs no framework, no build step and no
// other host.
import { ask, element, loadModels, number, percent, say, stream, visible } from "./common.js";
import { alternativeRows, tokenElement } from "./tokens.js";
import { drawAttention, drawLayers, drawSampling } from "./views.js";

const $ = (id) => document.getElementById(id);
const ALTERNATIVES = 10;
const ENDS = { stop: "the text ended", length: "the token limit was reached" };

let models = [];
let columns = []; // one per model that generates
let chosen = null; // {column, index}: the token that the views show
let view = "alternatives";
let writing = null; // an AbortController during generation, otherwise null

// ---- Columns: a model, the tokens of its prompt and the generated tokens

function makeColumns() {
  const names = [$("model").value, $("beside").value].filter(Boolean);
  if (columns.map(({ model }) => model).join() === names.join()) return; // the current text stays until new text arrives
  chosen = null;
  columns = names.map((model) => {
    const text = element("div", { className: "text", role: "group" });
    text.setAttribute("aria-label", `Text of ${model}`);
    const loss = element("p", { className: "quiet", hidden: true });
    const root = element("div", {}, names.length > 1 ? element("h2", { textContent: model }) : "", loss, text);
    const column = { model, root, text, loss, tokens: [] };
    text.addEventListener("click", (event) => {
      const span = event.target.closest(".token");
      if (span) choose(column, Number(span.dataset.index));
    });
    text.addEventListener("keydown", (event) => moveInText(event, column));
    return column;
  });
  $("columns").replaceChildren(...columns.map((column) => column.root));
  showView();
}

function addToken(column, token) {
  const index = column.tokens.length;
  const span = tokenElement(token, index);
  token.span = span;
  column.tokens.push(token);
  column.text.append(span);
}

function moveInText(event, column) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const at = Number(document.activeElement?.dataset.index ?? 0);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: column.tokens.length - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") choose(column, at);
  else if (to === undefined || !column.tokens[to]) return;
  else {
    choose(column, to);
    column.tokens[to].span.focus();
  }
  event.preventDefault();
}

function choose(column, index) {
  for (const each of columns) for (const token of each.tokens) token.span.setAttribute("aria-pressed", "false");
  for (const token of column.tokens) token.span.tabIndex = -1;
  chosen = { column, index };
  const { span } = column.tokens[index];
  span.setAttribute("aria-pressed", "true");
  span.tabIndex = 0;
  if (view === "alternatives") showView(); // this view needs no request
  else showSoon();
}

const idsBefore = ({ column, index }) => column.tokens.slice(0, index).map((token) => token.id);

// ---- Generation

function settings() {
  const form = new FormData($("settings"));
  const params = {};
  for (const name of ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]) params[name] = Number(form.get(name));
  return params;
}

function generationParams() {
  const form = new FormData($("settings"));
  const params = { ...settings(), max_tokens: Number(form.get("max_tokens")), alternatives: ALTERNATIVES };
  if (form.get("seed") !== "") params.seed = Number(form.get("seed"));
  if (form.get("stop") !== "") params.stop = form.get("stop");
  return params;
}

async function write(prompts) {
  const start = performance.now();
  let written = 0;
  const rate = () => `${written} tokens, ${number(written / ((performance.now() - start) / 1000))} tokens/s`;
  const count = () => {
    written += 1;
    say(rate(), { aloud: false });
  };
  const ends = await inTurn((signal) => prompts.map((one) => writeIn(...one, signal, count)));
  if (ends && written) say(`${rate()}; ${ends.map((end) => ENDS[end.value] ?? "stopped").join(" and ")}`);
}

/** Run the work that `begin` starts, which ends what ran before. Return its results; null after an error, or if other
 * work has replaced it. */
async function inTurn(begin) {
  writing?.abort();
  const mine = (writing = new AbortController());
  busy(true);
  say("");
  const ends = await Promise.allSettled(begin(mine.signal));
  if (writing !== mine) return null;
  writing = null;
  busy(false);
  const failed = ends.map((end) => end.reason).find((error) => error && error.name !== "AbortError");
  if (failed) say(failed.message, { isBad: true });
  if (!chosen) showView();
  return failed ? null : ends;
}

function replaceTokens(column, tokens, looksInside) {
  column.tokens = [];
  column.text.replaceChildren();
  column.loss.hidden = true;
  column.looksInside = looksInside;
  column.given = tokens.length;
  for (const token of tokens) addToken(column, token);
}

/** Generate text in a column. If an earlier text is continued, `kept` has the known tokens of this text; otherwise `kept`
 * is null. The current text stays until the response begins. */
async function writeIn(column, prompt, kept, signal, count) {
  for await (const event of stream("api/write", { model: column.model, prompt, ...generationParams() }, signal)) {
    if (event.kind === "prompt") {
      const tokens = event.tokens.map((token, index) => ({ given: !kept, ...token, ...kept?.[index] }));
      replaceTokens(column, tokens, event.looks_inside);
      if (kept) chooseLast(column);
      else if (chosen?.column === column) chosen = null;
      if (!chosen) showView();
    }
    if (event.kind === "token") {
      addToken(column, event);
      count();
    }
    if (event.kind === "end") return event.finish;
  }
}

function writeAll() {
  if (!models.length) return begin();
  if (!$("settings").reportValidity()) return;
  makeColumns();
  write(columns.map((column) => [column, $("prompt").value, null]));
}

/** Show the loss of the text in each column's model, and the model's surprise at each token. */
async function measureAll() {
  if (!models.length) return begin();
  const prompt = $("prompt").value;
  if (!prompt) return say("no text to measure: write or paste one", { isBad: true });
  makeColumns();
  await inTurn((signal) => columns.map((column) => measure(column, prompt, signal)));
}

async function measure(column, prompt, signal) {
  const { tokens, measured } = await ask("api/read", { model: column.model, prompt, alternatives: ALTERNATIVES }, signal);
  if (chosen?.column === column) chosen = null;
  replaceTokens(column, tokens.map((token) => ({ ...token, given: true })), true);
  const { loss, perplexity, bits_per_byte } = Object.fromEntries(
    Object.entries(measured).map(([name, value]) => [name, value === null ? "∞" : fixed(value)]),
  );
  column.loss.textContent = measured.tokens
    ? `loss ${loss} nats per token, perplexity ${perplexity}, ${bits_per_byte} bits per byte; ` +
      `${tokens.length.toLocaleString("en")} tokens, all but the first predicted`
    : "one token: the first token has no prediction, so there is no loss";
  column.loss.hidden = false;
  if (column === columns[0]) column.loss.scrollIntoView({ block: "nearest" });
}

/** A number with three decimals, or as an integer if it is large. */
const fixed = (value) => value.toLocaleString("en", { minimumFractionDigits: value < 1000 ? 3 : 0, maximumFractionDigits: value < 1000 ? 3 : 0 });

/** Choose the last token after a branch, so that the alternatives of this token are one click or key away. */
function chooseLast(column) {
  choose(column, column.tokens.length - 1);
  chosen.column.tokens[chosen.index].span.focus({ preventScroll: true });
}

/** Continue the text with another token at the position `place`. */
function branch(place, token, alternatives) {
  const kept = [...place.column.tokens.slice(0, place.index), { ...token, alternatives }];
  write([[place.column, kept.map(({ id }) => id), kept]]);
}

function busy(isBusy) {
  if (!isBusy && document.activeElement === $("stop")) $("write").focus();
  $("stop").disabled = !isBusy;
  $("columns").setAttribute("aria-busy", isBusy);
}

// ---- Views of the chosen token

let pause = 0;

/** Show the view 60 ms after the last call, so that a held arrow key or slider causes only one request. */
function showSoon() {
  clearTimeout(pause);
  pause = setTimeout(showView, 60);
}

function showView() {
  clearTimeout(pause);
  asking?.abort(); // a late response must not replace what is shown now
  for (const column of columns) for (const token of column.tokens) token.span.classList.remove("attended");
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isSelected = tab.id === `tab-${view}`;
    tab.setAttribute("aria-selected", isSelected);
    tab.tabIndex = isSelected ? 0 : -1;
  }
  $("view").setAttribute("aria-labelledby", `tab-${view}`);
  const place = chosen ?? lastPlace();
  if (!place) {
    $("view").replaceChildren(element("p", { className: "quiet", textContent: "No text yet." }));
    return;
  }
  if (place.index === 0 && view !== "attention") {
    $("view").replaceChildren(facts(place, ": the first token has no prediction."));
    return;
  }
  if (!place.column.looksInside && (view !== "alternatives" || place.index === place.column.tokens.length)) {
    $("view").replaceChildren(facts(place, ": llama.cpp does not show how it chooses tokens. Serve the checkpoint instead."));
    return;
  }
  const show = { alternatives: showAlternatives, sampling: showSampling, attention: showAttention, layers: showLayers };
  const focused = document.activeElement?.id;
  show[view](place)
    .then(() => focused && document.activeElement === document.body && $(focused)?.focus())
    .catch((error) => {
      if (error.name === "AbortError") return;
      $("view").replaceChildren(element("p", { className: "bad", textContent: error.message }));
    });
}

/** The position after the last token. */
function lastPlace() {
  const column = columns.find((each) => each.tokens.length);
  return column ? { column, index: column.tokens.length } : null;
}

function facts(place, ...more) {
  const token = place.column.tokens[place.index];
  const what = token ? ["Token ", element("b", { textContent: visible(token.text) }), ` (${token.id})`] : ["The next token"];
  const whose = columns.length > 1 ? [`${place.column.model}: `] : [];
  return element("p", { className: "facts" }, ...whose, ...what, ...more);
}

async function showAlternatives(place) {
  const token = place.column.tokens[place.index];
  if (token?.probability === null) {
    $("view").replaceChildren(facts(place, ": the probability of this token is not known."));
    return;
  }
  const alternatives = token
    ? token.alternatives
    : (await about(place, "api/sampling", { prompt: idsBefore(place) })).candidates
        .slice(0, ALTERNATIVES)
        .map(({ id, text, probabilities }) => ({ id, text, probability: probabilities.model }));
  const rows = alternativeRows(alternatives, token?.id, (each) => {
    const button = element("button", { className: "piece", textContent: visible(each.text) });
    button.addEventListener("click", () => branch(place, each, alternatives));
    button.title = "continue the text with this token";
    return button;
  });
  $("view").replaceChildren(
    facts(place, token ? `: ${percent(token.probability)} by the model, before any setting.` : ": these are the likeliest."),
    element("table", { className: "bars", id: "alternatives" }, element("tbody", {}, ...rows)),
    element("p", { className: "quiet", textContent: "Choose a token to continue the text from here with this token." }),
  );
}

let asking = null; // the AbortController of the current view's request

async function about(place, route, body) {
  asking = new AbortController();
  return ask(route, { model: place.column.model, given: Math.min(place.column.given, body.prompt.length), ...body }, asking.signal);
}

async function showSampling(place) {
  const answer = await about(place, "api/sampling", { prompt: idsBefore(place), ...settings() });
  drawSampling($("view"), facts(place), answer, place.column.tokens[place.index]?.id);
}

async function showAttention(place) {
  const ids = place.column.tokens.slice(0, place.index + 1).map((token) => token.id);
  const layer = Number($("layer")?.value ?? 0);
  const answer = await about(place, "api/attention", { prompt: ids, layer });
  drawAttention($("view"), facts(place), answer, place.column.tokens, showView);
}

async function showLayers(place) {
  const answer = await about(place, "api/layers", { prompt: idsBefore(place) });
  drawLayers($("view"), facts(place), answer, place.column.tokens[place.index]?.id);
}

// ---- Wiring

$("write").addEventListener("click", writeAll);
$("measure").addEventListener("click", measureAll);
$("stop").addEventListener("click", () => writing?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") writing?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) writeAll();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", (event) => {
  const shown = event.target.parentElement.querySelector("output");
  if (shown) shown.value = event.target.value;
  if (view === "sampling") showSoon();
});
for (const range of document.querySelectorAll("#settings input[type=range]")) {
  range.parentElement.querySelector("output").value = range.value;
}
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => {
    view = tab.id.replace("tab-", "");
    showView();
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll("[role=tab]")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}

async function begin() {
  models = await loadModels(begin);
  if (models.length) makeColumns();
}

begin();
