"""One Chromium for all tests of the page, as new for each of them, and a server that says what a script says."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.serve.page.driving import Script, as_seen

FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --disable-default-apps
    --hide-scrollbars --lang=en-GB
"""


@pytest.fixture(scope="module")
def script(checkpoint: Path) -> Script:
    return Script(Tokenizer.load(checkpoint))


@pytest.fixture(scope="module")
def address(checkpoint: Path, script: Script) -> Iterator[str]:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), script, before_step=script.before_step)
    with serving(scripted_service(checkpoint, engine)) as address:
        yield address


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = _needed("chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(_needed("chromedriver"))
    chromium = webdriver.Chrome(options=options, service=service)
    try:
        yield chromium
    finally:
        chromium.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """As new, at desktop width; what it downloads lies in `tmp_path`."""
    as_seen(chromium, width=1180, height=820, scheme="light")
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    yield chromium
    if not chromium.current_url.startswith("data:"):
        wiped = {"origin": chromium.current_url.partition("#")[0].removesuffix("/"), "storageTypes": "all"}
        chromium.get("data:,")
        chromium.execute_cdp_cmd("Storage.clearDataForOrigin", wiped)
    chromium.get_log("browser")


def _needed(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sentence = f"{name} is not installed, and the page is tested in it: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return path
