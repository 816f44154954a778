// What a conversation is, and how an answer grows: plain data, without page, server or database.
//
// {id, title, named, created, updated, messages}. A message is as the API has it; an answer has `about` beside that:
// how it ended ("" while it grows), what it took, what it cost.

const TITLE_CHARS = 60;

export function begin() {
  const random = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const now = Date.now();
  return { id, title: "", named: false, created: now, updated: now, messages: [] };
}

// Its first words, unless somebody named it.
export function entitle(conversation) {
  if (conversation.named) return;
  const first = conversation.messages.find(({ role }) => role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  conversation.title = line.length > TITLE_CHARS ? `${line.slice(0, TITLE_CHARS - 1).trimEnd()}…` : line;
}

export function newAnswer() {
  return { role: "assistant", content: "", about: { ending: "" } };
}

// Whether every call of the answer at `index` has its result.
export function isAnswered(messages, index) {
  const results = new Set();
  for (let at = index + 1; messages[at]?.role === "tool"; at += 1) results.add(messages[at].tool_call_id);
  return (messages[index].tool_calls ?? []).every(({ id }) => results.has(id));
}

// The messages as the API takes them. Calls that nobody answered are no part of what is asked.
export function asked(messages, system) {
  const told = messages.map(({ about, tool_calls, ...message }, index) =>
    tool_calls?.length && isAnswered(messages, index) ? { ...message, tool_calls } : message,
  );
  return system ? [{ role: "system", content: system }, ...told] : told;
}

// Fills `message` from the chunks of a stream. clock: gives milliseconds.
export class Growth {
  constructor(message, clock = () => performance.now()) {
    this.message = message;
    this.clock = clock;
    this.begunAt = clock();
    this.thoughtAt = 0;
    this.firstAt = 0;
    this.firstCount = 0;
    this.lastCount = 0;
  }

  get began() {
    const { content, reasoning_content, tool_calls } = this.message;
    return Boolean(content || reasoning_content || tool_calls);
  }

  get thinks() {
    return this.thoughtAt > 0 && this.message.about.thought_seconds === undefined;
  }

  take(chunk) {
    if (chunk.usage) this.count(chunk.usage);
    const choice = chunk.choices[0];
    if (choice?.finish_reason) this.message.about.ending = choice.finish_reason;
    const { content, reasoning_content, tool_calls } = choice?.delta ?? {};
    if (reasoning_content) {
      this.thoughtAt ||= this.clock();
      this.message.reasoning_content = (this.message.reasoning_content ?? "") + reasoning_content;
    }
    if (content || tool_calls) this.stopThinking();
    if (content) this.message.content += content;
    for (const piece of tool_calls ?? []) this.call(piece);
  }

  // ending: why, where the server did not say.
  end(ending) {
    this.stopThinking();
    if (ending) this.message.about.ending = ending;
  }

  stopThinking() {
    if (this.thinks) this.message.about.thought_seconds = (this.clock() - this.thoughtAt) / 1000;
  }

  call({ index, id, function: { name, arguments: text } }) {
    const calls = (this.message.tool_calls ??= []);
    calls[index] ??= { id, type: "function", function: { name, arguments: "" } };
    calls[index].function.arguments += text;
  }

  // Tokens per second since the first one: the prompt's time is not the answer's speed.
  count(usage) {
    const { about } = this.message;
    const now = this.clock();
    const count = usage.completion_tokens;
    about.prompt_tokens = usage.prompt_tokens;
    about.cached_tokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
    about.tokens = count;
    if (usage.cost_details) about.cost = usage.cost_details;
    if (count && !this.firstAt) {
      this.firstAt = now;
      this.firstCount = count;
      about.first_seconds = (now - this.begunAt) / 1000;
    } else if (count > this.lastCount) {
      about.per_second = ((count - this.firstCount) * 1000) / (now - this.firstAt);
    }
    this.lastCount = count;
  }
}
