// The page, top to bottom.

function slug(title) {
  return title.toLowerCase().replace(/[^a-z0-9.]+/g, "-");
}

function themeButton() {
  const dark = () => document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return el("button", { type: "button", class: "quiet", id: "theme", "aria-label": "Switch between light and dark", onclick: () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; } }, "◐");
}

function top() {
  const facts = DATA.facts.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, visible(value))));
  return el("header", { class: "top" },
    el("p", { class: "kicker" }, `onpath ${DATA.kind}`),
    el("h1", {}, visible(DATA.title)),
    DATA.tiles.length ? el("div", { class: "tiles" }, DATA.tiles.map((tile) => el("div", { class: "tile" }, el("span", {}, tile.label), el("strong", {}, tile.value), el("small", {}, tile.note)))) : null,
    el("details", { open: innerWidth > 700 }, el("summary", {}, "Setting"), el("dl", { class: "facts" }, facts)),
    DATA.notes.map((note) => el("p", { class: "note", role: "note" }, visible(note))));
}

function chartSection({ title, text, charts }) {
  return el("section", { class: "part", id: slug(title) }, el("h2", {}, title), text ? el("p", { class: "lead" }, text) : null, el("div", { class: "charts" }, charts.map((spec) => CHARTS[spec.kind](spec))));
}

function trajectories() {
  return DATA.trajectories.length ? buildViewer() : el("p", { class: "lead" }, "None are stored.");
}

function build() {
  const page = document.getElementById("page");
  document.title = `${visible(DATA.title)} · onpath report`;
  const sections = DATA.sections.filter((section) => section.charts.length);
  const [first, ...rest] = sections;
  const order = [...(first ? [first.title] : []), "Trajectories", ...rest.map((section) => section.title)];
  page.append(
    el("nav", { "aria-label": "Sections" }, order.map((title) => el("a", { href: `#${slug(title)}` }, title)), themeButton()),
    top(), first ? chartSection(first) : "");
  const viewerPart = el("section", { class: "part", id: "trajectories" }, el("h2", {}, "Trajectories"));
  page.append(viewerPart);
  // The rest is below the first screen: drawn once that is painted.
  requestAnimationFrame(() => setTimeout(() => {
    viewerPart.append(trajectories());
    page.append(...rest.map(chartSection), el("footer", {}, "Made by onpath report. This page holds all its data and loads nothing."));
    document.documentElement.dataset.ready = "yes";
  }));
}

build();
