// The chat page: which conversation is open, which answers are under way, and what a key or a click does. An answer
// goes on while another conversation is open, and is kept as far as it has come.

import { Api } from "./api.js";
import { Growth, asked, begin, entitle, newAnswer } from "./conversation.js";
import { byId, download, textButton } from "./elements.js";
import { List } from "./list.js";
import { Live } from "./live.js";
import { showAnswer, showCosts } from "./panel.js";
import { MOST_BYTES, restored } from "./restored.js";
import { Settings } from "./settings.js";
import { MOST, Store } from "./store.js";
import { Turns, fit } from "./turns.js";

const KEEP_MS = 300;
const NEAR_BOTTOM_PX = 80;
const UNKEPT = "This browser does not keep the conversation: export it, or it is lost when the page goes.";

const scroller = byId("scroller");
const input = byId("input");
const wide = matchMedia("(min-width: 62rem)"); // as in style.css

const store = await Store.open().catch(() => null);
const settings = new Settings(() => live.poll());
const api = new Api(() => settings.key);
const live = new Live(api, settings, serverIs);
const turns = new Turns(byId("conversation"), { edit, again, results, leave: () => input.focus() });
const list = new List(byId("list"), { open, rename, keep: exportOne, remove });

let current = begin();
const runs = new Map(); // {controller, conversation, growth} by the conversation's id
const unsaved = new Map(); // conversations to be kept soon, by id

// Asks for the next answer; where none begins, the conversation is as it was `before`.
async function ask(conversation, before, typed = "") {
  const body = { ...settings.request(), messages: asked(conversation.messages, settings.system), ...live.wishes() };
  const message = newAnswer();
  const run = { controller: new AbortController(), conversation, growth: new Growth(message) };
  conversation.messages.push(message);
  conversation.updated = Date.now();
  entitle(conversation);
  runs.set(conversation.id, run);
  if (conversation === current) addressIs(conversation.id);
  showError("");
  save(conversation);
  show(true);
  const problem = await receive(run, body);
  runs.delete(conversation.id);
  if (problem && !run.growth.began) {
    conversation.messages = before;
    if (conversation === current && !input.value) input.value = typed;
  }
  if (run.dropped) return adjust();
  save(conversation);
  if (conversation !== current) return adjust();
  show();
  showError(problem);
  byId("status").textContent = problem ? "" : "The answer is complete.";
}

// What went wrong, or nothing.
async function receive({ controller, conversation, growth }, body) {
  try {
    for await (const chunk of api.answer(body, controller.signal)) {
      growth.take(chunk);
      saveSoon(conversation);
      if (conversation === current) drawSoon(growth);
    }
    growth.end();
  } catch (error) {
    growth.end(controller.signal.aborted ? "stopped" : "error");
    if (error.status === 401) live.poll();
    if (!controller.signal.aborted) return error.message;
  }
  return "";
}

function send() {
  const text = input.value.trim();
  if (!text || !mayAsk()) return;
  const before = [...current.messages];
  current.messages.push({ role: "user", content: text });
  input.value = "";
  ask(current, before, text);
}

function edit(index, text) {
  askFrom(index, { role: "user", content: text });
}

function again(index) {
  askFrom(index);
}

function results(index, texts) {
  const calls = current.messages[index].tool_calls;
  const messages = texts.map((content, at) => ({ role: "tool", tool_call_id: calls[at].id, content }));
  askFrom(index + 1, ...messages);
}

function askFrom(index, ...messages) {
  if (!mayAsk()) return;
  const before = current.messages;
  current.messages = [...before.slice(0, index), ...messages];
  ask(current, before, messages[0]?.role === "user" ? messages[0].content : "");
  input.focus();
}

function mayAsk() {
  return live.canAsk && !runs.has(current.id);
}

function stop() {
  runs.get(current.id)?.controller.abort();
}

// What is shown

function show(toEnd = false) {
  const running = runs.has(current.id);
  const follow = toEnd || atEnd();
  turns.show(current.messages, running);
  showAnswer(current.messages.findLast(({ about }) => about?.tokens)?.about);
  showCosts(current.messages);
  if (!running) byId("status").textContent = "";
  adjust();
  showList();
  if (follow) scroller.scrollTop = scroller.scrollHeight;
}

// The server is another than it was: it takes questions, or it does not.
function serverIs() {
  if (!live.chats) showNotice("This model completes text but has no chat format: use /v1/completions.");
  adjust();
  if (live.locked) byId("key").focus();
  else input.focus();
}

// What depends on whether an answer is under way and whether the server takes questions.
function adjust() {
  const running = runs.has(current.id);
  byId("conversation").setAttribute("aria-busy", String(running));
  byId("locked").hidden = !live.locked;
  byId("welcome").hidden = live.locked || current.messages.length > 0;
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  byId("send").disabled = !live.canAsk || !input.value.trim();
  input.disabled = !live.canAsk;
  input.placeholder = live.chats ? "Write a message" : "This model has no chat format";
  fit(input);
  live.hurry(runs.size > 0);
}

let framed = false;

function drawSoon(growth) {
  if (framed) return;
  framed = true;
  requestAnimationFrame(() => {
    framed = false;
    if (runs.get(current.id)?.growth !== growth) return;
    const follow = atEnd();
    turns.grow();
    showAnswer(growth.message.about);
    byId("status").textContent = growth.thinks ? "The model is thinking." : "The answer is coming.";
    if (follow) scroller.scrollTop = scroller.scrollHeight;
  });
}

async function showList() {
  const heads = (await store?.heads()) ?? [];
  list.show(heads, current.id, runs);
  byId("export-all").disabled = !heads.length;
  byId("import").disabled = !store;
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
  if (text) showNotice("");
}

function showNotice(text, ...buttons) {
  byId("notice").replaceChildren(text, ...buttons);
  byId("notice").hidden = !text;
}

function atEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_BOTTOM_PX;
}

// What is kept

async function save(conversation) {
  unsaved.delete(conversation.id);
  if (!conversation.messages.length) return forget(conversation);
  try {
    await store.save(conversation);
    await store.trim();
  } catch {
    showNotice(UNKEPT);
  }
  showList();
}

function saveSoon(conversation) {
  if (unsaved.has(conversation.id)) return;
  unsaved.set(conversation.id, conversation);
  setTimeout(() => unsaved.has(conversation.id) && saveNow(conversation), KEEP_MS);
}

function saveNow(conversation) {
  unsaved.delete(conversation.id);
  store?.save(conversation).catch(() => showNotice(UNKEPT));
}

async function forget({ id }) {
  unsaved.delete(id);
  await store?.remove(id);
  if (id === current.id) addressIs("");
  showList();
}

// Undefined where another tab has deleted it.
async function find(id) {
  return id === current.id ? current : (runs.get(id)?.conversation ?? (await store?.read(id)));
}

async function open(id) {
  const found = await find(id);
  if (!found) return newChat();
  current = found;
  if (addressed() !== id) history.pushState(null, "", `#${id}`);
  arrive();
}

function newChat() {
  current = begin();
  if (addressed()) history.pushState(null, "", location.pathname);
  arrive();
}

function arrive() {
  showError("");
  showSide(wide.matches && sideIsOpen());
  show(true);
  input.focus();
}

async function rename(id, title) {
  const conversation = await find(id);
  if (!conversation) return showList();
  Object.assign(conversation, { title, named: true });
  save(conversation);
}

async function remove(id) {
  const run = runs.get(id);
  const conversation = await find(id);
  if (run) run.dropped = true;
  run?.controller.abort();
  await forget({ id });
  if (!conversation) return;
  if (id === current.id) newChat();
  const undo = textButton("Undo", "link", () => {
    showNotice("");
    save(conversation);
  });
  showNotice("The conversation is deleted. ", undo);
}

async function exportOne(id) {
  const conversation = await find(id);
  if (!conversation) return showList();
  download("conversation.json", JSON.stringify(conversation, null, 2));
}

async function exportAll() {
  download("conversations.json", JSON.stringify(await store.readAll(), null, 2));
}

// What was exported comes back, beside what is here; of one conversation the file's state is kept.
async function importFile(file) {
  try {
    if (file.size > MOST_BYTES) throw new Error("The file is too large: choose one that was exported here.");
    const found = restored(await file.text()).filter(({ id }) => !runs.has(id));
    for (const conversation of found) {
      if (!conversation.title) entitle(conversation);
      await store.save(conversation);
    }
    await store.trim();
    showNotice(found.length === 1 ? "One conversation is here again." : `${found.length} conversations are here again.`);
    if (found.some(({ id }) => id === current.id)) current = await store.read(current.id);
    show();
  } catch (error) {
    showError(error.message);
  }
}

// The address says which conversation is open, so that a reload opens it again.

function addressed() {
  return location.hash.slice(1);
}

function addressIs(id) {
  if (addressed() !== id) history.replaceState(null, "", id ? `#${id}` : location.pathname);
}

function followAddress() {
  if (addressed() === current.id || (!addressed() && !current.messages.length)) return;
  if (addressed()) open(addressed());
  else newChat();
}

// The list at the side

function sideIsOpen() {
  return document.body.dataset.side === "open";
}

function showSide(opened) {
  document.body.dataset.side = opened ? "open" : "closed";
  byId("toggle-side").setAttribute("aria-expanded", String(opened));
}

// Keys and clicks

function onKey(event) {
  const plain = !event.shiftKey && !event.altKey && !event.ctrlKey && !event.metaKey;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    byId("settings").close();
    newChat();
  } else if (event.key === "Escape" && !byId("settings").open) {
    if (!wide.matches && sideIsOpen()) showSide(false);
    else stop();
  } else if (event.key === "ArrowUp" && plain && event.target === input && !input.value && mayAsk()) {
    event.preventDefault();
    turns.edit();
  } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === input) {
    event.preventDefault();
    send();
  }
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("locked").addEventListener("submit", (event) => {
  event.preventDefault();
  settings.useKey(byId("key").value.trim());
  byId("key").value = "";
});
byId("stop").addEventListener("click", () => {
  stop();
  input.focus();
});
byId("new-chat").addEventListener("click", newChat);
byId("export-all").addEventListener("click", exportAll);
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", ({ target }) => {
  if (target.files.length) importFile(target.files[0]);
  target.value = "";
});
byId("toggle-side").addEventListener("click", () => showSide(!sideIsOpen()));
byId("shade").addEventListener("click", () => showSide(false));
input.addEventListener("input", adjust);
wide.addEventListener("change", () => showSide(wide.matches));
document.addEventListener("keydown", onKey);
addEventListener("popstate", followAddress);
addEventListener("pagehide", () => unsaved.forEach(saveNow));
store?.watch(() => showList());
if (!store) showNotice(UNKEPT);
byId("list").title = `The latest ${MOST} conversations are kept`;
showSide(wide.matches);
if (addressed()) await open(addressed());
else show();
live.poll();
