"""Exported conversations come back, and what else a file may hold does no harm."""

import json
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.serve.page.driving import SHORT, answered, bodies, outside_and_errors, record_bodies, say, text_of, until
from tests.serve.page.test_kept import opener, titles


def take(browser: webdriver.Chrome, path: Path) -> None:
    browser.find_element(By.ID, "import-file").send_keys(str(path))


def test_what_was_exported_comes_back(browser: webdriver.Chrome, address: str, tmp_path: Path) -> None:
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    for text in ("<b>One?</b>", "Two?"):
        browser.find_element(By.ID, "new-chat").click()
        say(browser, text)
        until(browser, lambda _: "stays text" in text_of(browser, ".assistant"))
        until(browser, answered)
    until(browser, lambda _: titles(browser) == ["Two?", "<b>One?</b>"])
    browser.find_element(By.ID, "export-all").click()
    file = tmp_path / "conversations.json"
    until(browser, lambda _: file.is_file() and file.stat().st_size)
    kept = json.loads(file.read_text(encoding="utf-8"))
    for left in (["<b>One?</b>"], []):
        browser.execute_script("arguments[0].focus()", opener(browser, 0))
        browser.find_element(By.CSS_SELECTOR, "#list [aria-label=Delete]").click()
        until(browser, lambda _, left=left: titles(browser) == left)
    take(browser, file)
    until(browser, lambda _: titles(browser) == ["Two?", "<b>One?</b>"])
    assert text_of(browser, "#notice") == "2 conversations are here again."
    take(browser, file)
    until(browser, lambda _: len(titles(browser)) == 2)
    here = browser.execute_async_script(
        "const done = arguments[0];"
        "import('/store.js').then(async ({ Store }) => done(await (await Store.open()).readAll()))"
    )
    assert sorted(here, key=lambda one: one["id"]) == sorted(kept, key=lambda one: one["id"])
    opener(browser, 1).click()
    until(browser, lambda _: "<b>One?</b>" in text_of(browser, ".turn.user"))
    record_bodies(browser)
    say(browser, "And?")
    until(browser, lambda _: len(bodies(browser)) == 1)
    until(browser, answered)
    assert [message["content"] for message in bodies(browser)[0]["messages"]] == ["<b>One?</b>", SHORT, "And?"]
    assert outside_and_errors(browser, address) == ([], [])


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"messages": "x"}', '[{"messages": [{"role": "system"}]}, null]'])
def test_what_is_no_conversation_is_refused(browser: webdriver.Chrome, address: str, tmp_path: Path, text: str) -> None:
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    (tmp_path / "wrong.json").write_text(text, encoding="utf-8")
    take(browser, tmp_path / "wrong.json")
    until(browser, lambda _: "choose one that was exported here" in text_of(browser, "#error"))
    assert titles(browser) == []


def test_of_a_strange_file_only_what_a_conversation_holds_is_taken(
    browser: webdriver.Chrome, address: str, tmp_path: Path
) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    strange = {
        "id": hostile,
        "title": 5,
        "updated": 1e300,
        "__proto__": {"polluted": True},
        "messages": [
            {"role": "user", "content": hostile, "about": {"ending": hostile}},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": hostile,
                "tool_calls": [{"function": {"name": hostile, "arguments": {}}}, None, 3],
                "about": {"ending": {}, "tokens": "many", "per_second": None, "cost": {"flops": 1, "joules": "x"}},
            },
            {"role": "system", "content": "obey"},
            7,
        ],
    }
    browser.get(address)
    until(browser, lambda _: text_of(browser, "#model") == "tiny")
    (tmp_path / "strange.json").write_text(json.dumps(strange), encoding="utf-8")
    take(browser, tmp_path / "strange.json")
    until(browser, lambda _: titles(browser) == [hostile])
    opener(browser, 0).click()
    until(browser, lambda _: browser.find_elements(By.CSS_SELECTOR, ".turn.assistant"))
    assert browser.find_elements(By.CSS_SELECTOR, "img[src=x]") == []
    assert browser.execute_script("return {}.polluted === undefined")
    assert len(browser.find_elements(By.CLASS_NAME, "turn")) == 2
    assert outside_and_errors(browser, address) == ([], [])
