/**
 * Bicubic resize, bit for bit that of Pillow, the horizontal pass first. Pixels are RGBA bytes as canvases have them;
 * alpha is not looked at.
 */

const BITS = 22; // of the fraction of a weight
const HALF = 1 << (BITS - 1);

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** For each place of the result the first place it is made of, and how many, with their weights as integers. */
function weightsOf(from, to) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = 2 * stretch;
  const width = Math.ceil(support) * 2 + 1;
  const starts = new Int32Array(to);
  const counts = new Int32Array(to);
  const weights = new Int32Array(to * width);
  const exact = new Float64Array(width);
  for (let place = 0; place < to; place++) {
    const center = (place + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const count = Math.min(Math.trunc(center + support + 0.5), from) - start;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      exact[i] = bicubic((i + start - center + 0.5) * (1 / stretch));
      sum += exact[i];
    }
    for (let i = 0; i < count; i++) {
      const weight = sum ? exact[i] / sum : exact[i];
      weights[place * width + i] = Math.trunc(weight * (1 << BITS) + (weight < 0 ? -0.5 : 0.5));
    }
    starts[place] = start;
    counts[place] = count;
  }
  return { starts, counts, weights, width };
}

/**
 * One pass over `lines` lines of pixels; `step` and `line` are the distances of neighbors in a line and of lines, of the
 * source and of the result.
 */
function pass(source, result, from, to, lines, [fromStep, fromLine], [toStep, toLine]) {
  const { starts, counts, weights, width } = weightsOf(from, to);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < to; place++) {
      let at = line * fromLine + starts[place] * fromStep;
      let [red, green, blue] = [HALF, HALF, HALF];
      for (let i = place * width, end = i + counts[place]; i < end; i++, at += fromStep) {
        const weight = weights[i];
        red += source[at] * weight;
        green += source[at + 1] * weight;
        blue += source[at + 2] * weight;
      }
      const there = line * toLine + place * toStep;
      result[there] = red >> BITS; // which a clamped array clips to a byte
      result[there + 1] = green >> BITS;
      result[there + 2] = blue >> BITS;
    }
  }
}

/**
 * @param image {width, height, data: Uint8ClampedArray of RGBA}
 * @param size [width, height]
 * @returns an image of that size; the same one where nothing changes
 */
export function resize(image, [width, height]) {
  let { data } = image;
  if (width !== image.width) {
    const wide = new Uint8ClampedArray(4 * width * image.height);
    pass(data, wide, image.width, width, image.height, [4, 4 * image.width], [4, 4 * width]);
    data = wide;
  }
  if (height !== image.height) {
    const high = new Uint8ClampedArray(4 * width * height);
    pass(data, high, image.height, height, width, [4 * width, 4], [4 * width, 4]);
    data = high;
  }
  return data === image.data ? image : { width, height, data };
}
