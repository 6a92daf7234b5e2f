// The selected token: its numbers, the tokens at the other end of its strongest forces, its risers and fallers.
// Inspector is one function, since what it nests shares the panel and its way to the texts as methods share a class.

function Inspector(showInPanel) {
  const root = byId("inspector");
  const bar = byId("selection");

  /** Bars for forces at the other end of the selected token, [index, force, label] each, and a note under them. */
  function ranking(title, side, entries, note) {
    const top = Math.max(...entries.map(([, value]) => Math.abs(value))) || 1;
    const of = sideOf(side);
    return h(
      "section",
      h("h4", title, " ", h("span.unit", unitName())),
      entries.length
        ? h(
            "ol.ranking",
            entries.map(([i, value, name, where]) =>
              row(
                side,
                i,
                [tokenText(name ?? of.token(i), { limit: 14 }), h("span.where", where ?? of.sequence(i).name)],
                value,
                top,
              ),
            ),
          )
        : h("p.note", "No force was computed."),
      note && entries.length ? h("p.note", note) : null,
    );
  }

  const sizes = (list) => list.reduce((sum, [, value]) => sum + Math.abs(value), 0);

  /** Who moved observed token m: other contexts net, its own apart; or single update tokens. */
  function movers(m) {
    if (!VIEW.net && MATRIX) {
      const values = forcesOn(m);
      const list = largest(values, 6).map((l) => [l, values[l]]);
      const total = values.filter(finite).reduce((sum, value) => sum + Math.abs(value), 0);
      return ranking("Who moved it", "updated", list, `${percent(sizes(list) / total)} of all force on this token.`);
    }
    const { list, size } = netPartners(m, 6);
    const own = netOwn(m);
    const entries = list.map(([x, value]) => [
      CONTEXT_LIST[x].members[0],
      value,
      CONTEXTS.token(x),
      CONTEXTS.sequence(x).name,
    ]);
    if (own !== null) {
      const x = OWN_CONTEXT[m];
      entries.unshift([CONTEXT_LIST[x].members[0], own, CONTEXTS.token(x), "itself"]);
    }
    const share = size ? `${percent(sizes(list) / size)} of all net force on this token from elsewhere.` : null;
    return ranking("Who moved it, net", "updated", entries, share);
  }

  /** Whom update token l moved: net with all that stands behind the same text, or by itself. */
  function moved(l) {
    if (!VIEW.net && MATRIX) {
      const values = forcesOf(l);
      const list = largest(values, 8).map((m) => [m, values[m]]);
      const total = values.filter(finite).reduce((sum, value) => sum + Math.abs(value), 0);
      return ranking("Whom it moved", "observed", list, `${percent(sizes(list) / total)} of all force from this token.`);
    }
    const { list } = netReach(CONTEXT_OF[l]);
    const together = CONTEXT_LIST[CONTEXT_OF[l]].members.length;
    const note =
      together > 1 ? `Net of the ${together} update tokens behind the same text; its own place is left out.` : null;
    return ranking("Whom it moved, net", "observed", list, note);
  }

  function words(m) {
    const list = (name, title) => {
      const items = (OBSERVED.at(name, m) || []).slice(0, 4);
      return h(
        "div",
        h("h5", title),
        h(
          "ul.words-short",
          items.map(([text, delta]) =>
            h("li", tokenText(text, { limit: 14 }), " ", h("span.value", signed(inUnit(delta)))),
          ),
        ),
      );
    };
    if (!OBSERVED.at("risers", m)?.length && !OBSERVED.at("fallers", m)?.length) return null;
    return h(
      "section",
      h("h4", "In the vocabulary here ", h("span.unit", unitName())),
      h("div.two", list("risers", "rise"), list("fallers", "fall")),
    );
  }

  /** With nothing selected: how to select, and the ends worth starting from. */
  function empty() {
    const moves = Array.from({ length: OBSERVED.size }, (_, m) => MOVES[BEST_MOVE](m));
    const first = largest(moves, 6);
    const strong = HAS_FORCES ? strongestCells() : [];
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
            h("h4", "Moved most ", h("span.unit", `${BEST_MOVE}, ${unitName()}`)),
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
            h("h4", VIEW.net ? "Strongest net forces " : "Strongest single forces ", h("span.unit", unitName())),
            h(
              "ol.ranking",
              strong.map(([m, l, value, who, where]) =>
                row(
                  "observed",
                  m,
                  [
                    tokenText(who, { limit: 10 }),
                    h("span.where", `${where} on`),
                    tokenText(OBSERVED.token(m), { limit: 10 }),
                    h("span.where", OBSERVED.sequence(m).name),
                  ],
                  value,
                  top(strong.map((cell) => cell[2])),
                  l,
                ),
              ),
            ),
          )
        : null,
    ].filter(Boolean);
  }

  /** One line of a ranking: who, a bar, a number; it selects. */
  function row(side, i, who, value, top, partner = null) {
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
        h(`span.who${who.length > 2 ? ".pair" : ""}`, who),
        h(`span.bar.${value > 0 ? "up" : "down"}`, { "--size": `${(100 * Math.abs(value)) / top}%` }),
        h("span.value", signed(value)),
      ),
    );
  }

  /** The six largest forces as [m, l, force, who, where]: net of what cancels where the page shows net forces, as the findings do. */
  function strongestCells() {
    if (VIEW.net || !MATRIX)
      return RUN.headline.map(([m, contexts, rate]) => {
        const of = (facet) => [...new Set(contexts.map(facet))];
        const who = of((x) => CONTEXTS.token(x));
        const where = of((x) => CONTEXTS.sequence(x).name).join(", ");
        const first = CONTEXT_LIST[contexts[0]].members[0];
        return [m, first, inUnit(rate), who.length > 1 ? who.map((text) => label(text)).join("/") : who[0], where];
      });
    const best = [];
    for (let m = 0; m < OBSERVED.size; m += 1)
      for (let l = 0; l < UPDATED.size; l += 1) {
        const size = Math.abs(tokenForce(m, l));
        if (!(size > 0) || (best.length === 6 && size <= Math.abs(best[5][2]))) continue;
        best.push([m, l, tokenForce(m, l), UPDATED.token(l), UPDATED.sequence(l).name]);
        best.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
        best.length = Math.min(6, best.length);
      }
    return best;
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
    const token = (of, i) => tokenText(of.token(i), { limit: 24 });
    const between = forceBetween();
    bar.append(h("span.kind", side === "observed" ? "observed" : "update"), token(of, index));
    if (partner < 0) bar.append(h("span.where", of.place(index)));
    else bar.append(h("span.kind", side === "observed" ? "from" : "on"), token(sideOf(otherSide(side)), partner));
    if (between) bar.append(h("b", between.split(" ")[0]));
    bar.append(clear());
    const rows = tokenFacts(side, index);
    if (between) {
      const name = `${label(sideOf(otherSide(side)).token(partner), 16)}, ${sideOf(otherSide(side)).place(partner)}`;
      rows.unshift([`${VIEW.net ? "net force" : "force"} ${side === "observed" ? "from" : "on"} ${name}`, between]);
    }
    root.replaceChildren(
      ...[
        h(
          "h3",
          h("span.kind", side === "observed" ? "Observed" : "Update"),
          " ",
          tokenText(of.token(index), { limit: 40 }),
        ),
        h("p.place", of.place(index)),
        partner >= 0 && side === "observed" && WhyCard(index, partner),
        facts(rows),
        HAS_FORCES && (side === "observed" ? movers(index) : moved(index)),
        side === "observed" && words(index),
      ].filter(Boolean),
    );
    root.scrollTop = 0;
  }
  follow(draw);
}
