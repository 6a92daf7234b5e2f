// What is selected, and the functions that run when it changes. One token is selected at a time; `partner` is the other end of a clicked cell.

const state = { side: null, index: -1, partner: -1, focus: MOST_MOVED };
const watchers = [];
const redrawers = [];

/** Call `watch` after each change of the selection, `redraw` after a change of theme too. */
function follow(watch, redraw) {
  if (watch) watchers.push(watch);
  redrawers.push(redraw || watch);
}

function select(side, index, partner = -1) {
  const same = state.side === side && state.index === index && partner < 0 && state.partner < 0;
  if (same || side === null) Object.assign(state, { side: null, index: -1, partner: -1 });
  else Object.assign(state, { side, index, partner });
  if (state.side === "observed") state.focus = index;
  const hash = state.side ? `#${state.side === "observed" ? "m" : "l"}${state.index}` : "#";
  try {
    history.replaceState(null, "", hash);
  } catch {
    /* a page inside a sandbox has no history; the selection works without */
  }
  watchers.forEach((watch) => watch());
  say(state.side ? `Selected ${describe(state.side, state.index)}` : "Selection cleared");
}

/** Take the selection from the address, so that a link can point at a token. */
function selectFromAddress() {
  const found = /^#([ml])(\d+)$/.exec(location.hash);
  if (!found) return;
  const side = found[1] === "m" ? OBSERVED : UPDATED;
  if (+found[2] < side.size)
    Object.assign(state, {
      side: side.name,
      index: +found[2],
      partner: -1,
      focus: found[1] === "m" ? +found[2] : state.focus,
    });
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
  if (state.side && state.side !== side && MATRIX) {
    const value = side === "observed" ? force(i, state.index) : force(state.index, i);
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
