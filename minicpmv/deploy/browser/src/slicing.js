/**
 * How an image is cut into an overview and slices (LLaVA-UHD, arXiv 2403.11703): the numbers of
 * image_processing_minicpmv.py. Sizes are [width, height] in pixels, grids are [columns, rows].
 */

/** Python's round: half to even. */
export function roundEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below & 1) : Math.round(value);
}

function nearestMultiple(length, step) {
  return Math.max(roundEven(length / step) * step, step);
}

/** Size nearest to the area of one slice that keeps the proportions and is whole in patches. */
function bestResize([width, height], { scale_resolution: scale, patch_size: patch }, enlarges) {
  if (enlarges || width * height > scale * scale) {
    const ratio = width / height;
    height = Math.trunc(scale / Math.sqrt(ratio));
    width = Math.trunc(height * ratio);
  }
  return [nearestMultiple(width, patch), nearestMultiple(height, patch)];
}

/** [columns, rows] whose proportions are nearest to the image's, or null where it is not sliced. */
function sliceGrid([width, height], { max_slice_nums: most, scale_resolution: scale }) {
  const ideal = Math.min(Math.ceil((width * height) / (scale * scale)), most);
  if (ideal <= 1) return null;
  let best = null;
  let least = Infinity;
  for (const number of [ideal - 1, ideal, ideal + 1]) {
    if (number <= 1 || number > most) continue;
    for (let columns = 1; columns <= number; columns++) {
      if (number % columns) continue;
      const rows = number / columns;
      const distance = Math.abs(Math.log(width / height) - Math.log(columns / rows));
      if (distance < least) [best, least] = [[columns, rows], distance];
    }
  }
  return best;
}

/**
 * The layout of an image: the size of its overview and, where it is sliced, the grid, the size of the enlarged view
 * that is cut, and the size of a slice.
 *
 * @param size [width, height]
 * @param settings max_slice_nums, scale_resolution, patch_size
 */
export function sliceLayout(size, settings) {
  const grid = sliceGrid(size, settings);
  if (grid === null) return { source: bestResize(size, settings, true), grid: null, refined: null, slice: null };
  const [columns, rows] = grid;
  const cell = [nearestMultiple(size[0], columns) / columns, nearestMultiple(size[1], rows) / rows];
  const slice = bestResize(cell, settings, true);
  const refined = [slice[0] * columns, slice[1] * rows];
  return { source: bestResize(size, settings, false), grid, refined, slice };
}

/** How many visual units a layout has: the overview and each slice. */
export function unitsOf(layout) {
  return layout.grid === null ? 1 : 1 + layout.grid[0] * layout.grid[1];
}
