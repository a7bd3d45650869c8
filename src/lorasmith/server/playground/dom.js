// Building the page. Text of models and adapters enters through text nodes only, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings among the children become text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Rows of a description list, from pairs; pairs without a value are left out. */
export function facts(pairs) {
  return pairs
    .filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value instanceof Node ? value : String(value))));
}

const SVG = "http://www.w3.org/2000/svg";

const ANVIL = 0b111110100110111; // rows of three columns, mirrored; the lowest bit is the first

/** Sparse patterns are struck the other way round, so that every mark has a body. */
function full(bits) {
  const isSparse = bits.toString(2).replaceAll("0", "").length < 7;
  return isSparse ? ~bits & 0x7fff : bits;
}

/** A mark struck from a digest: equal weights, equal mark. For the eye only; the digest is beside it. */
export function hallmark(digest) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 5 5");
  svg.setAttribute("class", digest ? "hallmark" : "hallmark plain");
  svg.setAttribute("aria-hidden", "true");
  const bits = digest ? full(parseInt(digest.slice(0, 4), 16) & 0x7fff) : ANVIL;
  if (digest) svg.style.setProperty("--hue", String(parseInt(digest.slice(8, 12), 16) % 360));
  for (let i = 0; i < 15; i += 1) {
    if (!((bits >>> i) & 1)) continue;
    const [x, y] = [i % 3, Math.floor(i / 3)];
    for (const column of new Set([x, 4 - x])) {
      const square = document.createElementNS(SVG, "rect");
      for (const [name, value] of Object.entries({ x: column, y, width: 1.02, height: 1.02 })) {
        square.setAttribute(name, String(value));
      }
      svg.append(square);
    }
  }
  return svg;
}

/** Say something to screen readers, once. Old words leave, so that the region stays short. */
export function announce(text) {
  const region = byId("announcer");
  region.append(el("p", {}, text));
  while (region.children.length > 12) region.firstChild.remove();
}

export const count = (value) => Number(value).toLocaleString("en");

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (value >= 1024 && unit < 3) [value, unit] = [value / 1024, unit + 1];
  return `${value.toLocaleString("en", { maximumFractionDigits: 1 })} ${units[unit]}`;
}
