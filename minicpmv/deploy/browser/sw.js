/**
 * Offline after the first load: the small files are kept when the page is opened first, the large ones by its worker
 * (src/files.js). version.js names what belongs to this version; another version replaces all of it.
 */

importScripts("version.js"); // VERSION, SHELL

const here = new URL("./", location).href;
const name = `minicpmv ${here} ${VERSION}`;

addEventListener("install", (event) => event.waitUntil(caches.open(name).then((cache) => cache.addAll(SHELL))));

addEventListener("activate", (event) => {
  const forget = async () => {
    const old = (await caches.keys()).filter((key) => key.startsWith(`minicpmv ${here} `) && key !== name);
    await Promise.all(old.map((key) => caches.delete(key)));
    await clients.claim();
  };
  event.waitUntil(forget());
});

addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(here)) return;
  const answer = async () => {
    const cache = await caches.open(name);
    return (await cache.match(request, { ignoreSearch: true })) ?? fetch(request);
  };
  event.respondWith(answer());
});
