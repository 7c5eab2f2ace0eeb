// Lab 3: how hard something is asked for: the same noises under one scale after another; and which words act where.

import * as api from "./api.js";
import { asked, asking, literate, modelOf, open as blank, shared, slider, snippets } from "./controls.js";
import * as state from "./state.js";
import { aspect, canvases, Chart, draw, el, heat, item, nearest, pictorial, reach, short, sizeOf, together } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

const SCALES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8];

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

export default {
  title: "Guidance",
  words: "Guidance pushes the estimate away from what the model says when it is asked for nothing. More of it is clearer, less varied, and in the end wrong.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} again */
  open(root, world, again) {
    const model = modelOf(world);
    if (!model.conditions.length) {
      root.append(el("aside", { class: "knobs" }, ...shared(world, ["model"], again, again)),
        el("div", { class: "stage" }, el("section", { class: "card" }, el("h2", {}, "Nothing to ask for"),
          el("p", { class: "quiet" }, "This model was trained without classes or captions, so there is nothing to guide towards."))));
      return {};
    }
    const size = sizeOf(model);
    /** @type {Message | undefined} */ let strip;
    const sheet = el("div", { class: "sheet", role: "img", "aria-label": "Samples: one scale a column, one noise a row" });
    const where = new Chart("The scale along the way", "noise-to-signal ratio σ/α", "guidance scale", { logAcross: true, least: 0 });
    const usual = 3;
    const trade = new Chart("Variety against fidelity", "variety: rms difference of two that were asked alike", "taken for what was asked");
    const words = el("p", { class: "quiet" }, "More guidance makes samples more alike and more surely what was asked, until it breaks them.");
    const big = el("div", { class: "sheet" });
    const bigWords = el("p", { class: "quiet" });
    const own = model.interval ?? [0, Infinity];
    /** Where it acts: low < σ/α ≤ high. @returns {[number, number]} */
    const interval = () => [state.number("low", own[0]), state.number("high", own[1])];
    const ask = () => asked(world, {
      n: Math.min(10, state.number("rows", 5)), scale: SCALES[nearest(SCALES, state.number("scale", usual))],
      low: interval()[0], high: Number.isFinite(interval()[1]) ? interval()[1] : null,
    });

    /** @type {(judge?: boolean) => Promise<unknown>} */
    const load = api.latest(async (signal, judge = false) => {
      strip = await api.arrays("strip", { base: judge ? { ...ask(), n: 20 } : ask(), scales: SCALES, judge }, signal);
      if (judge) {
        trade.draw([{ name: "each point is a scale", x: strip.variety, y: strip.recognised, tone: 1, dots: true, labels: SCALES.map((s) => `s = ${s}`) }]);
        words.textContent = "Fidelity is the model's own judgement: the share of 20 samples that, by the error of its estimates, it takes for what was asked"
          + (model.classes.length ? " and for no other class." : " and not for just anything.");
        if (strip.recognised.every((/** @type {number | null} */ each) => each === null)) words.textContent = "Nothing was asked for, so there is no fidelity to measure.";
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
      big.replaceChildren(...Array.from({ length: rows }, (_, i) =>
        (reading ? el("button", { type: "button", "aria-label": `Sample ${i}: where its words act`, onclick: () => { state.set({ i }); paint(); tell(); } }, el("canvas")) : el("canvas"))));
      paint();
      tell();
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
      bigWords.textContent = `s = ${short(SCALES[chosen])}` + (variety === null ? "" : `; two that were asked alike differ by ${short(variety)}`);
      if (reading) [...big.children].forEach((each, i) => each.setAttribute("aria-pressed", String(i === sample())));
      const ratio = Array.from({ length: 161 }, (_, i) => 10 ** (-2 + i / 40));
      const [low, high] = interval();
      where.draw([{ name: "s", x: ratio, y: ratio.map((r) => (r > low && r <= high ? SCALES[chosen] : 1)), tone: 1 }]);
      Object.assign(now, { strip, chosen, painted: (now.painted ?? 0) + 1 });
    }

    // --- which words act where ---
    const reading = literate(model) && pictorial(model);
    /** @type {Message | undefined} */ let told;
    let word = -1;
    const sample = () => Math.min(Number(strip?.arrays.x.shape[1] ?? 1) - 1, Math.max(0, state.number("i", 0)));
    const mapped = el("canvas", { role: "img", "aria-label": "The sample" });
    const tokens = el("div", { class: "row", role: "group", "aria-label": "The words of the prompt" });
    const tokenWords = el("p", { class: "quiet" });

    /** Ask for the maps of the chosen sample at the chosen scale. */
    const tell = api.latest(async (signal) => {
      if (!reading || !strip) return;
      const { scale } = ask();
      const silent = !Object.keys(asking(model, "cond")).some((name) => model.conditions.some((each) => each.name === name && each.kind === "text"));
      told = undefined;
      tokens.replaceChildren();
      if (silent || scale === 0) {
        tokenWords.textContent = silent ? "Write a prompt, and each of its words shows where it has acted." : "At scale 0 no word acts.";
        light(-1);
        return;
      }
      told = await api.arrays("words", { base: ask(), number: sample() }, signal);
      tokens.replaceChildren(...told.words.map((/** @type {string} */ each, /** @type {number} */ k) => el("button", {
        type: "button", onclick: () => { word = word === k ? -1 : k; light(word); }, onmouseenter: () => light(k), onmouseleave: () => light(word), onfocus: () => light(k), onblur: () => light(word),
      }, each)));
      tokenWords.textContent = "Light: more of the attention than the word's own mean, over all layers and steps. Point at a word, or go from one to the next with Tab.";
      word = Math.min(word, told.words.length - 1);
      light(word);
    }, root);

    /** Show where one word has acted; -1: the sample alone. @param {number} k */
    function light(k) {
      if (!strip) return;
      const rows = strip.arrays.x.shape[1];
      const x = told ? item(told.arrays.x, size, 0) : item(strip.arrays.x, size, nearest(SCALES, state.number("scale", usual)) * rows + sample());
      const weights = told?.arrays.weights;
      const map = weights && k >= 0 ? { data: item(weights, weights.shape[1] * weights.shape[2], k), rows: weights.shape[1], columns: weights.shape[2] } : null;
      heat(mapped, model, x, reach(model, 1, 0), map);
      mapped.setAttribute("aria-label", map ? `Where “${told?.words[k]}” has acted` : "The sample");
      [...tokens.children].forEach((each, j) => each.setAttribute("aria-pressed", String(j === word)));
      Object.assign(now, { told, word: k });
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
    const rescale = () => { paint(); tell(); };
    window.addEventListener("redress", redraw);
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        slider("scale", usual, { values: SCALES }, rescale),
        ...shared(world, ["cond", "against"], () => load(), again),
        blank("low", short(own[0]), () => load()), blank("high", Number.isFinite(own[1]) ? short(own[1]) : "no limit", () => load()),
        ...shared(world, ["model", "seed", "steps", "solver"], () => load(), again)),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("section", { class: "card" }, el("h2", {}, "The same noises under each scale"), el("p", { class: "quiet" }, "0 ignores what is asked, 1 is the model's own answer. Choose a column."), sheet),
        el("section", { class: "card" }, el("h2", {}, "This scale"), bigWords, big),
        reading ? el("section", { class: "card" }, el("h2", {}, "Which words act where"), tokenWords, tokens, el("div", { class: "big" }, mapped)) : null,
        el("div", { class: "two" },
          el("section", { class: "card" }, el("h2", {}, "Where it acts"), el("p", { class: "quiet" }, "Outside the interval the scale is 1, and the second network call is not made."), where.element),
          el("section", { class: "card" }, el("h2", {}, "Variety against fidelity"), words,
            el("div", { class: "row" }, el("button", { type: "button", class: "main", id: "judge", onclick: () => load(true) }, "Measure")), trade.element))));
    load();
    return {
      snippets: () => snippets(world, ask()),
      note: () => "The lines make the chosen column; the pictures are of all.",
      picture: () => (strip ? together(canvases(sheet), SCALES.length) : null),
      animation: () => ask(),
      close: () => window.removeEventListener("redress", redraw),
    };
  },
};
