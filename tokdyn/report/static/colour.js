// Colour scales. Orange to blue is told apart under every common colour blindness; both ends leave text readable.

const RAMPS = {
  light: {
    diverging: ["#a84e04", "#de7f12", "#fbb45c", "#fde0b8", "#f7f7f5", "#d3e5f1", "#93c4df", "#4491c5", "#1d5fa6"],
    missing: "#9a9a9a",
  },
  dark: {
    diverging: ["#ffc583", "#ea9436", "#a8610f", "#5c390f", "#25272b", "#173d5e", "#1f659f", "#4a9be0", "#a3d2ff"],
    missing: "#777777",
  },
};
const STEPS = 255; // odd, so that zero has a colour of its own

const theme = { name: "light", colours: [], missing: "", ink: "", muted: "", paper: "", line: "", mono: "", sans: "" };

function table(stops) {
  const parsed = stops.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: STEPS }, (_, k) => {
    const t = (k / (STEPS - 1)) * (parsed.length - 1);
    const i = Math.min(Math.floor(t), parsed.length - 2);
    return parsed[i].map((value, channel) => Math.round(value + (t - i) * (parsed[i + 1][channel] - value)));
  });
}

/** Read the page's theme; `name` forces one (printing is always light). */
function loadTheme(name) {
  theme.name = name || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme.name;
  theme.colours = table(RAMPS[theme.name].diverging);
  theme.missing = RAMPS[theme.name].missing;
  const style = getComputedStyle(document.documentElement);
  for (const key of ["ink", "muted", "paper", "line", "mono", "sans"])
    theme[key] = style.getPropertyValue(`--${key}`).trim();
}

const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);

/** Quantile of |values|, from every value up to 200,000 and evenly spaced ones beyond. */
function quantile(values, q) {
  const stride = Math.max(1, Math.floor(values.length / 200000));
  const sizes = [];
  for (let i = 0; i < values.length; i += stride) if (finite(values[i])) sizes.push(Math.abs(values[i]));
  if (!sizes.length) return 0;
  const sorted = Float64Array.from(sizes).sort();
  return sorted[Math.min(sorted.length - 1, Math.ceil(q * sorted.length) - 1)] || sorted[sorted.length - 1];
}

/**
 * A scale from values to colours, symmetric about 0 and clipped at ±max, the `clip` quantile of |values|.
 * log: sign(x) log(1 + |x|/s), s = max/100, so that two decades below the clip are told apart.
 */
function Scale(values, { log = false, clip = 0.98 } = {}) {
  const max = quantile(values, clip) || 1;
  const s = max / 100;
  const bend = log ? (a) => Math.log1p(a / s) / Math.log1p(100) : (a) => a / max;
  const step = (x) => Math.round(((Math.sign(x) * Math.min(1, bend(Math.abs(x))) + 1) / 2) * (STEPS - 1));
  let beyond = 0;
  let largestSize = 0;
  for (let i = 0; i < values.length; i += 1) {
    const size = Math.abs(values[i]);
    if (size > max) beyond += 1;
    if (size > largestSize) largestSize = size;
  }
  return {
    log,
    max,
    beyond,
    largest: largestSize,
    rgb: (x) => theme.colours[step(x)],
    /** Background and the text colour that reads on it. */
    paint: (x) => {
      const rgb = theme.colours[step(x)];
      return { background: `rgb(${rgb.join(",")})`, color: luminance(rgb) > 0.19 ? "#111" : "#fff" };
    },
    /** Ticks as [position in 0..1, value]. */
    ticks: () => {
      const points = log ? [max / 10, max] : [max / 2, max];
      return [...points.map((x) => -x).reverse(), 0, ...points].map((x) => [
        (Math.sign(x) * bend(Math.abs(x)) + 1) / 2,
        x,
      ]);
    },
  };
}

/** Draw a scale's legend: what it shows, a colour bar, ticks with units. */
function legend(node, scale, what, unit) {
  const stops = theme.colours.filter((_, k) => k % 2 === 0).map((rgb) => `rgb(${rgb.join(",")})`);
  const note = scale.beyond
    ? `; ${plural(scale.beyond, "value")} beyond ±${tick(scale.max)}, up to ${number(scale.largest)}`
    : "";
  node.replaceChildren(
    h("div.legend-what", { title: `${what} (${unit})${note}` }, what, " ", h("span.unit", unit)),
    h("div.legend-bar", { "--ramp": `linear-gradient(to right, ${stops.join(", ")})` }),
    h(
      "div.legend-ticks",
      scale
        .ticks()
        .map(([at, value]) =>
          h(
            "span",
            { "--at": `${100 * at}%` },
            scale.beyond && at === 0 ? "≤ " : scale.beyond && at === 1 ? "≥ " : "",
            (value > 0 ? "+" : "") + tick(value, 2),
          ),
        ),
    ),
  );
}

/** Draw a legend's place when there is nothing to show. */
const noLegend = (node, text) => node.replaceChildren(h("div.legend-what", text));
