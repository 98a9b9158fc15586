"""Answers with their claims and verdicts: what the log keeps of each prompt."""

from dataclasses import asdict
from itertools import chain

import torch

from minicpmv.data.formats import THINK_END, THINK_START, text_of
from minicpmv.train.feedback.arguments import FeedbackArguments
from minicpmv.train.feedback.claims import MalformedClaimsError, Reading, claims_by_rule, claims_prompt, parse_claims
from minicpmv.train.feedback.prompts import Prompt, shared_options
from minicpmv.train.feedback.respondent import Respondent
from minicpmv.train.feedback.sampling import Answer, sample_answers


CLAIMS_TOKENS = 1024  # of a language model's list of claims
MODEL_QUESTION = " Please answer yes or no."  # after a question that a language model wrote


class Feedback:
    """The policy, the model that judges it, and the one that lists claims."""

    def __init__(self, args: FeedbackArguments, policy: Respondent, judge: Respondent, reader: Respondent):
        self.args, self.policy, self.judge, self.reader = args, policy, judge, reader

    def records(self, prompts: list[Prompt]) -> list[dict]:
        """What the log keeps of a batch of prompts."""
        with torch.inference_mode():
            options = shared_options(prompts)
            conversations = [prompt.messages for prompt in prompts]
            inputs = self.policy.render(conversations, options)
            features = self.policy.image_features(inputs)
            answers = self._sample(prompts, self.policy.with_features(inputs, features))
            if self.judge is not self.policy:
                features = None
                if self.judge.is_native:
                    features = self.judge.image_features(self.judge.render(conversations, options))
            readings = self._read(prompts, answers)
            verdicts = self._judge(prompts, readings, features)
        return [
            {
                "prompt": prompt.number,
                "digest": prompt.digest,
                "answers": [
                    _answer_record(answer, reading, verdicts[place])
                    for answer, reading in zip(answers[place], readings[place], strict=True)
                ],
            }
            for place, prompt in enumerate(prompts)
        ]

    def _sample(self, prompts, inputs) -> list[list[Answer]]:
        return sample_answers(
            self.policy.model,
            self.policy.tokenizer,
            inputs,
            [prompt.number for prompt in prompts],
            self.args.num_answers,
            self.args.seed,
            self.args.temperature,
            self.args.top_p,
            self.args.max_new_tokens,
        )

    def _read(self, prompts, answers) -> list[list[Reading | None]]:
        """The claims of each answer; None where a language model's list of them cannot be read."""
        if self.args.claims == "rule":
            return [[claims_by_rule(answer.text) for answer in group] for group in answers]
        asked = [
            [claims_prompt(text_of(prompt.messages[-1]), answer.text) for answer in group]
            for prompt, group in zip(prompts, answers, strict=True)
        ]
        different = list(dict.fromkeys(chain.from_iterable(asked)))
        readings: dict[str, Reading | None] = {}
        for start in range(0, len(different), self._rows):
            texts = different[start : start + self._rows]
            for text, reply in zip(texts, self.reader.reply(texts, CLAIMS_TOKENS), strict=True):
                try:
                    readings[text] = parse_claims(reply)
                except MalformedClaimsError:
                    readings[text] = None
        return [[readings[text] for text in group] for group in asked]

    def _judge(self, prompts, readings, features) -> list[dict[str, tuple[float, float]]]:
        """For each prompt the probabilities of yes and no for every question, each asked once."""
        suffix = MODEL_QUESTION if self.args.claims == "model" else ""
        asked = [
            (place, question)
            for place, group in enumerate(readings)
            for question in {claim.question: None for reading in group if reading for claim in reading.claims}
        ]
        verdicts: list[dict[str, tuple[float, float]]] = [{} for _ in prompts]
        for start in range(0, len(asked), self._rows):
            part = asked[start : start + self._rows]
            probabilities = self.judge.yes_and_no(
                [prompts[place].about(question + suffix) for place, question in part],
                shared_options([prompts[place] for place, _ in part]),
                None if features is None else [features[place] for place, _ in part],
            )
            for (place, question), pair in zip(part, probabilities, strict=True):
                verdicts[place][question] = pair
        return verdicts

    @property
    def _rows(self):
        """Texts at once: as many as when answers are sampled."""
        return self.args.batch_size * self.args.num_answers


def _answer_record(answer: Answer, reading: Reading | None, verdicts: dict) -> dict:
    """An answer with its verdicts and its errors: the number of rejected claims, or None and the reason."""
    record = asdict(answer) | {"errors": None, "reason": None, "claims": [], "unread": []}
    if reading is not None:
        record["unread"] = reading.unread
        record["claims"] = [
            {"text": claim.text, "question": claim.question, "yes": yes, "no": no}
            for claim in reading.claims
            for yes, no in [verdicts[claim.question]]
        ]
    if not answer.finished:
        record["reason"] = "cut at max_new_tokens"
    elif THINK_START in answer.text or THINK_END in answer.text:
        record["reason"] = "marks of a thought"  # it would not be a row to train on
    elif reading is None:
        record["reason"] = "list of claims not readable"
    elif reading.unread:
        record["reason"] = "parts that are not claims"
    elif not reading.claims:
        record["reason"] = "no claim"
    else:
        record["errors"] = sum(claim["no"] > claim["yes"] for claim in record["claims"])
    return record
