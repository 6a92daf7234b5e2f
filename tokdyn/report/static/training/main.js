// Put the page together. Everything draws here once, and again when the theme or what is switched off changes.

loadTheme();
let [predictions, fromStart] = [true, false];

function curves() {
  const shown = TYPES.filter((type) => !hidden.has(type.name));
  const style = (type) => ({ name: say(type.name), colour: type.colour, dash: type.dash });
  /** A path of one kind, or its change from where the kind began. */
  const seen = (type, path) => (fromStart && finite(type.before[0]) ? path.map(([x, y]) => [x, y - type.before[0]]) : path);
  const moved = (path) => (fromStart && path.length ? path.map(([x, y]) => [x, y - path[0][1]]) : path);
  const predicted = shown.map((type) => ({
    ...style(type),
    dash: "",
    faint: true,
    unlabelled: true,
    tip: `${say(type.name)}, predicted`,
    points: seen(type, points(RUN.probe.steps, type.path)),
  }));
  LineChart(document.querySelector("#curves .actual"), {
    title: `Mean ${RUN.watched.label} of a token`,
    series: [...(predictions ? predicted : []), ...shown.map((type) => ({ ...style(type), points: seen(type, actualPath(type)) }))],
    yTitle: `${fromStart ? "change, " : ""}${RUN.watched.unit} per token`,
    unit: RUN.watched.unit,
    level: fromStart ? 0 : null,
    format: fromStart ? signed : number,
  });
  LineChart(document.querySelector("#curves .argmax"), {
    title: "The model's own first choice in the same places",
    series: shown.map((type) => ({
      ...style(type),
      points: moved(
        points(
          RUN.probe.steps.map((step) => step - 1),
          type.argmax,
        ),
      ),
    })),
    yTitle: fromStart ? "change, nats" : "mean log-probability, nats",
    unit: "nats",
    level: fromStart ? 0 : null,
    format: fromStart ? signed : number,
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
    toggle("predictions (thin)", predictions, (on) => {
      predictions = on;
      curves();
    }),
    toggle("change from the start", fromStart, (on) => {
      fromStart = on;
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

/** One row for each kind and probe step: mean log-probs per token, and what was predicted of the step. */
function curveRows() {
  const rows = TYPES.flatMap((type) =>
    RUN.probe.steps.map((step, k) => [type.name, step, type.before[k], type.after[k], type.predicted[k], type.argmax[k]]),
  );
  return rows.length ? [["kind", "step", "before", "after", "predicted", "first_choice_before"], ...rows] : [];
}

/** One row for each recorded step, a column for each figure. */
function stepRows() {
  const names = Object.keys(RUN.steps);
  return RUN.steps.step.length ? [names, ...RUN.steps.step.map((_, k) => names.map((name) => RUN.steps[name][k]))] : [];
}

/** One row for each step and group of the probe, a column for each side of the update. */
function pushRows() {
  const { steps, roles, groups } = RUN.pushes;
  const rows = groups.flatMap((group) => steps.map((step, k) => [group.name, step, ...group.sums.map((row) => row[k])]));
  return rows.length ? [["on", "step", ...roles], ...rows] : [];
}

const chart = (figure) => () => document.querySelector(`${figure} svg`);
exportsOf("curves", { rows: curveRows, some: curveRows().length, svg: chart("#curves .actual") });
exportsOf("behind", { rows: pushRows, some: pushRows().length, svg: chart("#behind .pushes") });
exportsOf("balance", { rows: stepRows, some: stepRows().length, svg: chart("#balance .sizes") });
exportsOf("prediction", { rows: curveRows, some: curveRows().length, svg: chart("#prediction .changes") });

const repaint = (name) => {
  loadTheme(name);
  redraw();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint());
addEventListener("beforeprint", () => repaint("light"));
addEventListener("afterprint", () => repaint());
addEventListener("scroll", hideTip, { passive: true });
