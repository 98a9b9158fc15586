/** Images and frames as the vision tower reads them: views cut into slices, as numbers. */

import { resize } from "./resize.js";
import { sliceLayout } from "./slicing.js";

/** For each channel the number of each of the 256 levels, rounded to float32 as numpy does it. */
function levelsOf({ norm_mean: mean, norm_std: std }) {
  return mean.map((middle, channel) => {
    const scale = Math.fround(1 / (255 * std[channel]));
    const shift = Math.fround(middle / std[channel]);
    return Float32Array.from({ length: 256 }, (_, level) => Math.fround(level * scale) - shift);
  });
}

/** Cut a view row by row into pieces of one size; each becomes float32 [3, height, width]. */
function cut(view, [width, height], levels) {
  const pieces = [];
  for (let top = 0; top < view.height; top += height) {
    for (let left = 0; left < view.width; left += width) {
      const values = new Float32Array(3 * width * height);
      for (let channel = 0, to = 0; channel < 3; channel++) {
        const level = levels[channel];
        for (let y = top; y < top + height; y++) {
          let from = 4 * (y * view.width + left) + channel;
          for (let x = 0; x < width; x++, from += 4) values[to++] = level[view.data[from]];
        }
      }
      pieces.push({ width, height, values });
    }
  }
  return pieces;
}

/**
 * An image as the tower reads it.
 *
 * @param image {width, height, data: RGBA bytes}
 * @param settings those of the image processor
 * @returns {size, layout, pieces}: the overview, then the slices row by row
 */
export function sliceImage(image, settings) {
  const size = [image.width, image.height];
  const layout = sliceLayout(size, settings);
  const levels = levelsOf(settings);
  const pieces = cut(resize(image, layout.source), layout.source, levels);
  if (layout.grid !== null) pieces.push(...cut(resize(image, layout.refined), layout.slice, levels));
  return { size, layout, pieces };
}

/**
 * The visual units of an image, or of the frames that share a pack: the overviews of all its frames, then each slice
 * position across them.
 *
 * @param frames of `sliceImage`, all of one layout
 * @param times their temporal ids; [-1] of a still image
 * @returns [{pieces, times}], one entry a unit
 */
export function unitsOfPack(frames, times) {
  return frames[0].pieces.map((_, position) => ({ pieces: frames.map((frame) => frame.pieces[position]), times }));
}
