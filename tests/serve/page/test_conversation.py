"""The chat page in a real browser: a message is answered as it streams, stopped, and nothing comes from outside."""

import re
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.page.driving import (
    ENDLESS,
    REPLY,
    Script,
    answered,
    as_seen,
    fits,
    outside_and_errors,
    say,
    text_of,
    until,
)

CODE = REPLY.split("```")[1].removeprefix("python\n").rstrip("\n")


def test_a_conversation(browser: webdriver.Chrome, address: str, script: Script, tmp_path: Path) -> None:
    as_seen(browser, width=1180, height=820, scheme="light")
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    browser.save_screenshot(str(tmp_path / "welcome.png"))
    say(browser, "Why is the cache so small?\nBriefly.".replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL))
    until(browser, lambda _: "one small vector" in text_of(browser, ".assistant"))
    script.flows.clear()  # the answer is under way: its beginning is shown, its end not yet made
    assert "stays text" not in text_of(browser, ".assistant")
    assert browser.find_element(By.ID, "stop").is_displayed()
    until(browser, lambda _: "1.0 MiB of 96 MiB" in text_of(browser, "#live-cache"))
    browser.save_screenshot(str(tmp_path / "streaming.png"))
    script.flows.set()
    until(browser, answered)
    assert text_of(browser, ".turn.user .asked") == "Why is the cache so small?\nBriefly."
    answer = browser.find_element(By.CSS_SELECTOR, ".turn.assistant")
    assert answer.find_element(By.TAG_NAME, "strong").text == "one small vector"
    assert len(answer.find_elements(By.CSS_SELECTOR, "ol > li")) == 3
    assert answer.find_element(By.TAG_NAME, "pre").text.startswith("latent = compress(hidden)\n")
    assert "真的 🙂" in answer.text
    assert "<img src=x onerror=alert(1)> stays text." in answer.text
    assert answer.find_elements(By.TAG_NAME, "img") == []
    assert text_of(browser, "#status") == "The answer is complete."
    assert browser.find_element(By.ID, "conversation").get_attribute("aria-busy") == "false"
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    for selector, copied in ((".code .copy", CODE), (".assistant [aria-label='Copy the answer']", REPLY)):
        browser.find_element(By.CSS_SELECTOR, selector).click()
        assert browser.execute_script("return window.copied") == copied
    assert text_of(browser, "#live-speed").endswith(" tokens/s")
    assert float(text_of(browser, "#live-speed").split()[0]) > 1
    assert text_of(browser, "#live-active") == "5.5% of 671 B parameters active"
    browser.find_element(By.CSS_SELECTOR, "#live summary").click()
    panel = browser.find_element(By.CSS_SELECTOR, "#live .panel").text
    assert re.search(r"First token\n[\d.]+ s\n", panel)
    assert re.search(r"Tokens written\n\d{3} after \d\d\n", panel)
    assert re.search(r"Prompt found in the cache\n0 of \d\d tokens \(0%\)\n", panel)
    assert "Cost" not in panel, "this server counts none"
    until(browser, lambda _: text_of(browser, "#live-cache").startswith("0 B of"))
    for name, width, height, scheme in (
        ("light", 1180, 820, "light"),
        ("dark", 1180, 820, "dark"),
        ("phone", 390, 800, "light"),
        ("phone-dark", 390, 800, "dark"),
    ):
        as_seen(browser, width=width, height=height, scheme=scheme)
        assert fits(browser), name
        browser.save_screenshot(str(tmp_path / f"{name}.png"))
    browser.find_element(By.ID, "toggle-side").click()
    assert browser.find_element(By.ID, "new-chat").is_displayed(), "the list lies over a narrow page"
    assert fits(browser)
    browser.find_element(By.ID, "input").send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "new-chat").is_displayed()
    assert outside_and_errors(browser, address) == ([], [])


def test_stop_new_chat_and_errors(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    for stop in (lambda: browser.find_element(By.ID, "stop").click(), lambda: _press_escape(browser)):
        say(browser, ENDLESS)
        until(browser, lambda _: "word word" in text_of(browser, ".turn.assistant:last-child"))
        stop()
        until(browser, answered)
        assert text_of(browser, ".turn.assistant:last-child .note") == "Stopped."
    until(browser, lambda _: text_of(browser, "#live-cache").startswith("0 B of"))
    assert text_of(browser, "#error") == ""
    say(browser, "And now?")
    until(browser, lambda _: "stays text" in text_of(browser, ".turn.assistant:last-child"))
    assert len(browser.find_elements(By.CLASS_NAME, "turn")) == 6
    browser.find_element(By.ID, "input").send_keys(Keys.CONTROL, "k", Keys.NULL)
    assert browser.find_elements(By.CLASS_NAME, "turn") == []
    assert browser.find_element(By.ID, "welcome").is_displayed()
    browser.execute_script(
        'window.fetch = () => Promise.resolve(new Response(\'{"error":{"message":"no room"}}\', {status: 429}))'
    )
    say(browser, "Hello?")
    until(browser, lambda _: text_of(browser, "#error") == "No room.")
    assert browser.find_element(By.ID, "input").get_property("value") == "Hello?"
    assert browser.find_elements(By.CLASS_NAME, "turn") == []
    assert len(browser.find_elements(By.CSS_SELECTOR, "#list li")) == 1, "nothing is kept of what was not asked"
    assert outside_and_errors(browser, address) == ([], [])


def _press_escape(browser: webdriver.Chrome) -> None:
    browser.find_element(By.ID, "input").send_keys(Keys.ESCAPE)
