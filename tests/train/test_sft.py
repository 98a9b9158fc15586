"""Supervised fine-tuning: it learns, saves what it learnt, goes on after a kill, and refuses what cannot work."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image
from transformers import AutoModel, AutoProcessor


pytest.importorskip("trl")

from peft import AutoPeftModelForCausalLM

from minicpmv.checkpoint import CheckpointError
from minicpmv.data.collator import ConversationCollator, ConversationTooLongError
from minicpmv.data.formats import DataError
from minicpmv.train import merge, sft
from minicpmv.train.common import arguments, loading
from minicpmv.train.common.checkpoints import checkpoint_to_resume


NANO = REPOSITORY / "nano"
ASSETS = REPOSITORY / "assets"
QUICK = {
    "model_name_or_path": NANO,
    "image_folder": ASSETS,
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def conversation(answer, question="What is this?", **part):
    media = [part] if part else []
    content = [*media, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


SHAPES = conversation("2", "How many shapes are there?", type="image", image="shapes.jpg")
NUMBER = conversation("It is 47.", type="image", image="number.jpg")
STAR = conversation("It moves.", type="video", video="star.mp4")
TEXT = conversation("nano", "Who are you?")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # SFTTrainer reports its use


def flags(tmp_path, rows=(SHAPES,), **options):
    """The command line of a quick run on nano in `tmp_path`."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset_name": data, "output_dir": tmp_path / "output", **QUICK, **options}
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def run(tmp_path, rows=(SHAPES,), **options):
    return sft.train(*arguments.parse(sft.GROUPS, flags(tmp_path, rows, **options)))


def logged(folder, name):
    with (folder / "log.csv").open() as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == name}


def load(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def logits_of(model):
    _, processor = load(NANO)
    content = [{"type": "image", "image": str(ASSETS / "shapes.jpg")}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def changed_parts(trainer):
    """Names of the parts whose weights are not nano's any more."""
    before = dict(AutoModel.from_pretrained(NANO, trust_remote_code=True).named_parameters())
    after = dict(trainer.model.named_parameters())
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# ---- it learns ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "thinking"),
    [
        (NUMBER, False),
        (STAR | {"max_num_packing": 6, "force_packing": 3}, False),
        (TEXT, False),
        (conversation("<think>\nTwo more than two.\n</think>\n\n4", "How much is 2 and 2?"), True),
    ],
    ids=["picture", "packed_video", "text", "thinking"],
)
def test_one_sample_is_learnt_to_zero_loss_and_the_saved_model_says_it(tmp_path, row, thinking):
    trainer = run(tmp_path, [row], max_steps=25)
    losses = logged(tmp_path / "output", "loss")
    assert losses[1] > 1 and losses[25] < 0.01
    model, processor = load(tmp_path / "output")
    assert "output" in type(model).__module__ and "output" in type(processor).__module__  # its own code, saved with it
    of_nano = load(NANO)[1]
    assert processor.chat_template == of_nano.chat_template
    assert processor.tokenizer.get_vocab() == of_nano.tokenizer.get_vocab()
    assert processor.tokenizer.im_id_start_id == of_nano.tokenizer.im_id_start_id
    question, answer = row["messages"]
    options = {name: row[name] for name in ("max_num_packing", "force_packing") if name in row}
    question = json.loads(json.dumps(question).replace('"number.jpg"', f'"{ASSETS / "number.jpg"}"'))
    question = json.loads(json.dumps(question).replace('"star.mp4"', f'"{ASSETS / "star.mp4"}"'))
    inputs = processor.apply_chat_template(
        [question],
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    assert ("temporal_ids" in inputs) == bool(options)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ("<think>\n" * thinking + said).replace("<think>\n<think>\n", "<think>\n") == answer["content"]
    assert trainer.state.global_step == 25


def test_evaluation_loss_is_the_mean_over_the_answers_tokens(tmp_path):
    """With pictures, with text alone, and with both in one batch."""
    rows = [SHAPES, TEXT, NUMBER]
    trainer = run(tmp_path, rows, max_steps=1, eval_dataset_name=tmp_path / "rows.jsonl", per_device_eval_batch_size=2)
    trainer.model.eval()
    total = tokens = 0
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        learnt = batch["labels"][:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][learnt], batch["labels"][:, 1:][learnt])
        total, tokens = total + loss.item() * learnt.sum().item(), tokens + learnt.sum().item()
    by_batch = logged(tmp_path / "output", "eval_loss")[1]
    assert by_batch > 0
    pairs = [trainer.data_collator([trainer.eval_dataset[i] for i in batch]) for batch in ([0, 1], [2])]
    means = [trainer.model(**pair).loss.item() for pair in pairs]
    assert by_batch == pytest.approx((2 * means[0] + means[1]) / 3, rel=1e-4)  # Trainer weighs batches by samples
    assert total / tokens == pytest.approx(
        trainer.model(**trainer.data_collator(list(trainer.eval_dataset))).loss.item(), rel=1e-4
    )


def test_a_stream_trains_for_max_steps(tmp_path):
    trainer = run(tmp_path, [SHAPES, TEXT], dataset_streaming=True, max_steps=3)
    assert trainer.state.global_step == 3 and len(logged(tmp_path / "output", "loss")) == 3


def test_bfloat16_autocast_and_gradient_checkpointing_give_the_same_curve(tmp_path):
    curves = {}
    for name, options in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bfloat16": {"bf16": True},
    }.items():
        trainer = run(tmp_path, [NUMBER], output_dir=tmp_path / name, **options)
        curves[name] = [logged(tmp_path / name, measure) for measure in ("loss", "grad_norm")]
        layers = [*trainer.model.llm.model.layers, *trainer.model.vpm.encoder.layers]
        assert all(layer.gradient_checkpointing == (name == "checkpointing") for layer in layers)
    for plain, checkpointing, bfloat16 in zip(*curves.values(), strict=True):
        assert checkpointing == pytest.approx(plain, rel=1e-4)
        assert bfloat16 == pytest.approx(plain, rel=0.1) and bfloat16 != plain


def test_without_padding_the_curve_is_the_same(tmp_path):
    curves = []
    for padding_free in (False, True):
        output = tmp_path / str(padding_free)
        rows = [NUMBER, STAR | {"force_packing": 3}, TEXT, TEXT]
        trainer = run(tmp_path, rows, per_device_train_batch_size=3, padding_free=padding_free, output_dir=output)
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert ("attention_mask" in batch) == (not padding_free) and len(batch["input_ids"]) == (
            1 if padding_free else 4
        )
        curves.append([logged(output, measure) for measure in ("loss", "grad_norm")])
    for padded, joined in zip(*curves, strict=True):
        assert joined == pytest.approx(padded, rel=1e-3)


# ---- what trains ----


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"vpm", "resampler", "llm"}),
        ({"train_tower": False}, {"resampler", "llm"}),
        ({"train_tower": False, "train_llm": False}, {"resampler"}),
        ({"train_resampler": False, "train_llm": False}, {"vpm"}),
    ],
)
def test_only_the_named_parts_change(tmp_path, options, parts):
    assert changed_parts(run(tmp_path, max_steps=1, **options)) == parts


def test_each_part_has_its_own_learning_rate(tmp_path):
    rates = {"tower_learning_rate": 1e-5, "resampler_learning_rate": 1e-4}
    trainer = run(tmp_path, max_steps=1, weight_decay=0.1, **rates)
    found = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            found.setdefault(loading.part_of(name), set()).add(group["lr"])
            is_norm_or_bias = any(part in name for part in ("norm", ".ln_", "bias"))
            assert group["weight_decay"] == (0 if is_norm_or_bias else 0.1), name
    assert found == {"tower": {1e-5}, "resampler": {1e-4}, "llm": {1e-3}}
    assert names == {}  # nothing left out
    # Adam's first step is as long as the learning rate.
    before = AutoModel.from_pretrained(NANO, trust_remote_code=True)
    for name, rate in {"vpm.encoder.layers.0.mlp.fc1.bias": 1e-5, "resampler.query": 1e-4}.items():
        step = (trainer.model.get_parameter(name) - before.get_parameter(name)).abs().max().item()
        assert step == pytest.approx(rate, rel=0.2), name


def test_what_trains_is_float32_so_that_small_steps_count(tmp_path):
    trainer = run(
        tmp_path,
        adapter="lora",
        train_resampler=True,
        dtype="bfloat16",
        bf16=True,
        learning_rate=1e-6,
        max_steps=1,
    )
    types = {(parameter.requires_grad, parameter.dtype) for parameter in trainer.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    resampler = trainer.model.get_base_model().resampler
    before = resampler.original_module.proj.float()
    assert 0 < (resampler.modules_to_save["default"].proj - before).abs().max() < 2e-6


# ---- adapters ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "loha"])
def test_an_adapter_with_the_resampler_saves_loads_merges_saves_again_and_is_tuned_again(tmp_path, method):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    trainer = run(tmp_path, adapter=method, train_resampler=True)
    trained = logits_of(trainer.model)
    assert not torch.allclose(trained, logits_of(load(NANO)[0]), atol=0.1)
    saved = tmp_path / "output"
    assert {"adapter_model.safetensors", "processing_minicpmv.py", "tokenizer.json", "README.md"} <= {
        file.name for file in saved.iterdir()
    }
    merge.main([str(saved), str(tmp_path / "merged")])
    merged, processor = load(tmp_path / "merged")
    if method == "qlora":  # the adapter of a 4-bit model goes into the exact one
        trained = logits_of(AutoPeftModelForCausalLM.from_pretrained(saved, trust_remote_code=True))
        base = trainer.model.get_base_model()
        assert base.llm.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
        assert base.vpm.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32
    else:
        again = AutoPeftModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        assert torch.equal(logits_of(again), trained)
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-4, rtol=0)
    for part in (merged, processor):
        part.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")[0]), logits_of(merged))
    if method == "lora":
        assert torch.equal(logits_of(load(saved)[0]), trained)  # transformers' own loader (it loses the norms of DoRA)
        second = run(
            tmp_path,
            adapter="lora",
            train_resampler=True,
            model_name_or_path=tmp_path / "merged",
            output_dir=tmp_path / "second",
            learning_rate=1e-9,
            max_steps=1,
        )
        torch.testing.assert_close(logits_of(second.model), trained, atol=1e-3, rtol=0)
        merge.main([str(tmp_path / "second"), str(tmp_path / "twice")])
        torch.testing.assert_close(logits_of(load(tmp_path / "twice")[0]), trained, atol=1e-3, rtol=0)


def test_an_adapter_sits_in_the_language_model_alone(tmp_path):
    trainer = run(tmp_path, adapter="lora", max_steps=1)
    adapted = [name for name, _ in trainer.model.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * 7 * trainer.model.config.num_hidden_layers and all(
        ".llm.model.layers." in name for name in adapted
    )


# ---- it goes on ----


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(tmp_path, warm_python):
    rows = [SHAPES, NUMBER, TEXT, STAR]
    options = {
        "adapter": "lora",  # its dropout and the shuffling need the saved random states
        "train_resampler": True,
        "resampler_learning_rate": 1e-4,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    run(tmp_path, rows, output_dir=tmp_path / "whole", **options)
    killed = flags(tmp_path, rows, output_dir=tmp_path / "killed", resume_from_checkpoint="last", **options)
    program = (
        "import os, signal, sys\n"
        "from minicpmv.train import sft\n"
        "def kill(self, args, state, control, **_):\n"
        "    if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sft.LossCurves.on_step_begin = kill\n"
        "sft.main(sys.argv[1:])\n"
    )
    done = subprocess.run([warm_python, "-c", program, *killed], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(logged(tmp_path / "killed", "loss")) == [1, 2, 3, 4, 5]
    (tmp_path / "killed/checkpoint-6").mkdir()  # a checkpoint that was being written is passed over
    trainer = sft.train(*arguments.parse(sft.GROUPS, killed))
    assert trainer.state.global_step == 8
    for measure in ("loss", "grad_norm", "learning_rate"):
        assert logged(tmp_path / "killed", measure) == pytest.approx(logged(tmp_path / "whole", measure), rel=1e-5)
    assert torch.allclose(logits_of(load(tmp_path / "killed")[0]), logits_of(load(tmp_path / "whole")[0]), atol=1e-4)


def test_an_earlier_run_is_not_written_over(tmp_path):
    checkpoint = tmp_path / "output/checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    run_flags = flags(tmp_path, max_steps=1)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(arguments.ArgumentsError, match="resume_from_checkpoint: last"):
        sft.train(*arguments.parse(sft.GROUPS, run_flags))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The output folder of a run that saved after each of its two steps."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, adapter="lora", save_strategy="steps", save_steps=1)
    return folder / "output"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_run_resumes_from_the_newest_checkpoint_whose_files_are_all_whole(tmp_path, two_checkpoints, name, caplog):
    output = shutil.copytree(two_checkpoints, tmp_path / "output")
    (args,) = arguments.parse([sft.SFTArguments], ["--output_dir", str(output), "--resume_from_checkpoint", "last"])
    assert checkpoint_to_resume(args) == str(output / "checkpoint-2") and not caplog.text
    cut = output / "checkpoint-2" / name
    cut.write_bytes(cut.read_bytes()[:-100])
    assert checkpoint_to_resume(args) == str(output / "checkpoint-1")
    assert f"Resuming from {output / 'checkpoint-1'}" in caplog.text
    assert f"checkpoint-2 is not whole ({name} is damaged)" in caplog.text
    args.resume_from_checkpoint = str(output / "checkpoint-2")
    with pytest.raises(arguments.ArgumentsError, match=f"not a whole checkpoint: {name} is damaged"):
        checkpoint_to_resume(args)


def test_a_resume_point_that_is_no_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(arguments.ArgumentsError, match="not a whole checkpoint: trainer_state.json is missing"):
        run(tmp_path, resume_from_checkpoint=tmp_path)


# ---- several processes ----


# accelerate shards on accelerators only; on a CPU its own choice of back end is replaced.
SHARD_ON_CPU = """
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
"""


# DeepSpeed would compile its own exchange for processes of one machine; gloo does without.
GLOO_ALONE = """
import sys, deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # as an attribute, it is torch itself
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2", "zero3"])
def test_two_processes_one_without_pictures_train_as_one_process_does(tmp_path, warm_python, recipe):
    if recipe == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    rows = [SHAPES, TEXT, NUMBER, conversation("me", "Who?")]  # in turn to both processes: the second sees no picture
    options = {"eval_dataset_name": tmp_path / "rows.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    run(tmp_path, rows, per_device_train_batch_size=2, output_dir=tmp_path / "one", **options)
    program = tmp_path / "program.py"
    shard = {"fsdp2": SHARD_ON_CPU, "zero3": GLOO_ALONE}.get(recipe, "")
    program.write_text(f"{shard}\nimport sys\nfrom minicpmv.train import sft\nsft.main(sys.argv[1:])\n")
    if recipe == "fsdp2":
        options["use_cpu"] = False
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{recipe}.yaml"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", str(program)]
    done = subprocess.run(
        [warm_python, *launch, *flags(tmp_path, rows, output_dir=tmp_path / "two", **options)],
        cwd=REPOSITORY,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHON_EXEC": warm_python},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for measure in ("loss", "grad_norm", "eval_loss"):
        assert logged(tmp_path / "two", measure) == pytest.approx(logged(tmp_path / "one", measure), rel=1e-3)
    one, two = (load(tmp_path / name)[0] for name in ("one", "two"))
    for (name, expected), parameter in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize("mode", ["train", "frozen", "evaluate"])
def test_with_zero3_every_process_runs_the_tower_exactly_once(tmp_path, monkeypatch, mode):
    """Under ZeRO-3 a process that runs a module less often than the others makes them wait for ever."""
    model, processor = load(NANO)
    model.config.vision_batch_size = 1
    model.train(mode != "evaluate").requires_grad_(mode != "frozen")
    collator = ConversationCollator(processor)
    calls = []
    model.vpm.register_forward_hook(lambda *_: calls.append("tower"))
    model.resampler.register_forward_hook(lambda *_: calls.append("resampler"))
    both = {"messages": [*picture_row("shapes.jpg")["messages"], *picture_row("number.jpg")["messages"]]}
    monkeypatch.setattr(sys.modules[type(model).__module__], "is_deepspeed_zero3_enabled", lambda: True)
    for row in (both, TEXT):
        calls.clear()
        with torch.set_grad_enabled(mode != "evaluate"):
            assert torch.isfinite(model(**collator([row])).loss)
        assert calls == ["tower", "resampler"]


def picture_row(name):
    return conversation("yes", type="image", image=str(ASSETS / name))


# ---- what it leaves ----


def test_curves_and_card_tell_what_happened(tmp_path):
    trainer = run(tmp_path, [SHAPES, TEXT], adapter="lora", max_steps=3, eval_dataset_name=tmp_path / "rows.jsonl")
    output = tmp_path / "output"
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged(output, "loss") == {entry["step"]: entry["loss"] for entry in history}
    assert list(logged(output, "eval_loss")) == [3]  # without eval_strategy: once, at the end
    with Image.open(output / "curves.png") as picture:
        assert picture.width >= 800 and len(picture.convert("L").getcolors()) > 20
    card = (output / "README.md").read_text()
    assert "base_model" not in card and str(REPOSITORY) not in card  # a folder of this machine means nothing elsewhere
    assert f"| llm (LORA) | {sum(p.numel() for p in trainer.model.parameters() if p.requires_grad):,} |" in card
    assert f"eval_loss: {logged(output, 'eval_loss')[3]:.4g}" in card and "rows.jsonl" in card


# ---- it refuses ----


def test_weights_that_became_nan_are_not_saved_over_good_ones(tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"an earlier model")
    with pytest.raises(SystemExit) as stopped:
        sft.main(flags(tmp_path, learning_rate=1e38, max_steps=3, save_strategy="steps", save_steps=3))
    assert stopped.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"minicpmv: Step \d: .* hold NaN or infinite values, .*Lower learning_rate \(1e\+38\)", message)
    assert (output / "model.safetensors").read_bytes() == b"an earlier model"
    assert not list(output.glob("checkpoint-*"))


def test_a_run_without_a_model_is_refused_before_torch_is_imported(tmp_path):
    program = (
        "import sys\n"
        "from minicpmv.commands.main import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: rows.jsonl\n")
    for given, message in (
        (["--config", str(recipe)], "model_name_or_path is missing"),
        (["--config", str(recipe), "-m", str(NANO)], "rows.jsonl does not exist"),
        (["-m", "nowhere"], "nowhere is neither a folder"),
    ):
        command = [sys.executable, "-c", program, "train", "sft", *given]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_a_batch_without_a_label_is_an_error(tmp_path):
    """As where a template does not mark the assistant's text; loss 0 would look like success."""
    model = shutil.copytree(NANO, tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    assert "{%- generation" in template or "{% generation" in template
    for mark in ("generation", "endgeneration"):
        template = template.replace(f"{{%- {mark} %}}", "").replace(f"{{% {mark} %}}", "")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match="has a label"):
        run(tmp_path, model_name_or_path=model)


def test_a_long_sample_is_an_error_with_numbers(tmp_path):
    with pytest.raises(ConversationTooLongError, match="limit is 20"):
        run(tmp_path, max_length=20)


def test_a_bad_row_ends_the_command_with_its_number(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sft.main(flags(tmp_path, [TEXT, conversation("yes", type="image", image="gone.jpg")]))
    assert stopped.value.code == 1
    assert re.search("minicpmv: rows.jsonl, row 1: .*gone.jpg", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rnk": 8}, "no option --lora_rnk=8. Did you mean '--lora_r'"),
        ({"adapter": "lra"}, "Did you mean .*'lora'"),
        ({"adapter": "lora", "lora_r": "many"}, "invalid int value: 'many'"),
        ({"adapter": "lora", "lora_dropout": 1.5}, "lora_dropout 1.5"),
        ({"adapter": "loha", "lora_r": 8}, "adapter_options"),
        ({"adapter": "lora", "adapter_options": '{"use_rslorra": true}'}, "Did you mean 'use_rslora'"),
        ({"adapter": "lora", "adapter_options": "{"}, "not JSON"),
        ({"adapter": "prompt_tuning"}, "no adapter 'prompt_tuning'"),
        ({"adapter": "lora", "train_llm": True}, "Drop one of the two"),
        ({"modules_to_save": "vpm"}, "belongs to an adapter"),
        ({"train_llm": False, "train_resampler": False, "train_tower": False}, "Nothing would train"),
        ({"train_tower": False, "tower_learning_rate": 1e-5}, "train_tower is false"),
        ({"adapter": "lora", "tower_learning_rate": 1e-5}, "the tower is frozen"),
        ({"tower_learning_rate": -1}, "more than 0"),
        ({"model_name_or_path": "nowhere"}, "neither a folder nor"),
        ({"model_name_or_path": ASSETS}, "no config.json"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": None, "model_nam_or_path": NANO}, "Did you mean '--model_name_or_path'"),
        ({"dataset_name": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        ({"eval_dataset_name": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        ({"image_folder": "nowhere"}, "not a folder"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"eval_strategy": "steps"}, "nothing to evaluate on"),
        ({"dataset_streaming": True, "max_steps": -1}, "needs max_steps"),
        (
            {"dataset_name": REPOSITORY / "recipes/nano/pretraining.yaml", "max_steps": -1},
            "pretraining.yaml needs max_steps",
        ),
        ({"dataset_name": "nowhere/rows.yaml"}, "nowhere/rows.yaml does not exist"),
        ({"packing": True}, "packing belongs to TRL's own preparation of data"),
        ({"optim": "adamm"}, "adamm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_before_anything_loads(tmp_path, monkeypatch, capsys, options, message):
    for loader in ("load_model_and_processor", "load_data"):
        monkeypatch.setattr(sft, loader, lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit) as stopped:
        sft.main(flags(tmp_path, **options))
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minicpmv: ")]
    assert re.search(message, line), line


def test_qlora_without_bitsandbytes_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(arguments.ArgumentsError, match="pip install bitsandbytes"):
        arguments.AdapterArguments(adapter="qlora")


def test_the_code_of_a_hub_model_is_run_only_when_it_is_trusted():
    with pytest.raises(CheckpointError, match="trust it"):
        loading.load_model_and_processor(arguments.ModelArguments("owner/name"))


# ---- one file ----


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_sample_that_is_alone_in_its_batch_can_be_dropped(tmp_path, streaming):
    rows = [TEXT, conversation("nano " * 40, "Who?"), TEXT]
    trainer = run(tmp_path, rows, max_steps=3, on_too_long="drop", max_length=40, dataset_streaming=streaming)
    assert len(list(trainer.train_dataset)) == 2 and trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": "nobody/nothing", "trust_remote_code": True}, "nobody/nothing cannot be loaded"),
        ({"dataset_name": "nobody/nothing"}, "nobody/nothing cannot be loaded"),
        ({"dataset_name": "misspelt.yaml"}, "sampels"),
        ({"on_too_long": "drop", "max_length": 20}, "None of the 1 rows can be used"),
    ],
)
def test_what_cannot_be_loaded_or_learnt_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "misspelt.yaml").write_text("sampels: 6\n")
    if options.get("dataset_name") == "misspelt.yaml":
        options = {"dataset_name": tmp_path / "misspelt.yaml"}
    with pytest.raises(SystemExit) as stopped:
        sft.main(flags(tmp_path, **options))
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minicpmv: ")]
    assert message in line, line


def test_a_file_and_flags_say_the_same_and_a_flag_wins(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    options = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in QUICK.items()},
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "adapter": "lora",
        "learning_rate": "1e-5",  # YAML reads 1e-5 as text
        "target_modules": ["q_proj", "v_proj"],
        "adapter_options": {"use_rslora": True},
        "max_length": None,
        "report_to": [],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    model, adapter, _, data, training = arguments.parse(
        sft.GROUPS, ["--config", str(tmp_path / "run.yaml"), "--max_steps", "7"]
    )
    assert (training.max_steps, training.learning_rate, training.bf16) == (7, 1e-5, False)
    assert (model.model_name_or_path, data.dataset_name) == (str(NANO), options["dataset_name"])
    config = adapter.peft_config()
    assert config.use_rslora and set(config.target_modules) == {"q_proj", "v_proj"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_cpu_trains_in_the_type_that_it_is_fast_in_unless_told_otherwise(tmp_path, monkeypatch, fast):
    monkeypatch.setattr(arguments, "fast_type", lambda device: fast)
    command = [
        "--model_name_or_path",
        str(NANO),
        "--dataset_name",
        str(ASSETS / "conversations.jsonl"),
        "--output_dir",
        str(tmp_path),
    ]
    *_, training = arguments.parse(sft.GROUPS, command)
    assert training.bf16 == (fast is torch.bfloat16)
    *_, training = arguments.parse(sft.GROUPS, [*command, "--bf16=true"])
    assert training.bf16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", "no option 'lora_rnk'. Did you mean 'lora_r'"),
        ("model: {name: nano}", "no option 'model'"),
        ("learning_rate: {tower: 1.0e-5}", "takes no mapping"),
        ("learning_rate: [1, 2]", "takes one value"),
        ("max_steps: many", "invalid int value"),
        ("a: [", "is not YAML"),
        ("just text", "not a mapping"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(arguments.ArgumentsError, match=message):
        arguments.parse(sft.GROUPS, ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("sft_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_accepted(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    _model, adapter, *_ = arguments.parse(sft.GROUPS, ["--config", str(recipe)])
    assert adapter.adapter in recipe.stem or adapter.adapter == "none"


def test_merging_refuses_what_it_cannot_merge(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(NANO)})
    )
    judge = shutil.copytree(adapter, tmp_path / "judge")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(NANO), "modules_to_save": ["score"]}
    (judge / "adapter_config.json").write_text(json.dumps(config))
    for source, output, message in (
        (judge, tmp_path / "new", "adapter of a reward model"),
        (ASSETS, tmp_path / "new", "holds no adapter"),
        (adapter, NANO, "would be written over"),
        (adapter, adapter, "would be written over"),
    ):
        with pytest.raises(SystemExit):
            merge.main([str(source), str(output)])
        assert message in capsys.readouterr().err
