"""``moat dev`` as people use it: Dagster UI in a real browser, a thumb that reaches the marts, a clean Ctrl-C."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.integration.conftest import free_port
from tests.integration.deployments import Deployment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURES = Path(__file__).parents[2] / "test-output"


@dataclass
class Dev:
    """A running ``moat dev``."""

    deployment: Deployment
    process: subprocess.Popen[bytes]
    dagster: str
    feedback: str
    output: Path

    def graphql(self, query: str) -> dict[str, Any]:
        answer = httpx.post(f"{self.dagster}/graphql", json={"query": query}, timeout=60).json()
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.graphql(
            "{ runsOrError(limit: 50) { ... on Runs { results { jobName status tags { key value } } } } }"
        )["runsOrError"]["results"]
        return found


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    deployment = Deployment(tmp_path_factory.mktemp("dev")).write()
    deployment.send_feedback()
    done = deployment.moat("run")
    assert done.returncode == 0, done.stdout + done.stderr
    output = deployment.folder / "dev.log"
    ports = free_port(), free_port()
    with output.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "orchestration.cli", "dev"),
                *("--port", str(ports[0]), "--feedback-port", str(ports[1])),
            ],
            env=deployment.environment,
            cwd=deployment.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 180
    while "Ctrl-C stops everything" not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
    yield Dev(deployment, process, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", output)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    deployment.destroy()


@pytest.fixture
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def picture(page: Page, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def test_the_graph_has_no_broken_or_doubled_node(dev: Dev) -> None:
    nodes = dev.graphql(
        "{ assetNodes { assetKey { path } groupName description owners { __typename } kinds"
        " dependencyKeys { path } isExecutable } }"
    )["assetNodes"]
    keys = ["/".join(node["assetKey"]["path"]) for node in nodes]
    assert len(keys) == len(set(keys))
    for node, key in zip(nodes, keys, strict=True):
        assert node["groupName"] != "default", key
        assert node["description"], key
        assert node["owners"], key
        assert node["kinds"], key
        missing = {"/".join(parent["path"]) for parent in node["dependencyKeys"]} - set(keys)
        assert not missing, f"{key} depends on {missing}, which no asset is"
    # A table that only exists as somebody's input would be a node nobody writes.
    read_only = {key for node, key in zip(nodes, keys, strict=True) if not node["isExecutable"]}
    assert read_only == {
        "feedback/interaction",
        "feedback/feedback_event",
        "registry/source_file",
        "quarantine/row",
        "quarantine/file",
        "corpus/document",
        "corpus/chunk",
    }


def test_the_lineage_goes_from_sources_to_index_and_datasets(dev: Dev, page: Page) -> None:
    page.goto(f"{dev.dagster}/asset-groups")
    for group in ("sources", "documents", "embeddings", "feedback", "marts", "datasets"):
        expect(page.get_by_text(group, exact=True).last).to_be_visible()
    picture(page, "lineage")
    edges = {
        ("/".join(node["assetKey"]["path"]), "/".join(parent["path"]))
        for node in dev.graphql("{ assetNodes { assetKey { path } dependencyKeys { path } } }")["assetNodes"]
        for parent in node["dependencyKeys"]
    }
    upstream: dict[str, set[str]] = {}
    for child, parent in edges:
        upstream.setdefault(child, set()).add(parent)

    def ancestors(key: str) -> set[str]:
        found = set(upstream.get(key, ()))
        return found.union(*(ancestors(parent) for parent in found)) if found else found

    assert {"raw/notes", "documents/notes", "chunks/notes", "vectors/notes"} <= ancestors("index/notes")
    assert {"feedback/feedback_event", "feedback/redaction", "marts/feedback_current"} <= ancestors(
        "datasets/sft"
    )


def test_checks_are_shown(dev: Dev, page: Page) -> None:
    page.goto(f"{dev.dagster}/assets/raw/orders?view=checks")
    for check in ("nothing_is_lost", "refused_share"):
        expect(page.get_by_text(check).first).to_be_visible()
    picture(page, "checks")


def test_a_backfill_launched_in_the_browser_completes(dev: Dev, page: Page) -> None:
    page.goto(f"{dev.dagster}/assets/marts/fct_feedback?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_text("Show all partitions").click()
    page.get_by_role("button", name="Custom").click()
    days = page.get_by_role("dialog").locator("input[type=text]").first
    days.fill("[2026-03-01...2026-03-03]")
    days.press("Enter")
    picture(page, "backfill")
    page.get_by_role("button", name="Launch").click()
    deadline = time.monotonic() + 180
    while True:
        found = dev.graphql(
            "{ partitionBackfillsOrError(limit: 1) { ... on PartitionBackfills"
            " { results { status numPartitions } } } }"
        )["partitionBackfillsOrError"]["results"]
        if found and found[0]["status"] in ("COMPLETED_SUCCESS", "COMPLETED"):
            break
        assert time.monotonic() < deadline and (not found or "FAIL" not in found[0]["status"]), found
        time.sleep(1)
    assert found[0]["numPartitions"] == 3


def test_the_printed_link_signs_in_and_questions_are_answered_from_the_index(dev: Dev, page: Page) -> None:
    (link,) = [line.split()[-1] for line in dev.output.read_text().splitlines() if line.startswith("sign in")]
    assert dev.deployment.settings.person_key_file.stat().st_mode & 0o077 == 0
    page.goto(link)
    page.get_by_role("button", name="Sign in").press("Enter")
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    answer = page.request.post(
        f"{dev.feedback}/ask/api/ask",
        data={"question": "how far does the valve of machine 3 close?"},
        headers={"Origin": dev.feedback},
    )
    assert answer.ok, answer.text()
    assert "The valve of machine 3 closes at 30 bar" in answer.json()["html"]


def test_a_second_one_for_the_deployment_is_refused(dev: Dev) -> None:
    second = dev.deployment.moat("dev")
    assert second.returncode == 1
    assert f"running already: process {dev.process.pid}" in second.stderr
    assert "Ctrl-C" in second.stderr


def test_a_thumb_reaches_the_mart_with_no_further_command(dev: Dev) -> None:
    key = dev.deployment.settings.api_key_file.read_text().strip()
    answer = httpx.post(
        f"{dev.feedback}/v1/feedback",
        headers={"Authorization": f"Bearer {key}"},
        json={"kind": "thumb", "score": 0, "interaction_id": "i-1", "occurred_at": "2026-03-20T10:00:00Z"},
    )
    assert answer.status_code == 201, answer.text
    feedback_id = answer.json()["feedback_id"]
    deadline = time.monotonic() + 180
    with psycopg.connect(dev.deployment.database().url, autocommit=True) as connection:
        while True:
            row = connection.execute(
                "select score, created_day::text from marts.feedback_current where feedback_id = %s",
                [feedback_id],
            ).fetchone()
            if row is not None:
                break
            assert time.monotonic() < deadline, dev.runs()
            time.sleep(0.5)
    assert row == (0.0, "2026-03-20")
    asked_for = [
        {tag["key"]: tag["value"] for tag in run["tags"]}
        for run in dev.runs()
        if run["jobName"] == "feedback_day"
    ]
    # The questions of the ask page are interactions of today.
    assert "2026-03-20" in [tags["dagster/partition"] for tags in asked_for]
    # Nor did one thumb start any training set.
    assert "feedback_review" not in [run["jobName"] for run in dev.runs()]


def test_ctrl_c_stops_everything(dev: Dev) -> None:
    dev.process.send_signal(signal.SIGINT)
    assert dev.process.wait(60) == 0
    assert dev.output.read_text().rstrip().endswith("stopped")
    for url in (dev.dagster, dev.feedback):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
