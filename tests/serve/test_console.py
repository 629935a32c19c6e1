"""The page at / in a real browser, before a real service."""

from __future__ import annotations

import json
import re
import runpy
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from context_worlds import HOUR, HOURS, hourly, hourly_schema, hourly_settings, right_item
from event_worlds import BROWSED, TYPES, shop_schema, shop_settings, shopping
from playwright import sync_api as playwright
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower import api
from twotower.features.hour_of_day import HourOfDay

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(twotower.__file__).parent / "serve" / "page"
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GATED = {"width": 8, "pairs": [{"user": {"layers": [8], "senet": {"enabled": True}}, "item": {"layers": [8]}}]}
SECONDS = 60


@dataclass(frozen=True)
class Service:
    url: str
    old: str  # bundles
    current: str


@dataclass
class Visit:
    """A page, what its console said of errors, and what it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    told: bool = False  # whether it may end with a problem

    def settle(self) -> None:
        """Until every answer has come."""
        self.until("document.querySelector('#answer-2 .best li') && !document.querySelector('.answer.waiting')")

    def until(self, condition: str) -> None:
        """Playwright's own waiting for a condition needs `eval`, which the page's policy forbids."""
        end = time.monotonic() + 15
        while not self.page.evaluate(f"() => Boolean({condition})"):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(30)

    def texts(self, selector: str) -> list[str]:
        """Texts of elements as they are shown. One script finds and reads them, so nothing replaces them in between."""
        return list(self.page.evaluate("all => [...document.querySelectorAll(all)].map(e => e.innerText)", selector))

    def best(self, column: int = 2) -> list[str]:
        return self.texts(f"#answer-{column} .best .title")

    def ids(self, column: int = 2) -> list[str]:
        script = "all => [...document.querySelectorAll(all)].map(r => r.dataset.id)"
        return list(self.page.evaluate(script, f"#answer-{column} .best > li"))

    def changes(self, act: Callable[[], object]) -> None:
        """Do something that asks for new answers, and wait for them."""
        with self.page.expect_response(lambda r: "/v1/console/explain" in r.url):
            act()
        self.settle()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two bundles of one world, served."""
    folder = tmp_path_factory.mktemp("console")
    bundles = []
    for name, epochs in (("old", 1), ("new", 3)):
        config = settings(model=GATED, train={"epochs": epochs})
        run = twotower.fit(everything(), EVERYTHING_SCHEMA, config, folder=folder / name)
        bundles.append(api.publish(run, folder / "store").id)
    with served(folder) as url:
        yield Service(url, *bundles)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a service of the store in a folder."""
    command = [sys.executable, "-m", "twotower", "serve", "--store", str(folder / "store"), "--port", "0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1)
    try:
        yield _address(process, folder / "log")
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """Where the service says that it listens."""
    assert process.stdout is not None
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        if select.select([process.stdout], [], [], 0.5)[0] and (
            found := re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        ):
            return found[0] + "/"
    pytest.fail(f"the service does not listen:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("needs chromium; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=ARGS)
        yield found
        found.close()


@pytest.fixture
def visit(service: Service, browser: Any) -> Iterator[Callable[..., Visit]]:
    """Open the page at a hash. A page that is not told of a problem must not complain, nor ask another origin."""
    visits, contexts = [], []

    def go(hash: str = "", **options: Any) -> Visit:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1440, "height": 900}} | options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        it = Visit(context.new_page())
        # The browser notes every 503, also those that the page answers by asking once more.
        it.page.on(
            "console", lambda m: it.errors.append(m.text) if m.type == "error" and " 503 " not in m.text else None
        )
        it.page.on("pageerror", lambda e: it.errors.append(str(e)))
        it.page.on("request", lambda r: it.asked.append(r.url))
        visits.append(it)
        it.page.goto(service.url + hash)
        it.settle()
        return it

    yield go
    for it in visits:
        told = it.page.locator("#problem").inner_text()
        assert it.errors == [], told
        assert told == "" or it.told
        assert [u for u in it.asked if not u.startswith(service.url)] == []
    for context in contexts:
        context.close()


def test_the_types_of_events_are_shown_and_set(browser: Any, tmp_path: Path) -> None:
    run = twotower.fit(shopping("type"), shop_schema(TYPES), shop_settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store")
    with served(tmp_path) as url:
        it = Visit(browser.new_context(locale="en-US").new_page())
        it.page.on("pageerror", lambda e: it.errors.append(str(e)))
        it.page.goto(f"{url}#new=1&events=~view~2,~cart~5")
        it.settle()
        types = it.page.locator("#chips .type")
        assert types.nth(0).locator("option").evaluate_all("all => all.map(o => o.value)") == [
            "",
            "view",
            "cart",
            "buy",
        ]
        assert types.evaluate_all("all => all.map(s => s.value)") == ["view", "cart"]
        assert it.ids()[0] == str(BROWSED + 5)
        it.changes(lambda: types.nth(0).select_option("cart"))
        it.changes(lambda: types.nth(1).select_option("view"))
        assert it.ids()[0] == str(BROWSED + 2)
        again = it.page.url
        it.page.goto("about:blank")
        it.page.goto(again)
        it.settle()
        assert types.evaluate_all("all => all.map(s => s.value)") == ["cart", "view"]
        assert it.ids()[0] == str(BROWSED + 2)
        assert it.page.locator("#problem").inner_text() == ""
        it.page.context.close()
    assert it.errors == []


def test_the_context_is_shown_and_set(browser: Any, tmp_path: Path) -> None:
    features = HOUR, HourOfDay(name="clock")
    blind = twotower.fit(hourly(), hourly_schema(), hourly_settings(train={"epochs": 1}), folder=tmp_path / "blind")
    other = api.publish(blind, tmp_path / "store", force=True).id
    run = twotower.fit(hourly(), hourly_schema(*features), hourly_settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store")
    with served(tmp_path) as url:
        it = Visit(browser.new_context(locale="en-US").new_page())
        it.page.on("pageerror", lambda e: it.errors.append(str(e)))
        it.page.goto(f"{url}#new=1&f=group:1")
        it.settle()
        assert not it.page.locator("#answer-1").is_visible()
        fields = it.page.locator("#context input")
        assert fields.evaluate_all("inputs => inputs.map(i => i.name)") == ["hour", "at"]
        first = int(fields.nth(0).input_value())
        hours = [(first + n) % HOURS for n in (1, 4)]
        assert fields.nth(1).get_attribute("placeholder") == "now"
        seen = []
        for hour in hours:
            fields.nth(0).fill(str(hour))
            it.changes(lambda: fields.nth(0).press("Tab"))
            seen.append(it.ids()[0])
            assert f"c=hour%3A{hour}" in it.page.url
        assert seen == [str(right_item(1, hour)) for hour in hours]
        again = it.page.url
        it.page.goto("about:blank")
        it.page.goto(again)
        it.settle()
        assert fields.nth(0).input_value() == str(hours[1])
        it.page.locator("#bundle").select_option(other)  # which reads no context
        it.until("document.querySelector('#answer-3 .best li')")
        assert it.page.locator("#problem").inner_text() == ""
        it.page.context.close()
    assert it.errors == []


def test_a_user_is_chosen_by_keyboard_alone(visit: Callable[..., Visit]) -> None:
    it = visit()
    page = it.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    here = page.url
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "answers"
    assert page.url == here
    page.locator(".skip").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "user":
            break
    box = page.locator("#user")
    assert box.get_attribute("aria-expanded") == "false"
    page.keyboard.type("u42")
    page.wait_for_selector("#user-list [role=option]")
    assert box.get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    chosen = page.locator(f"#{box.get_attribute('aria-activedescendant')}")
    assert chosen.get_attribute("aria-selected") == "true"
    assert chosen.inner_text().startswith("u42")
    it.changes(lambda: page.keyboard.press("Enter"))
    assert "user=u42" in page.url
    for column in (1, 2):
        titles = it.best(column)
        assert len(titles) == 10
        assert all(t.startswith("Item ") for t in titles)
    assert len(it.texts("#answer-2 .score")) == 10
    it.until("document.querySelectorAll('#history > li').length > 0")
    assert page.locator("#features input[name=age]").input_value() not in ("", "null")
    assert page.evaluate("document.activeElement.id") == "user"


def test_a_list_is_one_stop_of_the_tab_key_and_the_arrows_go_through_it(visit: Callable[..., Visit]) -> None:
    page = visit("#user=u3").page
    rows = page.locator("#answer-2 .best")
    assert rows.locator("button[tabindex='0']").count() == 1
    rows.locator("button").first.focus()
    for key, place in (
        ("ArrowDown", [1, 0]),
        ("ArrowRight", [1, 1]),
        ("End", [9, 1]),
        ("Home", [0, 1]),
        ("ArrowLeft", [0, 0]),
    ):
        page.keyboard.press(key)
        assert page.evaluate(
            "() => { const li = document.activeElement.closest('li');"
            " return [[...li.parentElement.children].indexOf(li), "
            "[...li.querySelectorAll('button')].indexOf(document.activeElement)]; }"
        ) == place  # fmt: skip


def test_an_added_item_leaves_the_answer_of_method_2_and_changes_it(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u7")
    page = it.page
    assert it.ids(1) == it.ids(2)
    assert page.locator("#answer-2 .move:not(:empty)").count() == 0
    before, scores = it.ids(), it.texts("#answer-2 .score")
    it.changes(lambda: page.locator("#answer-2 .best .title").nth(1).click())
    assert before[1] not in it.ids()
    assert it.texts("#answer-2 .score") != scores
    assert page.locator("#chips li").get_attribute("data-id") == before[1]
    assert f"events=.{before[1]}" in page.url
    assert before[1] not in it.ids(1)  # method 1 leaves it out too
    # Disliked instead, and then not at all.
    it.changes(lambda: page.locator("#chips .kind").click())
    assert f"events=-{before[1]}" in page.url
    it.changes(lambda: page.locator("#chips .away").click())
    assert it.ids() == before
    assert page.locator("#chips li").count() == 0
    page.locator("#answer-2 .best li").first.hover()
    it.changes(lambda: page.locator("#answer-2").get_by_role("button", name=re.compile("as disliked")).first.click())
    assert "events=-" in page.url


def test_items_are_found_by_title_and_added(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u7")
    it.page.fill("#item", "item 1")
    it.page.wait_for_selector("#item-list [role=option]")
    assert all("Item 1" in text for text in it.texts("#item-list [role=option]"))
    it.page.keyboard.press("ArrowDown")
    it.changes(lambda: it.page.keyboard.press("Enter"))
    assert it.page.locator("#chips li").count() == 1
    it.page.fill("#item", "no such title")
    it.page.wait_for_selector("#item-list .none")


def test_events_are_sent_to_the_service_and_forgotten(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u9")
    page = it.page
    assert page.locator("#send").is_disabled()
    before = it.ids()
    it.changes(lambda: page.locator("#answer-2 .best .title").first.click())
    after = it.ids()
    page.locator("#send").click()
    page.wait_for_selector("#recent > li")
    it.settle()
    it.until("document.getElementById('status').textContent.includes('1 recent event')")
    assert page.locator("#chips li").count() == 0
    assert page.locator("#recent > li").get_attribute("data-id") == before[0]
    assert it.ids() == after
    assert visit("#user=u9").ids() == after  # also for who comes now
    it.changes(lambda: page.locator("#forget").click())
    page.wait_for_selector("#recent > li", state="detached")
    assert it.ids() == before


def test_the_second_bundle_stands_beside_the_first(visit: Callable[..., Visit], service: Service) -> None:
    it = visit("#user=u5")
    page = it.page
    assert page.locator("#answer-3").is_hidden()
    it.changes(lambda: page.select_option("#bundle", service.old))
    page.wait_for_selector("#answer-3 .best li")
    assert len(it.best(3)) == 10
    assert service.old in page.locator("#answer-3 .meta").inner_text()
    assert service.current in page.locator("#answer-2 .meta").inner_text()
    same = len(set(it.ids(2)) & set(it.ids(3)))
    assert f"{same} of 10" in page.locator("#answer-3 .note").inner_text()
    assert f"bundle={service.old}" in page.url
    # Every row says how far it is from its place in the other answer.
    places = {i: at for at, i in enumerate(it.ids(2))}
    marks = [m.split() for m in it.texts("#answer-3 .move")]
    for at, (i, mark) in enumerate(zip(it.ids(3), marks, strict=True)):
        up = places[i] - at if i in places else None
        assert mark == (["new"] if up is None else [] if not up else ["▲" if up > 0 else "▼", str(abs(up))])
    assert any(marks)


def test_gates_are_shown_as_bars(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u5")
    rows = it.texts("#gates li")
    fields = [row.split()[0] for row in rows]
    assert {"uid", "city", "age", "liked"} <= set(fields)
    assert all(0 <= float(row.split()[-1]) <= 1 for row in rows)
    it.until("[...document.querySelectorAll('#gates .bar i')].some(bar => bar.getBoundingClientRect().width > 10)")


@pytest.mark.parametrize("gates", [0, 2])
def test_a_model_may_have_several_gates_or_none(visit: Callable[..., Visit], gates: int) -> None:
    it = visit("#user=u5")

    def other(route: Any) -> None:
        reply = route.fetch()
        body = reply.json()
        one = body["gates"][0]
        body["gates"] = [one | {"name": f"pair {n + 1}"} for n in range(gates)]
        route.fulfill(response=reply, json=body)

    it.page.route("**/v1/console/explain*", other)
    it.changes(lambda: it.page.locator("#answer-2 .best .title").first.click())
    assert it.texts("#gates h3") == [f"pair {n + 1}" for n in range(gates)]
    assert it.page.locator("#gates-note").inner_text().startswith("Share of" if gates else "This model has no gates")


def test_the_map_is_drawn_with_the_user_in_it(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u5")
    page = it.page
    it.until("document.getElementById('map').dataset.user")
    canvas = page.locator("#map")
    assert canvas.get_attribute("data-points") == "40"
    assert canvas.get_attribute("data-best") == "10"
    drawn = (
        "() => { const c = document.getElementById('map'), d = c.getContext('2d').getImageData(0, 0, c.width, "
        "c.height).data;"
    )
    assert page.evaluate(drawn + " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }") > 400
    x, y = map(int, canvas.get_attribute("data-user").split(","))
    accent = "getComputedStyle(document.querySelector('.link')).color.match(/\\d+/g).map(Number)"
    pixel = (
        "() => [[...document.getElementById('map').getContext('2d')"
        f".getImageData({x}, {y}, 1, 1).data].slice(0, 3), {accent}]"
    )
    seen, wanted = page.evaluate(pixel)
    assert seen == wanted
    assert it.texts("#column option")
    assert page.locator("#legend button").count() > 1
    page.locator("#legend button").first.click()
    assert page.locator("#legend button").first.get_attribute("aria-pressed") == "true"
    # By keyboard: the arrows go through the best, Enter adds one.
    canvas.focus()
    page.keyboard.press("ArrowRight")
    second = it.ids()[1]
    it.until("document.getElementById('tip').innerText.startsWith('2 ')")  # painted with the next frame
    assert page.locator("#tip").inner_text() == f"2 {it.best()[1]} ({second})"
    assert it.best()[1] in page.locator("#status").inner_text()
    it.changes(lambda: page.keyboard.press("Enter"))
    assert page.locator("#chips li").get_attribute("data-id") == second
    page.locator("#close-up").click()
    assert "view=near" in page.url


def test_an_item_of_the_map_is_added_by_a_click(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u5")
    page = it.page
    it.until("document.getElementById('map').dataset.user")
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    found = None
    for step in range(400):
        x = box["x"] + 10 + step % 20 * (box["width"] - 20) / 20
        y = box["y"] + 10 + step // 20 * (box["height"] - 20) / 20
        page.mouse.move(x, y)
        page.wait_for_timeout(20)  # the map is painted once a frame
        if page.locator("#tip").is_visible():
            found = page.locator("#tip").inner_text()
            break
    assert found is not None
    it.changes(lambda: page.mouse.click(x, y))
    assert page.locator("#chips li").inner_text() in found


def test_filter_k_and_ban(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u11")
    page = it.page
    first = it.ids()[0]
    page.locator("#answer-2 .best li").first.hover()
    it.changes(lambda: page.locator("#answer-2 .best li").first.get_by_role("button", name=re.compile("^Ban ")).click())
    assert first not in it.ids() + it.ids(1)
    assert page.locator("#banned li").get_attribute("data-id") == first
    assert first in page.evaluate("[...document.querySelectorAll('#out > li')].map(r => r.dataset.id)")
    it.changes(lambda: page.locator("#banned button").click())
    assert it.ids()[0] == first
    it.changes(lambda: page.fill("#k", "3"))
    assert len(it.ids()) == 3
    page.select_option("#where-column", "brand")
    it.changes(lambda: page.fill("#where-value", "brand2"))
    assert it.ids()
    assert {int(i[1:]) % 5 for i in it.ids() + it.ids(1)} == {2}
    shared = visit(page.url[page.url.index("#") :])  # the address is the view
    assert shared.ids() == it.ids()
    assert shared.page.locator("#k").input_value() == "3"


def test_a_new_user(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u11")
    page = it.page
    it.changes(lambda: page.locator("#new").click())
    assert "new=1" in page.url
    assert "popular" in page.locator("#answer-2 .meta").inner_text()
    it.changes(lambda: page.locator("#answer-2 .best .title").nth(2).click())
    assert "cold start" in page.locator("#answer-2 .meta").inner_text()
    page.fill("#features input[name=city]", "city1")
    it.changes(lambda: page.keyboard.press("Enter"))
    assert len(it.ids()) == 10
    assert page.locator("#send").is_disabled()


def test_fault_G10_a_number_that_is_typed_keeps_its_spelling(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u11")
    for typed, sent in (("31", 31), ("31.5", 31.5), ("0031", "0031"), ("1e2", "1e2"), ("31.50", "31.50")):
        it.page.fill("#features input[name=age]", typed)
        with it.page.expect_request(
            lambda r: "/v1/console/explain" in r.url and r.post_data_json["method"] == 2
        ) as asked:
            it.changes(lambda: it.page.keyboard.press("Enter"))
        assert asked.value.post_data_json["features"] == {"age": sent}
    assert not it.errors


def test_why_an_item_and_what_is_similar(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u11")
    page = it.page
    page.locator("#answer-2 .best li").nth(2).hover()
    page.locator("#answer-2 .best li").nth(2).get_by_role("button", name=re.compile("^Why ")).click()
    page.wait_for_selector("#similar li")
    assert page.locator("#chosen-h").inner_text() == it.best()[2]
    assert page.evaluate("document.activeElement.id") == "chosen-h"
    assert page.locator("#similar li").count() == 10
    assert page.locator("#similar-in-history li").count() > 0


def test_chinese_and_english(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u11")
    page = it.page
    assert page.evaluate("document.documentElement.lang") == "en"
    english = page.locator("body").inner_text()
    page.locator("#lang").click()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    chinese = page.locator("body").inner_text()
    assert not re.search("[一-鿿]", english.replace("中文", ""))
    for text in ("用户", "方法 1", "历史", "物品地图", "本次请求的门控", "被排除的物品"):
        assert text in chinese
    assert "lang=zh" in page.url
    assert visit("#user=u11", locale="zh-CN").page.evaluate("document.documentElement.lang") == "zh-CN"


def test_every_text_is_there_in_both_languages(visit: Callable[..., Visit]) -> None:
    page = visit().page
    words = page.evaluate("import('/page/words.js').then(m => m.words)")
    for key, said in words.items():
        assert sorted(said) == ["en", "zh"], key
        assert all(said.values()), key
        assert set(re.findall(r"\{\w+\}", said["en"])) == set(re.findall(r"\{\w+\}", said["zh"])), key
        assert key in ("page_title", "other_language") or not re.search("[一-鿿]", said["en"]), key
    html = (PAGE / "index.html").read_text()
    scripts = "".join(p.read_text() for p in PAGE.glob("*.js") if p.name != "words.js")
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', html)) | set(re.findall(r'\bt\("(\w+)"', scripts))
    assert used <= set(words)
    spare = {k for k in words if k not in used and f'"{k}"' not in scripts and not re.match("(source|problem)_", k)}
    assert spare <= {"page_title"}


def test_dark_and_light(visit: Callable[..., Visit]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page = visit(color_scheme="light").page
    light = page.evaluate(background)
    page.locator("#theme").click()
    dark = page.evaluate(background)
    assert dark != light
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.reload()
    assert page.evaluate(background) == dark
    assert visit(color_scheme="dark").page.evaluate(background) == dark


CONTRASTS = """() => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim()) continue;
    if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (e.closest("script, style, noscript, option")) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen++;
    if (ratio < 4.5) poor.push([e.tagName, e.className, walk.currentNode.data.trim().slice(0, 20), ratio.toFixed(2)]);
  }
  return { seen, poor };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(visit: Callable[..., Visit], service: Service, scheme: str) -> None:
    it = visit(f"#user=u7&events=.i1,-i2&ban=i3&item=i4&bundle={service.old}", color_scheme=scheme)
    it.page.wait_for_selector("#similar li")
    it.page.wait_for_timeout(400)
    found = it.page.evaluate(CONTRASTS)
    assert found["seen"] > 80
    assert found["poor"] == []


ACCESS = """() => {
  const shown = (e) => e.checkVisibility();
  const text = (e) => (e ? e.textContent.trim() : "");
  const name = (e) => e.getAttribute("aria-label") || (e.getAttribute("aria-labelledby") || "").split(" ")
    .map((i) => text(document.getElementById(i))).join(" ").trim()
    || [...(e.labels || [])].map(text).join(" ") || (e.matches("input, select, canvas") ? "" : text(e));
  const interactive = "button, input, select, a[href], summary, canvas, [role=listbox], [role=option]";
  const controls = [...document.querySelectorAll(interactive)].filter(shown);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  return {
    controls: controls.length,
    nameless: controls.filter((e) => !name(e)).map((e) => e.outerHTML.slice(0, 120)),
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(shown).map((e) => Number(e.tagName[1])),
    tabs: [...document.querySelectorAll("[tabindex]")].filter((e) => e.tabIndex > 0).length,
    twice: ids.filter((id, n) => ids.indexOf(id) !== n),
    dangling: [...document.querySelectorAll("[aria-labelledby], [aria-describedby], [aria-controls]")]
      .flatMap((e) => ["aria-labelledby", "aria-describedby", "aria-controls"]
      .flatMap((a) => (e.getAttribute(a) || "").split(" ").filter(Boolean)))
      .filter((id) => !document.getElementById(id)),
    regions: ["banner", "main"].map((r) => document.querySelectorAll(r === "banner" ? "body > header" : "main").length),
    live: document.querySelectorAll("[aria-live]").length,
    small: controls.filter((e) => {
      const b = e.getBoundingClientRect();
      return b.width && (b.width < 20 || b.height < 20) && !e.matches(".skip");
    }).map((e) => e.outerHTML.slice(0, 80)),
  };
}"""


def test_access(visit: Callable[..., Visit], service: Service) -> None:
    it = visit(f"#user=u7&events=.i1,-i2&ban=i3&item=i4&bundle={service.old}&where=brand:brand2")
    it.page.wait_for_selector("#similar li")
    found = it.page.evaluate(ACCESS)
    assert found["controls"] > 60
    assert found["nameless"] == []
    assert found["headings"][0] == 1
    assert found["headings"].count(1) == 1
    assert all(b - a <= 1 for a, b in zip(found["headings"], found["headings"][1:], strict=False))
    assert (found["tabs"], found["twice"], found["dangling"], found["small"]) == (0, [], [], [])
    assert found["regions"] == [1, 1]
    assert found["live"] >= 2


def test_nothing_moves_for_who_wants_that(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u7", reduced_motion="reduce")
    it.changes(lambda: it.page.locator("#answer-2 .best .title").first.click())
    assert it.page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("width", [390, 768, 1024, 1440])
def test_no_width_scrolls_sideways(visit: Callable[..., Visit], service: Service, width: int) -> None:
    touch = {"has_touch": True, "is_mobile": True} if width == 390 else {}
    it = visit(
        f"#user=u7&events=.i1,-i2&ban=i3&item=i4&bundle={service.old}&where=brand:brand2",
        viewport={"width": width, "height": 844},
        **touch,
    )
    it.page.wait_for_selector("#similar li")
    assert it.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_problem_is_said_in_plain_words(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u7")
    page = it.page
    page.fill("#features input[name=age]", "old")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem strong")
    told = page.locator("#problem").inner_text()
    assert "cannot use this request" in told
    assert "age" in told
    assert page.locator("#problem").get_attribute("aria-live") == "assertive"
    page.get_by_role("button", name="Restore").click()
    it.settle()
    page.locator("#problem").get_by_role("button", name="Try again").click()
    page.wait_for_selector("#problem strong", state="detached")
    it.settle()
    assert len(it.ids()) == 10
    page.route("**/v1/console/explain*", lambda route: route.abort())
    page.locator("#answer-1 .best .title").first.click()
    page.wait_for_selector("#problem strong")
    assert "cannot be reached" in page.locator("#problem").inner_text()
    assert all("Failed to load resource" in e for e in it.errors)
    it.errors.clear()
    it.told = True


def test_a_service_that_is_busy_for_a_moment_is_asked_again_and_a_long_wait_is_told(
    visit: Callable[..., Visit],
) -> None:
    it = visit("#user=u7")
    page = it.page
    before, waits = it.ids(), ["1"]

    def busy(route: Any) -> None:
        if not waits:
            route.continue_()
            return
        problem = {
            "type": "/problems/overload",
            "title": "busy",
            "status": 503,
            "detail": "12 are waiting",
            "instance": "abc",
        }
        headers = {"Retry-After": waits.pop(), "Content-Type": "application/problem+json"}
        route.fulfill(status=503, headers=headers, body=json.dumps(problem))

    page.route("**/v1/console/explain*", busy)
    page.locator("#answer-2 .best .title").first.click()
    page.wait_for_selector("#chips li")
    it.settle()
    assert before[0] not in it.ids()
    assert page.locator("#problem").inner_text() == ""
    waits += ["7", "7"]
    page.locator("#answer-2 .best .title").first.click()
    page.wait_for_selector("#problem strong")
    told = page.locator("#problem").inner_text()
    assert "Wait 7 s" in told
    assert "12 are waiting" in told
    assert "abc" in told
    it.told = True


def test_a_key_is_asked_for_and_sent(service: Service, browser: Any) -> None:
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    keys = []

    def door(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] != "Bearer open sesame":
            route.fulfill(
                status=401, content_type="application/problem+json", body='{"status": 401, "detail": "no key"}'
            )
        else:
            route.continue_()

    page.route("**/v1/**", door)
    page.goto(service.url)
    page.wait_for_selector("#ask-key[open]")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer-2 .best li")
    assert keys[0] is None
    assert keys[-1] == "Bearer open sesame"
    assert page.locator("#problem").inner_text() == ""
    page.reload()  # kept for the tab
    page.wait_for_selector("#answer-2 .best li")
    context.close()


def test_an_overtaken_answer_does_not_come_last(visit: Callable[..., Visit]) -> None:
    it = visit("#user=u7")
    page = it.page
    right, late = visit("#user=u20").ids(), []
    assert visit("#user=u8").ids() != right

    def keep(route: Any) -> None:
        if '"u8"' in (route.request.post_data or ""):
            late.append(route)
        else:
            route.continue_()

    page.route("**/v1/console/explain*", keep)
    page.evaluate("location.hash = '#user=u8'")
    end = time.monotonic() + 15
    while len(late) < 2 and time.monotonic() < end:
        page.wait_for_timeout(30)
    assert len(late) == 2
    page.evaluate("location.hash = '#user=u20'")
    it.until("document.getElementById('user').value === 'u20'")
    it.settle()
    assert it.ids() == right
    for route in late:
        with suppress(playwright.Error):  # nobody waits for it any more
            route.continue_()
    page.wait_for_timeout(700)
    assert it.ids() == right


def test_the_page_is_strict_and_small(visit: Callable[..., Visit], service: Service) -> None:
    it = visit()
    reply = it.page.request.get(service.url)
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert not re.search(r"\sstyle=|<style|<script(?![^>]*\ssrc=)|\son\w+=", reply.text())
    assert sum(f.stat().st_size for f in PAGE.iterdir() if f.is_file()) < 120_000


# ---- a page of another origin

ATTACK = """async ([url, user]) => {
  const told = JSON.stringify({ user_id: user, events: ["i1", "i2"] });
  const failed = [];
  const send = (path, more) => fetch(url + path, more).then(
    (r) => r.type === "opaque" || failed.push([path, r.status]), (e) => failed.push([path, String(e)]));
  const post = (body, headers = {}) => send("v1/events", { method: "POST", mode: "no-cors", body, headers });
  await post(new Blob([told]));
  await post(new Blob([told], { type: "application/json" }));
  await post(new Blob([told], { type: "text/plain" }));
  await post(new TextEncoder().encode(told));
  await post(told, { "Content-Type": "application/json" });
  await post(new URLSearchParams({ [told]: "" }));
  navigator.sendBeacon(url + "v1/events", new Blob([told]));
  for (const mode of ["cors", "same-origin"])
    await send("v1/events", { method: "POST", mode, body: told, headers: { "Content-Type": "application/json" } });
  await send("v1/events/keep", { method: "DELETE", mode: "cors" });
  const request = new XMLHttpRequest();
  await new Promise((done) => {
    request.onloadend = done;
    request.open("POST", url + "v1/events");
    request.send(new Blob([told]));
  });
  for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
    const frame = document.createElement("iframe");
    frame.name = enctype;
    document.body.append(frame);
    const form = Object.assign(
      document.createElement("form"), { action: url + "v1/events", method: "POST", enctype, target: enctype });
    form.append(Object.assign(document.createElement("input"), { name: told.slice(0, -1) + ', "x": "', value: '"}' }));
    document.body.append(form);
    await new Promise((done) => { frame.onload = done; form.submit(); });
  }
  return failed.map(([path]) => path);
}"""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!doctype html><title>another site</title><body></body>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another server of this machine, with an empty page."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_the_figure_of_the_documents_is_taken(service: Service, browser: Any, tmp_path: Path) -> None:
    photograph: Any = runpy.run_path(str(ROOT / "docs" / "console.py"))["photograph"]
    events = [{"id": "i3", "liked": True}, "i5"]
    photograph(browser, service.url.rstrip("/"), "u7", events, tmp_path / "console.png")
    width, height = struct.unpack(">II", (tmp_path / "console.png").read_bytes()[16:24])
    assert width == 1440
    assert height > 1200  # with the towers below the first screen
    assert _recent_events(service, "u7") == 2


def _recent_events(service: Service, user: str) -> int:
    """The number of recent events that the service keeps of a user."""
    told = json.dumps({"user_id": user}).encode()
    request = urllib.request.Request(
        service.url + "v1/recommend", told, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return int(json.load(reply)["recent_events"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["another port", "another site"])
def test_fault_G5_a_page_of_another_origin_writes_and_forgets_nothing(
    service: Service, browser: Any, elsewhere: int, host: str
) -> None:
    kept = json.dumps({"user_id": "keep", "events": ["i3"]}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(service.url + "v1/events", kept, headers), timeout=10).close()
    before = _recent_events(service, "keep")
    context = browser.new_context()
    page, victim = context.new_page(), f"victim of {host}"
    sent: list[str] = []
    page.on("request", lambda r: sent.append(r.url) if r.url.startswith(service.url) else None)
    page.goto(f"http://{host}:{elsewhere}/")
    assert page.evaluate("window.origin") == f"http://{host}:{elsewhere}"
    failed = page.evaluate(ATTACK, [service.url, victim])
    # What a browser sends without asking was sent; the rest it did not let the page do.
    assert failed == ["v1/events", "v1/events", "v1/events/keep"]
    assert len(sent) >= 10
    assert _recent_events(service, victim) == 0
    assert _recent_events(service, "keep") == before
    context.close()
