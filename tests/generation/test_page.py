"""The page, in a real browser: by keyboard, on a phone's width, in the dark, with nothing from outside."""

import shutil
import time

import pytest
from PIL import Image

from minillava.generation.engine import Engine

pytest.importorskip("starlette")
pytest.importorskip("openai")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def served(tiny_model, tiny_tokenizer):
    from serving import Served

    engine = Engine(tiny_model, tiny_tokenizer)
    engine.eos_ids = frozenset()  # answers are as long as asked for
    server = Served(engine)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    """On a phone in the dark, with what it complained of and asked for."""
    page = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page.complaints, page.asked = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    page.close()


def answered(page, count=1):
    page.locator("#send:enabled").wait_for(timeout=20_000)
    page.locator(".answer").nth(count - 1).locator(".note", has_text="tokens").wait_for()


def ask(page, question, length):
    page.locator("summary").click()
    page.fill("#length", str(length))
    page.locator("summary").click()
    page.focus("#question")
    page.keyboard.type(question)
    page.keyboard.press("Enter")


def test_a_picture_a_question_and_where_a_word_looked(page, served, tmp_path):
    picture = tmp_path / "disc.png"
    Image.effect_noise((60, 40), 60).convert("RGB").save(picture)
    page.set_input_files("#files", picture)
    page.locator("#waiting img").wait_for()
    ask(page, "what color is the circle?", 12)
    answered(page)
    assert "12 tokens" in page.inner_text(".answer .note") and "4 of them pictures" in page.inner_text(".answer .note")
    assert page.inner_text("figcaption") == "4 tokens"

    # By the keyboard alone: to the first word, on to the next, and there Enter.
    page.focus(".answer .word")
    if page.locator(".answer .word").count() > 1:
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("figcaption", has_text="% of its attention").wait_for()
    assert not page.complaints
    canvas = "document.querySelector('figure canvas')"
    drawn = f"[...{canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.height).data]"
    assert page.evaluate(f"new Set({drawn}.filter((value, i) => i % 4 == 0)).size") > 5
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Escape")
    assert page.evaluate(f"{drawn}.every(value => value == 0)") and page.inner_text("figcaption") == "4 tokens"

    assert page.evaluate("document.documentElement.scrollWidth") == 375
    red = page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
    assert int(red) < 64, "dark"
    assert all(url.startswith((f"http://127.0.0.1:{served.port}/", "data:")) for url in page.asked)


def test_stop_and_again(page, served, monkeypatch):
    step = served.running.scheduler.step
    with monkeypatch.context() as slow:
        slow.setattr(served.running.scheduler, "step", lambda: (time.sleep(0.05), step())[1])
        ask(page, "why?", 150)
        page.locator(".answer p", has_text="e").wait_for()
        page.click("#stop")
        page.locator(".answer .note", has_text="stopped").wait_for()
    served.until(lambda: not served.running.scheduler.busy)
    partial = page.inner_text(".answer p")
    page.click("#again")
    answered(page)
    assert page.locator(".answer").count() == 1
    assert page.inner_text(".answer p").startswith(partial.strip()) and "150 tokens" in page.inner_text(".answer .note")


def test_a_dropped_picture_waits_and_an_error_is_shown(page):
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["no picture"], "a.png", {type: "image/png"}));
        dispatchEvent(new DragEvent("drop", {dataTransfer: data}));
    }""")
    page.locator("#waiting img").wait_for(state="attached")
    ask(page, "what?", 3)
    page.locator(".answer .error", has_text="picture 1").wait_for()
    assert page.input_value("#question") == "what?" and page.locator("#waiting img").count() == 1, "given back"
    page.get_by_label("Remove picture 1").click()
    page.focus("#question")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".error").count() == 0
    page.click("#fresh")
    assert page.locator(".turn").count() == 0
