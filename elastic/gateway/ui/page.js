// The live page. One stream of server-sent events (/admin/v1/stream) feeds it: `patch` changes the document that all is
// drawn from (RFC 7396), `events` are the cluster's event history, `traffic` is what this gateway sent in each second.
// Nothing is drawn unless something changed, but for the timeline, which moves on once a second while it is seen.
// A recording of such a stream is shown in the same way, at the moment that its slider says.

import { capital, FAULTS, lane, list, ms, plural, say, tells, title } from "/ui/events.js";
import { parsed, Player, recorded } from "/ui/replay.js";

const $ = (id) => document.getElementById(id);
const WINDOW_S = 300, KEPT_EVENTS = 400, QUIET_MS = 15000, FLASH_MS = 1800, KEY = "elastic-ep admin token";
const ALIVE = new Set(["serving", "draining"]), LOST = new Set(["dead", "masked", "quarantined"]);
const SHORT = { launching: "start", handshaking: "join", loading: "load", standby: "spare", draining: "drain", masked: "mask", dead: "dead", quarantined: "out" };  // on a phone
const PHASES = ["proposed", "spawning", "handshaking", "loading", "ready", "committed", "retiring", "done"];

let doc = Object.create(null), events = [], traffic = [], ahead_s = 0, connected = false;
let player = null;  // of a recording, which is shown instead of the cluster
const lanes = new Map();  // rank -> [[time, state], …], read off the events
const marks = [];  // [time, words, family] of faults and epochs
const hosts = new Map();  // rank -> its last host: a dead rank has none

// ---- words

const el = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const bytes = (v) => { for (const unit of ["B", "kB", "MB", "GB"]) { if (v < 999.5) return `${+v.toPrecision(3)} ${unit}`; v /= 1000; } return `${+v.toPrecision(3)} TB`; };
const clock = (t) => new Date(t * 1000).toLocaleTimeString([], { hour12: false });
const now_s = () => player ? player.at : Date.now() / 1000 + ahead_s;
const ranks = () => Object.values(doc.ranks ?? {});
const collate = new Intl.Collator(undefined, { numeric: true }).compare;
const text = (id, words) => { const e = $(id); if (e.textContent !== words) e.textContent = words; };

// ---- the stream

const token = () => sessionStorage.getItem(KEY) ?? "";
async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, cache: "no-store", headers: { Authorization: `Bearer ${token()}` } });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(body.error?.message ?? `the gateway answered ${answer.status}`), { status: answer.status });
}
const post = async (path, body) => (await ask(path, { method: "POST", body: JSON.stringify(body) })).json();

async function* messages(body, arrived) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    arrived();
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = parsed(block);
      if (found) yield [found[0], JSON.parse(found[1])];
    }
  }
}

let following = 0, stream = new AbortController();
async function follow() {
  const mine = ++following;
  for (let wait_ms = 500; mine === following; wait_ms = Math.min(2 * wait_ms, 5000)) {
    const abort = stream = new AbortController();
    let timer = 0;
    const arrived = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), QUIET_MS); };
    let why = "";
    try {
      arrived();
      const answer = await ask("/admin/v1/stream", { signal: abort.signal });
      for await (const [kind, data] of messages(answer.body, arrived)) {
        if (mine !== following) { abort.abort(); return; }
        wait_ms = 500;
        take(kind, data);
      }
    } catch (error) {
      if (error.status === 401 || error.status === 403) return signIn(error.message);
      why = error.status ? error.message : "";
    } finally { clearTimeout(timer); }
    if (mine !== following) return;
    linked(false, why);
    await new Promise((done) => setTimeout(done, wait_ms));
  }
}

function linked(on, why = "") {
  connected = on;
  $("link").className = "link " + (on ? "on" : "off");
  text("link", on ? "live" : `no connection${why && `: ${why}`}, trying again`);
}

function forget() {
  doc = empty(); events = []; traffic = []; marks.length = 0; lanes.clear(); stale.clear(); hosts.clear();
  rows.clear(); $("rows").replaceChildren();
}

function take(kind, data) {
  if (kind === "begin") {
    forget();
    if (player) return;
    ahead_s = data.now - Date.now() / 1000;
    $("sign-in").hidden = true; $("live").hidden = $("forget").hidden = false;
    linked(true);
  } else if (kind === "patch") changed(data);
  else if (kind === "events") happened(data);
  else if (kind === "traffic") { traffic = [...traffic, ...data].slice(-WINDOW_S); draw("tiles", "timeline"); }
  else if (kind === "trouble" && !player) linked(false, data.message);
}

const empty = () => Object.create(null);  // names are data: none is inherited
function apply(target, patch) {
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete target[key];
    else if (typeof value === "object" && !Array.isArray(value)) {
      if (typeof target[key] !== "object" || Array.isArray(target[key])) target[key] = empty();
      apply(target[key], value);
    } else target[key] = value;
  }
}

function changed(patch) {
  const first = !doc.ranks, before = new Map(ranks().map((r) => [r.rank, r.state]));
  apply(doc, patch);
  for (const r of ranks()) {
    if (r.node) hosts.set(r.rank, r.node);
    if (!first && before.get(r.rank) !== r.state) flash(r.rank, r.state);
  }
  for (const number of Object.keys(patch.ranks ?? {})) stale.add(+number);
  if (patch.placement || patch.loads) for (const r of ranks()) stale.add(r.rank);
  if (patch.ranks || patch.placement || patch.loads || patch.shape) draw("grid", "rows");
  if (patch.operations) draw("operations", "timeline");
  draw("status", "tiles", "far");
}

function happened(fresh) {
  const old = events.length === 0 && fresh.length > 1;
  for (const e of fresh) {
    const [family, words] = say(e, doc.operations);
    if (FAULTS.has(e.kind)) marks.push([e.ts, words, "bad"]);
    if (e.kind === "epoch_committed") marks.push([e.ts, e.epoch, "epoch"]);
    if (!old && tells(e) && now_s() - e.ts < 10 && (family === "bad" || family === "good")) aloud(words);
    if (!old && e.kind === "rank_died" && now_s() - e.ts < 5) flash(e.rank, "dead");
    lane(lanes, e, 2 * WINDOW_S);
  }
  events = [...events, ...fresh].slice(-KEPT_EVENTS);
  while (marks.length && marks[0][0] < now_s() - 2 * WINDOW_S) marks.shift();
  draw("events", "timeline");
}

const sayings = [];
function aloud(words) {
  sayings.push(words);
  if (sayings.length > 1) return;
  setTimeout(() => {  // at once what comes at once, and not more of it than one can listen to
    const lines = [...new Set(sayings.splice(0))];
    $("say").replaceChildren(el("p", lines.slice(0, 4).join(". ") + (lines.length > 4 ? `. ${lines.length - 4} more events` : "")));
  }, 600);
}

// ---- drawing, once per frame

const due = new Set();
let rested = 0;  // drawing rests for twice as long as it took, so that what is large leaves room for scrolling
function draw(...parts) {
  if (!due.size) {
    const wait_ms = rested - performance.now();
    if (wait_ms > 16) setTimeout(() => requestAnimationFrame(frame), wait_ms); else requestAnimationFrame(frame);
  }
  for (const part of parts) due.add(part);
}
function frame() {
  const begun = performance.now(), parts = [...due];
  due.clear();
  for (const part of parts) PARTS[part]();
  rested = 3 * performance.now() - 2 * begun;
}

const SEALS = { good: "M14 25l7 7 13-15", warn: "M24 13v14M24 34v.5", bad: "M16 16l16 16M32 16L16 32", busy: "M24 14v10l7 5" };
const STATES = { serving: ["good", "Serving"], degraded: ["warn", "Degraded"], uncovered: ["bad", "Experts without a replica"], starting: ["busy", "Starting"], stopped: ["bad", "Stopped"] };
function drawStatus() {
  const s = doc.status;
  if (!s) return;
  const [family, words] = STATES[s.state] ?? ["warn", s.state];
  $("hero").className = `hero ${family}`;
  $("seal").setAttribute("d", SEALS[family]);
  text("state", words); text("cluster", s.cluster);
  document.title = `${s.cluster} · ${words}`;
  const facts = [`epoch ${s.epoch}`, ...(doc.shape?.models ?? []).slice(0, 1), `${plural(s.nodes.length, "host")}`];
  if (s.imbalance !== undefined) facts.push(`busiest rank ${s.imbalance.toFixed(2)}× the mean`);
  if (s.spares.wanted) facts.push(`${s.spares.ready} of ${plural(s.spares.wanted, "spare")} ready`);
  if (s.exactness !== "invariant") facts.push(`exactness ${s.exactness}`);
  $("facts").replaceChildren(...facts.map((fact) => el("span", fact)));
  const notes = [];
  const note = (words, bad, action, label) => {
    const line = el("p", undefined, "note-line" + (bad ? " bad" : ""));
    line.append(el("span", words));
    if (action) { const b = el("button", label, "small"); b.type = "button"; b.onclick = action; line.append(b); }
    notes.push(line);
  };
  if (s.store) note(s.store, true);
  for (const n of s.nodes) if (n.trouble) note(`Host ${n.node}: ${n.trouble}`, true);
  for (const r of ranks()) if (r.reason) note(`Rank ${r.rank} is set aside: ${r.reason}`, true);
  if (s.pause) note(s.pause.words, false, () => act("/admin/v1/resume", {}), "Resume changes");
  if (s.drained.length) note(`Drained, and kept empty: ${list(s.drained)}`);
  $("notes").replaceChildren(...notes);
  $("pause").hidden = Boolean(s.pause); $("undrain").hidden = !s.drained.length;
  drawOperation(s.operation);
}

function drawOperation(o) {
  $("operation").hidden = !o;
  if (!o) return;
  text("operation-what", capital(o.what)); text("operation-id", o.id);
  const at = PHASES.indexOf(o.phase);
  $("phases").replaceChildren(...PHASES.slice(0, -1).map((phase, i) => {
    const item = el("li", phase, i < at ? "done" : i === at ? "now" : "");
    if (i === at) item.setAttribute("aria-current", "step");
    return item;
  }));
  $("cancel").disabled = at >= PHASES.indexOf("committed");
  $("cancel").onclick = () => act(`/admin/v1/operations/${encodeURIComponent(o.id)}/cancel`, { by: "live page" });
}

function tile(id, value, small, note, family = "") {
  const main = $("t-" + id);
  main.replaceChildren(value, ...(small ? [el("small", ` ${small}`)] : []));
  main.parentElement.className = `tile ${family}`;
  text("n-" + id, note);
}
function drawTiles() {
  const s = doc.status;
  if (!s) return;
  const serving = ranks().filter((r) => r.state === "serving").length, other = ranks().filter((r) => r.state !== "serving");
  const kinds = [...new Set(other.map((r) => r.state))].map((state) => `${other.filter((r) => r.state === state).length} ${state}`);
  tile("ranks", `${serving}`, `of ${s.desired}`, kinds.join(", ") || (s.owner === "agents" ? "set by the agents" : "all of them"), serving < s.desired ? "warn" : "");
  const c = s.coverage;
  tile("replicas", c.uncovered ? `${c.uncovered} lost` : `≥ ${c.min_live_replicas}`, "", c.uncovered ? "experts without a live replica" : c.min_live_replicas < 2 ? "one death would lose an expert" : "live, of the expert with fewest", c.uncovered ? "bad" : c.min_live_replicas < 2 && s.epoch ? "warn" : "");
  tile("requests", `${s.requests.running}`, "running", `${s.requests.waiting} waiting${s.requests.shed ? `, ${s.requests.shed} refused for want of room` : ""}`);
  const since = now_s() - 11, last = traffic.filter((t) => t.at >= since), tokens = last.reduce((sum, t) => sum + t.tokens, 0);
  tile("tokens", `${Math.round(tokens / 10)}`, "", "this gateway, last 10 s");
  const worst = Math.max(0, ...last.map((t) => t.gap_ms)), ever = Math.max(0, ...traffic.map((t) => t.gap_ms));
  tile("gap", worst ? ms(worst) : "–", "", ever ? `last 10 s; ${ms(ever)} in five minutes` : "no tokens yet");
}

// ---- colours

let C = {};
function palette() {
  const style = getComputedStyle(document.documentElement);
  C = new Proxy({}, { get: (have, name) => have[name] ??= style.getPropertyValue("--" + name).trim() });
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const packed = ([r, g, b], alpha = 255) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
function sized(canvas, width, height) {
  const dpr = window.devicePixelRatio || 1, w = Math.round(width * dpr), h = Math.round(height * dpr);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; canvas.style.width = width + "px"; canvas.style.height = height + "px"; }
  const g = canvas.getContext("2d");
  g.setTransform(dpr, 0, 0, dpr, 0, 0);
  g.clearRect(0, 0, width, height);
  return g;
}

// ---- the grid: a pixel per cell, enlarged

let G = null;  // the grid as it was drawn last, for the pointer and for flashes
const pixels = document.createElement("canvas"), GAP = 10;

function layout(width) {
  const { layers = 0, experts = 0 } = doc.shape ?? {}, narrow = width < 560;
  const left = narrow ? 58 : 132, right = narrow ? 0 : 92, room = width - left - right;
  const fits = (room - GAP * (layers - 1)) / (layers * experts) >= 5;
  const picker = $("layer"), wanted = `${layers} ${fits}`;
  if (picker.dataset.of !== wanted) {
    picker.dataset.of = wanted;
    picker.replaceChildren(new Option(fits ? "all of them" : "all, added up", "all"), ...Array.from({ length: layers }, (_, i) => new Option(`${i}`, `${i}`)));
    $("layers").hidden = layers < 2;
  }
  const picked = picker.value || "all", groups = picked !== "all" ? [+picked] : fits ? Array.from({ length: layers }, (_, i) => i) : [-1];
  const rows = ranks().map((r) => ({ ...r, host: r.node || hosts.get(r.rank) || "" })).sort((a, b) => (a.host === b.host ? 0 : collate(a.host, b.host)) || a.rank - b.rank);
  const wide = (room - GAP * (groups.length - 1)) / (groups.length * experts || 1), cw = wide < 4 ? wide : Math.min(Math.floor(wide), 38), ch = clamp(Math.floor(560 / (rows.length || 1)), 2, 30);
  let y = 22;
  const several = new Set(rows.map((r) => r.host)).size > 1;
  rows.forEach((r, i) => { if (several && r.host !== rows[i - 1]?.host) { r.first = true; y += ch < 11 ? 3 : 18; } r.y = y; y += ch; });
  return { left, right, experts, groups, rows, cw, ch, width, several, cols: groups.length * experts, end: y, height: y + (ch >= 6 ? 24 : 12), x: (group) => left + group * (experts * cw + GAP) };
}

// For each cell the load of that replica (-1: the rank does not hold the expert), for each column its live replicas.
function measure(L) {
  const { layers, experts } = doc.shape, loads = Array.isArray(doc.loads) && doc.loads.length === layers ? doc.loads : null;
  const live = Array.from({ length: layers }, () => new Uint16Array(experts)), placement = doc.placement ?? {};
  for (const r of L.rows) if (ALIVE.has(r.state)) (placement[r.rank] ?? []).forEach((held, l) => { for (const e of held) live[l][e]++; });
  const values = new Float32Array(L.rows.length * L.cols).fill(-1), replicas = new Uint16Array(L.cols).fill(65535);
  L.groups.forEach((group, i) => {
    for (let l = group < 0 ? 0 : group; l < (group < 0 ? layers : group + 1); l++)
      for (let e = 0; e < experts; e++) replicas[i * experts + e] = Math.min(replicas[i * experts + e], live[l][e]);
  });
  const filled = [];
  let most = 0;
  L.rows.forEach((r, row) => {
    r.sum = 0;
    (placement[r.rank] ?? []).forEach((held, l) => {
      const group = L.groups[0] < 0 ? 0 : L.groups.indexOf(l);
      for (const e of held) {
        const share = (loads ? loads[l][e] / 16 : 1) / Math.max(1, live[l][e]);
        r.sum += share;
        if (group < 0) continue;
        const at = row * L.cols + group * experts + e;
        if (values[at] < 0) filled.push(at);
        values[at] = Math.max(0, values[at]) + share;
        if (values[at] > most) most = values[at];
      }
    });
  });
  const serving = L.rows.filter((r) => ALIVE.has(r.state)), mean = serving.reduce((sum, r) => sum + r.sum, 0) / (serving.length || 1);
  for (const r of L.rows) r.share = ALIVE.has(r.state) && mean ? r.sum / mean : 0;
  return { ...L, values, filled, replicas, most, loads, live };
}

function drawGrid() {
  const width = $("grid").clientWidth;
  if (!doc.shape?.experts || !width) return;
  G = measure(layout(width));
  paint();
  show();
  const lost = G.rows.filter((r) => LOST.has(r.state)), words = lost.length ? `; lost: ${lost.map((r) => `rank ${r.rank}`).join(", ")}` : "";
  $("experts").setAttribute("aria-label", `${plural(G.rows.length, "rank")} by ${plural(doc.shape.layers, "layer")} of ${G.experts} experts${words}. The table below has it as text.`);
  text("grid-sub", `which rank holds which; ${G.loads ? "the stronger its colour the busier, as measured over the last minute" : "load is not measured yet"}`);
}

// Draw the part of the grid that is scrolled to: thousands of rows cost what those on the screen do.
function show() {
  if (!G) return;
  const tall = Math.min(G.height, Math.round(.72 * innerHeight)), top = Math.min($("grid").scrollTop, G.height - tall), g = sized($("experts"), G.width, tall);
  const { rows, cw, ch, experts } = G, seen = (y, height) => y + height > top && y < top + tall;
  $("space").style.height = `${G.height - tall}px`;
  g.translate(0, -top);
  g.font = `12px ${C.sans}`; g.textBaseline = "middle";
  G.groups.forEach((layer, i) => {
    g.fillStyle = C.faint; g.textAlign = "left";
    g.fillText(layer < 0 ? `experts 0 to ${experts - 1}, all layers added up` : `layer ${layer}`, G.x(i), 9);
    g.imageSmoothingEnabled = false;
    for (let from = 0; from < rows.length;) {
      let to = from + 1;
      while (to < rows.length && !rows[to].first) to++;
      if (seen(rows[from].y, (to - from) * ch)) {
        g.fillStyle = C.soft; g.fillRect(G.x(i), rows[from].y, experts * cw, (to - from) * ch);
        g.drawImage(pixels, i * experts, from, experts, to - from, G.x(i), rows[from].y, experts * cw, (to - from) * ch);
      }
      from = to;
    }
  });
  if (cw >= 5 && ch >= 4) lines(g, cw >= 14 && ch >= 12 ? 2 : 1);
  rows.forEach((r, row) => { if (seen(r.y - 16, ch + 16)) label(g, r, row); });
  if (seen(G.end, 24)) replicaStrip(g);
}

function paint() {
  pixels.width = G.cols; pixels.height = G.rows.length;
  const g = pixels.getContext("2d"), image = g.createImageData(G.cols, G.rows.length), out = new Uint32Array(image.data.buffer);
  const cold = rgb(C.cold), hot = rgb(C.hot), ramp = Array.from({ length: 64 }, (_, i) => packed(mix(cold, hot, G.loads ? Math.sqrt(i / 63) : .45)));
  const scale = 63 / (G.most || 1);
  const lost = packed(mix(rgb(C.card), rgb(C.dead), .55)), early = packed(mix(rgb(C.card), rgb(C.loading), .55)), away = packed(rgb(C.draining));
  const fixed = G.rows.map((r) => r.state === "draining" ? away : ALIVE.has(r.state) ? 0 : LOST.has(r.state) ? lost : early);
  for (const at of G.filled) out[at] = fixed[Math.floor(at / G.cols)] || ramp[Math.round(G.values[at] * scale)];
  g.putImageData(image, 0, 0);
}

function lines(g, wide) {
  g.fillStyle = C.card;
  G.groups.forEach((_, i) => { for (let e = 0; e <= G.experts; e++) g.fillRect(G.x(i) + e * G.cw - wide / 2, 20, wide, G.end - 20); });
  const right = G.x(G.groups.length - 1) + G.experts * G.cw;
  for (const r of G.rows) for (const y of [r.y, r.y + G.ch]) g.fillRect(G.left - 1, y - wide / 2, right - G.left + 2, wide);
}

function label(g, r, row) {
  const { ch, left, width, right } = G, middle = r.y + ch / 2 + .5, bad = LOST.has(r.state);
  if (r.first && ch >= 11) { g.fillStyle = C.dim; g.textAlign = "left"; g.font = `600 12px ${C.sans}`; g.fillText(r.host || "no host", 0, r.y - 8); }
  if (ch < 11 && !(bad || row % Math.ceil(14 / ch) === 0)) return;
  if (ch < 11 && bad) { g.fillStyle = C.dead; g.fillRect(left - 8, r.y, 5, Math.max(ch, 2)); if (row % Math.ceil(14 / ch)) return; }
  g.textAlign = "left"; g.font = `${bad ? 600 : 450} ${ch < 11 ? 10 : 12}px ${C.sans}`;
  g.fillStyle = bad ? C.bad : C.text; g.fillText(left < 100 ? `${r.rank}` : `rank ${r.rank}`, 0, middle);
  if (ch < 11) return;
  const aside = left < 100 ? SHORT[r.state] ?? "" : r.slow ? "slow" : r.load?.total && r.state === "loading" ? `${Math.floor(100 * r.load.bytes / r.load.total)} %` : r.state;
  g.font = `450 12px ${C.sans}`; g.fillStyle = bad ? C.bad : r.state === "serving" ? C.faint : C.accent;
  g.textAlign = "right"; g.fillText(aside, left - 12, middle);
  if (!r.share || right < 60) return;
  const x = G.x(G.groups.length - 1) + G.experts * G.cw + 12, span = 34;
  g.fillStyle = C.soft; g.fillRect(x, middle - 3, span, 5);
  g.fillStyle = C.hot; g.fillRect(x, middle - 3, Math.min(span, span / 2 * r.share), 5);
  g.textAlign = "left"; g.fillStyle = C.dim; g.fillText(`${r.share.toFixed(2)}×`, x + span + 6, middle);
}

function replicaStrip(g) {
  const y = G.end + 6, digits = G.cw >= 11;
  if (G.left > 100) { g.fillStyle = C.faint; g.font = `12px ${C.sans}`; g.textAlign = "right"; g.fillText("live replicas", G.left - 12, y + 7); }
  g.textAlign = "center"; g.font = `11px ${C.sans}`;
  for (let c = 0; c < G.cols; c++) {
    const n = G.replicas[c], x = G.x(Math.floor(c / G.experts)) + (c % G.experts) * G.cw;
    if (n < 2) { g.fillStyle = n ? C.one : C.dead; g.fillRect(x + (G.cw > 4 ? 1 : 0), y, Math.max(1, G.cw - (G.cw > 4 ? 2 : 0)), digits ? 14 : 6); }
    if (digits) { g.fillStyle = n < 2 ? C.card : C.faint; g.fillText(`${n}`, x + G.cw / 2, y + 7.5); }
  }
}

// ---- flashes: a rank that changed its state lights up, and fades

const flashes = new Map();  // rank -> the element that fades
function flash(number, state) {
  const colour = LOST.has(state) ? "dead" : state === "serving" ? "serving" : "launching", known = flashes.get(number), r = G?.rows.find((each) => each.rank === number);
  if (!r || flashes.size > 40 || ["handshaking", "loading", "standby"].includes(state) || (known?.className === "flash dead" && colour !== "serving")) return;
  const light = el("i", undefined, `flash ${colour}`);  // a death is seen, however soon the successor starts
  Object.assign(light.style, { top: `${r.y}px`, height: `${G.ch}px`, left: `${G.left - 6}px`, width: `${G.x(G.groups.length - 1) + G.experts * G.cw - G.left + 12}px` });
  known?.remove();
  flashes.set(number, light);
  $("grid").append(light);
  setTimeout(() => { light.remove(); if (flashes.get(number) === light) flashes.delete(number); }, FLASH_MS);
}

function point(event) {
  const box = $("experts").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top + $("grid").scrollTop, tip = $("tip");
  const r = G?.rows.find((each) => y >= each.y && y < each.y + G.ch);
  tip.hidden = !r;
  if (!r) return;
  const i = G.groups.findIndex((_, k) => x >= G.x(k) && x < G.x(k) + G.experts * G.cw), e = Math.floor((x - G.x(i)) / G.cw);
  const lines = [];
  if (i >= 0) {
    const value = G.values[(G.rows.indexOf(r)) * G.cols + i * G.experts + e], layer = G.groups[i], n = G.replicas[i * G.experts + e];
    lines.push(`${layer < 0 ? "expert" : `layer ${layer}, expert`} ${e}: ${value < 0 ? "not on this rank" : G.loads ? `${value.toFixed(2)} of a mean expert's load` : "held"}`, plural(n, "live replica"));
  } else lines.push(`${r.slots} experts, ${r.state}`, r.restarts ? plural(r.restarts, "restart") : "");
  tip.replaceChildren(el("b", `Rank ${r.rank}${r.host ? ` on ${r.host}` : ""}`), ...lines.filter(Boolean).map((line) => el("span", line)));
  tip.style.left = clamp(event.clientX + 14, 8, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18) + "px";
}

// ---- the timeline

function drawTimeline() {
  const canvas = $("timeline"), width = canvas.parentElement.clientWidth - 2 * parseFloat(getComputedStyle(canvas.parentElement).paddingLeft);
  if (width <= 0 || document.hidden) return;
  const to = now_s() - .4, from = to - WINDOW_S, gutter = width < 560 ? 58 : 132, px = (t) => gutter + (t - from) / WINDOW_S * (width - gutter - 6);
  const shown = [...lanes].filter(([r, s]) => doc.ranks?.[r] || s.some(([t]) => t > from)).sort((a, b) => a[0] - b[0]);
  const restless = shown.length <= 16 ? shown : shown.filter(([, s]) => s.some(([t]) => t > from)).slice(0, 16);
  const rows = restless.length, height = 62 + 62 + rows * 14 + (rows < shown.length ? 14 : 0) + 92;
  const g = sized(canvas, width, height);
  g.textBaseline = "middle"; g.lineJoin = "round";
  const name = (words, y) => { g.font = `12px ${C.sans}`; g.fillStyle = C.dim; g.textAlign = "left"; g.fillText(words, 0, y); };
  const X = { g, px, from, to, gutter, width, height, name };
  g.strokeStyle = C.line; g.fillStyle = C.faint; g.font = `11px ${C.sans}`; g.textAlign = "center";
  for (let t = Math.ceil(from / 60) * 60; t < to; t += 60) {
    g.beginPath(); g.moveTo(Math.round(px(t)) + .5, 6); g.lineTo(Math.round(px(t)) + .5, height - 20); g.stroke();
    if (px(t) < width - 30) g.fillText(clock(t).slice(0, 5), Math.max(px(t), gutter + 12), height - 8);
  }
  drawRates(X, 62);
  drawGaps(X, 74, 118);
  let y = 134;
  for (const [r, states] of restless) {
    name(gutter < 100 ? `${r}` : `rank ${r}`, y + 5);
    states.forEach(([t, state], i) => {
      const start = Math.max(t, from), end = states[i + 1]?.[0] ?? to;
      if (!state || end < from) return;
      g.fillStyle = C[state] || C.faint; g.fillRect(px(start), y, Math.max(px(end) - px(start), 1.5), 9);
    });
    y += 14;
  }
  if (rows < shown.length) { name(`and ${shown.length - rows} that did not change`, y + 5); y += 14; }
  drawChanges(X, y + 8);
  const faults = marks.filter(([t, , family]) => family === "bad" && t > from).length;
  canvas.setAttribute("aria-label", `The last five minutes: ${plural(faults, "fault")}, ${plural(marks.filter(([t, , f]) => f === "epoch" && t > from).length, "new epoch")}. The lists below have them as text.`);
}

function drawRates({ g, px, from, to, gutter, name }, base) {
  const most = Math.max(10, ...traffic.map((t) => t.tokens));
  if (gutter < 100) name("tok/s", base - 26); else name("tokens / s", 20);  // below its number, or beside it
  g.font = `11px ${C.sans}`; g.textAlign = "right"; g.fillStyle = C.faint; g.fillText(`${most}`, gutter - 10, base - 44);
  const by = new Map(traffic.map((t) => [t.at, t.tokens]));
  g.beginPath(); g.moveTo(px(Math.ceil(from)), base);
  for (let t = Math.ceil(from); t < Math.floor(to); t++) { const y = base - 44 * (by.get(t) ?? 0) / most; g.lineTo(px(t), y); g.lineTo(px(t + 1), y); }
  g.lineTo(px(Math.floor(to)), base);
  g.globalAlpha = .16; g.fillStyle = C.rate; g.fill(); g.globalAlpha = 1; g.strokeStyle = C.rate; g.lineWidth = 1.25; g.stroke(); g.lineWidth = 1;
}

function drawGaps({ g, px, from, gutter, width, name }, top, base) {
  name(gutter < 100 ? "gaps" : "longest gap", (top + base) / 2);
  const y = (v) => base - (base - top) * clamp(Math.log10(Math.max(v, 10) / 10) / 2.5, 0, 1);
  g.font = `11px ${C.sans}`; g.textAlign = "right";
  for (const v of [100, 1000]) {
    g.strokeStyle = C.soft; g.beginPath(); g.moveTo(gutter, y(v)); g.lineTo(width - 6, y(v)); g.stroke();
    if (gutter > 100) { g.fillStyle = C.faint; g.fillText(v < 1000 ? "0.1 s" : "1 s", gutter - 6, y(v)); }
  }
  for (const t of traffic) if (t.at > from && t.gap_ms) {
    g.fillStyle = t.gap_ms >= 200 ? C.gap : C.rate; g.globalAlpha = t.gap_ms >= 200 ? 1 : .45;
    g.beginPath(); g.arc(px(t.at + .5), y(t.gap_ms), t.gap_ms >= 200 ? 3 : 1.75, 0, 7); g.fill();
  }
  g.globalAlpha = 1;
}

function drawChanges({ g, px, from, to, gutter, name }, y) {
  name("epochs", y + 7); name(gutter < 100 ? "ops" : "operations", y + 30);
  g.font = `11px ${C.sans}`; g.textAlign = "center";
  let free = gutter;
  for (const [t, words, family] of marks) {
    if (t < from) continue;
    const x = Math.round(px(t)) + .5;
    if (family === "bad") {
      g.strokeStyle = C.dead; g.globalAlpha = .75; g.setLineDash([3, 3]); g.beginPath(); g.moveTo(x, 6); g.lineTo(x, y - 6); g.stroke(); g.setLineDash([]); g.globalAlpha = 1;
      g.fillStyle = C.dead; g.beginPath(); g.moveTo(x - 4.5, 1); g.lineTo(x + 4.5, 1); g.lineTo(x, 8); g.fill();
    } else {
      g.fillStyle = C.faint; g.fillRect(x - .5, y - 1, 1, x - 10 > free ? 4 : 8);
      if (x - 10 > free) { g.fillStyle = C.dim; g.fillText(`${words}`, x, y + 10); free = x + 10; }
    }
  }
  const ends = [0, 0];  // how far each of two lines is taken
  g.textAlign = "left";
  for (const o of Object.values(doc.operations ?? {}).sort((a, b) => a.started - b.started)) {
    const end = o.finished || to;
    if (end < from) continue;
    const x = px(Math.max(o.started, from)), w = Math.max(px(end) - x, 3), words = title(o), span = g.measureText(words).width + 6;
    const before = x + w + span > px(to), left = before ? x - span : x, line = ends[0] <= left ? 0 : ends[1] <= left ? 1 : -1;
    g.fillStyle = o.phase === "aborted" ? C.dead : o.phase === "done" ? C.good : C.accent; g.fillRect(x, y + 25 + 13 * Math.max(line, 0), w, 9);
    if (line < 0) continue;
    g.fillStyle = C.dim; g.fillText(words, before ? x - span : x + w + 6, y + 30 + 13 * line);
    ends[line] = before ? x + w : x + w + span + 8;
  }
}

// ---- lists and the table

function item(t, family, words, more) {
  const line = el("li", undefined, family), when = el("time", clock(t));
  when.dateTime = new Date(t * 1000).toISOString();
  const what = el("div");
  what.append(el("b", words), ...(more ? [el("span", ` ${more}`, "more")] : []));
  line.append(when, el("i"), what);
  return line;
}
function drawFar() {
  const links = doc.status?.links ?? [];
  $("far").hidden = !links.length;
  $("far-rows").replaceChildren(...links.map((l) => {
    const row = el("tr", undefined, l.up < l.links ? "dead" : "serving"), from = el("th", l.role === "engine" ? `${l.node}, engine` : l.node), state = el("td");
    from.scope = "row";
    state.append(el("span", undefined, `dot ${l.up < l.links ? "dead" : "serving"}`), el("span", l.up < l.links ? `${l.up} of ${l.links} up` : `${l.links} up`));
    row.append(from, el("td", l.peer_node), state, el("td", l.rtt_ms ? ms(l.rtt_ms) : "–", "n"), el("td", bytes(l.sent_bytes), "n wide"), el("td", l.retransmits, "n wide"), el("td", l.suspects, "n"), el("td", l.cuts, "n"));
    return row;
  }));
}
function drawEvents() {
  const all = $("all").checked;
  const shown = events.filter((e) => all || tells(e)).slice(-150).reverse();
  $("events").replaceChildren(...shown.map((e) => item(e.ts, ...say(e, doc.operations))));
  if (!shown.length) $("events").append(el("li", "Nothing has happened yet.", "empty"));
}
function drawOperations() {
  const all = Object.values(doc.operations ?? {}).sort((a, b) => b.started - a.started).slice(0, 60);
  $("operations").replaceChildren(...all.map((o) => {
    const family = o.phase === "done" ? "good" : o.phase === "aborted" ? "bad" : "busy", took = o.finished ? `${o.phase} in ${ms(1000 * (o.finished - o.started))}` : o.phase ?? "proposed";
    const more = o.error ?? `${took}${o.epoch ? `, epoch ${o.epoch}` : ""}${o.pause_ms ? `, tokens waited ${ms(o.pause_ms)}` : ""}`;
    return item(o.started, family, capital(title(o)), more);
  }));
  if (!all.length) $("operations").append(el("li", "No operation yet. Scale, drain or undrain ranks, and it is listed here.", "empty"));
}

const rows = new Map(), stale = new Set();  // ranks whose row is not as they are
let tableSeen = true, rowsDue = 0, rowsAt = 0;
function drawRows() {
  // A long table that is not on the screen is brought up to date every other second: laying it out takes long.
  const wait_ms = !tableSeen && rows.size > 64 ? rowsAt + 2000 - performance.now() : 0;
  if (wait_ms > 0) { rowsDue ||= setTimeout(() => { rowsDue = 0; draw("rows"); }, wait_ms); return; }
  rowsAt = performance.now();
  const shares = new Map((G?.rows ?? []).map((r) => [r.rank, r.share])), order = ranks().sort((a, b) => a.rank - b.rank);
  for (const r of order) {
    if (!stale.has(r.rank) && rows.has(r.rank)) continue;
    let row = rows.get(r.rank);
    if (!row) {
      row = el("tr");
      for (let i = 0; i < 9; i++) row.append(el(i ? "td" : "th", undefined, ["", "", "", "n wide", "n wide", "n wide", "n", "n wide", ""][i]));
      row.firstChild.scope = "row";
      const state = row.children[1], button = el("button", "Drain…", "small");
      state.append(el("span", undefined, "dot"), el("span"));
      button.type = "button"; button.onclick = () => open("drain", `${r.rank}`); button.setAttribute("aria-label", `Drain rank ${r.rank}`);
      row.lastChild.append(button);
      rows.set(r.rank, row);
    }
    const cells = [`Rank ${r.rank}`, , r.node || hosts.get(r.rank) || "–", r.pid || "–", r.incarnation, r.slots, shares.get(r.rank) ? `${shares.get(r.rank).toFixed(2)}×` : "–", r.restarts];
    cells.forEach((value, i) => { if (row.children[i].textContent !== `${value}`) row.children[i].textContent = value; });
    const words = r.state + (r.slow ? ", slow" : "") + (r.load ? ` ${bytes(r.load.bytes)} of ${bytes(r.load.total)}` : "");
    row.className = r.state; row.dataset.rank = r.rank; row.dataset.incarnation = r.incarnation;
    row.children[1].firstChild.className = `dot ${r.state}`; row.children[1].lastChild.textContent = words;
    row.lastChild.firstChild.disabled = r.state !== "serving";
  }
  stale.clear();
  for (const [number, row] of rows) if (!doc.ranks?.[number]) { row.remove(); rows.delete(number); }
  const body = $("rows");
  order.forEach((r, i) => { if (body.children[i] !== rows.get(r.rank)) body.insertBefore(rows.get(r.rank), body.children[i] ?? null); });
}

const PARTS = { status: drawStatus, tiles: drawTiles, grid: drawGrid, shown: show, timeline: drawTimeline, events: drawEvents, operations: drawOperations, rows: drawRows, far: drawFar };

// ---- changes: what would happen is shown first, and done once it is confirmed

const numbers = (words) => words.trim().split(/[\s,]+/).filter(Boolean).map((word) => { if (!/^\d+$/.test(word)) throw new Error(`“${word}” is no rank`); return +word; });
const field = (label, input) => { const box = el("label", label); box.append(input); return box; };
const input = (value, mode) => Object.assign(el("input"), { value, inputMode: mode, autocomplete: "off", required: true });
const choices = { "10 minutes": 600, "30 minutes": 1800, "2 hours": 7200, "8 hours": 28800 };
const DIALOGS = {
  scale: { title: "Scale", text: "How many ranks should there be? Requests stream on meanwhile.", go: "Scale", path: "/admin/v1/scale",
    fields: (given) => [field("Ranks", Object.assign(input(given ?? doc.status.desired, "numeric"), { type: "number", min: 0, max: doc.shape.max_ranks }))],
    body: ([ranks]) => ({ ranks: +ranks.value }) },
  drain: { title: "Drain", text: "Which ranks should leave? Their requests move first; their slots stay empty until you undrain them.", go: "Drain", path: "/admin/v1/drain",
    fields: (given) => [field("Ranks, separated by spaces", input(given ?? "", "text"))], body: ([ranks]) => ({ ranks: numbers(ranks.value) }) },
  undrain: { title: "Undrain", text: "Which drained slots should be filled again?", go: "Undrain", path: "/admin/v1/undrain",
    fields: () => [field("Ranks, separated by spaces", input(doc.status.drained.join(" "), "text"))], body: ([ranks]) => ({ ranks: numbers(ranks.value) }) },
  pause: { title: "Pause changes", text: "Planned changes are refused meanwhile, and no rebalance begins. Faults are handled as ever. It ends by itself.", go: "Pause changes", path: "/admin/v1/pause",
    fields: () => { const pick = el("select"); pick.append(...Object.entries(choices).map(([words, s]) => new Option(words, s))); return [field("For", pick), field("Reason", Object.assign(input("", "text"), { required: false, maxLength: 500 }))]; },
    body: ([ttl, reason]) => ({ ttl_s: +ttl.value, reason: reason.value, by: "live page" }), plain: true },
};
let asked = null, planned = null;

function open(name, given) {
  asked = DIALOGS[name]; planned = null;
  text("d-title", asked.title); text("d-text", asked.text); text("d-error", "");
  $("d-fields").replaceChildren(...asked.fields(given)); $("d-plan").replaceChildren();
  for (const each of $("d-fields").querySelectorAll("input, select")) each.addEventListener("input", () => { planned = null; $("d-plan").replaceChildren(); text("d-error", ""); ready(); });
  ready(); $("dialog").showModal();
}
function ready(busy = false) {
  $("d-go").disabled = busy || (planned !== null && !worth(planned));
  text("d-go", asked.plain ? asked.go : planned && worth(planned) ? `${asked.go} now` : "Show the plan");
}
const worth = (p) => !p.refused && Boolean(p.add.length || p.remove.length || Object.keys(p.loads).length);

async function go(event) {
  event.preventDefault(); ready(true); text("d-error", "");
  try {
    const body = asked.body([...$("d-fields").querySelectorAll("input, select")]);
    if (asked.plain) { await post(asked.path, body); $("dialog").close(); } else if (planned === null) {
      planned = await post(asked.path, { ...body, plan: true }); plan(planned);
    } else { await post(asked.path, { ...body, if_epoch: planned.epoch }); $("dialog").close(); }
  } catch (error) { planned = null; text("d-error", error.message); $("d-plan").replaceChildren(); }
  ready();
}

function plan(p) {
  const facts = [], fact = (name, value) => facts.push(el("dt", name), el("dd", value));
  if (p.add.length) fact("Ranks added", list(p.add));
  if (p.remove.length) fact("Ranks removed", list(p.remove));
  if (worth(p)) {
    fact("Replicas of every expert", `≥ ${p.replicas_before} → ≥ ${p.replicas_after}`);
    fact("Experts per rank", `≤ ${p.slots_before} → ≤ ${p.slots_after}`);
    fact("To load", `${plural(Object.values(p.loads).reduce((a, b) => a + b, 0), "expert")}, ${bytes(p.bytes_moved)}${p.estimated_s ? `, about ${p.estimated_s.toFixed(1)} s` : ""}`);
    if (p.expected_pause_ms) fact("Tokens wait", `about ${ms(p.expected_pause_ms)} at the commit`);
    if (p.survives?.vital_ranks?.length) fact("Afterwards", `the death of rank ${list(p.survives.vital_ranks)} would leave an expert without a replica`);
    else if (p.survives) fact("Afterwards", "any one rank may die");
  }
  const head = p.refused ? `Refused: ${p.refused}` : worth(p) ? `${p.ranks.length} → ${plural(p.target, "rank")}, from epoch ${p.epoch}` : "Nothing would change";
  const facts_list = el("dl"); facts_list.append(...facts);
  $("d-plan").replaceChildren(el("h3", head), facts_list);
}

async function act(path, body) {
  try { await post(path, body); } catch (error) { aloud(error.message); linked(connected); text("link", error.message); }
}

// ---- a recording

const TURN_MS = 250;
let turns = 0;
function showing(on) {
  $("player").hidden = !on; document.body.classList.toggle("replay", on);
  clearInterval(turns); turns = 0;
}
function running(on) {
  clearInterval(turns);
  turns = on ? setInterval(() => at(player.at + TURN_MS / 1000 * +$("speed").value), TURN_MS) : 0;
  text("play", on ? "Pause" : "Play");
}
function at(moment) {
  player.seek(clamp(moment, player.from, player.to));
  const words = `${clock(player.at)}, ${Math.round(player.at - player.from)} s of ${Math.round(player.to - player.from)} s`;
  $("moment").value = player.at - player.from; $("moment").setAttribute("aria-valuetext", words); text("clock", words);
  if (player.at >= player.to) running(false);
  redraw();
}
function replay(saved, name) {
  let recording;
  try { recording = recorded(saved); } catch (error) { text("recording-error", error.message); return; }
  text("recording-error", "");
  following++; stream.abort(); connected = false; forget();
  player = new Player(recording, forget, take);
  $("moment").max = Math.ceil(10 * (recording.to - recording.from)) / 10;  // a step: its end is reached, too
  $("sign-in").hidden = $("forget").hidden = true; $("live").hidden = false;
  $("link").className = "link"; text("link", `recording: ${name}`);
  showing(true); at(recording.from); running(true); $("play").focus();
}
function eject() {
  showing(false); player = null; forget();
  if (token()) { redraw(); text("link", "connecting"); follow(); } else signIn();
}
$("recording").addEventListener("change", async ({ target }) => { const [file] = target.files; if (file) replay(await file.text(), file.name); target.value = ""; });
$("play").addEventListener("click", () => { if (!turns && player.at >= player.to) at(player.from); running(!turns); });
$("moment").addEventListener("input", () => { running(false); at(player.from + +$("moment").value); });
$("eject").addEventListener("click", eject);

// ---- signing in, and what else the page listens to

function signIn(why = "") {
  following++; connected = false; stream.abort(); forget();
  sessionStorage.removeItem(KEY);
  $("live").hidden = $("forget").hidden = true; $("sign-in").hidden = false;
  $("link").className = "link"; text("link", "not connected"); text("sign-in-error", why); $("token").focus();
}
function enter(typed) {
  $("token").value = "";
  if (/[^\x21-\x7e]/.test(typed)) return signIn("a token has no such characters");  // a header could not hold it
  sessionStorage.setItem(KEY, typed); text("sign-in-error", ""); follow();
}
$("sign-in").addEventListener("submit", (event) => { event.preventDefault(); enter($("token").value.trim()); });
$("forget").addEventListener("click", () => signIn());
$("d-form").addEventListener("submit", go);
$("d-close").addEventListener("click", () => $("dialog").close());
$("all").addEventListener("change", () => draw("events"));
$("layer").addEventListener("change", () => draw("grid"));
for (const button of document.querySelectorAll("[data-open]")) button.addEventListener("click", () => open(button.dataset.open));
$("grid").addEventListener("scroll", () => draw("shown"));
$("experts").addEventListener("pointermove", point);
$("experts").addEventListener("pointerdown", point);
$("experts").addEventListener("pointerleave", () => { $("tip").hidden = true; });
new IntersectionObserver(([entry]) => { tableSeen = entry.isIntersecting; if (tableSeen) draw("rows"); }).observe($("ranks"));
const redraw = () => draw(...Object.keys(PARTS));
new ResizeObserver(() => draw("grid", "timeline")).observe($("live"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette(); redraw(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) redraw(); });
setInterval(() => { if (connected && !document.hidden) draw("timeline", "tiles"); }, 1000);
palette();
if (token()) follow(); else signIn();
