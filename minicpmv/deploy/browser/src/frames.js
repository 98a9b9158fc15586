/**
 * Frames of a video as RGB, bit for bit as FFmpeg makes them in Python: each color value counts for its four pixels, in
 * arithmetic of 16 bits.
 */

// What red takes of V, blue of U, and green of both, times 2 ** 16 (ITU-T H.273), by the names of WebCodecs.
const BT601 = [104597, 132201, -25675, -53279];
const MATRICES = { bt709: [117489, 138438, -13975, -34925], "bt2020-ncl": [110013, 140363, -12277, -42626] };

const to16Bits = (factor) => (factor * 8192 + 32768) >> 16;

/**
 * @param planes {data, y, u, v, step}: bytes; where the planes begin, each as {offset, stride}; and the distance of
 *   neighbors in the planes of color (2 where U and V alternate)
 * @param size [width, height]
 * @param space {matrix, fullRange} as the file says
 * @returns {width, height, data: RGBA bytes}
 */
export function toRGB({ data, y, u, v, step }, [width, height], { matrix, fullRange }) {
  const factors = MATRICES[matrix] ?? BT601;
  const [redV, blueU, greenU, greenV] = factors.map((f) => to16Bits(fullRange ? Math.trunc((f * 224) / 255) : f));
  const light = to16Bits(fullRange ? 65536 : 76309);
  const black = fullRange ? 0 : 128;
  const pixels = new Uint8ClampedArray(4 * width * height);
  let to = 0;
  for (let row = 0; row < height; row++) {
    const [ofY, half] = [y.offset + row * y.stride, row >> 1];
    const [ofU, ofV] = [u.offset + half * u.stride, v.offset + half * v.stride];
    for (let column = 0; column < width; column++, to += 4) {
      const there = (column >> 1) * step;
      const level = ((data[ofY + column] * 8 - black) * light) >> 16;
      const blue = data[ofU + there] * 8 - 1024;
      const red = data[ofV + there] * 8 - 1024;
      pixels[to] = level + ((red * redV) >> 16);
      pixels[to + 1] = level + ((blue * greenU) >> 16) + ((red * greenV) >> 16);
      pixels[to + 2] = level + ((blue * blueU) >> 16);
      pixels[to + 3] = 255;
    }
  }
  return { width, height, data: pixels };
}

/** Turned clockwise by 0, 90, 180 or 270 degrees, as phones note it. */
export function rotate(pixels, degrees) {
  if (!degrees) return pixels;
  const { width, height } = pixels;
  const from = new Uint32Array(pixels.data.buffer);
  const to = new Uint32Array(from.length);
  const place = {
    90: (x, y) => x * height + (height - 1 - y),
    180: (x, y) => (height - 1 - y) * width + (width - 1 - x),
    270: (x, y) => (width - 1 - x) * height + y,
  }[degrees];
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++) to[place(x, y)] = from[i++];
  const [wide, high] = degrees === 180 ? [width, height] : [height, width];
  return { width: wide, height: high, data: new Uint8ClampedArray(to.buffer) };
}
