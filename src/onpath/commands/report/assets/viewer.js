// The trajectory viewer: filters and a list on the left, one trajectory on the right.

const OUTCOMES = { right: "✓ right", wrong: "✗ wrong", unknown: "not graded", right_to_right: "✓→✓", right_to_wrong: "✓→✗ harmed", wrong_to_right: "✗→✓ repaired", wrong_to_wrong: "✗→✗" };
const FILTERS = [
  ["all", "all", () => true],
  ["repaired", "wrong → right", (t) => t.cell === "wrong_to_right"],
  ["harmed", "right → wrong", (t) => t.cell === "right_to_wrong"],
  ["forks", "has forks", (t) => (t.forks || []).some((fork) => fork.decision === "fork")],
  ["wrong", "wrong", (t) => t.correct === false],
  ["right", "right", (t) => t.correct === true],
  ["edited", "rewritten", (t) => Boolean(t.diff)],
  ["dropped", "not trained on", (t) => t.kept === false],
];
const ORDERS = {
  "largest KL": (a, b) => (b.max_kl || 0) - (a.max_kl || 0),
  "step": (a, b) => a.step - b.step,
  "longest": (a, b) => b.tokens.length - a.tokens.length,
};

const viewer = { filter: "all", order: "largest KL", query: "", arm: "", step: "", quantity: "reverse_kl", shown: [], at: -1, field: null };

function buildViewer() {
  const all = DATA.trajectories;
  const chips = FILTERS.map(([key, label, test]) => [key, label, all.filter(test).length]).filter(([key, , count]) => key === "all" || count);
  viewer.list = el("ul", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Trajectories. Up and down choose, Enter goes to the tokens." });
  viewer.count = el("p", { class: "hint", "aria-live": "polite" });
  viewer.detail = el("article", { class: "detail", "aria-label": "Trajectory" });
  viewer.list.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(Number(item.dataset.at));
  });
  viewer.list.addEventListener("keydown", listKey);
  const filters = el("fieldset", { class: "chips" }, el("legend", {}, "Show"), chips.map(([key, label, count]) =>
    el("label", {}, el("input", { type: "radio", name: "filter", value: key, checked: key === "all", onchange: () => { viewer.filter = key; relist(); } }), el("span", {}, `${label} `, el("small", {}, count)))));
  const controls = el("div", { class: "controls" },
    picker("Sort by", Object.keys(ORDERS), (value) => { viewer.order = value; }),
    several("Arm", "arm"), several("Step", "step"),
    el("label", {}, "Find", el("input", { type: "search", placeholder: "in prompt or response", oninput: (event) => { viewer.query = event.target.value.toLowerCase(); relist(); } })));
  const body = el("div", { class: "viewer" }, el("div", { class: "chooser" }, filters, controls, viewer.count, viewer.list), viewer.detail);
  relist();
  return body;
}

function picker(label, values, set) {
  return el("label", {}, label, el("select", { onchange: (event) => { set(event.target.value); relist(); } }, values.map((value) => el("option", { value }, value || "all"))));
}

function several(label, key) {
  const values = [...new Set(DATA.trajectories.map((t) => t[key]))].filter((v) => v !== undefined);
  return values.length < 2 ? null : picker(label, ["", ...values.map(String)], (value) => { viewer[key] = value; });
}

function textOf(trajectory) {
  trajectory.text ??= `${trajectory.prompt || ""}\n${strings(integers(trajectory.tokens)).join("")}`.toLowerCase();
  return trajectory.text;
}

function matches(t) {
  const [, , test] = FILTERS.find(([key]) => key === viewer.filter);
  const picked = ["arm", "step"].every((key) => viewer[key] === "" || String(t[key]) === viewer[key]);
  return test(t) && picked && (!viewer.query || textOf(t).includes(viewer.query));
}

function relist() {
  viewer.shown = DATA.trajectories.filter(matches).sort(ORDERS[viewer.order]);
  viewer.count.textContent = `${viewer.shown.length.toLocaleString("en-US")} of ${DATA.trajectories.length.toLocaleString("en-US")} trajectories`;
  viewer.list.classList.toggle("pairs", viewer.shown.some((t) => t.cell.includes("_to_")));
  viewer.list.replaceChildren(...viewer.shown.map(listItem));
  viewer.at = -1;
  if (viewer.shown.length) choose(0, { focus: false });
  else viewer.detail.replaceChildren(el("p", { class: "hint" }, "No trajectory matches."));
}

function listItem(t, at) {
  const forks = (t.forks || []).filter((fork) => fork.decision === "fork").length;
  return el("li", { role: "option", id: `item-${at}`, "data-at": at, "aria-selected": "false" },
    el("span", { class: `outcome ${t.cell}` }, t.cell === "unknown" ? "–" : (OUTCOMES[t.cell] || t.cell).split(" ")[0]),
    el("span", { class: "what" }, visible(t.prompt || t.id || "").replace(/\n/g, " ").slice(0, 120)),
    el("small", {}, [t.arm, `step ${t.step}`, `max KL ${number(t.max_kl)}`, forks ? `◆ ${forks}` : null].filter(Boolean).join(" · ")));
}

function listKey(event) {
  const move = { ArrowDown: viewer.at + 1, ArrowUp: viewer.at - 1, Home: 0, End: viewer.shown.length - 1, PageDown: viewer.at + 10, PageUp: viewer.at - 10 }[event.key];
  if (event.key === "Enter" && viewer.field) {
    viewer.field.field.focus();
    viewer.field.move(0);
  }
  if (move === undefined || !viewer.shown.length) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(viewer.shown.length - 1, move)));
}

function choose(at, { focus = true } = {}) {
  viewer.list.children[viewer.at]?.setAttribute("aria-selected", "false");
  viewer.at = at;
  const item = viewer.list.children[at];
  item.setAttribute("aria-selected", "true");
  viewer.list.setAttribute("aria-activedescendant", item.id);
  if (focus) item.scrollIntoView({ block: "nearest" });
  showTrajectory(viewer.shown[at]);
}

function showTrajectory(t) {
  const place = el("div", { "aria-live": "polite" });
  const open = (fork) => {
    place.replaceChildren(forkPanel(fork, () => { place.replaceChildren(); viewer.field.field.focus(); }));
    place.scrollIntoView({ block: "nearest" });
  };
  const field = new TokenField(t, { onFork: open });
  viewer.field = field;
  const names = Object.keys(field.values);
  if (!names.includes(viewer.quantity) && names.length) [viewer.quantity] = names;
  const legend = el("div", {}, names.length ? scaleLegend(viewer.quantity) : null);
  const select = el("select", { onchange: (event) => {
    viewer.quantity = event.target.value;
    field.colour(viewer.quantity);
    legend.replaceChildren(scaleLegend(viewer.quantity));
  } }, names.map((name) => el("option", { value: name, selected: name === viewer.quantity }, NAMES[name] || name)));
  field.colour(viewer.quantity);
  const edges = el("div", { class: "toolbar" }, names.length ? el("label", {}, "Colour by", select) : null, copyButton("copy numbers", () => field.table()));
  viewer.detail.replaceChildren(
    heading(t),
    block("Prompt", el("p", { class: "text" }, visible(t.prompt || ""))),
    t.answer ? el("p", { class: "answer" }, el("b", {}, "answer "), visible(t.answer)) : "",
    t.solution ? block("Reference", el("p", { class: "text" }, visible(t.solution))) : "",
    el("section", { class: "block" }, el("h3", {}, t.diff ? "Rewrite z, trained on" : "Response"), edges, legend, field.field, t.labels ? el("p", { class: "hint" }, "Wavy underline: the first wrong token of a step, by the task’s own checker.") : null),
    field.panel, forkButtons(t, field), place,
    t.diff ? diffPanel(t) : "", measured(t));
  watch(field);
}

// Long responses grow when their end comes into sight.
function watch(field) {
  viewer.observer?.disconnect();
  const near = (entries) => entries.some((entry) => entry.isIntersecting) && !field.more.hidden && field.append();
  viewer.observer = new IntersectionObserver(near, { root: field.field, rootMargin: "300px" });
  viewer.observer.observe(field.more);
}

function heading(t) {
  const words = [`step ${t.step}`, t.arm, t.id === undefined ? null : `prompt ${visible(t.id)}`, t.sample === undefined ? null : `sample ${t.sample}`, t.finish === "length" ? "cut off" : null, t.edit === "none" ? null : t.edit, t.kept === false ? `not trained on: ${t.reason || "dropped"}` : null];
  return el("header", { class: "head" }, el("span", { class: `badge ${t.cell}` }, OUTCOMES[t.cell] || t.cell), el("span", {}, words.filter(Boolean).join(" · ")));
}

function block(title, ...children) {
  return el("section", { class: "block" }, el("h3", {}, title), children);
}

function forkButtons(t, field) {
  if (!t.forks) return "";
  return el("p", { class: "fork-list" }, el("span", {}, "Candidates: "), t.forks.filter((fork) => fork.decision !== "reference").map((fork) =>
    el("button", { type: "button", class: `quiet mark-${fork.decision}`, onclick: () => field.move(fork.at, { open: true }) }, `${fork.at} · D ${number(fork.d)}`)));
}

function measured(t) {
  const entries = Object.entries(t.detail || {});
  if (!entries.length) return "";
  return el("details", { class: "block" }, el("summary", {}, "What the method noted"), el("dl", { class: "noted" }, entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, typeof value === "number" ? number(value) : visible(value))))));
}

// From the scatter: the trajectory with this fork, if it is on the page.
function openFork([, , , id, sample, step, position], readout) {
  const found = DATA.trajectories.find((t) => t.id === id && t.step === step && (t.sample ?? null) === sample);
  if (!found) { readout.textContent += " (not in this page’s sample)"; return; }
  Object.assign(viewer, { filter: "all", query: "", arm: "", step: "" });
  for (const input of document.querySelectorAll(".chooser input")) if (input.type === "radio") input.checked = input.value === "all"; else input.value = "";
  for (const select of document.querySelectorAll(".chooser select")) if (select.options[0].value === "") select.value = "";
  relist();
  choose(viewer.shown.indexOf(found));
  viewer.field.move(position, { open: true });
  document.getElementById("trajectories").scrollIntoView();
}
