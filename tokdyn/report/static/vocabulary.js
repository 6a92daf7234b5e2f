// Risers and fallers of one observed token, the one selected or else the one that moved most.
// Vocabulary is one function, since what it nests shares the section's nodes as methods share a class.

function Vocabulary() {
  const root = document.querySelector("#vocabulary .words");
  const has = (m) => OBSERVED.at("risers", m)?.length || OBSERVED.at("fallers", m)?.length;
  const known = Array.from({ length: OBSERVED.size }, (_, m) => m).filter(has);
  if (!known.length) {
    root.append(h("p.empty", "Risers and fallers were not computed for this run."));
    return;
  }
  if (!has(state.focus)) state.focus = known[0];
  const head = h("p.words-head");
  const tables = h("div.word-tables");
  const menu = dropdown(
    "Observed token",
    known.map((m) => [
      m,
      `${OBSERVED.place(m)}: ${label(OBSERVED.token(m), 24)}`,
    ]),
    state.focus,
    (value) => select("observed", +value),
  );
  const step = (text, name, by) =>
    h("button", text, {
      type: "button",
      "aria-label": name,
      title: name,
      onclick: () => {
        const at = known.indexOf(state.focus);
        const next = known[at < 0 ? 0 : (at + by + known.length) % known.length];
        select("observed", next);
      },
    });
  root.append(
    h("div.controls", menu, step("‹", "Previous observed token", -1), step("›", "Next observed token", 1)),
    head,
    tables,
  );

  function context(m) {
    const { start } = OBSERVED.sequence(m);
    const from = Math.max(start, m - 12);
    let text = "";
    for (let i = from; i < m; i += 1) text += OBSERVED.token(i);
    if (m === start) return h("span.context", "the response begins ");
    return h("span.context", from > start ? "…" : "", tokenText(text.trimStart(), { flow: true }));
  }

  function column(title, items, top) {
    return h(
      "table.word-table",
      h("caption", title),
      h(
        "thead",
        h(
          "tr",
          h("th", { scope: "col" }, "token"),
          h("th", { scope: "col", colspan: 2 }, "change ", h("span.unit", unitName())),
          ETA !== null && h("th", { scope: "col" }, "probability after η"),
        ),
      ),
      h(
        "tbody",
        items.length
          ? items.map(([text, delta]) =>
              h(
                "tr",
                h("th", { scope: "row" }, tokenText(text, { limit: 28 })),
                h(
                  "td.wide",
                  h(
                    "span.track",
                    h(`span.fill.${delta > 0 ? "up" : "down"}`, {
                      "--from": "0%",
                      "--size": `${(100 * Math.abs(delta)) / top}%`,
                    }),
                  ),
                ),
                h("td.value", signed(inUnit(delta))),
                ETA !== null && h("td.value", `× ${number(Math.exp(ETA * delta))}`),
              ),
            )
          : h("tr", h("td", { colspan: 4 }, "none")),
      ),
    );
  }

  function draw() {
    const m = state.focus;
    menu.querySelector("select").value = m;
    const [risers, fallers] = [OBSERVED.at("risers", m) || [], OBSERVED.at("fallers", m) || []];
    const top = Math.max(1e-30, ...[...risers, ...fallers].map(([, delta]) => Math.abs(delta)).filter(finite));
    const move = MOVES[BEST_MOVE](m);
    head.replaceChildren(
      context(m),
      h("span.here", tokenText(OBSERVED.token(m), { limit: 60 })),
      h(
        "span.where",
        `${OBSERVED.place(m)}${finite(move) ? `, ${BEST_MOVE === "actual" ? "moved" : "predicted"} ${signed(move)} ${unitName()}` : ""}${m === MOST_MOVED ? "; the token that moved most" : ""}`,
      ),
    );
    tables.replaceChildren(
      ...(has(m)
        ? [column("Risers", risers, top), column("Fallers", fallers, top)]
        : [h("p.empty", "Not computed for this token.")]),
    );
  }
  follow(draw);
}
