// The run: two sides (observed rows m, update columns l) and the force matrix between them.

const RUN = JSON.parse(byId("payload").textContent);
const ETA = finite(RUN.eta) ? RUN.eta : null;

function Side(name, { columns, sequences }) {
  const size = columns.token.length;
  const owner = new Int32Array(size);
  sequences.forEach((sequence, s) => owner.fill(s, sequence.start, sequence.stop));
  return {
    name,
    size,
    sequences,
    /** Column value, null where the run has none. */
    at: (column, i) => (columns[column] ? columns[column][i] : null),
    has: (column) => Boolean(columns[column]) && columns[column].some((value) => value !== null && value !== undefined),
    token: (i) => columns.token[i],
    sequenceOf: (i) => owner[i],
    sequence: (i) => sequences[owner[i]],
    /** "chosen 1, token 3 of 26": counting response tokens from 1. */
    place: (i) =>
      `${sequences[owner[i]].name}, token ${i - sequences[owner[i]].start + 1} of ${sequences[owner[i]].stop - sequences[owner[i]].start}`,
  };
}

const OBSERVED = Side("observed", RUN.observed);
const UPDATED = Side("updated", RUN.updated);
const sideOf = (name) => (name === "observed" ? OBSERVED : UPDATED);

const MATRIX = RUN.matrix && unpack(RUN.matrix);

function unpack({ base64 }) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

/** F[m,l] in nats per unit learning rate; NaN where it was not computed. */
const force = (m, l) => (MATRIX ? MATRIX[m * UPDATED.size + l] : NaN);

/** Forces on observed token m, by update token. */
const forcesOn = (m) => Array.from({ length: UPDATED.size }, (_, l) => force(m, l));

/** Forces of update token l, by observed token. */
const forcesOf = (l) => Array.from({ length: OBSERVED.size }, (_, m) => force(m, l));

/** ‖G_l‖ = |c_l| ‖π_l − e_y‖, the size of the loss gradient at the logits; the run stores the second factor. */
function gNorm(l) {
  const [c, g] = [UPDATED.at("c", l), UPDATED.at("g_norm", l)];
  return finite(c) && finite(g) ? Math.abs(c) * g : null;
}

/** What an observed token did, best evidence first: measured, predicted, or the bare sum of forces. */
const MOVES = {
  actual: (m) => OBSERVED.at("actual", m),
  predicted: (m) =>
    OBSERVED.at("predicted", m) ??
    (ETA !== null && finite(OBSERVED.at("force", m)) ? ETA * OBSERVED.at("force", m) : null),
  force: (m) => OBSERVED.at("force", m),
};
const anyMove = (name) => Array.from({ length: OBSERVED.size }, (_, m) => MOVES[name](m)).some(finite);
const BEST_MOVE = ["actual", "predicted", "force"].find(anyMove) || "actual";

/** Index of the largest |value|, -1 if none is finite. */
function strongest(values) {
  let best = -1;
  values.forEach((value, i) => {
    if (finite(value) && (best < 0 || Math.abs(value) > Math.abs(values[best]))) best = i;
  });
  return best;
}

const MOST_MOVED = strongest(Array.from({ length: OBSERVED.size }, (_, m) => MOVES[BEST_MOVE](m)));

/** Indices of the n largest |value|, largest first. */
function largest(values, n) {
  return values
    .map((value, i) => [Math.abs(value), i])
    .filter(([size]) => Number.isFinite(size) && size > 0)
    .sort((a, b) => b[0] - a[0])
    .slice(0, n)
    .map(([, i]) => i);
}
