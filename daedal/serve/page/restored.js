// Conversations out of a file that this page once exported, or that somebody wrote: only what a conversation may hold is
// taken over, each part by its type. Knows neither page nor database.

import { begin } from "./conversation.js";

export const MOST_BYTES = 64 * 2 ** 20;
const MOST_TITLE_CHARS = 200;
const NUMBERS = ["prompt_tokens", "cached_tokens", "tokens", "first_seconds", "per_second", "thought_seconds"];
const COUNTED = ["flops", "kv_byte_seconds"]; // of every cost
const COSTS = [...COUNTED, "device_seconds", "joules", "dollars"];
const SOURCES = ["energy_source", "price"];

// The conversations of a file's text. Throws an Error with a sentence where there are none.
export function restored(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON: choose one that was exported here.");
  }
  const found = (Array.isArray(read) ? read : [read]).map(conversation).filter(Boolean);
  if (!found.length) throw new Error("The file holds no conversation: choose one that was exported here.");
  return found;
}

function conversation(value) {
  if (!Array.isArray(value?.messages)) return null;
  const messages = value.messages.map(message).filter(Boolean);
  if (!messages.length) return null;
  const fresh = begin();
  return {
    id: /^[0-9a-f]{24}$/.test(value.id) ? value.id : fresh.id,
    title: string(value.title).slice(0, MOST_TITLE_CHARS),
    named: value.named === true,
    created: time(value.created) ?? fresh.created,
    updated: time(value.updated) ?? fresh.updated,
    messages,
  };
}

function message(value) {
  const content = string(value?.content);
  switch (value?.role) {
    case "user":
      return { role: "user", content };
    case "tool":
      return { role: "tool", tool_call_id: string(value.tool_call_id), content };
    case "assistant":
      return { role: "assistant", content, ...thought(value), ...calls(value), about: about(value.about) };
    default:
      return null;
  }
}

function thought({ reasoning_content: text }) {
  return typeof text === "string" ? { reasoning_content: text } : {};
}

function calls({ tool_calls: made }) {
  if (!Array.isArray(made) || !made.length) return {};
  const told = made.map((call) => ({
    id: string(call?.id),
    type: "function",
    function: { name: string(call?.function?.name), arguments: string(call?.function?.arguments) },
  }));
  return { tool_calls: told };
}

function about(value) {
  const told = { ending: string(value?.ending), ...numbers(value, NUMBERS) };
  const cost = value?.cost;
  if (!COUNTED.every((name) => Number.isFinite(cost?.[name]))) return told;
  const unknown = Object.fromEntries(COSTS.map((name) => [name, null]));
  const sources = SOURCES.filter((name) => typeof cost[name] === "string").map((name) => [name, cost[name]]);
  return { ...told, cost: { ...unknown, ...numbers(cost, COSTS), ...Object.fromEntries(sources) } };
}

function numbers(value, names) {
  return Object.fromEntries(names.filter((name) => Number.isFinite(value?.[name])).map((name) => [name, value[name]]));
}

function string(value) {
  return typeof value === "string" ? value : "";
}

function time(value) {
  return Number.isFinite(value) && value > 0 && value <= Date.now() ? value : undefined;
}
