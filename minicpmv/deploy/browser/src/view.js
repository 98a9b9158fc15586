/** What the model sees: the slices of images, the packed frames of videos, the tokens of a turn. */

import { element } from "./dom.js";
import { unitsOf } from "./slicing.js";

const ENDINGS = { length: "The answer reached its limit of tokens.", cancelled: "The answer was stopped." };

const sizeOf = ([width, height]) => `${width} × ${height}`;
const bold = (text) => element("b", {}, text);

/**
 * @param place the element that shows it
 * @param seen [{file, seen}] of all files of the conversation, in order; `seen` as the worker tells it
 * @param output of the last answer, or null
 */
export function show(place, seen, output) {
  const sections = [...seen].reverse().map(({ file, seen }) => (seen.kind === "image" ? imageSection : videoSection)(file, seen));
  if (output) sections.unshift(spentSection(output));
  if (!sections.length) {
    const hint = "Here you will see how your images are sliced, which frames of a video are packed together, and what it all costs.";
    sections.push(element("p", { class: "nothing" }, hint));
  }
  place.replaceChildren(...sections);
}

function spentSection({ prompt, images, written, thought, first, total, ending, dropped }) {
  const shares = [
    ["images", images, "images"],
    ["text", prompt - images, "words"],
    ["thought", thought, "thoughts"],
    ["answer", written - thought, "answers"],
  ].filter(([, number]) => number);
  return element(
    "section",
    { class: "spent" },
    element("div", { class: "bar" }, shares.map(([, number, name]) => element("span", { class: name, style: { flexGrow: number } }))),
    element("ul", { class: "legend" }, shares.map(([label, number, name]) => element("li", { class: name }, bold(number), ` ${label}`))),
    element(
      "p",
      {},
      `${prompt} tokens read, ${written} written; first after ${first.toFixed(1)} s, last after ${total.toFixed(1)} s. `,
      ENDINGS[ending],
      dropped ? ` The oldest ${dropped} turns no longer fitted and were left out.` : "",
    ),
  );
}

function heading(name, size, more = "") {
  return element("h3", {}, name, " ", element("small", {}, sizeOf(size) + more));
}

function imageSection({ file, url }, { size, layout, tokens }) {
  const [columns, rows] = layout.grid ?? [1, 1];
  const cells = Array.from({ length: columns * rows }, (_, i) => element("span", { class: "cell" }, layout.grid ? `${i + 1}` : ""));
  const units = unitsOf(layout);
  const grid = { gridTemplateColumns: `repeat(${columns}, 1fr)`, gridTemplateRows: `repeat(${rows}, 1fr)` };
  const words = layout.grid
    ? `An overview of ${sizeOf(layout.source)} and ${columns} × ${rows} slices of ${sizeOf(layout.slice)}: ${units} × ${tokens / units} = `
    : `Seen whole, at ${sizeOf(layout.source)}: `;
  return element(
    "section",
    { class: "seen image" },
    heading(file.name, size),
    element(
      "div",
      { class: "sliced", style: { aspectRatio: `${size[0]} / ${size[1]}` } },
      element("img", { src: url, alt: file.name }),
      element("div", { class: "cells", style: grid }, cells),
    ),
    element("p", {}, words, bold(`${tokens} tokens`)),
  );
}

function videoSection({ file }, { size, packs, packing, timestamps, shown, total, seconds, tokens }) {
  const figures = shown.map((bitmap, i) => {
    const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    return element("figure", { class: "frame" }, canvas, element("figcaption", {}, `${timestamps[i].toFixed(2)} s`));
  });
  const groups = packs.map((_, i) => element("div", { class: "group" }, figures.slice(i * packing, (i + 1) * packing)));
  const together = packing > 1 ? `up to ${packing} in a group` : "each by itself";
  return element(
    "section",
    { class: "seen video" },
    heading(file.name, size, ` · ${seconds.toFixed(1)} s`),
    element("div", { class: "groups" }, groups),
    element(
      "p",
      {},
      `${shown.length} of ${total} frames, ${together}: ${packs.length} × ${tokens / packs.length} = `,
      bold(`${tokens} tokens`),
    ),
  );
}
