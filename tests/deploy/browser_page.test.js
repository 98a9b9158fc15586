/**
 * What the page makes of images, videos and conversations, held against cases that test_browser_page.py writes with the
 * processor: cases.json in the folder CASES, and beside it pixels as bytes. Run by that test.
 */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import test from "node:test";

const page = new URL("../../minicpmv/deploy/browser/", import.meta.url);
const load = (path) => import(new URL(path, page));
const { Tokenizer } = await load("node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs");
const { rotate, toRGB } = await load("src/frames.js");
const { kindOf } = await load("src/kinds.js");
const { sliceImage, unitsOfPack } = await load("src/pixels.js");
const { Prompts, splitThought } = await load("src/prompt.js");
const { resize } = await load("src/resize.js");
const { sliceLayout } = await load("src/slicing.js");
const { planFrames, sampleFrames, temporalIds } = await load("src/video.js");

const read = (name) => readFileSync(`${process.env.CASES}/${name}`);
const cases = JSON.parse(read("cases.json"));
const digest = (...arrays) => {
  const hash = createHash("sha256");
  for (const { buffer, byteOffset, byteLength } of arrays) hash.update(new Uint8Array(buffer, byteOffset, byteLength));
  return hash.digest("hex");
};
const picture = ({ file, size: [width, height] }) => ({ width, height, data: new Uint8ClampedArray(read(file)) });

test("layouts are those of Python", () => {
  for (const { size, settings, layout } of cases.layouts) assert.deepEqual(sliceLayout(size, settings), layout, `${size}`);
});

test("slices are those of Python, bit for bit", () => {
  for (const { image, settings, shapes, pixels } of cases.slices) {
    const { pieces } = sliceImage(picture(image), settings);
    assert.deepEqual(pieces.map(({ width, height }) => [width, height]), shapes);
    assert.equal(digest(...pieces.map(({ values }) => values)), pixels, image.file);
  }
});

test("an image that keeps its size is not touched", () => {
  const image = { width: 2, height: 1, data: Uint8ClampedArray.of(1, 2, 3, 255, 4, 5, 6, 255) };
  assert.equal(resize(image, [2, 1]), image);
});

test("packs hold what Python packs", () => {
  for (const { frames, settings, packs, shapes, pixels } of cases.packs) {
    const sliced = frames.map((frame) => sliceImage(picture(frame), settings));
    let next = 0;
    const units = packs.flatMap((times) => unitsOfPack(sliced.slice(next, (next += times.length)), times));
    assert.deepEqual(units.map(({ pieces, times }) => [times, pieces.map(({ width, height }) => [width, height])]), shapes);
    assert.equal(digest(...units.flatMap(({ pieces }) => pieces.map(({ values }) => values))), pixels);
  }
});

test("frames are chosen as in Python", () => {
  for (const { total, fps, options, plan } of cases.plans) assert.deepEqual(planFrames(total, fps, options), plan, `${total} ${fps}`);
});

test("times become the ids that Python gives", () => {
  for (const { seconds, step, duration, ids } of cases.times) assert.deepEqual(temporalIds(seconds, step, duration ?? undefined), ids);
});

test("videos are sampled as in Python, whether their rate varies or not", () => {
  for (const { times, fps, options, sample } of cases.samples) assert.deepEqual(sampleFrames(times, fps, options), sample);
});

test("frames have the colors that Python sees", () => {
  for (const { file, size, planes, space, rgb } of cases.colors) {
    const { data } = toRGB({ data: new Uint8Array(read(file)), ...planes }, size, space);
    const opaque = data.every((value, i) => i % 4 !== 3 || value === 255);
    assert.ok(opaque);
    assert.equal(digest(data.filter((_, i) => i % 4 !== 3)), rgb, JSON.stringify({ size, space }));
  }
});

test("frames are turned clockwise", () => {
  const levels = (...reds) => Uint8ClampedArray.from(reds.flatMap((red) => [red, 0, 0, 255]));
  const turned = (degrees) => rotate({ width: 3, height: 2, data: levels(1, 2, 3, 4, 5, 6) }, degrees);
  assert.deepEqual(turned(90), { width: 2, height: 3, data: levels(4, 1, 5, 2, 6, 3) });
  assert.deepEqual(turned(180), { width: 3, height: 2, data: levels(6, 5, 4, 3, 2, 1) });
  assert.deepEqual(turned(270), { width: 2, height: 3, data: levels(3, 6, 2, 5, 1, 4) });
});

for (const { name, tokenizer, config, settings, prompts, decoded } of cases.tokenizers) {
  const known = new Prompts(Tokenizer, JSON.parse(read(tokenizer)), JSON.parse(read(config)), settings);
  test(`prompts have the ids of Python, whatever users type (${name})`, () => {
    for (const { turns, isThinking, ids } of prompts) {
      const looked = turns.map(({ media, ...turn }) => ({
        ...turn,
        media: media.map(({ size, packs, slices }) => ({ layout: sliceLayout(size, { ...settings.image, max_slice_nums: slices }), packs })),
      }));
      assert.deepEqual(known.build(looked, isThinking), ids, JSON.stringify(turns));
      const slots = looked.flatMap(({ media }) => media).reduce((sum, each) => sum + known.slotsOf(each), 0);
      assert.equal(ids.filter((id) => id === known.slot).length, slots);
    }
  });
  test(`ids become the text of Python (${name})`, () => {
    for (const { ids, text } of decoded) assert.equal(known.decode(ids), text);
  });
  test(`half a character is held back (${name})`, () => {
    const ids = known.plain.encode("é🙂", { add_special_tokens: false }).ids;
    const shown = ids.map((_, i) => known.decode(ids.slice(0, i + 1), false));
    for (const text of shown) assert.ok("é🙂".startsWith(text), text);
    assert.equal(shown.at(-1), "é🙂");
  });
}

test("a thought ends where it is closed", () => {
  assert.deepEqual(splitThought("7+5=12\n</think>\n\n12"), ["7+5=12", "12"]);
  assert.deepEqual(splitThought("7+5"), ["7+5", ""]);
  assert.deepEqual(splitThought("</think>\n\n12"), ["", "12"]);
});

test("kinds of files are told by type, or by name where there is none", () => {
  for (const [file, kind] of [
    [{ type: "image/png", name: "a" }, "image"],
    [{ type: "image/gif", name: "a.gif" }, "video"],
    [{ type: "video/mp4", name: "a.mp4" }, "video"],
    [{ type: "", name: "A.MKV" }, "video"],
    [{ type: "application/pdf", name: "a.pdf" }, null],
  ]) assert.equal(kindOf(file), kind);
});
