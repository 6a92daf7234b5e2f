// The picture of the force matrix: what heatmap.js decides to show, drawn on its canvas.

/** Draw the part of the grid that is scrolled into view: cells, separators, names, selection and cursor. */
function paintMap(ink, { grid, shape, scale, picture, scroll, cursor, marked }) {
  const { left, top, cw, ch, w, h: hgt, ratio } = shape;
  const { rows, cols } = grid;
  const [sx, sy] = scroll;
  const part = {
    ...shape,
    rows,
    cols,
    x: (j) => left + j * cw - sx,
    y: (i) => top + i * ch - sy,
    j0: Math.max(0, Math.floor(sx / cw)),
    j1: Math.min(cols.size, Math.ceil((sx + w - left) / cw)),
    i0: Math.max(0, Math.floor(sy / ch)),
    i1: Math.min(rows.size, Math.ceil((sy + hgt - top) / ch)),
  };
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.clearRect(0, 0, w, hgt);
  inside(ink, left, top, w - left, hgt - top, () => {
    paintCells(ink, part, picture);
    paintLines(ink, part);
    if (shape.sums && cw >= 44 && ch >= 18) paintNumbers(ink, part, grid, scale);
    paintMarks(ink, part, cursor, marked);
  });
  ink.textBaseline = "middle";
  inside(ink, left, 0, w - left, top, () => paintColumnNames(ink, part, cursor.j, marked.l));
  inside(ink, 0, top, left, hgt - top, () => paintRowNames(ink, part, cursor.i, marked.m));
}

/** Draw with everything outside a rectangle cut off. */
function inside(ink, x, y, width, height, draw) {
  ink.save();
  ink.beginPath();
  ink.rect(x, y, width, height);
  ink.clip();
  draw();
  ink.restore();
}

/** The colours, over hatching that shows where nothing was computed. */
function paintCells(ink, { x, y, i0, i1, j0, j1, cw, ch }, picture) {
  if (i1 <= i0 || j1 <= j0) return;
  const [width, height] = [j1 - j0, i1 - i0];
  ink.fillStyle = hatch(ink);
  ink.fillRect(x(j0), y(i0), width * cw, height * ch);
  ink.imageSmoothingEnabled = false;
  ink.drawImage(picture, j0, i0, width, height, x(j0), y(i0), width * cw, height * ch);
}

/** Lines between cells where there is room for them, and between sequences. */
function paintLines(ink, { x, y, i0, i1, j0, j1, cw, ch, rows, cols }) {
  const stroke = (style, lines) => {
    ink.strokeStyle = style;
    ink.lineWidth = 1;
    ink.beginPath();
    lines();
    ink.stroke();
  };
  const upright = (j) => {
    ink.moveTo(x(j) - 0.5, y(i0));
    ink.lineTo(x(j) - 0.5, y(i1));
  };
  const level = (i) => {
    ink.moveTo(x(j0), y(i) - 0.5);
    ink.lineTo(x(j1), y(i) - 0.5);
  };
  if (cw >= 9 && ch >= 9)
    stroke(theme.paper, () => {
      for (let j = j0 + 1; j < j1; j += 1) upright(j);
      for (let i = i0 + 1; i < i1; i += 1) level(i);
    });
  ink.globalAlpha = 0.8;
  stroke(theme.muted, () => {
    for (const { start } of cols.groups) if (start) upright(start);
    for (const { start } of rows.groups) if (start) level(start);
  });
  ink.globalAlpha = 1;
}

/** The value of each cell, written into it. */
function paintNumbers(ink, { x, y, i0, i1, j0, j1, cw, ch }, grid, scale) {
  ink.font = `11px ${theme.sans}`;
  ink.textAlign = "center";
  ink.textBaseline = "middle";
  for (let i = i0; i < i1; i += 1) {
    for (let j = j0; j < j1; j += 1) {
      const value = grid.at(i, j);
      ink.fillStyle = Number.isNaN(value) ? theme.muted : scale.paint(value).color;
      ink.fillText(signed(value), x(j) + cw / 2, y(i) + ch / 2 + 0.5);
    }
  }
}

/** The selected row, column and cell, then the cursor. */
function paintMarks(ink, { x, y, cw, ch, left, top, w, h: hgt, rows, cols }, cursor, { m, l }) {
  const outline = (i, j, n, k, weight) => {
    ink.lineWidth = weight;
    ink.strokeStyle = theme.paper;
    ink.strokeRect(x(j) - 1.5, y(i) - 1.5, k * cw + 2, n * ch + 2);
    ink.strokeStyle = theme.ink;
    ink.strokeRect(x(j) - 0.5, y(i) - 0.5, k * cw, n * ch);
  };
  if (m >= 0 && state.side === "observed") outline(m, 0, 1, cols.size, 1);
  if (l >= 0 && state.side === "updated") outline(0, l, rows.size, 1, 1);
  if (m >= 0 && l >= 0) outline(m, l, 1, 1, 2);
  if (cursor.i < 0) return;
  if (cw < 5 || ch < 5) {
    ink.fillStyle = theme.ink;
    ink.globalAlpha = 0.35;
    ink.fillRect(left, y(cursor.i) + ch / 2, w - left, 0.75);
    ink.fillRect(x(cursor.j) + cw / 2, top, 0.75, hgt - top);
    ink.globalAlpha = 1;
  }
  outline(cursor.i, cursor.j, 1, 1, 1.5);
}

/** Tokens above their columns, where there is room to read them, and sequences above those. */
function paintColumnNames(ink, { x, j0, j1, left, top, cw, w, cols, colLabels, sums, upright }, cursor, marked) {
  if (colLabels) ink.font = `${Math.min(11, Math.floor(cw))}px ${theme.mono}`;
  for (let j = j0; colLabels && j < j1; j += 1) {
    const on = j === cursor || j === marked;
    if (on) {
      ink.fillStyle = theme.line;
      ink.fillRect(x(j), sums ? 0 : 20, cw, top);
    }
    ink.fillStyle = on ? theme.ink : theme.muted;
    if (upright) {
      ink.textAlign = "center";
      ink.fillText(cols.names[j], x(j) + cw / 2, top - 9);
    } else {
      ink.textAlign = "left";
      turned(ink, x(j) + cw / 2, top - 5, () => named(ink, fit(ink, cols.names[j], top - (sums ? 8 : 28)), 0));
    }
  }
  band(ink, cols.groups, (group) => {
    const [a, b] = [Math.max(left, x(group.start)), Math.min(w, x(group.stop))];
    rule(ink, a + 1, 17.5, b - 2, 17.5);
    centred(ink, group.name, a, b, (text, at) => ink.fillText(text, at, 9));
  });
}

/** Tokens before their rows, where there is room to read them, and sequences before those. */
function paintRowNames(ink, { y, i0, i1, left, top, ch, h: hgt, rows, rowLabels, sums }, cursor, marked) {
  if (rowLabels) {
    ink.font = `${Math.min(11, Math.floor(ch))}px ${theme.mono}`;
    ink.textAlign = "left";
  }
  for (let i = i0; rowLabels && i < i1; i += 1) {
    const on = i === cursor || i === marked;
    if (on) {
      ink.fillStyle = theme.line;
      ink.fillRect(sums ? 0 : 20, y(i), left, ch);
    }
    ink.fillStyle = on ? theme.ink : theme.muted;
    const name = fit(ink, rows.names[i], left - (sums ? 8 : 28));
    named(ink, name, left - 6 - ink.measureText(name).width, y(i) + ch / 2 + 0.5);
  }
  band(ink, rows.groups, (group) => {
    const [a, b] = [Math.max(top, y(group.start)), Math.min(hgt, y(group.stop))];
    if (rowLabels) {
      rule(ink, 17.5, a + 1, 17.5, b - 2);
      centred(ink, group.name, a, b, (text, at) => turned(ink, 9, at, () => ink.fillText(text, 0, 0)));
    } else {
      rule(ink, left - 4.5, a + 1, left - 4.5, b - 2);
      if (b - a < 11) return;
      ink.textAlign = "right";
      ink.fillText(fit(ink, group.name, left - 12), left - 10, (a + b) / 2);
    }
  });
}

/** Draw about a point with the paper turned, so that text reads upwards. */
function turned(ink, x, y, draw) {
  ink.save();
  ink.translate(x, y);
  ink.rotate(-Math.PI / 2);
  draw();
  ink.restore();
}

/** Each sequence of an axis, in the band's own font and ink. */
function band(ink, groups, each) {
  ink.font = `11px ${theme.sans}`;
  ink.lineWidth = 1;
  for (const group of groups) {
    ink.strokeStyle = theme.muted;
    ink.fillStyle = theme.ink;
    each(group);
  }
}

function rule(ink, x0, y0, x1, y1) {
  if (x1 < x0 || y1 < y0) return;
  ink.beginPath();
  ink.moveTo(x0, y0);
  ink.lineTo(x1, y1);
  ink.stroke();
}

/** A name in the middle of [a, b], left out where less than three characters of it fit. */
function centred(ink, text, a, b, put) {
  if (b - a < 10) return;
  ink.textAlign = "center";
  const shown = fit(ink, text, b - a - 6);
  if (shown === text || shown.length > 3) put(shown, (a + b) / 2);
}

/** A token's name, the mark of its leading space faint: most tokens have one. */
function named(ink, text, x, y = 0) {
  const space = text.length > 1 && text.startsWith("␣") ? "␣" : "";
  ink.globalAlpha = 0.4;
  ink.fillText(space, x, y);
  ink.globalAlpha = 1;
  ink.fillText(text.slice(space.length), x + ink.measureText(space).width, y);
}

/** Text cut to a width in pixels. */
function fit(ink, text, room) {
  if (ink.measureText(text).width <= room) return text;
  const characters = [...text];
  while (characters.length > 1 && ink.measureText(`${characters.join("")}…`).width > room) characters.pop();
  return `${characters.join("")}…`;
}

/** Diagonal lines for cells that were not computed. */
function hatch(ink) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const brush = tile.getContext("2d");
  brush.strokeStyle = theme.missing;
  brush.globalAlpha = 0.55;
  for (const shift of [-6, 0, 6]) {
    brush.moveTo(shift, 6);
    brush.lineTo(shift + 6, 0);
  }
  brush.stroke();
  return ink.createPattern(tile, "repeat");
}
