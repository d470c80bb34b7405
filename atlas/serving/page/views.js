// Views of one position in a text: the effect of sampling settings, attention by head, and the logit lens.
import { element, percent, visible, width } from "./common.js";

/** The server's name of a setting → the name on the page. The distribution after min-p, the last step, is sampled. */
const SETTINGS = { temperature: "temperature", top_k: "top-k", top_p: "top-p", min_p: "min-p" };

/** Draw the distribution before and after the settings, with one row for each of the likeliest tokens. */
export function drawSampling(view, facts, answer, chosenId) {
  const most = Math.max(...answer.candidates.map((token) => Math.max(token.probabilities.model, token.probabilities.min_p)));
  const rows = answer.candidates.map((token) => {
    const before = element("i", { className: "before" });
    const after = element("i");
    before.style.width = width(token.probabilities.model / most);
    after.style.width = width(token.probabilities.min_p / most);
    const classes = [token.removed_by ? "removed" : "", token.id === chosenId ? "chosen" : ""];
    return element(
      "tr",
      { className: classes.join(" ").trim() },
      element("td", { className: "piece", textContent: visible(token.text) }),
      element("td", { textContent: percent(token.probabilities.model) }),
      element("td", { textContent: SETTINGS[token.removed_by] ?? percent(token.probabilities.min_p) }),
      element("td", { className: "bar" }, before, ...(token.removed_by ? [] : [after])),
    );
  });
  const names = ["token", "model", "with settings", ""].map((name) => element("th", { textContent: name }));
  view.replaceChildren(
    facts,
    element(
      "table",
      { className: "bars", id: "sampling" },
      element("thead", {}, element("tr", {}, ...names)),
      element("tbody", {}, ...rows),
    ),
    element("p", {
      className: "quiet",
      textContent:
        "Grey: the model's probability. Colour: the probability after the settings, with which the next token is drawn. " +
        `The settings keep ${answer.remaining.min_p} of ${answer.remaining.model.toLocaleString("en")} tokens. The row of a ` +
        `removed token names the setting that removed it. The entropy is ${answer.entropy.model.toFixed(2)} bits before ` +
        `the settings and ${answer.entropy.min_p.toFixed(2)} bits after them.`,
    }),
  );
}

let head = 0;

/** Draw the heads of a layer as small pictures, and the chosen head as a large picture. Rows attend to columns. */
export function drawAttention(view, facts, answer, tokens, again) {
  const layers = Array.from({ length: answer.num_layers }, (_, layer) =>
    element("option", { value: layer, textContent: `layer ${layer}`, selected: layer === answer.layer }),
  );
  const layer = element("select", { id: "layer" }, ...layers);
  layer.addEventListener("change", again);
  head = Math.min(head, answer.weights.length - 1);
  const buttons = answer.weights.map((weights, index) => {
    const button = element("button", { title: `head ${index}` }, picture(weights), `head ${index}`);
    button.setAttribute("aria-pressed", index === head);
    button.addEventListener("click", () => {
      head = index;
      drawAttention(view, facts, answer, tokens, again);
      view.querySelectorAll(".heads button")[index].focus();
    });
    return button;
  });
  const weights = answer.weights[head];
  const last = weights[weights.length - 1];
  last.forEach((weight, place) => {
    const span = tokens[answer.first + place]?.span;
    span?.classList.add("attended");
    span?.style.setProperty("--weight", Math.sqrt(weight)); // the square root, as in `picture`
  });
  const order = last.map((weight, place) => [weight, place]).sort((one, other) => other[0] - one[0]).slice(0, 8);
  const rows = order.map(([weight, place]) => {
    const bar = element("i");
    bar.style.width = width(weight / order[0][0]);
    return element(
      "tr",
      {},
      element("td", { className: "piece", textContent: visible(tokens[answer.first + place].text) }),
      element("td", { className: "quiet", textContent: back(last.length - 1 - place) }),
      element("td", { textContent: percent(weight) }),
      element("td", { className: "bar" }, bar),
    );
  });
  const shown = tokens.slice(answer.first, answer.first + weights.length).map(({ text }) => visible(text));
  view.replaceChildren(
    facts,
    element("label", {}, "Attention of ", layer),
    element("div", { className: "heads" }, ...buttons),
    element("h2", { textContent: `What the token attends to in head ${head}` }),
    element("table", { className: "bars", id: "attended" }, element("tbody", {}, ...rows)),
    labelled(weights, shown),
    element("p", {
      className: "quiet",
      textContent:
        "Each row shows the attention of a token to itself and to all earlier tokens, from left to right. The last row is " +
        "the chosen token. Move over the large picture to read a weight. In the text, a stronger underline means that the chosen token attends more to that token." +
        (answer.first ? ` Only the last ${weights.length} tokens are drawn.` : ""),
    }),
  );
}

const MOST_LABELS = 24; // at each side of the picture, so that the labels do not overlap

/** The picture of a head with the tokens at its sides, and a line that names the weight under the pointer. */
function labelled(weights, texts) {
  const canvas = picture(weights);
  canvas.id = "head";
  const size = texts.length;
  const step = Math.ceil(size / MOST_LABELS);
  const side = (className, place) =>
    element(
      "div",
      { className, ariaHidden: "true" },
      ...texts.flatMap((text, index) => {
        if ((size - 1 - index) % step) return [];
        const label = element("span", { className: "piece", textContent: text });
        label.style[place] = width((index + 0.5) / size);
        return [label];
      }),
    );
  const weight = element("output", { id: "weight", className: "quiet" });
  canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
    const [row, column] = [offsetY / canvas.clientHeight, offsetX / canvas.clientWidth].map((part) =>
      Math.min(size - 1, Math.max(0, Math.floor(part * size))),
    );
    weight.value =
      column > row ? "a token does not attend to later tokens" : `${texts[row]} → ${texts[column]}: ${percent(weights[row][column])}`;
  });
  canvas.addEventListener("pointerleave", () => (weight.value = ""));
  return element("div", { className: "labelled" }, side("top", "left"), side("left", "top"), canvas, weight);
}

const back = (count) => (count ? `${count} back` : "itself");

function picture(weights) {
  const size = weights.length;
  const canvas = element("canvas", { width: size, height: size });
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  const context = canvas.getContext("2d");
  context.fillStyle = ink;
  for (let row = 0; row < size; row++) {
    for (let column = 0; column <= row; column++) {
      // The square root of the weight, since most weights are small and would be invisible.
      context.globalAlpha = Math.sqrt(weights[row][column]);
      context.fillRect(column, row, 1, 1);
    }
  }
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `attention of ${size} tokens`);
  return canvas;
}

/** Draw the model's prediction after each layer. */
export function drawLayers(view, facts, answer, chosenId) {
  const rows = answer.layers.map((layer) => {
    const cells = layer.likeliest.map((token) => {
      const share = element("small", { textContent: percent(token.probability) });
      const cell = element("td", { className: "piece", title: visible(token.text) }, visible(token.text), share);
      cell.style.setProperty("--p", token.probability);
      if (token.id === chosenId) cell.classList.add("actual");
      return cell;
    });
    return element("tr", {}, element("th", { textContent: layer.layer === null ? "embedding" : `layer ${layer.layer}` }), ...cells);
  });
  view.replaceChildren(
    facts,
    element("table", { className: "lens", id: "lens" }, element("tbody", {}, ...rows)),
    element("p", {
      className: "quiet",
      textContent:
        "Each row shows the likeliest tokens if the model ended after this layer (the logit lens). A stronger colour means " +
        "a higher probability. The token that the text contains at this position has a frame.",
    }),
  );
}
