// The state of the page is its address: `#time?seed=3&t=0.4`. Browsers do not send what follows the #.

/** @typedef {string | number | null | undefined} Value */

/** @type {Set<() => void>} */
const listeners = new Set();
let lab = "";
let params = new URLSearchParams();
let timer = 0;

function parse() {
  const [name, query = ""] = location.hash.replace(/^#/, "").split("?", 2);
  lab = name;
  params = new URLSearchParams(query);
}

/** The address of this state. */
export function address() {
  const query = params.toString();
  return `${location.origin}${location.pathname}#${lab}${query ? `?${query}` : ""}`;
}

/** The name of the lab that is open. */
export const where = () => lab;

/** @param {string} key @param {string} [fallback] */
export const text = (key, fallback = "") => params.get(key) ?? fallback;

/** @param {string} key @param {number} fallback @returns {number} */
export function number(key, fallback) {
  const given = params.get(key);
  const value = given === null || given === "" ? NaN : Number(given);
  return Number.isFinite(value) ? value : fallback;
}

/** Change some of the state; the address follows a moment later, so that dragging stays smooth.
 *  @param {Record<string, Value>} changes null removes */
export function set(changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") params.delete(key);
    else params.set(key, String(value));
  }
  clearTimeout(timer);
  timer = setTimeout(write, 150);
}

/** Write the address now. */
export function write() {
  clearTimeout(timer);
  if (address() !== location.href) history.replaceState(null, "", address());
}

/** Open another lab, with the same knobs. @param {string} name */
export function go(name) {
  write();
  lab = name;
  history.pushState(null, "", address());
  for (const listener of listeners) listener();
}

/** Called when another state is opened. @param {() => void} listener */
export const onOpen = (listener) => listeners.add(listener);

window.addEventListener("popstate", () => {
  clearTimeout(timer);
  parse();
  for (const listener of listeners) listener();
});
parse();
