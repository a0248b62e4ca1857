// Line, stack and histogram charts: a frame with axes, a crosshair that follows pointer and arrow keys, the numbers.

const FRAME = { width: 300, height: 186, left: 40, right: 8, top: 8, bottom: 32 };
FRAME.innerWidth = FRAME.width - FRAME.left - FRAME.right;
FRAME.innerHeight = FRAME.height - FRAME.top - FRAME.bottom;

function ticks(low, high, count = 4) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) found.push(Number(t.toPrecision(12)));
  return found;
}

// Steps and token positions are whole numbers; a ratio or a distance is not.
function xTicks(low, high, values) {
  const found = ticks(low, high, 5).filter((t) => t >= low && t <= high);
  return values.every(Number.isInteger) ? found.filter(Number.isInteger) : found;
}

function scale(low, high, from, to) {
  const span = high > low ? high - low : 1;
  const at = (value) => from + ((value - low) / span) * (to - from);
  at.back = (place) => low + ((place - from) / (to - from)) * span;
  return at;
}

function extent(values, zero) {
  let low = zero ? 0 : Infinity;
  let high = zero ? 0 : -Infinity;
  for (const v of values) {
    if (v === null || v === undefined || !Number.isFinite(v)) continue;
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  if (!Number.isFinite(low)) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const room = 0.04 * (high - low);
  return [zero && low === 0 ? 0 : low - room, zero && high === 0 ? 0 : high + room];
}

function percents(ticks) {
  // As many digits as tell neighbours apart.
  const gap = Math.min(...ticks.slice(1).map((t, i) => 100 * Math.abs(t - ticks[i])));
  const digits = Number.isFinite(gap) && gap > 0 ? Math.max(0, Math.ceil(-Math.log10(gap) - 1e-9)) : 0;
  const exact = ticks.every((t) => Math.abs(100 * t - Number((100 * t).toFixed(digits))) < 1e-6);
  return ticks.map((t) => `${(100 * t).toFixed(exact ? digits : digits + 1)}%`);
}

function axes(x, y, spec, across, up, unit) {
  const bottom = FRAME.top + FRAME.innerHeight;
  const group = svg("g", { class: "axes" });
  const shares = unit === "%" ? percents(up) : null;
  for (const [i, t] of up.entries()) {
    const at = y(t);
    group.append(
      svg("line", { x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: at, y2: at }),
      svg("text", { x: FRAME.left - 6, y: at + 3.5, "text-anchor": "end" }, shares ? shares[i] : number(t)),
    );
  }
  for (const t of across) group.append(svg("text", { x: x(t), y: bottom + 14, "text-anchor": "middle" }, number(t)));
  const label = svg("text", { x: FRAME.left + FRAME.innerWidth / 2, y: FRAME.height - 3, "text-anchor": "middle", class: "label" }, spec.x);
  group.append(svg("line", { class: "base", x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: bottom, y2: bottom }), label);
  return group;
}

function path(points) {
  let text = "";
  let open = false;
  for (const [px, py] of points) {
    if (py === null || Number.isNaN(py)) { open = false; continue; }
    text += `${open ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
    open = true;
  }
  return text;
}

function band(x, y, s) {
  const held = s.x.map((v, i) => [x(v), s.low[i], s.high[i]]).filter(([, low, high]) => low !== null && high !== null);
  if (!held.length) return null;
  const over = held.map(([px, , high]) => `${px.toFixed(1)} ${y(high).toFixed(1)}`);
  const under = held.map(([px, low]) => `${px.toFixed(1)} ${y(low).toFixed(1)}`).reverse();
  return `M${[...over, ...under].join("L")}Z`;
}

const TRIANGLE = "M0 -3.6L3.4 2.4H-3.4Z";
const PLUS = "M-1.2 -3.6h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4Z";
// Matplotlib's o s D ^ v P * X < > p d, turned by so many degrees: an arm has the same one in doses.png.
const SHAPES = [
  ["M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z"], ["M-2.7 -2.7h5.4v5.4h-5.4Z"], ["M0 -3.8L3.8 0L0 3.8L-3.8 0Z"],
  [TRIANGLE], [TRIANGLE, 180], [PLUS], ["M0 -4.4L1 -1.4H4.2L1.6 0.5L2.6 3.6L0 1.7L-2.6 3.6L-1.6 0.5L-4.2 -1.4H-1Z"], [PLUS, 45],
  [TRIANGLE, -90], [TRIANGLE, 90], ["M0 -3.6L3.4 -1.1L2.1 2.9H-2.1L-3.4 -1.1Z"], ["M0 -4.2L2.3 0L0 4.2L-2.3 0Z"],
];

// A series looks alike wherever the page compares it: by its place, colour and dashes, and a marker of its points.
function lookOf(place) {
  return `series c${place % DATA.colours} dashes${Math.floor(place / 8) % 4}`;
}

function marker(place, px, py) {
  const [d, turned = 0] = SHAPES[place % SHAPES.length];
  return svg("path", { class: "dot", d, transform: `translate(${px.toFixed(1)} ${py.toFixed(1)}) rotate(${turned})` });
}

function placeOf(s, at) {
  return s.colour ?? at;
}

function isMarked(s) {
  return s.marks || s.x.length < 2;
}

function drawSeries(x, y, s, at) {
  const place = placeOf(s, at);
  const group = svg("g", { class: lookOf(place) });
  if (s.low && !s.marks) group.append(svg("path", { class: "band", d: band(x, y, s) }));
  if (s.x.length > 1) group.append(svg("path", { class: "line", d: path(s.x.map((v, j) => [x(v), s.y[j] === null ? null : y(s.y[j])])) }));
  if (!isMarked(s)) return group;
  s.x.forEach((v, j) => {
    if (s.y[j] === null) return;
    if (s.low?.[j] != null) group.append(svg("line", { class: "bar", x1: x(v), x2: x(v), y1: y(s.low[j]), y2: y(s.high[j]) }));
    group.append(marker(place, x(v), y(s.y[j])));
  });
  return group;
}

// A value in words, behind a piece of the line that it is of.
function keyed({ place, marked, text }) {
  if (place === undefined) return el("span", {}, text);
  const piece = svg("svg", { class: lookOf(place), viewBox: "0 0 22 10", "aria-hidden": "true" }, svg("path", { class: "line", d: "M0 5H22" }), marked ? marker(place, 11, 5) : null);
  return el("span", { class: "key" }, piece, text);
}

function lineChart(spec) {
  const all = spec.series;
  const [xLow, xHigh] = extent(all.flatMap((s) => s.x), false);
  const [yLow, yHigh] = extent(all.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]), spec.zero);
  const top = spec.unit === "%" ? Math.min(1.02, yHigh) : yHigh;
  const few = all.every((s) => s.x.length < 2);
  const x = scale(few ? xLow - 1 : Math.min(...all.flatMap((s) => s.x)), few ? xHigh + 1 : Math.max(...all.flatMap((s) => s.x)), FRAME.left + 4, FRAME.width - FRAME.right - 4);
  const y = scale(yLow, top, FRAME.top + FRAME.innerHeight, FRAME.top);
  const picture = svg("g", {}, axes(x, y, spec, xTicks(Math.max(Math.min(0, xLow), x.back(FRAME.left)), x.back(FRAME.width - FRAME.right), all.flatMap((s) => s.x)), ticks(yLow, top), spec.unit), all.map((s, i) => drawSeries(x, y, s, i)));
  const stops = [...new Set(all.flatMap((s) => s.x))].sort((a, b) => a - b);
  const say = (at) => all.map((s, i) => {
    const j = s.x.indexOf(at);
    const range = s.low?.[j] != null ? ` [${number(s.low[j], spec.unit)}, ${number(s.high[j], spec.unit)}]` : "";
    return { place: placeOf(s, i), marked: isMarked(s), text: `${s.name} ${number(s.y[j], spec.unit)}${range}` };
  });
  const table = [[spec.x, "series", "value", "low", "high"], ...all.flatMap((s) => s.x.map((v, j) => [v, s.name, s.y[j], s.low?.[j], s.high?.[j]]))];
  return chartCard(spec, picture, { stops, x, say, table });
}

function stackChart(spec) {
  const steps = spec.series[0].x;
  const totals = steps.map((_, i) => spec.series.reduce((sum, s) => sum + (s.y[i] || 0), 0));
  const x = scale(steps[0] - 0.5, steps[steps.length - 1] + 0.5, FRAME.left, FRAME.width - FRAME.right);
  const high = Math.max(...totals) || 1;
  const y = scale(0, high, FRAME.top + FRAME.innerHeight, FRAME.top);
  const below = steps.map(() => 0);
  const areas = spec.series.map((s, k) => {
    const lower = [...below];
    s.y.forEach((v, i) => { below[i] += v || 0; });
    const edge = (heights) => heights.flatMap((h, i) => [[x(steps[i] - 0.5), y(h)], [x(steps[i] + 0.5), y(h)]]).map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`);
    return svg("path", { class: `area c${k % DATA.colours}`, d: `M${[...edge(below), ...edge(lower).reverse()].join("L")}Z` });
  });
  const picture = svg("g", {}, axes(x, y, spec, xTicks(steps[0] - 0.5, steps[steps.length - 1] + 0.5, steps), ticks(0, high), spec.unit), areas);
  const say = (at) => spec.series.map((s, i) => ({ place: i, text: `${s.name} ${number(s.y[steps.indexOf(at)])} ${spec.unit}` }));
  const table = [[spec.x, ...spec.series.map((s) => s.name)], ...steps.map((v, i) => [v, ...spec.series.map((s) => s.y[i])])];
  return chartCard(spec, picture, { stops: steps, x, say, table });
}

function histogramChart(spec) {
  const edges = spec.edges;
  const sizes = spec.series.map((s) => s.counts.reduce((a, b) => a + b, 0));
  const shares = spec.series.map((s, k) => s.counts.map((c) => c / sizes[k]));
  const high = Math.max(...shares.flat());
  const x = scale(edges[0], edges[edges.length - 1], FRAME.left, FRAME.width - FRAME.right);
  const y = scale(0, high * 1.05, FRAME.top + FRAME.innerHeight, FRAME.top);
  const outlines = shares.map((share, k) => {
    const points = share.flatMap((v, i) => [`${x(edges[i]).toFixed(1)} ${y(v).toFixed(1)}`, `${x(edges[i + 1]).toFixed(1)} ${y(v).toFixed(1)}`]);
    const d = `M${x(edges[0])} ${y(0)}L${points.join("L")}L${x(edges[edges.length - 1])} ${y(0)}`;
    return svg("path", { class: `outline c${k % DATA.colours}`, d });
  });
  const picture = svg("g", {}, axes(x, y, spec, ticks(edges[0], edges[edges.length - 1], 5), ticks(0, high * 1.05), "%"), outlines);
  const idle = spec.series.map((s, k) => ({ place: k, text: `${s.name} (${number(sizes[k])})` }));
  const middles = edges.slice(1).map((e, i) => (e + edges[i]) / 2);
  const say = (at) => {
    const i = middles.indexOf(at);
    const range = { text: `${number(edges[i])} to ${number(edges[i + 1])}` };
    return [range, ...spec.series.map((s, k) => ({ place: k, text: `${s.name} ${number(shares[k][i], "%")} (${number(s.counts[i])} of ${number(sizes[k])})` }))];
  };
  const table = [["from", "to", ...spec.series.map((s) => s.name)], ...middles.map((_, i) => [edges[i], edges[i + 1], ...spec.series.map((s) => s.counts[i])])];
  return chartCard(spec, picture, { stops: middles, x, say, table, idle });
}

// A chart with its title, crosshair, line of numbers, and all numbers to copy.
function chartCard(spec, picture, { stops, x, say, table, idle }) {
  const line = svg("line", { class: "cross", y1: FRAME.top, y2: FRAME.top + FRAME.innerHeight, visibility: "hidden" });
  const frame = svg("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", tabindex: "0", "aria-label": `${spec.title}. Arrow keys read the values.` }, picture, line);
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  let at = stops.length - 1;
  const show = (index, marked) => {
    at = Math.max(0, Math.min(stops.length - 1, index));
    const place = stops[at];
    line.setAttribute("x1", x(place));
    line.setAttribute("x2", x(place));
    line.setAttribute("visibility", marked ? "visible" : "hidden");
    const where = idle ? [] : [{ text: `${spec.x} ${number(place)}` }];
    const parts = idle && !marked ? idle : [...where, ...say(place)];
    readout.replaceChildren(...parts.map(keyed));
  };
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const value = x.back(((event.clientX - box.left) / box.width) * FRAME.width);
    show(stops.reduce((best, s, i) => (Math.abs(s - value) < Math.abs(stops[best] - value) ? i : best), 0), true);
  });
  frame.addEventListener("pointerleave", () => show(stops.length - 1, false));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(move, true);
  });
  show(stops.length - 1, false);
  return card(spec, frame, { readout, table });
}

function card(spec, body, { readout = null, table = null, wide = "" }) {
  const unit = spec.unit && spec.unit !== "%" ? el("small", {}, ` ${spec.unit}`) : null;
  return el("figure", { class: `card ${wide}`, "data-kind": spec.kind },
    el("figcaption", {}, el("h3", {}, spec.title, unit), spec.help ? el("p", {}, spec.help) : null),
    body, readout, table ? numbersOf(table) : null);
}

function numbersOf(table) {
  const details = el("details", { class: "numbers" }, el("summary", {}, "numbers"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(copyButton("copy", () => tsv(table)), el("pre", { tabindex: "0" }, tsv(table)));
  });
  return details;
}
