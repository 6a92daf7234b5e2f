// Which update tokens moved the probe: by the side they are on over the steps, and one by one at chosen steps.
// TokenMaps is one function, since what it nests shares the section's nodes and the chosen step as methods share a class.

const ROLE_COLOUR = { chosen: "var(--up)", rejected: "var(--down)" };
const roleColour = (role, k) => ROLE_COLOUR[role] || `var(--role-${k % 3})`;
const WITHOUT_FORCES = "No forces of single tokens were recorded: give td.attach or td.Monitor a probe (and blame= for several kinds).";

function Pushes() {
  const section = byId("behind");
  const figure = section.querySelector(".pushes");
  const { steps, roles, groups } = RUN.pushes;
  if (!groups.length) return void figure.append(h("p.empty", WITHOUT_FORCES));
  let chosen = 0;
  if (groups.length > 1)
    section.querySelector(".controls").append(
      h("span", "On"),
      choice("Watched answers", groups.map((group, k) => [k, say(group.name)]), 0, (k) => {
        chosen = k;
        draw();
      }),
    );
  function draw() {
    const group = groups[chosen];
    const series = roles.map((role, r) => ({
      name: roles.length > 1 || role !== "response" ? `${say(role)} tokens` : "update tokens",
      colour: roleColour(role, r),
      points: points(steps, group.sums[r]),
    }));
    const total = steps.map((_, k) => {
      const known = group.sums.map((row) => row[k]).filter(finite);
      return known.length ? known.reduce((a, b) => a + b, 0) : null;
    });
    if (roles.length > 1) series.push({ name: "together", colour: "var(--ink)", dash: "", points: points(steps, total) });
    LineChart(figure, {
      title: `Forces on the ${say(group.name)} answers`,
      series,
      yTitle: `${RUN.watched.unit} in the step`,
      unit: RUN.watched.unit,
      zero: true,
      format: signed,
    });
  }
  draw();
  redrawers.push(draw);
}

/** Tokens of one step, a block for each sequence: as text, once for each group of the probe, or as strips, a row for each group. */
function TokenMaps() {
  const section = byId("tokens");
  const holder = section.querySelector(".token-maps");
  if (!RUN.maps.length) {
    section.querySelector(".legend").remove();
    return void holder.append(h("p.empty", WITHOUT_FORCES));
  }
  let at = 0;
  let net = RUN.maps.some((map) => map.net);
  let strips = false;
  section.querySelector(".controls").append(
    choice("Shown as", [[false, "Text"], [true, "Strips"]], strips, (on) => {
      strips = on;
      draw();
    }),
    h("span", "Step"),
    choice("Step", RUN.maps.map((map, k) => [k, grouped(map.step)]), at, (k) => {
      at = k;
      draw();
    }),
  );
  if (net)
    section.querySelector(".controls").append(
      h("span", "Tokens"),
      choice("Tokens", [["net", "net of what cancels"], ["raw", "token by token"]], "net", (which) => {
        net = which === "net";
        draw();
      }),
    );
  const roles = RUN.pushes.roles;

  function draw() {
    const map = net && RUN.maps[at].net ? { ...RUN.maps[at], ...RUN.maps[at].net } : RUN.maps[at];
    const scale = Scale(map.values.flat().filter(finite));
    legend(section.querySelector(".legend"), scale, "What the token did in this step", `${RUN.watched.unit} on all answers of the row`);
    holder.replaceChildren(
      ...map.sequences.map((sequence) => block(map, sequence, scale)),
      map.left_out ? h("p.note", `${plural(map.left_out, "token")} more of this step's batch are left out of the page.`) : "",
    );
  }

  function block(map, sequence, scale) {
    const columns = Array.from({ length: sequence.stop - sequence.start }, (_, k) => sequence.start + k);
    const itself = (g, i) => Boolean(map.own && map.own[g][i]);
    const sum = (g, own) => columns.filter((i) => itself(g, i) === own && finite(map.values[g][i])).reduce((a, i) => a + map.values[g][i], 0);
    const colour = roleColour(sequence.role, roles.indexOf(sequence.role));
    const shown = strips
      ? framed(sequence, strip(map, columns, scale, sum, itself))
      : map.groups.map((_, g) => told(map, g, columns, scale, sum, itself));
    return h("div.token-block", h("h3", { "--colour": colour }, sequence.name), shown);
  }

  const framed = (sequence, table) => h("div.token-frame", { tabindex: 0, role: "region", "aria-label": sequence.name }, table);

  /** What one sequence's tokens did to one group together, and apart what stands in the group's own places. */
  const sums = (g, columns, sum, itself) => [
    h("span.value", signed(sum(g, false))),
    columns.some((i) => itself(g, i)) ? h("span.value", `itself ${signed(sum(g, true))}`) : "",
  ];

  /** One sequence as its text, on the colour of what each token did to one group. */
  function told(map, g, columns, scale, sum, itself) {
    return h(
      "p.told",
      { role: "group", "aria-label": `on ${say(map.groups[g])}` },
      h("span.on", `on ${say(map.groups[g])} `, sums(g, columns, sum, itself)),
      columns.map((i) => {
        const node = tokenText(map.tokens[i], { flow: true, limit: 200 });
        const value = map.values[g][i];
        node.className = `token${finite(value) ? "" : " unknown"}`;
        if (finite(value)) Object.assign(node.style, scale.paint(value));
        set(node, "data-force", finite(value) ? value : "");
        for (const [name, act] of Object.entries(pointing(map, g, i))) set(node, name, act);
        return node;
      }),
    );
  }

  /** The same as a row of cells for each group. */
  function strip(map, columns, scale, sum, itself) {
    return h(
      "table.token-map",
      h("thead", h("tr", h("td"), columns.map((i) => h("th", { scope: "col" }, h("span", tokenText(map.tokens[i], { limit: 16 })))))),
      h(
        "tbody",
        map.groups.map((group, g) =>
          h(
            "tr",
            h("th", { scope: "row" }, `on ${say(group)}`, sums(g, columns, sum, itself)),
            columns.map((i) => cell(map, g, i, scale)),
          ),
        ),
      ),
    );
  }

  /** Which way c pulls; not where the model is certain of the token, whose pull is nothing then whatever c is. */
  function pulled(map, i) {
    if (finite(map.pull[i]) && map.pull[i] < 1e-3 * Math.abs(map.c[i])) return "and yet left alone: the model is certain of it";
    return map.c[i] > 0 ? "pulled up" : map.c[i] < 0 ? "pushed down" : "left alone";
  }

  function cell(map, g, i, scale) {
    const value = map.values[g][i];
    const style = finite(value) ? { "--cell": scale.paint(value).background } : {};
    return h("td", style, pointing(map, g, i), { "aria-label": signed(value) });
  }

  /** What pointing at a token says. */
  function pointing(map, g, i) {
    const value = map.values[g][i];
    const onpointermove = (event) =>
      showTip(event.clientX, event.clientY, [
        h("div.tip-token", tokenText(map.tokens[i])),
        h("div.tip-place", `step ${map.step}, on the ${say(map.groups[g])} answers`),
        facts(
          [
            ["force", `${signed(value)} ${RUN.watched.unit} in the step${map.own && map.own[g][i] ? ", on itself: a watched answer stands here" : ""}`],
            ["weight c", `${signed(map.c[i])}, ${pulled(map, i)}`],
            finite(map.pull[i]) && ["size of its pull", `${number(map.pull[i])} = ‖G‖`],
            finite(map.log_prob[i]) && ["its log-prob", `${number(map.log_prob[i])} nats (${probability(Math.exp(map.log_prob[i]))})`],
          ],
        ),
      ]);
    return { onpointermove, onpointerleave: hideTip };
  }
  draw();
  redrawers.push(draw);
}
