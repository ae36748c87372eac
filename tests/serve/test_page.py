"""The page at ``/``, in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeexit.bundle.reader import Bundle
from edgeexit.runtime import load
from tests.serve.browsers import Browser, missing, open_browser
from tests.serve.conftest import Start
from tests.serve.servers import Server

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs a browser: {missing()}")

LAST = "const all = document.querySelectorAll('.turn'); const last = all[all.length - 1];"
IDLE = "return !document.querySelector('#send').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_text_streams_and_the_conversation_goes_on(browser: Browser, talker: Server) -> None:
    browser.open(talker.url)
    browser.wait("return document.querySelector('#name').textContent === 'talker'")
    assert "mode exact" in browser.run("return document.querySelector('#about').textContent")
    browser.run("document.querySelector('#most').value = 3")
    browser.type("#prompt", "a?\n")
    browser.wait(f"{LAST} return last && last.querySelector('.bars') !== null")
    facts = browser.run(f"{LAST} return last.querySelector('.facts').textContent")
    assert "3 tokens" in facts and "ended by length" in facts
    asked = {"messages": [{"role": "user", "content": "a?"}], "max_tokens": 3}
    found = talker.ask("/v1/chat/completions", asked).json["choices"][0]["message"]["content"]
    assert browser.run(f"{LAST} return last.querySelectorAll('pre')[1].textContent") == found
    browser.type("#prompt", "b?\n")
    browser.wait("return document.querySelectorAll('.bars').length === 2")
    facts = browser.run(f"{LAST} return last.querySelector('.facts').textContent")
    assert " prompt tokens reused" in facts and " 0 of" not in facts
    assert browser.problems() == []


def test_an_error_is_shown(browser: Browser, talker: Server) -> None:
    browser.open(talker.url)
    browser.wait("return document.querySelector('#name').textContent === 'talker'")
    browser.run("document.querySelector('#most').value = 5000")
    browser.type("#prompt", "a?\n")
    browser.wait(f"{LAST} return last && last.classList.contains('failed')")
    assert "max_tokens is 5000" in browser.run(f"{LAST} return last.textContent")
    browser.wait(IDLE)
    browser.problems()  # the browser logs the status 400


def test_an_image_is_classified(
    browser: Browser, painter: Server, vit_bundle: Bundle, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    browser.open(painter.url)
    browser.wait("return !document.querySelector('#image-row').hidden")
    assert browser.run("return document.querySelector('#prompt-row').hidden")
    browser.type("#image", str(tmp_path / "image.png"))
    browser.click("#send")
    browser.wait(f"{LAST} return last && last.querySelector('.facts').textContent")
    label = browser.run(f"{LAST} return last.querySelectorAll('pre')[1].textContent")
    png = (tmp_path / "image.png").read_bytes()
    [row] = painter.ask("/v1/predict", png, {"Content-Type": "image/png"}).json["rows"]
    assert label == row["label"]
    assert row["exit"] in browser.run(f"{LAST} return last.querySelector('.facts').textContent")
    with load(vit_bundle) as model:
        assert label in model.bundle.manifest.labels
    assert browser.problems() == []


def test_the_page_asks_for_the_token(browser: Browser, serve: Start, toy_bundle: Bundle) -> None:
    token = "a-token-of-enough-characters"
    server = serve(toy_bundle, environment={"EDGEEXIT_TOKEN": token})
    browser.open(server.url)
    browser.wait("return !document.querySelector('#token-row').hidden")
    assert "token is missing" in browser.run("return document.querySelector('#about').textContent")
    browser.type("#token", token)
    browser.click("#send")
    browser.wait("return document.querySelector('#name').textContent !== 'edgeexit'")
    browser.problems()  # the browser logs the status 401
