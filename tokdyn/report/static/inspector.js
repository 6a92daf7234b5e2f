// The selected token: its numbers, the tokens at the other end of its strongest forces, its risers and fallers.

function Inspector(showInPanel) {
  const root = byId("inspector");
  const bar = byId("selection");
  const pick = (side, i, text) => h("button.link", { type: "button", onclick: () => { select(side, i); showInPanel[side](i); } }, text);

  /** Bars for the n strongest forces at the other end of the selected token. */
  function partners(side, values, n, title) {
    const order = largest(values, n);
    const top = order.length ? Math.abs(values[order[0]]) : 1;
    const total = values.filter(finite).reduce((sum, value) => sum + Math.abs(value), 0);
    const of = sideOf(side);
    return h("section", h("h4", title, " ", h("span.unit", "nats per unit lr")),
      order.length ? h("ol.ranking", order.map((i) => h("li", {
        onpointermove: (event) => showTip(event.clientX, event.clientY, tokenTip(side, i)), onpointerleave: hideTip,
      }, h("button.row", { type: "button", onclick: () => { hideTip(); select(side, i); showInPanel[side](i); } },
        h("span.who", tokenText(of.token(i), { limit: 14 }), h("span.where", of.sequence(i).short)),
        h(`span.bar.${values[i] > 0 ? "up" : "down"}`, { "--size": `${(100 * Math.abs(values[i])) / top}%` }),
        h("span.value", signed(values[i])))))) : h("p.note", "No force was computed."),
      order.length ? h("p.note", `${percent(order.reduce((sum, i) => sum + Math.abs(values[i]), 0) / total)} of all force ${side === "updated" ? "on" : "from"} this token.`) : null);
  }

  function words(m) {
    const list = (name, title) => {
      const items = (OBSERVED.at(name, m) || []).slice(0, 4);
      return h("div", h("h5", title), h("ul.words-short", items.map(([text, delta]) => h("li", tokenText(text, { limit: 14 }), " ", h("span.value", signed(delta))))));
    };
    if (!OBSERVED.at("risers", m)?.length && !OBSERVED.at("fallers", m)?.length) return null;
    return h("section", h("h4", "In the vocabulary here ", h("span.unit", "nats per unit lr")), h("div.two", list("risers", "rise"), list("fallers", "fall")));
  }

  function empty() {
    const weights = Array.from({ length: UPDATED.size }, (_, l) => gNorm(l));
    const hardest = strongest(weights);
    return [
      h("h3", "Selected token"),
      h("p.note", "Nothing is selected. Click a token in either text, or walk there with Tab and the arrow keys. Hovering shows its numbers; Esc clears."),
      h("p.note", "Good places to start:"),
      h("ul.starts",
        MOST_MOVED >= 0 && h("li", pick("observed", MOST_MOVED, ["the observed token that moved most, ", tokenText(OBSERVED.token(MOST_MOVED), { limit: 20 })])),
        hardest >= 0 && h("li", pick("updated", hardest, ["the update token with the largest gradient, ", tokenText(UPDATED.token(hardest), { limit: 20 })]))),
    ];
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
    const clear = () => h("button.clear", { type: "button", "aria-label": "Clear the selection", onclick: () => select(null) }, "clear");
    bar.append(h("span.kind", side === "observed" ? "observed" : "update"), tokenText(of.token(index), { limit: 24 }), h("span.where", of.place(index)), clear());
    const rows = tokenFacts(side, index);
    if (partner >= 0) rows.unshift([side === "observed" ? "F from the marked cell" : "F", `${signed(force(index, partner))} nats per unit lr`]);
    root.replaceChildren(...[
      h("h3", h("span.kind", side === "observed" ? "Observed" : "Update"), " ", tokenText(of.token(index), { limit: 40 })),
      h("p.place", of.place(index)),
      facts(rows),
      MATRIX && (side === "observed" ? partners("updated", forcesOn(index), 6, "Who moved it") : partners("observed", forcesOf(index), 8, "Whom it moved")),
      side === "observed" && words(index),
    ].filter(Boolean));
    root.scrollTop = 0;
  }
  follow(draw);
}
