/** The page: what people do on it, and what it shows. The model runs in a worker. */

import { element, icon, miniature, preview } from "./dom.js";
import { kindOf } from "./kinds.js";
import { show } from "./view.js";

const COPY = "M9 9h11v11H9zM5 15H4V4h11v1";
const AGAIN = "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7";
const BACK = "M4 12a8 8 0 1 0 2.3-5.6M4 4v7h7";

const get = (id) => document.getElementById(id);
const [chat, box, question, status] = ["chat", "box", "question", "status"].map(get);

/** Turns are {number, files, text, answer, thought, output, element}; those without an answer are being answered. */
let turns = [];
let attached = []; // files in the box
let isReady = false;
let running = null; // the turn that is being answered
let seen = new Map(); // what the worker tells of each file
let nextKey = 0;
let nextNumber = 0; // of questions
let isFollowed = true; // the end of the conversation is in sight

const worker = new Worker(new URL("worker.js" + location.search, import.meta.url), { type: "module" });

// ---- settings ----

const settings = {};

function addSetting(name, label, least, most, step, value, hint) {
  const output = element("output", { htmlFor: name }, `${value}`);
  const input = element("input", { type: "range", id: name, min: least, max: most, step, value });
  input.addEventListener("input", () => {
    settings[name] = Number(input.value);
    output.value = input.value;
  });
  settings[name] = value;
  const small = hint ? element("small", {}, hint) : "";
  get("settings").append(element("div", { class: "setting" }, element("label", { htmlFor: name }, label), output, small, input));
}

function addSettings({ image, video, context }) {
  const longest = Math.min(8192, Math.floor(context / 2));
  addSetting("longest", "Longest answer", 16, longest, 16, Math.min(2048, longest), "Tokens, thought included");
  addSetting("slices", "Slices of an image", 1, 20, 1, image.max_slice_nums, "More read finer print");
  addSetting("fps", "Frames per second of a video", 0.5, 10, 0.5, video.fps);
  addSetting("packing", "Frames in a group", 0, 6, 1, 0, "A group costs as much as an image. 0: by the length of the video");
}

// ---- what is shown ----

function tell(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

/** Buttons as the moment allows them. */
function update() {
  get("send").hidden = running !== null;
  get("stop").hidden = running === null;
  get("send").disabled = !isReady || !(question.value.trim() || attached.length);
  for (const button of document.querySelectorAll(".example, .turn .retry, .turn .undo")) button.disabled = !isReady || running !== null;
  get("welcome").hidden = turns.length > 0;
  const last = turns.at(-1);
  for (const turn of turns) {
    for (const button of turn.element.querySelectorAll(".retry, .undo")) button.hidden = turn !== last;
  }
}

function updateView() {
  const files = turns.flatMap((turn) => turn.files).filter(({ key }) => seen.has(key));
  show(get("view"), files.map((file) => ({ file, seen: seen.get(file.key) })), turns.findLast((turn) => turn.output)?.output ?? null);
}

function updateAttached() {
  const items = attached.map((each) => {
    const remove = element("button", { type: "button", ariaLabel: `Remove ${each.file.name}` }, "×");
    remove.addEventListener("click", () => {
      attached = attached.filter((other) => other !== each);
      updateAttached();
    });
    return element("div", { class: "file" }, miniature(each), remove);
  });
  get("attached").replaceChildren(...items);
  update();
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  update();
}

/** Keep the end in sight, unless somebody reads further up. */
const growing = new ResizeObserver(() => {
  if (isFollowed) chat.scrollTop = chat.scrollHeight;
});
growing.observe(chat);
chat.addEventListener("scroll", () => (isFollowed = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40));

function addTurn(turn) {
  const media = turn.files.length ? element("div", { class: "media" }, turn.files.map((each) => preview(each))) : "";
  const text = turn.text ? element("div", { class: "text" }, turn.text) : "";
  turn.answerElement = element("div", { class: "answer waiting" }, "…");
  turn.bot = element("div", { class: "bot" }, turn.answerElement);
  turn.element = element("article", { class: "turn" }, element("div", { class: "user" }, media, text), turn.bot);
  turns.push(turn);
  chat.append(turn.element);
  growing.observe(turn.element);
  isFollowed = true;
}

function showAnswer(turn, isWhole) {
  const { thought, answer } = turn;
  if (thought !== null) {
    if (!turn.thoughtElement) {
      turn.thoughtElement = element("details", { class: "thought", open: true }, element("summary", {}), element("div", {}));
      turn.bot.prepend(turn.thoughtElement);
    }
    const [title, words] = turn.thoughtElement.children;
    title.textContent = answer || isWhole ? "Thought" : "Thinking";
    words.textContent = thought;
    if ((answer || isWhole) && !turn.isFolded) [turn.thoughtElement.open, turn.isFolded] = [false, true];
  }
  const isWaiting = !answer && !isWhole;
  turn.answerElement.textContent = answer.trim() || (isWhole ? "(no answer)" : thought ? "" : "…");
  turn.answerElement.classList.toggle("waiting", isWaiting);
}

function addTools(turn) {
  const button = (name, label, path, action) => {
    const made = element("button", { type: "button", class: name, title: label, ariaLabel: label }, icon(path));
    made.addEventListener("click", action);
    return made;
  };
  const copy = () => navigator.clipboard.writeText(turn.answer).then(() => tell("Copied."), () => tell("The browser does not allow copying here.", true));
  const retry = () => {
    takeBack();
    ask(turn.text, turn.files);
  };
  const undo = () => {
    takeBack();
    restore(turn);
  };
  turn.bot.append(
    element("div", { class: "tools" }, button("copy", "Copy", COPY, copy), button("retry", "Retry", AGAIN, retry), button("undo", "Undo", BACK, undo)),
  );
}

// ---- conversation ----

function takeBack() {
  turns.pop().element.remove();
  updateView();
  update();
}

/** Put a question back into its box. */
function restore({ text, files }) {
  question.value = text;
  attached = files;
  grow();
  updateAttached();
}

function ask(text, files) {
  running = { number: nextNumber++, files, text, thought: null, answer: "" };
  addTurn(running);
  tell("");
  update();
  worker.postMessage({
    type: "ask",
    number: running.number,
    isThinking: document.querySelector("[name=thinking]:checked").value === "on",
    options: settings,
    turns: turns.map((turn) => ({
      files: turn.files.map(({ key, file }) => ({ key, file })),
      text: turn.text,
      answer: turn === running ? undefined : turn.answer,
    })),
  });
}

function add(files) {
  const refused = [];
  for (const file of files) {
    const kind = kindOf(file);
    if (kind === null) refused.push(file.name);
    else attached.push({ key: nextKey++, file, kind, url: URL.createObjectURL(file) });
  }
  tell(refused.length ? `${refused.join(", ")} is no image or video. Save it as one of them, and add that.` : "", refused.length > 0);
  updateAttached();
}

function beginAnew() {
  worker.postMessage({ type: "stop" });
  worker.postMessage({ type: "forget" });
  for (const { element } of turns) element.remove();
  [turns, running, seen] = [[], null, new Map()];
  restore({ text: "", files: [] });
  tell("");
  updateView();
  question.focus();
}

// ---- what the worker tells ----

const told = {
  progress({ loaded, total }) {
    get("progress").value = loaded / total;
    const [done, all] = [loaded, total].map((bytes) => (bytes / 1e6).toFixed(1));
    tell(loaded < total ? `Loading the model: ${done} of ${all} MB` : "Starting the model");
  },
  ready({ device }) {
    isReady = true;
    get("progress").hidden = true;
    get("device").textContent = device === "webgpu" ? "on the GPU of this device" : "on the CPU of this device";
    tell("");
    update();
  },
  reading({ name, done, of }) {
    tell(`${name}: ${done} of ${of} frames`);
  },
  seen({ key, seen: what }) {
    seen.set(key, what);
    updateView();
  },
  wrote({ thought, text }) {
    tell("");
    [running.thought, running.answer] = [thought, text];
    showAnswer(running, false);
  },
  done({ output }) {
    const turn = running;
    running = null;
    turn.output = output;
    tell("");
    showAnswer(turn, true);
    addTools(turn);
    updateView();
    update();
  },
  failed({ message }) {
    get("progress").hidden = true;
    tell(message, true);
    if (!running) return;
    const turn = running;
    running = null;
    takeBack();
    restore(turn);
  },
};

worker.addEventListener("message", ({ data }) => {
  if (data.number === undefined || data.number === running?.number) told[data.type](data); // else nobody waits for it any more
});
worker.addEventListener("error", () => told.failed({ message: "The model could not be started. Reload the page, or try another browser." }));

// ---- what people do ----

box.addEventListener("submit", (event) => {
  event.preventDefault();
  if (get("send").disabled || running) return;
  const [text, files] = [question.value, attached];
  restore({ text: "", files: [] });
  ask(text, files);
});
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  box.requestSubmit();
});
get("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
get("new-chat").addEventListener("click", beginAnew);
get("files").addEventListener("change", ({ target }) => {
  add(target.files);
  target.value = "";
});
addEventListener("paste", ({ clipboardData }) => clipboardData?.files.length && add(clipboardData.files));

let dragged = 0; // enters without a leave: children send both
const isFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => isFiles(event) && (get("drop").hidden = ++dragged < 1));
addEventListener("dragleave", (event) => isFiles(event) && (get("drop").hidden = --dragged < 1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  get("drop").hidden = true;
  dragged = 0;
  if (event.dataTransfer?.files.length) add(event.dataTransfer.files);
});

// ---- the beginning ----

async function addExamples(examples) {
  for (const { path, question: text } of examples) {
    const data = await (await fetch(path)).blob();
    const file = new File([data], path.split("/").at(-1), { type: data.type });
    const example = { file, kind: kindOf(file), url: URL.createObjectURL(file) };
    const card = element("button", { type: "button", class: "example" }, miniature(example), element("span", {}, text));
    card.addEventListener("click", () => ask(text, [{ ...example, key: nextKey++ }]));
    get("examples").append(card);
    update();
  }
}

async function begin() {
  const about = await (await fetch("page.json")).json();
  document.title = `MiniCPM-V ${about.name}`;
  get("name").textContent = about.name;
  if (about.knows) get("knows").textContent = `${about.name} knows ${about.knows}: anything else it guesses.`;
  addSettings(about.settings);
  updateView();
  update();
  worker.postMessage({ type: "load" });
  await addExamples(about.examples);
}

// Where there is none (an address without https), the page works but not offline.
navigator.serviceWorker?.register("sw.js").catch(() => {});
begin().catch(() => tell("The page could not be loaded. Reload it.", true));
