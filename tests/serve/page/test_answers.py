"""What an answer holds beside its text: thought, calls, cost; and a converted model beside its original."""

import re
import threading
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import DSML, THINK_END
from tests.serve.deepseek import Talk, deepseek_checkpoint, talking
from tests.serve.live import serving
from tests.serve.metered import TARIFF, metered_service
from tests.serve.page.driving import answered, as_seen, fits, outside_and_errors, say, text_of, until


def test_a_thought_is_folded_above_its_answer_and_calls_stand_below(
    browser: webdriver.Chrome, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    goes_on, waits = threading.Event(), threading.Event()
    call = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="look_up">\n<{DSML}parameter name="place" string="true"><b>Bern'
        f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    thought, said = "First <i>this</i>,\nthen 真的.", "**Here** it is."

    def before_step() -> None:
        if waits.is_set() and talk.engine.stats().generation_tokens_total >= len(thought) // 2:
            assert goes_on.wait(60)

    directory = deepseek_checkpoint(tmp_path_factory.mktemp("page"), "deepseek-v4")
    with talking(directory, "deepseek-v4", before_step) as talk:
        talk.said.texts = [f"{thought}{THINK_END}{said}{call}"]
        address = talk.address.removesuffix("/")
        as_seen(browser, width=1180, height=820, scheme="light")
        browser.get(address)
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        waits.set()
        say(browser, "Where?")
        until(browser, lambda _: text_of(browser, ".thought-text").startswith("F"))  # what follows goes together
        details = browser.find_element(By.CSS_SELECTOR, ".turn.assistant details.thought")
        assert details.get_property("open")
        assert browser.find_elements(By.CLASS_NAME, "said") == []
        browser.save_screenshot(str(tmp_path / "thinking.png"))
        goes_on.set()
        until(browser, answered)
        assert not details.get_property("open")
        assert text_of(browser, ".thought-text") == thought
        assert text_of(browser, ".said") == "Here it is."
        assert text_of(browser, ".said strong") == "Here"
        assert re.fullmatch(r"Thought for [\d.]+ s", text_of(browser, ".thought summary"))
        assert text_of(browser, ".call-name") == "look_up"
        assert text_of(browser, ".call pre") == '{\n  "place": "<b>Bern"\n}'
        assert browser.execute_script(
            "return [...document.querySelector('.turn.assistant').children].map((part) => part.className)"
        ) == ["thought", "said", "calls", "tools"]
        details.find_element(By.TAG_NAME, "summary").click()
        assert details.get_property("open")
        browser.save_screenshot(str(tmp_path / "called.png"))
        talk.said.texts = [f"again{THINK_END}"]
        say(browser, "And?")
        until(browser, lambda _: text_of(browser, ".turn:last-child .note") == "The model gave an empty answer.")
        assert browser.find_elements(By.CSS_SELECTOR, ".turn:last-child details[open]") != []
        asked = [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": said, "reasoning_content": thought},
            {"role": "user", "content": "And?"},
        ]
        assert talk.said.prompts[-1] == FORMATS["deepseek-v4"].render(asked), "nobody answered the call"

        talk.said.texts = [f"{thought}{THINK_END}{call}"]
        _answer_by_hand(browser, talk, tmp_path)
        assert outside_and_errors(browser, address) == ([], [])


def test_an_answer_says_what_it_cost(browser: webdriver.Chrome, checkpoint: Path, tmp_path: Path) -> None:
    with serving(metered_service(checkpoint, max_context=96)) as address:
        as_seen(browser, width=390, height=800, scheme="light")
        browser.get(address)
        until(browser, lambda _: text_of(browser, "#model") == "tiny")
        say(browser, "Hello?")
        until(browser, lambda _: text_of(browser, ".turn.assistant .cost"))
        dollars, joules, work, cache = text_of(browser, ".turn.assistant .cost").split(" · ")
        assert float(dollars.removeprefix("$")) > 0
        assert float(joules.removesuffix(" J").replace(",", "")) > 0
        assert work.split()[1] in ("MFLOP", "GFLOP")
        assert cache.split(maxsplit=1)[1] in ("B·s of cache", "KiB·s of cache", "MiB·s of cache")  # as long as it took
        line = browser.find_element(By.CSS_SELECTOR, ".turn.assistant .cost")
        assert line.get_attribute("title") == f"energy: {TARIFF.energy.source}; price: rented"
        assert fits(browser)
        browser.save_screenshot(str(tmp_path / "cost.png"))
        browser.find_element(By.CSS_SELECTOR, "#live summary").click()
        assert text_of(browser, "#panel-cost").startswith(dollars)
        browser.find_element(By.CSS_SELECTOR, "[aria-label='Answer again']").click()
        until(browser, lambda _: text_of(browser, "#panel-cached").startswith("16 of "))  # a page of 16 tokens
        assert outside_and_errors(browser, address.removesuffix("/")) == ([], [])


def test_a_converted_model_stands_beside_its_original(
    browser: webdriver.Chrome, checkpoint: Path, tmp_path: Path
) -> None:
    row = {"context": 4096, "active_params": 106e6, "decode_flops_per_token": 3.2e8}
    service = metered_service(checkpoint, max_context=96)
    service.compared = (
        {**row, "name": "latent", "kv_bytes_per_token": 11520, "perplexity_ratio": 1.0312},
        {**row, "name": "dense", "kv_bytes_per_token": 23040, "perplexity_ratio": 1.0},
    )
    with serving(service) as address:
        as_seen(browser, width=390, height=800, scheme="light")
        browser.get(address)
        until(browser, lambda _: browser.find_element(By.ID, "compared").is_displayed())
        rows = browser.find_elements(By.CSS_SELECTOR, "#compared tr")
        cells = [[cell.text for cell in each.find_elements(By.CSS_SELECTOR, "th, td")] for each in rows]
        assert cells == [
            ["", "latent", "dense"],
            ["Cache per token", "11 KiB", "23 KiB"],
            ["Parameters per token", "106 M", "106 M"],
            ["Work per token after 4,096", "320 MFLOP", "320 MFLOP"],
            ["Perplexity of real text", "× 1.031", "× 1.000"],
        ]
        assert fits(browser)
        browser.save_screenshot(str(tmp_path / "compared.png"))
        assert outside_and_errors(browser, address.removesuffix("/")) == ([], [])


def _answer_by_hand(browser: webdriver.Chrome, talk: Talk, tmp_path: Path) -> None:
    """Asks for the last answer again, which calls a tool, and gives the call its result."""
    browser.find_element(By.CSS_SELECTOR, ".turn.assistant:last-child [aria-label='Answer again']").click()
    until(browser, lambda _: browser.find_elements(By.CSS_SELECTOR, ".turn:last-child .call textarea") != [])
    send = browser.find_element(By.CSS_SELECTOR, ".calls button.filled")
    assert not send.is_enabled(), "a result is wanted first"
    browser.find_element(By.CSS_SELECTOR, ".turn:last-child .call textarea").send_keys("<i>Sunny")
    talk.said.texts = [f"{THINK_END}Done."]
    browser.save_screenshot(str(tmp_path / "result.png"))
    send.click()
    until(browser, lambda _: text_of(browser, ".turn:last-child .said") == "Done.")
    until(browser, answered)
    assert text_of(browser, ".call .result") == "<i>Sunny"
    assert "<i>Sunny" in talk.said.prompts[-1]
    assert talk.said.prompts[-1].count("look_up") == 1
