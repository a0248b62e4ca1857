// A response as tokens coloured by a quantity, with a line of numbers for the token under the pointer or the cursor.

const EDGES = [0.05, 0.2, 0.5, 1, 2, 4, 8];
const NAMES = {
  reverse_kl: "reverse KL(student‖teacher)",
  forward_kl: "forward KL(teacher‖student)",
  student_entropy: "student's entropy",
  teacher_entropy: "teacher's entropy",
  student_logp: "student's log-prob",
  teacher_logp: "teacher's log-prob",
  gap: "log-prob gap, student − teacher",
  weight: "weight in the loss",
};
const FOREIGN = "not by the student"; // 1 or 0
const CHUNK = 400;

function valuesOf(trajectory) {
  const values = Object.fromEntries(Object.entries(trajectory.values || {}).map(([name, text]) => [name, halves(text)]));
  if (values.student_logp && values.teacher_logp) values.gap = values.student_logp.map((v, i) => v - values.teacher_logp[i]);
  return values;
}

// Bin 0 is plain; 1 to 7 are warm (large), −1 to −7 cold (large, below zero where the sign means something).
function bin(quantity, value) {
  if (Number.isNaN(value)) return 0;
  const size = quantity === "weight" ? 8 * Math.abs(1 - value) : Math.abs(value);
  const level = EDGES.filter((edge) => size >= edge).length;
  return value < 0 && !quantity.endsWith("logp") ? -level : level;
}

function binClass(level) {
  return level === 0 ? "" : level > 0 ? `w${level}` : `n${-level}`;
}

function scaleLegend(quantity) {
  const below = quantity.endsWith("logp");
  const box = (level, text) => el("span", { class: `swatch ${binClass(level)}` }, text);
  if (quantity === FOREIGN) return el("p", { class: "scale", "aria-hidden": "true" }, box(bin(quantity, 1), "written by the teacher, or forced"));
  const warm = EDGES.map((edge, i) => box(i + 1, `${i === EDGES.length - 1 ? (below ? "≤ " : "≥ ") : ""}${below ? "−" : ""}${edge}`));
  const signed = quantity === "gap" || (!(quantity in NAMES) && !below);
  const cold = signed ? [...EDGES].reverse().map((edge, i) => box(-(EDGES.length - i), `${i === 0 ? "≤ " : ""}−${edge}`)) : [];
  const unit = quantity in NAMES ? "nats, from:" : "from:";
  const text = quantity === "weight" ? "off 1 by more than 1/160 to 1:" : unit;
  return el("p", { class: "scale", "aria-hidden": "true" }, el("span", {}, text), cold, warm);
}

class TokenField {
  constructor(trajectory, { onFork }) {
    this.trajectory = trajectory;
    this.tokens = strings(integers(trajectory.tokens));
    this.values = valuesOf(trajectory);
    this.forks = new Map((trajectory.forks || []).map((fork) => [fork.at, fork]));
    this.onFork = onFork;
    this.at = -1;
    this.shown = 0;
    this.field = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Response. Left and right walk through its tokens, f goes to the next fork, Enter opens it.", "aria-describedby": "token-numbers" });
    this.panel = el("div", { class: "panel", id: "token-numbers", "aria-live": "polite" }, el("p", { class: "hint" }, "Point at a token, or walk with ← and →."));
    this.more = el("button", { type: "button", class: "quiet more", onclick: () => this.append() });
    this.field.append(this.more);
    this.field.addEventListener("pointerover", (event) => this.hover(event.target));
    this.field.addEventListener("pointerleave", () => this.at >= 0 && this.show(this.at));
    this.field.addEventListener("click", (event) => this.click(event.target));
    this.field.addEventListener("keydown", (event) => this.key(event));
    this.append();
  }

  // Only so many at once; the rest when their place comes near.
  append() {
    const end = Math.min(this.tokens.length, this.shown + CHUNK);
    const made = document.createDocumentFragment();
    for (let i = this.shown; i < end; i += 1) made.append(this.token(i));
    this.more.before(made);
    this.shown = end;
    const left = this.tokens.length - end;
    this.more.hidden = left === 0;
    this.more.textContent = left ? `${left.toLocaleString("en-US")} more tokens` : "";
  }

  token(i) {
    const fork = this.forks.get(i);
    const label = this.trajectory.labels?.[i];
    const span = el("span", { class: `t${fork ? ` mark-${fork.decision}` : ""}${label === "error" ? " wrong" : ""}`, "data-i": i }, visible(this.tokens[i]));
    const level = this.quantity ? binClass(bin(this.quantity, this.values[this.quantity]?.[i] ?? NaN)) : "";
    if (level) span.classList.add(level);
    return span;
  }

  colour(quantity) {
    this.quantity = quantity;
    const values = this.values[quantity];
    for (let i = 0; i < this.shown; i += 1) {
      const span = this.field.children[i];
      const kept = [...span.classList].filter((name) => !/^[wn]\d$/.test(name));
      const level = values ? binClass(bin(quantity, values[i])) : "";
      span.className = level ? [...kept, level].join(" ") : kept.join(" ");
    }
  }

  move(i, { open = false } = {}) {
    const at = Math.max(0, Math.min(this.tokens.length - 1, i));
    while (this.shown <= at) this.append();
    this.field.children[this.at]?.classList.remove("here");
    this.at = at;
    const span = this.field.children[at];
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    this.show(at);
    if (open && this.forks.has(at)) this.onFork(this.forks.get(at));
  }

  hover(target) {
    if (target.dataset.i !== undefined) this.show(Number(target.dataset.i));
  }

  click(target) {
    if (target.dataset.i !== undefined && getSelection().isCollapsed) this.move(Number(target.dataset.i), { open: true });
  }

  key(event) {
    const places = [...this.forks.keys()].sort((a, b) => a - b);
    const next = places.find((p) => p > this.at) ?? places[0];
    const previous = [...places].reverse().find((p) => p < this.at) ?? places[places.length - 1];
    const move = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: this.tokens.length - 1, f: next, F: previous }[event.key];
    if (event.key === "Enter" && this.forks.has(this.at)) this.onFork(this.forks.get(this.at));
    if (move === undefined || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.move(move);
  }

  show(i) {
    const parts = [el("dt", {}, `token ${i}`), el("dd", { class: "mono" }, quoted(this.tokens[i]))];
    for (const [name, values] of Object.entries(this.values)) {
      parts.push(el("dt", {}, NAMES[name] || name), el("dd", { class: name === this.quantity ? "strong" : null }, number(values[i])));
    }
    if (this.trajectory.labels) parts.push(el("dt", {}, "truth"), el("dd", {}, this.trajectory.labels[i] || "–"));
    const fork = this.forks.get(i);
    if (fork) parts.push(el("dt", {}, DECISIONS[fork.decision] || fork.decision), el("dd", {}, `D ${number(fork.d)}`));
    this.panel.replaceChildren(el("dl", {}, pairs(parts)), ...this.topOf(i));
  }

  topOf(i) {
    if (this.trajectory.top_left_out) return [el("p", { class: "hint" }, "The likeliest tokens of both models are in this step’s Parquet file: the page would be too large.")];
    if (!this.trajectory.top) return [];
    this.top ??= Object.entries(this.trajectory.top).map(([who, { k, tokens, logp }]) => ({ who, k, tokens: integers(tokens), logp: halves(logp) }));
    return this.top.map(({ who, k, tokens, logp }) => {
      const names = strings(tokens.slice(i * k, (i + 1) * k));
      const shares = logp.slice(i * k, (i + 1) * k);
      return el("p", { class: "likely" }, el("b", {}, `${who}: `), names.map((name, j) => el("span", { class: "mono" }, `${quoted(name)} ${number(Math.exp(shares[j]), "%")}`)));
    });
  }

  table() {
    const names = Object.keys(this.values);
    return tsv([["token", "text", ...names], ...this.tokens.map((text, i) => [i, visible(text), ...names.map((name) => Number(this.values[name][i].toPrecision(4)))])]);
  }
}

function pairs(parts) {
  const found = [];
  for (let i = 0; i < parts.length; i += 2) found.push(el("div", {}, parts[i], parts[i + 1]));
  return found;
}
