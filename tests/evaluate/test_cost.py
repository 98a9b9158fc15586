"""Time and memory of the full sizes: what the roofline says, and what it takes from a run."""

import json
from math import prod

import pytest
from conftest import REPOSITORY
from test_report import store_public_run
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate.cost import COMMON_COUNTS, H100, Share, Workload, estimate, parameters, workloads
from minicpmv.evaluate.data_sets.catalog import DATA_SETS
from minicpmv.evaluate.suite import Setting, VideoSetting
from minicpmv.evaluate.suites import GROUPS


SHORT = Workload("r", questions=100, units=10, prompt_tokens=800, tokens=10)


def test_the_parts_are_the_whole_checkpoint():
    shapes = json.loads((REPOSITORY / "minicpmv" / "checkpoint_shapes.json").read_text())
    sizes = parameters()
    parts = sum(sizes.values()) + sizes["head"] + 4096  # embeddings, and the last norm
    assert parts == sum(map(prod, shapes.values()))


def test_a_question_is_never_faster_than_the_limits_of_the_gpu():
    found = estimate(SHORT, batch=1, share=Share(1, 1))
    sizes = parameters()
    assert found.prompt >= 100 * 800 * 2 * sizes["layers"] / H100.flops
    assert found.tower >= 100 * 10 * 1024 * 2 * sizes["tower"] / H100.flops
    assert found.generation >= 100 * 10 * 2 * (sizes["layers"] + sizes["head"]) / H100.bandwidth
    assert found.memory >= 2 * sum(sizes.values())
    half = estimate(SHORT, batch=1, share=Share(0.5, 0.5))
    assert half.seconds == pytest.approx(2 * found.seconds) and half.memory == found.memory


def test_batches_share_the_weights_and_beams_and_runs_cost_their_number():
    one, many = estimate(SHORT, batch=1), estimate(SHORT, batch=32)
    assert many.generation < one.generation / 20 and many.memory > one.memory
    thrice = estimate(Workload("r", 100, 10, 800, 10, runs=3), batch=32)
    assert thrice.seconds == pytest.approx(3 * many.seconds)
    beams = estimate(Workload("r", 100, 10, 800, 10, beams=3), batch=32)
    assert many.generation < beams.generation < 3 * many.generation and beams.memory > many.memory


def test_packing_spares_tokens_of_the_prompt_and_not_the_tower():
    tight, loose = (
        workloads(["lvbench"], Setting(video=VideoSetting(max_num_frames=180, packings=(packing,))))[0]
        for packing in (6, 1)
    )
    assert tight.units == loose.units and tight.prompt_tokens < loose.prompt_tokens / 3


def test_every_row_of_every_group_has_a_size():
    assert all(DATA_SETS[name].rows is None for name in COMMON_COUNTS)
    for as_published in (False, True):
        rows = workloads(list(GROUPS["published"][0]), Setting(as_published=as_published))
        assert all(row.questions > 0 and row.prompt_tokens > 64 for row in rows)


def test_a_pilot_tells_the_tokens(tmp_path):
    run = store_public_run(tmp_path / "run")
    result = CliRunner().invoke(evaluate_app, ["cost", "mmstar", "--pilot", str(run)])
    assert result.exit_code == 0 and " 812 " in result.stdout and "computed, not measured" in result.stdout
    assert " 10 " in CliRunner().invoke(evaluate_app, ["cost", "mmstar"]).stdout
    refused = CliRunner().invoke(evaluate_app, ["cost", "mmstars"])
    assert refused.exit_code == 1 and "there is no benchmark 'mmstars'" in refused.stderr
