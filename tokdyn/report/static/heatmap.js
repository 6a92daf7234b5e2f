// The force matrix. One canvas the size of its frame is redrawn at each scroll, so a cell may be one pixel or thirty.

function HeatMap() {
  const root = document.querySelector("#forces .map");
  if (!MATRIX && !RUN.blocks) {
    root.append(h("p.empty", "The force matrix was not kept with this run, so there is no map to draw."));
    return;
  }
  const view = { mode: MATRIX ? "tokens" : "sequences", rows: "all", cols: "all", log: false, clip: 0.98, zoom: 0 };
  const cursor = { i: -1, j: -1, keyboard: false };
  const canvas = h("canvas", { role: "presentation" });
  const space = h("div.map-space", canvas);
  const frame = h("div.map-frame", space, {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "heat map",
    "aria-label":
      "Force matrix. Arrow keys move between cells, Page keys between sequences, Enter selects, plus and minus zoom.",
  });
  const legendNode = h("div.legend");
  const note = h("p.note.map-note");
  const picture = document.createElement("canvas");
  const ink = canvas.getContext("2d");
  let grid = null;
  let scale = null;
  let shape = null;
  let queued = false;

  // Controls.
  const names = (of, all) =>
    [
      ["all", `all ${plural(of.sequences.length, "sequence")}`],
      ...of.sequences.map((sequence, s) => [s, sequence.name]),
    ]
      .slice(of.sequences.length > 1 ? 0 : 1)
      .map(([key, text]) => [key, key === "all" ? all : text]);
  const rowMenu = dropdown("Rows", names(OBSERVED, "all observed"), "all", (value) => {
    view.rows = value;
    view.zoom = 0;
    rebuild();
  });
  const columnMenu = dropdown("Columns", names(UPDATED, "all update"), "all", (value) => {
    view.cols = value;
    view.zoom = 0;
    rebuild();
  });
  const menus = [rowMenu, columnMenu].map((menu) => menu.querySelector("select"));
  const modes = choice(
    "Cells",
    [
      ["tokens", "Tokens", !MATRIX],
      ["sequences", "Sequence sums", !RUN.blocks],
    ],
    view.mode,
    (mode) => {
      view.mode = mode;
      view.zoom = 0;
      rebuild();
    },
  );
  const scaling = choice(
    "Colour scale",
    [
      ["linear", "Linear"],
      ["log", "Signed log"],
    ],
    "linear",
    (name) => {
      view.log = name === "log";
      recolour();
    },
  );
  const clipping = toggle("clip at 98th percentile", true, (on) => {
    view.clip = on ? 0.98 : 1;
    recolour();
  });
  const button = (text, name, act) =>
    h("button", text, { type: "button", "aria-label": name, title: name, onclick: act });
  const zoomOut = button("−", "Zoom out", () => zoomBy(-1));
  const zoomIn = button("+", "Zoom in", () => zoomBy(1));
  const back = button("Show all", "Show all sequences", () => open("all", "all"));
  root.append(
    h(
      "div.map-head",
      h("div.controls", modes, rowMenu, columnMenu, scaling, clipping, h("div.zoom", zoomOut, zoomIn, back)),
      legendNode,
    ),
    frame,
    note,
  );

  function open(rows, cols, mode = "tokens") {
    Object.assign(view, { rows: String(rows), cols: String(cols), zoom: 0, mode: MATRIX ? mode : "sequences" });
    [rows, cols].forEach((value, k) => {
      menus[k].value = String(value);
    });
    [...modes.children].forEach((node, k) => {
      node.setAttribute("aria-checked", (k === 0) === (view.mode === "tokens"));
      node.tabIndex = (k === 0) === (view.mode === "tokens") ? 0 : -1;
    });
    rebuild();
  }

  // The grid on show: which part of which matrix, and what its rows and columns are called.
  function axis(of, chosen) {
    if (view.mode === "sequences")
      return { from: 0, size: of.sequences.length, names: of.sequences.map((sequence) => sequence.name), groups: [] };
    const picked = chosen === "all" || of.sequences.length < 2 ? of.sequences : [of.sequences[+chosen]];
    const from = picked.length ? picked[0].start : 0;
    const size = picked.length ? picked[picked.length - 1].stop - from : 0;
    return {
      from,
      size,
      names: Array.from({ length: size }, (_, k) => label(of.token(from + k), 16)),
      groups: picked.map((sequence) => ({
        start: sequence.start - from,
        stop: sequence.stop - from,
        name: sequence.name,
      })),
    };
  }

  function rebuild() {
    const rows = axis(OBSERVED, view.rows);
    const cols = axis(UPDATED, view.cols);
    const values = new Float32Array(rows.size * cols.size);
    for (let i = 0, k = 0; i < rows.size; i += 1) {
      for (let j = 0; j < cols.size; j += 1, k += 1)
        values[k] = view.mode === "tokens" ? force(rows.from + i, cols.from + j) : (RUN.blocks[i][j] ?? NaN);
    }
    grid = { rows, cols, values, at: (i, j) => values[i * cols.size + j] };
    Object.assign(cursor, { i: -1, j: -1, keyboard: false });
    for (const menu of menus) menu.disabled = view.mode === "sequences";
    hideTip();
    layout();
    recolour();
    frame.scrollTo(0, 0);
  }

  function recolour() {
    scale = Scale(grid.values, { log: view.log, clip: view.clip });
    const { rows, cols, values } = grid;
    picture.width = Math.max(1, cols.size);
    picture.height = Math.max(1, rows.size);
    const brush = picture.getContext("2d");
    const image = brush.createImageData(picture.width, picture.height);
    for (let k = 0; k < values.length; k += 1) {
      if (Number.isNaN(values[k])) continue; // stays transparent over the hatching
      const [r, g, b] = scale.rgb(values[k]);
      image.data.set([r, g, b, 255], 4 * k);
    }
    brush.putImageData(image, 0, 0);
    legend(
      legendNode,
      scale,
      view.mode === "tokens" ? "F[m,l]" : "Σ F over each pair of sequences",
      `nats per unit lr${scale.log ? ", signed log" : ""}`,
    );
    queue();
  }

  // Geometry. Cells are whole device pixels; labels appear when there is room to read them.
  function layout() {
    const ratio = window.devicePixelRatio || 1;
    const whole = (size) => Math.max(1 / ratio, Math.floor(size * ratio) / ratio);
    const { rows, cols } = grid;
    const sums = view.mode === "sequences";
    const width = root.clientWidth - 2;
    ink.font = `11px ${theme.mono}`;
    const widest = (list) => Math.ceil(Math.max(0, ...list.map((text) => ink.measureText(text).width)));
    const grow = 1.7 ** view.zoom;
    const [maxW, maxH] = sums ? [110, 34] : [cols.size <= 40 ? 44 : 30, rows.size <= 40 ? 24 : 20];
    const rowText = Math.min(widest(rows.names), 120) + 12;
    let left = rowText + (sums ? 0 : 20);
    let cw = whole(Math.min(maxW, Math.max(1, (width - left) / Math.max(1, cols.size)) * grow));
    const colLabels = cw >= 9;
    const colText = colLabels ? (sums && widest(cols.names) + 8 < cw ? 20 : Math.min(widest(cols.names), 120) + 10) : 0;
    const top = colText + (sums ? 0 : 20);
    const tall = rows.size * 13 <= 1400; // room for a label on every row of a page-high map
    let ch = whole(
      Math.min(
        maxH,
        Math.max(
          tall ? 13 : 1,
          ((tall ? 0 : 680) - top) / Math.max(1, rows.size),
          cols.size && tall ? Math.min(cw * 0.8, maxH) : 1,
        ) * grow,
      ),
    );
    const rowLabels = ch >= 10;
    if (!rowLabels) {
      left = Math.min(110, widest(rows.groups.map((group) => group.name)) + 16);
      cw = whole(Math.min(maxW, Math.max(1, (width - left) / Math.max(1, cols.size)) * grow));
    }
    const wide = Math.ceil(left + cols.size * cw);
    const high = Math.ceil(top + rows.size * ch);
    shape = { left, top, cw, ch, rowLabels, colLabels, sums, upright: sums && colText === 20, wide, high, ratio };
    const limit = tall && !view.zoom ? high : Math.min(high, Math.max(680, Math.min(high, 760)));
    frame.style.height = `${Math.min(high, limit) + 2 + (wide > width ? 16 : 0)}px`;
    frame.style.width = `${Math.min(width, wide + (high > limit ? 16 : 0)) + 2}px`;
    space.style.width = `${wide}px`;
    space.style.height = `${high}px`;
    const [w, hgt] = [Math.min(frame.clientWidth, wide), Math.min(frame.clientHeight, high)];
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(hgt * ratio);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${hgt}px`;
    shape.w = w;
    shape.h = hgt;
    zoomOut.disabled = view.zoom <= 0;
    zoomIn.disabled = cw >= maxW && ch >= maxH;
    back.disabled = view.rows === "all" && view.cols === "all" && view.zoom === 0;
    const cells = grid.values.length;
    const missing = grid.values.reduce((n, value) => n + Number.isNaN(value), 0);
    note.textContent = [
      `${grouped(rows.size)} × ${grouped(cols.size)} cells.`,
      missing && `${percent(missing / cells)} not computed (hatched).`,
      !MATRIX && "The matrix is too large for a page; these are sums over sequences.",
      MATRIX &&
        (sums
          ? "Double-click a cell to open that pair of sequences."
          : "Click a cell to select its observed token; double-click to open its pair of sequences."),
    ]
      .filter(Boolean)
      .join(" ");
  }

  function zoomBy(step, x = shape.w / 2, y = shape.h / 2) {
    const before = {
      fx: (frame.scrollLeft + x - shape.left) / shape.cw,
      fy: (frame.scrollTop + y - shape.top) / shape.ch,
    };
    const next = Math.max(0, Math.min(12, view.zoom + step));
    if (next === view.zoom) return;
    view.zoom = next;
    layout();
    frame.scrollTo(before.fx * shape.cw + shape.left - x, before.fy * shape.ch + shape.top - y);
    queue();
  }

  function queue() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      draw();
    });
  }

  /** The selected row and column on this grid (-1 if not on it), and whether each is the selection or its partner. */
  function marks() {
    if (view.mode === "sequences" || !state.side) return { m: -1, l: -1 };
    const on = (index, { from, size }) => (index >= from && index < from + size ? index - from : -1);
    const [m, l] = state.side === "observed" ? [state.index, state.partner] : [state.partner, state.index];
    return { m: on(m, grid.rows), l: on(l, grid.cols) };
  }

  function draw() {
    paintMap(ink, {
      grid,
      shape,
      scale,
      picture,
      scroll: [frame.scrollLeft, frame.scrollTop],
      cursor,
      marked: marks(),
    });
  }

  // Pointing, by mouse and by keyboard.
  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    if (px < 0 || py < 0 || px >= shape.w || py >= shape.h) return null;
    const j = Math.floor((px - shape.left + frame.scrollLeft) / shape.cw);
    const i = Math.floor((py - shape.top + frame.scrollTop) / shape.ch);
    return {
      i: py >= shape.top && i >= 0 && i < grid.rows.size ? i : -1,
      j: px >= shape.left && j >= 0 && j < grid.cols.size ? j : -1,
    };
  }

  /** Share of the row's total size, and the row's net sum, over every column of the run. */
  function rowShare(m, value, count, at) {
    let [size, net] = [0, 0];
    for (let l = 0; l < count; l += 1) {
      const f = at(m, l);
      if (!finite(f)) continue;
      size += Math.abs(f);
      net += f;
    }
    return [size ? Math.abs(value) / size : 0, net];
  }

  function cellTip({ i, j }) {
    const sums = view.mode === "sequences";
    const value = grid.at(i, j);
    const [m, l] = [grid.rows.from + i, grid.cols.from + j];
    const [share, net] = rowShare(m, value, sums ? UPDATED.sequences.length : UPDATED.size, sums ? grid.at : force);
    const end = (title, of, k) =>
      sums
        ? [title, of.sequences[k].name]
        : [
            title,
            [
              h("span.strong", tokenText(of.token(k), { limit: 24 })),
              h("span.where", `${of.sequence(k).name}, ${k - of.sequence(k).start + 1}`),
            ],
          ];
    return [
      facts([
        end("observed", OBSERVED, m),
        end("update", UPDATED, l),
        [sums ? "Σ F" : "F", finite(value) ? h("span.strong", `${signed(value)} nats per unit lr`) : "not computed"],
        finite(value) && ETA !== null && ["× η", `${signed(ETA * value)} nats`],
        finite(value) && ["share of the row", `${percent(share)} of Σ|F|`],
        finite(value) && ["row total", `${signed(net)}, all columns`],
      ]),
    ];
  }

  frame.addEventListener("pointermove", (event) => {
    const at = cellAt(event);
    Object.assign(cursor, at && at.i >= 0 && at.j >= 0 ? at : { i: -1, j: -1 }, { keyboard: false });
    if (cursor.i >= 0) showTip(event.clientX, event.clientY, cellTip(cursor));
    else if (at && at.i >= 0 && view.mode === "tokens")
      showTip(event.clientX, event.clientY, tokenTip("observed", grid.rows.from + at.i));
    else if (at && at.j >= 0 && view.mode === "tokens")
      showTip(event.clientX, event.clientY, tokenTip("updated", grid.cols.from + at.j));
    else hideTip();
    queue();
  });
  frame.addEventListener("pointerleave", () => {
    if (!cursor.keyboard) {
      Object.assign(cursor, { i: -1, j: -1 });
      hideTip();
      queue();
    }
  });
  frame.addEventListener("scroll", () => {
    if (!cursor.keyboard) hideTip();
    queue();
  });
  frame.addEventListener("click", (event) => {
    const at = cellAt(event);
    if (at) choose(at);
  });
  frame.addEventListener("dblclick", (event) => {
    const at = cellAt(event);
    if (at && at.i >= 0 && at.j >= 0) openAt(at);
  });
  frame.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoomBy(event.deltaY < 0 ? 1 : -1, event.clientX - box.left, event.clientY - box.top);
    },
    { passive: false },
  );

  function choose({ i, j }) {
    if (view.mode === "sequences") return;
    if (i >= 0) {
      if (
        state.side !== "observed" ||
        state.index !== grid.rows.from + i ||
        state.partner !== (j >= 0 ? grid.cols.from + j : -1)
      )
        select("observed", grid.rows.from + i, j >= 0 ? grid.cols.from + j : -1);
    } else if (j >= 0) select("updated", grid.cols.from + j);
  }

  function openAt({ i, j }) {
    if (!MATRIX) return;
    if (view.mode === "sequences") open(i, j);
    else open(OBSERVED.sequenceOf(grid.rows.from + i), UPDATED.sequenceOf(grid.cols.from + j));
  }

  frame.addEventListener("keydown", (event) => {
    const { rows, cols } = grid;
    if (!rows.size || !cols.size) return;
    const hop = (axisOf, at, step) => {
      if (!axisOf.groups.length) return at + step;
      const g = axisOf.groups.findIndex(({ start, stop }) => at >= start && at < stop);
      return axisOf.groups[Math.max(0, Math.min(axisOf.groups.length - 1, g + step))].start;
    };
    const from = { i: Math.max(0, cursor.i), j: Math.max(0, cursor.j) };
    const fresh = cursor.i < 0;
    const moves = {
      ArrowRight: () => ({ ...from, j: from.j + !fresh }),
      ArrowLeft: () => ({ ...from, j: from.j - 1 }),
      ArrowDown: () => ({ ...from, i: from.i + !fresh }),
      ArrowUp: () => ({ ...from, i: from.i - 1 }),
      Home: () => ({ ...from, j: 0 }),
      End: () => ({ ...from, j: cols.size - 1 }),
      PageDown: () => ({ ...from, i: hop(rows, from.i, 1) }),
      PageUp: () => ({ ...from, i: hop(rows, from.i, -1) }),
    };
    if (event.key === "Enter" || event.key === " ") {
      if (!fresh) {
        if (event.shiftKey || view.mode === "sequences") openAt(cursor);
        else choose(cursor);
      }
    } else if (event.key === "+" || event.key === "=") zoomBy(1);
    else if (event.key === "-") zoomBy(-1);
    else if (moves[event.key]) {
      const to = moves[event.key]();
      moveTo(Math.max(0, Math.min(rows.size - 1, to.i)), Math.max(0, Math.min(cols.size - 1, to.j)));
    } else return;
    event.preventDefault();
  });
  frame.addEventListener("blur", () => {
    if (cursor.keyboard) {
      Object.assign(cursor, { i: -1, j: -1, keyboard: false });
      hideTip();
      queue();
    }
  });

  function moveTo(i, j) {
    Object.assign(cursor, { i, j, keyboard: true });
    const { left, top, cw, ch, w, h: hgt } = shape;
    const [x, y] = [left + j * cw - frame.scrollLeft, top + i * ch - frame.scrollTop];
    if (x < left || x + cw > w) frame.scrollLeft += x < left ? x - left : x + cw - w;
    if (y < top || y + ch > hgt) frame.scrollTop += y < top ? y - top : y + ch - hgt;
    const box = canvas.getBoundingClientRect();
    showTip(
      box.left + left + (j + 1) * cw - frame.scrollLeft,
      box.top + top + (i + 1) * ch - frame.scrollTop,
      cellTip(cursor),
    );
    const value = grid.at(i, j);
    say(`${grid.rows.names[i]} from ${grid.cols.names[j]}: ${finite(value) ? signed(value) : "not computed"}`);
    queue();
  }

  let lastWidth = root.clientWidth;
  new ResizeObserver(() => {
    if (root.clientWidth === lastWidth) return;
    lastWidth = root.clientWidth;
    layout();
    draw();
  }).observe(root);
  rebuild();
  follow(queue, () => {
    layout();
    recolour();
    draw();
  }); // at once: printing does not wait for a frame
}
