"""Batch inference: a file of requests or a folder of images, documents or videos -> a file with one row for each.

`rows` reads the input and `results` writes the output, `jobs` turns a row into requests and their replies into columns,
`media` brings images and videos into requests, `answerers` answer, and `run` leads rows through them: in this process, or
with Ray Data on many.
"""
