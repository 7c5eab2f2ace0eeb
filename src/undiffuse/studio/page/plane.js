// Lab 4: the plane. A distribution whose score is known exactly, beside a network that learns it while you watch.

import * as api from "./api.js";
import { choice, plainly, slider, whole } from "./controls.js";
import * as state from "./state.js";
import { Chart, el, item, nearest, short } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

const SIDE = 560;

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

/** Points as text for the address: two signed bytes each, in fortieths. @param {number[][]} points */
const written = (points) => btoa(String.fromCharCode(...points.flat().map((v) => Math.round(Math.max(-3, Math.min(3, v)) * 40) & 255)));
/** @param {string} words @returns {number[][]} */
function read(words) {
  try {
    const bytes = Array.from(atob(words), (c) => ((c.charCodeAt(0) + 128) & 255) - 128);
    return Array.from({ length: bytes.length >> 1 }, (_, i) => [bytes[2 * i] / 40, bytes[2 * i + 1] / 40]);
  } catch {
    return [];
  }
}

export default {
  title: "Plane",
  words: "Two dimensions, where everything can be seen: density, particles, and the field that moves them, exact and learned side by side.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} _again */
  open(root, world, _again) {
    /** @type {Message | undefined} */ let exact;
    /** @type {Message | undefined} */ let learned;
    /** @type {number[][]} */ let drawn = [];
    let version = 0;
    let polling = 0;
    let playing = 0;
    let drawing = false;
    let pen = [0, 0];
    const panel = (/** @type {string} */ name) => {
      const canvas = el("canvas", { width: SIDE, height: SIDE, role: "img", "aria-label": name, tabIndex: name === "Exact" ? 0 : -1 });
      return { canvas, figure: el("div", { class: "plane" }, canvas) };
    };
    const panels = { exact: panel("Exact"), learned: panel("Learned") };
    const haze = el("canvas");
    const words = el("p", { class: "quiet plane-words" }, "…");
    const learnedWords = el("p", { class: "quiet plane-words" }, "Nothing is trained yet: “Train a network” begins.");
    const loss = new Chart("Loss", "updates", "loss");
    const errors = new Chart("Error of the network along the way", "time t", "rms of x̂₀ − exact x̂₀");
    const facts = el("dl", { class: "facts" });
    const form = () => ({
      ...(state.text("cloud", "moons") === "drawn" ? { points: read(state.text("drawn")) } : { name: state.text("cloud", "moons") }),
      schedule: state.text("schedule", "flow"), solver: state.text("solver", "euler"), steps: state.number("psteps", 24), seed: state.number("seed", 0),
    });

    const load = api.latest(async (signal) => {
      clearTimeout(polling); // what is being learned belongs to what was shown
      if (state.text("cloud") === "drawn" && read(state.text("drawn")).length < 3) {
        words.textContent = "Draw with the mouse or a finger on the left field; or move the cross with the arrow keys and set points with the space bar.";
        pencil(true);
        return;
      }
      exact = await api.arrays("plane", form(), signal);
      learned = undefined;
      learnedWords.textContent = "Nothing is trained yet: “Train a network” begins.";
      loss.draw([]);
      errors.draw([]);
      version = 0;
      words.textContent = "Brighter is likelier. The dots are particles that the exact field moves.";
      paint();
    }, root);

    const train = api.latest(async (signal) => {
      learned = undefined;
      version = 0;
      await api.json("plane/train", { plane: form(), updates: state.number("updates", 1500) }, signal);
      learnedWords.textContent = "Learning …";
      poll();
    }, root);

    async function poll() {
      clearTimeout(polling);
      try {
        const response = await api.request(`plane/learned?since=${version}`);
        if (response.status === 200) {
          learned = api.unpack(await response.arrayBuffer());
          version = learned.version;
          loss.draw([{ name: "", x: learned.steps, y: learned.losses, tone: 1 }]);
          errors.draw([{ name: "error of the network", x: /** @type {Message} */ (exact).t.slice(0, -1), y: learned.error_by_level, tone: 2, dots: true, labels: learned.error_by_level.map(() => "") }]);
          learnedWords.textContent = `${learned.finished ? "Trained" : "Learning"}: update ${learned.steps.at(-1)} of ${learned.updates}`;
          paint();
          if (learned.finished) return;
        }
        polling = setTimeout(poll, 350);
      } catch (error) {
        learnedWords.textContent = api.sentence(/** @type {Error} */ (error).message);
      }
    }

    // --- drawing ---
    const place = (/** @type {number} */ x, /** @type {number} */ y, reach = 3) => [((x / reach + 1) / 2) * SIDE, ((1 - y / reach) / 2) * SIDE];

    /** @param {HTMLCanvasElement} canvas @param {Message | undefined} message @param {boolean} known whether it is the exact side */
    function field(canvas, message, known) {
      const brush = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
      const style = getComputedStyle(canvas);
      const colour = (/** @type {string} */ name) => style.getPropertyValue(name);
      brush.clearRect(0, 0, SIDE, SIDE);
      if (!exact) return;
      const f = frame();
      const size = Math.hypot(exact.alpha[f], exact.sigma[f]); // the view grows with the noise, so nothing leaves it
      const cells = exact.cells;
      const density = item(exact.arrays.density, cells * cells, f);
      [haze.width, haze.height] = [cells, cells];
      const spray = /** @type {CanvasRenderingContext2D} */ (haze.getContext("2d"));
      const image = spray.createImageData(cells, cells);
      for (let row = 0; row < cells; row++)
        for (let column = 0; column < cells; column++)
          image.data[4 * ((cells - 1 - row) * cells + column) + 3] = 150 * Math.sqrt(density[row * cells + column] / 255);
      spray.putImageData(image, 0, 0);
      spray.globalCompositeOperation = "source-in";
      spray.fillStyle = colour("--c1");
      spray.fillRect(0, 0, cells, cells);
      brush.drawImage(haze, 0, 0, SIDE, SIDE);
      if (!message) return;
      const kind = state.text("field", "velocity");
      if (kind !== "none") {
        const lattice = exact.lattice;
        const arrows = item(message.arrays[kind], lattice * lattice * 2, f);
        const sign = kind === "velocity" ? -1 : 1; // towards data
        let most = 1e-9;
        for (let k = 0; k < arrows.length; k += 2) most = Math.max(most, Math.hypot(arrows[k], arrows[k + 1]));
        brush.strokeStyle = colour("--soft");
        brush.lineWidth = 1.3;
        brush.beginPath();
        for (let k = 0; k < lattice * lattice; k++) {
          const [x, y] = place((2 * (k % lattice)) / (lattice - 1) * 3 - 3, (2 * Math.floor(k / lattice)) / (lattice - 1) * 3 - 3);
          const [dx, dy] = [sign * arrows[2 * k], -sign * arrows[2 * k + 1]];
          const length = Math.hypot(dx, dy);
          const long = 22 * Math.sqrt(length / most);
          if (long < 1.5) continue;
          const [ux, uy] = [dx / length, dy / length];
          brush.moveTo(x - (ux * long) / 2, y - (uy * long) / 2);
          const [tx, ty] = [x + (ux * long) / 2, y + (uy * long) / 2];
          brush.lineTo(tx, ty);
          brush.moveTo(tx - 4 * (ux + 0.6 * uy), ty - 4 * (uy - 0.6 * ux));
          brush.lineTo(tx, ty);
          brush.lineTo(tx - 4 * (ux - 0.6 * uy), ty - 4 * (uy + 0.6 * ux));
        }
        brush.stroke();
      }
      const [frames, count] = message.arrays.paths.shape;
      const at = Math.min(f, frames - 1);
      const dots = item(message.arrays.paths, count * 2, at);
      brush.strokeStyle = brush.fillStyle = colour(known ? "--c2" : "--c4");
      brush.globalAlpha = 0.55;
      brush.lineWidth = 1;
      brush.beginPath();
      for (let k = 0; k < 24; k++)
        for (let g = 0; g <= at; g++) {
          const one = item(message.arrays.paths, count * 2, g);
          const scale = Math.hypot(exact.alpha[g], exact.sigma[g]);
          const [x, y] = place(one[2 * k] / scale, one[2 * k + 1] / scale);
          if (g) brush.lineTo(x, y);
          else brush.moveTo(x, y);
        }
      brush.stroke();
      brush.globalAlpha = 0.9;
      for (let k = 0; k < count; k++) {
        const [x, y] = place(dots[2 * k] / size, dots[2 * k + 1] / size);
        brush.beginPath();
        brush.arc(x, y, 2.6, 0, 7);
        brush.fill();
      }
      brush.globalAlpha = 1;
    }

    const frame = () => (exact ? nearest(exact.t, state.number("pt", 0)) : 0);

    function paint() {
      const begun = performance.now();
      if (drawing) return sketch();
      field(panels.exact.canvas, exact, true);
      field(panels.learned.canvas, learned, false);
      if (!exact) return;
      const f = frame();
      time.value = String(Math.round(1000 * state.number("pt", 0)));
      time.setAttribute("aria-valuetext", `t ${short(exact.t[f])}, frame ${f} of ${exact.t.length - 1}`);
      const rows = [["t", short(exact.t[f])], ["solver error", exact.solver_error === null ? "–" : short(exact.solver_error)],
        ["model error", learned ? short(learned.model_error) : "–"], ["both", learned && learned.both !== null ? short(learned.both) : "–"]];
      facts.replaceChildren(...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
      errors.point(exact.t[f]);
      Object.assign(now, { exact, learned, frame: f, painted: (now.painted ?? 0) + 1, took: performance.now() - begun });
    }

    // --- drawing by hand ---
    const hand = el("button", { type: "button", id: "draw", "aria-pressed": "false", onclick: () => (drawing ? finish() : (drawn = [], pencil(true))) }, "Draw your own");
    /** @param {boolean} on */
    function pencil(on) {
      drawing = on;
      panels.exact.figure.classList.toggle("drawing", on);
      hand.classList.toggle("on", on);
      hand.setAttribute("aria-pressed", String(on));
      hand.textContent = on ? "Done drawing" : "Draw your own";
      if (on) {
        words.textContent = "Draw on this field; or move the cross with the arrow keys and set points with the space bar. Then “Done drawing”.";
        panels.exact.canvas.focus();
        sketch();
      }
    }
    function sketch() {
      const brush = /** @type {CanvasRenderingContext2D} */ (panels.exact.canvas.getContext("2d"));
      brush.clearRect(0, 0, SIDE, SIDE);
      brush.fillStyle = brush.strokeStyle = getComputedStyle(panels.exact.canvas).getPropertyValue("--c1");
      for (const [a, b] of drawn) {
        const [x, y] = place(a, b);
        brush.beginPath();
        brush.arc(x, y, 4, 0, 7);
        brush.fill();
      }
      const [x, y] = place(pen[0], pen[1]);
      brush.beginPath();
      brush.moveTo(x - 9, y);
      brush.lineTo(x + 9, y);
      brush.moveTo(x, y - 9);
      brush.lineTo(x, y + 9);
      brush.stroke();
      now.drawn = drawn;
    }
    function put() {
      const last = drawn.at(-1);
      if (drawn.length < 600 && (!last || Math.hypot(last[0] - pen[0], last[1] - pen[1]) > 0.05)) drawn.push([...pen]);
      sketch();
    }
    function finish() {
      pencil(false);
      if (drawn.length < 3) { words.textContent = "Three points are the least."; paint(); return; }
      state.set({ cloud: "drawn", drawn: written(drawn) });
      const chosen = /** @type {HTMLSelectElement} */ (document.getElementById("knob-cloud"));
      chosen.value = "drawn";
      load();
    }
    const aim = (/** @type {PointerEvent} */ event) => {
      const box = panels.exact.canvas.getBoundingClientRect();
      pen = [((event.clientX - box.left) / box.width) * 6 - 3, 3 - ((event.clientY - box.top) / box.height) * 6];
    };
    panels.exact.canvas.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
      if (!drawing) return;
      panels.exact.canvas.setPointerCapture(event.pointerId);
      aim(event);
      put();
    });
    panels.exact.canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      if (drawing && event.buttons) { aim(event); put(); }
    });
    panels.exact.canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const moves = /** @type {Record<string, number[]>} */ ({ ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] });
      if (!drawing) return;
      if (event.key in moves) { pen = pen.map((v, i) => Math.max(-3, Math.min(3, v + moves[event.key][i]))); sketch(); event.preventDefault(); }
      if (event.key === " ") { put(); event.preventDefault(); }
      if (event.key === "Enter") finish();
    });

    // --- time ---
    const time = el("input", { type: "range", id: "plane-time", min: 0, max: 1000, step: 1, "aria-label": "Time, from data to noise" });
    const play = el("button", { type: "button", class: "main", id: "plane-play", onclick: () => flow() }, "◀ Let it flow");
    const move = (/** @type {number} */ t) => { state.set({ pt: Math.round(1000 * Math.max(0, Math.min(1, t))) / 1000 }); paint(); };
    function flow() {
      if (playing) return halt();
      let t = 1;
      let last = performance.now();
      const step = (/** @type {number} */ at) => {
        t -= (at - last) / 3000;
        last = at;
        move(t);
        playing = t > 0 ? requestAnimationFrame(step) : 0;
        if (!playing) halt();
      };
      playing = requestAnimationFrame(step);
      play.textContent = "Pause";
    }
    function halt() {
      cancelAnimationFrame(playing);
      playing = 0;
      play.textContent = "◀ Let it flow";
    }
    time.addEventListener("input", () => { halt(); move(Number(time.value) / 1000); });
    time.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const ways = /** @type {Record<string, number>} */ ({ ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1 });
      if (!(event.key in ways) || !exact) return;
      event.preventDefault();
      halt();
      move(exact.t[Math.max(0, Math.min(exact.t.length - 1, frame() + ways[event.key]))]);
    });

    const redraw = () => paint();
    window.addEventListener("redress", redraw);
    const fixed = world.solvers.filter((each) => each.fixed).map((each) => each.name);
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        choice("cloud", "moons", [...plainly(world.clouds), ["drawn", "drawn by hand"]], load), hand,
        choice("field", "velocity", [["velocity", "velocity"], ["score", "score"], ["none", "none"]], paint),
        choice("schedule", "flow", plainly(world.schedules), load), choice("solver", "euler", plainly(fixed), load),
        slider("psteps", 24, { min: 1, max: 60, step: 1 }, load), whole("seed", 0, load),
        slider("updates", 1500, { min: 250, max: 5000, step: 250 }, () => {})),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("section", { class: "card" },
          el("div", { class: "two" }, el("div", {}, el("h2", {}, "Exact"), words, panels.exact.figure), el("div", {}, el("h2", {}, "Learned"), learnedWords, panels.learned.figure)),
          el("div", { class: "time" }, el("div", { class: "ends" }, el("span", {}, "data, t = 0"), el("span", {}, "noise, t = 1")), time),
          el("div", { class: "row middle" }, play,
            el("button", { type: "button", id: "train", onclick: () => train() }, "Train a network"),
            el("button", { type: "button", id: "stop", onclick: () => api.json("plane/stop", {}) }, "Stop training"), facts)),
        el("div", { class: "two" },
          el("section", { class: "card" }, el("h2", {}, "Loss"), el("p", { class: "quiet" }, "It does not fall to 0: which noise was added cannot be known."), loss.element, el("p", { class: "none" }, "Nothing is trained yet.")),
          el("section", { class: "card" }, el("h2", {}, "Where the network is wrong"),
            el("p", { class: "quiet" }, "Solver error: too few steps with the exact field. Model error: the network's field, with steps to spare."), errors.element, el("p", { class: "none" }, "Nothing is trained yet.")))));
    load();
    return {
      picture: () => {
        const sheet = el("canvas", { width: 2 * SIDE + 8, height: SIDE });
        const brush = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d"));
        brush.fillStyle = getComputedStyle(document.body).getPropertyValue("--card");
        brush.fillRect(0, 0, sheet.width, sheet.height);
        brush.drawImage(panels.exact.canvas, 0, 0);
        brush.drawImage(panels.learned.canvas, SIDE + 8, 0);
        return sheet;
      },
      snippets: () => ({ "Command line": "undiffuse train moons" }),
      close: () => {
        halt();
        clearTimeout(polling);
        window.removeEventListener("redress", redraw);
      },
    };
  },
};
