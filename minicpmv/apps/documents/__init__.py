"""Documents: pages out of PDF files, scans and images, and what the model reads on them.

`pages` opens files, `repair` straightens scans, `writing` lets the model write long answers, `reader` asks for text,
regions, data, summaries and answers, `tables` and `language` look into the text.
"""
