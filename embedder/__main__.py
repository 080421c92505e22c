"""The command line of the batch job, and what it reports to Dagster when Dagster Pipes launched it.

Belongs here: arguments, environment, signals, exit codes, Pipes messages.
Does not belong here: any of the work, wording (see report).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedder import engines, job, protocol, ray_job, shards, stage
from embedder.budget import Estimate, Limits
from embedder.job import Progress, Stopped, Summary
from embedder.protocol import EmbedderError
from embedder.report import (
    Every,
    JsonLines,
    Lines,
    Report,
    estimate_in_words,
    progress_in_words,
    summary_in_words,
)
from embedder.stage import Settings

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

EXIT_CODES = {
    job.INTERRUPTED: protocol.EXIT_INTERRUPTED,
    job.OVER_BUDGET: protocol.EXIT_OVER_BUDGET,
}
"""What stopped a run -> the code it ends with."""

EPILOG = """\
exit codes:
  0    done, every text has a vector; launched by Dagster Pipes, also when some texts failed (they are reported)
  2    unusable arguments, input, model or output folder
  3    done, but some texts have no vector (failed now, or parked: see failures.parquet), or the result is not sound
  4    stopped by --max-cost or --max-tokens
  130  interrupted by SIGINT or SIGTERM

Whatever the code, finished shards stay, and running the same command again embeds only what is missing. A run that
was killed at any moment continues with the same result, byte for byte, on the same machine.

A text that failed is parked: tried again after 1 hour, then 4, 16 and so on, up to 30 days; --retry-failed tries all.
A text that ends the whole process (a crash, the kernel when memory is short) ends one run; the next one makes what was
in the making with the model in a process of its own, so that the text is found and fails alone.

A ceiling holds for the work, not for one attempt at it: what earlier attempts spent counts. The run stops before a
shard that would not be finished below the ceiling, so nothing is paid for and thrown away; a higher one continues.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job once; returns the exit code."""
    options = build_parser().parse_args(arguments)
    stop = threading.Event()
    _stop_on_signals(stop)
    report: Report = JsonLines() if options.log_format == "json" else Lines(sys.stderr.isatty())
    try:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            return _run_under_pipes(options, stop)
        summary = _run(options, stop, report)
    except EmbedderError as error:
        report.failed(f"error: {error}")
        return protocol.EXIT_BAD_INPUT
    except Stopped as stopped:
        report.failed(str(stopped))
        return EXIT_CODES[stopped.status]
    return protocol.EXIT_SOME_FAILED if _incomplete(summary) else protocol.EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The arguments; the environment variable EMBEDDING_MODEL is the default of --model."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder",
        description="Embed the distinct texts of a Parquet file into a folder of Parquet shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="Parquet file with the string columns content_hash and text, and optionally chunk_id",
    )
    files.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the shards <id>.parquet (chunk_id if given, content_hash, vector) and of failures.parquet",
    )
    environment_model = os.environ.get("EMBEDDING_MODEL")
    files.add_argument(
        "--model",
        type=Path,
        default=Path(environment_model) if environment_model else None,
        metavar="DIR",
        help="model folder in Hugging Face layout (default: $EMBEDDING_MODEL, else the installed all-MiniLM-L6-v2)",
    )
    work = parser.add_argument_group("texts")
    work.add_argument(
        "--too-long",
        choices=stage.TOO_LONG,
        default="truncate",
        help="texts above the model's length: cut their end off and count them, or refuse them as failures "
        "(default: truncate)",
    )
    work.add_argument(
        "--retry-failed", action="store_true", help="try texts that failed before they are due again"
    )
    work.add_argument(
        "--shard-size",
        type=_whole(1),
        metavar="N",
        help="texts per shard, which is what a killed run can lose "
        f"(default: {shards.SHARD_SIZES['cpu']}, on CUDA {shards.SHARD_SIZES['cuda']})",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--engine",
        choices=("auto", *engines.SUPPORTED),
        default="auto",
        help="what computes the vectors (default: auto, the fastest that knows the model)",
    )
    machine.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    machine.add_argument(
        "--precision",
        choices=(engines.BF16, engines.F32),
        help="arithmetic (default: bf16 where the hardware has it, else f32)",
    )
    machine.add_argument(
        "--streams",
        type=_whole(1),
        metavar="N",
        help="batches at a time (default: one for each physical core)",
    )
    machine.add_argument(
        "--tokeniser-processes",
        type=_whole(0),
        metavar="N",
        help="processes that tokenise, 0 for this one (default: 0, on CUDA every core but two)",
    )
    cluster = parser.add_argument_group(
        "cluster", "input, output and model must have the same paths on all machines"
    )
    cluster.add_argument(
        "--runner", choices=("local", "ray"), default="local", help="this machine, or Ray's (default: local)"
    )
    cluster.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the cluster (default: $RAY_ADDRESS, else Ray is started on this machine)",
    )
    cluster.add_argument(
        "--workers",
        type=_whole(1),
        metavar="N",
        help="on Ray (default: one a GPU; without GPUs one a machine)",
    )
    budget = parser.add_argument_group("budget", "in whatever currency the price has")
    budget.add_argument(
        "--price-per-hour",
        type=_positive,
        metavar="P",
        help="of all machines together, for estimate and cost",
    )
    budget.add_argument(
        "--rate",
        type=_positive,
        metavar="R",
        help="tokens/s to estimate with (default: what this machine measured last for this output folder)",
    )
    budget.add_argument("--max-cost", type=_positive, metavar="C", help="stop before it costs more")
    budget.add_argument("--max-tokens", type=_whole(1), metavar="N", help="stop before more are embedded")
    budget.add_argument("--estimate", action="store_true", help="say what it would take and embed nothing")
    reports = parser.add_argument_group("reports")
    reports.add_argument(
        "--summary", metavar="FILE", help="write the figures of the run as JSON; - is standard output"
    )
    reports.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="progress and notices on standard error, as lines of text or of JSON (default: text); with --runner ray, "
        "Ray's own core may add lines of its own",
    )
    return parser


def _run(options: argparse.Namespace, stop: threading.Event, report: Report) -> Summary:
    settings = Settings(
        options.model,
        engine=options.engine,
        device=options.device,
        precision=options.precision,
        streams=options.streams,
        tokeniser_processes=options.tokeniser_processes,
        too_long=options.too_long,
    )
    limits = Limits(options.price_per_hour, options.rate, options.max_cost, options.max_tokens)
    try:
        summary = job.run(
            options.input,
            options.output,
            settings,
            limits=limits,
            shard_size=options.shard_size,
            retry_failed=options.retry_failed,
            only_estimate=options.estimate,
            watcher=report,
            stop=stop,
            make_runner=ray_job.runner(settings, options.ray_address, options.workers)
            if options.runner == "ray"
            else None,
        )
    except Stopped as stopped:
        if stopped.summary is not None:
            _tell(options.summary, stopped.summary, report)
        raise
    _tell(options.summary, summary, report)
    return summary


def _run_under_pipes(options: argparse.Namespace, stop: threading.Event) -> int:
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as context:
        # A run that is stopped leaves this block by its exception, and the asset fails with its words.
        summary = _run(options, stop, _PipesReport(context))
        if summary.status == job.DONE:
            _report(context, summary)
    return protocol.EXIT_OK


class _PipesReport(Report):
    """What is told to Dagster's log of the run."""

    def __init__(self, context: PipesContext) -> None:
        self._log = context.log
        self._due = Every(10)

    def say(self, line: str) -> None:
        self._log.warning(line)

    def estimated(self, estimate: Estimate) -> None:
        self._log.info(estimate_in_words(estimate))

    def progressed(self, progress: Progress) -> None:
        if self._due():
            self._log.info(progress_in_words(progress))

    def ended(self, summary: Summary) -> None:
        self._log.info(summary_in_words(summary))


def _report(context: PipesContext, summary: Summary) -> None:
    figures = summary.as_dict()
    fingerprint = figures.pop("fingerprint")
    unsound = figures.pop("unsound")
    figures.pop("sound")
    # Dagster has no metadata for an absent value.
    known = {name: value for name, value in figures.items() if value is not None}
    context.report_asset_materialization(
        metadata={**known, "fingerprint": {"raw_value": fingerprint, "type": "json"}},
        data_version=None,
    )
    context.report_asset_check(
        protocol.CHECK_VECTORS_ARE_SOUND,
        passed=summary.sound,
        metadata={
            "distinct": summary.distinct,
            "with_vector": summary.skipped + summary.embedded,
            "failed": summary.failed,
            "parked": summary.parked,
            "dimensions": fingerprint["dimensions"],
            "problems": "; ".join(unsound) or "none",
        },
    )


def _tell(file: str | None, summary: Summary, report: Report) -> None:
    """The figures: as JSON where that is asked for, and in words unless the log is for machines."""
    report.ended(summary)
    as_json = json.dumps(summary.as_dict(), indent=2)
    if isinstance(report, Lines):
        print(summary_in_words(summary), file=sys.stderr if file == "-" else sys.stdout, flush=True)
    if file == "-":
        print(as_json, flush=True)
    elif file is not None:
        _write_summary(Path(file), as_json)


def _write_summary(path: Path, as_json: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json + "\n", encoding="utf-8")
    except OSError as error:
        raise EmbedderError(
            f"the vectors are written, but {path} is not ({error.strerror}); name another --summary file"
        ) from error


def _incomplete(summary: Summary) -> bool:
    return summary.status == job.DONE and bool(summary.failed or summary.parked or not summary.sound)


def _stop_on_signals(stop: threading.Event) -> None:
    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    return parse


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
