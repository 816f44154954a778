"""How tests drive the page: what a reader does, what is to be seen, and what the model behind it says."""

import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from daedal.infer.request import Request
from daedal.text.tokenizer import Tokenizer

REPLY = """Latent attention keeps **one small vector** per token instead of all keys and values. That is why a long \
conversation fits into little memory.

Three things follow:

1. The cache holds `kv_lora_rank + qk_rope_head_dim` numbers per token.
2. Decoding reads less, so it is *faster*.
3. Nothing of this changes the answer – 真的 🙂.

```python
latent = compress(hidden)
keys, values = expand(latent)  # one of the two is read and the other never written, as long as nobody asks for both
```

And <img src=x onerror=alert(1)> stays text."""
SHORT = "That <b>stays text</b>."
ENDLESS = "please do not end"


class Script:
    """What the model says; it goes on token by token only as far as `allow` lets it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._reply, self._short = tokenizer.encode(REPLY), tokenizer.encode(SHORT)
        self._pause = threading.Event()
        self.flows = threading.Event()
        self.flows.set()

    def __call__(self, request: Request) -> Iterator[int]:
        prompt = self._tokenizer.decode(request.prompt)
        last = prompt.split("user\n")[-1]
        if ENDLESS not in last:
            return iter(self._reply if "cache" in last else self._short)
        words = self._tokenizer.encode("word ")
        return (token for _ in iter(int, 1) for token in words)

    def before_step(self) -> None:
        assert self.flows.wait(60)
        self._pause.wait(0.002)


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


def fits(browser: webdriver.Chrome) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def outside_and_errors(browser: webdriver.Chrome, address: str) -> tuple[list[str], list[dict]]:
    own = urlsplit(address).netloc
    urls = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    outside = [url for url in urls if urlsplit(url).netloc != own]
    return outside, [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def record_bodies(browser: webdriver.Chrome) -> None:
    browser.execute_script(
        "window.bodies = []; const fetched = window.fetch;"
        "window.fetch = (path, options) => {"
        "  if (options?.body) window.bodies.push(JSON.parse(options.body));"
        "  return fetched(path, options); };"
    )


def bodies(browser: webdriver.Chrome) -> list[dict]:
    return browser.execute_script("return window.bodies")
