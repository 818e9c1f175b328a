"""Notebooks in a headless Chromium: run all, look, talk to the chat box. Prints what it saw as JSON.

python browser_session.py lab|classic SERVER TOKEN CHROMIUM SCREENSHOTS NOTEBOOK …   (paths on the server, run in order)
"""

import contextlib
import json
import re
import sys
import time
from pathlib import Path

from playwright.sync_api import Error, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeoutError

WAIT_SECONDS = 900  # a slow processor beside other work; a hang, not slowness, is what it ends
TALLEST = 16_000  # pixels: Chromium draws no taller picture
MARKUP = '<img src=x onerror="window.hacked = 1"><b id="bold">Hi</b>'
NOTE = "tokens, the first after"  # what the box adds below a reply that has ended
STORY = "Tell me a very long story about a lighthouse, in twelve chapters."
FRONT_ENDS = {
    "lab": {
        "url": "doc/tree/",
        "notebook": ".jp-Notebook",
        "prompt": ".jp-CodeCell .jp-InputPrompt",
        "error": "[data-mime-type='application/vnd.jupyter.stderr']",  # a traceback is drawn as one
        "table": ".jp-OutputArea-output table",
        "height": ".jp-WindowedPanel-outer",
        "idle": "() => document.querySelector('.jp-NotebookPanel-toolbar [data-status=idle]')",
    },
    "classic": {
        "url": "notebooks/",
        "notebook": "#notebook-container",
        "prompt": ".code_cell .input_prompt",
        "error": ".output_error, .output_stderr",
        "table": ".output_html table",
        "height": "#site",
        "idle": "() => window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel"
        " && Jupyter.notebook.kernel.is_connected() && Jupyter.notebook.kernel_busy === false",
    },
}
PROMPTS = """css => [...document.querySelectorAll(css.prompt)].map(e => e.textContent.replace(/[^0-9*]/g, ""))"""
LOOK = """css => ({
    prompts: [...document.querySelectorAll(css.prompt)].map(e => e.innerText.replace(/[^0-9*]/g, "")),
    errors: [...document.querySelectorAll(css.error)].map(e => e.innerText).filter(text => text.includes("Traceback")),
    tables: [...document.querySelectorAll(css.table)].map(e => e.querySelectorAll("tbody tr").length),
    images: [...document.querySelectorAll(css.notebook + " img")]
        .filter(e => !e.src.startsWith("http") || new URL(e.src).host == location.host)
        .map(e => e.naturalWidth * e.naturalHeight),
    text: document.querySelector(css.notebook).innerText,
})"""
NEWEST_IN_VIEW = """() => {
    const history = document.querySelector(".chat-history"), box = history.parentElement;
    const [whole, view] = [history, box].map(e => e.getBoundingClientRect());
    return whole.height > view.height && whole.bottom <= view.bottom;
}"""
MARKUP_TOOK_EFFECT = """() => ({executed: window.hacked === 1, rendered: !!document.querySelector("#bold")})"""


def wait_until(look, found, what, pause=0.02):
    """What `look` gives at each change, until `found` likes it; `pause` seconds between two looks."""
    seen, deadline = [look()], time.monotonic() + WAIT_SECONDS
    while not found(seen[-1]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: it stays at {seen[-1]!r}")
        now = look()
        if now != seen[-1]:
            seen.append(now)
        time.sleep(pause)
    return seen


def run_all(page, front_end):
    css = FRONT_ENDS[front_end]
    for _ in range(4):
        # A page that was just opened asks its kernel for widgets, and drops the ones that come while it waits.
        page.wait_for_function(css["idle"], timeout=WAIT_SECONDS * 1000)
        page.wait_for_timeout(1000)
        if front_end == "lab":
            page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
            page.locator("li[data-command='runmenu:run-all']").click()
        else:
            page.evaluate("() => Jupyter.notebook.execute_all_cells()")
        with contextlib.suppress(PageTimeoutError):
            page.wait_for_function(f"css => ({PROMPTS})(css).some(text => /[0-9]/.test(text))", arg=css, timeout=5000)
        if any(page.evaluate(PROMPTS, css)):
            break  # else the page connected to its kernel just then, and the request was lost: press again
    # Seldom: a look takes time that the kernel could have on a machine with few cores. Between two cells there is a
    # moment in which none waits: the last cell's number tells, or an error, after which no more cells run.
    error = page.locator(css["error"], has_text=re.compile("Traceback|Fix:"))
    wait_until(
        lambda: (page.evaluate(PROMPTS, css), error.count()),
        lambda now: "*" not in now[0] and now[0][0] and (now[0][-1] or now[1]),
        "run all",
        pause=0.5,
    )
    page.wait_for_timeout(1000)  # the last outputs are drawn after the last prompt


def history(page):
    return page.locator(".chat-history").inner_text()


def picture(page, path):
    page.evaluate("() => document.querySelector('.chat-history').parentElement.scrollIntoView({block: 'center'})")
    page.screenshot(path=path)


def ask(page, text):
    question = page.locator("input[placeholder='Your question']")
    question.fill(text)
    question.press("Enter")


def talk(page, shots):
    """Ask, read, reset, ask for more, stop: the history as it grew, and after the stop."""
    saw = {}
    page.set_viewport_size({"width": 1100, "height": 1000})
    ask(page, f"{MARKUP} {STORY}")  # whatever it says, it is long enough to be seen growing
    saw["streamed"] = wait_until(lambda: history(page), lambda text: NOTE in text, "reply")
    saw |= page.evaluate(MARKUP_TOOK_EFFECT)
    picture(page, f"{shots}-chat-reply.png")
    page.locator("button", has_text="Reset").click()
    wait_until(lambda: history(page), lambda text: not text.strip(), "reset")
    page.locator(".noUi-handle, .ui-slider-handle").last.press("End")  # a long reply: it shall not end before the stop
    saw["max_tokens"] = page.locator(".widget-readout").last.inner_text()
    ask(page, STORY)
    wait_until(lambda: history(page).partition("tuned model")[2], lambda text: text.strip(), "story")
    picture(page, f"{shots}-chat-writing.png")
    page.locator("button", has_text="Stop").click()
    saw["stopped"] = wait_until(lambda: history(page), lambda text: NOTE in text, "stop")[-1]
    picture(page, f"{shots}-chat-stopped.png")
    return saw


def visit(browser, front_end, server, token, notebook, shots):
    """One notebook, from opening it to what it shows."""
    css, start, saw = FRONT_ENDS[front_end], time.monotonic(), {}
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    try:
        page.goto(f"{server}/{css['url']}{notebook}?token={token}")
        run_all(page, front_end)
        saw |= page.evaluate(LOOK, css)
        height = page.evaluate("css => document.querySelector(css.height).scrollHeight", css) + 150
        page.set_viewport_size({"width": 1100, "height": min(height, TALLEST)})
        page.evaluate("css => document.querySelector(css.height).scrollTo(0, 0)", css)
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{shots}.png")
        saw |= page.evaluate(MARKUP_TOOK_EFFECT)
        if page.locator(".chat-history").count():
            saw["newest_in_view"] = page.evaluate(NEWEST_IN_VIEW)
            saw["chat"] = talk(page, shots) if not history(page).strip() else {}
    except (Error, TimeoutError) as error:
        saw["failure"] = f"{type(error).__name__}: {error}"
        page.screenshot(path=f"{shots}-failure.png")
    finally:
        headers = {"Authorization": f"token {token}"}
        for session in page.request.get(f"{server}/api/sessions", headers=headers).json():
            page.request.delete(f"{server}/api/sessions/{session['id']}", headers=headers)  # its kernel holds a model
        page.close()
    return saw | {"seconds": round(time.monotonic() - start, 1)}


def main(front_end, server, token, chromium, screenshots, *notebooks):
    Path(screenshots).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        saw = {}
        for notebook in notebooks:
            shots = Path(screenshots) / f"{front_end}-{Path(notebook).stem}"
            saw[notebook] = visit(browser, front_end, server, token, notebook, shots)
            print(notebook, saw[notebook]["seconds"], "s", file=sys.stderr, flush=True)
        browser.close()
    print(json.dumps(saw))


if __name__ == "__main__":
    main(*sys.argv[1:])
