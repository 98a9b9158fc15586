"""Judges: what they are asked, what is kept of their replies, and what happens before anything is paid for."""

import json
from dataclasses import replace

import pytest
from conftest import NANO
from test_endpoint import completion, serving
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate.benchmark import Judge, Prompt, Row
from minicpmv.evaluate.client import ChatClient, EndpointError
from minicpmv.evaluate.judging import JudgeError, JudgeModel
from minicpmv.files import DamagedFileError


pytestmark = pytest.mark.usefixtures("drawn_data")


def undecided(entry):
    return bool(entry["scores"].get("undecided"))


def read(reply, entry):
    return {"exact": float(reply.strip() == entry["expected"])} if reply.strip() in ("A", "B") else None


JUDGE = Judge(
    model="reference",
    applies=undecided,
    messages=lambda entry: [{"role": "user", "content": f"Which letter is {entry['answer']}?"}],
    read=read,
    give_up=lambda entry: {"exact": 0.0, "given_up": True},
    tries=3,
    temperatures=(0.0, 0.5),
    max_tokens=16,
)
ROW = Row("r", "R", lambda seed, index: index, lambda index: Prompt([], ""), lambda answer, expected: {}, judge=JUDGE)


def entry(index, scores=None, expected="A", **facts):
    scores = scores or {"exact": 0.0, "undecided": True}
    return {"row": "r", "seed": 0, "index": index, "answer": f"answer {index}", "expected": expected} | {
        "facts": facts,
        "scores": scores,
    }


def judge_of(server, cache, row=ROW, entries=None, confirmed=True, prices=None, **options):
    """{index: scores} of what was judged."""
    client = ChatClient(server.url, "m", **options)
    model = JudgeModel(client, cache, confirmed=confirmed, prices=prices)
    found = model.judge([(row, one) for one in entries or [entry(0), entry(1)]])
    scores = {one["index"]: scores for one, scores in found}
    model.refuse_if_owing()
    return scores


def saying(*texts):
    return lambda number, body: (200, completion(texts[number % len(texts)]))


def test_undecided_answers_are_judged_with_the_name_of_the_model_that_answered(tmp_path):
    entries = [entry(0), entry(1, expected="B"), entry(2, {"exact": 1.0})]
    with serving(lambda number, body: (200, completion("A") | {"model": "m-2026-01-01"})) as server:
        found = judge_of(server, tmp_path, entries=entries)
    assert found == {0: {"exact": 1.0, "judge": "m-2026-01-01"}, 1: {"exact": 0.0, "judge": "m-2026-01-01"}}
    asked = sorted(server.requests, key=lambda request: request["messages"][0]["content"])
    assert [request["messages"][0]["content"] for request in asked] == [f"Which letter is answer {i}?" for i in (0, 1)]
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["model"]) == (0, 16, "m")


def test_a_reply_is_paid_for_once(tmp_path):
    with serving(saying("A")) as server:
        first = judge_of(server, tmp_path)
        assert judge_of(server, tmp_path, confirmed=False) == first and len(server.requests) == 2
        judge_of(server, tmp_path, extra_body={"top_k": 1})  # another request
        judge_of(server, tmp_path / "elsewhere")
    assert len(server.requests) == 6


def test_a_judge_that_says_nothing_is_asked_again_at_the_temperatures_of_the_row_and_then_given_up(tmp_path):
    with serving(saying("hm", None, "perhaps")) as server:
        found = judge_of(server, tmp_path, entries=[entry(0)])
        assert judge_of(server, tmp_path, entries=[entry(0)], confirmed=False) == found
    assert found == {0: {"exact": 0.0, "given_up": True, "judge": "m"}}
    assert [request["temperature"] for request in server.requests] == [0, 0.5, 0.5]


def test_a_later_try_can_decide(tmp_path):
    with serving(saying("hm", "<think>B, or...</think>\nA")) as server:
        assert judge_of(server, tmp_path, entries=[entry(0)])[0]["exact"] == 1.0
    assert len(server.requests) == 2


def test_nothing_is_asked_before_its_cost_is_agreed_to(tmp_path):
    with serving(saying("A")) as server:
        with pytest.raises(JudgeError, match=r"2 requests \(at most 6 .*about 12 tokens .*32 to write.*--judge-yes"):
            judge_of(server, tmp_path, confirmed=False)
        assert not server.requests
        judge_of(server, tmp_path, entries=[entry(0)])
        with pytest.raises(JudgeError, match=r"m would get 1 request .*about 1.66 at your prices"):
            judge_of(server, tmp_path, confirmed=False, prices=(10_000, 100_000))


def test_what_is_known_is_judged_at_once_and_the_rest_of_all_benchmarks_makes_one_bill(tmp_path):
    with serving(saying("A")) as server:
        judge_of(server, tmp_path, entries=[entry(0)])
        model = JudgeModel(ChatClient(server.url, "m"), tmp_path)
        assert [one["index"] for one, _ in model.judge([(ROW, entry(0)), (ROW, entry(1))])] == [0]
        assert list(model.judge([(ROW, entry(2))])) == [] and model.estimate([(ROW, entry(3))]).answers == 1
        with pytest.raises(JudgeError, match="m would get 2 requests"):
            model.refuse_if_owing()


def test_rotations_of_a_question_that_is_lost_are_not_judged(tmp_path):
    entries = [
        entry(0, group=1),
        entry(1, {"exact": 0.0}, group=1),
        entry(2, group=2),
        entry(3, {"exact": 1.0}, group=2),
        entry(4, group=2) | {"seed": 1},
    ]
    with serving(saying("A")) as server:
        assert set(judge_of(server, tmp_path, entries=entries)) == {2, 4}


def test_rows_without_a_judge_are_left_alone(tmp_path):
    with serving(saying("A")) as server:
        assert judge_of(server, tmp_path, row=replace(ROW, judge=None)) == {}


def test_a_judge_is_asked_several_questions_at_once_and_no_more_than_allowed(tmp_path):
    with serving(saying("A")) as server:
        assert len(judge_of(server, tmp_path, entries=[entry(index) for index in range(12)], concurrency=3)) == 12
    assert 1 <= server.most_in_flight <= 3


def test_what_was_said_is_kept_when_the_judge_fails(tmp_path):
    def reply(number, body):
        return (200, completion("A")) if number == 0 else (400, {"error": {"message": "no"}})

    refusal = pytest.raises(EndpointError, match=r"refuses the judge's question about answer \d of r \(seed 0\)")
    with serving(reply) as server, refusal:
        judge_of(server, tmp_path, concurrency=1)
    with serving(saying("A")) as again:
        again.url = server.url
        found = judge_of(again, tmp_path, entries=[entry(0)], confirmed=False)
    assert found[0]["exact"] == 1.0


def test_a_busy_judge_is_asked_again(tmp_path):
    with serving(lambda number, body: (200, completion("A")) if number else (429, {"error": {}})) as server:
        assert judge_of(server, tmp_path, entries=[entry(0)])[0]["exact"] == 1.0


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3, "text": "A"}'])
def test_a_kept_reply_that_cannot_be_read_is_named(tmp_path, content):
    with serving(saying("A")) as server:
        judge_of(server, tmp_path, entries=[entry(0)])
        (kept,) = tmp_path.rglob("*.json")
        assert json.loads(kept.read_text())["request"]["messages"] and not list(tmp_path.rglob("*.draft"))
        kept.write_text(content)
        with pytest.raises(DamagedFileError, match=f"{kept}.*delete it"):
            judge_of(server, tmp_path, entries=[entry(0)])


# --- A judged suite, from the command ---


def evaluate(*arguments):
    return CliRunner().invoke(
        evaluate_app, ["mmvet", "-m", str(NANO), "--fixtures", "--samples", "2", *map(str, arguments)]
    )


def results_in(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]["mmvet"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_judged_suite_tells_the_cost_and_is_judged_by_the_same_command_with_consent(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "secret-key")
    folder = tmp_path / "run"
    with serving(lambda number, body: (200, completion("0.5") | {"model": "m-2026"})) as server:
        judge = ["--judge-endpoint", server.url, "--judge-model", "m", "--judge-cache", tmp_path / "cache"]
        judge += ["--output", folder, "--judge-key-env", "MY_JUDGE_KEY", "--judge-prices", "1,2"]
        refused = evaluate(*judge)
        assert (
            refused.exit_code == 1 and "m would get 2 requests" in refused.stderr and "--judge-yes" in refused.stderr
        )
        assert not server.requests and results_in(folder)["judge"] == "rules only"
        agreed = evaluate(*judge, "--judge-yes", "--judge-options", '{"temperature": null, "reasoning_effort": "low"}')
        assert agreed.exit_code == 0, agreed.output
    assert len(server.requests) == 2 and server.headers[0]["Authorization"] == "Bearer secret-key"
    assert "temperature" not in server.requests[0] and server.requests[0]["reasoning_effort"] == "low"
    row = results_in(folder)
    assert (row["judge"], row["judge_returned"], row["mean"]["score"], row["undecided"]) == ("m", ["m-2026"], 0.5, 0)
    assert row["interval"]["score"] == [0.5, 0.5]
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "secret" not in stored + agreed.output


def test_options_of_a_judge_that_do_not_exist_are_named(tmp_path):
    refused = evaluate(
        "--judge-endpoint", "http://127.0.0.1:1/v1", "--judge-model", "m", "--judge-options", '{"top_k": 1}'
    )
    assert refused.exit_code == 1 and "no option top_k; there are concurrency, retries" in refused.stderr
