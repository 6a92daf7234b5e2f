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
    /** "chosen 1 @14": the position in the whole sequence, prompt included, from 0, as in the terminal and the table. */
    place: (i) => `${sequences[owner[i]].name}${atPosition(columns.position ? columns.position[i] : null)}`,
  };
}

const atPosition = (position) => (finite(position) ? ` @${position}` : "");

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

// Update tokens behind the same text share a context: their forces are one net column, in which what cancels is gone.

const { updated: CONTEXT_OF, observed: OWN_CONTEXT, list: CONTEXT_LIST, bands: BANDS } = RUN.contexts;
const CONTEXTS = Side("contexts", {
  columns: {
    token: CONTEXT_LIST.map(({ tokens }) => (tokens.length > 1 ? tokens.map((text) => label(text)).join("/") : tokens[0])),
    position: CONTEXT_LIST.map(({ position }) => position),
  },
  sequences: BANDS,
});

/** What the page shows of forces: nats after the step or per unit learning rate, net by context or token by token. */
const VIEW = { unit: ETA === null ? "rate" : "step", net: true };
const inUnit = (rate) => (VIEW.unit === "step" ? ETA * rate : rate);
const changeInUnit = (nats) => (VIEW.unit === "step" || !finite(nats) ? nats : ETA === null ? null : nats / ETA);
const WATCHED = RUN.watched;
const unitName = () => `${WATCHED.unit} ${VIEW.unit === "step" ? "after the step" : "per unit lr"}`;

/** Net force of each context on each observed token, summed in double precision. */
const NET = MATRIX && netMatrix();

function netMatrix() {
  const [C, L] = [CONTEXTS.size, UPDATED.size];
  const net = new Float32Array(OBSERVED.size * C);
  for (let m = 0; m < OBSERVED.size; m += 1) {
    const sums = new Float64Array(C);
    for (let l = 0; l < L; l += 1) sums[CONTEXT_OF[l]] += MATRIX[m * L + l];
    net.set(sums, m * C);
  }
  return net;
}

/** Forces in the unit on show; NaN where one was not computed. */
const tokenForce = (m, l) => (MATRIX ? inUnit(MATRIX[m * UPDATED.size + l]) : NaN);
const netForce = (m, x) => (NET ? inUnit(NET[m * CONTEXTS.size + x]) : NaN);

/** Force of update token l, or net of its context, on observed token m. */
const force = (m, l) => (VIEW.net ? netForce(m, CONTEXT_OF[l]) : tokenForce(m, l));

const HAS_FORCES = Boolean(MATRIX || RUN.partners);

/** Forces on observed token m, by update token. Of a matrix too large for a page, the strongest net ones. */
function forcesOn(m) {
  if (MATRIX) return Array.from({ length: UPDATED.size }, (_, l) => force(m, l));
  const by = new Map(netPartners(m).list);
  const own = RUN.partners.own[m];
  if (finite(own)) by.set(OWN_CONTEXT[m], inUnit(own));
  return CONTEXT_OF.map((x) => by.get(x) ?? NaN);
}

/** Forces of update token l, by observed token. */
function forcesOf(l) {
  if (MATRIX) return Array.from({ length: OBSERVED.size }, (_, m) => force(m, l));
  const on = new Map(netReach(CONTEXT_OF[l]).list);
  return Array.from({ length: OBSERVED.size }, (_, m) => on.get(m) ?? NaN);
}

/** The strongest other contexts on observed token m as [x, force], with Σ|net| of all the others. */
function netPartners(m, n = 8) {
  const convert = (list) => list.slice(0, n).map(([x, rate]) => [x, inUnit(rate)]);
  if (!MATRIX) return { list: convert(RUN.partners.observed[m]), size: Math.abs(inUnit(RUN.partners.size[m])) };
  const values = new Float64Array(CONTEXTS.size);
  let size = 0;
  for (let x = 0; x < values.length; x += 1) {
    values[x] = x === OWN_CONTEXT[m] ? 0 : netForce(m, x);
    if (finite(values[x])) size += Math.abs(values[x]);
  }
  return { list: largest(values, n).map((x) => [x, values[x]]), size };
}

/** Net force of the context in which observed token m itself stands; null where no update token does. */
function netOwn(m) {
  if (OWN_CONTEXT[m] < 0) return null;
  const rate = MATRIX ? NET[m * CONTEXTS.size + OWN_CONTEXT[m]] : RUN.partners.own[m];
  return finite(rate) ? inUnit(rate) : null;
}

/** The observed tokens that context x moves most, as [m, force], those in its own place left out. */
function netReach(x, n = 8) {
  if (!MATRIX) return { list: RUN.partners.reach[x].slice(0, n).map(([m, rate]) => [m, inUnit(rate)]) };
  const values = Array.from({ length: OBSERVED.size }, (_, m) => (x === OWN_CONTEXT[m] ? 0 : netForce(m, x)));
  return {
    list: largest(values, n).map((m) => [m, values[m]]),
    size: values.filter(finite).reduce((sum, value) => sum + Math.abs(value), 0),
  };
}

/** ‖G_l‖ = |c_l| ‖π_l − e_y‖, the size of the loss gradient at the logits; the run stores the second factor. */
function gNorm(l) {
  const [c, g] = [UPDATED.at("c", l), UPDATED.at("g_norm", l)];
  return finite(c) && finite(g) ? Math.abs(c) * g : null;
}

/** What an observed token did in the unit on show: measured, or predicted, which is the sum of its forces. */
const MOVES = {
  actual: (m) => changeInUnit(OBSERVED.at("actual", m)),
  predicted: (m) =>
    finite(OBSERVED.at("force", m)) ? inUnit(OBSERVED.at("force", m)) : changeInUnit(OBSERVED.at("predicted", m)),
};
const anyMove = (name) => Array.from({ length: OBSERVED.size }, (_, m) => MOVES[name](m)).some(finite);
const BEST_MOVE = ["actual", "predicted"].find(anyMove) || "actual";

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
  const best = [];
  for (let i = 0; i < values.length; i += 1) {
    const size = Math.abs(values[i]);
    if (!(size > 0 && size < Infinity) || (best.length === n && size <= Math.abs(values[best[n - 1]]))) continue;
    let k = best.length === n ? n - 1 : best.length;
    for (; k > 0 && size > Math.abs(values[best[k - 1]]); k -= 1) best[k] = best[k - 1];
    best[k] = i;
  }
  return best;
}
