// What the page asks of its server. Arrays come as one binary message: see `pack` in studio/app.py.

/** @typedef {{type: string, shape: number[], at: number}} Described */
/** @typedef {{data: Float32Array | Uint8Array, shape: number[]}} Array */
/** @typedef {Record<string, any> & {arrays: Record<string, Array>}} Message */

/** An answer that is an error. */
export class Refused extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const trouble = /** @type {HTMLElement} */ (document.getElementById("trouble"));

/** Say what is wrong above the lab; empty: nothing is. @param {string} [words] */
export function complain(words = "") {
  trouble.textContent = words;
  trouble.hidden = !words;
}

/** @param {number} ms @param {AbortSignal} [signal] */
const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(new DOMException("", "AbortError"))));
  });

/** One request; waits and asks again while the server is busy, loading or gone, and says so.
 *  @param {string} path @param {object} [body] @param {AbortSignal} [signal] @returns {Promise<Response>} */
export async function request(path, body, signal) {
  const options = body === undefined ? { signal } : {
    method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
  };
  for (let tries = 0; ; tries++) {
    let response;
    try {
      response = await fetch(`/studio/${path}`, options);
    } catch (error) {
      if (signal?.aborted) throw error;
      complain("The studio does not answer. Has it been closed? This page goes on as soon as it is back.");
      await pause(Math.min(5000, 500 * 2 ** tries), signal);
      continue;
    }
    if (response.ok) {
      if (tries > 0) complain();
      return response;
    }
    const said = (await response.json().catch(() => ({}))).error ?? {};
    const loading = response.status === 503 && said.message?.includes("loading");
    if (response.status === 429 || loading) {
      if (tries > 0) complain(loading ? "The model is loading …" : "The studio is busy; this waits for its turn …");
      await pause(1000 * Number(response.headers.get("Retry-After") ?? 0.2), signal);
      continue;
    }
    throw new Refused(response.status, said.message ?? `the server answered ${response.status}`);
  }
}

/** @param {ArrayBuffer} buffer @returns {Message} */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  /** @type {Record<string, Array>} */
  const arrays = {};
  for (const [name, { type, shape, at }] of Object.entries(/** @type {Record<string, Described>} */ (head.arrays))) {
    const count = shape.reduce((a, b) => a * b, 1);
    const Kind = type === "uint8" ? Uint8Array : Float32Array;
    arrays[name] = { data: new Kind(buffer, 4 + length + at, count), shape };
  }
  return { ...head, arrays };
}

/** @param {string} path @param {object} body @param {AbortSignal} [signal] */
export const arrays = async (path, body, signal) => unpack(await (await request(path, body, signal)).arrayBuffer());

/** @param {string} path @param {object} [body] @param {AbortSignal} [signal] @returns {Promise<any>} */
export const json = async (path, body, signal) => (await request(path, body, signal)).json();

/** The bytes of a file as text. @param {Blob} file */
export async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let words = "";
  for (let k = 0; k < bytes.length; k += 32768) words += String.fromCharCode(...bytes.subarray(k, k + 32768));
  return btoa(words);
}

/** Run only the latest of many: a new call ends the one before, on the server too.
 *  @template T @param {(signal: AbortSignal, ...given: any[]) => Promise<T>} work @param {HTMLElement} stage
 *  @returns {(...given: any[]) => Promise<T | undefined>} */
export function latest(work, stage) {
  /** @type {AbortController | undefined} */
  let running;
  let complained = false; // only who has complained takes it back
  return async (...given) => {
    running?.abort();
    const mine = (running = new AbortController());
    stage.setAttribute("aria-busy", "true");
    try {
      await pause(60, mine.signal); // a slider that moves asks once
      const result = await work(mine.signal, ...given);
      if (complained) complain();
      complained = false;
      return result;
    } catch (error) {
      if (!mine.signal.aborted) {
        complain(error instanceof Error ? sentence(error.message) : String(error));
        complained = true;
      }
      return undefined;
    } finally {
      if (running === mine) stage.setAttribute("aria-busy", "false");
    }
  };
}

/** @param {string} words */
export const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?…]$/.test(words) ? "" : ".");
