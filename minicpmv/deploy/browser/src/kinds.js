/** "image" or "video" by the type and name of a file; null for any other. A GIF is a video, as in Python. */
export function kindOf({ type, name }) {
  if (type === "image/gif") return "video";
  const [kind] = type.split("/");
  if (kind === "image" || kind === "video") return kind;
  return /\.(mkv|mov|m4v|mp4|webm)$/i.test(name) ? "video" : null;
}
