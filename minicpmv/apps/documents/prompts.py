"""What the reader asks the model, all in one place: a checkpoint that was tuned on other words takes its own."""

from dataclasses import dataclass


SUMMARY_LENGTHS = {
    "short": "in one or two sentences",
    "medium": "in one paragraph of about 100 words",
    "long": "in about 400 words, with the main points of every section",
}


@dataclass(frozen=True)
class Prompts:
    """Questions of a [`DocumentReader`]; what stands in braces is filled in."""

    markdown: str = (
        "Convert this page to Markdown, in reading order and exactly as printed: headings with #, lists, tables as "
        "Markdown tables, formulas as LaTeX. Write all of the page and nothing that is not on it."
    )
    text: str = (
        "Transcribe all text on this page in reading order, exactly as printed, line by line. Write the text only, "
        "without Markdown or remarks."
    )
    regions: str = (
        "Find all regions of this page of the kinds {kinds}. Write one line for each: its kind as <ref>kind</ref>, then "
        "its place as <box>left top right bottom</box>, in whole numbers from 0 to 1000."
    )
    data: str = (
        "Read these pages and give what they say as one JSON value that fits this JSON Schema:\n{schema}\n"
        "Write the JSON only. Leave out what is not on the pages, unless the schema requires it."
    )
    data_again: str = "This cannot be used: {problem}. Write the whole corrected JSON, and nothing else."
    page: str = "Page {number}:"
    question: str = (
        "Answer from these pages only. Name the page of every statement as [page N]. If the pages do not tell, say so.\n"
        "Question: {question}"
    )
    joined_answer: str = (
        "These are answers to one question, each from other pages of the same document:\n\n{parts}\n\n"
        "Give one answer from all of them, and keep the pages as [page N].\nQuestion: {question}"
    )
    summary: str = "Summarize these pages {length}, in the language of the document."
    joined_summary: str = (
        "These are summaries of the parts of one document:\n\n{parts}\n\n"
        "Summarize the whole document {length}, in the language of the document."
    )
