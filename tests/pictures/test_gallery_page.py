"""The page as people use it: headless Chromium opens it from the disk, clicks, types, slides and copies."""

import io
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image, ImageStat
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from lace_lora.pictures import gallery
from lace_lora.pictures.gallery import Card
from lace_lora.pictures.recipe import Design

NET, EDGE = "hexagonal net", f"an edge, {'W' * 100}"
HOSTILE = """</script><script>document.title = 'broken'</script> "two"  spaces 'one' 🧵 {{ 7 * 7 }} &amp; <b>bold</b>"""
RED, BLUE = (200, 30, 30), (30, 30, 200)  # refined, and as it was before


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not there: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Containers run tests as root, which the sandbox refuses, and have little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of five pictures: the third has no base, the first is flagged and has numbers."""
    folder = tmp_path_factory.mktemp("pictures")
    cards = []
    for index, prompt in enumerate([NET, EDGE, NET, HOSTILE, NET]):
        file, base = (folder / f"{kind}_output_{index:03d}.png" for kind in ("refined", "base"))
        Image.new("RGB", (90, 60), RED).save(file)
        Image.new("RGB", (90, 60), BLUE).save(base)
        values: dict[str, Any] = {} if index else {"latent_change": 0.25, "edge_change": -0.031, "warning": "look here"}
        cards.append(Card(Design(index, prompt, 10 + index), file, None if index == 2 else base, **values))
    page = folder / gallery.PAGE
    page.write_text(gallery.page("lace", cards, {"prompts": [HOSTILE]}), encoding="utf-8")
    return page.as_uri()


class Page:
    """What a reader sees and does."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser = browser
        self.window(1200, 800)
        browser.get(address)

    def window(self, width: int, height: int, **media: str) -> None:
        """The size of the window in CSS pixels, and what the system prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def button(self, name: str) -> WebElement:
        return next(button for button in self.all("button") if button.accessible_name == name)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def open(self, index: int = 0) -> WebElement:
        self.all("main a")[index].click()
        return self.one("dialog")

    def is_open(self) -> bool:
        return bool(self.run("return document.querySelector('dialog').open"))

    def row(self, name: str) -> str | None:
        """What the large view says of the name; None if nothing."""
        rows = {row.text.split("\n")[0]: row.text.split("\n")[1] for row in self.all("dl .row") if row.is_displayed()}
        return rows.get(name)

    def colours(self, css: str = ".stage") -> list[str]:
        """The colours of a picture at a quarter and at three quarters of its width."""
        picture = Image.open(io.BytesIO(self.one(css).screenshot_as_png)).convert("RGB")
        x, y = picture.width // 4, picture.height // 4
        means = [ImageStat.Stat(picture.crop((left, y, left + 4, y + 4))).mean for left in (x, 3 * x)]
        return ["red" if red > blue + 100 else "blue" if blue > red + 100 else "other" for red, _, blue in means]

    def message(self) -> str:
        """The next message of the large view; copying takes a moment."""
        return str(WebDriverWait(self.browser, 5).until(lambda _: self.one("dialog [role=status]").text))

    def pasted(self) -> str:
        """What is in the clipboard."""
        self.press(Keys.ESCAPE)
        self.run("document.body.prepend(document.createElement('textarea'))")
        self.one("textarea").send_keys(Keys.CONTROL, "v")
        return str(self.run("return document.querySelector('textarea').value"))


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Page:
    browser.get_log("browser")
    return Page(browser, address)


def test_a_click_shows_the_picture_large(page: Page) -> None:
    assert not page.one("dialog").is_displayed()
    small = page.all("main img")[0]
    page.open(0)
    large = page.one(".after img")
    assert page.one("dialog").accessible_name == "Picture 1 of 5"
    assert large.get_attribute("src") == small.get_attribute("src")
    assert large.size["width"] > 2 * small.size["width"]
    assert large.size["width"] / large.size["height"] == pytest.approx(1.5, rel=0.01)
    assert (page.row("Prompt"), page.row("Seed"), page.row("File")) == (NET, "10", "refined_output_000.png")
    assert str(page.one("dialog a").get_attribute("href")).endswith("/refined_output_000.png")
    page.button("Close").click()
    assert not page.is_open()
    assert page.browser.get_log("browser") == []


def test_enter_opens_it_escape_closes_it_and_the_focus_comes_back(page: Page) -> None:
    page.all("main a")[1].send_keys(Keys.ENTER)
    assert page.one("dialog h2").text == "Picture 2 of 5"
    page.press(Keys.ARROW_RIGHT, Keys.ESCAPE)
    assert not page.is_open()
    assert page.browser.switch_to.active_element == page.all("main a")[1]


def test_keys_and_buttons_go_through_the_pictures(page: Page) -> None:
    page.open(1)
    seen = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.HOME):
        page.press(key)
        seen.append((page.one("dialog h2").text[8], page.row("Seed")))
    assert seen == [("3", "12"), ("2", "11"), ("5", "14"), ("1", "10"), ("5", "14"), ("1", "10")]
    page.button("Next picture").click()
    page.button("Next picture").click()
    page.button("Previous picture").click()
    assert page.row("Seed") == "11"


def test_the_focus_stays_in_the_large_view(page: Page) -> None:
    page.open(0)
    assert page.browser.switch_to.active_element.accessible_name == "Close"
    reached = set()
    for _ in range(12):
        page.press(Keys.TAB)
        assert page.run("return !document.activeElement.closest('header, main, footer')")
        reached.add(page.browser.switch_to.active_element.accessible_name)
    assert reached >= {
        "Previous picture", "Next picture", "Close", "Compare before and after refining", "Copy prompt", "Copy seed",
        "refined_output_000.png",
    }  # fmt: skip


def test_a_slider_compares_before_and_after(page: Page) -> None:
    page.open(0)
    slider = page.one("dialog input")
    assert page.colours() == ["blue", "red"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("value") == "51"
    assert slider.get_attribute("aria-valuetext") == "51% before, 49% refined"
    slider.send_keys(Keys.HOME)
    assert page.colours() == ["red", "red"]
    slider.send_keys(Keys.END)
    assert page.colours() == ["blue", "blue"]
    assert page.one("dialog h2").text == "Picture 1 of 5"
    stage = page.one(".stage")
    place = -stage.size["width"] // 10, stage.size["height"] // 5  # from the middle
    ActionChains(page.browser).move_to_element_with_offset(stage, *place).click().perform()
    assert int(str(slider.get_attribute("value"))) == pytest.approx(40, abs=1)
    assert page.run("return getComputedStyle(document.querySelector('.before')).clipPath").startswith("inset(0px")


def test_without_a_base_there_is_no_slider(page: Page) -> None:
    page.open(2)
    assert not page.one("dialog input").is_displayed()
    assert page.colours() == ["red", "red"]
    page.press(Keys.ARROW_RIGHT)
    assert page.one("dialog input").is_displayed()
    assert page.colours() == ["blue", "red"]


def test_numbers_and_badge_are_shown_where_they_are_known(page: Page) -> None:
    page.open(0)
    assert (page.row("Change in latent space"), page.row("Change in edge strength")) == ("25.0%", "−3.1%")
    assert page.one("dialog .warning").text == "Flagged look here"
    page.press(Keys.ARROW_RIGHT)
    assert (page.row("Change in latent space"), page.row("Change in edge strength")) == (None, None)
    assert not page.one("dialog .warning").is_displayed()
    badges = [badge for badge in page.all("main .badge") if badge.is_displayed()]
    assert len(badges) == 1


@pytest.mark.parametrize(
    "clipboard",
    ["navigator.clipboard", "undefined", "{ writeText: () => Promise.reject(new Error('refused')) }"],
    ids=["modern", "missing", "refused"],
)
def test_prompt_and_seed_can_be_copied(clipboard: str, page: Page) -> None:
    page.run(f"Object.defineProperty(navigator, 'clipboard', {{ value: {clipboard} }})")
    for name, text in (("Seed", "13"), ("Prompt", HOSTILE)):
        page.open(3)
        assert page.one("dialog [role=status]").text == ""
        page.button(f"Copy {name.lower()}").click()
        assert page.message() == f"{name} copied."
        assert page.pasted() == text
        page.run("document.querySelector('textarea').remove()")


def test_a_prompt_that_cannot_be_copied_is_selected(page: Page) -> None:
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.execCommand = () => false")
    page.open(3)
    page.button("Copy prompt").click()
    assert page.message() == "Prompt selected: press Ctrl+C to copy it."
    assert page.run("return getSelection().toString()") == HOSTILE


def test_the_filter_shows_one_prompt(page: Page) -> None:
    prompts = Select(page.one("select"))
    assert page.one("select").accessible_name == "Prompt"
    assert [option.get_attribute("textContent") for option in prompts.options] == ["All prompts", NET, EDGE, HOSTILE]
    prompts.select_by_index(1)
    assert [item.is_displayed() for item in page.all("main li")] == [True, False, True, False, True]
    assert page.one("[role=status]").text == "3 of 5 pictures"
    page.open(2)
    seen = [page.one("dialog h2").text]
    page.press(Keys.ARROW_RIGHT)
    seen.append(page.one("dialog h2").text)
    assert (seen, page.row("Seed")) == (["Picture 2 of 3", "Picture 3 of 3"], "14")
    page.press(Keys.ESCAPE)
    prompts.select_by_index(2)
    page.open(1)
    assert not page.one("[data-step]").is_displayed()
    page.press(Keys.ARROW_RIGHT, Keys.ESCAPE)
    prompts.select_by_index(0)
    assert all(item.is_displayed() for item in page.all("main li"))
    assert page.one("[role=status]").text == "5 pictures"


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_light_and_dark_as_the_system_prefers(scheme: str, is_dark: bool, page: Page) -> None:
    page.window(1200, 800, prefers_color_scheme=scheme)
    page.open(0)
    for css in ("body", "dialog"):
        for name, should_be_dark in (("backgroundColor", is_dark), ("color", not is_dark)):
            colour = page.run(f"return getComputedStyle(document.querySelector('{css}')).{name}")
            brightness = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3
            assert brightness < 60 if should_be_dark else brightness > 200


def test_a_phone_needs_no_sideways_scrolling(page: Page) -> None:
    page.window(360, 740)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    for link in page.all("main a"):
        link.click()
        assert page.run("return document.querySelector('dialog').scrollWidth") <= 360
        page.press(Keys.ESCAPE)
    page.open(1)
    controls = [control for control in page.all("button, select") if control.is_displayed()]
    assert len(controls) == 6
    assert min(min(control.size.values()) for control in controls) >= 44
    assert page.one(".stage").size["width"] > 300


@pytest.mark.parametrize(("preference", "animation"), [("reduce", "none"), ("no-preference", "appear")])
def test_nothing_moves_for_those_who_prefer_it(preference: str, animation: str, page: Page) -> None:
    page.window(1200, 800, prefers_reduced_motion=preference)
    page.open(0)
    assert page.run("return getComputedStyle(document.querySelector('dialog')).animationName") == animation


def test_the_focus_can_be_seen(page: Page) -> None:
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    page.press(Keys.TAB, Keys.TAB)
    assert page.browser.switch_to.active_element == page.all("main a")[0]
    assert page.run(outline) == "solid"
    page.open(0)
    page.press(Keys.TAB)
    assert page.browser.switch_to.active_element == page.one("dialog input")
    grip = "return getComputedStyle(document.activeElement).getPropertyValue('--ring')"
    assert page.run(grip) == "3px solid #fff"


def test_names_for_screen_readers(page: Page) -> None:
    links = page.all("main a")
    assert links[3].accessible_name == f"{HOSTILE}, seed 13".replace("  ", " ")
    assert [heading.text for heading in page.all("h1")] == ["lace"]
    page.open(3)
    pictures = page.all(".stage img")
    alts = [picture.get_attribute("alt") for picture in pictures]
    assert alts == ["The same picture before refining", f"{HOSTILE}, seed 13"]
    assert page.one("dialog input").aria_role == "slider"
    assert page.one("dialog h2").get_attribute("aria-live") == "polite"


def test_a_hostile_prompt_is_only_text(page: Page) -> None:
    page.open(3)
    assert page.run("return document.title") == "lace"
    assert page.run("return document.scripts.length") == 1
    shown = page.run("return [...document.querySelectorAll('.prompt')].map((prompt) => prompt.textContent)")
    assert shown == [NET, EDGE, NET, HOSTILE, NET, HOSTILE]
    assert page.all(".prompt *, option *") == []
    assert page.browser.get_log("browser") == []


def test_nothing_is_fetched_and_nothing_foreign_runs(page: Page) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    outcome = page.browser.execute_async_script(
        """
        const [url, done] = arguments, ran = "document.title = 'ran'";
        document.body.insertAdjacentHTML("beforeend", `<img src="${url}/picture" onerror="${ran}">`);
        document.body.append(Object.assign(document.createElement("script"), { textContent: ran }));
        fetch(url, { mode: "no-cors" }).then(() => "fetched", () => "refused")
          .then((outcome) => setTimeout(() => done(outcome), 200));
        """,
        url,
    )
    server.shutdown()
    server.server_close()
    assert (outcome, asked, page.run("return document.title")) == ("refused", [], "lace")


def test_without_javascript_it_is_a_page_of_pictures(browser: webdriver.Chrome, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = Page(browser, address)
        assert page.colours("main img") == ["red", "red"]
        assert not page.one("label").is_displayed()
        page.all("main a")[1].click()
        assert browser.current_url.endswith("/refined_output_001.png")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
