// The force matrix. One canvas the size of its frame is redrawn at each scroll, so a cell may be one pixel or thirty.
// HeatMap is one function, since what it nests shares the map's nodes, view and cursor as methods share a class.

function HeatMap() {
  const root = document.querySelector("#forces .map");
  if (!MATRIX && !RUN.blocks) {
    root.append(h("p.empty", "The force matrix was not kept with this run, so there is no map to draw."));
    return;
  }
  const view = { mode: MATRIX ? "tokens" : "sequences", rows: "all", cols: "all", log: false, clip: 0.98, zoom: 0 };
  const part = (name) => () => (view[name] === "all" || view[name] === 0 ? null : view[name]);
  const kept = ["rows", "cols", "zoom"].map((name) => addressed(name, part(name)));
  const askedMode = addressed("cells", () => (view.mode === "sequences" && MATRIX ? "sums" : null));
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
  const columnMenu = dropdown("Columns", names(mapColumns(), "all update"), "all", (value) => {
    view.cols = value;
    view.zoom = 0;
    rebuild();
  });
  const menus = [rowMenu, columnMenu].map((menu) => menu.querySelector("select"));
  let drawn = "";
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

  /** The part of the map that the address names. */
  function restore([rows, cols, zoom], mode) {
    const within = (value, of) => (/^\d+$/.test(value ?? "") && +value < of.sequences.length ? value : "all");
    open(within(rows, OBSERVED), within(cols, mapColumns()), mode === "sums" ? "sequences" : "tokens");
    if (/^\d+$/.test(zoom ?? "")) zoomBy(Math.min(12, +zoom));
  }

  /** The switches of the page have moved: other numbers, and maybe other columns. */
  function switched() {
    const columns = names(mapColumns(), "all update");
    menus[1].replaceChildren(...columns.map(([key, text]) => h("option", { value: key }, text)));
    Object.assign(view, { cols: "all", zoom: 0 });
    rebuild();
  }

  function rebuild() {
    drawn = `${VIEW.unit} ${VIEW.net}`;
    grid = mapGrid(view);
    Object.assign(cursor, { i: -1, j: -1, keyboard: false });
    for (const menu of menus) menu.disabled = view.mode === "sequences";
    hideTip();
    layout();
    recolour();
    frame.scrollTo(0, 0);
    writeAddress();
  }

  function recolour() {
    scale = Scale(grid.values, { log: view.log, clip: view.clip });
    paintPicture(picture, grid, scale);
    legend(
      legendNode,
      scale,
      `${VIEW.net ? "Net force" : "Force"}${view.mode === "tokens" ? "" : " summed over sequences"}`,
      `${unitName()}${scale.log ? ", signed log" : ""}`,
    );
    queue();
  }

  function layout() {
    shape = mapShape(ink, grid, view, root.clientWidth - 2);
    const { tall, wide, high, width, ratio } = shape;
    const limit = tall && !view.zoom ? high : Math.min(high, Math.max(680, Math.min(high, 760)));
    frame.style.height = `${Math.min(high, limit) + 2 + (wide > width ? 16 : 0)}px`;
    frame.style.width = `${Math.min(width, wide + (high > limit ? 16 : 0)) + 2}px`;
    space.style.width = `${wide}px`;
    space.style.height = `${high}px`;
    shape.w = Math.min(frame.clientWidth, wide);
    shape.h = Math.min(frame.clientHeight, high);
    canvas.width = Math.round(shape.w * ratio);
    canvas.height = Math.round(shape.h * ratio);
    canvas.style.width = `${shape.w}px`;
    canvas.style.height = `${shape.h}px`;
    zoomOut.disabled = view.zoom <= 0;
    zoomIn.disabled = shape.cw >= shape.maxW && shape.ch >= shape.maxH;
    back.disabled = view.rows === "all" && view.cols === "all" && view.zoom === 0;
    note.textContent = mapNote(grid, view);
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
    writeAddress();
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
    return { m: on(m, grid.rows), l: on(VIEW.net && l >= 0 ? CONTEXT_OF[l] : l, grid.cols) };
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

  frame.addEventListener("pointermove", (event) => {
    const at = cellAt(event);
    Object.assign(cursor, at && at.i >= 0 && at.j >= 0 ? at : { i: -1, j: -1 }, { keyboard: false });
    if (cursor.i >= 0) showTip(event.clientX, event.clientY, cellTip(grid, view, cursor));
    else if (at && at.i >= 0 && view.mode === "tokens")
      showTip(event.clientX, event.clientY, tokenTip("observed", grid.rows.from + at.i));
    else if (at && at.j >= 0 && view.mode === "tokens")
      showTip(event.clientX, event.clientY, tokenTip("updated", tokenOf(at.j)));
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

  /** The update token that stands for a column. */
  const tokenOf = (j) => (VIEW.net ? CONTEXT_LIST[grid.cols.from + j].members[0] : grid.cols.from + j);

  function choose({ i, j }) {
    if (view.mode === "sequences") return;
    if (i >= 0) {
      if (j < 0) select("observed", grid.rows.from + i);
      else if (state.side !== "observed" || state.index !== grid.rows.from + i || state.partner !== tokenOf(j))
        select("observed", grid.rows.from + i, tokenOf(j));
    } else if (j >= 0) select("updated", tokenOf(j));
  }

  function openAt({ i, j }) {
    if (!MATRIX) return;
    if (view.mode === "sequences") open(i, j);
    else open(OBSERVED.sequenceOf(grid.rows.from + i), mapColumns().sequenceOf(grid.cols.from + j));
  }

  frame.addEventListener("keydown", (event) => {
    if (!grid.values.length) return;
    const fresh = cursor.i < 0;
    const to = mapStep(grid, cursor, event.key);
    if (event.key === "Enter" || event.key === " ") {
      if (!fresh) {
        if (event.shiftKey || view.mode === "sequences") openAt(cursor);
        else choose(cursor);
      }
    } else if (event.key === "+" || event.key === "=") zoomBy(1);
    else if (event.key === "-") zoomBy(-1);
    else if (to) moveTo(to.i, to.j);
    else return;
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
      cellTip(grid, view, cursor),
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
  restore(kept, askedMode);
  follow(queue, () => {
    if (drawn !== `${VIEW.unit} ${VIEW.net}`) return switched();
    layout();
    recolour();
    draw();
  }); // at once: printing does not wait for a frame
}
