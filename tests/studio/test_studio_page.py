"""The page itself: in Chromium, through its API, and when its server is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.studio.addresses import listening
from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.serving import serving
from support.commands import assert_one_error, started
from support.sessions import create, stream
from support.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the studio needs the extra 'studio'")

EDITS = [se.EditRequest(**fact) for fact in stream(9)]
PATIENCE = 30_000  # milliseconds, on a machine that has other work


class Held(Follower):
    """Lets a stream go on turn by turn."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)

    def final(self, turn) -> None:
        assert self.turns.acquire(timeout=60)


@pytest.fixture
def desk(tmp_path, tokenizer):
    with Desk(create(tmp_path / "edits", tokenizer)) as desk:
        yield desk


@pytest.fixture
def address(desk):
    with listening("127.0.0.1", 0) as at, serving(desk, at, None) as address:
        yield address


@pytest.fixture
def opened(browser, address):
    """Opens the page in another tab; in the end no tab has asked any other machine for anything, or complained."""
    contexts, complaints = [], []

    def open_page(**settings):
        context = browser.new_context(**settings)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda asked: None if local(asked.url) else complaints.append(asked.url))
        tab.goto(address)
        tab.locator(".work").wait_for()
        return tab

    def local(url: str) -> bool:
        return url.startswith((address, "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def show(tab, name: str) -> None:
    tab.get_by_role("tab", name=name, exact=True).click()


def shows(tab, text: str) -> None:
    tab.get_by_text(text).first.wait_for()


def holds(tab, text: str) -> None:
    """Waits until a field does."""
    fields = "[...document.querySelectorAll('input, textarea')]"
    tab.wait_for_function(f"text => {fields}.some(field => field.value === text)", arg=text)


def test_a_fact_is_edited_asked_found_and_taken_back(opened, desk, tokenizer):
    tab = opened()
    tab.get_by_label("Prompt").first.fill("Gold is")
    tab.get_by_label("New answer").fill("Au")
    tab.get_by_role("button", name="Edit", exact=True).click()
    shows(tab, "1 edit in ")
    show(tab, "Ask")
    tab.get_by_label("Prompt").last.fill("Gold is")
    tab.get_by_role("button", name="Ask both").click()
    unedited = se.generate(tiny_model("llama"), tokenizer, "Gold is", max_new_tokens=24)[0]
    tab.wait_for_function(
        "text => [...document.querySelectorAll('textarea')].some(t => t.value === text)", arg=unedited
    )
    show(tab, "Edits")
    tab.get_by_role("button", name="Audit").click()
    shows(tab, "1 edit hold")
    tab.get_by_role("gridcell", name="Gold is").first.click()
    (id,) = desk.session.history.entries
    holds(tab, id)
    tab.get_by_role("button", name="Revert it").click()
    shows(tab, "1 reverted")
    tab.get_by_label("State").click()
    tab.get_by_role("option", name="holds").click()
    shows(tab, "0 of 1 edits")
    show(tab, "Charts")
    show(tab, "History")
    tab.get_by_role("gridcell", name="the unedited model").first.click()
    holds(tab, "0")
    tab.get_by_role("button", name="Roll back to it").click()
    shows(tab, "This takes 2 turns with 1 edits out of the model")
    tab.get_by_role("button", name="Roll back", exact=True).click()
    shows(tab, "turn 0 · no edits yet")
    show(tab, "Export")
    tab.get_by_role("button", name="Export", exact=True).click()
    shows(tab, "✗ Export: delta")


def test_two_tabs_and_one_that_is_closed_amid_an_edit(opened, desk, tmp_path):
    held = Held()
    desk.session.editor.followers.add(held)
    path = tmp_path / "monday.json"
    path.write_text(json.dumps(stream(9)))
    first, second = opened(), opened()
    first.locator("input[type=file]").set_input_files(path)
    shows(first, "monday.json")
    first.get_by_role("button", name="Edit the file").click()
    for tab in (first, second):
        shows(tab, "Edit monday.json, running")
        shows(tab, "Editing: ")
        tab.get_by_role("button", name="Stop after this turn").wait_for()
    first.close()
    for _ in range(3):
        held.turns.release()
    shows(second, "9 edits in ")
    third = opened()
    shows(third, "9 edits in ")
    shows(third, "turn 3 · 9 not looked at")
    assert desk.session.history.turn == 3


def test_bad_input_is_a_sentence_and_nothing_else(opened, desk, tmp_path):
    tab = opened()
    tab.get_by_role("button", name="Edit", exact=True).click()
    shows(tab, "prompt")
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "A", "target": "B"}\n{"prompt": "", "target": "C"}\n{"prompt": "D"}\n')
    tab.locator("input[type=file]").set_input_files(path)
    shows(tab, "bad.jsonl")
    tab.get_by_role("button", name="Edit the file").click()
    shows(tab, "nothing is edited, because of 2 records: line 2: ")
    assert desk.session.history.turn == 0


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_follows_the_theme(opened, desk, theme, width):
    assert desk.edit(EDITS, "nine").over.wait(60)
    assert desk.audit().over.wait(60)
    tab = opened(color_scheme=theme, viewport={"width": width, "height": 844})
    shows(tab, "of 9 edits hold")
    for name in ("Edit", "Ask", "Edits", "History", "Charts", "Export"):
        button = tab.get_by_role("tab", name=name, exact=True)
        if not button.is_visible():  # on a phone the last ones are in a menu
            tab.locator(".overflow-menu button").first.click()
            button = tab.locator(".overflow-dropdown button", has_text=name)
        button.click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        if name == "Charts":
            ink = tab.locator(".charts svg text").first.evaluate("text => getComputedStyle(text).fill")
            page = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (brightness(ink) > brightness(page)) == (theme == "dark")
            sizes = tab.locator(".charts svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
            assert all(200 < size <= width for size in sizes)


def brightness(color: str) -> float:
    return sum(map(float, color[color.index("(") + 1 : -1].split(",")[:3]))


def test_uploads_are_gone_afterwards(desk, tmp_path, monkeypatch):
    from gradio_client import Client, handle_file

    path, scratch = tmp_path / "monday.json", tmp_path / "scratch"
    path.write_text(json.dumps(stream(3)))
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with listening("127.0.0.1", 0) as at, serving(desk, at, None) as address:
        client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
        client.predict(handle_file(str(path)), api_name="/add_file")
        until(lambda: len(desk.view.rows) == 3)
        assert list(scratch.rglob("monday.json"))
    assert not list(scratch.rglob("monday.json"))


def test_through_its_api(address, desk, tokenizer):
    from gradio_client import Client

    client = Client(address, verbose=False, analytics_enabled=False)
    assert client.predict("Gold is", "Au", "", "Au is the sign of", api_name="/add_fact").startswith("job 1: ")
    found = client.predict("Gold is", 5, api_name="/ask")
    assert found[1] == se.generate(tiny_model("llama"), tokenizer, "Gold is", max_new_tokens=5)[0]
    client.predict(api_name="/audit")
    until(lambda: not client.predict(api_name="/status")["busy"])
    assert client.predict(1, api_name="/job")["state"] == "done"
    assert client.predict(api_name="/status")["turn"] == 1
    client.predict(0, api_name="/rollback")
    until(lambda: client.predict(api_name="/status")["turn"] == 0)
    with pytest.raises(Exception, match="there is no job 77"):
        client.predict(77, api_name="/job")


def test_a_network_needs_the_token(desk):
    import urllib.error
    import urllib.request

    from gradio_client import Client

    with listening("0.0.0.0", 0) as at, serving(desk, at, "a-long-secret") as address:
        assert address == f"http://{socket.gethostname()}:{at.getsockname()[1]}/?token=a-long-secret"
        address = f"http://127.0.0.1:{at.getsockname()[1]}/"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + "config")
        with pytest.raises(Exception, match="credentials"):
            Client(address, verbose=False)
        client = Client(address, verbose=False, headers={"Authorization": "Bearer a-long-secret"})
        assert client.predict(api_name="/status")["turn"] == 0
    with listening("0.0.0.0", 0) as at, pytest.raises(ValueError, match="needs a token"), serving(desk, at, None):
        pass


@contextlib.contextmanager
def studio(*arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process of the command, and its address."""
    command = [sys.executable, "-m", "stableedit_cpp", "studio", *map(str, arguments), "--no-browser", "--no-guard"]
    with started(command, stderr=subprocess.DEVNULL, text=True) as process:
        yield process, process.stdout.readline().split(" is at ")[1].split()[0]


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_killed_amid_an_edit(tmp_path, capsys):
    """What was done is there, what was in flight is not, and the same file goes on."""
    from gradio_client import Client, handle_file

    model, path = save_tiny(tmp_path / "model", bos=True), tmp_path / "many.json"
    path.write_text(json.dumps(stream(1000)))
    edits = tmp_path / "edits"
    with studio(edits, "--model", model) as (process, address):
        client = Client(address, verbose=False, analytics_enabled=False)
        client.predict(handle_file(str(path)), api_name="/add_file")
        assert main(["studio", str(edits)]) == 2  # a second one
        assert f"open for writing by process {process.pid}" in assert_one_error(capsys.readouterr().err)
        until(lambda: client.predict(api_name="/status")["turn"] >= 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    view = se.lifelong.SessionView(edits)
    done = len(view.history.entries)
    assert 0 < done < 1000
    with studio(edits) as (_, address):
        client = Client(address, verbose=False, analytics_enabled=False)
        assert sum(client.predict(api_name="/status")["edits"].values()) == done
        client.predict(handle_file(str(path)), api_name="/add_file")
        until(lambda: client.predict(1, api_name="/job")["state"] == "done")
        assert client.predict(1, api_name="/job")["said"] == f"{1000 - done} edits to do, {done} done before"
        client.predict(api_name="/stop")


def test_a_second_ctrl_c_drops_the_turn(tmp_path, tokenizer):
    from gradio_client import Client, handle_file

    model, path, edits = save_tiny(tmp_path / "model"), tmp_path / "many.json", tmp_path / "edits"
    path.write_text(json.dumps(stream(300)))
    with studio(edits, "--model", model) as (process, address):
        client = Client(address, verbose=False, analytics_enabled=False)
        client.predict(handle_file(str(path)), api_name="/add_file")
        until(lambda: client.predict(api_name="/status")["turn"] == 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("Ending after the turn in flight")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    with se.LifelongSession.open(edits, tiny_model("llama"), tokenizer) as session:
        assert session.history.turn == 1
