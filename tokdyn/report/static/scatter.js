// Predicted against actual, and how the residual falls with the learning rate. Plain SVG.
// Scatter is one function, since what it nests shares the axes and the points as methods share a class.

function Scatter() {
  const root = document.querySelector("#verify .check");
  const points = Array.from({ length: OBSERVED.size }, (_, m) => ({
    m,
    x: OBSERVED.at("predicted", m),
    y: OBSERVED.at("actual", m),
  })).filter(({ x, y }) => finite(x) && finite(y));
  const verify = RUN.verify || {};
  if (!points.length) {
    root.append(
      h(
        "p.empty",
        anyMove("predicted")
          ? "This run did not take the real step, so the prediction is unchecked. Profile again with verification to fill this in."
          : "There is no prediction to check.",
      ),
    );
    return;
  }
  const roles = [...new Set(OBSERVED.sequences.map((sequence) => sequence.role))];
  const [W, H, B] = [560, 440, 46];
  let [low, high] = [
    Math.min(0, ...points.flatMap(({ x, y }) => [x, y])),
    Math.max(0, ...points.flatMap(({ x, y }) => [x, y])),
  ];
  if (low === high) [low, high] = [-1, 1];
  const pad = 0.05 * (high - low);
  [low, high] = [low - pad, high + pad];
  const ticks = roundTicks(low, high, 7);
  const L = labelWidth(ticks.map((v) => tick(v)));
  const px = (v) => L + ((v - low) / (high - low)) * (W - L - 12);
  const py = (v) => 12 + ((high - v) / (high - low)) * (H - B - 12);
  const dots = SVG(
    "g",
    {},
    points.map(({ m, x, y }) => dot(px(x), py(y), roles.indexOf(OBSERVED.sequence(m).role))),
  );
  const ring = SVG("circle", { class: "ring", r: 8, visibility: "hidden" });
  const hover = SVG("circle", { class: "ring hover", r: 8, visibility: "hidden" });
  const clip = SVG("rect", { class: "plot-frame", x: L, y: 12, width: W - L - 12, height: H - B - 12 });
  const svg = SVG(
    "svg",
    {
      viewBox: `0 0 ${W} ${H}`,
      role: "img",
      "aria-label": `Predicted against actual change of ${points.length} observed tokens`,
    },
    clip,
    ticks.map((v) => [
      SVG("line", { class: v === 0 ? "zero" : "grid", x1: px(v), x2: px(v), y1: 12, y2: H - B }),
      SVG("line", { class: v === 0 ? "zero" : "grid", x1: L, x2: W - 12, y1: py(v), y2: py(v) }),
      SVG("text", { class: "tick", x: px(v), y: H - B + 16, "text-anchor": "middle" }, tick(v)),
      SVG("text", { class: "tick", x: L - 7, y: py(v) + 4, "text-anchor": "end" }, tick(v)),
    ]),
    SVG("line", { class: "identity", x1: px(low), y1: py(low), x2: px(high), y2: py(high) }),
    dots,
    hover,
    ring,
    SVG(
      "text",
      { class: "axis-title", x: (L + W - 12) / 2, y: H - 8, "text-anchor": "middle" },
      `predicted change, ${WATCHED.unit} after the step`,
    ),
    SVG(
      "text",
      { class: "axis-title", transform: `translate(14 ${(12 + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" },
      `actual change, ${WATCHED.unit} after the step`,
    ),
  );

  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const k = W / box.width;
    const [x, y] = [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
    let best = null;
    for (const point of points) {
      const d = (px(point.x) - x) ** 2 + (py(point.y) - y) ** 2;
      if (d < 400 && (!best || d < best.d)) best = { ...point, d };
    }
    return best;
  };
  const place = (node, point) => {
    set(node, "visibility", point ? "visible" : "hidden");
    if (point) {
      set(node, "cx", px(point.x));
      set(node, "cy", py(point.y));
    }
  };
  svg.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    place(hover, point);
    if (point) showTip(event.clientX, event.clientY, tokenTip("observed", point.m));
    else hideTip();
  });
  svg.addEventListener("pointerleave", () => {
    place(hover, null);
    hideTip();
  });
  svg.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point) select("observed", point.m);
  });

  root.append(
    h(
      "figure.scatter",
      svg,
      h(
        "figcaption",
        roles.length > 1 ? roles.map((role, k) => h("span.key", keyMark(k), role)) : null,
        h(
          "span.key",
          SVG(
            "svg",
            { class: "key-mark", viewBox: "0 0 22 12" },
            SVG("line", { class: "identity", x1: 0, x2: 22, y1: 6, y2: 6 }),
          ),
          "predicted = actual",
        ),
      ),
    ),
    h("div.verdict", verdict(points, verify), residuals(verify)),
  );
  follow(() => place(ring, state.side === "observed" ? points.find(({ m }) => m === state.index) : null));
}

/** Roles differ by shape and colour. */
function dot(x, y, k) {
  const at = { class: `dot role-${k % 3}` };
  if (k % 3 === 0) return SVG("circle", { ...at, cx: x, cy: y, r: 3.2 });
  if (k % 3 === 1)
    return SVG("path", { ...at, d: `M${x} ${y - 4.4}L${x + 4.4} ${y}L${x} ${y + 4.4}L${x - 4.4} ${y}Z` });
  return SVG("path", { ...at, d: `M${x} ${y - 4}L${x + 4} ${y + 3.4}L${x - 4} ${y + 3.4}Z` });
}
const keyMark = (k) => SVG("svg", { class: "key-mark", viewBox: "0 0 12 12" }, dot(6, 6, k));

function verdict(points, verify) {
  const xy = points.reduce((sum, { x, y }) => sum + x * y, 0);
  const xx = points.reduce((sum, { x }) => sum + x * x, 0);
  const slope = finite(verify.linearity) ? verify.linearity : xx ? xy / xx : null;
  const rms = Math.sqrt(points.reduce((sum, { x, y }) => sum + (y - x) ** 2, 0) / points.length);
  const size = Math.sqrt(points.reduce((sum, { y }) => sum + y * y, 0) / points.length);
  const order = verify.order;
  const good = finite(order) && order >= 1.8 && order <= 2.2;
  return h(
    "dl.big",
    h(
      "div",
      h("dt", "Slope"),
      h("dd", number(slope)),
      h("dd.say", "1 means the step moved tokens exactly as far as the forces say."),
    ),
    h(
      "div",
      h("dt", "Residual order"),
      h("dd", number(order)),
      h(
        "dd.say",
        finite(order)
          ? good
            ? `Halving η divides the error by ${number(2 ** order, 2)}: what is left is second order, as it must be when the forces are exact.`
            : "Exact forces leave an error of order 2 in η. This is not close to 2: rounding at a small η, or a step too large for a first-order prediction."
          : "Not measured.",
      ),
    ),
    h(
      "div",
      h("dt", "Typical error"),
      h("dd", number(rms), h("span.unit", ` ${WATCHED.unit}`)),
      h(
        "dd.say",
        `root mean square over ${plural(points.length, "token")}${size ? `, ${percent(rms / size)} of a typical change of ${number(size)} ${WATCHED.unit}` : ""}.`,
      ),
    ),
  );
}

/** Residual against learning rate on log axes, with a line of slope two through the largest. */
function residuals({ etas, residuals: errors }) {
  const points = (etas || [])
    .map((eta, k) => [eta, (errors || [])[k]])
    .filter(([x, y]) => finite(x) && finite(y) && x > 0 && y > 0);
  if (points.length < 2) return null;
  const [W, H, B] = [380, 190, 40];
  const logs = points.map(([x, y]) => [Math.log10(x), Math.log10(y)]);
  const [x0, x1] = [Math.min(...logs.map((p) => p[0])), Math.max(...logs.map((p) => p[0]))];
  const last = logs.reduce((a, b) => (b[0] > a[0] ? b : a));
  const ys = [...logs.map((p) => p[1]), last[1] - 2 * (last[0] - x0)];
  const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const L = labelWidth([y0, y1].map((v) => number(10 ** v, 2)));
  const px = (v) => L + 12 + ((v - x0) / (x1 - x0 || 1)) * (W - L - 36);
  const py = (v) => 14 + ((y1 - v) / (y1 - y0 || 1)) * (H - B - 28);
  return h(
    "figure.residuals",
    SVG(
      "svg",
      { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Residual against learning rate" },
      SVG("rect", { class: "plot-frame", x: L, y: 4, width: W - L - 8, height: H - B - 8 }),
      points.map(([eta], k) =>
        SVG("text", { class: "tick", x: px(logs[k][0]), y: H - B + 12, "text-anchor": "middle" }, tick(eta)),
      ),
      [y0, y1].map((v) =>
        SVG("text", { class: "tick", x: L - 6, y: py(v) + 4, "text-anchor": "end" }, number(10 ** v, 2)),
      ),
      SVG("line", {
        class: "identity",
        x1: px(x0),
        x2: px(last[0]),
        y1: py(last[1] - 2 * (last[0] - x0)),
        y2: py(last[1]),
      }),
      logs.map(([x, y]) => SVG("circle", { class: "dot role-0", cx: px(x), cy: py(y), r: 3.6 })),
      SVG(
        "text",
        { class: "axis-title", x: (L + W - 8) / 2, y: H - 6, "text-anchor": "middle" },
        "learning rate η (log)",
      ),
      SVG(
        "text",
        { class: "axis-title", transform: `translate(12 ${(H - B) / 2}) rotate(-90)`, "text-anchor": "middle" },
        `residual, ${WATCHED.unit} (log)`,
      ),
    ),
    h("figcaption", "The dashed line falls with η². Points on it are second-order residuals."),
  );
}
