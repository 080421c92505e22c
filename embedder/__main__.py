"""The command line of the batch job, and what it reports to Dagster when Dagster Pipes launched it.

Belongs here: arguments, environment, signals, progress lines, exit codes, Pipes messages.
Does not belong here: any of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedder import job, protocol, shards
from embedder.encode import Embedder
from embedder.job import Interrupted, Progress, Summary
from embedder.model import open_model
from embedder.protocol import EmbedderError

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

EPILOG = """\
exit codes:
  0    done; launched by Dagster Pipes, also when some texts failed (they are reported)
  2    unusable arguments, input, model or output folder; nothing was embedded
  3    done, but some texts failed (see failures.parquet) or the result is not sound
  130  interrupted by SIGINT or SIGTERM; finished shards stay, the same command continues

Running the same command again embeds only what is missing. A run that was killed at any moment
continues with the same result, byte for byte, on the same machine.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job once; returns the exit code."""
    options = build_parser().parse_args(arguments)
    stop = threading.Event()
    _stop_on_signals(stop)
    try:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            return _run_under_pipes(options, stop)
        summary = _run(options, stop, print_progress(sys.stderr.isatty()), _say)
    except EmbedderError as error:
        _say(f"error: {error}")
        return protocol.EXIT_BAD_INPUT
    except Interrupted:
        _say("interrupted; run the same command again to continue")
        return protocol.EXIT_INTERRUPTED
    print(describe(summary))
    return protocol.EXIT_SOME_FAILED if summary.failed or not summary.sound else protocol.EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The arguments; the environment variable EMBEDDING_MODEL is the default of --model."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder",
        description="Embed the distinct texts of a Parquet file into a folder of Parquet shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="Parquet file with the string columns content_hash and text",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the shards <id>.parquet (content_hash, vector) and of failures.parquet",
    )
    environment_model = os.environ.get("EMBEDDING_MODEL")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(environment_model) if environment_model else None,
        metavar="DIR",
        help="model folder in Hugging Face layout, BERT family (default: $EMBEDDING_MODEL, else the installed "
        "all-MiniLM-L6-v2)",
    )
    parser.add_argument(
        "--too-long",
        choices=job.TOO_LONG,
        default="truncate",
        help="texts above the model's length: cut their end off and count them, or refuse them as failures "
        "(default: truncate)",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "f32"),
        help="arithmetic (default: bf16 where the CPU has it in hardware, else f32)",
    )
    parser.add_argument(
        "--streams", type=_positive, metavar="N", help="batches at a time (default: physical cores)"
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
        default=shards.SHARD_SIZE,
        metavar="N",
        help=f"texts per shard, which is what a killed run can lose (default: {shards.SHARD_SIZE})",
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the run as JSON")
    return parser


def describe(summary: Summary) -> str:
    """The summary for a person, in two or three lines."""
    lines = [
        f"{summary.distinct:,} distinct texts in {summary.chunks:,} rows: {summary.embedded:,} embedded, "
        f"{summary.skipped:,} already there, {summary.failed:,} failed, {summary.truncated:,} truncated"
    ]
    if summary.embedded:
        lines.append(
            f"{summary.chunks_per_s:,.0f} texts/s, {summary.tokens_per_s:,.0f} tokens/s, {summary.seconds:.1f} s in "
            f"all, padding {summary.padding_share:.1%}, {summary.engine} {summary.precision} on {summary.streams} "
            f"streams, release {summary.release}"
        )
    lines.extend(f"not sound: {problem}" for problem in summary.unsound)
    return "\n".join(lines)


def print_progress(terminal: bool) -> Callable[[Progress], None]:
    """Progress on stderr: one line rewritten each second on a terminal, else a plain line every 10 seconds."""
    if not terminal:
        return _at_most_every(10, lambda progress: _say(_progress_line(progress)))
    return _at_most_every(
        1, lambda progress: print(f"\r\x1b[K{_progress_line(progress)}", end="\r", file=sys.stderr)
    )


def _run(
    options: argparse.Namespace,
    stop: threading.Event,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
) -> Summary:
    embedder = Embedder(
        open_model(options.model), precision=options.precision, streams=options.streams, say=say
    )
    summary = job.run(
        options.input,
        options.output,
        embedder=embedder,
        too_long=options.too_long,
        shard_size=options.shard_size,
        progress=progress,
        stop=stop,
        say=say,
    )
    if options.summary is not None:
        _write_summary(options.summary, summary)
    return summary


def _run_under_pipes(options: argparse.Namespace, stop: threading.Event) -> int:
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as context:
        report = _at_most_every(10, lambda progress: context.log.info(_progress_line(progress)))
        summary = _run(options, stop, report, context.log.warning)
        context.log.info(describe(summary))
        _report(context, summary)
    return protocol.EXIT_OK


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
            "dimensions": fingerprint["dimensions"],
            "problems": "; ".join(unsound) or "none",
        },
    )


def _write_summary(path: Path, summary: Summary) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary.as_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EmbedderError(
            f"the vectors are written, but {path} is not ({error.strerror}); name another --summary file"
        ) from error


def _stop_on_signals(stop: threading.Event) -> None:
    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


def _at_most_every(seconds: float, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    last = time.monotonic()

    def throttled(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            report(progress)

    return throttled


def _progress_line(progress: Progress) -> str:
    share = progress.tokens / progress.total_tokens if progress.total_tokens else 0.0
    return (
        f"shard {progress.shard} of {progress.shards}, {progress.tokens:,} of about {progress.total_tokens:,} tokens "
        f"({share:.0%}), {progress.tokens_per_second:,.0f} tokens/s, {progress.seconds_left:.0f} s left"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
