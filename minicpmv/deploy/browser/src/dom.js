/** An element with properties (`class` and `style` among them) and children: elements, texts, or nothing. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { class: name, style, ...rest } = properties;
  if (name) made.className = name;
  Object.assign(made.style, style);
  Object.assign(made, rest);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** A small icon, by the path of its lines. */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const lines = document.createElementNS("http://www.w3.org/2000/svg", "path");
  lines.setAttribute("d", path);
  svg.append(lines);
  return svg;
}

/** A file as it is shown: an image, or a video, which shows its controls to whoever points at it. */
export function preview({ kind, url, file }) {
  if (kind !== "video" || file.type === "image/gif") return element("img", { src: url, alt: file.name });
  const video = element("video", { src: url, title: file.name, muted: true, playsInline: true, tabIndex: 0 });
  for (const event of ["pointerenter", "focus"]) video.addEventListener(event, () => (video.controls = true));
  video.addEventListener("pointerleave", () => (video.controls = false));
  return video;
}

/** A file in small: an image, or the first frame of a video. */
export function miniature(each) {
  const made = preview(each);
  made.inert = true;
  return made;
}
