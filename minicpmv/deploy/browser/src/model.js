/** The three graphs of `minicpmv export onnx` in ONNX Runtime: image features, and answers token by token. */

const MOST_UNITS = 8; // that the tower reads at once, so that memory is bounded

const integers = (ort, values, shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

export class Model {
  /**
   * @param ort ONNX Runtime
   * @param graphs {vision_encoder, embed_tokens, decoder_model}: their bytes
   * @param settings of the page: `decoder` {layers, heads, width}
   * @param device "webgpu" or "wasm"
   */
  static async load(ort, graphs, settings, device) {
    const model = new Model();
    const names = Array.from({ length: settings.decoder.layers }, (_, i) => [`${i}.key`, `${i}.value`]).flat();
    Object.assign(model, { ort, settings, names });
    // What was read stays where it was computed.
    const kept = device === "webgpu" ? Object.fromEntries(names.map((name) => [`present.${name}`, "gpu-buffer"])) : undefined;
    for (const [name, bytes] of Object.entries(graphs)) {
      // Embeddings are looked up where features are put among them; their float16 is more than some GPUs know.
      const options = { executionProviders: [name === "embed_tokens" ? "wasm" : device], graphOptimizationLevel: "all" };
      if (kept && name === "decoder_model") options.preferredOutputLocation = kept;
      model[name] = await ort.InferenceSession.create(bytes, options);
    }
    return model;
  }

  /** Run everything once on a gray patch and a token: some GPUs refuse only then. */
  async tryOut() {
    const { patch_size: side } = this.settings.image;
    const piece = { width: side, height: side, values: new Float32Array(3 * side * side) };
    await this.run([{ pieces: [piece], times: [-1] }]);
    for await (const id of this.generate([0], -1, [])) if (id >= 0) break;
  }

  /**
   * Features of visual units, in their order.
   *
   * @param units [{pieces: [{width, height, values}], times}]
   * @param pause is awaited between runs
   * @returns float32 arrays [Q, D], one a unit
   */
  async features(units, pause) {
    const found = Array(units.length);
    for (const places of placesByShape(units)) {
      for (let start = 0; start < places.length; start += MOST_UNITS) {
        const some = places.slice(start, start + MOST_UNITS);
        const features = await this.run(some.map((place) => units[place]));
        some.forEach((place, i) => (found[place] = features[i]));
        await pause();
      }
    }
    return found;
  }

  async run(units) {
    const { width, height } = units[0].pieces[0];
    const frames = units[0].times.length;
    const each = 3 * width * height;
    const values = new Float32Array(units.length * frames * each);
    units.flatMap(({ pieces }) => pieces).forEach((piece, i) => values.set(piece.values, i * each));
    const { image_features: features } = await this.vision_encoder.run({
      pixel_values: new this.ort.Tensor("float32", values, [units.length, frames, 3, height, width]),
      temporal_ids: integers(this.ort, units.flatMap(({ times }) => times), [units.length, frames]),
    });
    const size = features.dims[1] * features.dims[2];
    return units.map((_, i) => features.data.slice(i * size, (i + 1) * size));
  }

  /**
   * The likeliest token each time, until the model closes its answer.
   *
   * @param ids of the prompt
   * @param slot the id of the places that `features` take, in order
   * @yields ids, without the closing one
   */
  async *generate(ids, slot, features) {
    const { ort, settings } = this;
    const { heads, width } = settings.decoder;
    let past = this.names.map((name) => [name, new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width])]);
    let read = 0;
    try {
      for (;;) {
        const embeds = await this.embed(ids);
        if (!read) fill(embeds, ids, slot, features);
        const outputs = await this.decoder_model.run({
          inputs_embeds: embeds,
          attention_mask: integers(ort, Array(read + ids.length).fill(1), [1, read + ids.length]),
          position_ids: integers(ort, ids.map((_, i) => read + i), [1, ids.length]),
          logit_places: integers(ort, [ids.length - 1], [1]),
          ...Object.fromEntries(past.map(([name, tensor]) => [`past_key_values.${name}`, tensor])),
        });
        past.forEach(([, tensor]) => tensor.dispose());
        past = this.names.map((name) => [name, outputs[`present.${name}`]]);
        read += ids.length;
        const logits = outputs.logits.data;
        let best = 0;
        for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
        if (settings.stops.includes(best)) return;
        yield best;
        ids = [best];
      }
    } finally {
      past.forEach(([, tensor]) => tensor.dispose());
    }
  }

  async embed(ids) {
    const { inputs_embeds: embeds } = await this.embed_tokens.run({ input_ids: integers(this.ort, ids, [1, ids.length]) });
    return embeds;
  }
}

/** The places of units that can be read at once: those of one size and one number of frames. */
function placesByShape(units) {
  const places = {};
  units.forEach(({ pieces, times }, place) => (places[[times.length, pieces[0].width, pieces[0].height]] ??= []).push(place));
  return Object.values(places);
}

/** Put features into the slots among the embeddings. */
function fill(embeds, ids, slot, features) {
  const width = embeds.dims[2];
  const places = ids.flatMap((id, place) => (id === slot ? [place] : []));
  const rows = features.flatMap((unit) => Array.from({ length: unit.length / width }, (_, i) => unit.subarray(i * width, (i + 1) * width)));
  if (places.length !== rows.length) throw new Error(`${places.length} slots for ${rows.length} features`);
  places.forEach((place, i) => embeds.data.set(rows[i], place * width));
}
