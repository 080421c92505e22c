"""The ``moat`` command.

Belongs here: verbs, their options and their exit codes. Does not belong here: what the verbs do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from feedback.cli import app as feedback_app
from orchestration.settings import OPT_OUTS, Settings, SettingsError

app = typer.Typer(
    name="moat",
    no_args_is_help=True,
    add_completion=False,
    help="The private data-and-feedback loop around an AI product, on machines you own.",
    epilog="Settings come from the environment: EXAMPLE, DATABASE_URL, DATAMOAT_HOME, DATAMOAT_DATA_DIR, EMBEDDING_MODEL, EMBEDDING_CANDIDATE, DATAMOAT_CHUNKING, DATAMOAT_CHUNKING_CANDIDATE, RERANK_MODEL, EMBEDDING_PRICE_PER_HOUR, EMBEDDING_MAX_COST, DATAMOAT_FEEDBACK_MIN_EVENTS, DATAMOAT_FEEDBACK_MAX_AGE_HOURS.",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: known errors become one sentence and exit code 1."""
    import psycopg

    from assets.embeddings.registry import ReleaseError
    from assets.sources.contract import ContractError
    from embedder.protocol import EmbedderError
    from feedback.client import SendFailed
    from orchestration.services import ServiceError
    from storage.database import DatabaseError
    from storage.embedded import EmbeddedPostgresError

    if not sys.warnoptions:
        # Libraries warn their developers; a person at a terminal can do nothing about it.
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.update({name: value for name, value in OPT_OUTS.items() if name not in os.environ})
    try:
        app()
    except (
        SettingsError,
        ContractError,
        DatabaseError,
        EmbeddedPostgresError,
        ServiceError,
        EmbedderError,
        ReleaseError,
        SendFailed,
        psycopg.OperationalError,
        FileNotFoundError,
    ) as error:
        typer.echo(f"moat: {error}", err=True)
        sys.exit(1)


def _settings() -> Settings:
    return Settings.from_environment(os.environ)


@app.command()
def run(
    full: Annotated[bool, typer.Option(help="Do everything even if nothing has changed.")] = False,
) -> None:
    """Turn the whole loop once: land, gate, index, take in feedback, publish datasets, measure, report.

    Only what changed is done again. Exit code 1 when something failed or a gate stopped it, 130 after Ctrl-C.
    """
    try:
        _run(full)
    except KeyboardInterrupt:
        typer.echo("\nmoat: interrupted; run it again to go on where it stopped", err=True)
        raise typer.Exit(130) from None


def _run(full: bool) -> None:
    started = time.monotonic()
    settings = _settings()
    from orchestration.prepare import prepare
    from orchestration.screen import Screen

    screen = Screen(sys.stdout)
    screen.title(f"Datamoat · {settings.example}")
    prepared = prepare(settings, lambda text: screen.line("prepare", text))
    screen.line("postgres", prepared.warehouse.database.place)

    from assets.sources.contract import load_contracts
    from assets.sources.read import list_files
    from orchestration import report
    from orchestration.loading import Loaded, load_example
    from orchestration.run import Turn, inputs_digest, is_current, mark_current, one_at_a_time, turn
    from orchestration.services import feedback_service

    contracts, errors = load_contracts(settings.contract_folders, settings.contract_variables)
    for error in errors:
        screen.line("contract", str(error), style="bold red")

    def digest() -> str:
        return inputs_digest(
            settings, prepared.warehouse, [path for contract in contracts for path in list_files(contract)]
        )

    done, loaded = Turn(), Loaded()
    with one_at_a_time(settings, screen):
        current = not full and not errors and is_current(prepared.warehouse, digest())
        if current:
            screen.line("nothing changed", "no row landed, no chunk embedded, nothing written")
        else:
            with feedback_service(settings, prepared) as url:
                loaded = load_example(settings, url, prepared.api_key, screen)
            from orchestration.build import build_defs

            # Before the turn: what changes while it runs is for the next one.
            seen = digest()
            log = settings.folder / "logs" / "run.log"
            done = turn(build_defs(settings), prepared, screen, log, full)
            if not done.failed and not errors:
                mark_current(prepared.warehouse, seen)
    figures = report.collect(settings, prepared, done, loaded, time.monotonic() - started, current)
    report.save(settings, figures)
    report.show(screen, figures)
    if done.failed or errors:
        raise typer.Exit(1)


@app.command()
def prepare() -> None:
    """Make the deployment ready: database, migrations, Dagster's instance, dbt's manifest. Safe to repeat."""
    from orchestration.prepare import prepare as make_ready

    prepared = make_ready(_settings(), typer.echo)
    typer.echo(f"ready: {prepared.warehouse.database.place}")


@app.command()
def dev(
    port: Annotated[int, typer.Option(help="Port of Dagster UI; the next free one if taken.")] = 3000,
    feedback_port: Annotated[int, typer.Option(help="Port of the feedback service.")] = 8787,
) -> None:
    """Open Dagster UI, its daemon with sensors and schedules, and the feedback service, until Ctrl-C.

    Once for a deployment: a second one is refused.
    """
    from orchestration.services import only_one

    settings = _settings()
    with only_one(settings):
        _dev(settings, port, feedback_port)


def _dev(settings: Settings, port: int, feedback_port: int) -> None:
    from orchestration.prepare import prepare as make_ready
    from orchestration.run import end_left_over_runs
    from orchestration.services import (
        HOST,
        ServiceError,
        free_port,
        start_dagster,
        start_feedback,
        stop,
        wait_until_ready,
    )

    prepared = make_ready(settings, typer.echo)
    end_left_over_runs(settings)
    logs = settings.folder / "logs"
    port, feedback_port = free_port(port), free_port(feedback_port)
    # SIGTERM ends everything as Ctrl-C does; and a shell's background job would start with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    children: dict[str, Any] = {}
    try:
        children["feedback service"] = start_feedback(
            settings, prepared, feedback_port, search="orchestration.search:passages"
        )
        children["Dagster"] = start_dagster(settings, prepared, port)
        service = f"http://{HOST}:{feedback_port}"
        wait_until_ready(children["feedback service"], f"{service}/readyz", logs / "feedback.log")
        wait_until_ready(children["Dagster"], f"http://{HOST}:{port}/server_info", logs / "dagster.log")
        typer.echo(f"Dagster UI        http://{HOST}:{port}")
        typer.echo(f"sign in           {service}/login#{prepared.person_key}")
        typer.echo(f"ask               {service}/ask")
        typer.echo(f"review            {service}/review")
        typer.echo(f"feedback service  {service}/docs")
        typer.echo(f"API key           {settings.api_key_file}")
        typer.echo(f"database          {prepared.warehouse.database.place}")
        typer.echo(f"logs              {logs}")
        typer.echo("Ctrl-C stops everything.")
        while True:
            for name, child in children.items():
                if child.poll() is not None:
                    raise ServiceError(f"{name} ended with {child.returncode}; its log is in {logs}")
            time.sleep(0.5)
    except KeyboardInterrupt:
        typer.echo("\nstopping")
    finally:
        for child in reversed(children.values()):
            stop(child)
    typer.echo("stopped")


@app.command()
def status() -> None:
    """Say what is there: database, sources, index, datasets, the last run."""
    from orchestration.screen import Screen
    from orchestration.status import show_status

    show_status(_settings(), Screen(sys.stdout))


@app.command()
def search(
    question: Annotated[str, typer.Argument(help="What to look for, in plain words.")],
    k: Annotated[int, typer.Option("-k", help="How many passages.", min=1, max=100)] = 5,
    mode: Annotated[str, typer.Option(help="hybrid, vector or text.")] = "hybrid",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FIELD=VALUE",
            help="By source, document, path (a prefix), media_type, title or heading (contained). May be repeated:"
            " of one field any may match, and every field must.",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option(help="Say what each score is made of.")] = False,
    rerank: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A cross-encoder for the best 50; default: RERANK_MODEL."),
    ] = None,
) -> None:
    """Ask the index: the best passages for a question, with their sources."""
    from orchestration.screen import Screen
    from orchestration.search import FILTERS, show_search

    if not question.strip():
        raise typer.BadParameter("ask something", param_hint="QUESTION")
    if mode not in ("hybrid", "vector", "text"):
        raise typer.BadParameter("choose hybrid, vector or text", param_hint="--mode")
    wanted: dict[str, list[str]] = {}
    for one in filters or ():
        field, equals, value = one.partition("=")
        if field not in FILTERS or not equals:
            raise typer.BadParameter(
                f"{one}: give FIELD=VALUE with one of {', '.join(FILTERS)}", param_hint="--filter"
            )
        wanted.setdefault(field, []).append(value)
    if not show_search(_settings(), Screen(sys.stdout), question, k, mode, wanted, explain, rerank):
        raise typer.Exit(1)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SQL statement; it may read, not write.")],
) -> None:
    """Run one read-only query as the analyst role and print its rows."""
    from orchestration.query import show_query
    from orchestration.screen import Screen

    if not show_query(_settings(), Screen(sys.stdout), query):
        raise typer.Exit(1)


evaluate_app = typer.Typer(no_args_is_help=True, help="Measure what was built on golden sets.")
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command()
def retrieval(
    golden: Annotated[str | None, typer.Option(help="A golden set's source; default: all.")] = None,
    mode: Annotated[str | None, typer.Option(help="hybrid, vector or text; default: all three.")] = None,
    release: Annotated[str | None, typer.Option(help="Live or not; default: the live one.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another release, compared question by question (paired bootstrap).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """nDCG@10, recall@10 and @100 and RR@10 of a release on golden sets. The figures are kept in registry.evaluation."""
    from assets.evaluation.compare import MODES
    from orchestration.evaluate import evaluate_retrieval
    from orchestration.screen import Screen

    modes = [one for one in MODES if mode in (None, one)]
    if not modes:
        raise typer.BadParameter("choose hybrid, vector or text", param_hint="--mode")
    evaluate_retrieval(_settings(), Screen(sys.stdout), golden, modes, release, against, as_json)


release_app = typer.Typer(
    no_args_is_help=True,
    help="Embedding releases: a model's vectors of the corpus. One is live; another is built beside it and promoted.",
)
app.add_typer(release_app, name="release")

Name = Annotated[str, typer.Argument(metavar="RELEASE", help="Its name, as 'moat release list' says.")]
Why = Annotated[str, typer.Option("--why", help="The reason; it is kept, with your name.")]


@release_app.command("list")
def list_releases() -> None:
    """Every release: its state, what it lacks, whether it may be promoted; and the last promotions."""
    from orchestration.releases import show_releases
    from orchestration.screen import Screen

    show_releases(_settings(), Screen(sys.stdout))


@release_app.command()
def check(release: Name) -> None:
    """Check a release against the live one and keep the outcome; exit code 1 if it may not be promoted."""
    from orchestration.releases import check_release
    from orchestration.screen import Screen

    if not check_release(_settings(), Screen(sys.stdout), release):
        raise typer.Exit(1)


@release_app.command()
def promote(
    release: Name,
    why: Why,
    force: Annotated[bool, typer.Option(help="Although its checks object.")] = False,
) -> None:
    """Make a release the one that is searched, at once and without stopping anybody. It is embedded with from then on."""
    from orchestration.releases import promote_release
    from orchestration.screen import Screen

    promote_release(_settings(), Screen(sys.stdout), release, why, force)


@release_app.command()
def rollback(why: Why) -> None:
    """Go back to the release that was live before the live one was promoted."""
    from orchestration.releases import roll_back
    from orchestration.screen import Screen

    roll_back(_settings(), Screen(sys.stdout), why)


@release_app.command()
def drop(
    release: Annotated[str | None, typer.Argument(metavar="RELEASE", help="Its name.")] = None,
    retired_days: Annotated[
        float | None, typer.Option(min=0, help="All that have been retired for so many days.")
    ] = None,
) -> None:
    """Delete a release that is not live, or all that were retired long ago. A rollback to it is not possible any more."""
    from orchestration.releases import drop_releases
    from orchestration.screen import Screen

    if (release is None) == (retired_days is None):
        raise typer.BadParameter("name one release, or give --retired-days", param_hint="RELEASE")
    drop_releases(_settings(), Screen(sys.stdout), release, retired_days)


def _of_this_deployment() -> None:
    """The feedback service's own commands on this deployment: keys, imports, dead letters, the audit."""
    from orchestration.deployment import open_warehouse, require_prepared

    settings = _settings()
    require_prepared(settings)
    os.environ |= {
        "DATABASE_URL": open_warehouse(settings).database.url,
        "DATAMOAT_PSEUDONYM_KEY_FILE": str(settings.pseudonym_key_file),
    }
    os.environ.setdefault("DATAMOAT_API_KEY", settings.api_key_file.read_text().strip())


app.add_typer(feedback_app, name="feedback", callback=_of_this_deployment)


@app.command()
def stop() -> None:
    """Stop the embedded Postgres now, whoever uses it. It otherwise stops by itself with its last user."""
    from storage import embedded

    stopped = embedded.stop(_settings().home, force=True)
    typer.echo("stopped" if stopped else "it was not running")


if __name__ == "__main__":
    main()
