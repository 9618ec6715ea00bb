// A first taste of the network: asks the API of this same origin, as every application does. Nothing is stored but, for
// this tab, the key that its user typed. An answer counts as whole only when [DONE] came, which the node sends once the
// executor's signed receipt was verified.
const $ = (id) => document.getElementById(id);
const KEY = "lloom-api-key";
let messages = [];
let running = null;

const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
};
const short = (peer) => (peer ? `${peer.slice(0, 4)}…${peer.slice(-6)}` : "");

function add(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const body = document.createElement("span");
  body.textContent = text;
  item.append(body);
  $("talk").append(item);
  return { item, body };
}
function remark(item, kind, text) {
  const line = document.createElement("span");
  line.className = kind;
  line.textContent = text;
  if (kind.includes("failed")) line.setAttribute("role", "alert");
  item.append(line);
  return line;
}

async function errorOf(answer) {
  try {
    const { error } = await answer.json();
    return `${error.message} (${error.code || error.type || answer.status})`;
  } catch {
    return `HTTP ${answer.status}`;
  }
}

async function loadModels() {
  let answer;
  try {
    answer = await fetch("/v1/models", { headers: headers() });
  } catch {
    $("note").textContent = "The node does not answer. It is looked for again.";
    return;
  }
  $("key-form").hidden = answer.status !== 401;
  if (!answer.ok) {
    $("note").textContent = answer.status === 401 ? "" : await errorOf(answer);
    return;
  }
  const ids = (await answer.json()).data.map((one) => one.id);
  const chosen = $("model").value;
  if (ids.join("\n") !== [...$("model").options].map((one) => one.value).join("\n")) {
    $("model").replaceChildren(...ids.map((id) => new Option(id, id)));
    if (ids.includes(chosen)) $("model").value = chosen;
  }
  $("note").textContent = ids.length ? "" : "No executor offers a model yet. The list is looked at again every few seconds.";
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const lines = rest.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      rest = rest.slice(end + 2);
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  add("user", text);
  const { item, body } = add("assistant", "");
  item.setAttribute("aria-busy", "true");
  const waiting = remark(item, "facts soft", "Waiting for an executor…");
  $("note").textContent = "";
  $("send").disabled = true;
  $("stop").hidden = false;
  running = new AbortController();
  const began = performance.now();
  let content = "", isWhole = false, usage = null, answer = null;
  try {
    answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), signal: running.signal,
      body: JSON.stringify({ model: $("model").value, messages, stream: true, stream_options: { include_usage: true } }),
    });
    if (answer.status === 401) $("key-form").hidden = false;
    if (!answer.ok) throw new Error(await errorOf(answer));
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") { isWhole = true; continue; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(`${chunk.error.message} (${chunk.error.code})`);
      if (chunk.usage) usage = chunk.usage;
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) waiting.remove();
      if (piece) { content += piece; body.textContent = content; item.scrollIntoView({ block: "end" }); }
    }
    if (!isWhole) throw new Error("the answer ended before its end was confirmed");
    messages.push({ role: "assistant", content });
    $("note").textContent = "The answer is complete."; // what a screen reader hears
    const seconds = (performance.now() - began) / 1000;
    const attempts = Number(answer.headers.get("x-lloom-attempts") || 1);
    remark(item, "facts soft", [
      "✔ receipt verified", `executor ${short(answer.headers.get("x-lloom-executor"))}`, attempts > 1 ? `${attempts} asked` : "",
      usage ? `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} a second` : "", `${seconds.toFixed(1)} s`,
    ].filter(Boolean).join(" · "));
  } catch (error) {
    messages.pop(); // the question may be put again
    if (running.signal.aborted) remark(item, "failed warn", "Stopped. This is not the whole answer.");
    else remark(item, "failed bad", `${content ? "Cut: this is not the whole answer" : "No answer"}: ${error.message}`);
  } finally {
    waiting.remove();
    item.removeAttribute("aria-busy");
    running = null;
    $("send").disabled = false;
    $("stop").hidden = true;
    $("question").focus();
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || running || !$("model").value) return;
  $("question").value = "";
  ask(text);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => { running?.abort(); messages = []; $("talk").replaceChildren(); $("question").focus(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  loadModels();
});

fetch("/chat/node.json").then((answer) => answer.json()).then((node) => {
  if (!node.page_port) return;
  const url = new URL("/", location.href);
  url.protocol = "http:"; // the status page has no TLS of its own, whatever the API has
  url.port = node.page_port;
  $("status").href = url.href;
  $("status").hidden = false;
}).catch(() => {});
await loadModels();
setInterval(() => { if (!running) loadModels(); }, 5000);
