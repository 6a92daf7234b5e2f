// Put the page together. Every part draws once here, before the first paint, and again when the theme changes.

loadTheme();
selectFromAddress();
if (addressed("unit", () => (ETA !== null && VIEW.unit === "rate" ? "rate" : null)) === "rate") VIEW.unit = "rate";
if (addressed("net", () => (VIEW.net ? null : "0")) === "0" && MATRIX) VIEW.net = false;
byId("switches").append(
  ...[
    HAS_FORCES &&
      MATRIX &&
      choice(
        "Forces",
        [
          [true, "net"],
          [false, "token by token"],
        ],
        VIEW.net,
        (net) => {
          VIEW.net = net;
          writeAddress();
          redraw();
        },
      ),
    choice(
      "Unit",
      [
        ["step", "after the step", ETA === null],
        ["rate", "per unit lr"],
      ],
      VIEW.unit,
      (unit) => {
        VIEW.unit = unit;
        writeAddress();
        redraw();
      },
    ),
    copyLink(),
  ].filter(Boolean),
);
const showInPanel = { observed: AnswerPanel("observed"), updated: AnswerPanel("updated") };
Inspector(showInPanel);
HeatMap();
Bars();
Scatter();
Vocabulary();
Squeeze();
exportsOf("answers", { rows: answerRows, some: OBSERVED.size + UPDATED.size > 0 });
exportsOf("forces", { rows: forceRows, some: MATRIX, canvas: () => document.querySelector("#forces canvas") });
const tables = (id) => [...document.querySelectorAll(`#${id} table`)];
const tableOf = (id) => exportsOf(id, { rows: () => tables(id).flatMap(tableRows), some: tables(id).length });
tableOf("numbers");
exportsOf("verify", { rows: changeRows, some: anyMove("actual"), svg: () => document.querySelector("#verify .scatter svg") });
tableOf("vocabulary");
tableOf("squeezing");

const redraw = () => redrawers.forEach((again) => again());
watchers.forEach((watch) => watch());
if (state.side) {
  showInPanel[state.side](state.index);
  hideTip();
  byId("answers").scrollIntoView();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  loadTheme();
  redraw();
});
addEventListener("beforeprint", () => {
  loadTheme("light");
  redraw();
});
addEventListener("afterprint", () => {
  loadTheme();
  redraw();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    hideTip();
    if (state.side) select(null);
  }
});
for (const link of document.querySelectorAll(".findings a.pair"))
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const pair = new URLSearchParams(link.hash.slice(1));
    select("observed", Number(pair.get("m")), Number(pair.get("l")));
    showInPanel.observed(state.index);
    byId("answers").scrollIntoView();
  });
addEventListener("scroll", hideTip, { passive: true });
