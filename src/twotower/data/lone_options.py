"""Options of the schema and of the split that lack another: refused where the data would be other than they say, and
reported where nothing changes."""

from __future__ import annotations

import logging

from twotower.data.split import SplitConfig
from twotower.errors import ConfigError
from twotower.features.schema import Schema

log = logging.getLogger(__name__)


def check_lone_options(schema: Schema, split: SplitConfig | None = None) -> None:
    """Raise ConfigError for an option of the schema without which the data are as they are, though it says otherwise;
    log a warning for options that change nothing.

    It is called before a new training or preparation. What was made before is read without it."""
    if schema.positive_above != type(schema).model_fields["positive_above"].default and not schema.label:
        what = f"schema.positive_above = {schema.positive_above:g}"
        if not schema.event:
            raise ConfigError(
                f"{what} is of a label, and schema.label is empty, so every row is a positive; name the column of the "
                "label, or leave positive_above out"
            )
        log.warning(f"{what} changes nothing, as schema.events tells which rows are positives; leave it out")
    for statistic in schema.statistics():
        if statistic.column == "" and not schema.has_negatives:
            raise ConfigError(
                f"feature '{statistic.name}' averages the labels of the interactions, and all are positives, so it is "
                "the same number for all; name a column in statistic_column, or a label in schema.label, or drop it"
            )
    for f in schema.features:
        if names := f.without_effect:
            log.warning(
                f"feature '{f.name}': {' and '.join(names)} {'change' if len(names) > 1 else 'changes'} nothing, as "
                f"hash_buckets takes the place of the vocabulary that {'they cut' if len(names) > 1 else 'it cuts'}; "
                f"leave {'them' if len(names) > 1 else 'it'} out, or set hash_buckets = 0"
            )
    if split and (names := split.without_effect):
        rule = {
            "last": "tests the last row of each user and validates on the one before",
            "column": f"reads the parts of the column '{split.column}'",
            "files": "reads the parts of the files",
        }[split.kind]
        log.warning(
            f"{' and '.join(f'split.{name} = {getattr(split, name):g}' for name in names)} "
            f"{'change' if len(names) > 1 else 'changes'} nothing, as split.kind = "
            f"'{split.kind}' {rule}; leave {'them' if len(names) > 1 else 'it'} out, or set another kind"
        )
