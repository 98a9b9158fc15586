/**
 * Where the model runs, so that the page never waits for it.
 *
 * The page sends {type: "load"}, {type: "ask", number, turns, isThinking, options}, {type: "stop"} and, where it begins
 * anew, {type: "forget"}. It is told "progress" and "ready"; then, with the number of what was asked, "reading" for the
 * frames of videos, "seen" for each file, "wrote" for each piece of the answer, and "done" or "failed" at the end.
 */

import { Tokenizer } from "../vendor/tokenizers.min.mjs";
import { fetchAll, gunzip } from "./files.js";
import { kindOf } from "./kinds.js";
import { MediaError, openVideo, readImage, thumbnail } from "./media.js";
import { Model } from "./model.js";
import { sliceImage, unitsOfPack } from "./pixels.js";
import { Prompts, splitThought } from "./prompt.js";

const GRAPHS = ["vision_encoder", "embed_tokens", "decoder_model"];
const MOST_PACKED = 6; // frames that the resampler was trained on
const BETWEEN_UPDATES = 40; // milliseconds

let settings, prompts, model;
let wanted = null; // number of the question that is to be answered; null: none
let working = Promise.resolve(); // one thing at a time
const known = new Map(); // what was made of a file under some options
const told = new Map(); // under which options the page has seen a file

class Stopped extends Error {
  message = "Stopped before the first word. The question is back in its box.";
}

const { port1, port2 } = new MessageChannel();
port1.start();

/** Let messages of the page come in. */
async function pause(number) {
  await new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
  if (wanted !== number) throw new Stopped();
}

/** WebGPU first where there is an adapter: that `navigator.gpu` exists says nothing. */
async function findDevices() {
  const isGPU = new URL(location).searchParams.get("device") !== "wasm" && (await navigator.gpu?.requestAdapter());
  return isGPU ? ["webgpu", "wasm"] : ["wasm"];
}

async function load() {
  const about = await (await fetch("../page.json")).json();
  settings = about.settings;
  for (const device of await findDevices()) {
    try {
      await loadOn(device, about);
      postMessage({ type: "ready", device });
      return;
    } catch (error) {
      if (device === "wasm") throw error;
      console.warn(`WebGPU does not run this model, so the CPU does: ${error.message}`);
    }
  }
}

async function loadOn(device, about) {
  const { script, binary } = about.runtimes[device];
  const paths = [binary, "model/tokenizer.json", "model/tokenizer_config.json", ...GRAPHS.map((name) => `model/${name}.onnx`)];
  const report = (loaded, total) => postMessage({ type: "progress", loaded, total });
  const [wasm, tokenizer, config, ...graphs] = await fetchAll(about, paths, report);
  const asJSON = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  prompts = new Prompts(Tokenizer, asJSON(tokenizer), asJSON(config), settings);
  const ort = await import(`../${script}`);
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send, and gain nothing at this size
  ort.env.wasm.wasmBinary = await gunzip(wasm);
  ort.env.wasm.wasmPaths = new URL("../vendor/", import.meta.url).href;
  model = await Model.load(ort, Object.fromEntries(GRAPHS.map((name, i) => [name, graphs[i]])), settings, device);
  if (device === "webgpu") await model.tryOut();
}

/** What the model makes of a file: {kind, size, layout, packs, features, ...}. */
async function look({ key, file }, options, number) {
  const place = `${key} ${JSON.stringify(options)}`;
  if (!known.has(place)) {
    const lookAt = kindOf(file) === "video" ? lookAtVideo : lookAtImage;
    const seen = await lookAt(file, options, number);
    seen.tokens = prompts.slotsOf(seen);
    known.set(place, seen);
  }
  const { features, ...seen } = known.get(place);
  if (told.get(key) !== place) postMessage({ type: "seen", number, key, seen });
  told.set(key, place);
  return { ...seen, features };
}

async function lookAtImage(file, { slices }, number) {
  const sliced = sliceImage(await readImage(file), { ...settings.image, max_slice_nums: slices });
  const features = await model.features(unitsOfPack([sliced], [-1]), () => pause(number));
  return { kind: "image", size: sliced.size, layout: sliced.layout, packs: null, features };
}

async function lookAtVideo(file, { fps, packing }, number) {
  const forced = packing ? { max_num_packing: MOST_PACKED, force_packing: packing } : {};
  const { plan, total, seconds, frames } = await openVideo(file, { ...settings.video, ...forced, fps });
  const features = [];
  const shown = [];
  let size, layout;
  let members = [];
  for await (const pixels of frames) {
    const sliced = sliceImage(pixels, { ...settings.image, max_slice_nums: settings.video.max_slice_nums });
    size ??= sliced.size;
    layout ??= sliced.layout;
    shown.push(await thumbnail(pixels));
    members.push(sliced);
    const times = plan.packs[Math.floor((shown.length - 1) / plan.packing)];
    if (members.length === times.length) {
      features.push(...(await model.features(unitsOfPack(members, times), () => pause(number))));
      members = [];
      postMessage({ type: "reading", number, name: file.name, done: shown.length, of: plan.indices.length });
    }
  }
  return { kind: "video", size, layout, ...plan, total, seconds, shown, features };
}

/** The last turns of a conversation for which there is room, and their prompt. */
function fit(turns, isThinking, room) {
  for (let first = 0; first < turns.length; first++) {
    const ids = prompts.build(turns.slice(first), isThinking);
    if (ids.length <= room) return { first, ids };
  }
  const tokens = prompts.build(turns.slice(-1), isThinking).length;
  throw new MediaError(
    `The question takes ${tokens} tokens, and there is room for ${room}. Add fewer or smaller files, or pack more frames.`,
  );
}

async function ask({ number, turns, isThinking, options }) {
  const begin = performance.now();
  const looked = [];
  for (const turn of turns) {
    const media = [];
    for (const each of turn.files) media.push(await look(each, options, number));
    looked.push({ ...turn, media });
  }
  const most = Math.min(options.longest, settings.context - 1);
  const { first, ids } = fit(looked, isThinking, settings.context - most);
  const media = looked.slice(first).flatMap((turn) => turn.media);
  const features = media.flatMap((each) => each.features);
  const written = [];
  let [ending, firstToken, lastTold] = ["stop", null, 0];
  const tell = (isWhole) => {
    const text = prompts.decode(written, isWhole);
    const [thought, answer] = isThinking ? splitThought(text) : [null, text];
    postMessage({ type: "wrote", number, thought, text: answer });
    lastTold = performance.now();
  };
  try {
    await pause(number);
    for await (const id of model.generate(ids, prompts.slot, features)) {
      firstToken ??= performance.now() - begin;
      written.push(id);
      if (written.length === most) {
        ending = "length";
        break;
      }
      if (performance.now() - lastTold >= BETWEEN_UPDATES) tell(false);
      await pause(number);
    }
  } catch (error) {
    if (!(error instanceof Stopped) || !written.length) throw error;
    ending = "cancelled";
  }
  tell(true);
  const closed = written.indexOf(prompts.ids.get("</think>")) + 1;
  const output = {
    ending,
    dropped: first,
    prompt: ids.length,
    images: media.reduce((sum, each) => sum + each.tokens, 0),
    written: written.length + (ending === "stop"), // with the closing token
    thought: isThinking ? closed || written.length : 0,
    first: (firstToken ?? performance.now() - begin) / 1000,
    total: (performance.now() - begin) / 1000,
  };
  postMessage({ type: "done", number, output });
}

/** Do something, and tell what went wrong. */
async function attempt(task, number) {
  try {
    await task();
  } catch (error) {
    const isExpected = error instanceof Stopped || error instanceof MediaError;
    const message = isExpected ? error.message : `Something broke: ${error.message}. Reload the page to go on.`;
    postMessage({ type: "failed", number, message });
    if (!isExpected) throw error;
  }
}

const tasks = {
  load: () => attempt(load),
  stop: () => (wanted = null),
  forget: () => [known, told].forEach((kept) => kept.clear()),
  ask(asked) {
    wanted = asked.number;
    working = working.then(() => attempt(() => ask(asked), asked.number)).catch((error) => console.error(error));
  },
};

addEventListener("message", ({ data }) => tasks[data.type](data));
