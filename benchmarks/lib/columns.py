from collections.abc import Sequence

from twotower.config.experiment import Config
from twotower.features.schema import Schema
from twotower.features.side import SIDES


def with_pairs(config: Config, kept: Sequence[int]) -> Config:
    """Return a config with some of its pairs, by their numbers, rising, and the closed forms of these."""
    given = config.model_dump(mode="json")
    given["model"]["pairs"] = [given["model"]["pairs"][place] for place in kept]
    given["train"]["solved"] = [form.model_dump(mode="json") for place, form in config.solved.items() if place in kept]
    return Config.model_validate(given)


def without_columns(
    schema: Schema, config: Config, of_users: Sequence[str], of_items: Sequence[str]
) -> tuple[Schema, Config]:
    """Return schema and config without the features of columns that users and items lack, and of negatives that the
    schema has none of, the pairs that read nothing else on a side, and their closed forms."""
    known = {"user": of_users, "item": of_items}
    lacking = {f.name for f in schema.features if not f.history and f.source not in known.get(str(f.side), [f.source])}
    if not schema.has_negatives:
        lacking |= {f.name for f in schema.features if f.history and f.history.interactions == "negative"}
    kept = [
        place
        for place, pair in enumerate(config.model.pairs)
        if not any(t.fields and lacking >= {*t.fields} for t in (pair.user, pair.item))
    ]
    given = with_pairs(config, kept).model_dump(mode="json")
    for pair in given["model"]["pairs"]:
        for side in SIDES:
            pair[side]["fields"] = [name for name in pair[side]["fields"] if name not in lacking]
    features = tuple(f for f in schema.features if f.name not in lacking)
    return schema.model_copy(update={"features": features}), Config.model_validate(given)
