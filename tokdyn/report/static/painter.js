// The picture of the force matrix: what heatmap.js decides to show, drawn on its canvas.

/** Draw the part of the grid that is scrolled into view: cells, separators, names, selection and cursor. */
function paintMap(ink, { grid, shape, scale, picture, scroll, cursor, marked }) {
  const { left, top, cw, ch, rowLabels, colLabels, sums, upright, w, h: hgt, ratio } = shape;
  const { rows, cols } = grid;
  const [sx, sy] = scroll;
  const x = (j) => left + j * cw - sx;
  const y = (i) => top + i * ch - sy;
  const j0 = Math.max(0, Math.floor(sx / cw));
  const j1 = Math.min(cols.size, Math.ceil((sx + w - left) / cw));
  const i0 = Math.max(0, Math.floor(sy / ch));
  const i1 = Math.min(rows.size, Math.ceil((sy + hgt - top) / ch));
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.clearRect(0, 0, w, hgt);

  // Cells.
  ink.save();
  ink.beginPath();
  ink.rect(left, top, w - left, hgt - top);
  ink.clip();
  if (i1 > i0 && j1 > j0) {
    ink.fillStyle = hatch(ink);
    ink.fillRect(x(j0), y(i0), (j1 - j0) * cw, (i1 - i0) * ch);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(picture, j0, i0, j1 - j0, i1 - i0, x(j0), y(i0), (j1 - j0) * cw, (i1 - i0) * ch);
  }
  ink.strokeStyle = theme.paper;
  ink.lineWidth = 1;
  ink.beginPath();
  if (cw >= 9 && ch >= 9) {
    for (let j = j0 + 1; j < j1; j += 1) {
      ink.moveTo(x(j) - 0.5, y(i0));
      ink.lineTo(x(j) - 0.5, y(i1));
    }
    for (let i = i0 + 1; i < i1; i += 1) {
      ink.moveTo(x(j0), y(i) - 0.5);
      ink.lineTo(x(j1), y(i) - 0.5);
    }
  }
  ink.stroke();
  ink.strokeStyle = theme.muted;
  ink.globalAlpha = 0.8;
  ink.beginPath();
  for (const { start } of cols.groups)
    if (start) {
      ink.moveTo(x(start) - 0.5, y(i0));
      ink.lineTo(x(start) - 0.5, y(i1));
    }
  for (const { start } of rows.groups)
    if (start) {
      ink.moveTo(x(j0), y(start) - 0.5);
      ink.lineTo(x(j1), y(start) - 0.5);
    }
  ink.stroke();
  ink.globalAlpha = 1;
  if (sums && cw >= 44 && ch >= 18) {
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
  // Selection, then cursor.
  const outline = (i, j, n, k, weight) => {
    ink.lineWidth = weight;
    ink.strokeStyle = theme.paper;
    ink.strokeRect(x(j) - 1.5, y(i) - 1.5, k * cw + 2, n * ch + 2);
    ink.strokeStyle = theme.ink;
    ink.strokeRect(x(j) - 0.5, y(i) - 0.5, k * cw, n * ch);
  };
  const [onRows, onCols] = [marked.m >= 0, marked.l >= 0];
  if (onRows && state.side === "observed") outline(marked.m, 0, 1, cols.size, 1);
  if (onCols && state.side === "updated") outline(0, marked.l, rows.size, 1, 1);
  if (onRows && onCols) outline(marked.m, marked.l, 1, 1, 2);
  if (cursor.i >= 0) {
    ink.fillStyle = theme.ink;
    ink.globalAlpha = 0.35;
    if (cw < 5 || ch < 5) {
      ink.fillRect(left, y(cursor.i) + ch / 2, w - left, 0.75);
      ink.fillRect(x(cursor.j) + cw / 2, top, 0.75, hgt - top);
    }
    ink.globalAlpha = 1;
    outline(cursor.i, cursor.j, 1, 1, 1.5);
  }
  ink.restore();

  // Column names.
  ink.textBaseline = "middle";
  ink.save();
  ink.beginPath();
  ink.rect(left, 0, w - left, top);
  ink.clip();
  if (colLabels) {
    ink.font = `${Math.min(11, Math.floor(cw))}px ${theme.mono}`;
    for (let j = j0; j < j1; j += 1) {
      const on = j === cursor.j || (onCols && j === marked.l);
      if (on) {
        ink.fillStyle = theme.line;
        ink.fillRect(x(j), sums ? 0 : 20, cw, top);
      }
      ink.fillStyle = on ? theme.ink : theme.muted;
      if (upright) {
        ink.textAlign = "center";
        ink.fillText(cols.names[j], x(j) + cw / 2, top - 9);
      } else {
        ink.save();
        ink.translate(x(j) + cw / 2, top - 5);
        ink.rotate(-Math.PI / 2);
        ink.textAlign = "left";
        named(ink, fit(ink, cols.names[j], top - (sums ? 8 : 28)), 0);
        ink.restore();
      }
    }
  }
  band(cols.groups, (group) => {
    const [a, b] = [Math.max(left, x(group.start)), Math.min(w, x(group.stop))];
    rule(a + 1, 17.5, b - 2, 17.5);
    centred(group.name, a, b, (text, at) => ink.fillText(text, at, 9));
  });
  ink.restore();

  // Row names.
  ink.save();
  ink.beginPath();
  ink.rect(0, top, left, hgt - top);
  ink.clip();
  if (rowLabels) {
    ink.font = `${Math.min(11, Math.floor(ch))}px ${theme.mono}`;
    ink.textAlign = "left";
    for (let i = i0; i < i1; i += 1) {
      const on = i === cursor.i || (onRows && i === marked.m);
      if (on) {
        ink.fillStyle = theme.line;
        ink.fillRect(sums ? 0 : 20, y(i), left, ch);
      }
      ink.fillStyle = on ? theme.ink : theme.muted;
      const name = fit(ink, rows.names[i], left - (sums ? 8 : 28));
      named(ink, name, left - 6 - ink.measureText(name).width, y(i) + ch / 2 + 0.5);
    }
  }
  band(rows.groups, (group) => {
    const [a, b] = [Math.max(top, y(group.start)), Math.min(hgt, y(group.stop))];
    if (rowLabels) {
      rule(17.5, a + 1, 17.5, b - 2);
      centred(group.name, a, b, (text, at) => {
        ink.save();
        ink.translate(9, at);
        ink.rotate(-Math.PI / 2);
        ink.fillText(text, 0, 0);
        ink.restore();
      });
    } else {
      rule(left - 4.5, a + 1, left - 4.5, b - 2);
      if (b - a >= 11) {
        ink.textAlign = "right";
        ink.fillText(fit(ink, group.name, left - 12), left - 10, (a + b) / 2);
      }
    }
  });
  ink.restore();

  function band(groups, each) {
    ink.font = `11px ${theme.sans}`;
    ink.lineWidth = 1;
    for (const group of groups) {
      ink.strokeStyle = theme.muted;
      ink.fillStyle = theme.ink;
      each(group);
    }
  }
  function rule(x0, y0, x1, y1) {
    if (x1 < x0 || y1 < y0) return;
    ink.beginPath();
    ink.moveTo(x0, y0);
    ink.lineTo(x1, y1);
    ink.stroke();
  }
  function centred(text, a, b, put) {
    if (b - a < 10) return;
    ink.textAlign = "center";
    const shown = fit(ink, text, b - a - 6);
    if (shown === text || shown.length > 3) put(shown, (a + b) / 2);
  }
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
