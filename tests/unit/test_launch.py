"""Launchers: which one the settings choose, what they ask for, and the Kubernetes Job they render."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from assets.embeddings.kubernetes_job import (
    Manifest,
    ManifestError,
    merged,
    parse_claims,
    render_job,
)
from assets.embeddings.launch import (
    JobRequest,
    KubernetesLauncher,
    LauncherError,
    RayLauncher,
    SubprocessLauncher,
    _WholeLines,
    launcher,
)

REQUEST = JobRequest(Path("/data/lake/in.parquet"), Path("/data/lake/vectors"), Path("/models/bge"))
KUBERNETES = {
    "EMBEDDING_LAUNCHER": "kubernetes",
    "EMBEDDING_K8S_IMAGE": "registry.example/embedder:1",
    "EMBEDDING_K8S_VOLUMES": "lake:/data/lake, models:/models:ro",
}


@pytest.fixture(autouse=True)
def every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())


def render(volumes: str = KUBERNETES["EMBEDDING_K8S_VOLUMES"], overrides: Mapping[str, Any] = {}) -> Manifest:
    return render_job(
        REQUEST.command("python"),
        image="registry.example/embedder:1",
        namespace="batch",
        claims=parse_claims(volumes),
        paths=REQUEST.paths,
        run_id="c0ffee",
        environment={"A": "1", "B": "2"},
        overrides=overrides,
    )


def container_of(job: Manifest) -> Any:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def test_a_request_is_the_command_line_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = JobRequest(Path("in.parquet"), Path("/out"), options=("--too-long", "refuse"))
    assert request.command("python", "--runner", "ray") == [
        *("python", "-m", "embedder", "--input", str(tmp_path / "in.parquet"), "--output", "/out"),
        *("--too-long", "refuse", "--runner", "ray"),
    ]
    assert "--model" in REQUEST.command("python")


def test_the_setting_chooses(tmp_path: Path) -> None:
    assert isinstance(launcher({}), SubprocessLauncher)
    assert isinstance(launcher({"EMBEDDING_LAUNCHER": "subprocess"}), SubprocessLauncher)
    on_ray = launcher({"EMBEDDING_LAUNCHER": "ray", "EMBEDDING_RAY_ADDRESS": "http://head:8265"})
    assert on_ray == RayLauncher("http://head:8265")
    (tmp_path / "job.yaml").write_text("spec: {ttlSecondsAfterFinished: 60}")
    chosen = launcher(
        {
            **KUBERNETES,
            "EMBEDDING_K8S_NAMESPACE": "ml",
            "EMBEDDING_K8S_MANIFEST": str(tmp_path / "job.yaml"),
        }
    )
    assert isinstance(chosen, KubernetesLauncher)
    job = chosen.render(REQUEST, "run", {"DAGSTER_PIPES_CONTEXT": "x"})
    assert job["metadata"]["namespace"] == "ml"
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    environment = {entry["name"]: entry["value"] for entry in container_of(job)["env"]}
    assert environment["DAGSTER_PIPES_CONTEXT"] == "x"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert container_of(job)["command"] == REQUEST.command("python")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"EMBEDDING_LAUNCHER": "slurm"},
            r"EMBEDDING_LAUNCHER=slurm: take one of subprocess, ray, kubernetes",
        ),
        ({"EMBEDDING_LAUNCHER": "ray"}, r"needs EMBEDDING_RAY_ADDRESS, such as http://"),
        ({**KUBERNETES, "EMBEDDING_K8S_IMAGE": ""}, r"needs EMBEDDING_K8S_IMAGE"),
        ({**KUBERNETES, "EMBEDDING_K8S_VOLUMES": ""}, r"needs EMBEDDING_K8S_VOLUMES"),
        ({**KUBERNETES, "EMBEDDING_K8S_VOLUMES": "lake"}, r"'lake' is not a volume; write claim:/path"),
        ({**KUBERNETES, "EMBEDDING_K8S_VOLUMES": "lake:/data:rw"}, r"'lake:/data:rw' is not a volume"),
        ({**KUBERNETES, "EMBEDDING_K8S_MANIFEST": "/absent.yaml"}, r"/absent\.yaml cannot be read as YAML"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(environment: dict[str, str], says: str) -> None:
    with pytest.raises(LauncherError, match=says):
        launcher(environment)


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"", b"a: [", b"\xff\xfe"])
def test_a_file_of_overrides_that_is_no_part_of_a_job_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(LauncherError, match=r"EMBEDDING_K8S_MANIFEST=.*job\.yaml"):
        launcher({**KUBERNETES, "EMBEDDING_K8S_MANIFEST": str(tmp_path / "job.yaml")})


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("kubernetes", "kubernetes")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(LauncherError, match=rf"pip install -e '\.\[{extra}\]'"):
        launcher({"EMBEDDING_LAUNCHER": name})


def test_the_job_is_complete_and_as_narrow_as_the_restricted_pod_standard() -> None:
    job = render()
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"]["generateName"] and job["metadata"]["namespace"] == "batch"
    assert job["spec"]["backoffLimit"] == 0  # the next run of the asset resumes
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    template = job["spec"]["template"]
    assert job["metadata"]["labels"] == template["metadata"]["labels"]
    assert template["metadata"]["labels"]["dagster/run-id"] == "c0ffee"

    pod = template["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]

    container = container_of(job)
    assert container["command"] == REQUEST.command("python")
    assert container["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data/lake"] == {"name": "lake", "mountPath": "/data/lake", "readOnly": False}
    assert mounts["/models"]["readOnly"] is True
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    claims = [
        volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [{"claimName": "lake"}, {"claimName": "models"}]


def test_overrides_change_add_and_remove() -> None:
    job = render(
        overrides={
            "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpu"}},
            "spec": {
                "template": {
                    "spec": {
                        "tolerations": [{"key": "spot", "operator": "Exists"}],
                        "nodeSelector": {"disk": "ssd"},
                        "securityContext": {"runAsUser": 1000},
                        "containers": [
                            {
                                "name": "embedder",
                                "resources": {
                                    "limits": {"nvidia.com/gpu": None},
                                    "requests": {"cpu": "8"},
                                },
                                "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
                            },
                            {"name": "sidecar", "image": "x"},
                        ],
                    }
                }
            },
        }
    )
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    pod = job["spec"]["template"]["spec"]
    assert pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert pod["nodeSelector"] == {"disk": "ssd"}
    assert pod["securityContext"]["runAsUser"] == 1000 and pod["securityContext"]["runAsNonRoot"] is True
    embedder, sidecar = pod["containers"]
    assert embedder["resources"] == {"limits": {}, "requests": {"cpu": "8"}}
    assert {entry["name"]: entry["value"] for entry in embedder["env"]} == {"A": "1", "B": "3", "C": "4"}
    assert embedder["command"] == REQUEST.command("python")
    assert sidecar == {"name": "sidecar", "image": "x"}


def test_merging_alters_neither_side() -> None:
    base = {"a": {"b": 1}, "env": [{"name": "x", "value": "1"}]}
    change = {"a": {"b": None, "c": 2}, "env": [{"name": "x", "value": "2"}]}
    assert merged(base, change) == {"a": {"c": 2}, "env": [{"name": "x", "value": "2"}]}
    assert base == {"a": {"b": 1}, "env": [{"name": "x", "value": "1"}]}
    assert change["a"] == {"b": None, "c": 2}


def test_an_override_of_a_list_must_say_which_element() -> None:
    with pytest.raises(ManifestError, match="each of containers needs name"):
        render(overrides={"spec": {"template": {"spec": {"containers": [{"image": "x"}]}}}})


def test_a_path_on_no_volume_is_refused_before_anything_is_submitted() -> None:
    with pytest.raises(ManifestError, match=r"/models/bge lies on no volume .* EMBEDDING_K8S_VOLUMES"):
        render("lake:/data/lake,models:/models-of-others")
    render("all:/")
    mount = {"name": "m", "mountPath": "/models"}
    volume = {"name": "m", "hostPath": {"path": "/m"}}
    spec = {"volumes": [volume], "containers": [{"name": "embedder", "volumeMounts": [mount]}]}
    render("lake:/data/lake", {"spec": {"template": {"spec": spec}}})


def test_the_log_of_a_ray_job_comes_in_whole_lines_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        calls = 0

        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            assert job_id == "j"
            self.calls += 1
            if self.calls == 1:
                for piece in ("one\ntw", "o\nthr"):
                    yield piece
                raise ConnectionResetError("gone")
            for piece in ("one\n", "two\nthree\nfo", "ur"):
                yield piece

    async def lines() -> list[str]:
        return [line async for line in _WholeLines(Client()).tail_job_logs("j")]

    monkeypatch.setattr(_WholeLines, "WAITS", (0,))
    assert "\n".join(asyncio.run(lines())).split("\n") == ["one", "two", "three", "four"]


def test_a_log_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
            raise ConnectionRefusedError("gone")
            yield ""

    async def lines() -> list[str]:
        return [line async for line in _WholeLines(Client()).tail_job_logs("j")]

    monkeypatch.setattr(_WholeLines, "WAITS", (0, 0))
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(lines())
