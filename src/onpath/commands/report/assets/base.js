// Helpers. Every text reaches the page through textContent: data is never read as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Bidirectional and other invisible controls would move or hide text around them: they are named instead.
// The joiners of emoji and of scripts that need them stay.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visible(text) {
  return String(text)
    .replace(HIDDEN, (c) => `⟨${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replace(/\t/g, "⇥")
    .replace(/\n/g, "⏎\n");
}

// A token by itself: its spaces count.
function quoted(token) {
  return `‘${visible(token).replace(/ /g, "␣").replace(/\n/g, "")}’`;
}

// One digit as Python's formats round it, so that a chart says what its table says: 26.25 is 26.2, not 26.3.
function tenths(value) {
  const even = Number.isInteger(4 * value) && Math.abs((4 * value) % 4) === 1;
  return (even ? value - 0.05 * Math.sign(value) : value).toFixed(1);
}

function number(value, unit = "") {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "%") return `${tenths(100 * value)}%`;
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(1).replace(/-/g, "−");
  if (Number.isInteger(value) && Math.abs(value) >= 1000) return value.toLocaleString("en-US");
  const short = Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
  return short.replace("-", "−");
}

function bytes(text) {
  return Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));
}

function integers(text) {
  return new Uint16Array(bytes(text).buffer);
}

function halves(text) {
  return Float32Array.from(new Uint16Array(bytes(text).buffer), (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

function strings(places) {
  return Array.from(places, (place) => DATA.vocabulary[place] ?? "�");
}

// From a file there is no clipboard interface in every browser: the old way is the fallback.
async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}

function copyButton(label, text) {
  return el("button", { type: "button", class: "quiet", onclick: (event) => copy(text(), event.currentTarget) }, label);
}

function tsv(rows) {
  return rows.map((row) => row.map((cell) => String(cell ?? "").replace(/[\t\n]/g, " ")).join("\t")).join("\n");
}
