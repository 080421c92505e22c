"""The manifest of the embedding job on Kubernetes: a ``batch/v1`` Job as plain values.

Belongs here: what the Job looks like, and how a deployment's own additions are merged into it.
Does not belong here: submitting it, watching it (launch.py), reading settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

Manifest: TypeAlias = dict[str, Any]

CONTAINER = "embedder"
DAY = 24 * 60 * 60

# By what Kubernetes itself tells the elements of these lists apart; a list not named here is replaced whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}


class ManifestError(Exception):
    """The Job would not work; the message names the setting and the remedy."""


class Claim(NamedTuple):
    """A persistent volume claim, and where the job finds it: at the path it has for Dagster as well."""

    name: str
    path: str
    read_only: bool


def parse_claims(text: str) -> list[Claim]:
    """Claims from ``name:/path[:ro]``, separated by commas. Raises ManifestError."""
    claims = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = part.partition(":")
        path, _, mode = rest.partition(":")
        if not name or not path.startswith("/") or mode not in ("", "ro"):
            raise ManifestError(f"{part!r} is not a volume; write claim:/path or claim:/path:ro")
        claims.append(Claim(name, path, mode == "ro"))
    return claims


def render_job(
    command: Sequence[str],
    *,
    image: str,
    namespace: str,
    claims: Sequence[Claim],
    paths: Sequence[Path],
    run_id: str,
    environment: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Manifest:
    """The Job for one run of ``command``.

    Args:
        paths: What the command reads and writes; each must lie on a volume of the finished manifest.
        run_id: The Dagster run, kept as a label.
        environment: The container's variables.
        overrides: A part of a Job in the same form, merged in last; see `merged`.

    Raises ManifestError when a path lies on no volume.
    """
    labels = {
        "app.kubernetes.io/name": "datamoat-embedder",
        "app.kubernetes.io/part-of": "datamoat",
        "dagster/run-id": run_id,
    }
    scratch = {"tmp": ("/tmp", {}), "shm": ("/dev/shm", {"medium": "Memory"})}
    container = {
        "name": CONTAINER,
        "image": image,
        "command": list(command),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            *({"name": name, "mountPath": path} for name, (path, _medium) in scratch.items()),
            *({"name": claim.name, "mountPath": claim.path, "readOnly": claim.read_only} for claim in claims),
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [
            *({"name": name, "emptyDir": medium} for name, (_path, medium) in scratch.items()),
            *(
                {"name": name, "persistentVolumeClaim": {"claimName": name}}
                for name in dict.fromkeys(claim.name for claim in claims)
            ),
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "embedding-", "namespace": namespace, "labels": labels},
        "spec": {
            # Dagster decides whether to run again; the job then goes on where this one ended.
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": DAY,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    finished: Manifest = merged(job, overrides)
    _check_paths(finished, paths)
    return finished


def merged(base: Any, change: Any, key: str = "") -> Any:
    """``change`` laid over ``base``, neither altered; None removes, and lists of named things merge by name."""
    if isinstance(base, Mapping) and isinstance(change, Mapping):
        result = dict(base)
        for name, value in change.items():
            result[name] = merged(base.get(name), value, name)
        return {name: value for name, value in result.items() if value is not None}
    if isinstance(change, Mapping):
        return merged({}, change, key)
    identity = MERGE_KEYS.get(key)
    if identity and isinstance(base, list) and isinstance(change, list):
        by_name = {item[identity]: item for item in base}
        for item in change:
            if not isinstance(item, Mapping) or identity not in item:
                raise ManifestError(f"each of {key} needs {identity}, to say which one it changes")
            by_name[item[identity]] = merged(by_name.get(item[identity]), item)
        return list(by_name.values())
    return change


def _check_paths(job: Manifest, paths: Sequence[Path]) -> None:
    containers = job["spec"]["template"]["spec"]["containers"]
    container = next(container for container in containers if container["name"] == CONTAINER)
    mounts = [PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]]
    for path in paths:
        if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
            raise ManifestError(
                f"{path} lies on no volume of the job; name the claim that holds it in EMBEDDING_K8S_VOLUMES, "
                "as claim:/path, at the path it has here"
            )
