// The page at /runs: the curves of the runs in a folder. The page updates the curves every two seconds.
/* global AtlasCharts */
import { ask, hasKey, showKey } from "./common.js";

const EVERY = 2000; // milliseconds
const status = document.getElementById("status");
let charts = null;

async function look() {
  if (document.hidden) return setTimeout(look, EVERY);
  try {
    if ((await ask("health")).needs_key && !hasKey()) return showKey(look);
    const { folder, more, runs } = await ask("api/runs");
    status.className = "";
    status.ariaLive = "off"; // a screen reader must not announce the time every two seconds
    status.textContent = runs.length
      ? `${folder}, updated ${new Date().toLocaleTimeString()}` + (more ? `; ${more} older runs are not drawn` : "")
      : `${folder} contains no run yet: start a run with atlas train`;
    if (charts) charts.update({ runs });
    else if (runs.length) {
      const options = { axis: location.hash.slice(1), onAxis: (axis) => (location.hash = axis) };
      charts = AtlasCharts.create(document.getElementById("charts"), { runs }, options);
    }
  } catch (error) {
    if (error.status === 401) return showKey(look);
    status.className = "bad";
    status.ariaLive = "polite";
    status.textContent = `${error.message}; the page tries again every two seconds`;
  }
  setTimeout(look, EVERY);
}

look();
