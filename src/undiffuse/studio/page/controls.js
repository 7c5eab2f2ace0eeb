// The knobs: what each is called, what it does in one sentence, the formula it moves, and the chapter that says more.

import * as state from "./state.js";
import { el, short } from "./view.js";

/** @typedef {{label: string, words: string, formula: string, chapter: string}} About */

/** @type {Record<string, About>} */
export const ABOUT = {
  model: { label: "Model", words: "Which of the models that the studio was opened with is asked.", formula: "(x, level) → (x̂₀, ε̂)", chapter: "pipeline" },
  seed: { label: "Seed", words: "Draws the noise that everything begins from: sample i depends on the seed and i alone.", formula: "x₁ ~ N(0, α₁² + σ₁²)", chapter: "sampling" },
  n: { label: "Samples", words: "How many samples are made together; none of them depends on the others.", formula: "i = 0 … n − 1", chapter: "sampling" },
  classes: { label: "Class", words: "What the model is asked for; in turn means sample i gets class i.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  wclass: { label: "Class", words: "What every noise of the map is made into; walking through the classes, all are.", formula: "x̂₀(x, t, c)", chapter: "conditions" },
  against: { label: "Away from", words: "What guidance leads away from: nothing in particular, or a class that you do not want.", formula: "x̂₀ = u + s (c − u),  u = x̂₀(x, t, this)", chapter: "guidance" },
  steps: { label: "Steps", words: "Into how many steps the way from noise to data is cut.", formula: "1 = t₀ > t₁ > … > t_N = 0", chapter: "sampling" },
  solver: { label: "Solver", words: "How estimates become the next x; better ones lean on more of what they know.", formula: "dx = x̂₀ dα + ε̂ dσ", chapter: "solvers" },
  grid: { label: "Grid", words: "Which noise levels are visited: where along the way the steps are spent.", formula: "t_i = grid(i / N)", chapter: "sampling" },
  scale: { label: "Guidance", words: "How hard the class is asked for: 0 ignores it, 1 is the model's own answer, more exaggerates.", formula: "x̂₀ = u + s (c − u)", chapter: "guidance" },
  low: { label: "Guide above", words: "Below this noise-to-signal ratio nothing is guided, which keeps fine detail free.", formula: "s if low < σ/α ≤ high, else 1", chapter: "guidance" },
  high: { label: "Guide below", words: "Above this noise-to-signal ratio nothing is guided, which keeps variety; empty: no limit.", formula: "s if low < σ/α ≤ high, else 1", chapter: "guidance" },
  start: { label: "Begin from", words: "Fresh noise, or the very noise that the model would turn into the real picture (inversion).", formula: "x₁ = solver⁻¹(x₀)", chapter: "editing" },
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

/** "?" with the sentence, the formula and the chapter. @param {string} key */
export function why(key) {
  const { label, words, formula, chapter } = ABOUT[key];
  const details = el("details", { class: "why" },
    el("summary", { "aria-label": `What is ${label}?` }, "?"),
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

/** @param {string} key @param {HTMLElement} input @param {HTMLElement} [output] */
const frame = (key, input, output) =>
  el("div", { class: "knob" },
    el("div", { class: "knob-head" }, el("label", { htmlFor: input.id }, ABOUT[key].label), output, why(key)), input);

/** A slider. `values`: the numbers that it runs through, else from `min` to `max`.
 *  @param {string} key @param {number} usual @param {{min?: number, max?: number, step?: number, values?: number[],
 *  say?: (value: number) => string}} how @param {() => void} changed */
export function slider(key, usual, how, changed) {
  const { values, say = short } = how;
  const [min, max, step] = values ? [0, values.length - 1, 1] : [how.min ?? 0, how.max ?? 1, how.step ?? 0.01];
  const nearest = (/** @type {number} */ v) => (values ? values.reduce((best, _, i) => (Math.abs(values[i] - v) < Math.abs(values[best] - v) ? i : best), 0) : v);
  const output = el("output", {});
  const input = el("input", { type: "range", id: `knob-${key}`, min, max, step, "aria-describedby": undefined });
  const value = () => (values ? values[Number(input.value)] : Number(input.value));
  const show = () => {
    output.textContent = say(value());
    input.setAttribute("aria-valuetext", say(value()));
  };
  input.value = String(nearest(state.number(key, usual)));
  input.addEventListener("input", () => {
    state.set({ [key]: value() });
    show();
    changed();
  });
  show();
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

/** @param {string[]} names @returns {[string, string][]} */
export const plainly = (names) => names.map((name) => [name, name.replaceAll("_", " ")]);

// --- what several labs share ------------------------------------------------------------------------------------------

/** @typedef {{name: string, path: string, kind: string, shape: number[], bounded: boolean, classes: string[], schedule: string | null,
 *  solver: string | null, grid: string | null, steps: number, scale: number, alpha: number[], sigma: number[]}} Model */
/** @typedef {{name: string, order: number, calls: number, extra: number, stochastic: boolean, fixed: boolean}} Solver */
/** @typedef {{models: Model[], solvers: Solver[], grids: string[], schedules: string[], clouds: string[], quality_solvers: string[]}} World */

/** The model that is looked at. @param {World} world @returns {Model} */
export const modelOf = (world) => world.models.find((model) => model.name === state.text("model")) ?? world.models[0];

/** The classes of the knobs as a request says them. @param {string} key */
export const classesOf = (key) => {
  const chosen = state.text(key);
  return chosen === "" ? null : chosen === "none" ? [null] : [Number(chosen)];
};

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
    ...(model.classes.length ? { classes: classesOf("classes"), scale: state.number("scale", model.scale) } : {}),
    ...(state.text("solver") ? { solver: state.text("solver") } : {}), ...(state.text("grid") ? { grid: state.text("grid") } : {}),
    steps: state.number("steps", model.steps), ...more,
  };
}

/** The knobs of :func:`asked`. @param {World} world @param {string[]} names @param {() => void} changed @param {() => void} again
 *  called when another model is chosen */
export function shared(world, names, changed, again) {
  const model = modelOf(world);
  /** @type {Record<string, () => any>} */
  const make = {
    model: () => (world.models.length > 1 ? choice("model", world.models[0].name, world.models.map((m) => [m.name, m.name]), again) : null),
    seed: () => whole("seed", 0, changed),
    n: () => slider("n", 10, { min: 1, max: 32, step: 1 }, changed),
    classes: () => (model.classes.length ? choice("classes", "", classChoices(model, "all in turn"), changed) : null),
    scale: () => (model.classes.length ? slider("scale", model.scale, { min: 0, max: 8, step: 0.25 }, changed) : null),
    against: () => (model.classes.length ? choice("against", "", [["", "nothing in particular"], ...classChoices(model, "").slice(1)], changed) : null),
    steps: () => slider("steps", model.steps, { min: 1, max: 60, step: 1 }, changed),
    solver: () => choice("solver", model.solver ?? "", [...(model.solver ? [] : [/** @type {[string, string]} */ (["", "the model's own"])]), ...plainly(world.solvers.map((s) => s.name))], changed),
    grid: () => choice("grid", model.grid ?? "", [...(model.grid ? [] : [/** @type {[string, string]} */ (["", "the model's own"])]), ...plainly(world.grids)], changed),
  };
  return names.map((name) => make[name]()).filter(Boolean);
}

/** Text for a shell, quoted where needed. @param {string} words */
export const quoted = (words) => (/^[\w./:=,@%+-]+$/.test(words) ? words : `'${words.replaceAll("'", "'\\''")}'`);

/** The same samples from Python, the command line and curl. @param {World} world @param {any} ask */
export function snippets(world, ask) {
  const model = modelOf(world);
  const classes = ask.classes === null || ask.classes === undefined ? "" : ask.classes[0] === null ? "none" : String(ask.classes[0]);
  const interval = ask.low || ask.high ? [ask.low ?? 0, ask.high ?? 1e9] : null;
  const python = [
    "import undiffuse", "", `pipeline = undiffuse.Pipeline.load(${JSON.stringify(model.path)})`, "x = pipeline.sample(",
    `    ${ask.n}, seed=${ask.seed}, steps=${ask.steps},` + (classes ? ` classes=[${classes === "none" ? "None" : classes}],` : ""),
    ...(ask.solver ? [`    solver="${ask.solver}",`] : []), ...(ask.grid ? [`    grid="${ask.grid}",`] : []),
    ...(ask.scale !== undefined ? [`    guidance_scale=${ask.scale},`] : []), ...(interval ? [`    guidance_interval=(${interval.join(", ")}),`] : []), ")",
  ].join("\n");
  const command = ["undiffuse sample", quoted(model.path), `-n ${ask.n} --seed ${ask.seed} --steps ${ask.steps}`,
    classes && `--classes ${classes}`, ask.solver && `--solver ${ask.solver}`, ask.grid && `--grid ${ask.grid}`,
    ask.scale !== undefined && `--guidance-scale ${ask.scale}`, interval && `--set guidance_interval=${interval.join(",")}`].filter(Boolean).join(" ");
  const body = {
    model: model.name, n: ask.n, seed: ask.seed, num_inference_steps: ask.steps, ...(classes && classes !== "none" ? { class_labels: Number(classes) } : {}),
    ...(ask.solver ? { solver: ask.solver } : {}), ...(ask.grid ? { grid: ask.grid } : {}), ...(ask.scale !== undefined ? { guidance_scale: ask.scale } : {}),
  };
  const curl = `curl ${location.origin}/v1/samples -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body))} -o samples.npy`;
  return { Python: python, "Command line": command, ...(interval || classes === "none" ? {} : { curl }) };
}
