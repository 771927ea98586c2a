// What the live page says of an event, and what events say of the ranks' states over time. An event may be of another
// version, or of a record that lacks some of its fields: then less is said of it, and the page goes on.

export const plural = (n, one, many = one + "s") => `${n ?? "?"} ${n === 1 ? one : many}`;
export const ms = (v) => typeof v !== "number" ? "unknown time" : v < 99.5 ? `${+v.toFixed(v < 9.95 ? 1 : 0)} ms` : v < 999.5 ? `${v.toFixed(0)} ms` : `${+(v / 1000).toPrecision(3)} s`;
export const capital = (words) => words[0].toUpperCase() + words.slice(1);
export const list = (numbers) => numbers.length ? numbers.join(", ") : "none";
export const title = (o) => o.kind === "scale" ? `scale to ${o.target}` : `${o.kind} ${list(o.ranks ?? [])}`;

// What is said of an event: [family, words, more]. Families colour the dot; `said` ones are read out and shown by default.
const rank = (e) => `Rank ${e.rank ?? "?"}`;
export const SAY = {
  rank_died: (e, f) => ["bad", `${rank(e)} died`, f.reason ?? f.detected_by],
  rank_masked: (e, f) => ["bad", `${rank(e)} is masked`, `${plural(f.requests, "request")} to move on; noticed by ${f.source ?? "?"}${f.ms >= 0 ? ` in ${ms(f.ms)}` : ""}`],
  device_failed: (e, f) => ["bad", `The device of rank ${e.rank ?? "?"} failed`, f.reason],
  rank_quarantined: (e, f) => ["bad", `${rank(e)} is set aside`, f.reason],
  rank_refused: (e, f) => ["bad", `${rank(e)} is another model, and refused`, f.reason],
  rank_load_failed: (e, f) => ["bad", `${rank(e)} cannot load`, f.error],
  rank_recovered: (e, f) => ["good", `Requests of rank ${e.rank ?? "?"} go on`, `${ms(f.ms)} after its loss`],
  rank_spawned: (e, f) => ["busy", `${rank(e)} starts`, `incarnation ${f.incarnation ?? "?"} on ${f.node ?? "?"}`],
  rank_slow: (e, f) => ["warn", `${rank(e)} is slow`, `${f.factor ?? "?"} times the others' time`],
  rank_slow_no_more: (e) => ["good", `${rank(e)} is no longer slow`],
  rank_retired: (e) => ["", `${rank(e)} has left`],
  epoch_committed: (e, f) => ["good", `Epoch ${e.epoch ?? "?"}`, `${Array.isArray(f.ranks) ? plural(f.ranks.length, "rank") : "its ranks are not recorded"}${f.experts_taken ? `, ${f.experts_taken} experts loaded` : ""}`],
  operation_phase: (e, f, operations) => [f.phase === "aborted" ? "bad" : f.phase === "done" ? "good" : "busy", `${operations[f.operation] ? capital(title(operations[f.operation])) : "Operation"}: ${f.phase ?? "?"}`, f.error],
  role_died: (e, f) => ["bad", `The ${f.name ?? "?"} died`, f.reason],
  role_started: (e, f) => ["busy", `The ${f.name ?? "?"} starts`],
  etcd_died: () => ["bad", "etcd died", "serving goes on; membership is frozen"],
  engine_lost: (e, f) => ["bad", "The gateway lost its engine", plural(f.open_requests, "open request")],
  engine_attached: (e, f) => ["good", "The gateway has an engine", f.resubmitted ? `${plural(f.resubmitted, "request")} sent again` : ""],
  engine_elected: () => ["good", "An engine takes over"],
  engine_rekeyed: () => ["", "The engine listens with another join secret from now on"],
  leader_elected: () => ["good", "A controller takes over"],
  store_replaced: (e, f) => ["bad", "The store was replaced", f.error],
  checkpoint_replaced: (e, f) => ["warn", "The checkpoint's files were replaced", f.node],
  events_lost: (e, f) => ["warn", `${f.count ?? "?"} events were lost`],
  failpoint: (e, f) => ["bad", `Failpoint ${f.name ?? "?"}`, f.action],
  step_setback: (e, f) => ["warn", `A step is computed again`, f.status],
};
// Shown by default: what one can tell the cluster's life by. The rest is under "all of them".
export const tells = (e) => e.kind in SAY && !(e.kind === "operation_phase" && !["done", "aborted"].includes(e.fields?.phase));
export const FAULTS = new Set(["rank_died", "rank_quarantined", "role_died", "etcd_died", "store_replaced", "failpoint"]);
export function say(e, operations) {
  const f = e.fields ?? {};
  if (SAY[e.kind]) return SAY[e.kind](e, f, operations ?? {});
  const more = Object.entries(f).filter(([, v]) => typeof v !== "object").map(([k, v]) => `${k} ${v}`).join(", ");
  return ["", e.kind.replaceAll("_", " ") + (e.rank === undefined || e.rank === null ? "" : `, rank ${e.rank}`), more];
}

// The states of ranks over time.
export function lane(lanes, e, kept_s) {
  const f = e.fields ?? {}, members = Array.isArray(f.ranks) ? f.ranks : null;
  const states = { rank_spawned: "launching", rank_load_started: "loading", rank_loaded: "standby", rank_died: "dead", rank_masked: "dead", rank_quarantined: "quarantined", rank_retired: "" };
  const to = (r, state) => {
    const known = lanes.get(r) ?? lanes.set(r, []).get(r);
    if (known.at(-1)?.[1] !== state && !(state === "dead" && known.at(-1)?.[1] === "quarantined")) known.push([e.ts, state]);
    while (known.length > 1 && known[1][0] < e.ts - kept_s) known.shift();
  };
  if (e.kind in states && e.rank !== undefined && e.rank !== null) to(e.rank, states[e.kind]);
  if (e.kind === "epoch_staged" && members) for (const [r, known] of lanes) if (known.at(-1)[1] === "serving" && !members.includes(r)) to(r, "draining");
  if (e.kind === "epoch_committed" && members) {
    for (const r of members) if (["standby", "loading", "draining"].includes(lanes.get(r)?.at(-1)[1]) || !lanes.has(r)) to(r, "serving");
    for (const [r, known] of lanes) if (["serving", "draining"].includes(known.at(-1)[1]) && !members.includes(r)) to(r, "");
  }
}
