"""The chat page in a real browser: a message is answered as it streams, stopped, and nothing comes from outside."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from daedal.infer.request import Request
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import DSML, THINK_END
from daedal.text.tokenizer import Tokenizer
from tests.serve.deepseek import deepseek_checkpoint, talking
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.serve.metered import TARIFF, metered_service

FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --disable-default-apps
    --hide-scrollbars --lang=en-GB
"""
REPLY = """Latent attention keeps **one small vector** per token instead of all keys and values. That is why a long \
conversation fits into little memory.

Three things follow:

1. The cache holds `kv_lora_rank + qk_rope_head_dim` numbers per token.
2. Decoding reads less, so it is *faster*.
3. Nothing of this changes the answer – 真的 🙂.

```python
latent = compress(hidden)
keys, values = expand(latent)
```

And <img src=x onerror=alert(1)> stays text."""
ENDLESS = "please do not end"


def _needed(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sentence = f"{name} is not installed, and the page is tested in it: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return path


class Script:
    """What the model says; it goes on token by token only as far as `allow` lets it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._reply = tokenizer.encode(REPLY)
        self._pause = threading.Event()
        self.flows = threading.Event()
        self.flows.set()

    def __call__(self, request: Request) -> Iterator[int]:
        prompt = self._tokenizer.decode(request.prompt)
        last = prompt.split("user\n")[-1]
        if ENDLESS not in last:
            return iter(self._reply)
        words = self._tokenizer.encode("word ")
        return (token for _ in iter(int, 1) for token in words)

    def before_step(self) -> None:
        assert self.flows.wait(60)
        self._pause.wait(0.002)


@pytest.fixture(scope="module")
def script(checkpoint: Path) -> Script:
    return Script(Tokenizer.load(checkpoint))


@pytest.fixture(scope="module")
def address(checkpoint: Path, script: Script) -> Iterator[str]:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), script, before_step=script.before_step)
    with serving(scripted_service(checkpoint, engine)) as address:
        yield address


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = _needed("chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(_needed("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


def until(browser: webdriver.Chrome, condition: object) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.02).until(condition)


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)


def say(browser: webdriver.Chrome, text: str) -> None:
    browser.find_element(By.ID, "input").send_keys(text, Keys.ENTER)


def answered(browser: webdriver.Chrome) -> bool:
    return browser.find_element(By.ID, "send").is_displayed()


def as_seen(browser: webdriver.Chrome, *, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def outside_and_errors(browser: webdriver.Chrome, address: str) -> tuple[list[str], list[dict]]:
    own = urlsplit(address).netloc
    urls = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    outside = [url for url in urls if urlsplit(url).netloc != own]
    return outside, [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


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
    assert text_of(browser, ".turn.user") == "Why is the cache so small?\nBriefly."
    answer = browser.find_element(By.CSS_SELECTOR, ".turn.assistant")
    assert answer.find_element(By.TAG_NAME, "strong").text == "one small vector"
    assert len(answer.find_elements(By.CSS_SELECTOR, "ol > li")) == 3
    assert answer.find_element(By.TAG_NAME, "pre").text.startswith("latent = compress(hidden)\n")
    assert "真的 🙂" in answer.text
    assert "<img src=x onerror=alert(1)> stays text." in answer.text
    assert answer.find_elements(By.TAG_NAME, "img") == []
    assert text_of(browser, "#live-speed").endswith(" tokens/s")
    assert float(text_of(browser, "#live-speed").split()[0]) > 1
    assert text_of(browser, "#live-active") == "5.5% of 671 B parameters active"
    until(browser, lambda _: text_of(browser, "#live-cache").startswith("0 B of"))
    for name, width, height, scheme in (
        ("light", 1180, 820, "light"),
        ("dark", 1180, 820, "dark"),
        ("phone", 390, 800, "light"),
        ("phone-dark", 390, 800, "dark"),
    ):
        as_seen(browser, width=width, height=height, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), name
        browser.save_screenshot(str(tmp_path / f"{name}.png"))
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
    browser.find_element(By.ID, "new-chat").click()
    assert browser.find_elements(By.CLASS_NAME, "turn") == []
    assert browser.find_element(By.ID, "welcome").is_displayed()
    browser.execute_script(
        'window.fetch = () => Promise.resolve(new Response(\'{"error":{"message":"no room"}}\', {status: 429}))'
    )
    say(browser, "Hello?")
    until(browser, lambda _: text_of(browser, "#error") == "No room.")
    assert browser.find_element(By.ID, "input").get_property("value") == "Hello?"
    assert browser.find_elements(By.CLASS_NAME, "turn") == []
    assert outside_and_errors(browser, address) == ([], [])


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
        until(browser, lambda _: text_of(browser, ".thought-text").startswith("First"))
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
        assert text_of(browser, ".calls > pre > code") == 'look_up({"place": "<b>Bern"})'
        assert browser.execute_script(
            "return [...document.querySelector('.turn.assistant').children].map((part) => part.className)"
        ) == ["thought", "said", "calls"]
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
        assert talk.said.prompts[-1] == FORMATS["deepseek-v4"].render(asked)
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
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.save_screenshot(str(tmp_path / "cost.png"))
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
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.save_screenshot(str(tmp_path / "compared.png"))
        assert outside_and_errors(browser, address.removesuffix("/")) == ([], [])


RENDERED = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# Title\ntext": "<h3>Title</h3><p>text</p>",
    "- a\n- **b**\n\n- c\nend": "<ul><li>a</li><li><strong>b</strong></li><li>c</li></ul><p>end</p>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "`a*b*c` and *d*": "<p><code>a*b*c</code> and <em>d</em></p>",
    "2 * 3 * 4, snake_case_name, **open": "<p>2 * 3 * 4, snake_case_name, **open</p>",
    "```html\n<b>**x**</b>\n```\nafter": '<pre tabindex="0"><code>&lt;b&gt;**x**&lt;/b&gt;</code></pre><p>after</p>',
    "```\nunfinished": '<pre tabindex="0"><code>unfinished</code></pre>',
    "<script>alert(1)</script>": "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>",
    "a" + "`" * 20_000: f"<p>a{'`' * 20_000}</p>",
    "*a " * 7_000: f"<p>{'*a ' * 7_000}</p>",
}


def test_an_answer_becomes_markup_only_where_the_page_says_so(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    script = """
        const [text, done] = arguments;
        const box = document.createElement("div");
        import("/markdown.js").then(({ render }) => { box.append(render(text)); done(box.innerHTML); });
    """
    for text, markup in RENDERED.items():
        assert browser.execute_async_script(script, text) == markup, text[:40]


def _press_escape(browser: webdriver.Chrome) -> None:
    browser.find_element(By.ID, "input").send_keys(Keys.ESCAPE)
