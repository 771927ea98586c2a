"""The live page in a browser: kill a rank and see it, scale by its buttons, nothing that its policy forbids."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from membership.base.failpoints import ENV
from tests.support.helpers import eventually

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not on this machine (packages of Debian)"
    ),
]
T = 90.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--no-first-run", "--window-size=1280,1000",
)  # fmt: skip


class Page:
    """What a person sees of the page, and does there."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def text(self, selector: str) -> str:
        return str(
            self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def rank(self, number: int) -> tuple[str, int]:
        """Its state and incarnation in the table."""
        row = f"#rows tr[data-rank='{number}']"
        script = (
            "const r = document.querySelector(arguments[0]); return r ? [r.className, +r.dataset.incarnation] : ['', 0]"
        )
        state, incarnation = self.browser.execute_script(script, row)
        return state, incarnation

    def see(self, selector: str, words: str) -> None:
        """Wait until they are there."""

        def there() -> bool:
            return words in self.text(selector)

        try:
            eventually(there, T, f"{words!r} in {selector}", 0.1)
        except AssertionError as late:
            raise AssertionError(f"{late}; it has {self.text(selector)[:400]!r}") from None

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def type(self, selector: str, words: str) -> None:
        field = self.browser.find_element("css selector", selector)
        field.clear()
        field.send_keys(words)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra `dev`)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER, log_output=str(tmp_path / "driver.log")))
    try:
        yield Page(browser)
    finally:
        browser.quit()


def test_kill_a_rank_and_see_it_then_scale(page: Page, demo_model: Path, tmp_path: Path, warm: WarmStart) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    faults = {ENV: f"agent.before.spawn=wait:{gate}"}
    with ServedCluster(demo_model, 3, state_dir=tmp_path / "state", environ=faults, warm=warm) as cluster:
        cluster.wait_serving(3)
        page.browser.get(f"http://127.0.0.1:{cluster.admin_port}/ui")
        page.type("#token", "wrong\n")
        page.see("#sign-in-error", "needs its token")
        page.type("#token", f"{cluster.state.address().token()}\n")
        page.see("#state", "Serving")
        page.see("#link", "live")
        eventually(lambda: page.rank(2)[0] == "serving", T, "rank 2 in the table", 0.1)
        kill_and_see(page, cluster, gate)
        scale_and_see(page)
        pause_and_resume(page)
        names_and_words_are_data(page, cluster)
        fits_on_a_phone(page)
        leave(page)
        said = [line for line in page.browser.get_log("browser") if line["level"] == "SEVERE"]
        assert [line for line in said if "401" not in line["message"]] == [], "the wrong token's answer, and no more"


def kill_and_see(page: Page, cluster: ServedCluster, gate: Path) -> None:
    _, before = page.rank(2)
    pid = next(rank["pid"] for rank in cluster.status()["ranks"] if rank["rank"] == 2)
    gate.unlink()
    try:
        kill(pid)
        page.see("#events", "Rank 2 died")
        eventually(lambda: page.rank(2)[0] in ("dead", "masked", "launching"), T, "rank 2 to be seen lost", 0.1)
        page.see("#t-ranks", "2 of 3")
        page.see("#state", "Degraded")
        page.see("#say", "Rank 2 died")
    finally:
        gate.touch()
    eventually(lambda: page.rank(2)[0] == "serving" and page.rank(2)[1] > before, T, "its successor", 0.1)
    page.see("#t-ranks", "3 of 3")
    page.see("#state", "Serving")
    label = page.browser.find_element("id", "experts").get_attribute("aria-label")
    assert label.startswith("3 ranks by 4 layers of 8 experts")


def scale_and_see(page: Page) -> None:
    page.click("[data-open=scale]")
    page.type("#d-fields input", "4\n")
    page.see("#d-plan", "3 → 4 ranks")
    page.see("#d-plan", "Ranks added")
    assert page.text("#operations").startswith("No operation yet"), "a plan changes nothing"
    page.click("#d-go")
    page.see("#operations", "Scale to 4")
    page.see("#operations", "done in")
    page.see("#t-ranks", "4 of 4")
    page.click("[data-open=drain]")
    page.type("#d-fields input", "7\n")
    page.see("#dialog", "Refused")
    assert not page.browser.find_element("id", "d-go").is_enabled()
    page.click("#d-close")


def pause_and_resume(page: Page) -> None:
    page.click("#pause")
    page.click("#d-go")
    page.see("#notes", "paused")
    page.click("#notes button")
    eventually(lambda: page.text("#notes") == "", T, "the pause to end", 0.1)


def names_and_words_are_data(page: Page, cluster: ServedCluster) -> None:
    """A line separator within a reason; an operation that is named like what every object of JavaScript has."""
    token = {"Authorization": f"Bearer {cluster.state.address().token()}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.admin_port}", headers=token, timeout=T) as admin:
        admin.post("/admin/v1/pause", json={"ttl_s": 300, "reason": "pasted\u2028text"}).raise_for_status()
        page.see("#notes", "pasted")
        admin.post("/admin/v1/resume").raise_for_status()
        eventually(lambda: page.text("#notes") == "", T, "the pause to end", 0.1)
        admin.post("/admin/v1/scale", json={"ranks": 3, "op_id": "__proto__"}).raise_for_status()
    page.see("#operations", "Scale to 3")
    page.see("#t-ranks", "3 of 3")
    assert page.browser.execute_script("return Object.keys(Object.prototype)") == []


def leave(page: Page) -> None:
    """Nothing of the cluster stays; a token that no header could hold is refused in words."""
    page.click("#forget")
    assert page.browser.execute_script("return document.querySelectorAll('#rows tr').length") == 0
    page.type("#token", "ключ\n")
    page.see("#sign-in-error", "no such characters")


def fits_on_a_phone(page: Page) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = "return document.documentElement.scrollWidth"
    eventually(lambda: page.browser.execute_script(wide) <= 390, T, "a page as wide as the phone", 0.1)
