"""All that one GPU can tell about the model at its full size, in one run of a few minutes and without a checkpoint.

    python perf/gpu.py --json gpu.json                  random weights, made on the GPU
    python perf/gpu.py --only decoding --minutes 2      sections by the beginning of their names
    python perf/gpu.py --tiny                           a tiny model on the CPU: does every section still run?

What is special:
- limits are measured in the same run: reading for decoding, which reads all weights of the language model for each token,
  and the rate of matrix products for what is arithmetic;
- sections run in the order of their worth, and one that would not end in time is left out; one that fails is reported
  and the others go on; the JSON file is written anew after each figure;
- "one step alone" is a decoding step in eager mode, captured once as a CUDA graph and replayed: what its kernels take. What
  `generate` takes more is Python's.
"""

import argparse
import copy
import gc
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from bench_preprocessing import synthetic_image
from bench_tower import tower_flops
from measurement import Measurement, heading
from random_weights import build, bytes_read
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoProcessor, CompileConfig, StaticCache, StoppingCriteria, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "torchao")
PROBED = (1, 8)  # conversations at once
VARLEN = "torch_flash_varlen"
KERNELS: dict[str, tuple[str, SDPBackend | None]] = {  # of the tower: attn_implementation, and what SDPA may take
    "sdpa": ("sdpa", None),
    "sdpa, flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "sdpa, cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "sdpa, memory-efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
    "flash, all slices at once": (VARLEN, None),
    "flex": ("flex_attention", None),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured. A tiny one measures nothing worth knowing, and shows in seconds that everything runs."""

    folder: Path  # of the configuration and the processor
    layers: int | None = None  # of language model and tower each, in place of those of the configuration
    new_tokens: int = 72
    warm_up: int = 8  # of the new tokens; a compiled step warms up, is recorded, then replayed
    repeats: int = 3
    frames: int = 60
    frame_size: tuple[int, int] = (640, 360)
    image_slices: int = 9
    slices: int = 16  # what the model gives its tower at a time
    new_slices: int = 10  # of one size: nine and the overview
    answer_words: int = 300  # that a training row learns
    product: int = 8192
    block: int = 2**30  # float32 values that are read and copied


FULL = Scale(REPOSITORY)
TINY = Scale(REPOSITORY / "nano", 1, 4, 2, 1, 6, (64, 48), 1, 2, 2, 5, 128, 2**18)


class StepClock(StoppingCriteria):
    """Seconds from the `first` new token to the `last`, both computed."""

    def __init__(self, bench: "Bench", first: int, last: int):
        self.bench, self.first, self.last, self.count, self.times = bench, first, last, 0, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.count += 1
        if self.count in (self.first, self.last):
            self.bench.wait()
            self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TrainingClock(TrainerCallback):
    """Seconds of each training step."""

    def __init__(self, bench: "Bench"):
        self.bench, self.seconds = bench, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.bench.wait()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.bench.wait()
        self.seconds.append(time.perf_counter() - self.start)


def varlen_flash(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """torch's own flash attention over packed slices [1, H, patches, d], as transformers calls a kernel."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    cu_seqlens, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling)[None], None


class Bench:
    """Measures part by part; prints each figure and writes all so far."""

    def __init__(self, scale: Scale, device: torch.device, minutes: float, file: Path | None):
        self.scale, self.device, self.file = scale, device, file
        self.is_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.end = time.perf_counter() + 60 * minutes
        self.processor = AutoProcessor.from_pretrained(scale.folder, trust_remote_code=True)
        self.measured: list[Measurement] = []
        self.failed: dict[str, str] = {}
        self.left_out: list[str] = []
        self.seconds_of: dict[str, float] = {}
        self.bandwidth = self.product = self.tower_product = 0.0
        self._model: Any = None
        self._weights = ""

    # ---- figures ----

    def add(
        self, name: str, value: float, unit: str, limit: float | None = None, of: str = "", note: str = ""
    ) -> None:
        self.measured.append(Measurement(name, value, unit, limit, of, note))
        print(self.measured[-1], flush=True)
        self.write()

    def write(self) -> None:
        if self.file is None:
            return
        entries = [asdict(measurement) | {"ratio": measurement.ratio} for measurement in self.measured]
        found = {"machine": machine(self.device), "measured": entries, "failed": self.failed}
        found |= {"left out": self.left_out, "seconds": self.seconds_of}
        self.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails inside is reported, and the run goes on."""
        try:
            yield
        except Exception as error:  # of whatever kind: libraries, compilers, the driver
            self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(f"{name:42} failed: {self.failed[name]}", flush=True)
            self.write()

    def run(self, sections: Sequence[tuple[str, float, Callable[[], None]]]) -> None:
        """Run `(name, about how many seconds, function)`, each if there is time."""
        for name, needed, function in sections:
            left = self.end - time.perf_counter()
            if self.is_gpu and left < needed:
                self.left_out.append(name)
                print(f"{name:42} left out: {left:.0f} s are left, and it takes about {needed:.0f}", flush=True)
                continue
            start = time.perf_counter()
            with self.part(name):
                function()
            self.free()
            self.seconds_of[name] = round(time.perf_counter() - start, 1)
            self.write()

    # ---- clock and memory ----

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], calls: int = 1) -> float:
        """Median seconds of a call; the first one does not count. A time is taken over so many calls."""
        function()
        times = []
        for _ in range(self.scale.repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            self.wait()
            times.append((time.perf_counter() - start) / calls)
        return median(times)

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call, whatever it prepares included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def free(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def start_of_peak(self) -> None:
        self.free()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()

    def add_peak(self, name: str, model: Any) -> None:
        """Most GPU memory since `start_of_peak`, the weights included."""
        if self.is_gpu:
            weights = bytes_read(model) / 2**30
            self.add(f"memory: {name}", torch.cuda.max_memory_allocated() / 2**30, "GiB", weights, "weights")

    def model(self, weights: str) -> Any:
        """The model with random weights of a kind of `random_weights.KINDS`. Only one is kept."""
        if self._weights != weights:
            self.drop_model()
            start = time.perf_counter()
            self._model = build(self.scale.folder, weights, self.device, self.dtype, self.scale.layers)
            self._weights = weights
            self.wait()
            print(f"({weights}: made in {time.perf_counter() - start:.1f} s)", flush=True)
        return self._model

    def drop_model(self) -> None:
        self._model, self._weights = None, ""
        torch.compiler.reset()
        self.free()

    # ---- limits ----

    def limits(self) -> None:
        block = torch.ones(self.scale.block, device=self.device)
        other, size = torch.empty_like(block), block.numel() * block.element_size()
        copying = 2 * size / self.seconds(lambda: other.copy_(block), 5)
        reading = size / self.seconds(block.sum, 5)
        self.bandwidth = max(copying, reading)
        self.add("limit: copy", copying / 1e9, "GB/s", note="bytes read and written")
        self.add("limit: sum", reading / 1e9, "GB/s")
        self.product = self.rate_of_product(self.scale.product, self.scale.product, self.scale.product)
        self.add("limit: matrix product", self.product / 1e12, "TFLOP/s", note=f"{self.scale.product} x 3")
        shape = (1024 * self.scale.slices, 1152, 4304) if self.is_gpu else (128, 192, 576)
        self.tower_product = self.rate_of_product(*shape)
        note = " x ".join(map(str, shape))
        self.add("limit: matrix product of the tower", self.tower_product / 1e12, "TFLOP/s", note=note)

    def rate_of_product(self, rows: int, inner: int, columns: int) -> float:
        left, right = (
            torch.randn(*s, device=self.device, dtype=self.dtype) for s in ((rows, inner), (inner, columns))
        )
        return 2 * rows * inner * columns / self.seconds(lambda: left @ right, 10)

    # ---- decoding ----

    def image(self) -> Any:
        """One that is cut into `image_slices` slices, a square number, and read as a whole too where they are several."""
        side = math.isqrt(self.scale.image_slices) * self.processor.image_processor.scale_resolution
        return synthetic_image(side, side, 0)

    def prompt(self, model: Any, batch: int) -> dict[str, Any]:
        """A question about an image in slices for `generate`, `batch` times; the image is already read."""
        messages = [{"role": "user", "content": [{"type": "image", "image": self.image()}, "Describe it."]}]
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            max_slice_nums=self.scale.image_slices,
        )
        visual = {name: inputs[name] for name in ("pixel_values", "tgt_sizes", "temporal_ids") if name in inputs}
        with torch.no_grad():
            features = model.get_image_features(**visual).pooler_output
        ids = inputs["input_ids"].to(self.device).repeat(batch, 1)
        features = features.repeat(batch, 1, 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_encoder_outputs": {"image": features},
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        }

    def static_cache(self, model: Any, batch: int, length: int) -> StaticCache:
        config = model.config
        cache = StaticCache(config=config, max_cache_len=-(-length // 64) * 64)
        shape = (batch, config.num_key_value_heads, config.head_dim)
        cache.early_initialization(*shape, self.dtype, self.device)
        return cache

    def decode(self, weights: str, cache_kind: str, batch: int, config: CompileConfig | None = None) -> None:
        """Tokens a second of `generate`, without the prompt and the first tokens; compiled with `config`."""
        model, new, first = self.model(weights), self.scale.new_tokens, self.scale.warm_up
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        self.start_of_peak()
        options |= self.prompt(model, batch)
        if cache_kind != "dynamic":
            length = options["input_ids"].shape[1]
            options["past_key_values"] = self.static_cache(model, batch, length + new)
            options |= {"disable_compile": True} if config is None else {"compile_config": config}
        rates, calls = [], []
        for _ in range(max(2, self.scale.repeats)):
            if "past_key_values" in options:
                options["past_key_values"].reset()
            clock, start = StepClock(self, first, new), time.perf_counter()
            model.generate(**options, stopping_criteria=[clock])
            calls.append(time.perf_counter() - start)
            rates.append(batch * (new - first) / (clock.times[1] - clock.times[0]))
        name = f"{weights}, batch {batch}, {cache_kind} cache{', compiled' if config else ''}"
        limit = batch * self.bandwidth / bytes_read(model.llm.model.layers, model.llm.lm_head)
        note = f"after {options['input_ids'].shape[1]} tokens"
        if config:
            self.add(f"compiling: {name}", calls[0] - median(calls[1:]), "s", note=compiler_note())
        self.add(f"decoding: {name}", median(rates[1:]), "tokens/s", limit, "weights read", note)
        if config:
            self.compiled_step(f"decoding: {name}, step alone", model, options, batch, limit)
        if cache_kind == "dynamic":
            self.add_peak(f"decoding, {weights}, batch {batch}", model)

    def step(self, weights: str, batch: int) -> None:
        """Tokens a second if nothing but the kernels of a step took time."""
        model = self.model(weights)
        length = self.scale.new_tokens + 10 * model.config.query_num
        cache = self.static_cache(model, batch, length)
        room = cache.layers[0].max_cache_len
        whole = torch.ones(batch, 1, 1, room, dtype=torch.bool, device=self.device)
        column = torch.ones(batch, 1, dtype=torch.long, device=self.device)

        @torch.no_grad()
        def advance() -> None:
            model(input_ids=column, attention_mask=whole, position_ids=column, past_key_values=cache, use_cache=True)

        replay = self.captured(advance)
        steps = min(16, room // (2 + self.scale.repeats) - 1)
        cache.reset()  # each step, also a replayed one, goes a place further
        seconds = self.seconds(replay, steps)
        limit = batch * self.bandwidth / bytes_read(model.llm.model.layers, model.llm.lm_head)
        name = f"decoding: {weights}, batch {batch}, one step alone"
        self.add(name, batch / seconds, "tokens/s", limit, "weights read", f"{room} places in the cache")

    def compiled_step(self, name: str, model: Any, options: dict[str, Any], batch: int, limit: float) -> None:
        """The compiled step that `generate` called, called again and again with what it was given last."""
        step, given = model._compiled_call, {}

        def record(**arguments: Any) -> Any:
            given.update(arguments)
            return step(**arguments)

        cache = options["past_key_values"]
        cache.reset()
        with patch.object(model, "_compiled_call", record):
            model.generate(**options)
        cache.reset()
        steps = min(16, cache.layers[0].max_cache_len // (2 + self.scale.repeats) - 1)
        with torch.no_grad():
            self.add(name, batch / self.seconds(lambda: step(**given), steps), "tokens/s", limit, "weights read")

    def captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function as a CUDA graph; on a CPU, the function."""
        if not self.is_gpu:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def decodings(self, weights: str, caches: Sequence[str]) -> None:
        """All ways that need no compiler, with these kinds of cache."""
        for batch in PROBED:
            with self.part(f"one step alone, {weights}, batch {batch}"):
                self.step(weights, batch)
            for cache_kind in caches:
                with self.part(f"decoding, {weights}, batch {batch}, {cache_kind}"):
                    self.decode(weights, cache_kind, batch)

    def compiled(self, weights: str, batch: int, is_tuned: bool = False) -> None:
        """transformers' own compilation of a step; tuned, the compiler also writes and tries products of its own."""
        if not self.is_gpu:
            config = CompileConfig(backend="eager", mode="default", dynamic=False)
            config._compile_all_devices = True  # the library compiles on accelerators only, unless asked
        elif is_tuned:
            options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
            config = CompileConfig(mode=None, options=options, dynamic=False)
        else:
            config = CompileConfig(dynamic=False)  # "reduce-overhead": CUDA graphs
        self.decode(weights, "static, tuned" if is_tuned else "static", batch, config)

    # ---- the first token ----

    def first_token(self) -> None:
        model, scale = self.model("bf16"), self.scale
        frames = [synthetic_image(*scale.frame_size, seed) for seed in range(scale.frames)]
        clip = {"type": "video", "video": frames}
        rate = {"fps": 3, "max_num_packing": 6, "force_packing": 6, "video_metadata": {"fps": 3}}
        asked: dict[str, tuple[Any, dict[str, Any]]] = {
            f"image in {scale.image_slices} slices": (self.image(), {"max_slice_nums": scale.image_slices}),
            f"{scale.frames} frames, packed by 6": (clip, rate),
        }
        for name, (media, options) in asked.items():
            messages = [{"role": "user", "content": [media, "What is it?"]}]
            options |= {"return_dict": True, "max_new_tokens": 2, "decoding": "greedy", "processor": self.processor}
            self.start_of_peak()
            outputs = [model.chat(msgs=messages, **options) for _ in range(1 + scale.repeats)]
            times = [output.timings for output in outputs[1:]]
            inputs, vision, first = (
                median(t[stage] for t in times) * 1e3 for stage in ("inputs", "vision", "first_token")
            )
            self.add(f"first token: {name}", first, "ms", note=f"a prompt of {outputs[0].prompt_tokens} tokens")
            self.add(f"first token: {name}, processor", inputs, "ms", first, "first token")
            self.add(f"first token: {name}, tower", vision - inputs, "ms", first, "first token", "and resampler")
            self.add(f"first token: {name}, prompt", first - vision, "ms", first, "first token")
            self.add_peak(name, model)

    # ---- the tower ----

    def tower(self, kernels: Sequence[str]) -> None:
        """Rate of each attention kernel, for equally and unequally large slices, and what it changes."""
        tower, count = self.model("bf16").vpm, self.scale.slices
        ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_flash)
        side = self.processor.image_processor.scale_resolution // 14
        equal, mixed = [(side, side)] * count, [(side - k % 2, side + k % 3) for k in range(count)]
        before, few = tower.config._attn_implementation, mixed[:4]
        exact = copy.deepcopy(tower).float()
        pixels = self.pixels(few)
        with torch.no_grad():
            expected = exact(pixels, few).last_hidden_state
        del exact
        for kernel in kernels:
            implementation, backend = KERNELS[kernel]
            with self.part(f"tower, {kernel}"), torch.no_grad():
                tower.config._attn_implementation = implementation  # the setter wants flash-attn behind such a name
                with nullcontext() if backend is None else sdpa_kernel(backend):
                    found = tower(pixels, few).last_hidden_state.float()
                    self.rate_of_tower(f"tower: {kernel}, {count} equal slices", tower, equal)
                    self.rate_of_tower(f"tower: {kernel}, {count} unequal slices", tower, mixed)
                error = (found - expected).abs().max().item()
                relative = ((found - expected).norm() / expected.norm()).item()
                largest = expected.abs().max().item()
                note = f"at most, of values up to {largest:.1f}; relative {relative:.1e}"
                self.add(f"tower: {kernel}, from float32", error * 1e3, "x 0.001", note=note)
        tower.config._attn_implementation = before

    def pixels(self, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        random = torch.Generator(self.device).manual_seed(0)
        shapes = [(3, 14, 14 * rows * columns) for rows, columns in sizes]
        return [torch.randn(*s, device=self.device, dtype=self.dtype, generator=random) for s in shapes]

    def rate_of_tower(self, name: str, tower: Any, sizes: Sequence[tuple[int, int]]) -> None:
        pixels = self.pixels(sizes)
        flops = sum(tower_flops(tower.config, rows * columns, 1) for rows, columns in sizes)
        seconds = self.seconds(lambda: tower(pixels, sizes), 2)
        note = f"{seconds * 1e3:.1f} ms"
        self.add(name, flops / seconds / 1e12, "TFLOP/s", self.tower_product / 1e12, "product", note)

    # ---- a size that is new ----

    def new_sizes(self) -> None:
        """The first call at a size beside the next one at the same size, with cuDNN's attention among torch's kernels, as by
        default, and without."""
        model, count, repeats = self.model("bf16"), self.scale.new_slices, self.scale.repeats
        side = self.processor.image_processor.scale_resolution // 14

        def slices(place: int) -> Callable[[], object]:
            sizes = [(side - 1 - place, side)] * count
            pixels = self.pixels(sizes)
            return lambda: model.vpm(pixels, sizes)

        def prompt(place: int) -> Callable[[], object]:
            ids = torch.full((1, 9 * model.config.query_num + 7 * place + 1), 1000, device=self.device)
            return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

        was_on = torch.backends.cuda.cudnn_sdp_enabled()
        for what, call_at in {f"{count} slices in the tower": slices, "a prompt": prompt}.items():
            times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for place in range(2 * (1 + repeats)):  # no size twice: other libraries remember sizes, too
                has_cudnn = place % 2 == 0
                torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
                call = call_at(place)
                with torch.no_grad():
                    times[has_cudnn].append((self.once(call), self.once(call)))
            torch.backends.cuda.enable_cudnn_sdp(was_on)
            for has_cudnn, found in times.items():
                first, known = (median(column) * 1e3 for column in zip(*found[1:], strict=True))
                name = f"new size: {what}, {'with' if has_cudnn else 'without'} cuDNN"
                longest = max(seconds for seconds, _ in found[1:]) * 1e3
                self.add(name, first, "ms", known, "at a known size", f"at most {longest:.0f} ms")

    # ---- training ----

    def training(self, adapter: str, batch: int = 2) -> None:
        """Steps of `minicpmv train sft` on conversations about an image in slices."""
        from minicpmv.train import sft
        from minicpmv.train.common import arguments, loading

        weights, warm_up = "nf4" if adapter == "qlora" else "bf16", 2
        kept: list[Any] = []

        def load(**settings: Any) -> Any:
            kept.append(self.model(weights).train())
            return kept[0]

        with tempfile.TemporaryDirectory() as folder:
            self.image().save(Path(folder) / "image.png")
            row = [{"role": "user", "content": "<image>\nDescribe it."}]
            row += [{"role": "assistant", "content": "word " * self.scale.answer_words}]
            line = json.dumps({"image": "image.png", "messages": row})
            (Path(folder) / "rows.jsonl").write_text(f"{line}\n" * batch, encoding="utf-8")
            options = {
                "model_name_or_path": self.scale.folder,
                "adapter": adapter,
                "dataset_name": Path(folder) / "rows.jsonl",
                "output_dir": Path(folder) / "run",
                "max_steps": warm_up + self.scale.repeats,
                "per_device_train_batch_size": batch,
                "learning_rate": 1e-5,
                "gradient_checkpointing": True,
                "bf16": self.is_gpu,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            }
            loaded = patch.object(
                sft, "load_model_and_processor", partial(loading.load_model_and_processor, load=load)
            )
            with loaded:
                flags = [f"--{name}={value}" for name, value in options.items()]
                trainer = sft.make_trainer(*arguments.parse(sft.GROUPS, flags))
            clock = TrainingClock(self)
            trainer.add_callback(clock)
            self.start_of_peak()
            trainer.train()
            tokens = next(iter(trainer.get_train_dataloader()))["input_ids"].numel()
        multiplied = sum(math_weights(kept[0]).values())
        # Forward, forward again for the checkpoints, and gradients of activations; weights are frozen.
        limit = 3 * 2 * multiplied * tokens / self.product
        name = f"training: {adapter}, {batch} conversations"
        self.add(name, median(clock.seconds[warm_up:]), "s a step", limit, "product", f"{tokens} tokens")
        self.add_peak(name, kept[0])
        kept.clear()
        self.drop_model()  # adapters have changed it


def math_weights(model: Any) -> dict[str, int]:
    """Weights of the language model that multiply each token, by the name of their layer, whatever their type."""
    layers = {
        name: module for name, module in model.llm.named_modules() if name.endswith("_proj") or name == "lm_head"
    }
    return {name: layer.in_features * layer.out_features for name, layer in layers.items()}


def compiler_note() -> str:
    counters = torch._dynamo.utils.counters
    breaks, skips = sum(counters["graph_break"].values()), counters["inductor"]["cudagraph_skips"]
    return f"so far {counters['stats']['unique_graphs']} graphs, {breaks} breaks, {skips} without a CUDA graph"


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        found |= {"cuda": str(torch.version.cuda)}
    else:
        found["device"] = "cpu"
    return found


def main(arguments: Sequence[str] | None = None) -> Bench | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="begin no section that would end later")
    parser.add_argument("--only", nargs="+", default=[""], help="sections, by the beginning of their names")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("No GPU here, so nothing to measure; --tiny tries every section on the CPU.")
        return None
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    bench = Bench(TINY if options.tiny else FULL, device, options.minutes, options.json)
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    print(heading(), flush=True)
    eager = [name for name in KERNELS if name != "flex"]
    sections: list[tuple[str, float, Callable[[], None]]] = [
        ("limits", 5, bench.limits),
        ("decoding bf16", 40, partial(bench.decodings, "bf16", ["dynamic", "static"])),
        ("first token", 15, bench.first_token),
        ("tower", 15, partial(bench.tower, eager)),
        ("new size", 10, bench.new_sizes),
        ("compiled bf16, batch 1", 60, partial(bench.compiled, "bf16", 1)),
        ("training with LoRA", 20, partial(bench.training, "lora")),
        ("decoding nf4", 30, partial(bench.decodings, "nf4", ["dynamic"])),
        ("training with QLoRA", 20, partial(bench.training, "qlora")),
        ("decoding int4", 25, partial(bench.decodings, "int4", ["dynamic"])),
        ("compiled int4, batch 1", 60, partial(bench.compiled, "int4", 1)),
        ("compiled bf16, batch 8", 60, partial(bench.compiled, "bf16", 8)),
        ("flex in the tower", 30, partial(bench.tower, ["flex"])),
        ("tuned bf16, batch 1", 120, partial(bench.compiled, "bf16", 1, is_tuned=True)),
        ("compiled int4, batch 8", 60, partial(bench.compiled, "int4", 8)),
    ]
    bench.run(
        [section for section in sections if section[0].startswith(tuple(options.only)) or section[0] == "limits"]
    )
    return bench


if __name__ == "__main__":
    main()
