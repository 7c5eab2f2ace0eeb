// Lab 1: one time axis, both ways. Forward, a real picture drowns in noise; back, the model finds data in the same noise.

import * as api from "./api.js";
import { asked, asking, choice, conditionKnobs, modelOf, shared, slider, snippets, whole, why } from "./controls.js";
import * as state from "./state.js";
import { aspect, canvases, Chart, draw, el, item, nearest, pictorial, reach, short, sizeOf, together } from "./view.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./controls.js").World} World */

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

/** (alpha, sigma) at any time, between the points of the model's schedule. @param {{alpha: number[], sigma: number[]}} model @param {number} t */
export function levelAt(model, t) {
  const place = t * (model.alpha.length - 1);
  const i = Math.min(model.alpha.length - 2, Math.floor(place));
  const w = place - i;
  return [model.alpha[i] * (1 - w) + model.alpha[i + 1] * w, model.sigma[i] * (1 - w) + model.sigma[i + 1] * w];
}

export default {
  title: "Time",
  words: "Left is data, right is noise. Forward, a real picture drowns in noise; back, the model walks from that same noise to new data.",
  /** @param {HTMLElement} root @param {World} world @param {() => void} again */
  open(root, world, again) {
    const model = modelOf(world);
    const size = sizeOf(model);
    /** @type {Message | undefined} */ let trace;
    /** What left the way: from the reverse side's x, or from the real picture with noise. @type {{made: Message, forward: boolean} | undefined} */
    let offshoot;
    /** @type {Message | undefined} */ let pictures;
    let playing = 0;
    const inverted = () => state.text("start") === "inverted";
    const ask = () => asked(world, {
      start: inverted() ? "inverted" : "noise", picture: state.number("picture", 0),
    });

    // --- what is seen ---
    const tile = (/** @type {string} */ name, /** @type {string} */ formula) => {
      const canvas = el("canvas", { role: "img", "aria-label": name });
      const words = el("span");
      const figure = el("figure", { class: "tile" }, el("figcaption", {}, el("b", {}, name), el("span", { class: "formula" }, formula), " ", words), canvas);
      figure.style.setProperty("--aspect", String(aspect(model)));
      return { canvas, figure, words };
    };
    const tiles = {
      forward: tile("Forward", "α x₀ + σ ε"), x: tile("Reverse", "x"),
      x0: tile("Believed data", "x̂₀"), eps: tile("Believed noise", "ε̂"), change: tile("Change of the step", "x′ − x"),
    };
    tiles.x.figure.classList.add("own");
    const time = el("input", { type: "range", id: "time", min: 0, max: 1000, step: 1, "aria-label": "Time, from data to noise" });
    const ticks = el("div", { class: "ticks", "aria-hidden": "true" });
    const facts = el("dl", { class: "facts" });
    const sheet = el("div", { class: "sheet", role: "group", "aria-label": "Samples" });
    const play = el("button", { type: "button", class: "main", id: "play", onclick: () => start(-1) }, "◀ To data");
    const back = el("button", { type: "button", id: "back", onclick: () => start(1) }, "To noise ▶");
    const levels = new Chart("Signal and noise", "time t", "amount");
    const changes = new Chart("Change per step", "time t", "root mean square");
    const branchSheet = el("div", { class: "sheet" });
    const branchWords = el("p", { class: "quiet" });
    const branching = el("div", { class: "three" });
    const changed = () => { offshoot = undefined; state.set({ branch: null, noised: null }); dress(); load(); };

    // --- asking ---
    const load = api.latest(async (signal) => {
      const [made, known] = await Promise.all([
        api.arrays("trace", ask(), signal), pictures ?? api.arrays("pictures", { model: model.name }, signal),
      ]);
      [trace, pictures] = [made, known];
      now.trace = trace;
      now.pictures = pictures;
      lay();
      if (state.text("branch") !== "" || state.text("noised") !== "") await off(signal);
    }, root);

    /** Leave the way as the address says. @param {AbortSignal} [signal] */
    const off = async (signal) => {
      const whole = /** @type {Message} */ (trace);
      const base = ask();
      const known = model.classes.length ? { classes: whole.labels } : {};
      const then = {
        ...base, start: "noise", seed: state.number("bseed", base.seed),
        ...(model.conditions.length ? { cond: { ...known, ...base.cond, ...asking(model, "branch") }, scale: state.number("bscale", base.scale ?? 1) } : {}),
      };
      if (state.text("noised") !== "") {
        const t = Math.min(0.999, Math.max(0.01, state.number("noised", 0.5)));
        const cond = { ...base.cond, ...asking(model, "branch") }; // unless something is asked for, the picture's own class
        offshoot = { made: await api.arrays("trace", { ...then, ...(model.conditions.length ? { cond } : {}), start: "noised", t }, signal), forward: true };
      } else {
        const index = Math.min(state.number("branch", 0), whole.t.length - 2);
        offshoot = { made: await api.arrays("branch", { base, index, then }, signal), forward: false };
      }
      now.branch = offshoot.made;
      lay();
    };
    const leave = api.latest(off, root);
    const forget = () => { offshoot = undefined; now.branch = undefined; state.set({ branch: null, noised: null }); lay(); };
    /** Begin from the real picture as it is at this time. */
    const denoise = () => {
      state.set({ branch: null, noised: state.number("t", 0.5) });
      leave();
    };

    // --- drawing ---
    /** Build what has as many parts as there are samples and steps. */
    function lay() {
      if (!trace) return;
      const count = trace.arrays.x.shape[1];
      const thumbs = (/** @type {HTMLElement} */ into, /** @type {boolean} */ pick) => {
        into.style.setProperty("--columns", String(Math.min(count, 10)));
        into.style.setProperty("--narrow", "5");
        into.style.setProperty("--aspect", String(aspect(model)));
        into.replaceChildren(...Array.from({ length: count }, (_, i) => {
          const label = trace?.labels?.[i];
          const name = `Sample ${i}${label === null || label === undefined ? "" : `, class ${model.classes[label]}`}`;
          const canvas = el("canvas", pick ? {} : { role: "img", "aria-label": `${name}, branched` });
          return pick ? el("button", { type: "button", "aria-label": name, onclick: () => { state.set({ i }); paint(); } }, canvas) : canvas;
        }));
      };
      thumbs(sheet, true);
      if (offshoot) thumbs(branchSheet, false);
      else branchSheet.replaceChildren();
      ticks.replaceChildren(...trace.t.map((/** @type {number} */ t) => { const i = el("i"); i.style.left = `${100 * t}%`; return i; }));
      const ts = Array.from(model.alpha, (_, i) => i / (model.alpha.length - 1));
      levels.draw([{ name: "signal α", x: ts, y: model.alpha }, { name: "noise σ", x: ts, y: model.sigma, tone: 2 },
        { name: "", x: trace.t, y: trace.sigma, tone: 2, dots: true }]);
      const { x } = trace.arrays;
      const change = Array.from({ length: trace.t.length - 1 }, (_, f) => {
        let sum = 0;
        const [a, b] = [item(x, size * count, f), item(x, size * count, f + 1)];
        for (let k = 0; k < a.length; k++) sum += (b[k] - a[k]) ** 2;
        return Math.sqrt(sum / a.length);
      });
      changes.draw([{ name: "x′ − x, all samples", x: trace.t.slice(0, -1), y: change, tone: 3, dots: true, labels: change.map(() => "") }]);
      paint();
    }

    /** Draw this moment; nothing is asked of the server. */
    function paint() {
      if (!trace || !pictures) return;
      const begun = performance.now();
      const t = state.number("t", 0.5);
      const count = trace.arrays.x.shape[1];
      const i = Math.min(count - 1, Math.max(0, state.number("i", 0)));
      const f = nearest(trace.t, t);
      const [alpha, sigma] = levelAt(model, t);
      const at = (/** @type {string} */ name, /** @type {number} */ frame) => item(/** @type {Message} */ (trace).arrays[name], size, frame * count + i);

      // Forward: the same noise as the reverse side begins from, at exactly this time (in latents at this frame's).
      const unit = Math.hypot(trace.alpha[0], trace.sigma[0]);
      const known = pictures.arrays.x.shape[0];
      const clean = known ? item(pictures.arrays.x, size, state.number("picture", 0) % known) : new Float32Array(size);
      if (!known) tiles.forward.words.textContent = "no real data at hand: noise about the mean";
      const noised = (/** @type {number} */ sample) => {
        const { x, forward } = /** @type {Message} */ (trace).arrays;
        if (forward) return item(forward, size, f * count + sample);
        const first = item(x, size, sample);
        return new Float32Array(size).map((_, k) => alpha * clean[k] + sigma * (first[k] / unit));
      };
      const noisy = noised(i);
      draw(tiles.forward.canvas, model, noisy, reach(model, alpha, sigma));

      const [a, s] = [trace.alpha[f], trace.sigma[f]];
      const x = at("x", f);
      draw(tiles.x.canvas, model, x, reach(model, a, s));
      draw(tiles.x0.canvas, model, at("x0", f), reach(model, 1, 0));
      draw(tiles.eps.canvas, model, at("eps", f), 2.5);
      const difference = new Float32Array(size);
      const next = at("x", Math.min(f + 1, trace.t.length - 1));
      let most = 1e-6;
      for (let k = 0; k < size; k++) most = Math.max(most, Math.abs((difference[k] = next[k] - x[k])));
      draw(tiles.change.canvas, model, difference, most);
      [...sheet.children].forEach((button, k) => {
        button.setAttribute("aria-pressed", String(k === i));
        draw(/** @type {HTMLCanvasElement} */ (button.firstChild), model, item(/** @type {Message} */ (trace).arrays.x, size, f * count + k), reach(model, a, s));
      });
      if (offshoot) {
        const { made, forward } = offshoot;
        const g = nearest(made.t, t);
        const before = t > made.t[0] && (forward || trace.t[f] > made.t[0]);
        const [ga, gs] = before ? forward && !trace.arrays.forward ? [alpha, sigma] : [a, s] : [made.alpha[g], made.sigma[g]];
        canvases(branchSheet).forEach((canvas, k) => {
          const shown = !before ? item(made.arrays.x, size, g * count + k) : forward ? noised(k) : item(/** @type {Message} */ (trace).arrays.x, size, f * count + k);
          draw(canvas, model, shown, reach(model, ga, gs));
        });
        branchWords.textContent = forward
          ? `The real picture with noise up to t = ${short(made.t[0])}, each time other noise; from there the model goes on.`
          : `Left the way at t = ${short(made.t[0])}; here as it is at the same time. Before that both are one.`;
      } else branchWords.textContent = "Move the slider to where it should leave the way, change something, and go on from there: from the reverse side's x, or from the real picture with as much noise.";

      time.value = String(Math.round(1000 * t));
      time.setAttribute("aria-valuetext", `t ${short(t)}, frame ${f} of ${trace.t.length - 1}`);
      const snr = 2 * Math.log(alpha / sigma);
      const rows = [["t", short(t)], ["α", short(alpha)], ["σ", short(sigma)], ["log-SNR", short(snr)], ["frame", `${f} of ${trace.t.length - 1}`],
        ["network calls", String(trace.calls)], ...(trace.round_trip !== undefined ? [["there and back", `off by ${short(trace.round_trip)}`]] : [])];
      facts.replaceChildren(...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
      levels.point(t);
      changes.point(t);
      Object.assign(now, { t, frame: f, sample: i, forward: noisy, x, painted: (now.painted ?? 0) + 1, took: performance.now() - begun });
    }

    // --- moving ---
    const move = (/** @type {number} */ t) => { state.set({ t: Math.round(1000 * Math.min(1, Math.max(0, t))) / 1000 }); paint(); };
    /** @param {number} direction of t */
    function start(direction) {
      if (playing) return stop();
      let t = state.number("t", 0.5);
      if ((direction < 0 && t <= 0) || (direction > 0 && t >= 1)) t = direction < 0 ? 1 : 0;
      let last = performance.now();
      const step = (/** @type {number} */ at) => {
        t += (direction * (at - last)) / 3500;
        last = at;
        move(t);
        if (t > 0 && t < 1) playing = requestAnimationFrame(step);
        else stop();
      };
      playing = requestAnimationFrame(step);
      play.textContent = back.textContent = "Pause";
    }
    function stop() {
      cancelAnimationFrame(playing);
      playing = 0;
      [play.textContent, back.textContent] = ["◀ To data", "To noise ▶"];
    }
    /** To the next frame. @param {number} way 1 towards data */
    const step = (way) => {
      if (!trace) return;
      stop();
      const f = nearest(trace.t, state.number("t", 0.5));
      move(trace.t[Math.min(trace.t.length - 1, Math.max(0, f + way))]);
    };
    time.addEventListener("input", () => { stop(); move(Number(time.value) / 1000); });
    time.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const ways = /** @type {Record<string, number>} */ ({ ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1 });
      if (event.key in ways) { event.preventDefault(); step(ways[event.key]); }
      if (event.key === " ") { event.preventDefault(); start(-1); }
    });

    // --- laying it out ---
    /** What a branch changes; what it does not, is as on the way that it leaves. */
    function dress() {
      const anew = () => offshoot && leave();
      branching.replaceChildren(...conditionKnobs(model, "branch", anew).filter((each) => each !== null),
        ...(model.conditions.length ? [slider("bscale", state.number("scale", model.scale), { min: 0, max: 8, step: 0.25 }, anew)] : []),
        whole("bseed", state.number("seed", 0), anew));
    }
    dress();
    const redraw = () => paint();
    window.addEventListener("redress", redraw);
    const upload = el("input", { type: "file", accept: "image/*", id: "upload", class: "hidden", tabIndex: -1, "aria-label": "A real picture to begin from" });
    upload.addEventListener("change", async () => {
      const file = upload.files?.[0];
      if (!file) return;
      try {
        const { picture } = await api.json("picture", { model: model.name, data: await api.base64(file) });
        pictures = undefined;
        state.set({ picture });
        again();
      } catch (error) {
        api.complain(api.sentence(/** @type {Error} */ (error).message));
      }
    });
    const pick = el("div", { class: "row" },
      el("button", { type: "button", id: "next-picture", onclick: () => {
        if (!pictures?.arrays.x.shape[0]) return;
        state.set({ picture: (state.number("picture", 0) + 1) % pictures.arrays.x.shape[0] });
        if (inverted() || model.latent) changed();
        else if (offshoot?.forward) leave();
        paint();
      } }, "Next picture"),
      ...(pictorial(model) ? [el("button", { type: "button", onclick: () => upload.click() }, "Your own …"), upload] : []));
    root.append(
      el("aside", { class: "knobs", "aria-label": "Controls" },
        ...shared(world, ["model", "seed", "cond", "against", "scale", "steps", "solver", "grid"], changed, again),
        choice("start", "noise", [["noise", "fresh noise"], ["inverted", "the real picture's noise"]], changed),
        el("div", { class: "knob" }, el("div", { class: "knob-head" }, el("span", {}, "Real picture"), why("picture")), pick)),
      el("div", { class: "stage" },
        el("div", { class: "working" }),
        el("section", { class: "card", "aria-label": "Now" },
          el("div", { class: "tiles" }, ...Object.values(tiles).map((each) => each.figure)),
          el("div", { class: "time" }, el("div", { class: "ends" }, el("span", {}, "data, t = 0"), el("span", {}, "noise, t = 1")), time, ticks),
          el("div", { class: "row middle" }, el("button", { type: "button", id: "towards-data", "aria-label": "One frame towards data", onclick: () => step(1) }, "◂"), play, back,
            el("button", { type: "button", id: "towards-noise", "aria-label": "One frame towards noise", onclick: () => step(-1) }, "▸"), facts)),
        el("section", { class: "card" }, el("h2", {}, "All samples at this time"), el("p", { class: "quiet" }, "Choose one to look at above."), sheet),
        el("section", { class: "card" }, el("h2", {}, "Branch from here"), branchWords,
          branching,
          el("div", { class: "row" },
            el("button", { type: "button", class: "main", id: "branch", onclick: () => {
              if (!trace) return;
              state.set({ branch: Math.min(nearest(trace.t, state.number("t", 0.5)), trace.t.length - 2), noised: null });
              leave();
            } }, "Go on from this x"),
            el("button", { type: "button", id: "denoise", onclick: denoise }, "Denoise the real picture from here"),
            el("button", { type: "button", id: "unbranch", onclick: forget }, "Forget the branch")),
          branchSheet),
        el("div", { class: "two" },
          el("section", { class: "card" }, el("h2", {}, "Signal and noise"), levels.element),
          el("section", { class: "card" }, el("h2", {}, "Change per step"), changes.element))));
    load();
    return {
      snippets: () => (inverted() ? {} : snippets(world, ask())),
      note: () => (inverted() ? "What begins from a real picture's noise has no line to copy: Python for it is in the chapter on editing."
        : offshoot ? "Lines and pictures are of the way itself, without what has left it." : ""),
      picture: () => (trace ? together(canvases(sheet), Math.min(10, trace.arrays.x.shape[1])) : null),
      animation: () => ask(),
      close: () => { stop(); window.removeEventListener("redress", redraw); },
    };
  },
};
