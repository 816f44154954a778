// A map of the experts that the answer under way used: a row for each layer, a column for each expert, the stronger the
// more often. The server looks at a few steps each time that it is asked, and what it saw is added up until the next
// answer begins. Knows numbers alone.

import { byId } from "./elements.js";
import { percent, whole } from "./units.js";

export class Experts {
  constructor() {
    this.looks = 0; // of the server, that were taken in
    this.none = false; // whether the model has no experts
    this.begin();
  }

  // Another answer begins.
  begin() {
    this.counts = new Map(); // by layer: how often each expert was chosen
    this.tokens = 0;
  }

  // What the server saw last: {looks, layers, counts, num_tokens}.
  take({ looks, layers, counts, num_tokens: tokens }) {
    if (looks === this.looks) return;
    this.looks = looks;
    this.none = !layers.length;
    this.tokens += tokens;
    for (const [at, layer] of layers.entries()) {
      const before = this.counts.get(layer) ?? counts[at].map(() => 0);
      this.counts.set(layer, before.map((count, expert) => count + counts[at][expert]));
    }
    this.show();
  }

  show() {
    const rows = [...this.counts.values()];
    byId("experts").hidden = !rows.length;
    if (!rows.length) return;
    const used = rows.flat().filter(Boolean).length;
    const all = rows.flat().length;
    const told = `${whole(used)} of ${whole(all)} (${percent(used, all)}) by ${whole(this.tokens)} tokens`;
    byId("experts-told").textContent = told;
    const map = byId("experts-map");
    map.setAttribute("aria-label", `Experts in use, ${rows.length} layers: ${told}`);
    paint(map, rows);
  }
}

// A pixel for each expert, which the style sheet makes larger.
function paint(map, rows) {
  map.width = Math.max(...rows.map((row) => row.length));
  map.height = rows.length;
  const brush = map.getContext("2d");
  brush.fillStyle = getComputedStyle(map).color;
  for (const [y, row] of rows.entries()) {
    const most = Math.max(...row, 1);
    for (const [x, count] of row.entries()) {
      brush.globalAlpha = Math.sqrt(count / most);
      if (count) brush.fillRect(x, y, 1, 1);
    }
  }
}
