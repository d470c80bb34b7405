/* Curves of runs, drawn by uPlot: `AtlasCharts.create(container, {runs}, options)` → {update({runs}), destroy()}.
 *
 * `runs` is a list of results of atlas.reporting.runs.chart_data. options.axis is the initial x axis, and options.onAxis is
 * called with each axis that the user chooses. All text is inserted into the page with textContent. */
"use strict";

const AtlasCharts = (() => {
  // The colours of Okabe and Ito, which colour-blind people can distinguish, adjusted to a light and a dark background.
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#007a5a", "#b3548b", "#a86f00", "#2a8fc7", "#444444", "#7a6cc9"],
    dark: ["#56b4e9", "#f08a3c", "#2fc79a", "#e39ac4", "#f0c040", "#9fd3f5", "#cfcfcf", "#aaa0f0"],
  };
  const AXES = { step: "Step", tokens: "Tokens", time: "Time" };
  const MAIN_HEIGHT = 380, SMALL_HEIGHT = 170;
  const NEAR = 7; // show an event's text if the pointer is at most this many pixels from the event's line

  // Numbers as text

  const plain = (value, digits = 4) =>
    value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3
      ? value.toExponential(Math.max(0, digits - 2)).replace("e+", "e")
      : String(+value.toPrecision(digits));
  const loss = (value) => (value < 100 ? value.toFixed(4) : plain(value));
  const percent = (value) => `${+(100 * value).toPrecision(3)} %`;
  const degrees = (value) => `${Math.round(value)} °C`;

  function short(value) {
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}${letter}`;
    }
    return plain(value, 3);
  }

  function bytes(value) {
    for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (value >= size) return `${+(value / size).toPrecision(3)} ${unit}`;
    }
    return `${Math.round(value)} B`;
  }

  function duration(seconds) {
    const whole = Math.round(seconds), days = Math.floor(whole / 86400);
    const hours = Math.floor((whole % 86400) / 3600), minutes = Math.floor((whole % 3600) / 60);
    if (seconds < 10 && seconds % 1) return `${+seconds.toFixed(1)} s`;
    if (days) return hours ? `${days} d ${hours} h` : `${days} d`;
    if (hours) return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
    if (minutes) return whole % 60 ? `${minutes} min ${whole % 60} s` : `${minutes} min`;
    return `${whole} s`;
  }

  const grouped = (value) => Math.round(value).toLocaleString("en-GB");
  const onAxis = { step: grouped, tokens: (value) => `${short(value)} tokens`, time: duration };
  const tickOf = { step: (value) => (value % 1 ? "" : short(value)), tokens: short, time: duration };
  const TIME_STEPS = [0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
    86400, 172800, 432000, 864000];
  const shownAt = (axis, value) => (axis === "step" ? `step ${grouped(value)}` : onAxis[axis](value));

  const MAIN = {
    id: "loss", title: "Loss", unit: "nats per token", format: loss,
    layers: [
      { key: "loss", width: 1, alpha: 0.3 },
      { key: "smoothed_loss", width: 2, alpha: 1 },
      { key: "val_loss", width: 1.5, alpha: 1, dash: [6, 4], points: true },
    ],
  };
  const small = (key, title, unit, format) => ({ id: key, title, unit, format, layers: [{ key, width: 1.5, alpha: 1 }] });
  const noisy = (key, title, unit, format) => ({
    id: key, title, unit, format,
    layers: [{ key, width: 1, alpha: 0.22 }, { key: `smoothed_${key}`, width: 1.5, alpha: 1 }],
  });
  const SMALL = [
    small("learning_rate", "Learning rate", "", (value) => plain(value, 3)),
    noisy("grad_norm", "Gradient norm", "before clipping", (value) => plain(value, 3)),
    noisy("tokens_per_second", "Speed", "tokens per second", short),
    noisy("utilisation", "Utilisation", "of the peak", percent),
    small("memory", "Memory", "", bytes),
    noisy("data_wait", "Waiting for data", "of the time", percent),
    noisy("gpu_temperature", "GPU temperature", "", degrees),
  ];

  // The page's elements

  function element(name, attributes = {}, children = []) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") made.textContent = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const withAlpha = (colour, alpha) => colour + Math.round(255 * alpha).toString(16).padStart(2, "0");

  /* Return the index of the value in `xs`, sorted in ascending order, that is nearest to `x`. */
  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  /* Return a series on one axis, sorted by x, since the times in a log may be out of order. */
  function along(series, axis) {
    const xs = series[axis], order = xs.map((_, place) => place).sort((a, b) => xs[a] - xs[b]);
    return { xs: order.map((place) => xs[place]), ys: order.map((place) => series.value[place]) };
  }

  class Charts {
    constructor(container, { runs }, options = {}) {
      this.container = container;
      this.onAxis = options.onAxis || (() => {});
      this.runs = runs;
      this.axis = AXES[options.axis] ? options.axis : "step";
      this.isLog = false;
      this.hidden = new Set();
      this.zoom = null;
      this.hover = null;
      this.plots = [];
      this.dark = matchMedia("(prefers-color-scheme: dark)");
      this.redraw = () => this.build();
      this.dark.addEventListener("change", this.redraw);
      this.observer = new ResizeObserver(() => this.resize());
      this.build();
      this.observer.observe(container);
    }

    destroy() {
      this.observer.disconnect();
      this.dark.removeEventListener("change", this.redraw);
      this.plots.forEach(({ plot }) => plot.destroy());
      this.plots = [];
      this.container.replaceChildren();
    }

    update({ runs }) {
      this.runs = runs;
      if (this.shape() !== this.built) this.build();
      else {
        this.prepare();
        for (const { spec, plot } of this.plots) plot.setData(this.tables(spec).data, false);
        this.fit();
        this.showValues();
      }
    }

    /* Return a string of all facts that determine the page's elements. If the string is the same, charts are kept. */
    shape() {
      const shapes = this.runs.map((run) => [run.name, run.state, run.axes, Object.keys(run.series)]);
      return JSON.stringify([shapes, this.axis, this.isLog, [...this.hidden]]);
    }

    colour(place) {
      const colours = COLOURS[this.dark.matches ? "dark" : "light"];
      return colours[place % colours.length];
    }

    style(name) {
      return getComputedStyle(this.container).getPropertyValue(name).trim();
    }

    shown() {
      return this.runs
        .map((run, place) => ({ run, place }))
        .filter(({ run }) => run.axes.includes(this.axis) && !this.hidden.has(run.name));
    }

    // Data

    prepare() {
      this.curves = new Map();
      let low = Infinity, high = -Infinity;
      for (const { run } of this.shown()) {
        for (const [key, series] of Object.entries(run.series)) {
          const curve = along(series, this.axis);
          this.curves.set(`${run.name}\n${key}`, curve);
          if (!curve.xs.length) continue;
          low = Math.min(low, curve.xs[0]);
          high = Math.max(high, curve.xs[curve.xs.length - 1]);
        }
      }
      if (low > high) [low, high] = [0, 1];
      if (low === high) [low, high] = [low - 1, high + 1];
      this.range = [low, high];
    }

    curve(run, key) {
      return this.curves.get(`${run.name}\n${key}`);
    }

    /* Return uPlot's columns for a chart, and the layer and run of each column. */
    tables(spec) {
      const columns = [];
      for (const layer of spec.layers) {
        for (const { run, place } of this.shown()) {
          const curve = this.curve(run, layer.key);
          if (curve) columns.push({ layer, run, place, curve });
        }
      }
      const positive = (values) => (this.isLog && spec === MAIN ? values.map((y) => (y > 0 ? y : null)) : values);
      const tables = columns.map(({ curve }) => [curve.xs, positive(curve.ys)]);
      return { columns, data: tables.length ? uPlot.join(tables) : [[]] };
    }

    // Building

    build() {
      this.plots.forEach(({ plot }) => plot.destroy());
      this.plots = [];
      this.prepare();
      this.built = this.shape();
      const focused = document.activeElement?.dataset?.atlasKey;
      this.legend = element("div", { class: "legend" });
      this.note = element("p", { class: "chart-note", "aria-live": "polite" });
      const charts = element("div", {
        class: "charts", tabindex: "0", role: "group", onkeydown: (event) => this.key(event),
        "aria-label": "Curves. Arrow keys read values, plus and minus zoom, 0 shows all.",
      });
      this.container.replaceChildren(this.controls(), ...this.missing(), this.legend, charts, this.note);
      this.container.classList.add("atlas-charts");
      charts.append(this.chart(MAIN, MAIN_HEIGHT));
      const grid = element("div", { class: "small-charts" });
      charts.append(grid);
      for (const spec of SMALL) {
        if (this.runs.some((run) => run.series[spec.id])) grid.append(this.chart(spec, SMALL_HEIGHT));
      }
      for (const place of this.plots) this.draw(place);
      this.fillLegend();
      this.fit();
      this.showValues();
      if (focused) this.container.querySelector(`[data-atlas-key="${focused}"]`)?.focus();
    }

    controls() {
      const button = (key, text, pressed, act, enabled = true) => {
        const made = element("button", {
          type: "button", text, "aria-pressed": String(pressed), "data-atlas-key": key, onclick: act,
        });
        made.disabled = !enabled;
        return made;
      };
      const axes = Object.keys(AXES).map((axis) => button(
        axis, AXES[axis], axis === this.axis, () => this.setAxis(axis), this.runs.some((run) => run.axes.includes(axis)),
      ));
      const scale = [false, true].map((isLog) => button(
        isLog ? "log" : "linear", isLog ? "Log" : "Linear", isLog === this.isLog, () => {
          this.isLog = isLog;
          this.build();
        },
      ));
      const group = (label, buttons) => element("div", { class: "control", role: "group", "aria-label": label }, [
        element("span", { class: "control-name", text: label }), element("span", { class: "segments" }, buttons),
      ]);
      const hint = element("span", { class: "hint", text: "Drag to zoom, double-click to see all" });
      return element("div", { class: "controls" }, [group("Over", axes), group("Loss", scale), hint]);
    }

    setAxis(axis) {
      this.axis = axis;
      this.zoom = this.hover = null;
      this.onAxis(axis);
      this.build();
    }

    missing() {
      return this.runs.filter((run) => !run.axes.includes(this.axis)).map((run) => element("p", {
        class: "missing", text: `${run.name} is not shown over ${AXES[this.axis].toLowerCase()}: ${run.axes_missing[this.axis]}.`,
      }));
    }

    chart(spec, height) {
      const value = element("span", { class: "chart-values" });
      const title = element("figcaption", {}, [
        element("span", { class: "chart-title", text: spec.title }),
        ...(spec.unit ? [element("span", { class: "chart-unit", text: spec.unit })] : []), value,
      ]);
      const box = element("div", { class: "plot" });
      const figure = element("figure", { class: spec === MAIN ? "chart main" : "chart", "data-chart": spec.id }, [title, box]);
      this.plots.push({ spec, box, height, value, plot: null });
      return figure;
    }

    draw(place) {
      const { spec, box, height } = place, { columns, data } = this.tables(spec), isLog = this.isLog && spec === MAIN;
      const text = this.style("--muted"), lines = this.style("--grid"), font = `12px ${this.style("--font")}`;
      const axis = { stroke: text, font, grid: { stroke: lines, width: 1 }, ticks: { show: false } };
      const series = columns.map(({ layer, place: number, curve }) => ({
        stroke: withAlpha(this.colour(number), layer.alpha), width: layer.width, dash: layer.dash,
        points: { show: Boolean(layer.points) || curve.xs.length === 1, size: 6, fill: this.colour(number), stroke: this.colour(number) },
      }));
      place.plot = new uPlot({
        width: Math.max(200, box.clientWidth), height, padding: [10, 14, 0, 0], legend: { show: false },
        series: [{}, ...series],
        scales: {
          x: { time: false, range: () => this.zoom || this.range },
          y: { distr: isLog ? 3 : 1, range: (_, low, high) => this.padded(low, high, isLog) },
        },
        axes: [
          { ...axis, size: 34, space: 90, values: (_, ticks) => ticks.map((tick) => tickOf[this.axis](tick)),
            ...(this.axis === "time" ? { incrs: TIME_STEPS } : {}) },
          { ...axis, size: 66, gap: 8, space: spec === MAIN ? 48 : 34,
            values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : this.tick(spec, tick))) },
        ],
        cursor: {
          y: false, drag: { x: true, y: false, setScale: false }, points: { show: false }, bind: { dblclick: () => null },
        },
        hooks: {
          setCursor: [(plot) => this.move(plot)],
          setSelect: [(plot) => this.select(plot)],
          draw: [(plot) => this.mark(plot, spec === MAIN)],
          ready: [(plot) => plot.over.addEventListener("dblclick", () => this.look(null))],
        },
      }, data, box);
    }

    tick(spec, value) {
      return spec === MAIN || spec.id === "learning_rate" || spec.id === "grad_norm" ? plain(value, 3) : spec.format(value);
    }

    padded(low, high, isLog) {
      if (low == null) return isLog ? [1, 10] : [0, 1];
      if (isLog) return [low / 1.05, high * 1.05];
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }

    resize() {
      for (const { plot, box, height } of this.plots) {
        const width = Math.max(200, box.clientWidth);
        if (plot && plot.width !== width) plot.setSize({ width, height });
      }
    }

    // Zoom

    look(zoom) {
      this.zoom = zoom;
      this.fit();
    }

    fit() {
      const [min, max] = this.zoom || this.range;
      for (const { plot } of this.plots) plot.setScale("x", { min, max });
    }

    select(plot) {
      const { left, width } = plot.select;
      if (width < 4) return;
      const zoom = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
      plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      this.look(zoom);
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const [low, high] = this.zoom || this.range, middle = this.hover ?? (low + high) / 2, step = (high - low) / 100;
      const narrowed = (factor) => [
        Math.max(this.range[0], middle - (middle - low) * factor), Math.min(this.range[1], middle + (high - middle) * factor),
      ];
      const acts = {
        ArrowLeft: () => this.read(Math.max(low, (this.hover ?? high) - step)),
        ArrowRight: () => this.read(Math.min(high, (this.hover ?? low) + step)),
        Home: () => this.read(low), End: () => this.read(high),
        "+": () => this.look(narrowed(0.6)), "=": () => this.look(narrowed(0.6)), "-": () => this.look(narrowed(1 / 0.6)),
        0: () => this.look(null), Escape: () => { this.read(null); this.look(null); },
      };
      if (!acts[event.key]) return;
      event.preventDefault();
      acts[event.key]();
    }

    // Values under the pointer

    move(plot) {
      if (this.isMoving) return;
      const { left } = plot.cursor;
      this.read(left == null || left < 0 ? null : plot.posToVal(left, "x"));
    }

    read(x) {
      this.hover = x;
      this.isMoving = true; // setting the other cursors calls move() again
      for (const { plot } of this.plots) {
        if (plot) plot.setCursor({ left: x == null ? -10 : plot.valToPos(x, "x"), top: x == null ? -10 : 0 });
      }
      this.isMoving = false;
      this.showValues();
    }

    at(run, key) {
      const curve = this.curve(run, key);
      if (!curve || !curve.xs.length) return null;
      return this.hover == null ? curve.ys.length - 1 : nearest(curve.xs, this.hover);
    }

    fillLegend() {
      const head = ["Run", "Smoothed", "Loss", "Validation", ""].map((text) => element("th", { scope: "col", text }));
      const rows = this.runs.map((run, place) => {
        const toggle = element("button", {
          type: "button", class: "run-name", "aria-pressed": String(!this.hidden.has(run.name)),
          "data-atlas-key": `run-${place}`, title: "Show or hide this run", onclick: () => this.toggle(run.name),
        }, [element("span", { class: "swatch" }), element("span", { text: run.name })]);
        toggle.firstChild.style.background = this.colour(place);
        const cells = [0, 1, 2, 3].map(() => element("td", { text: "–" }));
        return element("tr", { "data-run": run.name }, [element("th", { scope: "row" }, [toggle]), ...cells]);
      });
      const table = element("table", {}, [element("thead", {}, [element("tr", {}, head)]), element("tbody", {}, rows)]);
      const keys = [["line-raw", "each update"], ["line-smooth", "smoothed"], ["line-dash", "validation"]];
      this.legend.replaceChildren(element("div", { class: "scroll" }, [table]), element("p", { class: "line-keys" }, keys.map(([name, text]) => element(
        "span", {}, [element("i", { class: name }), element("span", { text })],
      ))));
    }

    toggle(name) {
      if (!this.hidden.delete(name)) this.hidden.add(name);
      this.build();
    }

    /* Show the values at the pointer, or else the last values, in the legend and above each small chart. Show the events
     * at the pointer. */
    showValues() {
      const shown = this.shown(), rows = this.legend.querySelectorAll("tbody tr");
      this.runs.forEach((run, place) => {
        const cells = rows[place].querySelectorAll("td"), isShown = shown.some((one) => one.run === run);
        MAIN.layers.forEach(({ key }, number) => {
          const at = isShown ? this.at(run, key) : null;
          cells[[1, 0, 2][number]].textContent = at == null ? "–" : loss(this.curve(run, key).ys[at]);
        });
        const at = isShown ? this.at(run, "smoothed_loss") ?? this.at(run, "val_loss") : null;
        const curve = this.curve(run, "smoothed_loss") || this.curve(run, "val_loss");
        cells[3].textContent = at == null ? "" : shownAt(this.axis, curve.xs[at]);
        rows[place].classList.toggle("off", !isShown);
      });
      for (const { spec, value } of this.plots) {
        if (spec === MAIN) continue;
        value.replaceChildren(...shown.flatMap(({ run, place }) => {
          const at = this.at(run, spec.id);
          if (at == null) return [];
          const made = element("span", { text: spec.format(this.curve(run, spec.id).ys[at]) });
          made.style.color = `color-mix(in srgb, ${this.colour(place)} 70%, var(--ink))`;
          return [made];
        }));
      }
      this.note.textContent = this.eventsHere().join("   ");
    }

    // Events

    eventsHere() {
      const plot = this.plots[0]?.plot;
      if (!plot || this.hover == null) return [];
      const here = plot.valToPos(this.hover, "x"), several = this.runs.length > 1;
      return this.shown().flatMap(({ run }) => run.events
        .filter((event) => Math.abs(plot.valToPos(event[this.axis], "x") - here) <= NEAR)
        .slice(-3)
        .map((event) => `${several ? `${run.name}, ` : ""}step ${grouped(event.step)}: ${event.text}`));
    }

    /* Draw a line at each event. Saves are frequent, so each save is only a tick on the axis. */
    mark(plot, isMain) {
      const { ctx, bbox } = plot, ratio = devicePixelRatio;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      for (const { run, place } of this.shown()) {
        ctx.strokeStyle = ctx.fillStyle = this.colour(place);
        for (const event of run.events) {
          const x = plot.valToPos(event[this.axis], "x", true), isSave = event.event === "save";
          if (isSave && !isMain) continue;
          ctx.globalAlpha = isSave ? 0.5 : 0.8;
          ctx.lineWidth = ratio;
          ctx.setLineDash(isSave ? [] : [2 * ratio, 3 * ratio]);
          ctx.beginPath();
          ctx.moveTo(x, isSave ? bbox.top + bbox.height - 6 * ratio : bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
          if (isSave || !isMain) continue;
          ctx.setLineDash([]);
          ctx.beginPath();
          ctx.moveTo(x - 5 * ratio, bbox.top);
          ctx.lineTo(x + 5 * ratio, bbox.top);
          ctx.lineTo(x, bbox.top + 7 * ratio);
          ctx.fill();
        }
      }
      ctx.restore();
    }
  }

  return { create: (container, data, options) => new Charts(container, data, options) };
})();
