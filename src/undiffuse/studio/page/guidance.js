// Lab 3: how hard a class is asked for. The same noises under one scale after another.

import * as api from "./api.js";
import { asked, modelOf, open as blank, shared, slider, snippets } from "./controls.js";
import * as state from "./state.js";
import { aspect, canvases, Chart, draw, el, item, nearest, reach, short, sizeOf, together } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

const SCALES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8];

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

export default {
  title: "Guidance",
  words: "Guidance pushes the estimate away from what the model says without the class. More of it is clearer, less varied, and in the end wrong.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} again */
  open(root, world, again) {
    const model = modelOf(world);
    if (!model.classes.length) {
      root.append(el("aside", { class: "knobs" }, ...shared(world, ["model"], again, again)),
        el("div", { class: "stage" }, el("section", { class: "card" }, el("h2", {}, "Nothing to ask for"),
          el("p", { class: "quiet" }, "This model was trained without classes, so there is nothing to guide towards."))));
      return {};
    }
    const size = sizeOf(model);
    /** @type {Message | undefined} */ let strip;
    const sheet = el("div", { class: "sheet", role: "img", "aria-label": "Samples: one scale a column, one noise a row" });
    const where = new Chart("The scale along the way", "noise-to-signal ratio σ/α", "guidance scale", { logAcross: true, least: 0 });
    const usual = 3;
    const trade = new Chart("Variety against fidelity", "variety: rms difference of two samples of a class", "taken for the class that was asked");
    const words = el("p", { class: "quiet" }, "More guidance makes samples more alike and more surely what was asked, until it breaks them.");
    const big = el("div", { class: "sheet" });
    const bigWords = el("p", { class: "quiet" });
    const ask = () => asked(world, {
      n: Math.min(10, state.number("rows", 5)), against: state.text("against") === "" ? null : Number(state.text("against")),
      low: state.number("low", 0), high: state.text("high") === "" ? null : state.number("high", 1),
    });

    /** @type {(judge?: boolean) => Promise<unknown>} */
    const load = api.latest(async (signal, judge = false) => {
      strip = await api.arrays("strip", { base: judge ? { ...ask(), n: 20 } : ask(), scales: SCALES, judge }, signal);
      if (judge) {
        trade.draw([{ name: "each point is a scale", x: strip.variety, y: strip.recognised, tone: 1, dots: true, labels: SCALES.map((s) => `s = ${s}`) }]);
        words.textContent = "Fidelity is the model's own judgement: the share of 20 samples whose class, by the error of its estimates, is the one that was asked.";
        now.judged = { variety: strip.variety, recognised: strip.recognised };
        return load();
      }
      lay();
      return undefined;
    }, root);

    function lay() {
      if (!strip) return;
      const [columns, rows] = strip.arrays.x.shape;
      sheet.style.setProperty("--columns", String(columns));
      sheet.style.setProperty("--aspect", String(aspect(model)));
      big.style.setProperty("--columns", String(rows));
      big.style.setProperty("--aspect", String(aspect(model)));
      const heads = SCALES.map((s) => el("div", { class: "head" }, short(s)));
      sheet.replaceChildren(...heads, ...Array.from({ length: columns * rows }, () => el("canvas")));
      big.replaceChildren(...Array.from({ length: rows }, () => el("canvas")));
      paint();
    }

    function paint() {
      if (!strip) return;
      const [columns, rows] = strip.arrays.x.shape;
      const chosen = nearest(SCALES, state.number("scale", usual));
      const range = reach(model, 1, 0);
      const small = canvases(sheet);
      for (let r = 0; r < rows; r++)
        for (let c = 0; c < columns; c++)
          draw(small[columns * r + c], model, item(strip.arrays.x, size, c * rows + r), range);
      canvases(big).forEach((canvas, r) => draw(canvas, model, item(/** @type {Message} */ (strip).arrays.x, size, chosen * rows + r), range));
      for (let c = 0; c < columns; c++) sheet.children[c].classList.toggle("on", c === chosen);
      const variety = strip.variety[chosen];
      bigWords.textContent = `s = ${short(SCALES[chosen])}` + (variety === null ? "" : `; two samples of one class differ by ${short(variety)}`);
      const ratio = Array.from({ length: 161 }, (_, i) => 10 ** (-2 + i / 40));
      const [low, high] = [state.number("low", 0), state.text("high") === "" ? Infinity : state.number("high", 1)];
      where.draw([{ name: "s", x: ratio, y: ratio.map((r) => (r > low && r <= high ? SCALES[chosen] : 1)), tone: 1 }]);
      Object.assign(now, { strip, chosen, painted: (now.painted ?? 0) + 1 });
    }

    sheet.addEventListener("click", (/** @type {MouseEvent} */ event) => {
      const k = [...sheet.children].indexOf(/** @type {Element} */ (event.target));
      if (k < 0) return;
      state.set({ scale: SCALES[k % SCALES.length] });
      const knob = /** @type {HTMLInputElement} */ (document.getElementById("knob-scale"));
      knob.value = String(k % SCALES.length);
      knob.dispatchEvent(new Event("input"));
    });
    const redraw = () => paint();
    window.addEventListener("redress", redraw);
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        slider("scale", usual, { values: SCALES }, paint),
        ...shared(world, ["classes", "against"], () => load(), again),
        blank("low", "0", () => load()), blank("high", "no limit", () => load()),
        ...shared(world, ["model", "seed", "steps", "solver"], () => load(), again)),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("section", { class: "card" }, el("h2", {}, "The same noises under each scale"), el("p", { class: "quiet" }, "0 ignores the class, 1 is the model's own answer. Choose a column."), sheet),
        el("section", { class: "card" }, el("h2", {}, "This scale"), bigWords, big),
        el("div", { class: "two" },
          el("section", { class: "card" }, el("h2", {}, "Where it acts"), el("p", { class: "quiet" }, "Outside the interval the scale is 1, and the second network call is not made."), where.element),
          el("section", { class: "card" }, el("h2", {}, "Variety against fidelity"), words,
            el("div", { class: "row" }, el("button", { type: "button", class: "main", id: "judge", onclick: () => load(true) }, "Measure")), trade.element))));
    load();
    return {
      snippets: () => snippets(world, { ...ask(), scale: SCALES[nearest(SCALES, state.number("scale", usual))] }),
      picture: () => (strip ? together(canvases(sheet), SCALES.length) : null),
      animation: () => ask(),
      close: () => window.removeEventListener("redress", redraw),
    };
  },
};
