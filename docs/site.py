"""A hook of mkdocs: links to files outside docs/ lead to the repository at REPOSITORY_URL, or without one become text."""

import os
import re


REPOSITORY = os.environ.get("REPOSITORY_URL")


def on_page_markdown(markdown: str, **_) -> str:
    target = rf"[\1]({REPOSITORY}/blob/main/\2)" if REPOSITORY else r"\1"
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", target, markdown)
