// The status page. What comes from peers is put in as text, never as markup.
import { drawLegend, drawMap } from "/map.js";

const MAX_EVENTS = 200;
const RATE_S = 15;
const $ = (id) => document.getElementById(id);
const live = new Map(); // request id -> its event, until it is answered
const counts = []; // [ms, tokens received, tokens generated]
let shown = null;
let seen = new Set();

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.map((one) => (one instanceof Node ? one : String(one))));
  return node;
}
const short = (peer) => (peer ? `${peer.slice(0, 4)}…${peer.slice(-6)}` : "–");
const peerName = (peer) => make("span", { class: "mono", title: peer || "" }, short(peer));
const number = (value, digits = 0) => (value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));
const ms = (value) => (value == null ? "–" : value >= 1000 ? `${number(value / 1000, 1)} s` : `${number(value, value < 10 ? 1 : 0)} ms`);
const pill = (kind, text) => make("span", { class: `pill ${kind}` }, text);
const cells = (row, list) => list.forEach(([value, kind]) => row.append(make("td", kind ? { class: kind } : {}, value)));

function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = units.findIndex(([, size]) => seconds >= size);
  const [name, size] = units[at < 0 ? 3 : at];
  return `${Math.floor(seconds / size)} ${name}`;
}
function price(value) {
  return value.currency ? `${number(value.prompt_per_million)} / ${number(value.completion_per_million)} ${value.currency}` : "free";
}
function fill(id, rows, empty) {
  const body = $(id);
  const columns = body.parentElement.tHead.rows[0].cells.length;
  body.replaceChildren(...(rows.length ? rows : [make("tr", {}, make("td", { colspan: columns, class: "soft" }, empty))]));
}

function conditions(list) {
  const icons = { error: ["bad", "✖ error"], warning: ["warn", "▲ warning"], info: ["good", "ℹ note"] };
  const text = JSON.stringify(list);
  if ($("conditions").dataset.shown === text) return; // a screen reader hears changes only
  $("conditions").dataset.shown = text;
  $("conditions").replaceChildren(...list.map((one) => {
    const [kind, name] = icons[one.severity] || icons.info;
    return make("li", { class: kind }, make("strong", {}, `${name}: ${one.title}`), make("p", {}, one.text), make("p", {}, `What to do: ${one.remedy}`));
  }));
  if (!list.length) $("conditions").append(make("li", { class: "good" }, make("strong", {}, "✔ healthy"), make("p", {}, "Nothing needs you.")));
}

function rate(tokens) {
  const now = Date.now();
  counts.push([now, tokens.received + tokens.generated]);
  while (counts.length > 2 && counts[0][0] < now - RATE_S * 1000) counts.shift();
  const [from, before] = counts[0];
  return now - from < 500 ? 0 : Math.max(0, ((counts.at(-1)[1] - before) * 1000) / (now - from));
}

function tiles(snapshot) {
  const { status } = snapshot;
  const values = [
    ["peers", number(status.connections)], ["executors", number(status.executors)], ["models", number(status.models)],
    ["in flight", number(status.requests.in_flight)], ["queued", number(status.requests.queued)],
    ["served", number(status.requests.served)], ["failed", number(status.requests.failed)], ["tokens/s", number(rate(status.tokens), 1)],
  ];
  $("tiles").replaceChildren(...values.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function facts(snapshot) {
  const { status } = snapshot;
  const p2pd = `${status.p2pd.mode}, ${status.p2pd.up ? "up" : "down"}${status.p2pd.version ? `, ${status.p2pd.version.split(" (")[0]}` : ""}${status.p2pd.restarts ? `, ${status.p2pd.restarts} restarts` : ""}`;
  const network = status.network.id ? `${status.network.id.slice(0, 16)}…${status.network.open ? " (open)" : ""}` : status.network.open ? "open" : "none";
  const list = [
    ["peer id", make("span", { class: "mono" }, status.peer)], ["roles", status.roles.join(", ")], ["version", status.version],
    ["running for", duration(status.uptime_s)], ["network", make("span", { class: "mono" }, network)],
    ["validators", `${status.validators.filter((one) => one.connected).length} of ${status.validators.length} connected`],
    ["p2pd", p2pd], ["API", status.api.address || "none: this node is no client"],
    ["addresses", make("span", { class: "mono" }, status.addrs.map((one) => one.split("/p2p/")[0]).join("\n") || "none")],
  ];
  $("facts").replaceChildren(...list.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  $("who").textContent = `${short(status.peer)} · ${status.roles.join(", ")}`;
  document.title = `Lloom node ${short(status.peer)}`;
  $("chat").hidden = !status.api.address;
  if (status.api.address) $("chat").href = `${new URL(status.api.address).protocol}//${location.hostname}:${new URL(status.api.address).port}/chat`;
}

function models(snapshot) {
  const best = (list, pick) => list.map(pick).filter((one) => one != null);
  fill("models", snapshot.models.map((model) => {
    const usable = model.executors.filter((one) => one.state === "fresh");
    const prices = [...new Set(model.executors.map((one) => price(one.price)))];
    const first = best(usable, (one) => one.ttft_ms), speeds = best(usable, (one) => one.tokens_per_s);
    const row = make("tr", {}, make("th", { scope: "row", class: "mono" }, model.id));
    cells(row, [
      [`${usable.length}${usable.length < model.executors.length ? ` of ${model.executors.length}` : ""}`, "n"],
      [number(usable.reduce((sum, one) => sum + Math.max(0, one.slots - one.in_flight), 0)), "n"],
      [number(Math.max(0, ...model.executors.map((one) => one.context_length)) || null), "n"],
      [prices.slice(0, 3).join(" · ") + (prices.length > 3 ? " …" : "")],
      [first.length ? ms(Math.min(...first)) : "–", "n"], [speeds.length ? number(Math.max(...speeds)) : "–", "n"],
    ]);
    return row;
  }), "No executor of this network offers a model yet.");
}

function peers(snapshot) {
  const lease = { fresh: ["good", "✔ fresh"], suspect: ["warn", "▲ suspect"], dead: ["bad", "✖ lost"] };
  fill("peers", snapshot.peers.map((one) => {
    const row = make("tr", { "data-peer": one.peer }, make("th", { scope: "row" }, peerName(one.peer)));
    const state = lease[one.state];
    cells(row, [
      [one.roles.join(", ") || "–"], [one.connected ? one.path : "not connected"], [ms(one.rtt_ms), "n"],
      [state ? pill(...state) : "–"], [one.member ? "yes" : "no"], [one.software || "–"],
    ]);
    return row;
  }), "No peers yet. Is a validator configured and reachable?");
  const more = snapshot.peers_total - snapshot.peers.length;
  $("peers-more").textContent = more > 0 ? `and ${number(more)} more: lloomctl peer list` : "";
}

function requests() {
  if (!shown) return;
  if (!shown.status.requests.in_flight) live.clear(); // an answer whose event was missed
  const clock = (at) => new Date(at).toLocaleTimeString("en-GB");
  const rows = [...live.values()].reverse().slice(0, 20).map((one) => {
    const row = make("tr", { class: "live" });
    cells(row, [[clock(one.at)], [one.model, "mono"], [make("span", { class: "pill warn" }, make("span", { class: "pulse" }, "●"), "running")], ["", "n"], ["", "n"], [one.peer ? peerName(one.peer) : "an application"]]);
    return row;
  });
  for (const one of shown.requests) {
    const row = make("tr");
    cells(row, [[clock(one.started_at_ms)], [one.model || "–", "mono"], [one.code === "ok" ? pill("good", "✔ ok") : pill(one.code === "cancelled" ? "warn" : "bad", one.code)], [ms(one.first_ms), "n"], [ms(one.ms), "n"], [peerName(one.executor)]]);
    rows.push(row);
  }
  fill("requests", rows, "None yet.");
}

function activity(event) {
  const key = `${event.at} ${event.sequence}`; // the time too: a node that was started again counts from one
  if (seen.has(key)) return; // a stream that was opened again brings the last ones once more
  seen.add(key);
  if (seen.size > 2000) seen = new Set([...seen].slice(-1000));
  if (event.event === "request_received") live.set(`${event.role}${event.request_id}`, event);
  if (event.event === "response_received") live.delete(`${event.role}${event.request_id}`);
  const { event: kind, at: time = new Date().toISOString(), sequence, ...rest } = event;
  const text = Object.entries(rest).filter(([, value]) => value !== null && value !== "" && !(Array.isArray(value) && !value.length))
    .map(([name, value]) => `${name} ${name === "peer" ? short(value) : Array.isArray(value) ? value.join(", ") : typeof value === "number" ? number(value, 3) : name === "request_id" ? String(value).slice(0, 8) : value}`).join(" · ");
  $("events").prepend(make("li", {}, make("time", { datetime: time }, new Date(time).toLocaleTimeString("en-GB")), make("span", {}, make("strong", {}, String(kind).replaceAll("_", " ")), ` ${text}`)));
  while ($("events").children.length > MAX_EVENTS) $("events").lastChild.remove();
}

function show(snapshot) {
  shown = snapshot;
  conditions(snapshot.status.conditions);
  tiles(snapshot); facts(snapshot); models(snapshot); peers(snapshot); requests();
  drawMap($("map"), snapshot);
}

function state(kind, text) {
  $("live").className = `pill ${kind}`;
  $("live").textContent = text;
}

drawLegend($("legend"));
const source = new EventSource("/live");
source.addEventListener("open", () => state("good", "live"));
source.addEventListener("error", () => state("bad", source.readyState === EventSource.CLOSED ? "not live: load this page again" : "the node does not answer; trying again"));
source.addEventListener("snapshot", (event) => show(JSON.parse(event.data)));
source.addEventListener("activity", (event) => { activity(JSON.parse(event.data)); requests(); });
setInterval(() => { if (shown) { shown.status.uptime_s += 5; tiles(shown); facts(shown); } }, 5000);
