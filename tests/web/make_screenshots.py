"""Take the screenshots of the web pages that docs/ shows, with nano: `make web-screenshots`."""

from io import BytesIO

from PIL import Image
from playwright.sync_api import sync_playwright
from test_page import ASSETS, BROWSER_OPTIONS, NANO, PHONE, REPOSITORY, WAIT, ask, change, find_chromium
from test_static_page import Site

from minicpmv import checkpoint
from minicpmv.web import page
from minicpmv.web.conversation import Conversations


DESKTOP = {"width": 1280, "height": 800}
CLIP, NUMBER = (str(ASSETS / name) for name in ("star.mp4", "number.jpg"))


def take(browser, url, name, turns, **options):
    """Ask the questions of `turns` (question, then its files) and write docs/images/NAME.png."""
    tab = browser.new_page(**options)
    tab.set_default_timeout(WAIT)
    tab.goto(url)
    tab.locator("#box textarea").wait_for()
    change(tab, Frames_in_a_group=3)
    tab.locator("#settings button").first.click()
    for question, *files in turns:
        ask(tab, question, *files)
    save(tab, name)


def take_static(browser):
    """The page of `make page`, with a packed video."""
    site = Site(browser, viewport=DESKTOP)
    site.change("Frames in a group", 3)
    site.tab.locator("#right summary", has_text="Settings").click()
    for question, *files in (("Which way does the shape move?", CLIP), ("What color is the shape?",)):
        site.ask(question, *files)
    save(site.tab, "page-desktop")
    site.close()


def save(tab, name):
    """Write docs/images/NAME.png with 256 colors."""
    tab.evaluate("scrollTo(0, 0)")
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(1000)  # until nothing moves
    picture = Image.open(BytesIO(tab.screenshot())).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    picture.save(REPOSITORY / "docs" / "images" / f"{name}.png", optimize=True)


def main():
    app = page.build(Conversations(*checkpoint.load(NANO)), "nano")
    _, url, _ = page.launch(app, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=BROWSER_OPTIONS)
        turns = [("Which way does the shape move?", CLIP), ("What color is the shape?",)]
        take(browser, url, "web-desktop", turns, viewport=DESKTOP)
        phone = {"viewport": PHONE, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}
        take(browser, url, "web-phone", [("What does it say?", NUMBER)], **phone)
        take_static(browser)
        browser.close()
    app.close()


if __name__ == "__main__":
    main()
