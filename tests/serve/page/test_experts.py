"""The map of the experts in use: asked for only while somebody sees it, and drawn as the server counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from daedal.infer.stats import ExpertsSeen
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.serve.page.driving import ENDLESS, Script, answered, fits, outside_and_errors, say, text_of, until

SEEN = ExpertsSeen(layers=(1, 2), counts=((8, 0, 2, 0), (0, 5, 0, 5)), num_tokens=5)
PAINTED = """
    const map = document.getElementById("experts-map");
    const { data } = map.getContext("2d").getImageData(0, 0, map.width, map.height);
    return [map.width, map.height, [...data].filter((_, at) => at % 4 === 3)];
"""


@pytest.fixture
def engine(checkpoint: Path) -> ScriptedEngine:
    tokenizer = Tokenizer.load(checkpoint)
    script = Script(tokenizer)
    return ScriptedEngine(tokenizer, script, before_step=script.before_step)


@pytest.fixture
def page(checkpoint: Path, engine: ScriptedEngine, browser: webdriver.Chrome) -> Iterator[str]:
    """Its address, opened in the browser."""
    with serving(scripted_service(checkpoint, engine)) as address:
        browser.get(address)
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        yield address
        browser.get("data:,")


def test_experts_are_drawn_while_they_are_looked_at(
    page: str, engine: ScriptedEngine, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    engine.experts = SEEN
    say(browser, ENDLESS)
    until(browser, lambda _: "word word" in text_of(browser, ".assistant"))
    assert not browser.find_element(By.ID, "experts").is_displayed()
    assert asked(browser) == [], "nobody looks"
    browser.find_element(By.CSS_SELECTOR, "#live summary").click()
    until(browser, lambda _: browser.find_element(By.ID, "experts").is_displayed())
    until(browser, lambda _: text_of(browser, "#experts-told") == "4 of 8 (50%) by 10 tokens")
    width, height, alpha = browser.execute_script(PAINTED)
    assert (width, height) == (4, 2)
    assert [shade > 0 for shade in alpha] == [True, False, True, False, False, True, False, True]
    assert alpha[0] == 255 > alpha[2] > 0
    label = browser.find_element(By.ID, "experts-map").get_attribute("aria-label")
    assert label.startswith("Experts in use, 2 layers: 4 of 8")
    assert fits(browser)
    browser.save_screenshot(str(tmp_path / "experts.png"))
    browser.find_element(By.ID, "stop").click()
    until(browser, answered)
    engine.experts = ExpertsSeen(layers=(1, 2), counts=((1, 1, 1, 1), (1, 1, 1, 1)), num_tokens=1)
    say(browser, ENDLESS)
    until(browser, lambda _: text_of(browser, "#experts-told").startswith("8 of 8"))
    browser.find_element(By.ID, "stop").click()
    until(browser, answered)
    assert outside_and_errors(browser, page) == ([], [])


def test_a_model_without_experts_is_asked_once(page: str, engine: ScriptedEngine, browser: webdriver.Chrome) -> None:
    browser.find_element(By.CSS_SELECTOR, "#live summary").click()
    say(browser, ENDLESS)
    until(browser, lambda _: len(asked(browser, "/stats")) >= 6)
    assert len(asked(browser)) <= 2, "once to make it look, and once to hear"
    assert not browser.find_element(By.ID, "experts").is_displayed()
    browser.find_element(By.ID, "stop").click()
    until(browser, answered)


def asked(browser: webdriver.Chrome, path: str = "/experts") -> list[str]:
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(({ name }) => name)")
    return [url for url in entries if url.endswith(path)]
