/**
 * Conversations to ids, as processing_minicpmv.py makes them. What users typed is text, whatever it looks like: only
 * the strings of the template, the places of images and what the model itself wrote hold control tokens.
 */

import { unitsOf } from "./slicing.js";

const THOUGHT_END = "</think>";
const VIDEO_PLACE = "(<video>./</video>)"; // in a template, as Python renders it
const TYPED = "\ufdd0"; // by which Python marks, behind its first character, a control token that a user typed

/** [thought, answer] of what the model wrote behind a prompt that opened a thought. */
export function splitThought(text) {
  const end = text.indexOf(THOUGHT_END);
  if (end < 0) return [text.replace(/^\n+/, ""), ""];
  return [text.slice(0, end).replace(/^\n+|\n+$/g, ""), text.slice(end + THOUGHT_END.length).replace(/^\n+/, "")];
}

/** An answer as the template writes it in earlier turns. */
function withoutThought(text) {
  const end = text.lastIndexOf(THOUGHT_END);
  return end < 0 ? text : text.slice(end + THOUGHT_END.length).replace(/^\n+/, "");
}

const escapeRegExp = (text) => text.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&");

/** Pattern of tokens, longest first; undefined where there are none. */
const anyOf = (tokens) =>
  tokens.length ? new RegExp([...tokens].sort((a, b) => b.length - a.length).map(escapeRegExp).join("|"), "g") : undefined;

/** Text that becomes ids stretch by stretch: a stretch is all between two control tokens, whoever wrote it. */
class Stretches {
  constructor() {
    this.parts = [{ text: "" }];
  }

  /** Add text in which the control tokens that `pattern` finds count; none where it is not given. */
  add(text, pattern) {
    let start = 0;
    for (const found of pattern ? text.matchAll(pattern) : []) {
      this.parts.at(-1).text += text.slice(start, found.index);
      this.parts.push({ token: found[0] }, { text: "" });
      start = found.index + found[0].length;
    }
    this.parts.at(-1).text += text.slice(start);
  }
}

export class Prompts {
  /**
   * @param Tokenizer the class of @huggingface/tokenizers
   * @param tokenizer what tokenizer.json holds
   * @param config what tokenizer_config.json holds
   * @param settings of the page: `template`, `image`, `video`, `writes`
   */
  constructor(Tokenizer, tokenizer, config, settings) {
    this.settings = settings;
    this.ids = new Map(tokenizer.added_tokens.map(({ content, id }) => [content, id]));
    this.full = new Tokenizer(tokenizer, config);
    this.plain = new Tokenizer({ ...tokenizer, added_tokens: [] }, { ...config, added_tokens_decoder: {} });
    this.controls = anyOf([...this.ids.keys()]);
    this.written = anyOf(settings.writes);
    this.marked = anyOf([...this.ids.keys(), VIDEO_PLACE].map((text) => text[0] + TYPED + text.slice(1)));
    this.slot = this.ids.get(settings.image.unk);
  }

  /** Text of what the model wrote; a character whose bytes are not all there yet is held back. */
  decode(ids, isWhole = true) {
    const text = this.full.decode(ids, { skip_special_tokens: false, clean_up_tokenization_spaces: false });
    return isWhole ? text : text.replace(/\ufffd+$/, "");
  }

  encode({ parts }) {
    return parts.flatMap(({ token, text }) => {
      if (token !== undefined) return [this.ids.get(token)];
      const unmarked = text.replace(this.marked, (found) => found.replace(TYPED, "")); // typed themselves, marks go too
      return unmarked ? this.plain.encode(unmarked, { add_special_tokens: false }).ids : [];
    });
  }

  /** The slots of an image, or of a pack of frames; `number` is null where it has none. */
  placeholder(layout, number) {
    const image = this.settings.image;
    const slots = image.unk.repeat(image.image_feature_size);
    let text = image.im_start + slots + image.im_end;
    if (number !== null) text = `${image.im_id_start}${number}${image.im_id_end}${text}`;
    if (layout.grid !== null) {
      const [columns, rows] = layout.grid;
      const row = (image.slice_start + slots + image.slice_end).repeat(columns);
      text += Array(rows).fill(row).join("\n");
    }
    return text;
  }

  /**
   * The prompt of a conversation that ends with a question.
   *
   * @param turns [{media, text, answer}]: media are [{layout, packs}], packs being null for an image; the last turn has
   *   no answer
   * @param isThinking whether the model is to think before it answers
   * @returns ids, in which the slots of all media stand in order
   */
  build(turns, isThinking) {
    const { template, image, video } = this.settings;
    const prompt = new Stretches();
    let number = 0;
    for (const { media, text, answer } of turns) {
      prompt.add(template.user[0], this.controls);
      media.forEach(({ layout, packs }, place) => {
        if (place) prompt.add(template.between, this.controls);
        if (packs === null) prompt.add(this.placeholder(layout, image.use_image_id ? number++ : null), this.controls);
        else {
          const lines = packs.map((_, pack) => this.placeholder(layout, video.use_image_id ? pack : null));
          prompt.add(lines.join("\n"), this.controls);
        }
      });
      if (text.trim()) {
        if (media.length) prompt.add(template.between, this.controls);
        prompt.add(text);
      }
      prompt.add(template.user[1], this.controls);
      if (answer !== undefined) {
        prompt.add(template.assistant[0], this.controls);
        prompt.add(withoutThought(answer), this.written);
        prompt.add(template.assistant[1], this.controls);
      }
    }
    prompt.add(isThinking ? template.thinks : template.answers, this.controls);
    return this.encode(prompt);
  }

  /** How many slots media take. */
  slotsOf({ layout, packs }) {
    return unitsOf(layout) * (packs?.length ?? 1) * this.settings.image.image_feature_size;
  }
}
