"""Options in which experiments differ."""

from __future__ import annotations

from worlds import CHECKERBOARD_SCHEMA, settings

from twotower.config.differences import differing_options
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema


def test_options_are_listed_where_their_values_differ_and_no_others() -> None:
    a = settings()
    b = settings(
        train={"lr": 0.5},
        model={"width": 8, "pairs": [{"user": {"layers": [8, 4]}, "item": {"layers": [8]}}] * 2},
        loss={"kind": "softmax"},
        negatives={"uniform": 7},
    )
    found = differing_options([(CHECKERBOARD_SCHEMA, a), (CHECKERBOARD_SCHEMA, b), (CHECKERBOARD_SCHEMA, a)])
    assert found["train.lr"] == ["0.02", "0.5", "0.02"]
    assert found["model.pairs.0.user.layers"] == ["[8]", "[8, 4]", "[8]"]
    assert found["model.pairs.1.user.layers"] == ["", "[8, 4]", ""]
    assert found["loss.kind"] == ['"bce"', '"softmax"', '"bce"']
    assert found["negatives.uniform.n"] == ["", "7", ""]
    assert "train.epochs" not in found
    assert not [key for key in found if key.startswith(("schema", "model.pairs.0.item"))]
    assert differing_options([(CHECKERBOARD_SCHEMA, a)] * 2) == {}


def test_features_are_matched_by_side_and_name_not_by_place() -> None:
    age, city = Numeric(name="age", side="user"), Categorical(name="city", side="user")
    item, rare = Categorical(name="item_id", side="item"), city.model_copy(update={"min_count": 9})
    schemas = Schema(features=(age, city, item)), Schema(features=(rare, age, item))
    found = differing_options([(schema, settings()) for schema in schemas])
    assert found == {"schema.features.user.city.min_count": [str(city.min_count), "9"]}
