// The answers as running text: every token a button, its background the quantity chosen above the panel.
// AnswerPanel is one function, since what it nests shares the panel's tokens and its choice of quantity as methods share a class.

const WHAT = WATCHED.label === "log-probability" ? "log π(m)" : `the ${WATCHED.label} at m`;
const MEASURES = {
  observed: {
    actual: { name: "Actual", what: `Actual change of ${WHAT}`, unit: unitName, value: MOVES.actual },
    predicted: { name: "Predicted", what: `Predicted change of ${WHAT}, Σ F`, unit: unitName, value: MOVES.predicted },
  },
  updated: {
    g: {
      name: "±‖G‖",
      what: "Gradient ‖G‖: blue pulls up, orange pushes down",
      unit: () => "loss per logit",
      value: (l) => (gNorm(l) === null ? null : Math.sign(UPDATED.at("c", l)) * gNorm(l)),
    },
    c: {
      name: "Weight c",
      what: "Weight c: blue pulls up, orange pushes down",
      unit: () => "loss per nat",
      value: (l) => UPDATED.at("c", l),
    },
  },
};

function AnswerPanel(side) {
  const of = sideOf(side);
  const root = byId(side);
  const [controls, legendNode, texts] = ["controls", "legend", "texts"].map((name) => root.querySelector(`.${name}`));
  const measures = MEASURES[side];
  const all = (measure) => Array.from({ length: of.size }, (_, i) => measure.value(i));
  const available = Object.keys(measures).filter((key) => all(measures[key]).some(finite));
  const usual = side === "observed" ? BEST_MOVE : available[0] || "c";
  const asked = addressed(side === "observed" ? "shown" : "weights", () => (chosen === usual ? null : chosen));
  let chosen = available.includes(asked) ? asked : usual;
  let painted = { values: [], unit: "" };
  const nodes = [];

  controls.append(
    choice(
      `Colour of ${side} tokens`,
      Object.keys(measures).map((key) => [key, measures[key].name, !available.includes(key)]),
      chosen,
      (key) => {
        chosen = key;
        writeAddress();
        if (pinned(otherSide(side)) >= 0) select(null);
        else paint();
      },
    ),
  );

  of.sequences.forEach((sequence, s) => {
    const response = h("p.response", { role: "group", "aria-label": `${sequence.name}, response` });
    for (let i = sequence.start; i < sequence.stop; i += 1) {
      const node = tokenText(of.token(i), { flow: true, limit: 200 });
      node.className = "token";
      node.removeAttribute("title");
      set(node, "role", "button");
      node.tabIndex = i === 0 ? 0 : -1;
      node.dataset.i = i;
      nodes.push(node);
      response.append(node);
    }
    texts.append(
      h(
        "article.sequence",
        { "data-s": s },
        h(
          "p.caption",
          h("span.name", sequence.name),
          h("span.count", plural(sequence.stop - sequence.start, "token")),
          h("span.net"),
        ),
        sequence.prompt && promptText(sequence.prompt),
        response,
        sequence.truncated > 0 && h("p.note", `${plural(sequence.truncated, "token")} cut off to fit.`),
      ),
    );
  });
  if (!of.size) texts.append(h("p.note", "No tokens on this side."));

  function shown() {
    const other = pinned(otherSide(side));
    if (other >= 0 && HAS_FORCES) {
      const from = side === "observed" ? forcesOf(other) : forcesOn(other);
      const name = [...label(sideOf(otherSide(side)).token(other), 16)].join("");
      return {
        values: from,
        what: `${VIEW.net || !MATRIX ? "Net force" : "Force"} ${side === "observed" ? "from" : "on"} “${name}”${MATRIX ? "" : ", the strongest"}`,
        unit: unitName(),
        isForce: true,
      };
    }
    return { ...measures[chosen], unit: measures[chosen].unit(), values: all(measures[chosen]) };
  }

  function paint() {
    const { values, what, unit, isForce } = (painted = shown());
    const known = values.some(finite);
    root.classList.toggle("by-force", Boolean(isForce));
    const scale = Scale(values);
    if (known) legend(legendNode, scale, what, unit);
    else noLegend(legendNode, side === "observed" ? "No change was computed." : "No weights were kept.");
    nodes.forEach((node, i) => {
      const { background, color } = finite(values[i]) ? scale.paint(values[i]) : { background: "", color: "" };
      node.style.background = background;
      node.style.color = color;
      node.classList.toggle("unknown", known && !finite(values[i]));
      const chosenToken = state.side === side && state.index === i;
      node.classList.toggle("selected", chosenToken);
      const partner = state.side !== side && state.partner >= 0 && samePlace(side, state.partner, i);
      node.classList.toggle("partner", partner);
      node.setAttribute("aria-pressed", i === pinned(side));
    });
    for (const article of texts.querySelectorAll(".sequence")) {
      const { start, stop } = of.sequences[+article.dataset.s];
      const part = values.slice(start, stop).filter(finite);
      const sum = part.reduce((a, b) => a + b, 0);
      const same = part.length && part.every((value) => Math.abs(value - part[0]) <= 1e-5 * Math.abs(part[0]));
      const net = article.querySelector(".net");
      const counted = side === "updated" && isForce && (VIEW.net || !MATRIX); // a net column lies in several sequences
      if (!part.length || counted) net.textContent = "";
      else if (side === "updated" && !isForce)
        net.textContent =
          chosen === "c"
            ? same
              ? `c = ${signed(part[0])} each`
              : `Σ c = ${signed(sum)}`
            : `mean ‖G‖ ${number(part.reduce((a, b) => a + Math.abs(b), 0) / part.length)}`;
      else net.textContent = `Σ ${signed(sum)} ${WATCHED.unit}${VIEW.unit === "step" ? "" : " per lr"}`;
    }
  }

  const tokenAt = (event) => event.target.closest?.(".token");
  texts.addEventListener("click", (event) => {
    const node = tokenAt(event);
    if (!node) return;
    rove(nodes, nodes.indexOf(node), false);
    select(side, +node.dataset.i);
  });
  texts.addEventListener("pointermove", (event) => {
    const node = tokenAt(event);
    if (node) showTip(event.clientX, event.clientY, tokenTip(side, +node.dataset.i));
    else hideTip();
  });
  texts.addEventListener("pointerleave", hideTip);
  texts.addEventListener("focusin", (event) => {
    const node = tokenAt(event);
    if (!node?.matches(":focus-visible")) return;
    const box = node.getBoundingClientRect();
    showTip(box.left, box.bottom - 10, tokenTip(side, +node.dataset.i));
    const value = painted.values[+node.dataset.i];
    say(`${describe(side, +node.dataset.i)}: ${finite(value) ? `${signed(value)} ${painted.unit}` : "no value"}`);
  });
  texts.addEventListener("focusout", hideTip);
  texts.addEventListener("scroll", hideTip);
  texts.addEventListener("keydown", (event) => {
    const node = tokenAt(event);
    if (!node) return;
    const i = +node.dataset.i;
    const s = of.sequenceOf(i);
    const jump = (to) => of.sequences[Math.max(0, Math.min(of.sequences.length - 1, to))].start;
    const target = {
      ArrowRight: i + 1,
      ArrowLeft: i - 1,
      ArrowDown: jump(s + 1),
      ArrowUp: jump(i > of.sequences[s].start ? s : s - 1),
      Home: of.sequences[s].start,
      End: of.sequences[s].stop - 1,
    }[event.key];
    if (event.key === "Enter" || event.key === " ") select(side, i);
    else if (target !== undefined) rove(nodes, Math.max(0, Math.min(of.size - 1, target)), true);
    else return;
    event.preventDefault();
  });
  follow(paint);

  /** Bring a token into view inside the panel without moving the page, and put the keyboard there. */
  return (i) => {
    const node = nodes[i];
    rove(nodes, i, false);
    node.focus({ preventScroll: true });
    const [box, frame] = [node.getBoundingClientRect(), texts.getBoundingClientRect()];
    if (box.top < frame.top || box.bottom > frame.bottom) texts.scrollTop += box.top - frame.top - frame.height / 3;
  };
}

/** Whether token i is the one marked, or, of net forces, an update token behind the same text. */
const samePlace = (side, marked, i) =>
  marked === i || (side === "updated" && VIEW.net && CONTEXT_OF[marked] === CONTEXT_OF[i]);

/** One tab stop per panel: the arrow keys move it. */
function rove(nodes, index, focus) {
  for (const node of nodes) if (node.tabIndex === 0) node.tabIndex = -1;
  nodes[index].tabIndex = 0;
  if (focus) nodes[index].focus();
}

/** A prompt, muted; a long one shows its two ends until asked for all of it. */
function promptText(text) {
  const characters = [...text];
  const whole = () => tokenText(text.trim(), { flow: "line" });
  if (characters.length <= 300) return h("p.prompt", whole());
  const node = h(
    "p.prompt",
    tokenText(characters.slice(0, 140).join(""), { flow: "line" }),
    h("button.more", `… ${grouped(characters.length - 260)} more characters …`, {
      type: "button",
      onclick: () => node.replaceChildren(whole()),
    }),
    tokenText(characters.slice(-120).join(""), { flow: "line" }),
  );
  return node;
}
