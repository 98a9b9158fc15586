"""What a conversation costs, part by part, each next to the limit that the machine sets.

    python perf/bench_chat.py                                     nano, on the CPU
    python perf/bench_chat.py --size 8b --device cuda             full size, random weights built in place
    python perf/bench_chat.py --size small --dtype bfloat16       0.5 billion parameters, for a CPU

Limits are measured in the same run: Pillow's resizes for preprocessing, the rate of one large matrix product for what is
arithmetic, the rate of one large copy for decoding, which reads all weights of the language model for each token. A limit
that cannot be reached (a small model waits for Python, not for memory) is printed all the same. Figures are medians of
`--repeats` runs. The first token is timed from the call of `send` or `chat`, preprocessing included.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_preprocessing import resize_only, synthetic_image
from bench_tower import tower_flops
from measurement import Measurement, heading, write_json
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, CompileConfig

from minicpmv.chat import ChatSession


REPOSITORY = Path(__file__).resolve().parents[1]
GREEDY = {"decoding": "greedy"}
MAX_SLICE_NUMS = 9  # the published setting, for nano too
CLIP = REPOSITORY / "assets" / "big_buck_bunny.mp4"
SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_window_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}


def build(size: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, processor): nano as it is, or random weights in the published layout."""
    folder = REPOSITORY / "nano" if size == "nano" else REPOSITORY
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if size == "nano":
        return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device).eval(), processor
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if size == "small":
        fields = {name: value for name, value in config.to_dict().items() if name != "layer_types"} | SMALL
        fields["vision_config"] |= SMALL_TOWER
        config = type(config)(**fields)
    with torch.device(device):
        return AutoModel.from_config(config, trust_remote_code=True, dtype=dtype).eval(), processor


class Bench:
    """Measures a model part by part; prints each measurement and keeps it in `measured`."""

    def __init__(self, model: Any, processor: Any, repeats: int):
        self.model, self.processor, self.repeats = model, processor, repeats
        self.device, self.dtype = model.device, model.dtype
        self.measured: list[Measurement] = []

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object]) -> float:
        """Median seconds of a call; the first one does not count."""
        function()
        times = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times)

    def add(
        self, name: str, value: float, unit: str, limit: float | None = None, of: str = "", note: str = ""
    ) -> None:
        self.measured.append(Measurement(name, value, unit, limit, of, note))
        print(self.measured[-1], flush=True)

    # ---- limits ----

    def limits(self) -> None:
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        left, right = torch.randn(2048, 1152, **options), torch.randn(1152, 4304, **options)
        out = torch.empty(2048, 4304, **options)
        self.product = 2 * left.shape[0] * right.numel() / self.seconds(lambda: torch.mm(left, right, out=out))
        block = torch.zeros(2**28 if self.device.type == "cpu" else 2**31, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(block)
        self.bandwidth = 2 * block.numel() / self.seconds(lambda: copy.copy_(block))
        self.add("limit: large matrix product", self.product / 1e9, "GFLOP/s")
        self.add("limit: large copy", self.bandwidth / 1e9, "GB/s")

    # ---- parts ----

    def parts(self, image: Image.Image) -> None:
        images = self.processor.image_processor
        resizes = self.seconds(lambda: resize_only(images, [image], MAX_SLICE_NUMS))
        everything = self.seconds(lambda: images.slice_all_to_patches([image], MAX_SLICE_NUMS)[0])
        self.add(
            f"preprocessing {image.width}x{image.height}", everything * 1e3, "ms", resizes * 1e3, "Pillow resizes"
        )
        sliced = images.slice_all_to_patches([image], MAX_SLICE_NUMS)[0]
        slices = [pixels.to(self.device, self.dtype) for pixels in sliced.pixel_values]
        sizes, patches = sliced.tgt_sizes, [rows * columns for rows, columns in sliced.tgt_sizes]
        model, vision = self.model, self.model.config.vision_config
        flops = sum(tower_flops(vision, count, 1) for count in patches)
        self.rate(f"tower, {len(slices)} slices", flops, lambda: model.vpm(slices, sizes))
        hidden = model.vpm(slices, sizes).last_hidden_state
        width, queries = model.config.hidden_size, model.config.query_num
        a_patch = 2 * vision.hidden_size * width + 4 * width**2 + 4 * queries * width
        flops = sum(patches) * a_patch + len(slices) * queries * 4 * width**2
        units = [[-1]] * len(slices)
        self.rate(f"resampler, {sum(patches)} patches", flops, lambda: model.resampler(hidden, sizes, units))

    def rate(self, name: str, flops: int, function: Callable[[], object]) -> None:
        """Arithmetic: its rate next to that of the product."""
        self.add(name, flops / self.seconds(function) / 1e9, "GFLOP/s", self.product / 1e9, "product")

    def turns(self, image: Image.Image) -> None:
        """Time to the first token in a session: an image, then four short questions."""
        questions = [[image, "What is in this image?"], *[["And what else is there to see?"]] * 4]
        options = {"max_slice_nums": MAX_SLICE_NUMS, "max_new_tokens": 16, "min_new_tokens": 16, **GREEDY}
        times: list[list[float]] = [[] for _ in questions]
        for _ in range(self.repeats + 1):
            session = ChatSession(self.model, self.processor, **options)
            for turn, question in enumerate(questions):
                times[turn].append(session.send(question).timings["first_token"])
        first, *others = (median(turn[1:]) * 1e3 for turn in times)
        self.add("first token, turn 1", first, "ms")
        for turn, milliseconds in enumerate(others, start=2):
            self.add(f"first token, turn {turn}", milliseconds, "ms", first, "turn 1", "at most 15 % wanted")

    # ---- decoding ----

    def decode(self, image: Image.Image, new: int, batch: int = 1, **options: Any) -> None:
        """Tokens a second of all conversations of a batch, without the time to their first tokens."""
        contents = [[image, "Describe it." + " Please." * row] for row in range(batch)]  # of unequal length
        messages = [[{"role": "user", "content": content}] for content in contents]
        prompts = {"msgs": messages, "processor": self.processor, "return_dict": True, "max_slice_nums": 1, **GREEDY}
        rates = []
        for _ in range(self.repeats + 1):
            outputs = self.model.chat(**prompts, max_new_tokens=new, min_new_tokens=new, **options)
            written = sum(output.generated_tokens - 1 for output in outputs)
            rates.append(written / (outputs[0].timings["total"] - outputs[0].timings["first_token"]))
        weights = sum(p.numel() * p.element_size() for p in self.model.llm.model.layers.parameters())
        weights += self.model.llm.lm_head.weight.numel() * self.model.llm.lm_head.weight.element_size()
        name = ", ".join(["decoding", f"batch {batch}", *(str(getattr(o, "backend", o)) for o in options.values())])
        limit = batch * self.bandwidth / weights
        self.add(name, median(rates[1:]), "tokens/s", limit, "at copy's rate", f"{written + batch} tokens")

    def video(self) -> None:
        options = {"fps": 5, "max_num_packing": 6, "force_packing": 6}
        video = self.processor.video_processor
        clip = video.preprocess(CLIP, return_metadata=True, **options)
        (report,) = clip["video_metadata"]
        count = len(report.frames_indices)

        def read() -> None:
            clip = video.preprocess(CLIP, **options)
            pixels = [part.to(self.device) for part in clip["pixel_values"][0]]
            self.model.get_image_features([pixels], clip["tgt_sizes"], clip["temporal_ids"])

        frames = video.sample_video(CLIP, **options).frames
        resizes = self.seconds(lambda: resize_only(video.image_processor, frames, 1))
        arithmetic = sum(
            tower_flops(self.model.config.vision_config, int(size.prod()), 1) for size in clip["tgt_sizes"][0]
        )
        limit = count / (resizes + arithmetic / self.product)
        note = f"{count} frames in, {report.num_tokens} tokens out"
        self.add(
            "video: decode, cut, encode", count / self.seconds(read), "frames/s", limit, "resizes + product", note
        )

    def memory(self) -> None:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if self.device.type == "cuda":
            peak, note = torch.cuda.max_memory_allocated(), ""
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            note = "of the whole process: libraries and the blocks of this benchmark too"
        self.add("peak memory", peak / 2**20, "MiB", weights / 2**20, "weights", note)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("nano", "small", "8b"), default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--compile", action="store_true", help="also decode with a static cache and torch.compile")
    parser.add_argument("--json", type=Path, default=None, help="also write the measurements to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    model, processor = build(options.size, options.device, dtype)
    bench = Bench(model, processor, options.repeats)
    print(
        f"{options.size}, {dtype}, {options.device}, {torch.get_num_threads()} threads; medians of {options.repeats}"
    )
    print(heading())
    bench.limits()
    side = processor.image_processor.scale_resolution * 3
    image = synthetic_image(side, side, 0)  # 9 slices and the overview
    bench.parts(image)
    bench.turns(image)
    bench.decode(image, options.new_tokens)
    bench.decode(image, options.new_tokens, batch=8)
    bench.decode(image, options.new_tokens, cache_implementation="static")
    bench.decode(image, options.new_tokens, batch=8, cache_implementation="static")
    if options.compile:
        config = CompileConfig()
        config._compile_all_devices = True  # the library compiles on accelerators only, unless asked
        bench.decode(image, options.new_tokens, cache_implementation="static", compile_config=config)
    bench.video()
    bench.memory()
    if options.json:
        write_json(bench.measured, options.json)
    return bench.measured


if __name__ == "__main__":
    main()
