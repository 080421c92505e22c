"""The dataset card: a version's README, for people and for loaders.

What belongs here: the text made from a manifest. What does not: any figure the manifest lacks. Its head names
the files of each split, so a loader given the folder finds them.
"""

from typing import Any

_PURPOSE = {
    "sft": "Supervised fine-tuning: prompts with the answer people corrected to, or voted for.",
    "preference": "Preference tuning: for one prompt, an answer people preferred over another.",
    "kto": "Binary preference tuning (KTO): answers with the verdict of those who voted.",
}


def card(manifest: dict[str, Any], version: str) -> str:
    """Markdown with a YAML head; the same manifest gives the same text."""
    signals = manifest["signals"]
    lines = [
        *_head(manifest),
        f"# {manifest['dataset']}",
        "",
        _PURPOSE[manifest["kind"]],
        "",
        f"Version `{version}` is the SHA-256 of `manifest.json`. Files never change under this name; "
        "texts are redacted before they come here.",
        "",
        "## Rows",
        "",
        *_table(
            ["split", "rows", "by origin", *(["labels"] if "labels" in manifest else [])],
            [
                [
                    split,
                    part["rows"],
                    _pairs(manifest["origins"][split]),
                    *([_pairs(manifest["labels"][split])] if "labels" in manifest else []),
                ]
                for split, part in manifest["splits"].items()
            ],
        ),
        "",
        f"Splits are drawn by group, not by row: {manifest['groups']['count']} groups joined by shared sessions "
        f"and shared prompts, of which the largest holds {manifest['groups']['largest_share']:.1%} of the rows.",
        "",
        "## Columns",
        "",
        *_table(["column", "type"], [[field["name"], f"`{field['type']}`"] for field in manifest["schema"]]),
        "",
        "## Characters",
        "",
        *_table(
            ["column", "min", "median", "p95", "max"],
            [
                [column, figures["min"], figures["p50"], figures["p95"], figures["max"]]
                for column, figures in manifest["characters"].items()
            ],
        ),
        "",
        "## Where the signals went",
        "",
        f"{signals['read']} signals read, {signals['used']} used, {sum(signals['dropped'].values())} dropped.",
        "",
        *_table(["reason", "signals"], [[reason, count] for reason, count in signals["dropped"].items()]),
        "",
        "## Sources behind the answers",
        "",
        *_table(
            ["source", "rows"], [[source, count] for source, count in sorted(manifest["sources"].items())]
        ),
        "",
        *_weights(manifest),
        "## Lineage",
        "",
        "`lineage.parquet` has one line per row: `row_id` (SHA-256 of the row as canonical JSON), split, "
        "signals, feedback events, interactions and sources. Keep it out of the trainer's input.",
        "",
        "## Recipe",
        "",
        f"Rules version {manifest['recipe']['code']}; " + _pairs(manifest["recipe"]["parameters"]) + ".",
    ]
    return "\n".join(lines) + "\n"


def _head(manifest: dict[str, Any]) -> list[str]:
    lines = ["---", f"pretty_name: {manifest['dataset']}", f"tags: [datamoat, {manifest['kind']}]"]
    configs: list[str] = []
    parts = {"default": manifest["splits"], "lineage": {"lineage": manifest["lineage"]}}
    for config, splits in parts.items():
        # The `datasets` library refuses a split without rows, and with it the whole folder.
        filled = {split: part for split, part in splits.items() if part["rows"]}
        if filled:
            configs += [f"- config_name: {config}", "  data_files:"]
        for split, part in filled.items():
            pattern = f"{split}.parquet" if len(part["shards"]) == 1 else f"{split}-*.parquet"
            configs += [f"  - split: {split}", f"    path: {pattern}"]
    return [*lines, *(["configs:", *configs] if configs else []), "---", ""]


def _weights(manifest: dict[str, Any]) -> list[str]:
    if manifest["kind"] != "kto":
        return []
    weights = manifest["kto_weights"]
    text = (
        "None: the train split lacks positive or negative rows, and no weight balances that."
        if weights is None
        else f"`desirable_weight={weights['desirable_weight']}`, "
        f"`undesirable_weight={weights['undesirable_weight']}`: weighted positives to negatives then lie "
        "between 1:1 and 4:3."
    )
    return ["## Weights for the trainer", "", text, ""]


def _pairs(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(figures.items())) or "none"


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return ["None."]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
