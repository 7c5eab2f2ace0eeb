// Lab 6: what lies between noises. Great circles keep noise noise; a straight line would pass through something quieter.

import * as api from "./api.js";
import { asked, asking, choice, conditionKnobs, imports, mapping, modelOf, python, settings, shared, slider, why, written } from "./controls.js";
import * as state from "./state.js";
import { aspect, canvases, draw, el, item, reach, short, sizeOf, together } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

const ACROSS = 9;

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

export default {
  title: "Walk",
  words: "Between two noises lies a whole road of noises, and each becomes data. Walk across and down, or through classes and prompts.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} again */
  open(root, world, again) {
    const model = modelOf(world);
    const size = sizeOf(model);
    /** @type {Message | undefined} */ let made;
    const [classes, text] = ["classes", "text"].map((kind) => model.conditions.find((each) => each.kind === kind));
    /** The condition whose values the rows are; none: another way through the noise. */
    const down = () => [classes, text].find((each) => each?.name === state.text("down"));
    const lines = () => state.text("prompts").split("\n").map((line) => line.trim()).filter((line) => line).slice(0, 12);
    const values = () => {
      if (!down()) return [];
      if (down() === classes) return model.classes.slice(0, 12).map((_, i) => i);
      return lines().length ? lines() : [state.text("prompt")];
    };
    const corners = () => {
      const given = state.text("corners").split(",").map(Number).filter((n) => Number.isSafeInteger(n) && n >= 0);
      return given.length === 4 ? given : [0, 1, 2, 3];
    };
    const usual = String(3 % Math.max(1, model.classes.length));
    const given = () => ({ ...(classes ? { [classes.name]: [Number(usual)] } : {}), ...asking(model, "walk") });
    const ask = () => ({
      base: asked(world, { n: 1, ...(model.conditions.length ? { cond: given() } : {}) }),
      corners: corners(), columns: ACROSS, rows: 7, down: down()?.name ?? "noise", values: values(),
    });
    const sheet = el("div", { class: "sheet", role: "group", "aria-label": "Between the noises" });
    const big = el("canvas", { role: "img", "aria-label": "The chosen place" });
    const words = el("p", { class: "quiet" });
    big.style.setProperty("--aspect", String(aspect(model)));

    const load = api.latest(async (signal) => {
      made = await api.arrays("walk", ask(), signal);
      sheet.style.setProperty("--columns", String(made.columns));
      sheet.style.setProperty("--narrow", String(made.columns));
      sheet.style.setProperty("--aspect", String(aspect(model)));
      const rows = made.rows;
      sheet.replaceChildren(...Array.from({ length: made.columns * rows }, (_, k) => {
        const [row, column] = [Math.floor(k / ACROSS), k % ACROSS];
        return el("button", { type: "button", tabIndex: -1, "aria-label": `Row ${row + 1}, column ${column + 1}`, onclick: () => {
          move(column / (ACROSS - 1), rows > 1 ? row / (rows - 1) : 0);
        } }, el("canvas"));
      }));
      canvases(sheet).forEach((canvas, k) => draw(canvas, model, item(/** @type {Message} */ (made).arrays.x, size, k), reach(model, 1, 0)));
      paint();
    }, root);

    /** @param {number} u @param {number} v */
    function move(u, v) {
      state.set({ u, v });
      for (const [key, value] of Object.entries({ u, v })) {
        const knob = /** @type {HTMLInputElement} */ (document.getElementById(`knob-${key}`));
        knob.value = String(value);
        knob.dispatchEvent(new Event("input"));
      }
    }

    function paint() {
      if (!made) return;
      const column = Math.round(state.number("u", 0) * (made.columns - 1));
      const row = Math.round(state.number("v", 0) * (made.rows - 1));
      const k = row * made.columns + column;
      draw(big, model, item(made.arrays.x, size, k), reach(model, 1, 0));
      [...sheet.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === k)));
      const u = column / (made.columns - 1);
      const name = down() === classes ? `Class ${model.classes[row]}` : `“${values()[row]}”`;
      words.textContent = down()
        ? `${name}, ${short(u)} of the way from seed ${corners()[0]} to seed ${corners()[1]}`
        : `${short(u)} of the way across, ${short(row / Math.max(1, made.rows - 1))} of the way down`;
      Object.assign(now, { made, k, painted: (now.painted ?? 0) + 1 });
    }

    const seeds = el("input", { type: "text", id: "knob-corners", value: corners().join(", "), inputMode: "numeric" });
    seeds.addEventListener("change", () => {
      state.set({ corners: seeds.value.replaceAll(" ", "") });
      seeds.value = corners().join(", ");
      load();
    });
    const others = () => {
      const first = corners()[0];
      state.set({ corners: [4, 5, 6, 7].map((n) => first + n).join(",") });
      seeds.value = corners().join(", ");
      load();
    };
    const prompts = written("prompts", "a red circle\na blue square", load, 4);
    const asks = conditionKnobs(model, "walk", load, usual);
    const dress = () => {
      prompts.hidden = !text || down() !== text;
      asks.forEach((knob, i) => { if (knob) knob.hidden = model.conditions[i] === down(); }); // every row asks for its own
    };
    dress();
    const redraw = () => load();
    window.addEventListener("redress", redraw);
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        slider("u", 0, { min: 0, max: 1, step: 1 / (ACROSS - 1) }, paint), slider("v", 0, { min: 0, max: 1, step: 1 / 24 }, paint),
        ...(classes || text ? [choice("down", "noise", [["noise", "through noise"], ...[classes, text].flatMap((each) =>
          (each ? [/** @type {[string, string]} */ ([each.name, each === classes ? "through the classes" : "through prompts"])] : []))], () => { dress(); load(); })] : []),
        ...(text ? [prompts] : []),
        el("div", { class: "knob" }, el("div", { class: "knob-head" }, el("label", { htmlFor: "knob-corners" }, "Corner seeds"), why("corners")), seeds),
        el("button", { type: "button", id: "others", onclick: others }, "Other corners"),
        ...asks,
        ...shared(world, ["against", "model", "scale", "steps", "solver"], load, again)),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("div", { class: "beside" },
          el("section", { class: "card" }, el("h2", {}, "Between the noises"), el("p", { class: "quiet" }, "Choose a place; the sliders do the same from the keyboard."), sheet),
          el("section", { class: "card" }, el("h2", {}, "This place"), words, el("div", { class: "big" }, big)))));
    load();
    /** The whole map, as `between` in labs.py makes it. */
    const code = () => {
      const { base, corners: seeds, columns, rows, down: name, values: walked } = ask();
      const { cond = {}, against = {} } = base;
      const others = Object.fromEntries(Object.entries(cond).filter(([each]) => each !== name));
      const through = name !== "noise";
      return ["import dataclasses", "", "import torch", "import undiffuse", "from undiffuse import Streams, slerp", "from undiffuse.sampling import start", ...imports(model, others), "",
        `pipeline = undiffuse.Pipeline.load(${JSON.stringify(model.path)})`,
        `sampling = pipeline.settings(${settings(base)})`,
        `a, b, c, d = (Streams(seed, 1).draw(pipeline.shape) for seed in (${seeds.join(", ")}))`,
        `across, down = [i / ${columns - 1} for i in range(${columns})], ${through ? python(walked) : `[i / ${rows - 1} for i in range(${rows})]`}`,
        `noise = torch.cat([${through ? "slerp(a, b, u) for _ in down" : "slerp(slerp(a, b, u), slerp(c, d, u), v) for v in down"} for u in across])`,
        `cond = ${mapping(model, others)}`, ...(through ? [`cond[${JSON.stringify(name)}] = [row for row in down for _ in across]`] : []),
        `begun = pipeline.begin(len(noise), seed=${base.seed}, cond=cond${Object.keys(against).length ? `, against=${python(against)}` : ""}, sampling=sampling)`,
        `same = pipeline.begin([0] * len(noise), seed=${base.seed}, sampling=sampling).noise  # on the way, for all`,
        "begun = dataclasses.replace(begun, x=start(begun.levels[0], noise), noise=same)", "*_, last = pipeline.walk(begun)",
        "x = pipeline.spec.to_data(pipeline.end(begun, last.x))"].join("\n");
    };
    return {
      snippets: () => ({ Python: code() }),
      picture: () => (made ? together(canvases(sheet), made.columns) : null),
      close: () => window.removeEventListener("redress", redraw),
    };
  },
};
