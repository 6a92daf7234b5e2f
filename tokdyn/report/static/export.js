// What a reader takes along: a link to what is seen, a view as a table, CSV, SVG or PNG. Nothing leaves the page otherwise.

/** Put text on the clipboard; a page that may not asks the browser the old way. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = h("textarea.unseen", { "aria-hidden": "true" });
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
}

/** A button that says what it has done. */
function doing(text, done, act) {
  const node = h("button.tool", text, {
    type: "button",
    onclick: async () => {
      await act();
      node.textContent = done;
      byId("live").textContent = done;
      setTimeout(() => (node.textContent = text), 1500);
    },
  });
  return node;
}

const copyLink = () => doing("Copy link", "Link copied", () => copyText(location.href));

function save(name, type, parts) {
  const address = URL.createObjectURL(new Blob(parts, { type }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** A cell of CSV; text that a spreadsheet would take for a formula stays text. */
function quoted(value) {
  if (typeof value === "number") return finite(value) ? String(value) : "";
  const text = String(value ?? "");
  const safe = /^[=+@\t\r-]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
const csv = (rows) => rows.map((row) => row.map(quoted).join(",")).join("\r\n");
const tsv = (rows) => rows.map((row) => row.map((cell) => String(cell ?? "").replace(/[\t\r\n]+/g, " ")).join("\t")).join("\n");

/** The rows of a table of the page as text. */
const tableRows = (table) =>
  table ? [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText.replace(/\s+/g, " ").trim())) : [];

/** An SVG of the page with its styles written into it, as a file of its own. */
function ownSvg(svg) {
  const copy = svg.cloneNode(true);
  const sources = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((node, k) => {
    const style = getComputedStyle(sources[k]);
    for (const name of ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "font", "opacity", "visibility"])
      node.style.setProperty(name, style.getPropertyValue(name));
  });
  const { width, height } = svg.viewBox.baseVal;
  set(copy, "width", width);
  set(copy, "height", height);
  copy.style.background = getComputedStyle(document.documentElement).backgroundColor;
  return [new XMLSerializer().serializeToString(copy), width, height];
}

/** An SVG as PNG, twice its size. */
function png([text, width, height]) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => {
      const canvas = h("canvas", { width: 2 * width, height: 2 * height });
      canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
      canvas.toBlob(resolve, "image/png");
    };
    image.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
  });
}

/** The buttons of one section: rows() for table and CSV where `some`, asked when they are wanted; svg() or canvas() for pictures. */
function exportsOf(id, { rows, some, svg, canvas }) {
  const section = byId(id);
  const name = (kind) => `tokdyn-${id}.${kind}`;
  const buttons = [];
  if (some) {
    buttons.push(doing("Copy table", "Table copied", () => copyText(tsv(rows()))));
    buttons.push(doing("CSV", "Saved", () => save(name("csv"), "text/csv", [csv(rows())])));
  }
  if (svg?.()) {
    buttons.push(doing("SVG", "Saved", () => save(name("svg"), "image/svg+xml", [ownSvg(svg())[0]])));
    buttons.push(doing("PNG", "Saved", async () => save(name("png"), "image/png", [await png(ownSvg(svg()))])));
  }
  if (canvas?.())
    buttons.push(
      doing("PNG", "Saved", () => new Promise((done) => canvas().toBlob((blob) => done(save(name("png"), "image/png", [blob]))))),
    );
  if (buttons.length) section.append(h("div.tools", { role: "group", "aria-label": `Take along: ${id}` }, buttons));
}
