// What the server says of itself, asked again and again while the page is seen: whether it answers questions and from
// whom, what its model can do, and the numbers that the panel shows.

import { byId } from "./elements.js";
import { Experts } from "./experts.js";
import { showCompared, showServer, showSilence } from "./panel.js";

const IDLE_POLL_MS = 5000;
const BUSY_POLL_MS = 1000;
const SOON_MS = 300; // for the server to notice that a stopped answer is not wanted any more

export class Live {
  // changed: called when the answer to one of the questions below may be another.
  constructor(api, settings, changed) {
    this.api = api;
    this.settings = settings;
    this.changed = changed;
    this.locked = false; // whether the server wants a key that it was not given
    this.chats = true;
    this.countsCost = false;
    this.busy = false;
    this.timer = 0;
    this.experts = new Experts();
    document.addEventListener("visibilitychange", () => !document.hidden && this.poll());
  }

  get canAsk() {
    return this.chats && !this.locked;
  }

  // Fields of a request beside those that the reader chose.
  wishes() {
    return this.countsCost ? { include_cost: true } : {};
  }

  // busy: whether an answer is under way.
  hurry(busy) {
    if (busy === this.busy) return;
    this.busy = busy;
    if (busy) this.experts.begin();
    this.again(SOON_MS);
  }

  again(milliseconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), milliseconds);
  }

  async poll() {
    clearTimeout(this.timer);
    if (!document.hidden) {
      try {
        this.take(await this.api.stats());
        await this.look();
      } catch (error) {
        this.miss(error);
      }
    }
    this.again(this.busy ? BUSY_POLL_MS : IDLE_POLL_MS);
  }

  // Only while somebody sees it: looking costs the server a little.
  async look() {
    if (!this.busy || !byId("live").open || this.experts.none) return;
    const seen = await this.api.experts().catch(() => null);
    if (seen) this.experts.take(seen);
  }

  take(stats) {
    this.countsCost = stats.counts_cost;
    this.settings.know(stats.abilities);
    byId("model").textContent = stats.model;
    byId("model").title = stats.model;
    document.title = `${stats.model} – Daedal`;
    showServer(stats);
    showCompared(stats.compared);
    this.are({ locked: false, chats: stats.chat });
  }

  miss({ status }) {
    if (status === 401) {
      byId("key-error").textContent = this.settings.key ? "The server does not know this key." : "";
      this.are({ locked: true, chats: this.chats });
      return;
    }
    showSilence();
  }

  are({ locked, chats }) {
    const changed = locked !== this.locked || chats !== this.chats;
    Object.assign(this, { locked, chats });
    if (changed) this.changed();
  }
}
