// What is selected, and the functions that run when it changes. A token of each side can be: `index` the one selected last,
// `partner` the one of the other side, kept or chosen with a cell. What a reader sees is in the address, so that a link shows it.

const ADDRESS = new Map(); // name -> what it is now, null as by default
const GIVEN = new URLSearchParams(location.hash.slice(1).replace(/^([ml])(\d+)$/, "$1=$2"));

/** A setting that the address keeps; returns what the address said when the page was opened, or null. */
function addressed(name, now) {
  ADDRESS.set(name, now);
  return GIVEN.get(name);
}

function writeAddress() {
  const words = [...ADDRESS].map(([name, now]) => [name, now()]).filter(([, value]) => value !== null && value !== undefined);
  try {
    history.replaceState(null, "", `#${words.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&")}`);
  } catch {
    /* a page inside a sandbox has no history; the selection works without */
  }
}

const state = { side: null, index: -1, partner: -1, focus: MOST_MOVED };
const watchers = [];
const redrawers = [];

/** Call `watch` after each change of the selection, `redraw` after a change of theme too. */
function follow(watch, redraw) {
  if (watch) watchers.push(watch);
  redrawers.push(redraw || watch);
}

const otherSide = (side) => (side === "observed" ? "updated" : "observed");

/** The selected token of a side, -1 for none. */
const pinned = (side) => (state.side === side ? state.index : state.side ? state.partner : -1);

/** The force between the two selected tokens in words, null unless both sides have one. */
function forceBetween() {
  const [m, l] = [pinned("observed"), pinned("updated")];
  if (m < 0 || l < 0 || !MATRIX) return null;
  const value = force(m, l);
  return finite(value) ? `${signed(value)} ${unitName()}` : "not computed";
}

/** Select a token; the one of the other side stays, unless `partner` names another (-1: none). Again: it is selected no more. */
function select(side, index, partner = null) {
  const again = state.side === side && state.index === index && partner === null;
  if (side === null || (again && state.partner < 0)) Object.assign(state, { side: null, index: -1, partner: -1 });
  else if (again) Object.assign(state, { side: otherSide(side), index: state.partner, partner: -1 });
  else Object.assign(state, { partner: partner ?? pinned(otherSide(side)), side, index });
  if (pinned("observed") >= 0) state.focus = pinned("observed");
  writeAddress();
  watchers.forEach((watch) => watch());
  const between = state.side && forceBetween();
  const both = between ? `, ${describe(otherSide(state.side), state.partner)} too; force between them ${between}` : "";
  say(state.side ? `Selected ${describe(state.side, state.index)}${both}` : "Selection cleared");
}

/** Take the selection from the address. */
function selectFromAddress() {
  const at = (name, side) => {
    const found = addressed(name, () => (pinned(side.name) < 0 ? null : pinned(side.name)));
    return /^\d+$/.test(found ?? "") && +found < side.size ? +found : -1;
  };
  const [m, l] = [at("m", OBSERVED), at("l", UPDATED)];
  const last = addressed("last", () => (state.side === "updated" && state.partner >= 0 ? "l" : null));
  if (m >= 0) state.focus = m;
  if (l >= 0 && (m < 0 || last === "l")) Object.assign(state, { side: "updated", index: l, partner: m });
  else if (m >= 0) Object.assign(state, { side: "observed", index: m, partner: l });
}

const describe = (side, i) =>
  `${side === "observed" ? "observed" : "update"} token ${label(sideOf(side).token(i))}, ${sideOf(side).place(i)}`;

const say = (text) => {
  byId("live").textContent = text;
};

/** What is known of a token, for tooltips and the inspector. */
function tokenFacts(side, i) {
  const of = sideOf(side);
  const logProb = of.at("log_prob", i);
  const top = of.at("argmax_token", i);
  const rows = [];
  if (side === "observed") {
    if (finite(MOVES.actual(i))) rows.push(["actual change", `${signed(MOVES.actual(i))} ${unitName()}`]);
    if (finite(MOVES.predicted(i))) rows.push(["predicted", `${signed(MOVES.predicted(i))} ${unitName()}`]);
  } else {
    if (finite(of.at("c", i)))
      rows.push([
        "weight c",
        `${signed(of.at("c", i))}, ${of.at("c", i) > 0 ? "pulled up" : of.at("c", i) < 0 ? "pushed down" : "left alone"}`,
      ]);
  }
  if (finite(logProb)) rows.push(["log-prob", `${number(logProb)} nats (${probability(Math.exp(logProb))})`]);
  if (finite(of.at("rank", i))) rows.push(["rank", grouped(of.at("rank", i) + 1)]); // stored from 0
  if (top !== null && top !== of.token(i))
    rows.push([
      "most likely",
      [tokenText(top, { limit: 24 }), ` ${probability(Math.exp(of.at("argmax_log_prob", i)))}`],
    ]);
  if (finite(of.at("entropy", i))) rows.push(["entropy", `${number(of.at("entropy", i))} nats`]);
  if (side === "updated" && finite(gNorm(i))) rows.push(["‖G‖", number(gNorm(i))]);
  return rows;
}

/** Tooltip of one token; adds its force to or from the selected one. */
function tokenTip(side, i) {
  const of = sideOf(side);
  const rows = tokenFacts(side, i);
  const other = pinned(otherSide(side));
  if (other >= 0 && MATRIX) {
    const value = side === "observed" ? force(i, other) : force(other, i);
    rows.unshift([
      `${VIEW.net ? "net force" : "force"} ${side === "observed" ? "from" : "on"} selected`,
      finite(value) ? `${signed(value)} ${unitName()}` : "not computed",
    ]);
  }
  const shared = side === "updated" ? CONTEXT_LIST[CONTEXT_OF[i]] : null;
  if (shared && shared.members.length > 1)
    rows.push(["behind the same text", `${label(CONTEXTS.token(CONTEXT_OF[i]), 24)}, ${CONTEXTS.sequence(CONTEXT_OF[i]).name}`]);
  return [
    h("p.tip-token", tokenText(of.token(i), { limit: 60 })),
    h(
      "p.tip-place",
      [
        side === "observed" ? "Observed" : "Update",
        of.place(i),
        finite(of.at("token_id", i)) && `id ${of.at("token_id", i)}`,
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    facts(rows),
  ];
}
