// Functions that both pages use: requests to the server, and elements whose text is never parsed as HTML.

const KEY = "atlas-api-key";

/** Create an element with these properties and children. A string becomes text, never markup. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
/** A fraction as a percentage for CSS, without spaces or rounding. */
export const width = (part) => `${100 * part}%`;
export const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

/** The text of a token on one line, with signs for line breaks. If the text is only whitespace, all of it becomes signs. */
export function visible(text) {
  if (text === "") return "∅";
  return (text.trim() ? text : text.replaceAll(" ", "␣").replaceAll("\t", "⇥")).replaceAll("\n", "↵");
}

async function request(route, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  const answer = await fetch(route, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server does not answer: start atlas serve again");
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw Object.assign(new Error(said?.error?.message ?? `${route}: ${answer.status}`), { status: answer.status });
}

export async function ask(route, body, signal) {
  return (await request(route, body, signal)).json();
}

/** Yield the data of each server-sent event of a response, as the events arrive. */
export async function* stream(route, body, signal) {
  const reader = (await request(route, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = JSON.parse(event.slice("data: ".length));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

/** Say something in the page's status. A screen reader announces it, unless `aloud` is false. */
export function say(text, { isBad = false, aloud = true } = {}) {
  const status = document.getElementById("status");
  status.ariaLive = aloud ? "polite" : "off";
  status.textContent = text;
  status.className = isBad ? "bad" : "";
}

/** Fill the lists of models and return the models' names. If the server needs a key, ask for it and call `again` then. */
export async function loadModels(again) {
  let names = [];
  try {
    if ((await ask("health")).needs_key && !hasKey()) showKey(again);
    else names = (await ask("v1/models")).data.map((model) => model.id);
  } catch (error) {
    if (error.status === 401) showKey(again);
    else say(error.message, { isBad: true });
  }
  const option = (name) => element("option", { value: name, textContent: name });
  if (names.length) {
    document.getElementById("model").replaceChildren(...names.map(option));
    document.getElementById("beside").append(...names.map(option));
  }
  return names;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Ask the user for the API key, keep the key until the tab is closed, and call `then`. */
export function showKey(then) {
  const form = document.getElementById("key"), status = document.getElementById("status");
  status.className = hasKey() ? "bad" : "";
  status.textContent = hasKey() ? "this API key is wrong" : "this server needs an API key: enter the key in the line above";
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, form.elements.key.value);
    form.hidden = true;
    status.textContent = "";
    then();
  };
  form.elements.key.focus();
}
