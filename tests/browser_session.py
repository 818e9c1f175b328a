"""One session of the chat box in a headless Chromium: prints what it saw as JSON. Run by test_browser.py.

python browser_session.py lab|classic URL CHROMIUM SCREENSHOTS
"""

import json
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

MARKUP = '<img src=x onerror="window.hacked = 1"><b id="bold">Hi</b>'
WAIT = 180_000  # milliseconds: the kernel loads a model first
SETTLE = 6_000


def history(page):
    """The text of the box's bubbles."""
    return page.evaluate("() => [...document.querySelectorAll('.widget-html-content')].map(e => e.innerText).join('')")


def watch(page, until, seconds=180):
    """The history's text at each change, until it satisfies a condition."""
    seen, deadline = [history(page)], time.monotonic() + seconds
    while not until(seen[-1]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the history stays at {seen[-1]!r}")
        text = history(page)
        if text != seen[-1]:
            seen.append(text)
        time.sleep(0.02)
    return seen


def run_all(page, front_end):
    # A page that was just opened asks its kernel for widgets that may be there, and then drops what it did not find.
    if front_end == "lab":
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=WAIT)
        page.wait_for_timeout(SETTLE)
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.locator("li[data-command='runmenu:run-all']").click()
    else:
        page.wait_for_function("() => window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel", timeout=WAIT)
        page.wait_for_function("() => Jupyter.notebook.kernel.is_connected()", timeout=WAIT)
        page.wait_for_timeout(SETTLE)
        page.evaluate("() => Jupyter.notebook.execute_all_cells()")


def ask(page, text):
    box = page.locator("input[placeholder='Your question']")
    box.wait_for(timeout=WAIT)
    box.fill(text)
    box.press("Enter")


def main(front_end, url, chromium, screenshots):
    saw, shots = {}, Path(screenshots)
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(url)
        run_all(page, front_end)
        ask(page, MARKUP)
        seen = watch(page, lambda text: "tokens, the first after" in text)
        saw["streamed"] = [text for text in seen if "tuned model" in text]
        saw["markup"] = {
            "text": history(page),
            "hacked": page.evaluate("() => window.hacked === 1"),
            "elements": page.evaluate("() => document.querySelectorAll('#bold').length"),
        }
        page.screenshot(path=shots / f"{front_end}-reply.png")
        ask(page, "Tell me a very long story about a lighthouse, in twelve chapters.")
        watch(page, lambda text: len(text.split("lighthouse, in twelve chapters.")[-1]) > 60)
        page.screenshot(path=shots / f"{front_end}-writing.png")
        page.locator("button", has_text="Stop").click()
        saw["stopped"] = watch(page, lambda text: text.count("tokens, the first after") == 2)[-1]
        page.screenshot(path=shots / f"{front_end}-stopped.png")
        page.locator("button", has_text="Reset").click()
        saw["reset"] = watch(page, lambda text: not text.strip())[-1]
        browser.close()
    print(json.dumps(saw))


if __name__ == "__main__":
    main(*sys.argv[1:])
