// One readout step per update token: where the probability goes.
// Squeeze is one function, since what it nests shares the table's rows, order and filter as methods share a class.

function Squeeze() {
  const root = document.querySelector("#squeezing .squeeze");
  const of = UPDATED;
  if (!["p_target_after", "p_argmax_after", "mass_to_argmax", "falling_share"].some(of.has)) {
    root.append(h("p.empty", "Squeezing diagnostics were not computed for this run."));
    return;
  }
  const p = (i) => (finite(of.at("log_prob", i)) ? Math.exp(of.at("log_prob", i)) : null);
  const top = (i) => (finite(of.at("argmax_log_prob", i)) ? Math.exp(of.at("argmax_log_prob", i)) : null);
  const change = (before, after) =>
    finite(before) && finite(after) && before > 0 && after > 0 ? Math.log(after / before) : null;
  const same = (i) => of.at("rank", i) === 0;
  const columns = [
    { key: "position", name: "token", text: true, value: (i) => i },
    { key: "c", name: "c", unit: "loss per nat", value: (i) => of.at("c", i) },
    { key: "target", name: "p(target)", unit: "before → after", value: p, after: (i) => of.at("p_target_after", i) },
    {
      key: "dtarget",
      name: "Δ log p",
      unit: "nats",
      value: (i) => change(p(i), of.at("p_target_after", i)),
      bar: true,
    },
    { key: "argmax", name: "p(argmax)", unit: "before → after", value: top, after: (i) => of.at("p_argmax_after", i) },
    {
      key: "dargmax",
      name: "Δ log p",
      unit: "nats",
      value: (i) => change(top(i), of.at("p_argmax_after", i)),
      bar: true,
    },
    { key: "mass", name: "mass to argmax", unit: "probability", value: (i) => of.at("mass_to_argmax", i) },
    { key: "falling", name: "falling", unit: "of the others", value: (i) => of.at("falling_share", i), share: true },
  ];
  const every = Array.from({ length: of.size }, (_, i) => i);
  const pushed = every.filter((i) => of.at("c", i) < 0);
  const view = { which: pushed.length ? "down" : "all", sequence: "all", sort: "mass", descending: true, limit: 12 };
  const holder = h("div.table-frame", { tabindex: 0, role: "region", "aria-label": "Squeezing by update token" });
  const more = h("button.more-rows", {
    type: "button",
    onclick: () => {
      view.limit = view.limit === 12 ? Infinity : 12;
      draw();
    },
  });
  root.append(
    summary(),
    h(
      "div.controls",
      choice(
        "Tokens",
        [
          ["down", "Pushed down", !pushed.length],
          ["all", "All tokens"],
        ],
        view.which,
        (which) => {
          view.which = which;
          draw();
        },
      ),
      dropdown(
        "Sequence",
        [["all", "all sequences"], ...of.sequences.map((sequence, s) => [s, sequence.name])],
        "all",
        (value) => {
          view.sequence = value;
          draw();
        },
      ),
    ),
    holder,
    more,
  );
  let rows = new Map();

  function summary() {
    const others = pushed.filter((i) => !same(i) && finite(of.at("p_argmax_after", i)) && top(i) !== null);
    const gained = others.filter((i) => of.at("p_argmax_after", i) > top(i));
    const falling = pushed.map((i) => of.at("falling_share", i)).filter(finite);
    const text = [];
    if (!pushed.length)
      text.push(
        "No token of this update is pushed down, so nothing is squeezed; the table shows what pulling up does.",
      );
    else {
      if (others.length)
        text.push(
          `Of ${plural(pushed.length, "token")} pushed down, ${others.length === pushed.length ? "all" : grouped(others.length)} were not the model's first choice; the first choice gained in ${gained.length === others.length ? "every one of them" : `${grouped(gained.length)} of them`}.`,
        );
      if (falling.length)
        text.push(
          `On average ${percent(falling.reduce((a, b) => a + b, 0) / falling.length)} of the other vocabulary fell.`,
        );
    }
    return h("p.summary", text.join(" "));
  }

  function draw() {
    const pool = (view.which === "down" ? pushed : every).filter(
      (i) => view.sequence === "all" || of.sequenceOf(i) === +view.sequence,
    );
    const by = columns.find((column) => column.key === view.sort);
    const rank = (i) => {
      const value = by.value(i);
      return finite(value) ? value : -Infinity;
    };
    const order = [...pool].sort((a, b) => (view.descending ? rank(b) - rank(a) : rank(a) - rank(b)) || a - b);
    const shown = order.slice(0, view.limit);
    const bars = columns.filter((column) => column.bar);
    const limits = bars.flatMap((column) => pool.map((i) => column.value(i))).filter(finite);
    const span = limits.reduce((largestSoFar, x) => Math.max(largestSoFar, Math.abs(x)), 0) || 1;
    rows = new Map(
      shown.map((i) => [
        i,
        h(
          "tr",
          { onclick: () => select("updated", i) },
          columns.map((column) => cell(column, i, span)),
        ),
      ]),
    );
    holder.replaceChildren(
      h(
        "table.squeeze-table",
        head(),
        h("tbody", shown.length ? [...rows.values()] : h("tr", h("td", { colspan: columns.length }, "No such token."))),
      ),
    );
    mark();
    more.hidden = order.length <= 12;
    more.textContent = view.limit === 12 ? `Show all ${grouped(order.length)} tokens` : "Show 12";
  }

  /** Names of the columns; each sorts the table by its values, and once more the other way round. */
  function head() {
    return h(
      "thead",
      h(
        "tr",
        columns.map((column) =>
          h(
            "th",
            {
              scope: "col",
              "aria-sort": view.sort === column.key ? (view.descending ? "descending" : "ascending") : "none",
            },
            h(
              "button.sort",
              {
                type: "button",
                onclick: () => {
                  Object.assign(
                    view,
                    view.sort === column.key
                      ? { descending: !view.descending }
                      : { sort: column.key, descending: column.key !== "position" },
                  );
                  draw();
                  holder.querySelector(`[data-key="${column.key}"]`).focus();
                },
                "data-key": column.key,
              },
              column.name,
              h("span.arrow", view.sort === column.key ? (view.descending ? "▾" : "▴") : ""),
            ),
            column.unit && h("span.unit", column.unit),
          ),
        ),
      ),
    );
  }

  function cell(column, i, span) {
    const value = column.value(i);
    if (column.text)
      return h(
        "th",
        { scope: "row" },
        h("button.row-token", { type: "button" }, tokenText(of.token(i), { limit: 22 })),
        h("span.where", of.sequence(i).name),
      );
    if (column.bar) return h("td", bar(value, -span, span, true), h("span.value", signed(value)));
    if (column.share) return h("td", bar(value, 0, 1, false), h("span.value", percent(value)));
    if (column.after) {
      return h(
        "td.pair",
        column.key === "argmax" &&
          h(
            "span.argmax",
            same(i) ? h("span.unit", "same token") : tokenText(of.at("argmax_token", i) ?? "", { limit: 14 }),
          ),
        h("span.value", probability(value), " → ", probability(column.after(i))),
      );
    }
    return h("td.value", signed(value));
  }

  function mark() {
    for (const [i, row] of rows) row.classList.toggle("selected", state.side === "updated" && state.index === i);
  }
  draw();
  follow(mark);
}
