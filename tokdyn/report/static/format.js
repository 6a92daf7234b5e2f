// Numbers, tokens and elements. Text from a model reaches the page only through text nodes and attributes.

const MISSING = "–";
const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";

const finite = (x) => typeof x === "number" && Number.isFinite(x);

/** 12345 as 12,345. */
const grouped = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");

/** Three significant digits, a true minus sign, powers of ten beyond [1e-3, 1e6). */
function number(x, digits = 3) {
  if (!finite(x)) return MISSING;
  if (x === 0) return "0";
  const sign = x < 0 ? "−" : "";
  const a = Math.abs(x);
  if (a < 1e-3 || a >= 1e6) {
    const [mantissa, exponent] = a.toExponential(digits - 1).split("e");
    const power = [...exponent.replace("+", "")].map((d) => (d === "-" ? "⁻" : SUPERSCRIPT[+d])).join("");
    return `${sign}${mantissa}×10${power}`;
  }
  if (a >= 10 ** digits) return sign + grouped(Math.round(a));
  return sign + a.toPrecision(digits);
}

const signed = (x, digits = 3) => (finite(x) && x > 0 ? "+" : "") + number(x, digits);

/** A short number for ticks: no trailing zeros. */
const tick = (x, digits = 3) =>
  number(x, digits)
    .replace(/(\.\d*?)0+(?=×|$)/, "$1")
    .replace(/\.(?=×|$)/, "");

/** A probability: percent where a reader thinks in percent, a power of ten below. */
function probability(p) {
  if (!finite(p)) return MISSING;
  return p >= 1 || p === 0 ? `${100 * p}\u00a0%` : p < 1e-4 ? number(p) : `${(100 * p).toPrecision(3)}\u00a0%`;
}

const percent = (p) =>
  !finite(p) ? MISSING : p > 0 && p < 0.0005 ? "<0.1\u00a0%" : `${(100 * p).toFixed(Math.abs(p) < 0.1 ? 1 : 0)}\u00a0%`;

const plural = (n, noun) => `${grouped(n)} ${noun}${n === 1 ? "" : "s"}`;

const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
// Characters that draw nothing or reorder what follows are spelled out.
const UNSEEN =
  /[\u0000-\u001f\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufe00-\ufe0f\ufeff]/u;

function mark(character) {
  if (MARKS[character]) return MARKS[character];
  return `‹U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
}

/**
 * Token text as [piece, isMark] pairs: spaces at the ends and everything invisible become marks.
 * flow: true for running text (spaces stay spaces, a line break also breaks), "line" for the same without the break.
 */
function pieces(text, flow = false) {
  if (text === "") return [["∅", true]];
  const found = [];
  const push = (piece, isMark) => {
    const last = found[found.length - 1];
    if (last && last[1] === isMark) last[0] += piece;
    else found.push([piece, isMark]);
  };
  const all = [...text];
  const blank = /^\s*$/.test(text);
  all.forEach((character, i) => {
    const edge = i === 0 || i === all.length - 1;
    if (character === " ") push(blank || (edge && !flow) ? "␣" : " ", blank || (edge && !flow));
    else if (UNSEEN.test(character)) push(mark(character), true);
    else push(character, false);
    if (flow === true && character === "\n") push("\n", false);
  });
  return found;
}

/** Token text as one short line, for axes and messages. */
function label(text, limit = 32) {
  const line = [
    ...pieces(text)
      .map((p) => p[0])
      .join(""),
  ];
  return line.length > limit ? `${line.slice(0, limit - 1).join("")}…` : line.join("");
}

/** h("td.num", {title: "x"}, child, ...): an element; children are nodes, strings, or null. */
function h(spec, ...rest) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const item of rest.flat(3)) {
    if (item === null || item === undefined || item === false) continue;
    if (item instanceof Node) node.append(item);
    else if (typeof item === "object") for (const [key, value] of Object.entries(item)) set(node, key, value);
    else node.append(String(item));
  }
  return node;
}

function set(node, key, value) {
  if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
  else if (key.startsWith("--")) node.style.setProperty(key, value);
  else if (value === true) node.setAttribute(key, "");
  else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
}

/** The text of a token as an element, marks muted. `limit` cuts very long tokens; the title keeps the whole. */
function tokenText(text, { flow = false, limit = Infinity } = {}) {
  const node = h("span.token-text");
  let left = limit;
  for (const [piece, isMark] of pieces(text, flow)) {
    if (left <= 0) break;
    const characters = [...piece];
    const shown = characters.length > left ? `${characters.slice(0, left - 1).join("")}…` : piece;
    left -= characters.length;
    node.append(isMark ? h("span.mark", shown) : shown);
  }
  if ([...text].length > limit) node.title = label(text, 400);
  return node;
}

const byId = (id) => document.getElementById(id);

/** A row of buttons of which one is on. `options` are [value, label, disabled?]. */
function choice(name, options, value, onchange) {
  const group = h("div.choice", { role: "radiogroup", "aria-label": name });
  const pick = (index, focus) => {
    options.forEach((option, i) => {
      const button = group.children[i];
      button.setAttribute("aria-checked", i === index);
      button.tabIndex = i === index ? 0 : -1;
      if (focus && i === index) button.focus();
    });
    onchange(options[index][0]);
  };
  options.forEach(([key, text, disabled], i) => {
    group.append(
      h("button", text, {
        type: "button",
        role: "radio",
        disabled: Boolean(disabled),
        "aria-checked": String(key === value),
        tabindex: key === value ? 0 : -1,
        onclick: () => pick(i, false),
        onkeydown: (event) => {
          const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
          if (!step) return;
          event.preventDefault();
          let next = i;
          do next = (next + step + options.length) % options.length;
          while (options[next][2] && next !== i);
          pick(next, true);
        },
      }),
    );
  });
  return group;
}

/** A labelled <select>; `options` are [value, label]. */
function dropdown(name, options, value, onchange) {
  const select = h(
    "select",
    options.map(([key, text]) => h("option", { value: key, selected: String(key) === String(value) }, text)),
    {
      onchange: () => onchange(select.value),
    },
  );
  return h("label.dropdown", h("span", name), select);
}

/** A check box with its label. */
function toggle(name, value, onchange) {
  const box = h("input", { type: "checkbox", checked: value, onchange: () => onchange(box.checked) });
  return h("label.toggle", box, h("span", name));
}
