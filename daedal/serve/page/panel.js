// The live line below the conversation and the panel that it opens: how fast the answer comes, what it took, and what
// the server has in use; beside that the table that compares a converted model with its original. Knows numbers alone.

import { byId, make } from "./elements.js";
import { amount, bytes, figures, percent, perSecond, seconds, whole, work } from "./units.js";

// Of an answer: {about of conversation.js}.
export function showAnswer(about) {
  byId("live-speed").textContent = about?.per_second ? perSecond(about.per_second) : "– tokens/s";
  put("first-token", about?.first_seconds === undefined ? "" : seconds(about.first_seconds));
  put("tokens", about?.tokens ? `${whole(about.tokens)} after ${whole(about.prompt_tokens)}` : "");
  const found = about?.cached_tokens ?? 0;
  const cached = `${whole(found)} of ${whole(about?.prompt_tokens ?? 0)} tokens`;
  put("cached", about?.prompt_tokens ? `${cached} (${percent(found, about.prompt_tokens)})` : "");
}

// What the answers of a conversation cost together.
export function showCosts(messages) {
  const costs = messages.map(({ about }) => about?.cost).filter(Boolean);
  const total = (name) => costs.reduce((sum, cost) => sum + (cost[name] ?? 0), 0);
  const parts = [];
  if (costs.some(({ dollars }) => dollars !== null)) parts.push(`$${figures(total("dollars"))}`);
  if (costs.some(({ joules }) => joules !== null)) parts.push(`${figures(total("joules"))} J`);
  if (costs.length) parts.push(work(total("flops")));
  put("cost", parts.join(" · "));
}

export function showServer(stats) {
  byId("live-cache").textContent = `${bytes(stats.kv_bytes_used)} of ${bytes(stats.kv_bytes_total)} KV cache`;
  byId("kv-meter").value = stats.kv_bytes_total ? stats.kv_bytes_used / stats.kv_bytes_total : 0;
  put("kv", `${bytes(stats.kv_bytes_used)} of ${bytes(stats.kv_bytes_total)}`);
  put("requests", `${whole(stats.num_running)} running, ${whole(stats.num_waiting)} waiting`);
  const { prefix_queries_total: asked, prefix_hits_total: found } = stats;
  put("prefix", asked ? `${percent(found, asked)} of ${whole(asked)} tokens` : "");
  const { num_drafted_total: drafted, num_accepted_total: accepted } = stats;
  put("drafts", drafted ? `${percent(accepted, drafted)} accepted` : "");
  put("context", `${whole(stats.max_context)} tokens`);
  const known = Boolean(stats.total_params && stats.active_params);
  byId("live-active-item").hidden = !known;
  if (!known) return;
  const active = percent(stats.active_params, stats.total_params);
  byId("live-active").textContent = `${active} of ${amount(stats.total_params)} parameters active`;
}

export function showSilence() {
  byId("live-cache").textContent = "The server does not answer";
}

// What a token costs with a converted model and with the one that it was made of, and how well they do.
export function showCompared(models) {
  const table = byId("compared");
  if (!models?.length || !table.hidden) return;
  const context = whole(models[0].context);
  const measures = [
    ["", (model) => model.name],
    ["Cache per token", (model) => bytes(model.kv_bytes_per_token)],
    ["Parameters per token", (model) => amount(model.active_params)],
    [`Work per token after ${context}`, (model) => work(model.decode_flops_per_token)],
    ["Perplexity of real text", (model) => `× ${model.perplexity_ratio.toFixed(3)}`],
  ];
  for (const [index, [title, told]] of measures.entries()) {
    const row = table.insertRow();
    row.append(make("th", "", title), ...models.map((model) => make(index ? "td" : "th", "", told(model))));
  }
  table.hidden = false;
}

// What is not known is not shown.
function put(name, text) {
  const value = byId(`panel-${name}`);
  value.textContent = text;
  value.parentElement.hidden = !text;
}
