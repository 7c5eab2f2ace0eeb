// Lab 2: schedules, grids on them, and two ways of walking from the same noise with the same number of network calls.

import * as api from "./api.js";
import { asked, choice, modelOf, plainly, quoted, shared, slider, snippets } from "./controls.js";
import * as state from "./state.js";
import { aspect, canvases, Chart, draw, el, item, nearest, reach, short, sizeOf, together } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

export default {
  title: "Solvers",
  words: "A schedule says how data becomes noise, a grid where to stop on the way back, a solver how to take each step. Compare two for the same price.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} again */
  open(root, world, again) {
    const model = modelOf(world);
    const size = sizeOf(model);
    /** @type {Message | undefined} */ let schedules;
    /** @type {Message | undefined} */ let both;
    const charts = {
      alpha: new Chart("Signal α", "time t", "α"), sigma: new Chart("Noise σ", "time t", "σ", { log: true }),
      log_snr: new Chart("log-SNR", "time t", "log α²/σ²"),
    };
    const quality = new Chart("Quality against calls", "network calls", "Fréchet distance", { log: true, logAcross: true });
    const gridWords = el("p", { class: "quiet" });
    const qualityWords = el("p", { class: "quiet" }, "Measured on this model: the Fréchet distance to its own fine solution, less is better.");
    const side = (/** @type {string} */ name) => ({ words: el("p", { class: "quiet" }), sheet: el("div", { class: "sheet", role: "img", "aria-label": `Samples of ${name}` }) });
    const sides = { a: side("A"), b: side("B") };
    const difference = el("p", { class: "quiet" });
    const chosen = () => state.text("schedule", model.schedule ?? world.schedules[0]);

    // --- schedules ---
    const curves = api.latest(async (signal) => {
      schedules ??= await api.arrays("schedules", {}, signal);
      const grid = await api.arrays("grid", {
        schedule: chosen(), grid: state.text("agrid", "uniform"), steps: state.number("points", 12),
      }, signal).catch((error) => {
        if (!(error instanceof api.Refused)) throw error;
        gridWords.textContent = api.sentence(error.message);
        return undefined;
      });
      const points = schedules.arrays.alpha.shape[1];
      const t = Array.from({ length: points }, (_, i) => i / (points - 1));
      for (const [name, chart] of Object.entries(charts)) {
        const every = /** @type {Message} */ (schedules).names.map((/** @type {string} */ schedule, /** @type {number} */ i) => ({
          name: schedule.replaceAll("_", " "), x: t, y: item(/** @type {Message} */ (schedules).arrays[name], points, i),
          faint: schedule !== chosen(),
        }));
        if (name === "sigma") for (const line of every) line.y = line.y.map((/** @type {number} */ s) => Math.max(s, 1e-3));
        const dots = grid ? [{ name: `${state.text("agrid", "uniform").replaceAll("_", " ")} grid`, x: grid.arrays.t.data, y: grid.arrays[name].data, tone: 2, dots: true }] : [];
        chart.draw([...every, ...dots]);
      }
      if (grid) {
        const end = grid.terminal_snr;
        gridWords.textContent = `The other ${world.schedules.length - 1} schedules are grey. ` + (end === 0 ? "At t = 1 this one is pure noise." : `At t = 1 the signal-to-noise ratio is still ${short(end)}.`);
      }
      Object.assign(now, { grid, schedules });
    }, root);

    // --- A|B ---
    const compare = api.latest(async (signal) => {
      both = await api.arrays("compare", {
        base: asked(world), calls: state.number("calls", 10),
        a: { solver: state.text("asolver", "euler"), grid: state.text("agrid", "uniform") },
        b: { solver: state.text("bsolver", "dpmpp_2m"), grid: state.text("bgrid", "uniform") },
      }, signal);
      lay();
    }, root);

    function lay() {
      if (!both) return;
      const count = both.arrays.a_x.shape[1];
      for (const { sheet } of Object.values(sides)) {
        sheet.style.setProperty("--columns", String(Math.min(count, 5)));
        sheet.style.setProperty("--aspect", String(aspect(model)));
        sheet.replaceChildren(...Array.from({ length: count }, () => el("canvas")));
      }
      difference.textContent = `The ends differ by ${short(both.difference)} (root mean square; the data's deviation is about 1). Both began from the same noise.`;
      paint();
    }

    function paint() {
      if (!both) return;
      const t = 1 - state.number("way", 1);
      for (const [name, { words, sheet }] of Object.entries(sides)) {
        const { steps, calls, t: times, alpha, sigma } = both[name];
        const f = nearest(times, t);
        const count = both.arrays[`${name}_x`].shape[1];
        canvases(sheet).forEach((canvas, k) =>
          draw(canvas, model, item(/** @type {Message} */ (both).arrays[`${name}_x`], size, f * count + k), reach(model, alpha[f], sigma[f])));
        words.textContent = `${steps} steps, ${calls} calls; step ${f}, t = ${short(times[f])}`;
        now[name] = { frame: f, steps, calls };
      }
      Object.assign(now, { both, painted: (now.painted ?? 0) + 1 });
    }

    // --- quality ---
    const button = el("button", { type: "button", class: "main", id: "measure", onclick: () => measure() }, "Measure");
    const measure = api.latest(async (signal) => {
      qualityWords.textContent = "Measuring: every solver makes 64 samples at each number of calls …";
      button.disabled = true;
      try {
        const wanted = [...new Set([...world.quality_solvers, state.text("asolver", "euler"), state.text("bsolver", "dpmpp_2m")])]
          .filter((name) => world.solvers.find((each) => each.name === name)?.fixed).slice(0, 6);
        /** @type {{rows: {solver: string, calls: number, frechet: number}[], floor: number, recommendation: string}} */
        const found = await api.json("quality", { model: model.name, solvers: wanted }, signal);
        const names = [...new Set(found.rows.map((row) => row.solver))];
        quality.draw(names.map((name, i) => {
          const rows = found.rows.filter((row) => row.solver === name);
          return { name: name.replaceAll("_", " "), x: rows.map((r) => r.calls), y: rows.map((r) => r.frechet),
            tone: (i % 6) + 1, dots: true, labels: rows.map(() => "") };
        }));
        qualityWords.textContent = `${api.sentence(found.recommendation)} Two sets of fine samples are ${short(found.floor)} apart: nothing below that can be seen.`;
        now.quality = found;
      } finally {
        button.disabled = false;
      }
    }, root);

    const fixed = plainly(world.solvers.filter((each) => each.fixed).map((each) => each.name));
    const redraw = () => paint();
    window.addEventListener("redress", redraw);
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        slider("calls", 10, { min: 1, max: 40, step: 1 }, compare),
        choice("asolver", "euler", fixed, compare), choice("agrid", "uniform", plainly(world.grids), () => { compare(); curves(); }),
        choice("bsolver", "dpmpp_2m", fixed, compare), choice("bgrid", "uniform", plainly(world.grids), compare),
        ...shared(world, ["model", "seed", "cond", "against", "scale"], compare, again)),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("section", { class: "card" }, el("h2", {}, "A | B: same noise, same number of calls"), difference,
          el("div", { class: "two" },
            el("div", {}, el("h2", {}, "A"), sides.a.words, sides.a.sheet), el("div", {}, el("h2", {}, "B"), sides.b.words, sides.b.sheet)),
          slider("way", 1, { min: 0, max: 1, step: 0.005, say: (v) => `t = ${short(1 - v)}` }, paint)),
        el("section", { class: "card" }, el("h2", {}, "Schedules"), gridWords,
          el("div", { class: "row" }, choice("schedule", model.schedule ?? world.schedules[0], plainly(world.schedules), curves),
            slider("points", 12, { min: 1, max: 60, step: 1 }, curves)),
          el("div", { class: "three" }, ...Object.entries(charts).map(([, chart]) => el("div", {}, el("h2", {}, chart.title), chart.element)))),
        el("section", { class: "card" }, el("h2", {}, "Quality against calls"), qualityWords, el("div", { class: "row" }, button), quality.element)));
    quality.element.style.maxWidth = "640px";
    compare();
    curves();
    const shown = () => ({ ...asked(world), solver: state.text("bsolver", "dpmpp_2m"), grid: state.text("bgrid", "uniform"), steps: both?.b.steps ?? 10 });
    return {
      snippets: () => {
        const made = snippets(world, shown());
        return { ...made, "Measure it yourself": `undiffuse solvers ${quoted(model.path)}` };
      },
      picture: () => (both ? together([...canvases(sides.a.sheet), ...canvases(sides.b.sheet)], Math.min(5, both.arrays.a_x.shape[1])) : null),
      animation: () => shown(),
      close: () => window.removeEventListener("redress", redraw),
    };
  },
};
