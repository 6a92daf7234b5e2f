// Plain SVG: elements and axis ticks.

/** An element of an SVG; its namespace comes from the parser, so the page contains no address at all. */
const SVG = (() => {
  const probe = document.createElement("div");
  probe.innerHTML = "<svg></svg>";
  const space = probe.firstChild.namespaceURI;
  return (tag, attributes = {}, ...children) => {
    const node = document.createElementNS(space, tag);
    for (const [key, value] of Object.entries(attributes)) set(node, key, value);
    node.append(...children.flat(2).filter(Boolean));
    return node;
  };
})();

/** Room on the left for tick labels of these texts and an axis title, in units of a chart's view box. */
const labelWidth = (texts) => 30 + 7 * Math.max(2, ...texts.map((text) => text.length));

/** About n round tick values over [low, high]. */
function roundTicks(low, high, n = 5) {
  const raw = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
  return found;
}
