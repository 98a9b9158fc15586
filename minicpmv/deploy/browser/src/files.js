/** The large files of the page: fetched once, with progress, and kept for when there is no network. */

/** As the service worker calls what it keeps. */
const cacheName = (version) => `minicpmv ${new URL("../", import.meta.url).href} ${version}`;

/**
 * @param about page.json: `version`, and `sizes` in bytes by path
 * @param paths from the folder of the page
 * @param report is told (loaded, total) in bytes
 * @returns their bytes
 */
export async function fetchAll(about, paths, report) {
  const cache = globalThis.caches && (await caches.open(cacheName(about.version)).catch(() => null));
  const total = paths.reduce((sum, path) => sum + about.sizes[path], 0);
  let loaded = 0;
  return Promise.all(
    paths.map(async (path) => {
      const url = new URL(`../${path}`, import.meta.url);
      const kept = await cache?.match(url);
      const response = kept ?? (await fetch(url));
      if (!response.ok) throw new Error(`${path} could not be loaded (${response.status})`);
      const bytes = new Uint8Array(about.sizes[path]);
      let length = 0;
      for await (const piece of pieces(response.body)) {
        if (length + piece.length > bytes.length) throw new Error(`${path} is longer than it should be`);
        bytes.set(piece, length);
        length += piece.length;
        report((loaded += piece.length), total);
      }
      if (length !== bytes.length) throw new Error(`${path} was cut off`);
      // A full disk is no reason not to answer.
      if (!kept) await cache?.put(url, new Response(bytes.slice())).catch(() => {});
      return bytes;
    }),
  );
}

async function* pieces(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** What a .gz file holds. */
export async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
