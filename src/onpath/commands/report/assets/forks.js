// A fork: the two near futures side by side, the transport between their tokens as ribbons; and y → z as a diff.

const ROW = 24;

function forkPanel(fork, onClose) {
  const student = strings(integers(fork.s));
  const teacher = strings(integers(fork.t));
  const links = [];
  const plan = halves(fork.plan);
  for (let k = 0; k < plan.length; k += 3) links.push({ i: plan[k], j: plan[k + 1], share: plan[k + 2] });
  const facts = [["loss", `${number(fork.loss)} nats`], ["D", number(fork.d)], ["log p_S − log p_T", `${number(fork.gap)} nats`], ["weight", number(fork.w)]];
  const readout = el("p", { class: "readout", "aria-live": "polite" }, links.length
    ? "Ribbons join a token of the student's future to where the transport sends it; point at a token, or use the arrow keys."
    : fork.spread
      ? "The transport spreads every token over so many that no entry reaches 10% of its mass."
      : "No transport plan is stored for this position: only forks that guide have one.");
  return el("section", { class: "fork-panel", "aria-label": `Fork at token ${fork.at}` },
    el("header", {},
      el("h4", {}, `${DECISIONS[fork.decision] || fork.decision} at token ${fork.at}`),
      el("dl", { class: "inline" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("button", { type: "button", class: "quiet", "aria-label": "Close the fork", onclick: onClose }, "✕")),
    futures(student, teacher, links, readout), readout);
}

function futures(student, teacher, links, readout) {
  const height = ROW * Math.max(student.length, teacher.length, 1);
  const ribbons = links.map((link) => {
    const [a, b] = [ROW * (link.i + 0.5), ROW * (link.j + 0.5)];
    const same = student[link.i] === teacher[link.j];
    return svg("path", { class: `link ${same ? "same" : "other"}`, d: `M0 ${a}C50 ${a} 50 ${b} 100 ${b}`, "stroke-width": 1 + 5 * link.share, opacity: 0.25 + 0.75 * link.share });
  });
  const drawing = svg("svg", { class: "links", viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", style: `height:${height}px`, "aria-hidden": "true" }, ribbons);
  const column = (who, tokens) => el("ol", { class: `future ${who}` }, tokens.map((token, i) => el("li", { "data-who": who, "data-i": i }, el("span", {}, visible(token).replace(/\n/g, "") || "∅"))));
  const [left, right] = [column("student", student), column("teacher", teacher)];
  const lists = { student: left, teacher: right };
  let here = { who: "student", i: -1 };
  const mark = (who, i) => {
    here = { who, i };
    const mine = links.map((link) => (who === "student" ? link.i : link.j) === i);
    ribbons.forEach((ribbon, k) => ribbon.classList.toggle("off", !mine[k]));
    for (const [name, list] of Object.entries(lists)) {
      [...list.children].forEach((item, k) => {
        const linked = links.some((link, n) => mine[n] && (name === "student" ? link.i : link.j) === k);
        item.classList.toggle("lit", (name === who && k === i) || linked);
      });
    }
    const others = links.filter((_, k) => mine[k]).map((link) => `${quoted(who === "student" ? teacher[link.j] : student[link.i])} ${number(link.share, "%")}`);
    const token = (who === "student" ? student : teacher)[i];
    readout.textContent = `${who}’s token ${i}, ${quoted(token)}: ${others.join(", ") || "no mass above the stored limit"}`;
  };
  const box = el("div", { class: "futures", tabindex: "0", role: "group", "aria-label": "Both futures. Up and down walk through the tokens, left and right change sides." }, left, drawing, right);
  box.addEventListener("pointerover", (event) => {
    const item = event.target.closest("li");
    if (item) mark(item.dataset.who, Number(item.dataset.i));
  });
  box.addEventListener("keydown", (event) => {
    const who = { ArrowLeft: "student", ArrowRight: "teacher" }[event.key] ?? here.who;
    const step = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: 0, ArrowRight: 0 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const count = (who === "student" ? student : teacher).length;
    if (count) mark(who, Math.max(0, Math.min(count - 1, here.i + step)));
  });
  return el("div", {},
    el("div", { class: "future-heads" }, el("b", {}, "student goes on"), el("span", {}), el("b", {}, "teacher goes on")),
    el("div", { class: "future-scroll" }, box));
}

function diffPanel(trajectory) {
  const y = strings(integers(trajectory.y));
  const z = strings(integers(trajectory.z));
  const side = (tokens, from, kind, word) => el("div", { class: "side" }, el("h4", {}, word), el("p", { class: "text" }, trajectory.diff.map((span, n) => {
    const [tag] = span;
    const text = tokens.slice(span[from], span[from + 1]).map(visible).join("");
    return tag === "equal" ? text : text ? el(kind, { "data-n": n }, text) : null;
  })));
  const panel = el("div", { class: "diff" }, side(y, 1, "del", "attempt y, the student’s own"), side(z, 3, "ins", "rewrite z, trained on"));
  panel.addEventListener("pointerover", (event) => {
    for (const change of panel.querySelectorAll("[data-n]")) change.classList.toggle("lit", change.dataset.n === event.target.dataset.n);
  });
  return el("section", { class: "block" }, el("h3", {}, "y → z"), panel);
}
