// The training: curves per kind of response, figures per step, forces per token at a few steps.

const RUN = JSON.parse(byId("payload").textContent);

const KINDS = {
  chosen: "the answer that is trained up",
  chosen_initial: "what the model said before training",
  chosen_gptsemantic: "the chosen answer in other words",
  chosen_gptformat: "something else in the chosen answer's form",
  rejected: "the answer that is trained down",
  reject_gptsemantic: "the rejected answer in other words",
  reject_gptformat: "something else in the rejected answer's form",
  irr_train: "an answer to another prompt of the training set",
  irr_test: "an answer to another prompt, never trained on",
  irr_hum: "a sentence that answers nothing",
  random_permute: "the chosen answer's words in random order",
  random_nonhum: "random words",
};
const FAMILIES = ["chosen", "rejected", "irr", "random"]; // a colour each; within one, a dash each
const FAMILY = ["up", "down", "role-0", "role-1"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

const say = (name) => name.replaceAll("_", " ");

/** Colour, dash and name of every kind of response in the order of the run. */
const TYPES = (() => {
  const counts = {};
  return RUN.probe.types.map((type) => {
    const family = FAMILIES.findIndex((start) => type.name.startsWith(start.slice(0, 6)));
    const key = family < 0 ? "role-2" : FAMILY[family];
    counts[key] = (counts[key] || 0) + 1;
    return { ...type, colour: `var(--${key})`, dash: DASHES[(counts[key] - 1) % DASHES.length] };
  });
})();

const hidden = new Set(); // kinds of response that are switched off
const redrawers = [];
const redraw = () => redrawers.forEach((again) => again());

/** [x, y] where both are numbers. */
const points = (xs, ys) => xs.map((x, k) => [x, ys[k]]).filter(([x, y]) => finite(x) && finite(y));

/** The log-prob before the first probe step, then after each: a step that is not probed is joined by a straight line. */
function actualPath(type) {
  const path = [];
  RUN.probe.steps.forEach((step, k) => {
    if (finite(type.before[k])) path.push([step - 1, type.before[k]]);
    if (finite(type.after[k])) path.push([step, type.after[k]]);
  });
  return path.filter(([x], k) => !k || x > path[k - 1][0]);
}
