/** Images and frames of videos out of files, as RGBA bytes: what needs a browser. */

import { ALL_FORMATS, BlobSource, EncodedPacketSink, Input, VideoSampleSink } from "../vendor/mediabunny.min.mjs";
import { rotate, toRGB } from "./frames.js";
import { sampleFrames } from "./video.js";

const MOST_PIXELS = 89_478_485; // of an image, as in Pillow
const USUAL_RATE = 25; // frames a second of a file that does not say, as FFmpeg takes it
const THUMBNAIL = 160; // largest side of a frame as it is shown

/** A file that cannot be used: the message says why and what to do. */
export class MediaError extends Error {}

const told = (name, why, remedy) => new MediaError(`${name} ${why}. ${remedy}, and add that.`);

/** Draw over white and read back; the canvas stays in memory, since a GPU would round. */
function readPixels(source, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** An image, upright. */
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw told(file.name, "cannot be read as an image", "Save it again as JPEG or PNG");
  }
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    throw told(file.name, `has ${bitmap.width} x ${bitmap.height} pixels, more than ${MOST_PIXELS}`, "Save it smaller");
  }
  const pixels = readPixels(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return pixels;
}

/** A small picture of a frame, for the page. */
export function thumbnail(pixels) {
  const shrink = Math.min(1, THUMBNAIL / Math.max(pixels.width, pixels.height));
  const [width, height] = [pixels.width, pixels.height].map((side) => Math.max(1, Math.round(side * shrink)));
  const image = new ImageData(pixels.data, pixels.width, pixels.height);
  return createImageBitmap(image, { resizeWidth: width, resizeHeight: height, resizeQuality: "medium" });
}

/**
 * The chosen frames of a video.
 *
 * @returns {plan, total, seconds, frames}: of `sampleFrames`; how many frames the file has; how long it lasts; and an
 *   async generator of the chosen ones
 */
export async function openVideo(file, options) {
  return file.type === "image/gif" ? openAnimation(file, options) : openFile(file, options);
}

async function openFile(file, options) {
  if (typeof VideoDecoder === "undefined") {
    throw told(file.name, "cannot be decoded here: browsers decode videos on https and localhost only", "Open the page there");
  }
  let track, packets;
  try {
    const input = new Input({ source: new BlobSource(file), formats: ALL_FORMATS });
    track = await input.getPrimaryVideoTrack();
    packets = track && (await Array.fromAsync(new EncodedPacketSink(track).packets(undefined, undefined, { metadataOnly: true })));
  } catch {
    track = null;
  }
  if (!packets?.length) throw told(file.name, "cannot be read as a video", "Save it again as MP4");
  if (!(await track.canDecode())) {
    throw told(file.name, `is coded as ${await track.getCodec()}, which this browser does not decode`, "Save it as H.264");
  }
  packets = packets.filter(({ timestamp }) => timestamp >= 0).sort((a, b) => a.timestamp - b.timestamp);
  const times = packets.map(({ timestamp }) => timestamp);
  const plan = sampleFrames(times, await rateOf(track, times, packets), options);
  const space = await track.getColorSpace();
  const sink = new VideoSampleSink(track, { hardwareAcceleration: "prefer-software" });
  async function* frames() {
    try {
      for await (const sample of chosen(sink, times, plan.indices)) {
        const pixels = await pixelsOf(sample, space);
        sample.close();
        yield pixels;
      }
    } catch {
      throw told(file.name, "is damaged", "Save it again as MP4");
    }
  }
  return { plan, total: times.length, seconds: times.length / plan.fps, frames: frames() };
}

const haveTimes = (times) => times.length === 1 || times.at(-1) > times[0];

/** Frames by their time stamps; counted from the start where all have the same. */
async function* chosen(sink, times, indices) {
  if (haveTimes(times)) {
    yield* sink.samplesAtTimestamps(indices.map((i) => times[i]));
    return;
  }
  const wanted = new Set(indices);
  let place = 0;
  for await (const sample of sink.samples()) {
    if (wanted.has(place++)) yield sample;
    else sample.close();
  }
}

/** Frames a second: their number by their durations, in whole ticks of the file's clock. */
async function rateOf(track, times, packets) {
  if (!haveTimes(times)) return USUAL_RATE;
  const clock = await track.getTimeResolution();
  const ticks = packets.reduce((sum, { duration }) => sum + Math.round(duration * clock), 0);
  return ticks ? (clock * packets.length) / ticks : USUAL_RATE;
}

async function pixelsOf(sample, space) {
  const { width, height } = sample.visibleRect;
  let pixels;
  if (sample.format === "I420" || sample.format === "NV12") {
    const data = new Uint8Array(sample.allocationSize());
    const [y, u, v] = await sample.copyTo(data);
    const planes = { data, y, u, v: v ?? { ...u, offset: u.offset + 1 }, step: v ? 1 : 2 };
    pixels = toRGB(planes, [width, height], space);
  } else {
    const frame = sample.toVideoFrame();
    pixels = readPixels(frame, width, height);
    frame.close();
  }
  return rotate(pixels, sample.rotation);
}

/** A GIF: each frame says how long it is shown. */
async function openAnimation(file, options) {
  let decoder, durations;
  try {
    decoder = new ImageDecoder({ data: await file.arrayBuffer(), type: file.type });
    await Promise.all([decoder.tracks.ready, decoder.completed]);
    durations = [];
    for (let frameIndex = 0; frameIndex < decoder.tracks.selectedTrack.frameCount; frameIndex++) {
      const { image } = await decoder.decode({ frameIndex });
      durations.push(image.duration / 1e6 || 0.1);
      image.close();
    }
  } catch {
    throw told(file.name, "cannot be read as an animation here", "Save it as MP4");
  }
  let end = 0;
  const times = durations.map((duration) => (end += duration) - duration);
  const plan = sampleFrames(times, durations.length / end, options);
  async function* frames() {
    for (const frameIndex of plan.indices) {
      const { image } = await decoder.decode({ frameIndex });
      yield readPixels(image, image.displayWidth, image.displayHeight);
      image.close();
    }
    decoder.close();
  }
  return { plan, total: times.length, seconds: end, frames: frames() };
}
