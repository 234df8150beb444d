"""Test the page in a real browser: upload an image and speech, read the text, see images; errors are shown.

A screenshot is kept as artifacts/page.png.
"""

from pathlib import Path
from typing import Any

import pytest

ARTIFACTS = Path(__file__).parents[2] / "artifacts"

pytestmark = pytest.mark.timeout(600)


def test_a_person_uploads_an_image_and_speech_and_gets_a_text_and_images(browser: Any, address: str, raw: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 120)
    browser.get(address)
    wait.until(lambda page: "million parameters" in page.find_element(By.ID, "about").text)
    browser.find_element(By.ID, "image").send_keys(str(raw / "0.png"))
    browser.find_element(By.ID, "audio").send_keys(str(raw / "0.wav"))
    played = browser.execute_async_script(
        "const done = arguments[0], player = document.getElementById('player');"
        "player.play().then(() => done(player.duration), error => done(String(error)));"
    )
    assert played == pytest.approx(1.0, abs=0.05), "the speech plays"
    browser.find_element(By.ID, "text").send_keys("a red square")
    browser.find_element(By.ID, "describe").click()
    wait.until(lambda page: page.find_elements(By.ID, "written"))
    shown = browser.find_element(By.ID, "answer").text
    assert "What belongs together" in shown and "text + image" in shown and "Nearest in the store" in shown
    words = browser.find_elements(By.CSS_SELECTOR, ".word")
    words[1].click()
    assert len(browser.find_elements(By.CSS_SELECTOR, ".cells i")) == 16
    assert browser.find_elements(By.CSS_SELECTOR, ".frames i")
    ARTIFACTS.mkdir(exist_ok=True)
    browser.save_screenshot(str(ARTIFACTS / "page.png"))

    browser.find_element(By.ID, "generate").click()
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".images img")) == 4)
    image = browser.find_element(By.CSS_SELECTOR, ".images img")
    wait.until(lambda page: page.execute_script("return arguments[0].naturalWidth", image) == 64)
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]
    assert not wrong, wrong


def test_a_drawing_is_an_image_too_and_an_empty_form_says_so(browser: Any, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 120)
    browser.get(address)
    browser.find_element(By.ID, "describe").click()
    wait.until(lambda page: "no input" in page.find_element(By.ID, "answer").text)
    browser.find_element(By.TAG_NAME, "summary").click()
    canvas = browser.find_element(By.ID, "canvas")
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(30, 20).release().perform()
    browser.find_element(By.ID, "describe").click()
    wait.until(lambda page: page.find_elements(By.ID, "written"))
