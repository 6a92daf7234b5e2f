// Put the page together. Everything draws here once, and again when the theme or what is switched off changes.

loadTheme();
let dashed = true;

function curves() {
  const shown = TYPES.filter((type) => !hidden.has(type.name));
  const style = (type) => ({ name: say(type.name), colour: type.colour, dash: type.dash });
  const predicted = shown.map((type) => ({
    ...style(type),
    dash: "3 3",
    faint: true,
    unlabelled: true,
    tip: `${say(type.name)}, predicted`,
    points: points(RUN.probe.steps, type.path),
  }));
  LineChart(document.querySelector("#curves .actual"), {
    title: "Mean log-probability of a token",
    series: [...(dashed ? predicted : []), ...shown.map((type) => ({ ...style(type), points: actualPath(type) }))],
    yTitle: "nats per token",
    unit: "nats",
  });
  LineChart(document.querySelector("#curves .argmax"), {
    title: "The model's own first choice in the same places",
    series: shown.map((type) => ({
      ...style(type),
      points: points(
        RUN.probe.steps.map((step) => step - 1),
        type.argmax,
      ),
    })),
    yTitle: "mean log-probability, nats",
    unit: "nats",
  });
}

function switches() {
  if (!TYPES.length) return;
  const flip = (name) => (on) => {
    if (on) hidden.delete(name);
    else hidden.add(name);
    curves();
    StepScatter(document.querySelector("#prediction .changes"));
  };
  document.querySelector("#curves .controls").append(
    ...TYPES.map((type) => toggle(say(type.name), true, flip(type.name))),
    toggle("predictions (dashed)", dashed, (on) => {
      dashed = on;
      curves();
    }),
  );
  document
    .querySelector("#curves .kinds")
    .append(
      ...TYPES.filter((type) => KINDS[type.name]).map((type) =>
        h("div", h("dt", { "--colour": type.colour }, say(type.name)), h("dd", `${KINDS[type.name]}, ${plural(type.sequences, "answer")}`)),
      ),
    );
}

function balance() {
  const { step, force, force_up_share: share, squeezing } = RUN.steps;
  const part = (of) => points(step, force.map((value, k) => (finite(value) && finite(share[k]) ? of(value, share[k]) : null)));
  LineChart(document.querySelector("#balance .sizes"), {
    title: "Size of the loss's pull up and push down",
    series: [
      { name: "pull up", colour: "var(--up)", points: part((value, up) => value * up) },
      { name: "push down", colour: "var(--down)", points: part((value, up) => -value * (1 - up)) },
    ].filter((s) => s.points.some(([, y]) => y)),
    yTitle: "Σ‖G‖, loss per logit",
    zero: true,
    areas: true,
    format: signed,
  });
  LineChart(document.querySelector("#balance .squeezing"), {
    title: "Squeezing index",
    series: [{ name: "index", colour: "var(--role-1)", points: points(step, squeezing), unlabelled: true, tip: "squeezing index" }],
    yTitle: "share of the push, 0 to 1",
    zero: true,
  });
}

function prediction() {
  StepScatter(document.querySelector("#prediction .changes"));
  LineChart(document.querySelector("#prediction .linearity"), {
    title: "Actual over predicted change of the whole probe",
    series: [{ name: "ratio", colour: "var(--role-0)", points: points(RUN.steps.step, RUN.steps.linearity), unlabelled: true }],
    yTitle: "ratio",
    level: 1,
  });
}

switches();
curves();
Pushes();
TokenMaps();
balance();
prediction();

const repaint = (name) => {
  loadTheme(name);
  redraw();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint());
addEventListener("beforeprint", () => repaint("light"));
addEventListener("afterprint", () => repaint());
addEventListener("scroll", hideTip, { passive: true });
