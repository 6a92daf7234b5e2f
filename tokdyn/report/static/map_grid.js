// What the map of forces shows: a part of the matrix or its sums, the size of its cells, and words about them.

/** One axis of the map: its first token, its size, the names along it, and its sequences. */
function mapAxis(of, mode, chosen) {
  if (mode === "sequences")
    return { from: 0, size: of.sequences.length, names: of.sequences.map((sequence) => sequence.name), groups: [] };
  const picked = chosen === "all" || of.sequences.length < 2 ? of.sequences : [of.sequences[+chosen]];
  const from = picked.length ? picked[0].start : 0;
  const size = picked.length ? picked[picked.length - 1].stop - from : 0;
  return {
    from,
    size,
    names: Array.from({ length: size }, (_, k) => label(of.token(from + k), 16)),
    groups: picked.map(({ start, stop, name }) => ({ start: start - from, stop: stop - from, name })),
  };
}

/** What the columns of the map are: contexts, or update tokens one by one. */
const mapColumns = () => (VIEW.net ? CONTEXTS : UPDATED);

/** The values on show and their two axes. */
function mapGrid(view) {
  const rows = mapAxis(OBSERVED, view.mode, view.rows);
  const cols = mapAxis(mapColumns(), view.mode, view.cols);
  const values = new Float32Array(rows.size * cols.size);
  const [cell, sums] = VIEW.net ? [netForce, RUN.net] : [tokenForce, RUN.blocks];
  for (let i = 0, k = 0; i < rows.size; i += 1) {
    for (let j = 0; j < cols.size; j += 1, k += 1)
      values[k] = view.mode === "tokens" ? cell(rows.from + i, cols.from + j) : inUnit(sums[i][j] ?? NaN);
  }
  return { rows, cols, values, at: (i, j) => values[i * cols.size + j] };
}

/** One pixel a cell, transparent where nothing was computed. */
function paintPicture(picture, { rows, cols, values }, scale) {
  picture.width = Math.max(1, cols.size);
  picture.height = Math.max(1, rows.size);
  const brush = picture.getContext("2d");
  const image = brush.createImageData(picture.width, picture.height);
  for (let k = 0; k < values.length; k += 1) {
    if (Number.isNaN(values[k])) continue;
    const [r, g, b] = scale.rgb(values[k]);
    image.data.set([r, g, b, 255], 4 * k);
  }
  brush.putImageData(image, 0, 0);
}

/** Sizes of cells (whole device pixels) and of the room for names, which appear where they can be read. */
function mapShape(ink, { rows, cols }, view, width) {
  const ratio = window.devicePixelRatio || 1;
  const whole = (size) => Math.max(1 / ratio, Math.floor(size * ratio) / ratio);
  const sums = view.mode === "sequences";
  ink.font = `11px ${theme.mono}`;
  const widest = (list) => Math.ceil(Math.max(0, ...list.map((text) => ink.measureText(text).width)));
  const grow = 1.7 ** view.zoom;
  const [maxW, maxH] = sums ? [110, 34] : [cols.size <= 40 ? 44 : 30, rows.size <= 40 ? 24 : 20];
  const columnWidth = (left) => whole(Math.min(maxW, Math.max(1, (width - left) / Math.max(1, cols.size)) * grow));
  let left = Math.min(widest(rows.names), 120) + 12 + (sums ? 0 : 20);
  let cw = columnWidth(left);
  const colLabels = cw >= 9;
  const colText = colLabels ? (sums && widest(cols.names) + 8 < cw ? 20 : Math.min(widest(cols.names), 120) + 10) : 0;
  const top = colText + (sums ? 0 : 20);
  const tall = rows.size * 13 <= 1400; // room for a label on every row of a page-high map
  const ch = whole(
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
    cw = columnWidth(left);
  }
  const [wide, high] = [Math.ceil(left + cols.size * cw), Math.ceil(top + rows.size * ch)];
  const upright = sums && colText === 20;
  return { left, top, cw, ch, maxW, maxH, rowLabels, colLabels, sums, upright, tall, wide, high, width, ratio };
}

/** The line under the map. */
function mapNote({ rows, cols, values }, view) {
  const missing = values.reduce((n, value) => n + Number.isNaN(value), 0);
  return [
    `${grouped(rows.size)} × ${grouped(cols.size)} cells.`,
    missing && `${percent(missing / values.length)} not computed (hatched).`,
    VIEW.net && "Update tokens behind the same text are one column: what cancels between them is gone.",
    !MATRIX && "The matrix is too large for a page; these are sums over sequences. Select a token above for its strongest forces.",
    MATRIX &&
      (view.mode === "sequences"
        ? "Double-click a cell to open that pair of sequences."
        : "Click a cell to select its observed token; double-click to open its pair of sequences."),
  ]
    .filter(Boolean)
    .join(" ");
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

/** Tooltip of one cell: who acts on whom, how much, and how much of its row that is. */
function cellTip(grid, view, { i, j }) {
  const sums = view.mode === "sequences";
  const value = grid.at(i, j);
  const [m, l] = [grid.rows.from + i, grid.cols.from + j];
  const columns = mapColumns();
  const entry = sums ? grid.at : VIEW.net ? netForce : tokenForce;
  const [share, net] = rowShare(m, value, sums ? columns.sequences.length : columns.size, entry);
  const end = (title, of, k) =>
    sums
      ? [title, of.sequences[k].name]
      : [
          title,
          [
            h("span.strong", tokenText(of.token(k), { limit: 24 })),
            h("span.where", of.place(k)),
          ],
        ];
  return [
    facts([
      end("observed", OBSERVED, m),
      end("update", columns, l),
      [
        `${VIEW.net ? "net force" : "force"}${sums ? ", summed" : ""}`,
        finite(value) ? h("span.strong", `${signed(value)} ${unitName()}`) : "not computed",
      ],
      finite(value) && ["share of the row", `${percent(share)} of Σ|F|`],
      finite(value) && ["row total", `${signed(net)}, all columns`],
    ]),
  ];
}

/** The cell that a key leads to from the cursor; undefined for any other key. */
function mapStep({ rows, cols }, cursor, key) {
  const within = (axis, k) => Math.max(0, Math.min(axis.size - 1, k));
  const hop = (axis, at, step) => {
    if (!axis.groups.length) return at + step;
    const g = axis.groups.findIndex(({ start, stop }) => at >= start && at < stop);
    return axis.groups[Math.max(0, Math.min(axis.groups.length - 1, g + step))].start;
  };
  const fresh = cursor.i < 0; // the first key shows the cursor
  const { i, j } = { i: Math.max(0, cursor.i), j: Math.max(0, cursor.j) };
  const to = {
    ArrowRight: [i, j + !fresh],
    ArrowLeft: [i, j - 1],
    ArrowDown: [i + !fresh, j],
    ArrowUp: [i - 1, j],
    Home: [i, 0],
    End: [i, cols.size - 1],
    PageDown: [hop(rows, i, 1), j],
    PageUp: [hop(rows, i, -1), j],
  }[key];
  return to && { i: within(rows, to[0]), j: within(cols, to[1]) };
}
