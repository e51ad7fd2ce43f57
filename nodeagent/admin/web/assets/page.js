"use strict";
// Draws what /v1/map, /v1/status and /v1/health say, and draws again when /v1/events reports a change. Nothing is sent.
// What the agent says is only ever set as text.

const RETRY_MS = 2000;
const POLL_MS = 5000;
const MARKS = {free: "", reserved: "", outside: "", excluded: "~"};
const byId = (id) => document.getElementById(id);
const slots = new Map(); // name of a holder -> number of its colour: a holder keeps its colour
const state = {map: null, search: "", chosen: null, loading: false, again: false};

function make(tag, classes, text, attributes) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function gib(bytes) {
  return `${+(bytes / 2 ** 30).toPrecision(4)}Gi`;
}

function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const runs = [];
  for (const one of sorted) {
    const last = runs[runs.length - 1];
    if (last && last[1] === one - 1) last[1] = one;
    else runs.push([one, one]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}-${to}`)).join(",");
}

// ---------------------------------------------------------------- colours

function assignColours(holders) {
  const names = new Set(holders.map((one) => one.name));
  for (const name of [...slots.keys()]) if (!names.has(name)) slots.delete(name);
  const used = new Set(slots.values());
  let next = 0;
  for (const name of names) {
    if (slots.has(name)) continue;
    while (used.has(next)) next += 1;
    used.add(next);
    slots.set(name, next);
  }
}

function colour(holder) {
  const slot = slots.get(holder.name);
  return `hsl(${(209 + slot * 137.5) % 360} 65% ${[72, 62, 82][Math.floor(slot / 8) % 3]}%)`;
}

// ---------------------------------------------------------------- the drawing

function part(kind, one, label, where) {
  const holders = one.holders.map((index) => state.map.holders[index]);
  const ill = one.health && one.health !== "healthy";
  const names = holders.map((holder) => holder.name).join(", ");
  const said = `${label}${where}: ${names || one.state}${ill ? `; ${one.health}: ${one.reason}` : ""}`;
  const mark = holders.length > 1 ? "+" : holders.length ? holders[0].letter : MARKS[one.state] || "";
  const cell = make("button", `part ${kind} ${one.state}${ill ? " ill" : ""}`, mark, {type: "button", tabindex: "-1", title: said, "aria-label": said});
  if (holders.length) cell.style.setProperty("--holder", colour(holders[0]));
  cell.holders = holders;
  return cell;
}

function drawNode(node) {
  const box = make("div", "node");
  const cpus = node.groups.flatMap((group) => group.cores.flatMap((core) => core.cpus));
  box.append(make("h4", "", nodeTitle(node, cpus)));
  for (const group of node.groups) {
    const drawn = make("div", "group");
    for (const core of group.cores) {
      const column = make("div", "core");
      for (const cpu of core.cpus) column.append(part("cpu", cpu, `CPU ${cpu.cpu}`, ` on node ${node.numa_node}`));
      drawn.append(column);
    }
    box.append(drawn);
  }
  for (const kind of new Set(node.devices.map((device) => device.kind))) {
    const row = make("div", "devices");
    row.append(make("span", "quiet", kind));
    for (const device of node.devices.filter((one) => one.kind === kind)) row.append(part("device", device, deviceLabel(device), ""));
    box.append(row);
  }
  return box;
}

function nodeTitle(node, cpus) {
  const parts = [node.numa_node >= 0 ? `node ${node.numa_node}` : "without a NUMA node"];
  if (cpus.length) parts.push(`CPUs ${ranges(cpus.map((cpu) => cpu.cpu))}`);
  if (node.memory_bytes) parts.push(`${gib(node.memory_bytes)} ${node.kind}`);
  for (const pool of node.hugepages) if (pool.total) parts.push(`${plural(pool.total, "page")} of ${pool.size} (${heldPages(pool)} held)`);
  return parts.join(", ");
}

function heldPages(pool) {
  return pool.held.reduce((sum, one) => sum + one.pages, 0);
}

function deviceLabel(device) {
  return `${device.kind} ${device.id}${device.name && !device.id.includes(device.name) ? ` (${device.name})` : ""}`;
}

function drawMachine() {
  const packages = state.map.packages.map((one) => {
    const box = make("div", "package");
    if (one.packages.length) box.append(make("h3", "", `${one.packages.length > 1 ? "packages" : "package"} ${ranges(one.packages)}`));
    box.append(...one.nodes.map(drawNode));
    return box;
  });
  const focused = document.activeElement && document.activeElement.classList.contains("part") ? cells().indexOf(document.activeElement) : -1;
  byId("machine").replaceChildren(...packages);
  const all = cells();
  if (!all.length) return;
  const current = all[Math.max(0, Math.min(focused, all.length - 1))];
  current.tabIndex = 0;
  if (focused >= 0) current.focus();
}

function cells() {
  return [...byId("machine").querySelectorAll(".part")];
}

function drawSummary() {
  const counts = Object.entries(state.map.cpus).map(([name, list]) => [name, count(list)]).filter(([, number]) => number);
  byId("summary").textContent = `CPUs: ${counts.map(([name, number]) => `${number} ${name}`).join(", ")}`;
}

function count(list) {
  return list.split(",").filter(Boolean).reduce((sum, range) => {
    const [from, to] = range.split("-").map(Number);
    return sum + (to === undefined ? 1 : to - from + 1);
  }, 0);
}

// ---------------------------------------------------------------- tables

function fill(table, headings, rows) {
  const caption = table.caption;
  const head = make("thead");
  const line = make("tr");
  line.append(...headings.map((text) => make("th", "", text, {scope: "col"})));
  head.append(line);
  const body = make("tbody");
  body.append(...rows);
  table.replaceChildren(...(caption ? [caption] : []), head, body);
}

function row(cellsOfRow) {
  const line = make("tr");
  for (const one of cellsOfRow) {
    const cell = make("td");
    cell.append(one); // a node, or text
    line.append(cell);
  }
  return line;
}

function drawHolders() {
  fill(byId("holders"), ["", "Holder", "CPUs", "Devices", "Hugepages", "Memory"], state.map.holders.map(holderRow));
}

function holderRow(holder) {
  const mark = make("span", "mark", holder.letter, {"aria-hidden": "true"});
  mark.style.setProperty("--holder", colour(holder));
  const name = make("button", "link", holder.name, {type: "button", "aria-pressed": String(state.chosen === holder.name)});
  name.addEventListener("click", () => choose(state.chosen === holder.name ? null : holder.name));
  const pages = holder.hugepages.map((one) => `${plural(one.pages, "page")} of ${one.size} on node ${one.numa_node}`).join(", ");
  const memory = holder.memory.map((one) => `${gib(one.bytes)} on node ${one.numa_node}`).join(", ");
  const line = row([mark, name, holder.cpus || "–", holder.devices.join(", ") || "–", pages || "–", memory || "–"]);
  line.holder = holder;
  return line;
}

function drawNodes() {
  const nodes = state.map.packages.flatMap((one) => one.nodes);
  fill(byId("nodes"), ["Node", "CPUs", "Free CPUs", "Memory", "Hugepages held", "Devices free"], nodes.map(nodeRow));
}

function nodeRow(node) {
  const cpus = node.groups.flatMap((group) => group.cores.flatMap((core) => core.cpus));
  const free = cpus.filter((cpu) => cpu.state === "free").map((cpu) => cpu.cpu);
  const pages = node.hugepages.filter((pool) => pool.total).map((pool) => `${heldPages(pool)} of ${pool.total} (${pool.size})`);
  const devices = node.devices.filter((one) => one.state === "free").length;
  return row([
    node.numa_node >= 0 ? String(node.numa_node) : "none", ranges(cpus.map((cpu) => cpu.cpu)) || "–", ranges(free) || "–",
    node.memory_bytes ? gib(node.memory_bytes) : "–", pages.join(", ") || "–", `${devices} of ${node.devices.length}`,
  ]);
}

// ---------------------------------------------------------------- what is wrong

function list(element, lines, otherwise) {
  if (!lines.length) {
    element.replaceChildren(make("p", "quiet", otherwise));
    return;
  }
  const items = make("ul");
  items.append(...lines.map((text) => make("li", "", text)));
  element.replaceChildren(items);
}

function drawStatus(status) {
  byId("ready").textContent = status.ready ? "ready" : "NOT ready";
  byId("ready").className = status.ready ? "good" : "bad";
  byId("version").textContent = `nodeagent ${status.version}, boot ${status.boot_id}, generation ${status.inventory.generation}`;
  list(byId("wrong"), [
    ...status.not_ready.map((why) => `not ready: ${why}`),
    ...Object.entries(status.refused).map(([name, why]) => `refused: ${name}: ${why}`),
    ...(status.config_error ? [`configuration: ${status.config_error}`] : []),
    ...status.conflicts.map((why) => `conflict: ${why}`),
    ...status.disputed.map((why) => `disputed: ${why}`),
    ...status.notes.map((why) => `note: ${why}`),
    ...status.inventory.warnings.map((why) => `warning: ${why}`),
  ], "Nothing.");
  list(byId("pinning"), pinningLines(status.pinning), "Pinning is off.");
}

function pinningLines(pinning) {
  if (!pinning || pinning.mode === "off") return pinning && pinning.unsupported ? [`off: ${pinning.unsupported}`] : [];
  const drifted = (pinning.pinned || []).filter((one) => one.drifts || one.error);
  return [
    `${plural(pinning.containers, "container")}; drifts: ${pinning.drifts_repaired} repaired, ${pinning.drifts_not_repaired} not repaired`,
    ...(pinning.mode === "nri" && !pinning.connected ? [`not connected: ${pinning.reason}`] : []),
    ...drifted.map((one) => `${one.namespace}/${one.pod} ${one.container}: ${plural(one.drifts, "drift")}${one.error ? `; ${one.error}` : ""}`),
  ];
}

function drawHealth(health) {
  const lines = health.flatMap((one) => one.causes.filter((cause) => cause.state !== "healthy").map((cause) => `${one.device}: ${cause.state} (${cause.source}): ${cause.reason}`));
  list(byId("health"), lines, "Nothing is known against any device.");
}

// ---------------------------------------------------------------- search, choice, keyboard

function matches(holder) {
  if (state.chosen !== null) return holder.name === state.chosen;
  const words = [holder.name, holder.pod, holder.claim, ...holder.uids, ...holder.grants].join(" ").toLowerCase();
  return words.includes(state.search);
}

function applySearch() {
  const active = state.search !== "" || state.chosen !== null;
  let found = 0;
  for (const line of byId("holders").tBodies[0].rows) {
    const match = !active || matches(line.holder);
    found += match ? 1 : 0;
    line.hidden = state.search !== "" && state.chosen === null && !match;
    line.querySelector("button").setAttribute("aria-pressed", String(state.chosen === line.holder.name));
  }
  for (const cell of cells()) cell.classList.toggle("dimmed", active && !cell.holders.some(matches));
  byId("found").textContent = active ? `${plural(found, "holder")} found` : "";
}

function choose(name) {
  state.chosen = name;
  applySearch();
}

function move(event) {
  const all = cells();
  const from = all.indexOf(document.activeElement);
  if (from < 0) return;
  const target = neighbour(all, from, event.key);
  if (target === null) return;
  event.preventDefault();
  all[from].tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

function neighbour(all, from, key) {
  if (key === "Home") return all[0];
  if (key === "End") return all[all.length - 1];
  if (key === "ArrowRight" || key === "ArrowLeft") return inOrder(all, from, key === "ArrowRight" ? 1 : -1);
  if (key === "ArrowDown" || key === "ArrowUp") return all[from + (key === "ArrowDown" ? 1 : -1)] || null;
  return null;
}

function inOrder(all, from, step) {
  // Threads of a core stand below each other: the next column is the next core.
  const core = all[from].parentElement;
  let at = from + step;
  while (all[at] && core.classList.contains("core") && all[at].parentElement === core) at += step;
  return all[at] || null;
}

function listen() {
  byId("search").addEventListener("input", (event) => {
    state.search = event.target.value.trim().toLowerCase();
    state.chosen = null;
    applySearch();
  });
  const machine = byId("machine");
  machine.addEventListener("keydown", move);
  machine.addEventListener("focusin", (event) => { byId("detail").textContent = event.target.getAttribute("aria-label") || ""; });
  machine.addEventListener("click", (event) => {
    const cell = event.target.closest(".part");
    if (cell) choose(cell.holders.length && cell.holders[0].name !== state.chosen ? cell.holders[0].name : null);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose(null);
    if (event.key === "/" && document.activeElement !== byId("search")) {
      event.preventDefault();
      byId("search").focus();
    }
  });
}

// ---------------------------------------------------------------- live

async function read(page) {
  const answer = await fetch(page, {cache: "no-store"});
  if (!answer.ok) throw new Error(`${page}: ${answer.status}`);
  return answer.json();
}

function draw() {
  const begin = performance.now();
  assignColours(state.map.holders);
  drawSummary();
  drawMachine();
  drawHolders();
  drawNodes();
  applySearch();
  document.body.getBoundingClientRect(); // so that the layout counts
  document.documentElement.dataset.drawMs = (performance.now() - begin).toFixed(1);
}

async function refresh(all) {
  state.again = state.again || all;
  if (state.loading) return;
  state.loading = true;
  try {
    do {
      const whole = state.again;
      state.again = false;
      const [status, map, health] = await Promise.all([read("v1/status"), whole ? read("v1/map") : null, whole ? read("v1/health") : null]);
      drawStatus(status);
      if (whole) {
        state.map = map;
        draw();
        drawHealth(health);
        document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
      }
      said(true);
    } while (state.again);
  } catch (error) {
    said(false, String(error.message || error));
  } finally {
    state.loading = false;
  }
}

function said(live, why) {
  const away = document.body.classList.contains("away");
  document.body.classList.toggle("away", !live);
  byId("live").className = live ? "good" : "bad";
  if (live) byId("live").textContent = "live";
  else if (!away) byId("live").textContent = `the agent does not answer since ${new Date().toLocaleTimeString()}${why ? ` (${why})` : ""}; this is what it said last`;
}

function follow() {
  const events = new EventSource("v1/events");
  events.addEventListener("changed", () => refresh(true));
  events.addEventListener("beat", () => refresh(false));
  events.addEventListener("error", async () => {
    if (events.readyState !== EventSource.CLOSED) {
      said(false, ""); // the browser connects again
      return;
    }
    // Refused, as when too many listen: then look from time to time.
    await refresh(true);
    setTimeout(follow, document.body.classList.contains("away") ? RETRY_MS : POLL_MS);
  });
}

listen();
follow();
