"""The page's settings, and the key that a server may want."""

import hashlib
import json
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from daedal.serve.state import keys
from daedal.text.encodings.tokens import THINK_END
from daedal.text.tokenizer import Tokenizer
from tests.serve.deepseek import deepseek_checkpoint, talking
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.serve.page.driving import bodies, outside_and_errors, record_bodies, say, text_of, until


def test_settings_are_kept_and_obeyed(
    browser: webdriver.Chrome, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = deepseek_checkpoint(tmp_path_factory.mktemp("page"), "deepseek-v4")
    with talking(directory, "deepseek-v4") as talk:
        talk.said.texts = [f"{THINK_END}ok"]
        browser.get(talk.address)
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        browser.find_element(By.ID, "open-settings").click()
        form = browser.find_element(By.ID, "settings-form")
        tools = '[{"type": "function", "function": {"name": "look_up"}}]'
        chosen = {"system": "Be brief.", "temperature": "0.7", "max_tokens": "50", "seed": "3", "tools": tools}
        for name, text in chosen.items():
            form.find_element(By.NAME, name).send_keys(text)
        assert [each.text for each in form.find_elements(By.CSS_SELECTOR, "[name=effort] option")] == [
            "the model's own",
            "high",
            "max",
        ]
        for name, value in {"effort": "max", "thinking": "enabled", "theme": "dark"}.items():
            form.find_element(By.CSS_SELECTOR, f"[name={name}] option[value={value}]").click()
        form.find_element(By.NAME, "top_p").send_keys("7")  # out of range, and so not taken
        browser.save_screenshot(str(tmp_path / "settings.png"))
        form.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        assert form.is_displayed()
        browser.refresh()
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        paper = "return getComputedStyle(document.body).backgroundColor"
        assert browser.execute_script(paper) == "rgb(25, 24, 23)", "dark, where the system is light"
        record_bodies(browser)
        say(browser, "Hello?")
        until(browser, lambda _: text_of(browser, ".said") == "ok")
        asked = bodies(browser)[0]
        assert {name: asked[name] for name in ("temperature", "top_p", "max_tokens", "seed", "tools", "thinking")} == {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 50,
            "seed": 3,
            "tools": json.loads(tools),
            "thinking": {"type": "enabled"},
        }
        assert asked["reasoning_effort"] == "max"
        assert asked["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
        ]
        assert outside_and_errors(browser, talk.address.removesuffix("/")) == ([], [])


def test_a_server_with_keys_is_asked_with_one(browser: webdriver.Chrome, checkpoint: Path, tmp_path: Path) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: Tokenizer.load(checkpoint).encode("Welcome."))
    service = scripted_service(checkpoint, engine)
    service.keys = keys.Keys((keys.Key(name="ann", sha256=hashlib.sha256(b"secret").hexdigest()),))
    with serving(service) as address:
        browser.get(address)
        until(browser, lambda _: browser.find_element(By.ID, "locked").is_displayed())
        assert not browser.find_element(By.ID, "input").is_enabled()
        assert text_of(browser, "#model") == ""
        browser.find_element(By.ID, "key").send_keys("wrong", Keys.ENTER)
        until(browser, lambda _: text_of(browser, "#key-error") == "The server does not know this key.")
        browser.save_screenshot(str(tmp_path / "locked.png"))
        browser.find_element(By.ID, "key").send_keys("secret", Keys.ENTER)
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        assert not browser.find_element(By.ID, "locked").is_displayed()
        say(browser, "Hello?")
        until(browser, lambda _: text_of(browser, ".said") == "Welcome.")
        browser.refresh()
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        browser.find_element(By.ID, "open-settings").click()
        browser.find_element(By.ID, "forget-key").click()
        until(browser, lambda _: not browser.find_element(By.ID, "input").is_enabled())
        outside, logged = outside_and_errors(browser, address)
        assert outside == []
        assert all("401" in entry["message"] for entry in logged)
