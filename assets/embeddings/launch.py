"""Where the embedding job runs: a process here, a Ray cluster, or Kubernetes; one interface, one setting.

Belongs here: starting ``python -m embedder`` somewhere, waiting for it, ending it when the run is cancelled, and
handing on what it reports through Dagster Pipes. Input, output and model must have the same path there as here.
Does not belong here: what the job does, and which texts it gets.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dagster as dg
import yaml

from assets.embeddings import kubernetes_job
from assets.embeddings.kubernetes_job import Claim, ManifestError, parse_claims

if TYPE_CHECKING:
    from dagster_ray import PipesRayJobClient

# Nothing leaves the machine the job runs on either.
OPT_OUTS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class LauncherError(Exception):
    """A launcher cannot be had as the settings ask; the message names the setting and the remedy."""


@dataclass(frozen=True)
class JobRequest:
    """One run of the job.

    Attributes:
        model: A local model folder; None takes the one installed where the job runs.
        options: Further arguments of ``python -m embedder``, as they are.
    """

    input: Path
    output: Path
    model: Path | None = None
    options: tuple[str, ...] = ()

    def command(self, python: str, *more: str) -> list[str]:
        """The command line, its paths absolute."""
        command = [python, "-m", "embedder", "--input", str(self.input.absolute())]
        command += ["--output", str(self.output.absolute())]
        if self.model is not None:
            command += ["--model", str(self.model.absolute())]
        return [*command, *self.options, *more]

    @property
    def paths(self) -> list[Path]:
        """What the job needs to see, absolute."""
        return [path.absolute() for path in (self.input, self.output, self.model) if path is not None]


class Launcher(Protocol):
    """Runs the job to its end."""

    def run(self, context: dg.AssetExecutionContext, request: JobRequest) -> dg.MaterializeResult[Any]:
        """The materialization and checks the job reported. Raises when it failed, or ended without a report."""
        ...


class SubprocessLauncher:
    """The job as a child process on this machine."""

    def run(self, context: dg.AssetExecutionContext, request: JobRequest) -> dg.MaterializeResult[Any]:
        """See `Launcher`. A cancelled run interrupts the process, which then stops cleanly."""
        # The request names the model; EMBEDDING_MODEL, which the job would follow otherwise, may name another.
        client = dg.PipesSubprocessClient(env={**OPT_OUTS, "EMBEDDING_MODEL": ""})
        return _reported(client.run(context=context, command=request.command(sys.executable)))


@dataclass(frozen=True)
class RayLauncher:
    """The job on a Ray cluster, spread over its machines or GPUs.

    The embedder's code travels with the job; the cluster's Python needs the libraries of the extra ``ray`` and
    the embedder's own. A cluster with tokens gets the one in ``RAY_AUTH_TOKEN`` or ``~/.ray/auth_token``.

    Attributes:
        address: The cluster's job server, such as ``http://ray-head:8265``.
    """

    address: str

    def run(self, context: dg.AssetExecutionContext, request: JobRequest) -> dg.MaterializeResult[Any]:
        """See `Launcher`. A cancelled run stops the Ray job."""
        import embedder

        client = _ray_job_client(self.address)
        submission: Any = {
            "entrypoint": shlex.join(request.command("python", "--runner", "ray")),
            "runtime_env": {
                "py_modules": [str(Path(embedder.__file__).parent)],
                "env_vars": dict(OPT_OUTS),
            },
        }
        return _reported(client.run(context=context, submit_job_params=submission))


@dataclass(frozen=True)
class KubernetesLauncher:
    """The job as a Kubernetes Job.

    Attributes:
        image: An image with Python, the embedder and its libraries, and a user that is not root.
        claims: The volumes that hold the lake and the model, at the paths they have here.
        overrides: A part of a Job, merged into the manifest: GPUs, memory, node selectors, service account.
        poll_seconds: Between two looks at the job's state.
    """

    image: str
    claims: tuple[Claim, ...]
    namespace: str = "default"
    overrides: Mapping[str, Any] | None = None
    poll_seconds: float = 5

    def render(
        self, request: JobRequest, run_id: str, environment: Mapping[str, str]
    ) -> kubernetes_job.Manifest:
        """The manifest; raises ManifestError when input, output or model lie on none of the volumes."""
        return kubernetes_job.render_job(
            request.command("python"),
            image=self.image,
            namespace=self.namespace,
            claims=self.claims,
            paths=request.paths,
            run_id=run_id,
            environment={**OPT_OUTS, "HOME": "/tmp", **environment},
            overrides=self.overrides or {},
        )

    def run(self, context: dg.AssetExecutionContext, request: JobRequest) -> dg.MaterializeResult[Any]:
        """See `Launcher`. A Job that has ended stays for a day; one that is left before is deleted."""
        from dagster_k8s.pipes import PipesK8sPodLogsMessageReader

        reader = PipesK8sPodLogsMessageReader()
        with dg.open_pipes_session(context, dg.PipesEnvContextInjector(), reader) as session:
            manifest = self.render(request, context.run.run_id, session.get_bootstrap_env_vars())
            with _KubernetesJob.created(manifest, self.poll_seconds) as job:
                context.log.info(f"created the job {job.name} in the namespace {job.namespace}")
                if (pod := job.wait_for_pod(context.log.info)) is not None:
                    reader.consume_pod_logs(context, job.core, pod, job.namespace)
                job.wait_for_end()
        return _reported(dg.PipesClientCompletedInvocation(session))


class _KubernetesJob:
    """One Job on the cluster this runs in, else on the one the kubeconfig names."""

    # What waiting does not mend.
    HOPELESS = frozenset(
        {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
    )

    def __init__(self, manifest: kubernetes_job.Manifest, poll_seconds: float) -> None:
        import kubernetes
        from dagster_k8s.utils import apply_no_proxy_env_workaround

        if "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config()
        apply_no_proxy_env_workaround()
        configuration = kubernetes.client.Configuration.get_default_copy()
        configuration.retries = 5  # a job takes hours, and an API server restarts
        api = kubernetes.client.ApiClient(configuration)
        self.core = kubernetes.client.CoreV1Api(api)
        self._batch = kubernetes.client.BatchV1Api(api)
        self._poll_seconds = poll_seconds
        self.namespace: str = manifest["metadata"]["namespace"]
        self.name: str = self._batch.create_namespaced_job(self.namespace, manifest).metadata.name

    @classmethod
    @contextmanager
    def created(cls, manifest: kubernetes_job.Manifest, poll_seconds: float) -> Iterator[_KubernetesJob]:
        """Create the Job; leaving the block by an exception deletes it, unless it has ended by itself."""
        job = cls(manifest, poll_seconds)
        try:
            yield job
        except BaseException:
            if job._ending() is None:
                job._batch.delete_namespaced_job(job.name, job.namespace, propagation_policy="Foreground")
            raise

    def wait_for_pod(self, say: Callable[[str], None]) -> str | None:
        """The name of the pod once its container has started; None when the Job ended without."""
        told = ("", "")
        while self._ending() is None:
            for pod in self._pods():
                reason, message = _waits_for(pod)
                if not reason:
                    return str(pod.metadata.name)
                if reason in self.HOPELESS:
                    raise dg.Failure(f"the job {self.name} cannot start: {reason}: {message}")
                if (reason, message) != told:
                    told = (reason, message)
                    say(f"the job {self.name} waits: {reason}: {message}")
            time.sleep(self._poll_seconds)
        pods = self._pods()
        return str(pods[0].metadata.name) if pods and not _waits_for(pods[0])[0] else None

    def wait_for_end(self) -> None:
        """Raises dagster.Failure when the Job failed, with its reason and how its container ended."""
        while (ending := self._ending()) is None:
            time.sleep(self._poll_seconds)
        if ending.type == "Failed":
            how = [
                f"container {status.name} ended with {status.state.terminated.exit_code} "
                f"({status.state.terminated.reason})"
                for pod in self._pods()
                for status in pod.status.container_statuses or []
                if status.state.terminated is not None
            ]
            detail = "; ".join([f"{ending.reason}: {ending.message}", *how])
            raise dg.Failure(f"the job {self.name} in the namespace {self.namespace} failed: {detail}")

    def _ending(self) -> Any | None:
        status = self._batch.read_namespaced_job_status(self.name, self.namespace).status
        for condition in status.conditions or []:
            if condition.type in ("Complete", "Failed") and condition.status == "True":
                return condition
        return None

    def _pods(self) -> list[Any]:
        selector = f"job-name={self.name}"
        found: list[Any] = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return found


def _waits_for(pod: Any) -> tuple[str, str]:
    """(reason, message) for which no container of the pod has started; the reason is empty when one has."""
    for status in pod.status.container_statuses or []:
        if status.state.waiting is None:
            return "", ""
        return status.state.waiting.reason or "Waiting", status.state.waiting.message or ""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.reason or "Unscheduled", condition.message or ""
    return pod.status.phase or "Pending", ""


def launcher(environment: Mapping[str, str]) -> Launcher:
    """The launcher of ``EMBEDDING_LAUNCHER``: ``subprocess`` (default), ``ray`` or ``kubernetes``.

    ``ray`` needs ``EMBEDDING_RAY_ADDRESS``. ``kubernetes`` needs ``EMBEDDING_K8S_IMAGE`` and
    ``EMBEDDING_K8S_VOLUMES`` (``claim:/path[:ro]``, separated by commas), and takes ``EMBEDDING_K8S_NAMESPACE`` and
    ``EMBEDDING_K8S_MANIFEST``, a YAML file with a part of a Job that is merged into ours.

    Raises LauncherError for an unknown name, a missing setting or a missing extra.
    """
    name = environment.get("EMBEDDING_LAUNCHER") or "subprocess"
    match name:
        case "subprocess":
            return SubprocessLauncher()
        case "ray":
            _need("ray", "ray", "dagster_ray", "aiohttp")
            return RayLauncher(_setting(environment, "EMBEDDING_RAY_ADDRESS", "http://ray-head:8265"))
        case "kubernetes":
            _need("kubernetes", "kubernetes", "dagster_k8s")
            manifest = environment.get("EMBEDDING_K8S_MANIFEST")
            volumes = _setting(environment, "EMBEDDING_K8S_VOLUMES", "lake:/data/lake,models:/models:ro")
            try:
                claims = parse_claims(volumes)
            except ManifestError as error:
                raise LauncherError(f"EMBEDDING_K8S_VOLUMES={volumes}: {error}.") from error
            return KubernetesLauncher(
                image=_setting(environment, "EMBEDDING_K8S_IMAGE", "registry.example/embedder:1"),
                claims=tuple(claims),
                namespace=environment.get("EMBEDDING_K8S_NAMESPACE") or "default",
                overrides=_read_overrides(Path(manifest)) if manifest else None,
            )
    raise LauncherError(f"EMBEDDING_LAUNCHER={name}: take one of subprocess, ray, kubernetes.")


def _need(extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise LauncherError(
            f"EMBEDDING_LAUNCHER={extra} needs {' and '.join(missing)}, which this Python has not; install Datamoat "
            f"with the extra {extra}: pip install -e '.[{extra}]'."
        )


def _setting(environment: Mapping[str, str], name: str, example: str) -> str:
    value = environment.get(name)
    if not value:
        raise LauncherError(
            f"EMBEDDING_LAUNCHER={environment['EMBEDDING_LAUNCHER']} needs {name}, such as {example}."
        )
    return value


def _read_overrides(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LauncherError(f"EMBEDDING_K8S_MANIFEST={path} cannot be read as YAML: {error}.") from error
    if not isinstance(content, dict):
        raise LauncherError(
            f"EMBEDDING_K8S_MANIFEST={path} is not a part of a Job; write a mapping, such as spec: {{...}}."
        )
    return content


def _reported(invocation: dg.PipesClientCompletedInvocation) -> dg.MaterializeResult[Any]:
    # A job that reports nothing has not succeeded, so nothing is implied.
    return invocation.get_materialize_result(implicit_materialization=False)


def _ray_job_client(address: str) -> PipesRayJobClient:
    """dagster-ray's client, but for one lost connection not ending an hour's watch."""
    import requests
    from dagster_ray import PipesRayJobClient
    from ray.job_submission import JobSubmissionClient

    class Jobs(JobSubmissionClient):
        def get_job_status(self, job_id: str) -> Any:
            for seconds in (1, 2, 4, 8, 16):
                try:
                    return super().get_job_status(job_id)
                except requests.ConnectionError:
                    time.sleep(seconds)
            return super().get_job_status(job_id)

    client = PipesRayJobClient(address=address, message_reader=_whole_line_reader())
    client.client = Jobs(address)
    return client


class _WholeLines:
    """The log of a Ray job in whole lines, each once.

    It is tailed as it grows, so a piece may end in the middle of a line. After a lost connection the server begins
    at the beginning again: what was seen is passed over.
    """

    WAITS = (1, 2, 4, 8, 16)

    def __init__(self, client: Any) -> None:
        self._client = client

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        rest, seen = "", 0
        for seconds in (*self.WAITS, None):
            passed = 0
            try:
                async for piece in self._client.tail_job_logs(job_id):
                    new = piece[max(0, seen - passed) :]
                    passed += len(piece)
                    seen = max(seen, passed)
                    lines, newline, rest = (rest + new).rpartition("\n")
                    if newline:
                        yield lines
                break
            except (
                OSError,
                RuntimeError,
            ):  # aiohttp's errors of a connection are OSErrors, Ray's is the other
                if seconds is None:
                    raise
                await asyncio.sleep(seconds)
        if rest:
            yield rest


def _whole_line_reader() -> dg.PipesMessageReader:
    """dagster-ray's reader of a Ray job's log, with guards against a message that is lost or cut in two.

    A message is one JSON line in a log that other lines go to as well, and what a job prints into a file is written
    in blocks. So the job appends each message at once, and is read by whole lines.
    """
    from dagster_pipes import PipesDefaultMessageWriter
    from dagster_ray import PipesRayJobMessageReader

    class Reader(PipesRayJobMessageReader):
        @property
        def client(self) -> Any:
            return _WholeLines(super().client)

        @contextmanager
        def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[dict[str, str]]:
            with super().read_messages(handler):
                yield {PipesDefaultMessageWriter.FILE_PATH_KEY: "/dev/stderr"}

    return Reader()
