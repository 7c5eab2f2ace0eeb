// Drawing: arrays as pictures, and charts. Text is only ever set as text.

/** @typedef {{kind: string, shape: number[], bounded: boolean}} Spec */
/** @typedef {{name: string, x: ArrayLike<number>, y: ArrayLike<number | null>, tone?: number, dots?: boolean, faint?: boolean,
 *             labels?: string[]}} Line */

/** An element with properties and children.
 *  @template {keyof HTMLElementTagNameMap} K
 *  @param {K} tag @param {Record<string, any>} [given] @param {...(Node | string | null | undefined)} children
 *  @returns {HTMLElementTagNameMap[K]} */
export function el(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key in node && !key.startsWith("aria")) /** @type {any} */ (node)[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(.../** @type {any} */ (children.filter((child) => child !== null && child !== undefined)));
  return node;
}

/** A number in a few characters. @param {number} value */
export function short(value) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "−∞" : "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  const words = size !== 0 && size < 0.01 ? value.toPrecision(2) : String(Number(value.toPrecision(3)));
  return words.replace("-", "−");
}

// --- data as pictures -------------------------------------------------------------------------------------------------

/** Whether items of this data are pictures. @param {Spec} spec */
export const pictorial = (spec) => spec.shape.length === 3;

/** The value that is shown as white, at a level: 1 (or 3 deviations) for data, 2.5 deviations for noise.
 *  @param {Spec} spec @param {number} alpha @param {number} sigma */
export const reach = (spec, alpha, sigma) => alpha * (spec.bounded ? 1 : 3) + sigma * 2.5;

/** Numbers in one item. @param {Spec} spec */
export const sizeOf = (spec) => spec.shape.reduce((a, b) => a * b, 1);

/** Width over height of an item's picture. @param {Spec} spec */
export const aspect = (spec) => (pictorial(spec) ? spec.shape[2] / spec.shape[1] : spec.shape[0] === 2 && spec.kind === "points" ? 1 : 2);

/** Draw one item; `range` becomes white, `-range` black.
 *  @param {HTMLCanvasElement} canvas @param {Spec} spec @param {Float32Array} values @param {number} range */
export function draw(canvas, spec, values, range) {
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  if (!pictorial(spec)) return plot(canvas, pen, spec, values, range);
  const [channels, height, width] = spec.shape;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const image = pen.createImageData(width, height);
  const area = width * height;
  const colour = channels === 3 || channels === 4;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) {
      const value = values[colour ? c * area + i : i] / range;
      image.data[4 * i + c] = Math.floor(Math.min(1, Math.max(0, (value + 1) / 2)) * 255 + 0.5);
    }
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

/** A picture in half its grey, and over it light where a map is above its own mean: where, and not how much.
 *  @param {HTMLCanvasElement} canvas @param {Spec} spec @param {Float32Array} values @param {number} range
 *  @param {{data: Float32Array, rows: number, columns: number} | null} map null: the picture alone */
export function heat(canvas, spec, values, range, map) {
  const [channels, height, width] = spec.shape;
  const area = width * height;
  const shades = new Float32Array(values);
  if (map) {
    const colours = channels === 3 || channels === 4 ? 3 : 1;
    for (let i = 0; i < area; i++) {
      let grey = 0;
      for (let c = 0; c < colours; c++) grey += values[c * area + i] / colours;
      for (let c = 0; c < colours; c++) shades[c * area + i] = (grey - range) / 2;
    }
  }
  const small = el("canvas");
  draw(small, spec, shades, range);
  const scale = Math.max(1, Math.round(320 / width));
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (!map) return;
  const light = el("canvas", { width: map.columns, height: map.rows });
  const brush = /** @type {CanvasRenderingContext2D} */ (light.getContext("2d"));
  const image = brush.createImageData(map.columns, map.rows);
  const mean = map.data.reduce((a, b) => a + b, 0) / map.data.length || 1;
  const most = Math.max(2, map.data.reduce((a, b) => Math.max(a, b), 0) / mean);
  map.data.forEach((share, i) => image.data.set([255, 140, 0, Math.round((255 * share) / mean / most)], 4 * i));
  brush.putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = true;
  pen.drawImage(light, 0, 0, canvas.width, canvas.height);
}

/** Items that are no pictures: a point in the plane, or the first channel as a line.
 *  @param {HTMLCanvasElement} canvas @param {CanvasRenderingContext2D} pen @param {Spec} spec
 *  @param {Float32Array} values @param {number} range */
function plot(canvas, pen, spec, values, range) {
  const flat = spec.kind === "points" && spec.shape[0] === 2;
  [canvas.width, canvas.height] = flat ? [120, 120] : [240, 120];
  pen.strokeStyle = pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--c1");
  const { width, height } = canvas;
  if (flat) {
    pen.beginPath();
    pen.arc(((values[0] / 3 + 1) / 2) * width, ((1 - values[1] / 3) / 2) * height, 4, 0, 7);
    return pen.fill();
  }
  const count = spec.shape.length > 1 ? spec.shape[spec.shape.length - 1] : spec.shape[0];
  pen.beginPath();
  for (let i = 0; i < count; i++) pen.lineTo((i / Math.max(1, count - 1)) * width, ((1 - values[i] / range) / 2) * height);
  pen.stroke();
}

/** Row `i` of an array, `size` numbers each. @param {import("./api.js").Array} array @param {number} size @param {number} i */
export const item = (array, size, i) => /** @type {Float32Array} */ (array.data.subarray(i * size, (i + 1) * size));

/** The canvases inside an element, in order. @param {HTMLElement} root */
export const canvases = (root) => [...root.querySelectorAll("canvas")];

/** The place of the nearest value. @param {number[]} values @param {number} value */
export const nearest = (values, value) => values.reduce((best, _, i) => (Math.abs(values[i] - value) < Math.abs(values[best] - value) ? i : best), 0);

/** A canvas of a sheet of canvases, as it is seen: for saving. @param {HTMLCanvasElement[]} canvases @param {number} columns */
export function together(canvases, columns) {
  const gap = 4;
  const scale = Math.max(1, Math.round(96 / canvases[0].width));
  const width = canvases[0].width * scale;
  const height = canvases[0].height * scale;
  const rows = Math.ceil(canvases.length / columns);
  const sheet = el("canvas", { width: columns * (width + gap) + gap, height: rows * (height + gap) + gap });
  const pen = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, sheet.width, sheet.height);
  canvases.forEach((canvas, i) => {
    const [left, top] = [i % columns, Math.floor(i / columns)];
    pen.drawImage(canvas, gap + left * (width + gap), gap + top * (height + gap), width, height);
  });
  return sheet;
}

// --- charts -----------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [380, 220, 44, 10, 8, 34];

/** An element of a drawing.
 *  @template {keyof SVGElementTagNameMap} K
 *  @param {K} tag @param {Record<string, string | number>} given @param {string} [words] @returns {SVGElementTagNameMap[K]} */
function svg(tag, given, words) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(given)) node.setAttribute(key, String(value));
  if (words !== undefined) node.textContent = words;
  return node;
}

/** A chart that can be drawn again and again. */
export class Chart {
  /** @param {string} title @param {string} across @param {string} up @param {{log?: boolean, logAcross?: boolean, least?: number}} [how] */
  constructor(title, across, up, how = {}) {
    this.title = title;
    this.across = across;
    this.up = up;
    this.how = how;
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    this.legend = el("p", { class: "legend" });
    this.element = el("div", { class: "chart", hidden: true }, this.svg, this.legend);
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    /** @type {(x: number) => number} */
    this.place = () => 0;
  }

  /** @param {Line[]} lines */
  draw(lines) {
    const { log = false, logAcross = false } = this.how;
    const value = (/** @type {any} */ v, /** @type {boolean} */ l) => (v === null || (l && v <= 0) ? NaN : l ? Math.log10(v) : Number(v));
    const flat = lines.flatMap((line) => Array.from(line.x, (x, i) => [value(x, logAcross), value(line.y[i], log)]));
    const seen = flat.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
    this.element.hidden = !seen.length;
    const span = (/** @type {number} */ axis) => {
      let low = Infinity, high = -Infinity;
      for (const point of seen) [low, high] = [Math.min(low, point[axis]), Math.max(high, point[axis])];
      if (axis === 1 && this.how.least !== undefined) [low, high] = [Math.min(low, this.how.least), Math.max(high, this.how.least + 1)];
      return high - low > 1e-12 ? [low, high] : [low - 0.5, high + 0.5];
    };
    const [[left, right], [bottom, top]] = [span(0), span(1)];
    const px = (/** @type {number} */ x) => LEFT + ((x - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
    const py = (/** @type {number} */ y) => HEIGHT - BOTTOM - ((y - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    this.place = (x) => px(value(x, logAcross));
    this.svg.replaceChildren();
    this.svg.append(svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }));
    for (const x of ticks(left, right, logAcross)) {
      const words = short(logAcross ? 10 ** x : x);
      this.svg.append(svg("text", { x: px(x), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, words));
    }
    for (const y of ticks(bottom, top, log)) {
      this.svg.append(svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, short(log ? 10 ** y : y)));
      this.svg.append(svg("path", { class: "axis", d: `M${LEFT} ${py(y)}H${WIDTH - RIGHT}`, opacity: 0.6 }));
    }
    this.svg.append(svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, this.across));
    for (const line of [...lines].sort((a, b) => Number(b.faint ?? 0) - Number(a.faint ?? 0))) {
      const points = Array.from(line.x, (x, i) => [px(value(x, logAcross)), py(value(line.y[i], log))]);
      const tone = line.tone ?? 1;
      const whole = points.map((point, i) => ({ point, i })).filter(({ point }) => point.every(Number.isFinite));
      if (!line.dots || line.labels) {
        const d = whole.map(({ point: [x, y] }, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
        this.svg.append(svg("path", { class: line.faint ? "line faint" : `line s${tone}`, d }));
      }
      if (line.dots || whole.length === 1) { // of one point there is no line
        for (const { point: [x, y], i } of whole) {
          this.svg.append(svg("circle", { class: `f${tone}`, cx: x.toFixed(1), cy: y.toFixed(1), r: 3 }));
          if (line.labels) this.svg.append(svg("text", { class: "mark", x: x + 5, y: y - 5 }, line.labels[i]));
        }
      }
    }
    this.svg.append(this.cursor);
    this.svg.setAttribute("aria-label", `${this.title}: ${this.up} over ${this.across}`);
    const named = lines.filter((line) => line.name && !line.faint);
    this.legend.replaceChildren(...named.map((line) => el("span", { class: `t${line.tone ?? 1}` }, el("i"), line.name)));
  }

  /** Move the vertical line. @param {number} x */
  point(x) {
    const place = this.place(x);
    this.cursor.setAttribute("visibility", Number.isFinite(place) ? "visible" : "hidden");
    if (!Number.isFinite(place)) return;
    this.cursor.setAttribute("x1", String(place));
    this.cursor.setAttribute("x2", String(place));
  }
}

/** @param {number} low @param {number} high @param {boolean} log */
function ticks(low, high, log) {
  if (log && high - low >= 1) {
    const every = Math.ceil((high - low) / 5);
    const first = Math.ceil(low - 1e-9);
    return Array.from({ length: Math.floor((high - first) / every + 1e-9) + 1 }, (_, i) => first + i * every);
  }
  if (log) {
    const nice = [];
    for (let k = Math.floor(low); k <= high; k++) for (const m of [1, 1.5, 2, 3, 4, 5, 6, 8]) nice.push(k + Math.log10(m));
    const inside = nice.filter((v) => v >= low - 1e-9 && v <= high + 1e-9);
    return inside.filter((_, i) => i % Math.ceil(inside.length / 5) === 0);
  }
  const raw = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? raw;
  const values = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) values.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return values;
}
