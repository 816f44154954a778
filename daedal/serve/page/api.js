// The server's API as the page uses it: its numbers, and an answer as it comes. Knows nothing of what is shown.

const LOST = "The connection to the server was lost: try again.";

// What the server said instead of an answer, as a sentence.
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  // key: gives the key to send, or an empty text.
  constructor(key) {
    this.key = key;
  }

  async stats() {
    return (await this.ask("/stats", {})).json();
  }

  // Which experts the server saw last; it looks again because of it.
  async experts() {
    return (await this.ask("/experts", {})).json();
  }

  // The chunks of an answer.
  async *answer(body, signal) {
    const stream = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    const response = await this.ask("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, ...stream }),
      signal,
    });
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Refusal(200, sentence(chunk.error.message));
      yield chunk;
    }
  }

  async ask(path, { headers, ...options }) {
    const key = this.key();
    const allowed = key ? { Authorization: `Bearer ${key}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers, ...allowed } });
    } catch {
      throw new Refusal(0, LOST);
    }
    if (!response.ok) throw new Refusal(response.status, await reason(response));
    return response;
  }
}

async function reason(response) {
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

// Server-sent events, each one JSON object, until `[DONE]`.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw new Refusal(0, LOST);
    });
    if (done) throw new Refusal(0, "The server ended the answer early: try again.");
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim())
        .join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
