"""What our applications ask by default, for those drawn tasks that teach a model to answer it.

What is special:
- the rooms of the applications lie above this one, so their words stand here again; a test compares the two.
"""

READ_MARKDOWN = (
    "Convert this page to Markdown, in reading order and exactly as printed: headings with #, lists, tables as "
    "Markdown tables, formulas as LaTeX. Write all of the page and nothing that is not on it."
)
READ_TEXT = (
    "Transcribe all text on this page in reading order, exactly as printed, line by line. Write the text only, "
    "without Markdown or remarks."
)
READ_DATA = (
    "Read these pages and give what they say as one JSON value that fits this JSON Schema:\n{}\n"
    "Write the JSON only. Leave out what is not on the pages, unless the schema requires it."
)
REGIONS = (
    "Find all regions of this page of the kinds title, text, list, table, figure, formula, header, footer. Write one line "
    "for each: its kind as <ref>kind</ref>, then its place as <box>left top right bottom</box>, in whole numbers from 0 "
    "to 1000."
)
PAGE = "Page {number}:"  # before each page, where several may be shown
PAGE_QUESTION = (
    "Answer from these pages only. Name the page of every statement as [page N]. If the pages do not tell, say so.\n"
    "Question: {question}"
)
SUMMARY = "Summarize these pages {length}, in the language of the document."
LENGTHS = (
    "in one or two sentences",
    "in one paragraph of about 100 words",
    "in about 400 words, with the main points of every section",
)
BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes: "  # the name follows, as a ref
)
CLIP = "Describe what happens in this part of a video in one or two sentences. Tell only what can be seen."
