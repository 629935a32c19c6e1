"""A data set of one's own: a shop whose customers keep to a few brands."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field

from twotower.data.datasets.named_dataset import NamedDataset
from twotower.data.tables import Tables
from twotower.features.categorical import Categorical
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence


class Shop(NamedDataset):
    """Made purchases: each customer has a favourite brand, from which four of five purchases are.

    Use it to try a new kind where the right answer is known: the best items are those of the favourite brand.

    [data]
    dataset = { kind = "mykinds.datasets:Shop", customers = 200 }"""

    customers: int = Field(100, ge=10, description="Number of customers.")
    products: int = Field(60, ge=10, description="Number of products.")
    purchases: int = Field(20, ge=3, description="Number of purchases of a customer.")
    brands: int = Field(5, ge=2, description="Number of brands.")

    table_schema = Schema(
        user_id="customer",
        item_id="product",
        time="at",
        time_unit="order",
        features=(
            Categorical(name="customer", side="user"),
            Sequence(name="bought", side="user", interactions="positive", max_length=10),
            Categorical(name="product", side="item"),
            Categorical(name="brand", side="item"),
            Numeric(name="price", side="item"),
        ),
    )

    def load(self) -> Tables:
        rng = np.random.default_rng(0)
        brand = np.arange(self.products) % self.brands
        favourite = rng.integers(0, self.brands, self.customers)
        chosen = rng.permuted(np.tile(np.arange(self.products), (self.customers, 1)), axis=1)
        liked = (brand[chosen] == favourite[:, None]) | (rng.random(chosen.shape) < 0.05)
        bought = np.take_along_axis(chosen, np.argsort(~liked, axis=1, kind="stable"), 1)[:, : self.purchases]
        customers, size, price = np.arange(self.customers), bought.shape[1], rng.gamma(2, 10, self.products)
        return Tables(
            pl.DataFrame({"customer": customers}),
            pl.DataFrame({"product": np.arange(self.products), "brand": brand, "price": price}),
            pl.DataFrame(
                {"customer": np.repeat(customers, size), "product": bought.ravel(), "at": np.arange(bought.size)}
            ),
        )
