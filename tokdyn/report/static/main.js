// Put the page together. Every part draws once here, before the first paint, and again when the theme changes.

loadTheme();
selectFromAddress();
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
        redraw();
      },
    ),
  ].filter(Boolean),
);
const showInPanel = { observed: AnswerPanel("observed"), updated: AnswerPanel("updated") };
Inspector(showInPanel);
HeatMap();
Bars();
Scatter();
Vocabulary();
Squeeze();

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
addEventListener("scroll", hideTip, { passive: true });
