// One sequence as a table: a token a row, a bar and its number for each quantity.
// Bars is one function, since what it nests shares the table's rows and choice of sequence as methods share a class.

const BAR_COLUMNS = {
  updated: [
    { name: "c", unit: "loss per nat", value: (i) => UPDATED.at("c", i), sign: true },
    { name: "‖G‖", unit: "loss per logit", value: gNorm },
    { name: "entropy", unit: "nats", value: (i) => UPDATED.at("entropy", i) },
    { name: "log-prob", unit: "nats", value: (i) => UPDATED.at("log_prob", i) },
  ],
  observed: [
    { name: "actual change", unit: null, value: MOVES.actual, sign: true },
    { name: "predicted", unit: null, value: MOVES.predicted, sign: true, like: 0 },
    { name: "‖π − e_y‖", unit: "0 to √2", value: (i) => OBSERVED.at("g_norm", i) },
    { name: "entropy", unit: "nats", value: (i) => OBSERVED.at("entropy", i) },
    { name: "log-prob", unit: "nats", value: (i) => OBSERVED.at("log_prob", i) },
  ],
};

function Bars() {
  const root = document.querySelector("#numbers .bars");
  const options = ["updated", "observed"].flatMap((side) =>
    sideOf(side).sequences.map((sequence, s) => [
      `${side}:${s}`,
      `${side === "updated" ? "Update" : "Observed"} · ${sequence.name}`,
    ]),
  );
  if (!options.length) return void root.append(h("p.empty", "The run has no tokens."));
  const holder = h("div.table-frame", { tabindex: 0, role: "region", "aria-label": "Numbers of the sequence" });
  let chosen = options[0][0];
  let rows = new Map();
  const menu = dropdown("Sequence", options, chosen, (value) => {
    chosen = value;
    draw();
  });
  root.append(h("div.controls", menu), holder);

  function draw() {
    const [side, s] = chosen.split(":");
    const of = sideOf(side);
    const { start, stop } = of.sequences[+s];
    const range = Array.from({ length: stop - start }, (_, k) => start + k);
    const columns = barColumns(side, range);
    rows = new Map();
    holder.replaceChildren(
      h(
        "table.bar-table",
        h(
          "thead",
          h(
            "tr",
            h("th", { scope: "col" }, "token"),
            columns.map((column) =>
              h(
                "th",
                { scope: "col" },
                h("div.axis-name", column.name, " ", h("span.unit", column.unit ?? unitName())),
                axisTicks(column.low, column.high),
              ),
            ),
          ),
        ),
        h(
          "tbody",
          range.map((i, k) => {
            const row = h(
              "tr",
              { onclick: () => select(side, i) },
              h(
                "th",
                { scope: "row" },
                h("button.row-token", { type: "button" }, tokenText(of.token(i), { limit: 22 })),
              ),
              columns.map((column) =>
                h(
                  "td",
                  bar(column.values[k], column.low, column.high, column.sign),
                  h("span.value", column.sign ? signed(column.values[k]) : number(column.values[k])),
                ),
              ),
            );
            rows.set(i, row);
            return row;
          }),
        ),
      ),
    );
    holder.scrollTop = 0;
    mark();
  }

  function mark() {
    const [side] = chosen.split(":");
    for (const [i, row] of rows) row.classList.toggle("selected", state.side === side && state.index === i);
  }

  /** A selected token brings its own sequence here. */
  function showSelected() {
    if (state.side) {
      const wanted = `${state.side}:${sideOf(state.side).sequenceOf(state.index)}`;
      if (wanted !== chosen) {
        chosen = wanted;
        menu.querySelector("select").value = wanted;
        draw();
      }
    }
    mark();
  }
  draw();
  follow(showSelected, draw);
}

/** The columns that a range of tokens has values for, each with them and with the ends of its axis. */
function barColumns(side, range) {
  const known = BAR_COLUMNS[side].map((column) => ({ ...column, values: range.map((i) => column.value(i)) }));
  const columns = known.filter((column) => column.values.some(finite));
  for (const column of columns) {
    const peers = column.like !== undefined ? [...column.values, ...known[column.like].values] : column.values;
    const real = peers.filter(finite);
    column.low = Math.min(0, ...real);
    column.high = Math.max(0, ...real);
    if (column.low === column.high) column.high = 1;
  }
  return columns;
}

/** A bar from zero inside [low, high]. */
function bar(value, low, high, sign) {
  if (!finite(value)) return h("span.track");
  const at = (x) => (100 * (x - low)) / (high - low);
  const [a, b] = [at(Math.min(0, value)), at(Math.max(0, value))];
  return h(
    "span.track",
    { "--zero": `${at(0)}%` },
    h(`span.fill${sign ? (value > 0 ? ".up" : ".down") : ""}`, { "--from": `${a}%`, "--size": `${b - a}%` }),
  );
}

/** The ends of an axis, and its zero when that lies inside. */
function axisTicks(low, high) {
  const at = (x) => (100 * (x - low)) / (high - low);
  const room = (x) => 7 * tick(x).length; // of a narrow axis, in percent
  const clear = (x) => Math.abs(at(x) - at(0)) > room(x) + 6;
  const marks = [...new Set([low, 0, high])].filter((x) => x === 0 || clear(x));
  return h(
    "div.axis",
    marks.map((x) => h(`span${at(x) < 1 ? ".first" : at(x) > 99 ? ".last" : ""}`, { "--at": `${at(x)}%` }, tick(x))),
  );
}
