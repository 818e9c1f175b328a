"""The site's pages in a headless Chromium. Prints what it saw as JSON, by page.

python site_session.py SERVER CHROMIUM PAGE …   A page may be one of search: `zh-CN/search.html?q=学习率`
"""

import json
import sys

from playwright.sync_api import sync_playwright

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Of a text in the dark: its colour on all that lies under it, as WCAG counts contrast.
CONTRAST = """selector => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a));
    const ground = e => e ? over(parts(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255];
    const light = rgb => rgb.map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = e => {
        const below = ground(e), text = over(parts(getComputedStyle(e).color), below);
        const [dark, bright] = [light(below), light(text)].sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    };
    const shown = [...document.querySelectorAll(selector)].filter(e => e.innerText.trim() && e.offsetParent);
    return shown.length ? Math.min(...shown.map(ratio)) : null;
}"""
TEXTS = {
    "text": "article p, article li, article h1, article h2",
    "tables": "article td, article th",
    "mask": "article pre [title]",
}
LOOK = """() => ({
    colab: [...document.querySelectorAll("article a[href^='https://colab.research.google.com']")].map(e => e.href),
    pictures: [...document.querySelectorAll("article img")].map(e => e.naturalWidth * e.offsetHeight),
    mask: [...document.querySelectorAll("article pre [title]")].map(e => e.offsetHeight),
    lang: document.documentElement.lang,
    other: document.querySelector("a.edition")?.pathname,
    found: [...document.querySelectorAll("#search-results li > a:first-of-type")].map(e => e.pathname),
})"""
SEARCHED = "() => document.querySelector('#search-results h2')?.innerText === _('Search Results')"
BROAD = "() => document.documentElement.scrollWidth - innerWidth"


def visit(browser, server, path):
    """One page: on a desktop, in the dark, and on a phone."""
    page = browser.new_page(viewport=DESKTOP, color_scheme="light")
    saw = {"foreign": [], "errors": []}
    page.on("request", lambda asked: saw["foreign"].append(asked.url) if is_foreign(asked.url, server) else None)
    page.on("console", lambda said: saw["errors"].append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: saw["errors"].append(str(error)))
    page.goto(f"{server}/{path}")
    if "?q=" in path:
        page.wait_for_function(SEARCHED)
    saw |= page.evaluate(LOOK)
    page.emulate_media(color_scheme="dark")
    saw["dark"] = {what: page.evaluate(CONTRAST, selector) for what, selector in TEXTS.items()}
    page.set_viewport_size(PHONE)
    saw["too_broad"] = page.evaluate(BROAD)
    page.close()
    return saw


def is_foreign(url, server):
    return not url.startswith((f"{server}/", "data:", "blob:"))


def main(server, chromium, *pages):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        print(json.dumps({path: visit(browser, server, path) for path in pages}))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
