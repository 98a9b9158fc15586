"""`minicpmv serve`: answers to OpenAI's requests.

The road of a request: `schema` (what it may hold) -> `limits` and `media` (what is let in) -> `prompts` (what the model reads)
-> `scheduler` (rows of a batch, with `states`, `sampling` and `grammar`) -> `writing` -> `responses`. `engine` is all of it in
one object, without HTTP, and `choice` says which runs where that is left open; `app`, `doors`, `metrics` and `log` are the HTTP side.
"""
