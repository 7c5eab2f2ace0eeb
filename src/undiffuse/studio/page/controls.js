// The knobs: what each is called, what it does in one sentence, the formula it moves, and the chapter that says more.

import * as api from "./api.js";
import * as state from "./state.js";
import { el, short } from "./view.js";

/** @typedef {{label: string, words: string, formula: string, chapter: string}} About */

/** @type {Record<string, About>} */
export const ABOUT = {
  model: { label: "Model", words: "Which of the models that the studio was opened with is asked.", formula: "(x, level) → (x̂₀, ε̂)", chapter: "pipeline" },
  seed: { label: "Seed", words: "Draws the noise that everything begins from: sample i depends on the seed and i alone.", formula: "x₁ ~ N(0, α₁² + σ₁²)", chapter: "sampling" },
  n: { label: "Samples", words: "How many samples are made together; none of them depends on the others.", formula: "i = 0 … n − 1", chapter: "sampling" },
  classes: { label: "Class", words: "What the model is asked for; in turn means sample i gets class i, and open, where anything else is asked for, any.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  wclass: { label: "Class", words: "What every noise of the map is made into; walking through the classes, all are.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  prompt: { label: "Prompt", words: "What the model is asked for, in words; Enter asks. Empty: nothing in particular.", formula: "x̂₀(x, t, words)", chapter: "text" },
  negative: { label: "Negative prompt", words: "What guidance leads away from, in words; empty: from nothing in particular.", formula: "x̂₀ = u + s (c − u),  u = x̂₀(x, t, these words)", chapter: "guidance" },
  bprompt: { label: "Prompt from here on", words: "The branch keeps this x and asks for something else from here to the data.", formula: "x̂₀(x_t, t, words′)", chapter: "text" },
  prompts: { label: "Prompts downwards", words: "One a line: every row of the map is the same noises, asked for the next line.", formula: "x̂₀(x, t, words)", chapter: "text" },
  attribute: { label: "Attribute", words: "One of the values that the model's data have; open leaves it to the model.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  quantity: { label: "Quantity", words: "In the data's own units; quantities are asked for together, and empty leaves all of them open.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  beside: { label: "Picture beside", words: "What the model is shown beside the noise, to complete: one made of real data, or your own of exactly this size.", formula: "x̂₀(x, t, picture)", chapter: "conditions" },
  number: { label: "Asked for", words: "Numbers that the model was trained with; empty leaves them open.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  against: { label: "Away from", words: "What guidance leads away from: nothing in particular, or a class that you do not want.", formula: "x̂₀ = u + s (c − u),  u = x̂₀(x, t, this)", chapter: "guidance" },
  steps: { label: "Steps", words: "Into how many steps the way from noise to data is cut.", formula: "1 = t₀ > t₁ > … > t_N = 0", chapter: "sampling" },
  solver: { label: "Solver", words: "How estimates become the next x; better ones lean on more of what they know.", formula: "dx = x̂₀ dα + ε̂ dσ", chapter: "solvers" },
  grid: { label: "Grid", words: "Which noise levels are visited: where along the way the steps are spent.", formula: "t_i = grid(i / N)", chapter: "sampling" },
  scale: { label: "Guidance", words: "How hard it is asked for: 0 ignores what is asked, 1 is the model's own answer, more exaggerates.", formula: "x̂₀ = u + s (c − u)", chapter: "guidance" },
  low: { label: "Guide above", words: "Below this noise-to-signal ratio nothing is guided, which keeps fine detail free.", formula: "s if low < σ/α ≤ high, else 1", chapter: "guidance" },
  high: { label: "Guide below", words: "Above this noise-to-signal ratio nothing is guided, which keeps variety; empty: no limit.", formula: "s if low < σ/α ≤ high, else 1", chapter: "guidance" },
  start: { label: "Begin from", words: "Fresh noise, or the very noise that the model would turn into the real picture (inversion): by Euler's method and unguided, whatever is chosen above.", formula: "x₁ = solver⁻¹(x₀)", chapter: "editing" },
  picture: { label: "Real picture", words: "The data that the forward side noises, and that inversion begins from.", formula: "x_t = α x₀ + σ ε", chapter: "levels" },
  t: { label: "Time", words: "Where on the way between data (0) and noise (1) you look.", formula: "x_t = α(t) x₀ + σ(t) ε", chapter: "levels" },
  bclass: { label: "Class from here on", words: "The branch keeps this x and asks for another class from here to the data.", formula: "x̂₀(x_t, t, c′)", chapter: "conditions" },
  bscale: { label: "Guidance from here on", words: "The branch keeps this x and guides the rest of the way harder or less.", formula: "x̂₀ = u + s′ (c − u)", chapter: "guidance" },
  bseed: { label: "Noise from here on", words: "Another seed keeps what is believed here and draws the noise anew.", formula: "x_t ← α x̂₀ + σ ε′", chapter: "editing" },
  schedule: { label: "Schedule", words: "How fast data becomes noise.", formula: "x = α(t) x₀ + σ(t) ε", chapter: "schedules" },
  points: { label: "Grid points", words: "How many levels the grid lays on the schedule.", formula: "t_i = grid(i / N)", chapter: "sampling" },
  calls: { label: "Network calls", words: "What both sides may spend; a solver that asks twice a step takes half the steps.", formula: "calls = steps × calls a step", chapter: "solvers" },
  asolver: { label: "A: solver", words: "How the left side walks.", formula: "dx = x̂₀ dα + ε̂ dσ", chapter: "solvers" },
  agrid: { label: "A: grid", words: "The levels that the left side visits.", formula: "t_i = grid(i / N)", chapter: "sampling" },
  bsolver: { label: "B: solver", words: "How the right side walks, from the same noise.", formula: "dx = x̂₀ dα + ε̂ dσ", chapter: "solvers" },
  bgrid: { label: "B: grid", words: "The levels that the right side visits.", formula: "t_i = grid(i / N)", chapter: "sampling" },
  way: { label: "Way walked", words: "How far both sides have come, from the shared noise to their own data.", formula: "1 − t", chapter: "sampling" },
  cloud: { label: "Distribution", words: "What is to be learned: Gaussians of one small width about these points.", formula: "p(x₀) = mean of N(mₖ, h²)", chapter: "levels" },
  field: { label: "Arrows", words: "The score points to where data is likelier; the velocity is how particles move from noise to data.", formula: "∇ log p = −ε̂/σ,   −dx/dt = −(x̂₀ α′ + ε̂ σ′)", chapter: "predictions" },
  updates: { label: "Training", words: "How many batches of 256 points a small network learns from while you watch.", formula: "min E‖ŷ − (ε − x₀)‖²", chapter: "objectives" },
  corners: { label: "Corner seeds", words: "The four noises at the corners; what lies between is on great circles, so it stays noise.", formula: "slerp(ε_a, ε_b; u)", chapter: "editing" },
  psteps: { label: "Steps", words: "Into how many steps the particles' way is cut; few steps make the solver's own error visible.", formula: "1 = t₀ > t₁ > … > t_N = 0", chapter: "sampling" },
  down: { label: "Downwards", words: "Another way through the noise, or the same noise with one class after another.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  u: { label: "Across", words: "The place between the left and the right corner.", formula: "ε(u) = slerp(ε_a, ε_b; u)", chapter: "editing" },
  v: { label: "Down", words: "The place between the upper and the lower edge.", formula: "ε(u, v) = slerp(ε_ab(u), ε_cd(u); v)", chapter: "editing" },
};

/** The explanations that are open. @returns {NodeListOf<HTMLDetailsElement>} */
const opened = () => document.querySelectorAll("details.why[open]");

/** "?" with the sentence, the formula and the chapter. @param {string} key @param {string} [name] a name of the model's own */
export function why(key, name = ABOUT[key].label) {
  const { words, formula, chapter } = ABOUT[key];
  const details = el("details", { class: "why" },
    el("summary", { "aria-label": `What is ${name}?` }, "?"),
    el("div", { class: "note" }, el("p", {}, words), el("p", { class: "formula" }, formula),
      el("a", { href: `/studio/chapter/${chapter}`, target: "_blank", rel: "noopener" }, `The chapter on ${chapter}`)));
  details.addEventListener("toggle", () => {
    if (details.open) for (const other of opened()) if (other !== details) other.open = false;
  });
  return details;
}

document.addEventListener("click", (event) => {
  for (const each of opened()) if (!each.contains(/** @type {Node} */ (event.target))) each.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const each of opened()) {
    each.open = false;
    each.querySelector("summary")?.focus();
  }
});

/** A knob with its name and its explanation. @param {string} key @param {HTMLElement} input @param {HTMLElement} [output] */
const frame = (key, input, output) => named(ABOUT[key].label, key, input, output);

/** The same with a name of the model's own. @param {string} name @param {string} key @param {HTMLElement} input @param {HTMLElement} [output] */
const named = (name, key, input, output) =>
  el("div", { class: "knob" }, el("div", { class: "knob-head" }, el("label", { htmlFor: input.id }, name), output, why(key, name)), input);

/** A slider. `values`: the numbers that it runs through, else from `min` to `max`.
 *  @param {string} key @param {number} usual @param {{min?: number, max?: number, step?: number, values?: number[],
 *  say?: (value: number) => string}} how @param {() => void} changed */
export function slider(key, usual, how, changed) {
  const { values, say = short } = how;
  const given = state.number(key, usual); // a model, or the address, may ask for more than the slider usually goes to
  const [min, max, step] = values ? [0, values.length - 1, 1] : [Math.min(how.min ?? 0, given), Math.max(how.max ?? 1, given), how.step ?? 0.01];
  const nearest = (/** @type {number} */ v) => (values ? values.reduce((best, _, i) => (Math.abs(values[i] - v) < Math.abs(values[best] - v) ? i : best), 0) : v);
  const output = el("output", {});
  const input = el("input", { type: "range", id: `knob-${key}`, min, max, step, "aria-describedby": undefined });
  const value = () => (values ? values[Number(input.value)] : Number(input.value));
  const show = (/** @type {number} */ exact) => {
    output.textContent = say(exact);
    input.setAttribute("aria-valuetext", say(exact));
  };
  input.value = String(nearest(given));
  input.addEventListener("input", () => {
    state.set({ [key]: value() });
    show(value());
    changed();
  });
  show(values ? value() : given); // what is asked for, even between two places of the slider
  return frame(key, input, output);
}

/** A choice. @param {string} key @param {string} usual @param {[string, string][]} choices @param {() => void} changed */
export function choice(key, usual, choices, changed) {
  const input = el("select", { id: `knob-${key}` }, ...choices.map(([value, words]) => el("option", { value }, words)));
  input.value = state.text(key, usual);
  if (input.selectedIndex < 0) input.value = usual;
  input.addEventListener("change", () => {
    state.set({ [key]: input.value === usual ? null : input.value });
    changed();
  });
  return frame(key, input);
}

/** A whole number. @param {string} key @param {number} usual @param {() => void} changed @param {number} [max] */
export function whole(key, usual, changed, max = 2 ** 53 - 1) {
  const input = el("input", { type: "number", id: `knob-${key}`, min: 0, max, step: 1 });
  input.value = String(state.number(key, usual));
  input.addEventListener("input", () => {
    if (!input.validity.valid || input.value === "") return;
    state.set({ [key]: Number(input.value) });
    changed();
  });
  return frame(key, input);
}

/** A number that may be left empty. @param {string} key @param {string} empty @param {() => void} changed */
export function open(key, empty, changed) {
  const input = el("input", { type: "number", id: `knob-${key}`, min: 0, step: "any", placeholder: empty });
  input.value = state.text(key);
  input.addEventListener("input", () => {
    if (!input.validity.valid) return;
    state.set({ [key]: input.value === "" ? null : Number(input.value) });
    changed();
  });
  return frame(key, input);
}

/** Words. Enter asks, as leaving the box does; with `lines` it begins the next.
 *  @param {string} key @param {string} hint @param {() => void} changed @param {number} [lines] */
export function written(key, hint, changed, lines = 0) {
  const input = el("textarea", { id: `knob-${key}`, rows: lines || 2, placeholder: hint, maxLength: 2000, spellcheck: false });
  input.value = state.text(key);
  const ask = () => {
    if (input.value.trim() === state.text(key)) return;
    state.set({ [key]: input.value.trim() });
    changed();
  };
  input.addEventListener("change", ask);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || lines) return;
    event.preventDefault();
    ask();
  });
  return frame(key, input);
}

/** Several small inputs that are one state, with commas between. @param {string} key @param {string} name
 *  @param {(HTMLInputElement | HTMLSelectElement)[]} inputs @param {() => void} changed */
function several(key, name, inputs, changed) {
  const parts = state.text(key).split(",");
  inputs.forEach((input, k) => {
    input.value = parts[k] ?? "";
    input.id = `knob-${key}-${k}`;
    input.setAttribute("aria-label", inputs.length > 1 ? `${name} ${k + 1}` : name);
    input.addEventListener("change", () => {
      const all = inputs.map((each) => each.value);
      state.set({ [key]: all.some((each) => each !== "") ? all.join(",") : null });
      changed();
    });
  });
  return el("div", { class: "knob" }, el("div", { class: "knob-head" }, el("span", {}, name), why("number", name)), el("div", { class: "several" }, ...inputs));
}

/** One of an attribute's values. @param {string} key @param {string} name @param {string[]} values @param {string} empty
 *  @param {() => void} changed */
function attribute(key, name, values, empty, changed) {
  const input = el("select", { id: `knob-${key}` }, el("option", { value: "" }, empty), ...values.map((value) => el("option", { value }, value)));
  input.value = values.includes(state.text(key)) ? state.text(key) : "";
  input.addEventListener("change", () => {
    state.set({ [key]: input.value });
    changed();
  });
  return named(name, "attribute", input);
}

/** Quantities, which are asked for together: one that is filled in fills the others with their mean, one that is emptied empties them.
 *  @param {string[]} keys @param {string[]} names @param {Condition[]} quantities @param {string} empty
 *  @param {() => void} changed */
function amounts(keys, names, quantities, empty, changed) {
  const inputs = keys.map((key) => {
    const input = el("input", { type: "number", step: "any", id: `knob-${key}`, placeholder: empty });
    input.value = state.text(key);
    return input;
  });
  inputs.forEach((input) => input.addEventListener("change", () => {
    if (!input.validity.valid) return;
    inputs.forEach((other, i) => {
      if (input.value === "") other.value = "";
      else if (other.value === "") other.value = String(Number((quantities[i].mean ?? 0).toPrecision(4)));
      state.set({ [keys[i]]: other.value });
    });
    changed();
  }));
  return inputs.map((input, k) => named(names[k], "quantity", input));
}

/** A picture of those that the studio knows, or none. @param {Model} model @param {Condition} condition @param {() => void} changed */
function picture(model, condition, changed) {
  const key = "beside";
  const canvas = el("canvas", { role: "img", class: "shown" });
  const words = el("output", {});
  let count = 0;
  /** @type {import("./api.js").Message | undefined} */ let known;
  const number = () => (state.text(key) === "" ? -1 : state.number(key, -1));
  const draw = () => {
    const k = number();
    const there = k >= 0 && k < count && known?.arrays.pictures;
    words.textContent = k < 0 ? "none" : `${k + 1} of ${count}`;
    canvas.setAttribute("aria-label", k < 0 ? "No picture is shown to the model" : `Picture ${k + 1}, shown to the model`);
    canvas.hidden = !there;
    save.disabled = none.disabled = k < 0;
    if (!there) return;
    const [, height, width] = there.shape;
    [canvas.width, canvas.height] = [width, height];
    const size = 4 * width * height;
    const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    pen.putImageData(new ImageData(new Uint8ClampedArray(there.data.subarray(k * size, (k + 1) * size)), width, height), 0, 0);
  };
  const look = async () => {
    known = await api.arrays("beside", { model: model.name });
    count = known.count;
    next.disabled = !count;
    draw();
  };
  const trying = (/** @type {() => Promise<void>} */ work) => async () => {
    try {
      await work();
    } catch (error) {
      api.complain(api.sentence(/** @type {Error} */ (error).message));
    }
  };
  const choose = (/** @type {number | null} */ k) => {
    state.set({ [key]: k });
    draw();
    changed();
  };
  const next = el("button", { type: "button", id: "next-beside", onclick: () => choose((number() + 1) % count) }, "Next");
  const none = el("button", { type: "button", onclick: () => choose(null) }, "None");
  const save = el("button", { type: "button", onclick: trying(async () => {
    const file = await (await api.request("beside/file", { model: model.name, number: number() })).blob();
    const link = el("a", { href: URL.createObjectURL(file), download: besideFile(number()) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }) }, "Save .npy");
  const file = el("input", { type: "file", accept: "image/*,.npy", id: "knob-beside", class: "hidden", tabIndex: -1, "aria-label": "A picture to show the model" });
  file.addEventListener("change", trying(async () => {
    if (!file.files?.[0]) return;
    const { beside } = await api.json("beside/open", { model: model.name, data: await api.base64(file.files[0]) });
    file.value = "";
    await look();
    choose(beside);
  }));
  trying(look)();
  draw();
  const size = condition.size ?? (condition.shape ?? []).join(" × ");
  return el("div", { class: "knob" },
    el("div", { class: "knob-head" }, el("span", {}, `Picture beside, ${size}`), words, why("beside")), canvas,
    el("div", { class: "row" }, next, el("button", { type: "button", onclick: () => file.click() }, "Your own …"), none, save, file),
    ...(condition.made === "holes" ? [el("p", { class: "quiet" }, "What is transparent, or NaN in a .npy, is filled in.")] : []));
}

/** What a saved picture is called. @param {unknown} number */
const besideFile = (number) => `beside-${number}.npy`;

/** @param {string[]} names @returns {[string, string][]} */
export const plainly = (names) => names.map((name) => [name, name.replaceAll("_", " ")]);

// --- what several labs share ------------------------------------------------------------------------------------------

/** @typedef {{name: string, kind: "classes" | "text" | "attribute" | "number" | "attributes" | "vector" | "picture" | "array",
 *  values?: string[], mean?: number, sizes?: number[], size?: number | string | null, shape?: number[], made?: string | null}} Condition */
/** @typedef {string | number | null | (number | string | null)[]} Row */
/** @typedef {Record<string, Row[]>} Given */
/** @typedef {{name: string, path: string, kind: string, shape: number[], bounded: boolean, classes: string[], conditions: Condition[],
 *  latent: boolean, schedule: string | null,
 *  solver: string | null, grid: string | null, steps: number, scale: number, interval: [number, number] | null, alpha: number[], sigma: number[]}} Model */
/** @typedef {{name: string, order: number, calls: number, extra: number, stochastic: boolean, fixed: boolean}} Solver */
/** @typedef {{models: Model[], solvers: Solver[], grids: string[], schedules: string[], clouds: string[], quality_solvers: string[]}} World */

/** The model that is looked at. @param {World} world @returns {Model} */
export const modelOf = (world) => world.models.find((model) => model.name === state.text("model")) ?? world.models[0];

/** What a condition is asked for: the names in the address. @type {Record<string, Record<string, string>>} */
const KEYS = {
  cond: { classes: "classes", text: "prompt" }, against: { classes: "against", text: "negative" },
  branch: { classes: "bclass", text: "bprompt" }, walk: { classes: "wclass", text: "prompt" },
};

/** @typedef {"cond" | "against" | "branch" | "walk"} Role */
/** @param {Role} role @param {Condition} condition */
const keyOf = (role, condition) => KEYS[role][condition.kind] ?? `${role}.${condition.name}`;

/** Whether a model can be asked in words. @param {Model} model */
export const literate = (model) => model.conditions.some((each) => each.kind === "text");

/** What the knobs ask for, by the condition's name; what is left open is not there. @param {Model} model @param {Role} role
 *  @returns {Given} */
export function asking(model, role) {
  /** @type {Given} */
  const given = {};
  for (const condition of model.conditions) {
    if (condition.kind === "picture") {
      if ((role === "cond" || role === "walk") && state.text("beside") !== "") given[condition.name] = [state.number("beside", 0)];
      continue;
    }
    const chosen = state.text(keyOf(role, condition));
    if (chosen === "") continue;
    if (condition.kind === "attribute" && !condition.values?.includes(chosen)) continue;
    if (condition.kind === "classes" && chosen !== "none" && !(chosen in model.classes)) continue; // nor does the knob show it
    if (condition.kind === "text" || condition.kind === "attribute") given[condition.name] = [chosen];
    else if (condition.kind === "number") given[condition.name] = [Number(chosen)];
    else if (condition.kind === "classes") given[condition.name] = [chosen === "none" ? null : Number(chosen)];
    else given[condition.name] = [chosen.split(",").map((part) => (part === "" ? null : Number(part)))];
  }
  return given;
}

/** The knobs of :func:`asking`. @param {Model} model @param {Role} role @param {() => void} changed
 *  @param {string} [usual] the class unless another is chosen */
export function conditionKnobs(model, role, changed, usual = "") {
  const open = { cond: model.conditions.length > 1 ? "all in turn, or open" : "all in turn", against: "nothing in particular", branch: "as before", walk: "" }[role];
  const name = (/** @type {Condition} */ c) => ({ cond: c.name, walk: c.name, against: `Away from: ${c.name}`, branch: `${c.name} from here on` })[role];
  const empty = role === "branch" ? "as before" : "open";
  const quantities = model.conditions.filter((each) => each.kind === "number");
  const boxes = amounts(quantities.map((each) => keyOf(role, each)), quantities.map(name), quantities, empty, changed);
  return model.conditions.map((condition) => {
    const key = keyOf(role, condition);
    switch (condition.kind) {
      case "classes": {
        const choices = classChoices(model, open);
        return choice(key, usual, role === "against" ? choices.filter(([value]) => value !== "none") : choices, changed);
      }
      case "text": return written(key, role === "branch" ? "as before" : "", changed);
      case "attribute": return attribute(key, name(condition), condition.values ?? [], empty, changed);
      case "number": return boxes[quantities.indexOf(condition)];
      case "picture": return role === "cond" || role === "walk" ? picture(model, condition, changed) : null;
      case "attributes": return several(key, name(condition), (condition.sizes ?? []).map((size) => el("select", {},
        el("option", { value: "" }, "open"), ...Array.from({ length: size }, (_, i) => el("option", { value: String(i) }, String(i))))), changed);
      case "vector": return several(key, name(condition), Array.from({ length: Math.min(16, Number(condition.size ?? 0)) }, () =>
        el("input", { type: "number", step: "any", placeholder: "open" })), changed);
      default: return role === "cond" ? el("p", { class: "none" }, `${condition.name} can be asked for from Python; here it is left open.`) : null;
    }
  });
}

/** @param {Model} model @param {string} every @returns {[string, string][]} */
export const classChoices = (model, every) => [
  ...(every ? [/** @type {[string, string]} */ (["", every])] : []), ["none", "none in particular"],
  ...model.classes.map((name, i) => /** @type {[string, string]} */ ([String(i), name])),
];

/** A request for samples, from the knobs that are shared. @param {World} world @param {object} [more] */
export function asked(world, more = {}) {
  const model = modelOf(world);
  const seed = state.number("seed", 0);
  return {
    model: model.name, n: Math.min(64, state.number("n", 10)), seed,
    ...(model.conditions.length ? { cond: asking(model, "cond"), against: asking(model, "against"), scale: state.number("scale", model.scale) } : {}),
    ...(state.text("solver") ? { solver: state.text("solver") } : {}), ...(state.text("grid") ? { grid: state.text("grid") } : {}),
    steps: state.number("steps", model.steps), ...more,
  };
}

/** The knobs of :func:`asked`. @param {World} world @param {string[]} names @param {() => void} changed @param {() => void} again
 *  called when another model is chosen */
export function shared(world, names, changed, again) {
  const model = modelOf(world);
  /** @type {Record<string, () => HTMLElement | null | (HTMLElement | null)[]>} */
  const make = {
    model: () => (world.models.length > 1 ? choice("model", world.models[0].name, world.models.map((m) => [m.name, m.name]), again) : null),
    seed: () => whole("seed", 0, changed),
    n: () => slider("n", 10, { min: 1, max: 32, step: 1 }, changed),
    cond: () => conditionKnobs(model, "cond", changed),
    against: () => conditionKnobs(model, "against", changed),
    scale: () => (model.conditions.length ? slider("scale", model.scale, { min: 0, max: 8, step: 0.25 }, changed) : null),
    steps: () => slider("steps", model.steps, { min: 1, max: 60, step: 1 }, changed),
    solver: () => choice("solver", model.solver ?? "", [...(model.solver ? [] : [/** @type {[string, string]} */ (["", "the model's own"])]), ...plainly(world.solvers.map((s) => s.name))], changed),
    grid: () => choice("grid", model.grid ?? "", [...(model.grid ? [] : [/** @type {[string, string]} */ (["", "the model's own"])]), ...plainly(world.grids)], changed),
  };
  return names.flatMap((name) => make[name]()).filter((each) => each !== null);
}

/** Text for a shell, quoted where needed. @param {string} words */
export const quoted = (words) => (/^[\w./:=,@%+-]+$/.test(words) ? words : `'${words.replaceAll("'", "'\\''")}'`);

/** A value as Python writes it. @param {unknown} value @returns {string} */
export const python = (value) => (value === null || value === undefined ? "None" : Array.isArray(value) ? `[${value.map(python).join(", ")}]`
  : typeof value === "object" ? `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${python(each)}`).join(", ")}}` : JSON.stringify(value));

/** Conditions as Python writes them; a picture by the file that it is saved as. @param {Model} model @param {Given} cond */
export const mapping = (model, cond) => `{${Object.entries(cond).map(([name, rows]) => `${JSON.stringify(name)}: ${model.conditions.some((each) =>
  each.name === name && each.kind === "picture") ? `read_shown("${besideFile(rows[0])}", pipeline.beside, holes=pipeline.fills_holes)` : python(rows)}`).join(", ")}}`;

/** What :func:`mapping` needs. @param {Model} model @param {Given} cond */
export const imports = (model, cond) => (model.conditions.some((each) => each.kind === "picture" && cond[each.name]) ? ["from undiffuse.data.shown import read_shown"] : []);

/** What is asked for, as arguments of Pipeline.sample. @param {Model} model @param {Given} [cond] @param {Given} [against] */
function pythonic(model, cond = {}, against = {}) {
  const text = (/** @type {string} */ name) => model.conditions.some((each) => each.name === name && each.kind === "text");
  const rest = (/** @type {Given} */ given, /** @type {string} */ own) => Object.fromEntries(Object.entries(given).filter(([name]) => name !== own && !text(name)));
  const words = (/** @type {Given} */ given) => Object.entries(given).find(([name]) => text(name))?.[1];
  const [others, away] = [rest(cond, "classes"), rest(against, "")];
  return [
    ...(cond.classes ? [`classes=${python(cond.classes)}`] : []), ...(words(cond) ? [`prompts=${python(words(cond))}`] : []),
    ...(Object.keys(others).length ? [`cond=${mapping(model, others)}`] : []),
    ...(words(against) ? [`negative_prompt=${python(words(against)?.[0])}`] : []), ...(Object.keys(away).length ? [`against=${python(away)}`] : []),
  ];
}

/** Solver, grid, steps and guidance, as Pipeline.settings and Pipeline.sample take them. @param {any} ask */
export const settings = (ask) => [`steps=${ask.steps}`, ask.solver && `solver="${ask.solver}"`, ask.grid && `grid="${ask.grid}"`,
  ask.scale !== undefined && `guidance_scale=${ask.scale}`].filter(Boolean).join(", ");

/** The same samples from Python, the command line and curl. @param {World} world @param {any} ask */
export function snippets(world, ask) {
  const model = modelOf(world);
  /** @type {[Given, Given]} */
  const [cond, against] = [ask.cond ?? {}, ask.against ?? {}];
  const kinds = Object.fromEntries(model.conditions.map((each) => [each.name, each.kind]));
  const shown = Object.keys(cond).find((name) => kinds[name] === "picture");
  const interval = ask.low || ask.high ? [ask.low ?? 0, ask.high ?? 1e9] : null;
  const code = [
    "import undiffuse", ...imports(model, cond), "", `pipeline = undiffuse.Pipeline.load(${JSON.stringify(model.path)})`, "x = pipeline.sample(",
    `    ${ask.n}, seed=${ask.seed},`, ...pythonic(model, cond, against).map((each) => `    ${each},`),
    `    ${settings(ask)}${interval ? `, guidance_interval=(${interval.join(", ")})` : ""},`, ")",
  ].join("\n");

  // A class by its name, which wins over numbers there; by its number where the name would be read as several.
  const class_ = (/** @type {Row} */ row) => (row === null ? "none" : /[,]|^\s|\s$|^$/.test(model.classes[Number(row)] ?? ",") ? String(row) : model.classes[Number(row)]);
  const said = (/** @type {string} */ name, /** @type {Row} */ row) => (kinds[name] === "text" ? String(row) : kinds[name] === "classes" ? class_(row)
    : Array.isArray(row) ? row.map((part) => part ?? "none").join(",") : String(row));
  const option = (/** @type {string} */ name, /** @type {string} */ value) => `--${name}${value.startsWith("-") ? "=" : " "}${quoted(value)}`;
  const options = (/** @type {Given} */ given, /** @type {Record<string, string>} */ own, /** @type {string} */ other) => Object.entries(given).map(([name, [row]]) =>
    name === shown ? `--beside ${besideFile(row)}` : own[kinds[name]] ? option(own[kinds[name]], said(name, row)) : option(other, `${name}=${said(name, row)}`));
  const command = ["undiffuse sample", quoted(model.path), `-n ${ask.n} --seed ${ask.seed} --steps ${ask.steps}`,
    ...options(cond, { classes: "classes", text: "prompt" }, "cond"), ...options(against, { text: "negative-prompt" }, "against"),
    ask.solver && `--solver ${ask.solver}`, ask.grid && `--grid ${ask.grid}`,
    ask.scale !== undefined && `--guidance-scale ${ask.scale}`, interval && `--set guidance_interval=${interval.join(",")}`].filter(Boolean).join(" ");

  const [prompts, plain] = [Object.keys(cond), Object.keys(against)].map((names) => names.find((name) => kinds[name] === "text"));
  const others = (/** @type {Given} */ given) => Object.entries(given).filter(([name]) => kinds[name] !== "text" && name !== shown);
  const body = {
    model: model.name, n: ask.n, seed: ask.seed, num_inference_steps: ask.steps,
    ...(prompts ? { prompt: cond[prompts][0] } : {}), ...(plain ? { negative_prompt: against[plain][0] } : {}),
    ...(others(cond).length ? { cond: Object.fromEntries(others(cond)) } : {}), ...(others(against).length ? { against: Object.fromEntries(others(against)) } : {}),
    ...(ask.solver ? { solver: ask.solver } : {}), ...(ask.grid ? { grid: ask.grid } : {}), ...(ask.scale !== undefined ? { guidance_scale: ask.scale } : {}),
    ...(shown ? { beside: "BESIDE" } : {}),
  };
  // The picture is read when the command runs, by the shell; the server's form has no field for the interval.
  const data = quoted(JSON.stringify(body)).replace('"beside":"BESIDE"', `"beside":"'"$(base64 < ${besideFile(shown && cond[shown][0])} | tr -d '\\n')"'"`);
  const curl = `curl ${location.origin}/v1/samples -H 'Content-Type: application/json' \\\n  -d ${data} -o samples.npy`;
  return { Python: code, "Command line": command, ...(interval ? {} : { curl }) };
}
