"""The Kubernetes launcher against a small server that speaks Kubernetes' API and runs the Job's command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.embeddings.kubernetes_job import Claim, Manifest, parse_claims
from assets.embeddings.launch import JobRequest, KubernetesLauncher, _KubernetesJob
from embedder.protocol import CHECK_VECTORS_ARE_SOUND

kubernetes = pytest.importorskip("kubernetes", reason="needs the extra 'kubernetes'")
pytest.importorskip("dagster_k8s", reason="needs the extra 'kubernetes'")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:AssetExecutionContext\.run_id is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]


class Cluster(ThreadingHTTPServer):
    """Jobs of one pod with one container, which is a child process here; its stderr is the pod's log."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Api)
        self.folder = folder
        self.waiting: dict[str, str] | None = None
        """Set, no container starts, for this reason."""
        self.manifests: dict[str, Manifest] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.deleted: list[str] = []

    def create(self, manifest: Manifest) -> Manifest:
        name = f"{manifest['metadata']['generateName']}{len(self.manifests)}"
        self.manifests[name] = manifest
        if self.waiting is None:
            container = manifest["spec"]["template"]["spec"]["containers"][0]
            python, *arguments = container["command"]
            assert python == "python"
            environment = os.environ | {entry["name"]: entry["value"] for entry in container["env"]}
            with self.log(name).open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, *arguments], env=environment, stdout=log, stderr=log
                )
        return {"metadata": {"name": name}}

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        if name in self.processes:
            self.processes[name].terminate()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def job_status(self, name: str) -> dict[str, Any]:
        code = self.processes[name].poll() if name in self.processes else None
        if code is None:
            return {"active": 1}
        ending = {"type": "Complete" if code == 0 else "Failed", "status": "True"}
        detail = {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
        return {"conditions": [ending | (detail if code else {})]}

    def pod(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = {"waiting": self.waiting}
        if name in self.processes:
            code = self.processes[name].poll()
            state = {"running": {}} if code is None else {"terminated": {"exitCode": code, "reason": "Error"}}
        container = {
            "name": "embedder",
            "image": "i",
            "imageID": "",
            "ready": True,
            "restartCount": 0,
            "state": state,
        }
        return {
            "metadata": {"name": f"{name}-pod"},
            "status": {"phase": "Running", "containerStatuses": [container]},
        }


class _Api(BaseHTTPRequestHandler):
    server: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        assert re.fullmatch(r"/apis/batch/v1/namespaces/batch/jobs", self.path)
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(self.server.create(manifest))

    def do_DELETE(self) -> None:
        url = urlsplit(self.path)
        match = re.fullmatch(r"/apis/batch/v1/namespaces/batch/jobs/([^/]+)", url.path)
        assert match and "propagationPolicy" in parse_qs(url.query)
        self.server.delete(match[1])
        self._answer({"kind": "Status", "status": "Success"})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if match := re.fullmatch(r"/apis/batch/v1/namespaces/batch/jobs/([^/]+)/status", url.path):
            self._answer({"metadata": {"name": match[1]}, "status": self.server.job_status(match[1])})
        elif match := re.fullmatch(r"/api/v1/namespaces/batch/pods/([^/]+)-pod/log", url.path):
            self._follow(match[1])
        else:
            assert url.path == "/api/v1/namespaces/batch/pods"
            (selector,) = parse_qs(url.query)["labelSelector"]
            self._answer({"items": [self.server.pod(selector.removeprefix("job-name="))]})

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _follow(self, name: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.server.processes[name].wait()
        for line in self.server.log(name).read_bytes().splitlines():
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z ").encode()
            part = stamp + line + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    server = Cluster(tmp_path)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    here = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [here],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    location = str(tmp_path / "kubeconfig")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", location)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    for process in server.processes.values():
        process.kill()
        process.wait()


def materialize(folder: Path, request: JobRequest) -> dg.ExecuteInProcessResult:
    launcher = KubernetesLauncher(
        image="i", claims=(Claim("lake", str(folder), False),), namespace="batch", poll_seconds=0.05
    )

    # Dagster reads the annotation and knows only the bare class.
    @dg.asset(check_specs=[dg.AssetCheckSpec(CHECK_VECTORS_ARE_SOUND, asset="vectors")])
    def vectors(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # type: ignore[type-arg]
        return launcher.run(context, request)

    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize([vectors], instance=instance, raise_on_error=False)


def test_what_the_job_reports_in_its_log_is_the_materialization(cluster: Cluster, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"content_hash": ["a", "b"], "text": ["one text", " "]}), source)
    result = materialize(tmp_path, JobRequest(source, tmp_path / "out"))
    assert result.success
    (materialization,) = result.asset_materializations_for_node("vectors")
    metadata = {name: value.value for name, value in materialization.metadata.items()}
    assert (metadata["embedded"], metadata["failed"]) == (1, 1)
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed
    ((name, manifest),) = cluster.manifests.items()
    assert manifest["metadata"]["labels"]["dagster/run-id"] == result.run_id
    assert shlex.join(manifest["spec"]["template"]["spec"]["containers"][0]["command"]).startswith(
        "python -m embedder"
    )
    assert not cluster.deleted, f"{name} is left to its time to live"


def test_a_failed_job_fails_the_asset_with_its_exit_code_and_stays(cluster: Cluster, tmp_path: Path) -> None:
    result = materialize(tmp_path, JobRequest(tmp_path / "absent.parquet", tmp_path / "out"))
    failure = result.failure_data_for_node("vectors")
    assert failure is not None and failure.error is not None
    assert "BackoffLimitExceeded" in str(failure) and "container embedder ended with" in str(failure)
    assert not result.asset_materializations_for_node("vectors")
    assert not cluster.deleted


def test_a_container_that_cannot_start_ends_the_wait_and_is_deleted(cluster: Cluster, tmp_path: Path) -> None:
    cluster.waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    result = materialize(tmp_path, JobRequest(tmp_path / "in.parquet", tmp_path / "out"))
    assert "ImagePullBackOff: no such image" in str(result.failure_data_for_node("vectors"))
    assert cluster.deleted == list(cluster.manifests)


def test_a_job_that_is_left_early_is_deleted(cluster: Cluster, tmp_path: Path) -> None:
    container = {"name": "embedder", "command": ["python", "-c", "import time; time.sleep(600)"]}
    overrides = {"spec": {"template": {"spec": {"containers": [container]}}}}
    launcher = KubernetesLauncher("i", (Claim("lake", str(tmp_path), False),), "batch", overrides)
    manifest = launcher.render(JobRequest(tmp_path / "in", tmp_path / "out"), "run", {})
    with pytest.raises(KeyboardInterrupt), _KubernetesJob.created(manifest, 0.05):
        raise KeyboardInterrupt
    ((name, process),) = cluster.processes.items()
    assert cluster.deleted == [name]
    assert process.wait(30) == -signal.SIGTERM


def test_every_field_of_the_manifest_is_one_that_kubernetes_knows() -> None:
    request = JobRequest(Path("/lake/in"), Path("/lake/out"), Path("/models/m"))
    launcher = KubernetesLauncher("i", tuple(parse_claims("lake:/lake,models:/models:ro")))
    manifest = launcher.render(request, "run", {})
    client = kubernetes.client.ApiClient()
    known = client._ApiClient__deserialize(manifest, "V1Job")
    assert client.sanitize_for_serialization(known) == manifest
