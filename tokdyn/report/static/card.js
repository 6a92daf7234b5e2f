// The card of a marked cell: why the update moves this token there. Sentence and numbers were made with the run; see docs/explain.md.

const CARDS = new Map((RUN.cards || []).map((card) => [`${card.m} ${card.x}`, card]));

/** The card of observed token m and the context of update token l; null where the run kept none, or the page shows single tokens. */
function cardOf(m, l) {
  const x = CONTEXT_OF[l];
  const alone = CONTEXT_LIST[x].members.length === 1;
  return VIEW.net || alone || !MATRIX ? (CARDS.get(`${m} ${x}`) ?? null) : null;
}

/** The section of a cell. */
function WhyCard(m, l) {
  const card = cardOf(m, l);
  if (!card)
    return h(
      "section.why",
      h("h4", "Why"),
      h(
        "p.note",
        CARDS.size
          ? `The page holds why of its ${plural(CARDS.size, "strongest net force")} between different places; this is not one of them. The run holds more: tokdyn explain RUN "${OBSERVED.place(m)}" "${UPDATED.place(l)}"`
          : "This run kept no forces by layer and kind.",
      ),
    );
  const { readout, cosine, scalar } = card.kernel;
  return h(
    "section.why",
    h("h4", "Why"),
    h("p.sentence", card.sentence),
    bars("By layer", card.layers),
    bars("By kind", card.kinds),
    facts(
      [
        ["kernel F/⟨g, γ⟩", finite(scalar) ? number(scalar) : "not defined: ⟨g, γ⟩ is nearly 0"],
        ["h·h of the readout", number(readout)],
        ["cosine of the hidden states", number(cosine)],
        ["their sequences begin alike for", plural(card.prefix, "token")],
      ],
    ),
    h("dl.texts-side", h("dt", "observed"), h("dd", card.texts[0]), h("dt", "update"), h("dd", card.texts[1])),
  );
}

/** Parts as bars with their numbers, in the order of the model. */
function bars(title, parts) {
  const top = Math.max(...parts.map(([, rate]) => Math.abs(rate))) || 1;
  return h(
    "div",
    h("h5", title, " ", h("span.unit", unitName())),
    h(
      "ol.ranking",
      parts.map(([name, rate]) =>
        h(
          "li.row",
          h("span.who", name),
          h(`span.bar.${rate > 0 ? "up" : "down"}`, { "--size": `${(100 * Math.abs(rate)) / top}%` }),
          h("span.value", signed(inUnit(rate))),
        ),
      ),
    ),
  );
}
