// The frame around the labs: who may enter, which lab is open, light and dark, copy and save.

import * as api from "./api.js";
import * as state from "./state.js";
import { el } from "./view.js";
import guidance from "./guidance.js";
import plane from "./plane.js";
import runs from "./runs.js";
import solvers from "./solvers.js";
import time from "./time.js";
import walk from "./walk.js";

/** @typedef {{snippets?: () => Record<string, string>, note?: () => string, picture?: () => HTMLCanvasElement | null, animation?: () => object | null,
 *  close?: () => void}} Open */
/** @typedef {import("./controls.js").World} World */
/** @typedef {{title: string, words: string, open: (root: HTMLElement, world: World, again: () => void) => Open}} Lab */

/** @type {Record<string, Lab>} */
const LABS = { time, solvers, guidance, plane, runs, walk };

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const nav = /** @type {HTMLElement} */ (document.getElementById("labs"));
const sheet = /** @type {HTMLDialogElement} */ (document.getElementById("sheet"));
/** @type {World} */
let world;
/** @type {Open} */
let opened = {};

/** Said to those who do not see the page. @param {string} words */
function say(words) {
  /** @type {HTMLElement} */ (document.getElementById("say")).textContent = words;
}

function show() {
  opened.close?.();
  api.complain();
  const name = state.where() in LABS ? state.where() : "time";
  const lab = LABS[name];
  for (const link of nav.querySelectorAll("a")) {
    if (link.dataset.lab === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${lab.title} · undiffuse studio`;
  const root = el("div", { class: "lab" });
  main.replaceChildren(el("div", { class: "lead" }, el("h1", {}, lab.title), el("p", {}, lab.words)), root);
  opened = lab.open(root, world, show);
  const model = state.text("model");
  if (model && !world.models.some((each) => each.name === model))
    api.complain(`The address names a model that this studio was not opened with: ${model}. What you see is of ${world.models[0].name}.`);
  say(lab.title);
}

// --- copy and save ----------------------------------------------------------------------------------------------------

/** @param {Blob} blob @param {string} name */
function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`Saved ${name}`);
}

function share() {
  state.write();
  const parts = { "This page": state.address(), ...(opened.snippets?.() ?? {}) };
  const copies = Object.entries(parts).flatMap(([name, words]) => {
    const button = el("button", { type: "button", "aria-label": `Copy ${name}`, onclick: async () => {
      await navigator.clipboard.writeText(words);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } }, "Copy");
    return [el("h2", {}, name, button), el("pre", {}, words)];
  });
  const note = opened.note?.();
  const picture = opened.picture?.();
  const animation = opened.animation?.();
  const still = (/** @type {string} */ kind) => el("button", { type: "button", onclick: () =>
    picture?.toBlob((blob) => blob && save(blob, `studio.${kind}`), `image/${kind}`, 1) }, `Save ${kind === "png" ? "PNG" : "WebP"}`);
  const moving = (/** @type {string} */ kind) => el("button", { type: "button", onclick: async () => {
    try {
      save(await (await api.request("animation", { ask: animation, format: kind })).blob(), `denoising.${kind}`);
    } catch (error) {
      api.complain(api.sentence(/** @type {Error} */ (error).message));
    }
  } }, `Save animated ${kind === "gif" ? "GIF" : "WebP"}`);
  sheet.replaceChildren(
    el("div", { class: "row middle" }, el("h1", {}, "Copy or save"), el("button", { type: "button", onclick: () => sheet.close() }, "Close")),
    ...(note ? [el("p", { class: "quiet" }, note)] : []),
    ...copies,
    ...(picture || animation ? [el("h2", {}, "Pictures")] : []),
    el("div", { class: "row" }, ...(picture ? [still("png"), still("webp")] : []), ...(animation ? [moving("gif"), moving("webp")] : [])),
  );
  sheet.showModal();
}

// --- light and dark ---------------------------------------------------------------------------------------------------

function dress() {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
}

function redress() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("theme", dark ? "light" : "dark");
  dress();
  window.dispatchEvent(new Event("redress"));
}

// --- beginning --------------------------------------------------------------------------------------------------------

/** The token of the printed link becomes a cookie that no script can read, and leaves the address. */
async function enter() {
  const token = /^#token=([\w-]+)$/.exec(location.hash)?.[1];
  if (!token) return;
  await api.request("enter", { token });
  state.go("time");
  history.replaceState(null, "", `${location.pathname}#time`);
}

async function begin() {
  dress();
  try {
    await enter();
    world = await api.json("state");
  } catch (error) {
    main.replaceChildren(el("p", { class: "quiet" }, api.sentence(/** @type {Error} */ (error).message)));
    return;
  }
  nav.replaceChildren(...Object.entries(LABS).map(([name, lab]) =>
    el("a", { href: `#${name}`, "data-lab": name, onclick: (/** @type {MouseEvent} */ event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      state.go(name);
    } }, lab.title)));
  /** @type {HTMLElement} */ (document.getElementById("share")).onclick = share;
  /** @type {HTMLElement} */ (document.getElementById("theme")).onclick = redress;
  state.onOpen(show);
  show();
}

begin();
