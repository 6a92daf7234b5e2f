// The selected token: its numbers, the tokens at the other end of its strongest forces, its risers and fallers.
// Inspector is one function, since what it nests shares the panel and its way to the texts as methods share a class.

function Inspector(showInPanel) {
  const root = byId("inspector");
  const bar = byId("selection");

  /** Bars for the n strongest forces at the other end of the selected token. */
  function partners(side, values, n, title) {
    const order = largest(values, n);
    const top = order.length ? Math.abs(values[order[0]]) : 1;
    const total = values.filter(finite).reduce((sum, value) => sum + Math.abs(value), 0);
    const of = sideOf(side);
    return h(
      "section",
      h("h4", title, " ", h("span.unit", "nats per unit lr")),
      order.length
        ? h(
            "ol.ranking",
            order.map((i) =>
              row(
                side,
                i,
                [tokenText(of.token(i), { limit: 14 }), h("span.where", of.sequence(i).name)],
                values[i],
                top,
              ),
            ),
          )
        : h("p.note", "No force was computed."),
      order.length
        ? h(
            "p.note",
            `${percent(order.reduce((sum, i) => sum + Math.abs(values[i]), 0) / total)} of all force ${side === "updated" ? "on" : "from"} this token.`,
          )
        : null,
    );
  }

  function words(m) {
    const list = (name, title) => {
      const items = (OBSERVED.at(name, m) || []).slice(0, 4);
      return h(
        "div",
        h("h5", title),
        h(
          "ul.words-short",
          items.map(([text, delta]) => h("li", tokenText(text, { limit: 14 }), " ", h("span.value", signed(delta)))),
        ),
      );
    };
    if (!OBSERVED.at("risers", m)?.length && !OBSERVED.at("fallers", m)?.length) return null;
    return h(
      "section",
      h("h4", "In the vocabulary here ", h("span.unit", "nats per unit lr")),
      h("div.two", list("risers", "rise"), list("fallers", "fall")),
    );
  }

  /** With nothing selected: how to select, and the ends worth starting from. */
  function empty() {
    const moves = Array.from({ length: OBSERVED.size }, (_, m) => MOVES[BEST_MOVE](m));
    const first = largest(moves, 6);
    const strong = MATRIX ? strongestCells(6) : [];
    const top = (list) => Math.abs(list[0]) || 1;
    return [
      h("h3", "Selected token"),
      h(
        "p.place",
        "None yet. Click a token in either text, or walk there with Tab and the arrow keys. Hovering shows its numbers, Esc clears. Or start from one of these.",
      ),
      first.length
        ? h(
            "section",
            h("h4", "Moved most ", h("span.unit", BEST_MOVE === "force" ? "nats per unit lr" : `${BEST_MOVE}, nats`)),
            h(
              "ol.ranking",
              first.map((m) =>
                row(
                  "observed",
                  m,
                  [tokenText(OBSERVED.token(m), { limit: 14 }), h("span.where", OBSERVED.sequence(m).name)],
                  moves[m],
                  top(first.map((i) => moves[i])),
                ),
              ),
            ),
          )
        : null,
      strong.length
        ? h(
            "section",
            h("h4", "Strongest single forces ", h("span.unit", "nats per unit lr")),
            h(
              "ol.ranking",
              strong.map(([m, l]) =>
                row(
                  "observed",
                  m,
                  [
                    tokenText(UPDATED.token(l), { limit: 10 }),
                    h("span.where", "on"),
                    tokenText(OBSERVED.token(m), { limit: 10 }),
                  ],
                  force(m, l),
                  top(strong.map(([i, j]) => force(i, j))),
                  l,
                ),
              ),
            ),
          )
        : null,
    ].filter(Boolean);
  }

  /** One line of a ranking: who, a bar, a number; it selects. */
  function row(side, i, who, value, top, partner = -1) {
    return h(
      "li",
      h(
        "button.row",
        {
          type: "button",
          onclick: () => {
            hideTip();
            select(side, i, partner);
            showInPanel[side](i);
          },
          onpointermove: (event) => showTip(event.clientX, event.clientY, tokenTip(side, i)),
          onpointerleave: hideTip,
        },
        h("span.who", who),
        h(`span.bar.${value > 0 ? "up" : "down"}`, { "--size": `${(100 * Math.abs(value)) / top}%` }),
        h("span.value", signed(value)),
      ),
    );
  }

  /** The n largest |F| as [m, l]. */
  function strongestCells(n) {
    const best = [];
    for (let k = 0; k < MATRIX.length; k += 1) {
      const size = Math.abs(MATRIX[k]);
      if (!(size > 0) || (best.length === n && size <= best[n - 1][0])) continue;
      best.push([size, k]);
      best.sort((a, b) => b[0] - a[0]);
      best.length = Math.min(n, best.length);
    }
    return best.map(([, k]) => [Math.floor(k / UPDATED.size), k % UPDATED.size]);
  }

  function draw() {
    const { side, index, partner } = state;
    bar.replaceChildren();
    if (!side) {
      bar.append(h("span.none", "no token selected"));
      root.replaceChildren(...empty());
      return;
    }
    const of = sideOf(side);
    const clear = () =>
      h("button.clear", { type: "button", "aria-label": "Clear the selection", onclick: () => select(null) }, "clear");
    bar.append(
      h("span.kind", side === "observed" ? "observed" : "update"),
      tokenText(of.token(index), { limit: 24 }),
      h("span.where", of.place(index)),
      clear(),
    );
    const rows = tokenFacts(side, index);
    if (partner >= 0)
      rows.unshift([
        side === "observed" ? "F from the marked cell" : "F",
        `${signed(force(index, partner))} nats per unit lr`,
      ]);
    root.replaceChildren(
      ...[
        h(
          "h3",
          h("span.kind", side === "observed" ? "Observed" : "Update"),
          " ",
          tokenText(of.token(index), { limit: 40 }),
        ),
        h("p.place", of.place(index)),
        facts(rows),
        MATRIX &&
          (side === "observed"
            ? partners("updated", forcesOn(index), 6, "Who moved it")
            : partners("observed", forcesOf(index), 8, "Whom it moved")),
        side === "observed" && words(index),
      ].filter(Boolean),
    );
    root.scrollTop = 0;
  }
  follow(draw);
}
