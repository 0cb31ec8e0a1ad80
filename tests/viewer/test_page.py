"""The viewer's page in a browser: what it shows is what the run recorded, and keys, links and narrow screens work."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.viewer_runs import EMOJI, GENERAL, ODD, PROMPTS, REC, write_run

from verl.viewer.page import page_of
from verl.viewer.run_data import read_run

PROGRAMS = {"chromium": shutil.which("chromium"), "chromedriver": shutil.which("chromedriver")}
pytestmark = pytest.mark.skipif(
    None in PROGRAMS.values(), reason="needs a browser: apt-get install chromium chromium-driver"
)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: requirements/dev.txt")

STEPS, ROWS = 4, 12
SWITCHES = (
    *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-quic"),
)


class Page:
    """A page in the browser, asked and used as a person does."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, hash_text: str = "", width: int = 1400, height: int = 900, dark: bool = False) -> "Page":
        """Load the page anew, at an address within it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#{hash_text}")
        self.wait(lambda: self.run("return document.body.dataset.ready === 'yes'"))
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def texts(self, css: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)

    def text(self, css: str) -> str:
        (found,) = self.texts(css)
        return found

    def click(self, css: str) -> None:
        self.driver.find_element("css selector", css).click()

    def choose(self, key: str, value: str) -> None:
        """Set a filter as an input of the user does."""
        script = "const e = document.querySelector(`[data-key=${arguments[0]}]`); e.value = arguments[1];"
        self.run(script + "e.dispatchEvent(new Event('input', {bubbles: true}))", key, value)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def answer(self) -> str:
        """The open answer's key, once its tokens are there."""
        script = "return document.querySelectorAll('#texts .answer').length && state.open"
        return self.wait(lambda: self.run(script))

    def hash(self) -> str:
        return self.run("return location.hash")

    def overflow(self) -> list[str]:
        """Elements in sight that reach beyond the window, other than those that scroll or cut by themselves."""
        return self.run(
            "const w = document.documentElement.clientWidth; if (document.documentElement.scrollWidth > w) "
            "return ['the page itself']; return [...document.querySelectorAll('body *')].filter(e => "
            "e.getClientRects().length && !e.closest('svg, .row') && e.getBoundingClientRect().right > w + 0.5)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )


def figure(value: float) -> str:
    """As the page shows a number."""
    text = np.format_float_positional(float(f"{value:.4g}"), trim="-")
    if 0 < abs(value) < 1e-6:
        digits, power = f"{value:.3e}".split("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "−")


def seen(texts: list[str]) -> list[str]:
    """Tokens as the page shows them."""
    return [text.replace("\t", "→\t").replace("\n", "↵\n") for text in texts]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    for switch in (*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(PROGRAMS["chromedriver"]))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), STEPS, ROWS)


@pytest.fixture(scope="module")
def written(folder: Path) -> str:
    """The address of the run's page."""
    path = folder / "view.html"
    path.write_text(page_of(read_run(folder, {}, 1000)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(driver: Any, written: str) -> Iterator[Page]:
    """The page of the small run; the browser's console stays silent."""
    driver.get_log("browser")
    yield Page(driver, written)
    assert driver.get_log("browser") == []


def recorded(folder: Path, kind: str, step: int) -> list[dict[str, Any]]:
    place = {"training": "rollouts", "validation": "answers"}[kind]
    return pq.read_table(folder / place / f"{step}.tokens.parquet").to_pylist()


def test_curves_show_the_metrics(page: Page, folder: Path) -> None:
    curves = read_run(folder, {}, 0).curves
    page.open()
    main = page.texts("figcaption")
    assert {"val/reverse_kl", "distill/reverse_kl", "actor/distill_divergence", "timing_s/step"} <= {
        name.split("step ")[0] for name in main
    }
    assert not any(name.startswith("actor/lr") for name in main)
    page.choose("metrics", "LR actor")
    assert [text.split("step")[0] for text in page.texts("figcaption")] == ["actor/lr"]
    page.choose("metrics", "val/reverse_kl")
    steps, values = curves["val/reverse_kl"]
    assert page.text("figcaption span") == f"step {steps[-1]}: {figure(values[-1])}"
    page.click("svg")  # in its middle, where the pointer reads the step in the middle
    assert page.text("figcaption span") == f"step {steps[1]}: {figure(values[1])}"
    page.run("document.querySelector('svg').focus()")
    page.press("\ue012")  # arrow left
    assert page.text("figcaption span") == f"step {steps[0]}: {figure(values[0])}"
    assert "metrics=val%2Freverse_kl" in page.hash()
    page.click("#groups button[value='distill/']")
    assert page.texts("#charts h2") == ["distill"] and len(page.texts("figure")) == 2


def test_filters_and_order(page: Page, folder: Path) -> None:
    rows = read_run(folder, {}, 1000).answers
    page.open("view=answers")
    assert page.text("#summary").startswith(f"{len(rows)} of {len(rows)} answers")

    def found(**filters: str) -> tuple[int, str]:
        for key in ("kind", "step", "source", "teacher", "items", "least", "most", "text", "sort", "order"):
            page.choose(key, filters.get(key, "largest" if key == "sort" else ""))
        count = int(page.text("#summary").split(" of ")[0])
        assert page.run("return document.querySelector('#rows').offsetHeight") == 54 * count
        return count, page.texts(".row")[0] if count else ""

    training = [row for row in rows if row["kind"] == "training"]
    assert found(kind="validation", step="2")[0] == len(PROMPTS)
    assert found(source=REC)[0] == found(teacher="self")[0] == sum(row["source"] == REC for row in rows)
    leaks = [row for row in training if row["items"] and row["source"] == GENERAL]
    assert leaks and found(kind="training", source=GENERAL, items="with")[0] == len(leaks)
    assert found(kind="training", source=GENERAL, items="without")[0] + len(leaks) == sum(
        row["source"] == GENERAL for row in training
    )
    assert found(least="11", most="16")[0] == sum(11 <= row["response_length"] <= 16 for row in rows)
    assert found(text="PORCELAIN")[0] == sum("porcelain" in row["text"] for row in rows)
    assert found(text="sky blue?")[0] == sum("sky blue?" in row["prompt"] for row in rows)
    assert found(text="nowhere")[0] == 0
    largest = max(training, key=lambda row: row["largest"])
    assert f"largest {figure(largest['largest'])}, sum {figure(largest['sum'])}" in found(kind="training")[1]
    total = max(row["sum"] for row in training)
    assert f"sum {figure(total)}" in found(kind="training", sort="sum")[1]
    assert " 8 tokens" in found(sort="response_length", order="up")[1]
    assert "score 1" in found(sort="score")[1] and "score 0" in found(sort="score", order="up")[1]
    assert "step 4 " in found(sort="step")[1] and "step 0 " in found(sort="step", order="up")[1]


def test_means_are_the_metrics_of_the_step(page: Page, folder: Path) -> None:
    steps, values = read_run(folder, {}, 0).curves["actor/distill_divergence"]
    for step, value in zip(steps, values, strict=True):
        page.open(f"view=answers&kind=training&step={step}")
        assert page.text("#summary").endswith(f"mean divergence {figure(value)} a trained token")


def test_an_answer_shows_its_record(page: Page, folder: Path) -> None:
    row = 4  # odd texts, and item tokens in an answer whose teacher lacks them
    wanted = recorded(folder, "training", 1)[row]
    page.open(f"view=answers&kind=training&open=training.1.{row}")
    assert page.answer() == f"training.1.{row}"
    tokens = page.texts("#texts .token")
    assert tokens == seen(wanted["text"])
    assert "</script>" in tokens
    marks = "return [...document.querySelectorAll('#texts .token')].map(e => e.matches(arguments[0]))"
    assert page.run(marks, ".item") == wanted["is_item"] and any(wanted["is_item"])
    untrained = [state != "trained" for state in wanted["state"]]
    assert page.run(marks, ".untrained") == untrained and any(untrained)
    signal = [value for value in wanted["signal"] if value is not None]
    sums = f"sum {figure(sum(signal))}, mean {figure(sum(signal) / len(signal))} over {len(signal)} trained tokens"
    assert page.text(".sums") == f"divergence: {sums}"
    assert page.text("#expected .text") == PROMPTS[row][2] and ODD in page.text("#prompt .text")
    assert EMOJI in page.run("return byKey.get(state.open).text")

    def panel() -> dict[str, str]:
        return dict(zip(page.texts("#panel dt"), page.texts("#panel dd"), strict=True))

    page.run("document.querySelector('#texts .token').focus()")
    for place in (0, 1, 2, 3):
        shown = panel()
        assert shown["id"] == str(wanted["token_id"][place]) and shown["place"].startswith(f"{place + 1} of ")
        names = {
            "student": "student_log_prob",
            "entropy": "entropy",
            "item mass": "extend_mass",
            "divergence": "signal",
        }
        assert {name: shown[name] for name in names} == {
            name: figure(wanted[key][place]) for name, key in names.items()
        }
        teacher = wanted["teacher_log_prob"][place]
        assert shown["teacher"] == ("–" if teacher is None else figure(teacher))
        page.press("\ue014")  # arrow right
    assert panel()["divergence"] == "–" and "first item token" in page.text("#panel p")
    page.choose("colour", "entropy")
    entropy = [v for v, s in zip(wanted["entropy"], wanted["state"], strict=True) if s == "trained"]
    page.wait(lambda: page.text(".sums").startswith("entropy"))
    assert f"sum {figure(sum(entropy))}," in page.text(".sums")


def test_colours_follow_the_number(page: Page, folder: Path, tmp_path: Path) -> None:
    """Of an advantage both signs have a hue, and the larger number has the deeper colour."""
    run = write_run(tmp_path / "run", 1, 6, measure="advantages")
    (tmp_path / "view.html").write_text(page_of(read_run(run, {}, 100)), encoding="utf-8")
    page.address = (tmp_path / "view.html").as_uri()
    page.open("view=answers&open=training.1.2")
    assert page.answer() and page.text("#legend").startswith("advantage −")
    values = recorded(run, "training", 1)[2]["signal"]
    styles = page.run("return [...document.querySelectorAll('#texts .token')].map(e => e.style.background)")
    shares = [float(style.split("%")[0].split()[-1]) if style else 0.0 for style in styles]
    for value, style in zip(values, styles, strict=True):
        assert ("--blue" if value > 0 else "--orange") in style
    by_size = [share for _, share in sorted(zip(map(abs, values), shares, strict=True))]
    assert by_size == sorted(by_size) and by_size[0] < 5 and by_size[-1] <= 65


def test_the_same_prompt_at_two_steps(page: Page, folder: Path) -> None:
    page.open("view=answers&kind=validation&open=validation.0.2")
    page.answer()
    options = page.run("return [...document.querySelectorAll('[data-key=with] option')].map(e => [e.value, e.text])")
    assert options == [["", "nothing"], ["validation.4.2", "step 4"], ["validation.2.2", "step 2"]]
    page.choose("with", "validation.4.2")
    page.wait(lambda: len(page.texts("#texts .answer")) == 2)
    for place, step in enumerate((0, 4)):
        wanted = recorded(folder, "validation", step)[2]
        texts = page.texts(f"#texts .answer:nth-child({place + 1}) .token")
        assert texts == seen(wanted["text"])
        pairs = zip(wanted["student_log_prob"], wanted["teacher_log_prob"], wanted["state"], strict=True)
        gaps = [student - teacher for student, teacher, state in pairs if state == "trained" and teacher is not None]
        assert f"mean {figure(sum(gaps) / len(gaps))} over" in page.texts(".sums")[place]
    page.choose("kind", "")
    page.choose("order", "up")
    link = page.hash()
    page.open(link[1:])
    page.wait(lambda: len(page.texts("#texts .answer")) == 2)
    assert page.hash() == link
    (row,) = page.run(
        "return [...document.querySelectorAll('[aria-selected=true]')].map(e => e.getBoundingClientRect())"
    )
    frame = page.run("return document.getElementById('list').getBoundingClientRect()")
    assert frame["top"] <= row["top"] and row["bottom"] <= frame["bottom"], "the row of the open answer is in sight"


def test_keys(page: Page) -> None:
    page.open("view=answers&kind=training&sort=step")
    page.press("j", "j", "k")
    assert page.run("return document.querySelector('[aria-selected=true]').dataset.place") == "1"
    page.run("document.getElementById('list').focus()")
    page.press("\ue015")  # arrow down
    assert page.run("return document.getElementById('list').getAttribute('aria-activedescendant')") == "row-2"
    page.press("\ue007")  # Enter
    assert page.answer() == "training.4.2" and "open=training.4.2" in page.hash()
    page.press("j")
    page.wait(lambda: page.text("#heading").endswith("prompt 3"))
    page.run("document.querySelector('[data-key=text]').focus()")
    page.press("j")
    assert page.run("return [state.text, state.open]") == ["j", "training.4.3"], "a letter that is typed moves nothing"
    page.choose("text", "")
    page.press("\ue00c")  # Escape leaves the field, and the next one the answer
    assert page.run("return state.open") == "training.4.3"
    page.press("\ue00c")
    assert page.run("return [state.open, document.activeElement.id]") == ["", "list"]
    page.driver.back()
    page.wait(lambda: "open=training.4.3" in page.hash() and page.text("#heading").endswith("prompt 3"))
    page.click("#next")
    page.wait(lambda: page.run("return state.open") != "training.4.3")
    controls = "return [...document.querySelectorAll('button, input, select')]"
    assert page.run(f"{controls}.filter(e => !(e.textContent || e.closest('label')))") == [], "each has a name"


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_everything(page: Page, dark: bool) -> None:
    opened = "view=answers&kind=validation&open=validation.0.0&with=validation.4.0"
    for place in ("", "metrics=%2F", "view=answers", opened):
        page.open(place, width=400, height=860, dark=dark)
        if "open" in place:
            page.wait(lambda: len(page.texts("#texts .answer")) == 2)
        page.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert page.overflow() == []
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(21, 23, 27)" if dark else "rgb(250, 250, 248)")
    page.click("#close")
    assert page.run(
        "return document.getElementById('found').offsetHeight > 0 && !document.getElementById('answer').offsetHeight"
    )


def test_notes_are_shown(page: Page, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.html").write_text(page_of(read_run(folder, {}, 20)), encoding="utf-8")
    page.address = (tmp_path / "cut.html").as_uri()
    page.open("view=answers")
    assert page.texts("#notes p") == ["The page shows 20 of 66 answers: the newest; --answers shows more."]
    assert page.text("#answer-count") == "20"


def test_ten_thousand_answers(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20, rows=500, test_freq=50, length=64)
    path = tmp_path / "view.html"
    path.write_text(page_of(read_run(run, {}, 20_000)), encoding="utf-8")
    size, page.address = path.stat().st_size / 1e6, path.as_uri()
    begun = time.monotonic()
    page.open("view=answers&kind=training")
    print(f"{size:.1f} MB, opened in {time.monotonic() - begun:.2f} s")
    assert size < 40
    assert page.text("#summary").startswith("10,000 of 10,006 answers")
    for place in (0.5, 1.0, 0.0):
        page.run("const l = document.getElementById('list'); l.scrollTop = arguments[0] * l.scrollHeight", place)
        wanted = {0.5: 5000, 1.0: 9999, 0.0: 0}[place]
        page.wait(lambda wanted=wanted: page.run("return !!document.getElementById(`row-${arguments[0]}`)", wanted))
        assert 10 <= len(page.texts(".row")) < 200
    page.click("#row-0")
    page.answer()
    assert len(page.texts("#texts .token")) == 64
