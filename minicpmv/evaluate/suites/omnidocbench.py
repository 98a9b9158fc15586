r"""OmniDocBench V1.0 (Ouyang et al. 2024): 981 pages to be written as Markdown, by edit distance to what stands there; lower is better.

Published are the means of four distances (text, formulas, tables, reading order), of English and of Chinese pages. Which prompt the
authors took is not known: this one is the benchmark's own, in the form that VLMEvalKit (e8e78f0) sends, with a line marked out.
"""

from typing import Any

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.omnidocbench import KINDS, omnidocbench, omnidocbench_distance
from minicpmv.evaluate.suite import Asking, Decoding, Record, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import images_then


CONVERT = r"""You are an AI assistant specialized in converting PDF images to Markdown format. Please follow these instructions for the conversion:

    1. Text Processing:
    - Accurately recognize all text content in the PDF image without guessing or inferring.
    - Convert the recognized text into Markdown format.
    - Maintain the original document structure, including headings, paragraphs, lists, etc.

    2. Mathematical Formula Processing:
    - Convert all mathematical formulas to LaTeX format.
    # - Enclose inline formulas with \( \). For example: This is an inline formula \( E = mc^2 \)
    - Enclose block formulas with \\[ \\]. For example: \[ \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \]

    3. Table Processing:
    - Convert tables to HTML format.
    - Wrap the entire table with <table> and </table>.

    4. Figure Handling:
    - Ignore figures content in the PDF image. Do not attempt to describe or convert images.

    5. Output Format:
    - Ensure the output Markdown document has a clear structure with appropriate line breaks between elements.
    - For complex layouts, try to maintain the original document's structure and format as closely as possible.

    Please strictly follow these guidelines to ensure accuracy and consistency in the conversion. Your task is to accurately convert the content of the PDF image into Markdown format without adding any extra explanations or comments.
    """
PAGE = Decoding(max_new_tokens=8192)


def attributes(record: Record) -> dict[str, Any]:
    return record["answer"]["page_info"]["page_attribute"]


def facts(sample: Sample) -> Facts:
    found = attributes(sample.record)
    return {"id": str(sample["index"]), "language": found["language"], "source": found.get("data_source")}


def pages(id: str, language: str, name: str) -> Task:
    asking = Asking(images_then(lambda sample: CONVERT), PAGE)
    return Task(
        id=id,
        title=f"{name} pages to Markdown, edit distance",
        data="omnidocbench",
        plain=asking,
        published=asking,
        expected=lambda sample: sample["answer"],
        facts=facts,
        scorer=omnidocbench,
        aggregate=omnidocbench_distance,
        keep=lambda record: attributes(record)["language"] == language,
        breakdowns=("source",),
        points=("overall", *KINDS),
        lower_is_better=True,
    )


SUITE = Suite(
    "omnidocbench",
    "OmniDocBench V1.0",
    1,
    (pages("omnidocbench_en", "english", "English"), pages("omnidocbench_zh", "simplified_chinese", "Chinese")),
)
