// Tokens as the pages show them: one element per token, coloured by the model's surprise.
import { element, percent, visible, width } from "./common.js";

const MOST_BITS = 16; // the surprise, in bits, at which the colour is strongest

/** A sign for line ends, for empty tokens, and for parts of a character that a later token completes. */
function signOf({ text, shown }) {
  if (text === "") return "∅";
  return shown === "" ? "·" : "↵".repeat(shown.split("\n").length - 1);
}

/** Return the element of the token at this index of a text. Tokens of the prompt have `given`. */
export function tokenElement(token, index) {
  const span = element("span", { className: token.given ? "token prompt" : "token", textContent: token.shown });
  const sign = signOf(token);
  if (sign) span.dataset.sign = sign; // the browser shows the sign, but does not copy it with the text
  span.setAttribute("role", "button");
  span.setAttribute("aria-pressed", "false");
  span.tabIndex = index === 0 ? 0 : -1;
  span.dataset.index = index;
  if (token.probability !== null) {
    const bits = -Math.log2(Math.max(token.probability, 1e-6));
    span.style.setProperty("--surprise", Math.min(1, bits / MOST_BITS));
    span.title = `${percent(token.probability)}, a surprise of ${bits.toFixed(1)} bits`;
  }
  return span;
}

/** Return a table row for each alternative: its text, its probability and a bar. `piece` makes the element of a text. */
export function alternativeRows(alternatives, chosenId, piece) {
  const largest = Math.max(...alternatives.map(({ probability }) => probability));
  return alternatives.map((each) => {
    const bar = element("i");
    bar.style.width = width(each.probability / largest);
    const row = element("tr", { className: each.id === chosenId ? "chosen" : "" });
    const share = element("td", { textContent: percent(each.probability) });
    row.append(element("td", {}, piece(each)), share, element("td", { className: "bar" }, bar));
    return row;
  });
}

/** What a person reads about a token: its text and its id. */
export function tokenFacts(token, ...more) {
  const shown = element("b", { textContent: visible(token.text) });
  return element("p", { className: "facts" }, "Token ", shown, ` (${token.id})`, ...more);
}
