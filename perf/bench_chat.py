"""What a conversation costs, part by part, each beside the limit that the machine sets.

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
from pathlib import Path
from statistics import median

import torch
from bench_preprocessing import resize_only, synthetic_picture
from bench_tower import tower_flops
from transformers import AutoConfig, AutoModel, AutoProcessor, CompileConfig


REPOSITORY = Path(__file__).resolve().parents[1]
GREEDY = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0}
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


def build(size, device, dtype):
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
    """Measures, and prints a line for each measurement."""

    def __init__(self, model, processor, repeats):
        self.model, self.processor, self.repeats = model, processor, repeats
        self.device, self.dtype = model.device, model.dtype

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function):
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

    def line(self, what, value, limit, share, note=""):
        print(f"{what:42}{value:>22}{limit:>26}{share:>10}  {note}", flush=True)

    def rate(self, what, flops, seconds):
        """A line for arithmetic: its rate beside that of the product."""
        rate = flops / seconds
        self.line(what, f"{rate / 1e9:.0f} GFLOP/s", f"{self.product / 1e9:.0f} product", f"{rate / self.product:.0%}")

    # ---- limits ----

    def measure_limits(self):
        options = {"device": self.device, "dtype": self.dtype}
        left, right = torch.randn(2048, 1152, **options), torch.randn(1152, 4304, **options)
        out = torch.empty(2048, 4304, **options)
        self.product = 2 * left.shape[0] * right.numel() / self.seconds(lambda: torch.mm(left, right, out=out))
        block = torch.zeros(2**28 if self.device.type == "cpu" else 2**31, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(block)
        self.bandwidth = 2 * block.numel() / self.seconds(lambda: copy.copy_(block))
        print(f"limits: product {self.product / 1e9:.0f} GFLOP/s, copy {self.bandwidth / 1e9:.1f} GB/s")
        print(f"{'what':42}{'measured':>22}{'limit':>26}{'ratio':>10}")

    # ---- parts ----

    def parts(self, picture):
        images = self.processor.image_processor
        resizes = self.seconds(lambda: resize_only(images, [picture], MAX_SLICE_NUMS))
        everything = self.seconds(lambda: images.slice_to_patches(picture, MAX_SLICE_NUMS))
        self.line(
            f"preprocessing {picture.width}x{picture.height}",
            f"{everything * 1e3:.1f} ms",
            f"{resizes * 1e3:.1f} ms Pillow resizes",
            f"{everything / resizes:.2f}",
        )
        sliced = images.slice_to_patches(picture, MAX_SLICE_NUMS)
        slices = [pixels.to(self.device, self.dtype) for pixels in sliced.pixel_values]
        sizes, patches = sliced.tgt_sizes, [rows * columns for rows, columns in sliced.tgt_sizes]
        model, vision = self.model, self.model.config.vision_config
        flops = sum(tower_flops(vision, count, 1) for count in patches)
        name = f"tower, {len(slices)} slices, {sum(patches)} patches"
        self.rate(name, flops, self.seconds(lambda: model.vpm(slices, sizes)))
        hidden = model.vpm(slices, sizes).last_hidden_state
        width, queries = model.config.hidden_size, model.config.query_num
        a_patch = 2 * vision.hidden_size * width + 4 * width**2 + 4 * queries * width
        flops = sum(patches) * a_patch + len(slices) * queries * 4 * width**2
        units = [[-1]] * len(slices)
        self.rate("resampler", flops, self.seconds(lambda: model.resampler(hidden, sizes, units)))

    def turns(self, picture):
        """Time to the first token in a session: a picture, then four short questions."""
        questions = [[picture, "What is in this picture?"], *["And what else is there to see?"] * 4]
        options = {"max_slice_nums": MAX_SLICE_NUMS, "max_new_tokens": 16, "min_new_tokens": 16, **GREEDY}
        times = [[] for _ in questions]
        for _ in range(self.repeats + 1):
            session = self.model.start_chat(self.processor, **options)
            for turn, question in enumerate(questions):
                times[turn].append(session.send(question).timings["first_token"])
        first, *others = (median(turn[1:]) for turn in times)
        self.line("first token, turn 1", f"{first * 1e3:.1f} ms", "", "")
        for turn, seconds in enumerate(others, start=2):
            self.line(
                f"first token, turn {turn}",
                f"{seconds * 1e3:.1f} ms",
                "15 % of turn 1 wanted",
                f"{seconds / first:.1%}",
            )

    # ---- decoding ----

    def decode(self, picture, new, batch=1, **options):
        """Tokens a second of all conversations of a batch, without the time to their first tokens."""
        contents = [[picture, "Describe it." + " Please." * row] for row in range(batch)]  # of unequal length
        messages = [[{"role": "user", "content": content}] for content in contents]
        prompts = {"msgs": messages, "processor": self.processor, "return_dict": True, "max_slice_nums": 1, **GREEDY}

        def run():
            output = self.model.chat(**prompts, max_new_tokens=new, min_new_tokens=new, **options)[0]
            rates.append(batch * (new - 1) / (output.timings["total"] - output.timings["first_token"]))

        rates = []
        for _ in range(self.repeats + 1):
            run()
        weights = sum(p.numel() * p.element_size() for p in self.model.llm.model.layers.parameters())
        weights += self.model.llm.lm_head.weight.numel() * self.model.llm.lm_head.weight.element_size()
        limit, rate = batch * self.bandwidth / weights, median(rates[1:])
        name = ", ".join(["decoding", f"batch {batch}", *(str(getattr(o, "backend", o)) for o in options.values())])
        self.line(name, f"{rate:.1f} tokens/s", f"{limit:.0f} at copy's rate", f"{rate / limit:.0%}")

    def video(self):
        options = {"fps": 5, "max_num_packing": 6, "force_packing": 6}
        video = self.processor.video_processor
        clip = video.preprocess(CLIP, return_metadata=True, **options)
        (report,) = clip["video_metadata"]
        frames = len(report.frames_indices)

        def read():
            clip = video.preprocess(CLIP, **options)
            pixels = [part.to(self.device) for part in clip["pixel_values"][0]]
            self.model.get_image_features([pixels], clip["tgt_sizes"], clip["temporal_ids"])

        pictures = video.sample_video(CLIP, **options).frames
        resizes = self.seconds(lambda: resize_only(video, pictures, None))
        arithmetic = sum(
            tower_flops(self.model.config.vision_config, int(size.prod()), 1) for size in clip["tgt_sizes"][0]
        )
        limit = frames / (resizes + arithmetic / self.product)
        rate = frames / self.seconds(read)
        note = f"{frames} frames in, {report.num_tokens} tokens out: {report.num_tokens / frames:.1f} a frame"
        self.line(
            "video: decode, cut, encode",
            f"{rate:.1f} frames/s",
            f"{limit:.1f} resizes + product",
            f"{rate / limit:.0%}",
            note,
        )

    def memory(self):
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        note = (
            ""
            if self.device.type == "cuda"
            else "of the whole process: libraries and the blocks of this benchmark too"
        )
        self.line(
            "peak memory",
            f"{peak / 2**20:.0f} MiB",
            f"{weights / 2**20:.0f} MiB weights",
            f"{peak / weights:.2f}",
            note,
        )


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("nano", "small", "8b"), default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--compile", action="store_true", help="also decode with a static cache and torch.compile")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    model, processor = build(arguments.size, arguments.device, dtype)
    bench = Bench(model, processor, arguments.repeats)
    print(
        f"{arguments.size}, {dtype}, {arguments.device}, {torch.get_num_threads()} threads; medians of {arguments.repeats}"
    )
    bench.measure_limits()
    side = processor.image_processor.scale_resolution * 3
    picture = synthetic_picture(side, side, 0)  # 9 slices and the overview
    bench.parts(picture)
    bench.turns(picture)
    bench.decode(picture, arguments.new_tokens)
    bench.decode(picture, arguments.new_tokens, batch=8)
    bench.decode(picture, arguments.new_tokens, cache_implementation="static")
    if arguments.compile:
        config = CompileConfig()
        config._compile_all_devices = True  # the library compiles on accelerators only, unless asked
        bench.decode(picture, arguments.new_tokens, cache_implementation="static", compile_config=config)
    bench.video()
    bench.memory()


if __name__ == "__main__":
    main()
