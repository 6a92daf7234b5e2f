// Line charts and a scatter, as plain SVG. A series is {name, colour, dash, points: [[x, y], …], faint, unlabelled}.

const [CHART_W, CHART_H, CHART_T, CHART_B] = [620, 330, 10, 42];

/** A frame with axes; returns what draws inside it. */
function frame({ x: [x0, x1], y: [low, high], right, xTitle, yTitle, label }) {
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  const pad = 0.04 * (high - low);
  [low, high] = [low - (low === 0 ? 0 : pad), high + pad];
  const bottom = CHART_H - CHART_B;
  const ticks = (a, b, n) => {
    const at = roundTicks(a, b, n);
    const digits = at.length > 1 ? Math.ceil(Math.log10(Math.max(...at.map(Math.abs)) / (at[1] - at[0]) + 1e-9)) + 1 : 3;
    return at.map((v) => [v, tick(v, Math.max(3, Math.min(9, digits)))]);
  };
  const [across, up] = [ticks(x0, x1, 7), ticks(low, high, 5)];
  const left = labelWidth(up.map(([, text]) => text));
  const px = (v) => left + ((v - x0) / (x1 - x0)) * (CHART_W - left - right);
  const py = (v) => CHART_T + ((high - v) / (high - low)) * (bottom - CHART_T);
  const svg = SVG(
    "svg",
    { viewBox: `0 0 ${CHART_W} ${CHART_H}`, role: "img", "aria-label": label },
    SVG("rect", {
      class: "plot-frame",
      x: left,
      y: CHART_T,
      width: CHART_W - left - right,
      height: bottom - CHART_T,
    }),
    up.map(([v, text]) => [
      SVG("line", { class: v === 0 ? "zero" : "grid", x1: left, x2: CHART_W - right, y1: py(v), y2: py(v) }),
      SVG("text", { class: "tick", x: left - 7, y: py(v) + 4, "text-anchor": "end" }, text),
    ]),
    across.map(([v, text]) => [
      SVG("line", { class: "grid", x1: px(v), x2: px(v), y1: CHART_T, y2: bottom }),
      SVG("text", { class: "tick", x: px(v), y: bottom + 16, "text-anchor": "middle" }, text),
    ]),
    SVG("text", { class: "axis-title", x: (left + CHART_W - right) / 2, y: CHART_H - 6, "text-anchor": "middle" }, xTitle),
    SVG(
      "text",
      {
        class: "axis-title",
        transform: `translate(14 ${(CHART_T + bottom) / 2}) rotate(-90)`,
        "text-anchor": "middle",
      },
      yTitle,
    ),
  );
  return { svg, px, py, bottom, right, span: [x0, x1] };
}

const path = (of, px, py) => of.map(([x, y], k) => `${k ? "L" : "M"}${px(x).toFixed(2)} ${py(y).toFixed(2)}`).join("");

/** Names at the ends of lines, moved apart where they would touch. */
function endNames(series, { py, bottom, right }) {
  const ends = series.map((s) => ({ s, y: py(s.points[s.points.length - 1][1]) })).sort((a, b) => a.y - b.y);
  ends.forEach((end, k) => (end.at = Math.max(end.y, k ? ends[k - 1].at + 13.5 : CHART_T + 5)));
  for (let k = ends.length - 1, floor = bottom; k >= 0; k -= 1) {
    ends[k].at = Math.min(ends[k].at, floor);
    floor = ends[k].at - 13.5;
  }
  return ends.map(({ s, at: y }) =>
    SVG("text", { class: "end", x: CHART_W - right + 6, y: y + 4, fill: s.colour }, s.name),
  );
}

/** A chart of lines with names at their ends, a cursor and a tooltip with every value at the nearest step. */
function LineChart(figure, { title, series, yTitle, unit, zero = false, level = null, areas = false, format = number }) {
  const drawn = series.filter((s) => s.points.length);
  figure.replaceChildren(h("figcaption.chart-title", title));
  if (!drawn.length) return void figure.append(h("p.empty", "Nothing of this was recorded."));
  const xs = drawn.flatMap((s) => s.points.map(([x]) => x));
  const ys = drawn.flatMap((s) => s.points.map(([, y]) => y)).concat(zero ? [0] : [], level === null ? [] : [level]);
  const named = drawn.filter((s) => !s.unlabelled);
  const longest = Math.max(0, ...named.map((s) => s.name.length));
  const at = frame({
    x: [Math.min(...xs), Math.max(...xs)],
    y: [Math.min(...ys), Math.max(...ys)],
    right: 14 + Math.min(150, 7 * longest),
    xTitle: "step",
    yTitle,
    label: `${title}: ${plural(named.length, "line")} over ${plural(new Set(xs).size, "step")}`,
  });
  const { svg, px, py } = at;
  if (level !== null)
    svg.append(SVG("line", { class: "identity", x1: px(at.span[0]), x2: px(at.span[1]), y1: py(level), y2: py(level) }));
  for (const s of drawn) {
    if (areas) {
      const ends = [[s.points[s.points.length - 1][0], 0], [s.points[0][0], 0]];
      svg.append(SVG("path", { class: "area", d: `${path([...s.points, ...ends], px, py)}Z`, fill: s.colour }));
    }
    const style = { class: `line${s.faint ? " faint" : ""}`, stroke: s.colour, "stroke-dasharray": s.dash || false };
    if (s.points.length === 1) svg.append(SVG("circle", { cx: px(s.points[0][0]), cy: py(s.points[0][1]), r: 3, fill: s.colour }));
    else svg.append(SVG("path", { ...style, d: path(s.points, px, py) }));
  }
  svg.append(...endNames(named, at));
  const cursor = SVG("line", { class: "cursor", y1: CHART_T, y2: at.bottom, visibility: "hidden" });
  svg.append(cursor);
  const places = [...new Set(xs)].sort((a, b) => a - b);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * CHART_W) / box.width;
    const step = places.reduce((best, v) => (Math.abs(px(v) - x) < Math.abs(px(best) - x) ? v : best), places[0]);
    set(cursor, "x1", px(step));
    set(cursor, "x2", px(step));
    set(cursor, "visibility", "visible");
    const rows = drawn
      .map((s) => [s, (s.points.find(([v]) => v === step) || [])[1]])
      .filter(([, y]) => finite(y))
      .sort((a, b) => b[1] - a[1])
      .map(([s, y]) => [s.tip || s.name, `${format(y)}${unit ? ` ${unit}` : ""}`]);
    showTip(event.clientX, event.clientY, [h("div.tip-place", `after step ${step}`), facts(rows)]);
  });
  svg.addEventListener("pointerleave", () => {
    set(cursor, "visibility", "hidden");
    hideTip();
  });
  figure.append(svg);
}

/** Predicted against actual, a point for each kind of response and step. */
function StepScatter(figure) {
  figure.replaceChildren(h("figcaption.chart-title", "Change in one step, mean of a token"));
  const dots = TYPES.filter((type) => !hidden.has(type.name)).flatMap((type) =>
    RUN.probe.steps.map((step, k) => ({ type, step, x: type.predicted[k], y: type.after[k] - type.before[k] })),
  );
  const known = dots.filter(({ x, y }) => finite(x) && finite(y));
  if (!known.length) return void figure.append(h("p.empty", "No step was predicted: train with a probe."));
  const all = known.flatMap(({ x, y }) => [x, y]).concat(0);
  const span = [Math.min(...all), Math.max(...all)];
  const { svg, px, py } = frame({
    x: span,
    y: span,
    right: 14,
    xTitle: `predicted change, ${RUN.watched.unit}`,
    yTitle: `actual change, ${RUN.watched.unit}`,
    label: `Predicted against actual change, ${plural(known.length, "point")}`,
  });
  svg.append(SVG("line", { class: "identity", x1: px(span[0]), y1: py(span[0]), x2: px(span[1]), y2: py(span[1]) }));
  for (const { type, step, x, y } of known) {
    const dot = SVG("circle", { class: "step-dot", cx: px(x), cy: py(y), r: 3.4, fill: type.colour });
    dot.addEventListener("pointerenter", (event) =>
      showTip(event.clientX, event.clientY, [
        h("div.tip-token", say(type.name)),
        h("div.tip-place", `step ${step}`),
        facts([
          ["predicted", `${signed(x)} ${RUN.watched.unit}`],
          ["actual", `${signed(y)} ${RUN.watched.unit}`],
        ]),
      ]),
    );
    dot.addEventListener("pointerleave", hideTip);
    svg.append(dot);
  }
  figure.append(svg);
}
