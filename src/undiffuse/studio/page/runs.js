// Lab 5: your runs. Curves, previews and the doctor's lights, of several side by side, while they train.

import * as api from "./api.js";
import { quoted } from "./controls.js";
import { el, Chart, short } from "./view.js";
import * as state from "./state.js";

const EVERY = 3000;

/** What is on the screen, for whoever looks from outside (tests). @type {Record<string, any>} */
export const now = {};

export default {
  title: "Runs",
  words: "The runs that the studio was opened with, and those in ./runs. What is still training moves by itself.",
  /** @param {HTMLElement} root @param {any} _world @param {() => void} _again */
  open(root, _world, _again) {
    const list = el("div", { class: "runs", role: "group", "aria-label": "Runs" });
    const loss = new Chart("Loss", "images seen", "training loss", { log: true });
    const heldOut = new Chart("Held-out loss", "images seen", "loss on data that is not trained on");
    const rate = new Chart("Speed", "images seen", "images a second");
    const cards = el("div", { class: "stage" });
    const stage = el("div", { class: "stage" }, el("div", { class: "working" }),
      el("div", { class: "three" },
        el("section", { class: "card" }, el("h2", {}, "Training loss"), loss.element),
        el("section", { class: "card" }, el("h2", {}, "Held-out loss"), heldOut.element, el("p", { class: "none" }, "None was measured.")),
        el("section", { class: "card" }, el("h2", {}, "Images a second"), rate.element)), cards);
    root.append(el("aside", { class: "knobs", "aria-label": "Runs" }, list), stage);
    /** @type {Map<string, any>} */ const shown = new Map();
    let closed = false;
    let timer = 0;

    /** @param {any[]} known */
    const chosen = (known) => {
      const names = state.text("runs") ? state.text("runs").split("|") : known.slice(0, 1).map((run) => run.name);
      return names.filter((name) => known.some((run) => run.name === name));
    };

    async function turn() {
      const { runs: known } = await api.json("runs");
      if (closed) return;
      if (!known.length) {
        list.replaceChildren(el("p", { class: "quiet" }, "No runs yet."));
        cards.replaceChildren(el("section", { class: "card" }, el("h2", {}, "No runs here"),
          el("p", { class: "quiet" }, "Train something, and it shows here while it trains:"), el("pre", {}, "undiffuse train digits")));
        return;
      }
      const names = chosen(known);
      if (list.dataset.known !== known.map((/** @type {any} */ run) => run.name).join("|")) {
        list.dataset.known = known.map((/** @type {any} */ run) => run.name).join("|");
        list.replaceChildren(...known.map((/** @type {any} */ run) => {
          const box = el("input", { type: "checkbox", checked: names.includes(run.name), value: run.name });
          box.addEventListener("change", () => {
            const ticked = [...list.querySelectorAll("input:checked")].map((each) => /** @type {any} */ (each).value);
            state.set({ runs: ticked.join("|") || "|" }); // none, rather than the first
            refresh();
          });
          return el("label", {}, box, el("span", {}, run.name, " ", el("span", { class: "quiet" }, run.state)));
        }));
      }
      const all = await Promise.all(names.map((name) => api.json(`runs/${encodeURIComponent(name)}`)));
      if (closed) return;
      const lines = (/** @type {string} */ key) => all.map((each, i) => ({ name: names[i], x: each[key][0], y: each[key][1], tone: (i % 6) + 1 }));
      loss.draw(lines("loss"));
      heldOut.draw(lines("held_out"));
      rate.draw(lines("rate"));
      for (const name of shown.keys()) if (!names.includes(name)) shown.delete(name);
      all.forEach((each, i) => shown.set(names[i], card(names[i], each, shown.get(names[i]))));
      const absent = state.text("runs").split("|").filter((name) => name && !names.includes(name));
      const missing = [...absent.map((name) => `There is no run ${name} here.`), ...(names.length ? [] : ["Choose a run."])].join(" ");
      cards.replaceChildren(...(missing ? [el("section", { class: "card" }, el("p", { class: "quiet" }, missing))] : []), ...names.map((name) => shown.get(name).element));
      Object.assign(now, { names, all, painted: (now.painted ?? 0) + 1 });
    }

    /** One run: facts, its latest pictures, the doctor's lights. @param {string} name @param {any} about @param {any} before */
    function card(name, about, before) {
      const { run } = about;
      const facts = [["state", run.state], ["update", run.step?.toLocaleString("en") ?? "–"],
        ["images", run.images === null ? "–" : `${short(run.images)}${run.total_images ? ` of ${short(run.total_images)}` : ""}`],
        ["loss", run.loss === null ? "–" : short(run.loss)]];
      const parts = before ?? build(name);
      parts.facts.replaceChildren(...facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))));
      parts.note.textContent = run.note ?? "";
      if (about.previews !== parts.previews) {
        parts.slider.max = String(Math.max(0, about.previews - 1));
        if (Number(parts.slider.value) >= parts.previews - 1) parts.slider.value = parts.slider.max;
        parts.previews = about.previews;
        parts.turn();
      }
      if (`${run.step} ${run.state}` !== parts.examined) {
        parts.examined = `${run.step} ${run.state}`;
        parts.examine();
      }
      return parts;
    }

    /** @param {string} name */
    function build(name) {
      const path = `runs/${encodeURIComponent(name)}`;
      const image = el("img", { class: "preview", alt: `What ${name} makes` });
      const slider = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": `Preview of ${name}` });
      const nothing = el("p", { class: "quiet" }, "No pictures yet.");
      const lights = el("ul", { class: "lights", "aria-label": "The doctor's lights" });
      const parts = {
        facts: el("dl", { class: "facts" }), note: el("p", { class: "quiet" }), slider, previews: -1, examined: "", element: /** @type {any} */ (null),
        turn: () => {
          image.hidden = slider.hidden = parts.previews < 1;
          nothing.hidden = !image.hidden;
          slider.setAttribute("aria-valuetext", `preview ${Number(slider.value) + 1} of ${parts.previews}`);
          if (parts.previews > 0) image.src = `/studio/${path}/preview/${slider.value}?of=${parts.previews}`;
        },
        examine: async () => {
          try {
            const found = (await api.json(`${path}/doctor`)).lights;
            lights.replaceChildren(...found.map((/** @type {any} */ f) => el("li", { class: f.light }, el("b", { "aria-hidden": "true" }), el("span", {}, f.check),
              el("span", {}, f.measured, f.remedy ? el("span", { class: "quiet" }, ` → ${f.remedy}`) : null, el("span", { class: "hidden" }, ` (${f.light})`)))));
            now.lights = { ...now.lights, [name]: found };
          } catch (error) {
            lights.replaceChildren(el("li", { class: "quiet" }, /** @type {Error} */ (error).message));
          }
        },
      };
      slider.addEventListener("input", parts.turn);
      parts.element = el("section", { class: "card", "data-run": name }, el("h2", {}, name), parts.facts, parts.note, el("p"), el("div", { class: "two" }, el("div", {}, image, slider, nothing), lights));
      return parts;
    }

    async function refresh() {
      clearTimeout(timer);
      try {
        await turn();
      } catch (error) {
        api.complain(api.sentence(/** @type {Error} */ (error).message));
      }
      if (!closed) timer = setTimeout(refresh, EVERY);
    }
    refresh();
    return {
      snippets: () => ({ "Command line": (now.all ?? []).map((/** @type {any} */ { run }) =>
        `undiffuse show ${quoted(run.path)}\nundiffuse doctor ${quoted(run.path)}`).join("\n") }),
      close: () => { closed = true; clearTimeout(timer); },
    };
  },
};
