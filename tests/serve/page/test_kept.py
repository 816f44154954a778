"""Conversations stay in the browser: read while another is answered, reloaded, renamed, deleted, exported, edited."""

import json
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.serve.page.driving import (
    ENDLESS,
    SHORT,
    answered,
    bodies,
    outside_and_errors,
    record_bodies,
    say,
    text_of,
    until,
)


def test_conversations_are_kept(browser: webdriver.Chrome, address: str, tmp_path: Path) -> None:
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    hostile = "<img src=x onerror=alert(1)> what?"
    say(browser, hostile)
    until(browser, answered)
    assert titles(browser) == [hostile]
    browser.find_element(By.ID, "new-chat").click()
    say(browser, ENDLESS)
    until(browser, lambda _: "word word" in text_of(browser, ".assistant"))
    opener(browser, 1).click()  # the answer goes on while another conversation is read
    until(browser, lambda _: "stays text" in text_of(browser, ".assistant"))
    assert browser.find_element(By.ID, "send").is_displayed()
    assert browser.find_elements(By.CSS_SELECTOR, "#list .running") != []
    browser.back()
    until(browser, lambda _: "word word" in text_of(browser, ".assistant"))
    assert browser.find_element(By.ID, "stop").is_displayed()

    read = len(text_of(browser, ".said"))
    browser.refresh()
    until(browser, lambda _: text_of(browser, ".note") == "Interrupted.")
    assert len(text_of(browser, ".said")) >= read, "an answer is kept as far as it came"
    assert titles(browser) == [ENDLESS, hostile]

    edit_tools(browser, 0, "Rename")
    browser.find_element(By.CSS_SELECTOR, "#list input").send_keys("Words", Keys.ENTER)
    until(browser, lambda _: titles(browser) == ["Words", hostile])
    edit_tools(browser, 0, "Delete")
    until(browser, lambda _: titles(browser) == [hostile])
    assert browser.find_elements(By.CLASS_NAME, "turn") == []
    browser.find_element(By.CSS_SELECTOR, "#notice button").click()
    until(browser, lambda _: titles(browser) == ["Words", hostile])

    browser.find_element(By.ID, "export-all").click()
    until(browser, lambda _: (tmp_path / "conversations.json").is_file())
    kept = json.loads((tmp_path / "conversations.json").read_text(encoding="utf-8"))
    assert sorted(each["title"] for each in kept) == sorted(["Words", hostile])
    assert {message["content"] for each in kept for message in each["messages"]} >= {hostile, SHORT, ENDLESS}
    browser.refresh()
    until(browser, lambda _: titles(browser) == ["Words", hostile])
    assert outside_and_errors(browser, address) == ([], [])


def test_a_question_is_edited_and_an_answer_asked_for_again(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    for text in ("One?", "Two?"):
        say(browser, text)
        until(browser, lambda _: "stays text" in text_of(browser, ".turn.assistant:last-child"))
        until(browser, answered)
    record_bodies(browser)
    browser.find_element(By.CSS_SELECTOR, ".turn.assistant:last-child [aria-label='Answer again']").click()
    until(browser, lambda _: len(bodies(browser)) == 1)
    until(browser, answered)
    browser.find_element(By.ID, "input").send_keys(Keys.UP)
    area = browser.find_element(By.CSS_SELECTOR, ".editing textarea")
    assert area.get_property("value") == "Two?"
    area.send_keys(Keys.ESCAPE)
    assert browser.switch_to.active_element == browser.find_element(By.ID, "input")
    browser.find_element(By.CSS_SELECTOR, ".turn.user [aria-label='Edit the question']").click()
    browser.find_element(By.CSS_SELECTOR, ".editing textarea").send_keys(" Or more?", Keys.ENTER)
    until(browser, lambda _: len(bodies(browser)) == 2)
    until(browser, answered)
    asked = [[message["content"] for message in body["messages"]] for body in bodies(browser)]
    assert asked == [["One?", SHORT, "Two?"], ["One? Or more?"]]
    assert len(browser.find_elements(By.CLASS_NAME, "turn")) == 2
    assert outside_and_errors(browser, address) == ([], [])


def test_the_latest_conversations_are_kept(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    script = """
        const done = arguments[0];
        import("/store.js").then(async ({ Store }) => {
            const store = await Store.open();
            for (const id of ["1", "2", "3", "4"]) await store.save({ id, title: "", updated: Number(id) });
            await store.trim(2);
            done([(await store.heads()).map(({ id }) => id), (await store.readAll()).map(({ id }) => id)]);
        });
    """
    assert browser.execute_async_script(script) == [["4", "3"], ["3", "4"]]


def titles(browser: webdriver.Chrome) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('.opener')].map((each) => each.title)")


def opener(browser: webdriver.Chrome, index: int) -> WebElement:
    return browser.find_elements(By.CLASS_NAME, "opener")[index]


def edit_tools(browser: webdriver.Chrome, index: int, label: str) -> None:
    """Presses a button of a row, which is to be seen as soon as the row has the focus."""
    browser.execute_script("arguments[0].focus()", opener(browser, index))
    browser.find_elements(By.CSS_SELECTOR, f"#list [aria-label={label}]")[index].click()
