// Scatter with named quadrants, the four cells as a flow, intervals by row, tables.

const MARKS = {
  fork: (x, y) => `M${x} ${y - 3.4}L${x + 3.4} ${y}L${x} ${y + 3.4}L${x - 3.4} ${y}Z`,
  surface: (x, y) => `M${x - 2.6} ${y - 2.6}h5.2v5.2h-5.2Z`,
  too_close: (x, y) => `M${x - 2.6} ${y}h5.2M${x} ${y - 2.6}v5.2`,
  reference: (x, y) => `M${x - 2} ${y - 2}l4 4m0 -4l-4 4`,
};
const DECISIONS = { fork: "real fork ◆", surface: "surface mismatch □", too_close: "too close to another +", reference: "low-loss reference ×" };

function scatterChart(spec) {
  const points = [...spec.points].sort((a, b) => a[0] - b[0]);
  const [, xHigh] = extent(points.map((p) => p[0]), true);
  const [, yHigh] = extent(points.map((p) => p[1]), true);
  const x = scale(0, xHigh, FRAME.left, FRAME.width - FRAME.right);
  const y = scale(0, yHigh, FRAME.top + FRAME.innerHeight, FRAME.top);
  const kinds = Object.keys(DECISIONS).filter((kind) => points.some((p) => p[2] === kind));
  const marks = kinds.map((kind) => svg("path", { class: `mark ${kind}`, d: points.filter((p) => p[2] === kind).map((p) => MARKS[kind](x(p[0]), y(p[1]))).join("") }));
  const cursor = svg("circle", { class: "cursor", r: 7, visibility: "hidden" });
  const frame = svg("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", tabindex: "0", "aria-label": `${spec.title}. Arrow keys walk through the points, Enter opens the trajectory.` },
    axes(x, y, spec, ticks(0, xHigh, 5), ticks(0, yHigh), ""), marks, quadrants(spec, x, y), cursor);
  const readout = el("p", { class: "readout", "aria-live": "polite" }, `Pearson correlation of loss and D: ${number(spec.pearson)}`);
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(points.length - 1, index));
    const [loss, distance, decision, id, , step, position] = points[at];
    cursor.setAttribute("cx", x(loss));
    cursor.setAttribute("cy", y(distance));
    cursor.setAttribute("visibility", "visible");
    readout.textContent = `loss ${number(loss)} nats, D ${number(distance)}, ${DECISIONS[decision]}; prompt ${visible(id)}, step ${step}, token ${position}`;
  };
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * FRAME.width;
    const py = ((event.clientY - box.top) / box.height) * FRAME.height;
    const far = (p) => (x(p[0]) - px) ** 2 + (y(p[1]) - py) ** 2;
    show(points.reduce((best, p, i) => (far(p) < far(points[best]) ? i : best), 0));
  });
  frame.addEventListener("click", () => at >= 0 && openFork(points[at], readout));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: points.length - 1 }[event.key];
    if (event.key === "Enter" && at >= 0) openFork(points[at], readout);
    if (move === undefined) return;
    event.preventDefault();
    show(move);
  });
  const table = [["loss", "D", "decision", "prompt", "sample", "step", "token"], ...points];
  const made = card(spec, frame, { readout, table });
  made.insertBefore(el("p", { class: "legend" }, kinds.map((kind) => el("span", { class: `mark-key ${kind}` }, DECISIONS[kind]))), readout);
  return made;
}

function quadrants(spec, x, y) {
  const [loss, distance] = spec.split;
  const right = FRAME.width - FRAME.right;
  const bottom = FRAME.top + FRAME.innerHeight;
  const [lowHigh, highHigh, lowLow, highLow] = [spec.quadrants[0], spec.quadrants[1], spec.quadrants[2], spec.quadrants[3]];
  const text = (px, py, anchor, words) => svg("text", { x: px, y: py, "text-anchor": anchor, class: "quadrant" }, words);
  return svg("g", {},
    svg("line", { class: "split", x1: x(loss), x2: x(loss), y1: FRAME.top, y2: bottom }),
    svg("line", { class: "split", x1: FRAME.left, x2: right, y1: y(distance), y2: y(distance) }),
    text(right - 4, FRAME.top + 11, "end", highHigh),
    text(right - 4, bottom - 5, "end", lowHigh),
    text(FRAME.left + 5, FRAME.top + 11, "start", highLow),
    text(FRAME.left + 5, bottom - 5, "start", lowLow));
}

function flowChart(spec) {
  const c = spec.cells;
  const height = 130;
  const width = 330;
  const nodes = { y: { right: c.right_to_right + c.right_to_wrong }, z: { right: c.right_to_right + c.wrong_to_right } };
  const gap = 14;
  const size = (share) => share * (height - gap);
  const start = { y: { right: 8, wrong: 8 + size(nodes.y.right) + gap }, z: { right: 8, wrong: 8 + size(nodes.z.right) + gap } };
  const used = { y: { right: 0, wrong: 0 }, z: { right: 0, wrong: 0 } };
  const ribbons = ["right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong"].map((name) => {
    const [from, to] = name.split("_to_");
    const h = size(c[name]);
    const a = start.y[from] + used.y[from];
    const b = start.z[to] + used.z[to];
    used.y[from] += h;
    used.z[to] += h;
    return svg("path", { class: `ribbon ${name}`, d: `M94 ${a}C165 ${a} 165 ${b} 236 ${b}V${b + h}C165 ${b + h} 165 ${a + h} 94 ${a + h}Z` }, svg("title", {}, `${from} → ${to}: ${number(c[name], "%")}`));
  });
  const bars = ["y", "z"].flatMap((side) => ["right", "wrong"].map((kind) => {
    const share = kind === "right" ? nodes[side].right : 1 - nodes[side].right;
    const left = side === "y";
    const top = start[side][kind];
    const words = `${left ? "attempt" : "rewrite"} ${kind}`;
    return svg("g", { class: `node ${kind}` },
      svg("rect", { x: left ? 86 : 236, y: top, width: 8, height: Math.max(1, size(share)) }),
      svg("text", { x: left ? 80 : 250, y: top + size(share) / 2, "text-anchor": left ? "end" : "start" }, words),
      svg("text", { x: left ? 80 : 250, y: top + size(share) / 2 + 13, "text-anchor": left ? "end" : "start", class: "strong" }, number(share, "%")));
  }));
  const words = Object.entries(c).map(([name, share]) => `${name.replace("_to_", " → ")} ${number(share, "%")}`).join(" · ");
  const frame = svg("svg", { viewBox: `0 0 ${width} ${height + 24}`, role: "img", "aria-label": `${spec.title}: ${words}` }, ribbons, bars);
  return card(spec, frame, { readout: el("p", { class: "readout" }, words), table: [["cell", "share"], ...Object.entries(c)] });
}

// Rows with a mean, its interval and the single values behind it; a line at `reference`.
function intervalsChart(spec) {
  const rowHeight = 26;
  const left = 170;
  const width = 560;
  const height = spec.rows.length * rowHeight + 42;
  const [low, high] = extent(spec.rows.flatMap((r) => [r.low, r.high, r.mean, ...(r.points || [])]).concat(spec.reference ?? []), false);
  const x = scale(low, high, left, width - 12);
  const bottom = spec.rows.length * rowHeight + 6;
  const grid = ticks(low, high, 4).map((t) => svg("g", { class: "axes" },
    svg("line", { x1: x(t), x2: x(t), y1: 4, y2: bottom }),
    svg("text", { x: x(t), y: bottom + 14, "text-anchor": "middle" }, spec.unit === "%" ? `${(100 * t).toFixed(high - low < 0.1 ? 1 : 0)}%` : number(t))));
  const rows = spec.rows.map((r, i) => {
    const y = i * rowHeight + rowHeight / 2 + 4;
    return svg("g", { class: "interval" },
      svg("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, visible(r.name)),
      (r.points || []).map((p) => svg("circle", { class: "seed", cx: x(p), cy: y, r: 2.4 })),
      r.low === null || r.low === undefined ? null : svg("line", { class: "bar", x1: x(r.low), x2: x(r.high), y1: y, y2: y }),
      svg("circle", { class: "dot", cx: x(r.mean), cy: y, r: 4 }),
      svg("title", {}, `${visible(r.name)}: ${number(r.mean, spec.unit)} [${number(r.low, spec.unit)}, ${number(r.high, spec.unit)}]`));
  });
  const reference = spec.reference === null || spec.reference === undefined ? null : svg("line", { class: "split", x1: x(spec.reference), x2: x(spec.reference), y1: 4, y2: bottom });
  const frame = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title }, grid, reference, rows,
    svg("text", { class: "axes label", x: (left + width - 12) / 2, y: height - 4, "text-anchor": "middle" }, spec.x));
  const table = [["", "mean", "low", "high", "values"], ...spec.rows.map((r) => [r.name, r.mean, r.low, r.high, (r.points || []).join(" ")])];
  return card(spec, frame, { table, wide: "half" });
}

function tableChart(spec) {
  const cells = (row, tag) => row.map((cell, i) => el(tag, { class: i ? "num" : null, scope: tag === "th" ? "col" : null }, visible(cell ?? "–")));
  const body = el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, cells(spec.columns, "th"))), el("tbody", {}, spec.rows.map((row) => el("tr", {}, cells(row, "td"))))));
  return card(spec, body, { table: [spec.columns, ...spec.rows], wide: spec.columns.length > 7 ? "wide" : "half" });
}

const CHARTS = { lines: lineChart, stack: stackChart, histogram: histogramChart, scatter: scatterChart, flow: flowChart, intervals: intervalsChart, table: tableChart };
