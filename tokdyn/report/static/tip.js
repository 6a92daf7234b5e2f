// The tooltip: one for the whole page.

function showTip(x, y, content) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth - 8 ? x - 14 - width : x + 14;
  const top = y + 18 + height > innerHeight - 8 ? y - 14 - height : y + 18;
  tip.style.transform = `translate(${Math.round(Math.max(8, left))}px, ${Math.round(Math.max(8, top))}px)`;
}

const hideTip = () => {
  byId("tip").hidden = true;
};

const facts = (rows) =>
  h(
    "dl.facts-list",
    rows.filter(Boolean).map(([key, value]) => [h("dt", key), h("dd", value)]),
  );
