// The views of a run as rows: what stands on the page, in full precision.

const ANSWER_COLUMNS = ["position", "token_id", "token", "log_prob", "entropy", "rank", "c", "force", "predicted", "actual"];

/** Every token of both sides; force is per unit learning rate, predicted and actual are nats after the step. */
function answerRows() {
  const rows = [OBSERVED, UPDATED].flatMap((side) =>
    Array.from({ length: side.size }, (_, i) => [side.name, side.sequence(i).name, ...ANSWER_COLUMNS.map((name) => side.at(name, i))]),
  );
  return rows.length ? [["side", "sequence", ...ANSWER_COLUMNS], ...rows] : [];
}

/** The matrix as it is shown: net by context or token by token, in the unit on show. */
function forceRows() {
  if (!MATRIX) return [];
  const columns = VIEW.net ? CONTEXTS : UPDATED;
  const all = (of) => Array.from({ length: of.size }, (_, i) => i);
  const name = (of, i) => `${label(of.token(i))} ${of.place(i)}`;
  const value = VIEW.net ? netForce : tokenForce;
  return [
    [`${VIEW.net ? "net force" : "force"}, ${unitName()}`, ...all(columns).map((j) => name(columns, j))],
    ...all(OBSERVED).map((m) => [name(OBSERVED, m), ...all(columns).map((j) => value(m, j))]),
  ];
}

/** Predicted and actual change of each observed token, nats after the step. */
function changeRows() {
  const rows = Array.from({ length: OBSERVED.size }, (_, m) => [OBSERVED.place(m), OBSERVED.token(m), OBSERVED.at("predicted", m), OBSERVED.at("actual", m)]);
  return rows.some((row) => finite(row[3])) ? [["place", "token", "predicted", "actual"], ...rows] : [];
}
