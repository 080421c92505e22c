"""Settings: every environment variable Datamoat reads, in one place, and the paths that follow from them.

Belongs here: names, defaults and derived paths. Does not belong here: anything that opens a connection or
writes a file.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from assets.documents.chunk import Chunking

ROOT = Path(__file__).resolve().parent.parent


# Nothing leaves the machine: every opt-out our libraries know.
OPT_OUTS = {
    "DO_NOT_TRACK": "1",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
}


class SettingsError(Exception):
    """An environment variable has a value Datamoat cannot use; the message names it and the remedy."""


@dataclass(frozen=True)
class Settings:
    """One deployment.

    Attributes:
        root: The checkout.
        home: Where everything Datamoat makes is kept (``DATAMOAT_HOME``, default ``<root>/.datamoat``).
        example: The example whose sources are loaded (``EXAMPLE``, default ``support``; ``none`` for none).
        contracts: The team's own contracts (``DATAMOAT_CONTRACTS``, default ``<root>/contracts``).
        database_url: An external Postgres (``DATABASE_URL``); None runs the embedded one.
        data_dir: Public data sets that examples read (``DATAMOAT_DATA_DIR``, default ``<root>/../shared/data``).
        embedding_model: A local model folder (``EMBEDDING_MODEL``); None takes the installed MiniLM. It decides which
            release is the first; later the live one's model is served, and another takes its place by promotion.
        embedding_candidate: The folder of a model to build a release with beside the live one (``EMBEDDING_CANDIDATE``).
        chunking: How documents are cut (``DATAMOAT_CHUNKING``: least and most characters of a chunk, most tokens, such as
            ``400-1000/240``, which None stands for). As with the model, it decides for the first release.
        chunking_candidate: How they are to be cut for a release beside the live one (``DATAMOAT_CHUNKING_CANDIDATE``).
        embedding_price_per_hour: What an hour of the embedding job costs, in any unit (``EMBEDDING_PRICE_PER_HOUR``).
        embedding_max_cost: The job stops there, in the same unit (``EMBEDDING_MAX_COST``).
        rerank_model: Folder of a cross-encoder that puts what a search finds in order (``RERANK_MODEL``); None: none.
        start_date: The first daily partition (``DATAMOAT_START_DATE``, ``YYYY-MM-DD``).
        feedback_min_events: Feedback events that start a run of the training sets (``DATAMOAT_FEEDBACK_MIN_EVENTS``).
        feedback_max_age_hours: One event starts it after so long (``DATAMOAT_FEEDBACK_MAX_AGE_HOURS``).
    """

    root: Path
    home: Path
    example: str
    contracts: Path
    database_url: str | None
    data_dir: Path
    embedding_model: Path | None
    start_date: str = "2025-01-01"
    feedback_min_events: int = 100
    feedback_max_age_hours: float = 24
    embedding_candidate: Path | None = None
    chunking: Chunking | None = None
    chunking_candidate: Chunking | None = None
    rerank_model: Path | None = None
    embedding_price_per_hour: float | None = None
    embedding_max_cost: float | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings; raises SettingsError for an example that does not exist."""
        example = environment.get("EXAMPLE") or "support"
        known = sorted(p.parent.name for p in (ROOT / "examples").glob("*/loader.py"))
        if example != "none" and example not in known:
            raise SettingsError(
                f"EXAMPLE={example}: there is no example of this name (examples/{example}/loader.py). "
                f"Take one of {', '.join(known)}, or 'none' for your own contracts/ only."
            )
        start_date = environment.get("DATAMOAT_START_DATE") or "2025-01-01"
        try:
            in_the_past = date.fromisoformat(start_date) <= datetime.now(UTC).date()
        except ValueError:
            in_the_past = False
        if not in_the_past:
            raise SettingsError(
                f"DATAMOAT_START_DATE={start_date}: give a day that has begun, such as 2025-01-01."
            )
        price = _optional_number(environment, "EMBEDDING_PRICE_PER_HOUR", 4)
        ceiling = _optional_number(environment, "EMBEDDING_MAX_COST", 100)
        if ceiling is not None and price is None:
            raise SettingsError(
                f"EMBEDDING_MAX_COST={ceiling:g}: a ceiling needs a price; set EMBEDDING_PRICE_PER_HOUR as well."
            )
        return cls(
            root=ROOT,
            home=Path(environment.get("DATAMOAT_HOME") or ROOT / ".datamoat").absolute(),
            example=example,
            contracts=Path(environment.get("DATAMOAT_CONTRACTS") or ROOT / "contracts").absolute(),
            database_url=environment.get("DATABASE_URL") or None,
            data_dir=Path(environment.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data").absolute(),
            embedding_model=_folder(environment, "EMBEDDING_MODEL"),
            start_date=start_date,
            feedback_min_events=int(_number(environment, "DATAMOAT_FEEDBACK_MIN_EVENTS", 100, least=1)),
            feedback_max_age_hours=_number(environment, "DATAMOAT_FEEDBACK_MAX_AGE_HOURS", 24, least=0.1),
            embedding_candidate=_folder(environment, "EMBEDDING_CANDIDATE"),
            chunking=_chunking(environment, "DATAMOAT_CHUNKING"),
            chunking_candidate=_chunking(environment, "DATAMOAT_CHUNKING_CANDIDATE"),
            rerank_model=_folder(environment, "RERANK_MODEL"),
            embedding_price_per_hour=price,
            embedding_max_cost=ceiling,
        )

    @property
    def deployment(self) -> str:
        """Names the database and the folder below ``home``: one per example, so that they never mix."""
        return "datamoat" if self.example == "none" else self.example

    @property
    def folder(self) -> Path:
        """Everything of this deployment that is not in Postgres."""
        return self.home / self.deployment

    @property
    def embedding_options(self) -> tuple[str, ...]:
        """Arguments of the embedding job about money."""
        options = (
            ("--price-per-hour", self.embedding_price_per_hour),
            ("--max-cost", self.embedding_max_cost),
        )
        return tuple(text for name, value in options if value is not None for text in (name, f"{value:g}"))

    @property
    def pseudonym_key_file(self) -> Path:
        """Key of the pseudonyms that stand for persons."""
        return self.folder / "secrets" / "pseudonym.key"

    @property
    def api_key_file(self) -> Path:
        """The feedback service's key for this deployment's own loaders."""
        return self.folder / "secrets" / "api.key"

    @property
    def person_key_file(self) -> Path:
        """The key with which the person at this machine signs in to the feedback service's pages."""
        return self.folder / "secrets" / "person.key"

    @property
    def analyst_key_file(self) -> Path:
        """Password of the analyst's login, which may read the marts and the registry."""
        return self.folder / "secrets" / "analyst.key"

    @property
    def lake(self) -> Path:
        """Parquet: embedding datasets, vectors, dataset versions, refused files."""
        return self.folder / "lake"

    @property
    def dagster_home(self) -> Path:
        """Dagster's instance folder, made by ``orchestration.bootstrap``."""
        return self.folder / "dagster"

    @property
    def dbt_project(self) -> Path:
        """The dbt project."""
        return self.root / "dbt_project"

    @property
    def dbt_target(self) -> Path:
        """dbt's compiled files and the manifest; apart for each deployment, for they differ."""
        return self.folder / "dbt"

    @property
    def report(self) -> Path:
        """The report of the newest ``moat run``."""
        return self.home / "report.json"

    @property
    def contract_folders(self) -> list[Path]:
        """The team's own contracts, then the example's if it has any."""
        of_example = self.root / "examples" / self.example / "contracts"
        return [self.contracts, of_example] if of_example.is_dir() else [self.contracts]

    @property
    def contract_variables(self) -> dict[str, str]:
        """What ``${NAME}`` may stand for in a contract's path."""
        return {
            "DATAMOAT_DATA_DIR": str(self.data_dir),
            "SITE_PACKAGES": sysconfig.get_paths()["purelib"],
        }


def _folder(environment: Mapping[str, str], name: str) -> Path | None:
    folder = environment.get(name)
    return Path(folder).absolute() if folder else None


def _chunking(environment: Mapping[str, str], name: str) -> Chunking | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        return Chunking.parse(text)
    except ValueError as error:
        raise SettingsError(f"{name}={text}: {error}.") from error


def _optional_number(environment: Mapping[str, str], name: str, example: float) -> float | None:
    return _number(environment, name, example, least=0) if environment.get(name) else None


def _number(environment: Mapping[str, str], name: str, default: float, *, least: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise SettingsError(f"{name}={text}: give a number of at least {least:g}, such as {default:g}.")
    return value
