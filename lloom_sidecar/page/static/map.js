// The map of peers: this node in the middle, each peer in its role's sector, the further out the longer the round trip.
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 720, HEIGHT = 440, MAX_SHOWN = 60;
const SECTORS = { validator: [-Math.PI * 0.85, -Math.PI * 0.15], executor: [-Math.PI * 0.1, Math.PI * 0.5], client: [Math.PI * 0.55, Math.PI * 1.1], unknown: [Math.PI * 0.45, Math.PI * 0.6] };
const ROLES = Object.keys(SECTORS);

function node(tag, props, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
// Shape as well as colour tells the role.
function shape(role, x, y, size, more = "") {
  const kind = `${role} ${more}`.trim();
  if (role === "executor") return node("rect", { class: kind, x: x - size, y: y - size, width: 2 * size, height: 2 * size, rx: 3 });
  if (role === "validator") return node("path", { class: kind, d: `M${x} ${y - size * 1.3}L${x + size * 1.3} ${y}L${x} ${y + size * 1.3}L${x - size * 1.3} ${y}Z` });
  return node("circle", { class: kind, cx: x, cy: y, r: size });
}
const roleOf = (peer) => ROLES.find((role) => peer.roles.includes(role)) || "unknown";
// 1 ms is near, 1 s at the edge; unknown in between.
const distance = (rtt) => 0.42 + 0.56 * Math.min(1, Math.max(0, rtt == null ? 0.45 : Math.log10(Math.max(rtt, 1)) / 3));

export function drawMap(svg, snapshot) {
  const description = svg.querySelector("desc");
  const shown = snapshot.peers.filter((one) => one.connected || one.state === "fresh").slice(0, MAX_SHOWN);
  const groups = Object.fromEntries(ROLES.map((role) => [role, shown.filter((one) => roleOf(one) === role)]));
  const [cx, cy] = [WIDTH / 2, HEIGHT / 2];
  const lines = [], marks = [], texts = [];
  for (const [rtt, share] of [[1, distance(1)], [30, distance(30)], [1000, distance(1000)]]) {
    lines.push(node("ellipse", { class: "ring", cx, cy, rx: share * (cx - 60), ry: share * (cy - 30) }));
    if (shown.length) texts.push(node("text", { x: cx, y: cy + share * (cy - 30) + 12 }, rtt < 1000 ? `${rtt} ms` : "1 s"));
  }
  for (const role of ROLES) {
    const [from, to] = SECTORS[role];
    groups[role].forEach((peer, at) => {
      const angle = from + ((to - from) * (at + 0.5)) / groups[role].length;
      const share = distance(peer.rtt_ms);
      const x = cx + Math.cos(angle) * share * (cx - 60), y = cy + Math.sin(angle) * share * (cy - 30);
      if (peer.connected) lines.push(node("line", { x1: cx, y1: cy, x2: x, y2: y, class: peer.path === "relayed" ? "relayed" : "direct" }));
      const mark = shape(role, x, y, 9, peer.connected ? "" : "away");
      mark.append(node("title", {}, `${role}, ${peer.connected ? peer.path : "not connected"}, ${peer.rtt_ms == null ? "round trip unknown" : `${peer.rtt_ms.toFixed(1)} ms`}: ${peer.peer}`));
      marks.push(mark);
      if (shown.length <= 24) texts.push(node("text", { x, y: y + 25 }, `…${peer.peer.slice(-6)}`));
    });
  }
  marks.push(shape("me", cx, cy, 13), node("text", { x: cx, y: cy + 30 }, "this node"));
  const relayed = shown.filter((one) => one.path === "relayed").length;
  description.textContent = `${shown.filter((one) => one.connected).length} connected peers: ${ROLES.map((role) => `${groups[role].length} ${role}`).join(", ")}; ${relayed} relayed. The table of peers holds the same.`;
  svg.replaceChildren(description, ...lines, ...marks, ...texts);
}

export function drawLegend(list) {
  const entries = [["validator", "validator"], ["executor", "executor"], ["client", "client"], ["unknown", "role unknown"]];
  for (const [role, text] of entries) {
    const svg = node("svg", { viewBox: "0 0 20 12", "aria-hidden": "true" });
    svg.append(shape(role, 10, 6, 4.5));
    const item = document.createElement("li");
    item.append(svg, ` ${text}`);
    list.append(item);
  }
  for (const [kind, text] of [["", "direct"], ["5 3", "relayed"]]) {
    const svg = node("svg", { viewBox: "0 0 20 12", "aria-hidden": "true" });
    svg.append(node("line", { x1: 0, y1: 6, x2: 20, y2: 6, stroke: "currentColor", "stroke-width": 1.8, "stroke-dasharray": kind }));
    const item = document.createElement("li");
    item.append(svg, ` ${text}`);
    list.append(item);
  }
}
