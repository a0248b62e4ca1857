"""The page in a real browser: it draws, answers to pointer and keyboard, runs only itself, is fast."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.report import charts
from onpath.commands.report.command import write_report
from onpath.commands.report.page import page
from onpath.commands.report.run import section
from tests.commands.report_data import make_run, make_study

DRAWN_MS = 1000
"""The whole page; its first screen is painted before that."""
INTERACTION_MS = 100
RECOLOUR = """
const select = document.querySelector(".toolbar select");
select.value = "gap";
select.dispatchEvent(new Event("change"));
"""
FIRST_PAINT = """
return performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? null;
"""
ACTIONS = {
    "choose": "document.querySelectorAll('.list li')[7].click();",
    "key": "document.querySelector('.tokens')"
    ".dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));",
    "recolour": RECOLOUR,
    "filter": "document.querySelector('input[value=wrong]').click();",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    made = {
        "plain": make_run(root / "plain"),
        "hostile": make_run(root / "hostile", hostile=True),
        "study": make_study(root / "study"),
    }
    return {name: write_report(run) for name, run in made.items()}


@pytest.fixture
def look(driver: Any) -> Callable[[Path], Any]:
    """Opens a page and waits until it has drawn itself."""

    def opened(page: Path) -> Any:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get("about:blank")
        for log in ("browser", "performance"):
            driver.get_log(log)  # reading empties it
        driver.get(page.as_uri())
        end = time.monotonic() + 60
        while driver.execute_script("return document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < end, driver.get_log("browser")
            time.sleep(0.05)
        return driver

    return opened


def first_paint(driver: Any) -> float:
    """Milliseconds until something was painted; the browser says so a moment after it was."""
    end = time.monotonic() + 60
    while (found := driver.execute_script(FIRST_PAINT)) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return float(found)


def requests_of(driver: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("chrome:", "data:", "about:"))]


def text(driver: Any, css: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css)


def count(driver: Any, css: str) -> int:
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", css)


def click(driver: Any, css: str) -> None:
    driver.execute_script(
        "document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})",
        css,
    )
    driver.find_element("css selector", css).click()


def press(driver: Any, css: str, *keys: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("document.querySelector(arguments[0]).focus()", css)
    for key in keys:
        driver.switch_to.active_element.send_keys(getattr(Keys, key, key))


@pytest.mark.parametrize("name", ["plain", "hostile", "study"])
def test_draws_without_errors_requests_or_foreign_scripts(
    name: str, look: Any, pages: dict[str, Path]
) -> None:
    driver = look(pages[name])
    assert count(driver, "figure.card") >= 6
    assert count(driver, ".list li") > 3
    for place in range(count(driver, ".list li")):
        driver.execute_script("document.querySelectorAll('.list li')[arguments[0]].click()", place)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return window.hacked ?? null") is None
    assert count(driver, "img, iframe, object, link[href]") == 0
    assert requests_of(driver) == [pages[name].as_uri()]
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def test_hostile_text_is_shown_as_text(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["hostile"])
    assert text(driver, "h1") == "</script><script>window.hacked = 1</script>"
    everything = text(driver, ".tokens") + text(driver, ".detail") + text(driver, ".list")
    assert '<img src=x onerror="window.hacked = 1">' in everything
    assert "⟨202E⟩right to left⟨202C⟩" in everything
    assert "👩‍🔬" in everything
    assert "\u202e" not in driver.execute_script("return document.getElementById('page').textContent")


def test_filters_search_and_sorting(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    assert text(driver, ".chooser > .hint") == "36 of 36 trajectories"
    driver.execute_script("document.querySelector('input[value=repaired]').click()")
    assert count(driver, ".list li") == int(text(driver, "input[value=repaired] + span small"))
    assert count(driver, ".list .outcome.wrong_to_right") == count(driver, ".list li") > 0
    driver.execute_script("document.querySelector('input[value=forks]').click()")
    assert 0 < count(driver, ".list li") < 36
    driver.execute_script("document.querySelector('input[value=all]').click()")
    driver.find_element("css selector", "input[type=search]").send_keys("11 + 7")
    assert count(driver, ".list li") == 3  # one of each stored step
    driver.find_element("css selector", "input[type=search]").send_keys("no such text")
    assert "No trajectory matches" in text(driver, ".detail")


def test_keyboard_alone_reaches_tokens_numbers_and_forks(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    driver.execute_script("document.querySelector('input[value=forks]').click()")
    before = text(driver, ".detail .head")
    press(driver, ".list", "ARROW_DOWN")
    assert text(driver, ".detail .head") != before
    press(driver, ".list", "ENTER")
    assert driver.execute_script("return document.activeElement.className") == "tokens"
    press(driver, ".tokens", "ARROW_RIGHT", "ARROW_RIGHT")
    assert text(driver, ".panel dt") == "token 2"
    press(driver, ".tokens", "HOME", "f", "ENTER")
    assert "at token" in text(driver, ".fork-panel h4")
    press(driver, ".futures", "ARROW_DOWN", "ARROW_DOWN")
    assert text(driver, ".fork-panel .readout").startswith("student’s token 1")
    press(driver, ".futures", "ARROW_RIGHT")
    assert text(driver, ".fork-panel .readout").startswith("teacher’s token 1")


def test_hover_shows_the_numbers_of_a_token(look: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    driver = look(pages["plain"])
    driver.execute_script("document.querySelector('.tokens').scrollIntoView({behavior: 'instant'})")
    ActionChains(driver).move_to_element(driver.find_element("css selector", ".t[data-i='7']")).perform()
    assert text(driver, ".panel dt") == "token 7"
    assert "reverse KL(student‖teacher)" in text(driver, ".panel")


def test_focus_shows_what_both_models_would_have_written(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    driver.execute_script("document.querySelector('input[value=all]').click()")
    shown = {}
    for place in range(count(driver, ".list li")):
        driver.execute_script("document.querySelectorAll('.list li')[arguments[0]].click()", place)
        press(driver, ".tokens", "HOME", "ARROW_RIGHT")
        shown[text(driver, ".detail .head")] = count(driver, ".panel .likely")
        if count(driver, ".panel .likely"):
            assert text(driver, ".panel .likely").startswith("student: ‘")
            assert count(driver, ".panel .likely .mono") == 10
            assert text(driver, ".panel .likely .mono").endswith("%")
    assert set(shown.values()) == {0, 2}  # every fourth was stored without


def test_forks_open_with_both_futures_and_their_transport(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    driver.execute_script("document.querySelector('input[value=forks]').click()")
    click(driver, ".t.mark-fork")
    assert count(driver, ".future.student li") == count(driver, ".future.teacher li") > 0
    assert count(driver, ".link") >= count(driver, ".future.student li")
    driver.execute_script(
        "document.querySelector('.future li').dispatchEvent(new Event('pointerover', {bubbles: 1}))"
    )
    assert 0 < count(driver, ".link.off") < count(driver, ".link")
    click(driver, ".fork-panel header button")
    assert count(driver, ".fork-panel") == 0


def test_rewrite_stands_beside_the_attempt(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    driver.execute_script("document.querySelector('input[value=edited]').click()")
    assert count(driver, "del") > 0
    assert count(driver, "ins") > 0
    z = driver.execute_script("return document.querySelectorAll('.diff .text')[1].textContent")
    assert z == text(driver, ".tokens")


def test_colours_follow_the_quantity(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    classes = "return [...document.querySelectorAll('.t')].map(t => t.className).join()"
    before = driver.execute_script(classes)
    driver.execute_script(RECOLOUR)
    after = driver.execute_script(classes)
    assert before != after
    assert "n" in {
        name[0] for one in after.split(",") for name in one.split()[1:]
    }  # below zero: the cold side


def test_a_point_of_the_scatter_opens_its_trajectory(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    figure = "figure[data-kind=scatter] svg"
    press(driver, figure, "END", "ENTER")
    position = text(driver, "figure[data-kind=scatter] .readout").rsplit(" ", 1)[-1]
    assert text(driver, ".fork-panel h4").endswith(f"at token {position}")


def test_curves_read_their_values_and_give_their_numbers(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    press(driver, "figure.card svg", "HOME")
    assert text(driver, "figure.card .readout").startswith("optimiser step 0")
    press(driver, "figure.card svg", "END")
    assert text(driver, "figure.card .readout").startswith("optimiser step 12")
    driver.execute_script("document.querySelector('figure .numbers').open = true")
    time.sleep(0.2)
    assert text(driver, "figure .numbers pre").startswith("optimiser step\tseries\tvalue")


def test_theme_can_be_switched(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = driver.execute_script(colour)
    driver.execute_script("document.getElementById('theme').click()")
    assert driver.execute_script(colour) != before


LOOKS = """
return [...document.querySelectorAll(arguments[0])].map((drawn) => {
  const line = getComputedStyle(drawn.querySelector(".line"));
  const dot = drawn.querySelector(".dot");
  const turned = dot?.getAttribute("transform").split(")")[1];
  return [line.stroke, line.strokeDasharray, dot?.getAttribute("d"), turned].join();
});
"""


@pytest.mark.parametrize("marks", [True, False])
def test_arms_are_told_apart(marks: bool, look: Any, tmp_path: Path) -> None:
    """On both grounds: 16 by colour, more by dashes and markers; each is drawn as the line below shows it."""
    arms = [charts.series(f"arm {i}", [1, 2], [i, i + 1], marks=marks) for i in range(32)]
    empty = {key: [] for key in ("facts", "tiles", "notes", "vocabulary", "trajectories")}
    curves = section("Curves", [charts.lines("All", arms)], "")
    path = tmp_path / "many.html"
    path.write_text(page({"kind": "study", "title": "many", "sections": [curves], **empty}))
    driver = look(path)
    for _ in range(2):
        looks = driver.execute_script(LOOKS, ".readout .key")
        assert len(set(looks)) == len(looks) == 32
        assert len({one.split("),")[0] for one in looks[:16]}) == 16, "colours"
        assert len({one.split("),", 1)[1] for one in looks[:12]}) == (12 if marks else 2), "markers, dashes"
        assert driver.execute_script(LOOKS, "figure g.series") == looks
        driver.execute_script("document.getElementById('theme').click()")


@pytest.mark.parametrize("name", ["plain", "study"])
def test_phone_has_no_sideways_scroll(name: str, look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages[name])
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(pages[name].as_uri())
    time.sleep(0.5)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360


def cpu_ms(driver: Any) -> float:
    """CPU time that the page's main thread has used: what a busy machine does not change."""
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


@pytest.mark.slow
def test_two_hundred_trajectories_of_a_thousand_tokens_stay_fast(
    driver: Any, look: Any, tmp_path: Path
) -> None:
    page = write_report(make_run(tmp_path / "big", rows=67, length=1000))
    assert 3.5e6 < page.stat().st_size < 5e6
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    loads: list[float] = []
    paints: list[float] = []
    answers: dict[str, list[float]] = {name: [] for name in ACTIONS}
    for _ in range(3):
        look(page)
        loads.append(cpu_ms(driver))
        paints.append(first_paint(driver))
        for name, action in ACTIONS.items():
            before = cpu_ms(driver)
            driver.execute_async_script(f"{{{action}}} requestAnimationFrame(() => setTimeout(arguments[0]))")
            answers[name].append(cpu_ms(driver) - before)
    driver.execute_cdp_cmd("Performance.disable", {})
    assert int(text(driver, "input[value=all] + span small").replace(",", "")) >= 200
    assert min(loads) < DRAWN_MS, loads
    assert 0 < min(paints) < DRAWN_MS, paints
    assert all(min(times) < INTERACTION_MS for times in answers.values()), answers


SOURCES = "".join(
    (Path(charts.__file__).parent / "assets" / name).read_text() for name in ("base.js", "tokens.js")
)
"""The page keeps its functions to itself."""


def test_percentages_are_rounded_as_in_the_table(look: Any, pages: dict[str, Path]) -> None:
    driver = look(pages["plain"])
    for value in (0.2625, 0.2675, -0.0625, 0.12345, 0.0005, 0.5, 1.0, 0.26249999999999996):
        said = driver.execute_script(f"{SOURCES}; return number(arguments[0], '%')", value)
        assert said.replace("−", "-") == f"{value:.1%}"


@pytest.mark.parametrize(
    ("quantity", "told"),
    [
        ("reverse_kl", "nats, from:0.050.20.5124≥ 8"),
        ("student_logp", "nats, from:−0.05−0.2−0.5−1−2−4≤ −8"),
        ("gap", "nats, from:≤ −8−4−2−1−0.5−0.2−0.050.050.20.5124≥ 8"),
        ("weight", "off 1 by more than 1/160 to 1:0.050.20.5124≥ 8"),
        ("not by the student", "written by the teacher, or forced"),
        ("own", "from:≤ −8−4−2−1−0.5−0.2−0.050.050.20.5124≥ 8"),
    ],
)
def test_legends_say_what_the_colours_mean(
    quantity: str, told: str, look: Any, pages: dict[str, Path]
) -> None:
    driver = look(pages["plain"])
    said = driver.execute_script(f"{SOURCES}; return scaleLegend(arguments[0]).textContent", quantity)
    assert said == told
