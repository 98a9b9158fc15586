/**
 * Which frames of a video are looked at, when they are shown, and how they are packed: the numbers of
 * video_processing_minicpmv.py. Nothing here decodes anything.
 */

import { roundEven } from "./slicing.js";

/** The frames to look at, at the centers of equal bins: {indices, packing}. `options` are those of the processor. */
export function planFrames(total, fps, options) {
  const { fps: wanted, max_num_frames: most, max_num_packing: mostPacked, force_packing: forced } = options;
  const duration = total / fps;
  let count;
  let packing;
  if (wanted * Math.trunc(duration) <= most) {
    const nativeRate = roundEven(fps) || fps;
    count = roundEven(Math.min(wanted, nativeRate) * Math.min(most, duration));
    packing = 1;
  } else {
    count = roundEven(duration * wanted);
    packing = Math.ceil((duration * wanted) / most);
    if (packing > mostPacked) [count, packing] = [most * mostPacked, mostPacked];
  }
  if (count > total) {
    count = total;
    packing = Math.min(packing, Math.ceil(count / most));
  }
  count = Math.max(count, 1);
  if (forced) packing = Math.min(forced, mostPacked);
  const gap = total / count;
  return { indices: Array.from({ length: count }, (_, i) => Math.trunc(i * gap + gap / 2)), packing };
}

/** Temporal ids of frames shown at `seconds`; `duration` bounds them where it is given. */
export function temporalIds(seconds, step, duration) {
  const last = duration === undefined ? Infinity : Math.max(Math.ceil(duration / step) - 1, 0);
  return seconds.map((second) => {
    const below = Math.max(Math.floor(second / step), 0);
    const [low, high] = [Math.min(below, last), Math.min(below + 1, last)];
    const nearest = Math.abs(high * step - second) < Math.abs(second - low * step) ? high : low;
    return Math.trunc((nearest * step) / step); // which loses one at times: the model was trained with that
  });
}

/** Whether time stamps are those of a video of about `fps` frames a second. */
function agree(times, fps) {
  const average = ((times.at(-1) - times[0]) * fps) / Math.max(times.length - 1, 1);
  return 0.5 < average && average < 2;
}

/**
 * What is taken from a video.
 *
 * @param times seconds at which each of its frames is shown, rising; all equal where the file does not say
 * @param fps frames a second as the file says
 * @param options those of the video processor
 * @returns {indices, timestamps, packs, packing, fps}; `packs` are lists of temporal ids
 */
export function sampleFrames(times, fps, options) {
  const count = times.length;
  const span = times.at(-1) - times[0];
  if (span > 0 && !agree(times, fps)) fps = (count - 1) / span;
  const even = times.map((_, i) => i / fps);
  const shown = span > 0 ? times.map((time) => time - times[0]) : even;
  const isVariable = shown.some((time, i) => Math.abs(time - even[i]) > 0.5 / fps);
  const clock = isVariable ? shown : even;
  const { indices, packing } = planFrames(count, fps, options);
  const timestamps = indices.map((i) => clock[i]);
  const ids = temporalIds(timestamps, options.time_scale, isVariable ? undefined : count / fps);
  const packs = [];
  for (let i = 0; i < ids.length; i += packing) packs.push(ids.slice(i, i + packing));
  return { indices, timestamps, packs, packing, fps };
}
