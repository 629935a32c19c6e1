"""Attention over padded histories as ONNX nodes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from twotower.model.attention import AttentionPool, HistoryEncoder, TransformerBlock, rotary_cos_sin
from twotower.model.lowering import lower, lower_linear
from twotower.onnx.builder import GraphBuilder


def _keep_latest(g: GraphBuilder, codes: str, n: str, limit: int) -> tuple[str, str]:
    """Build `attention.keep_latest`; n (U, 1) is float."""
    width = g("Squeeze", g("Shape", codes, start=1, end=2), g.constant([0]))
    offsets = g("Range", g.constant(0), g("Min", width, g.constant(limit)), g.constant(1))  # (min(T, limit),)
    first = g("Cast", g("Max", g("Sub", n, g.constant(float(limit))), g.constant(0.0)), to=g.onnx.TensorProto.INT64)
    return g("GatherElements", codes, g("Add", first, offsets), axis=1), g("Min", n, g.constant(float(limit)))


class _Queries(NamedTuple):
    """Queries of attention in each history: all items (Q = T) or the last one (Q = 1)."""

    rows: str  # rows of the queries in (U T, E); "" for all
    shape: str  # [U, Q]
    angles: list[str]  # cosines and sines of their positions, to be multiplied with (U, heads, Q, width)
    mask: str  # added to the scores (U, heads, Q, T): causal; "" if these queries are never used


def history_nodes(g: GraphBuilder, encoder: HistoryEncoder, table: str, codes: str) -> str:
    """Build `HistoryEncoder.forward` over padded codes (U, T): (U, width).

    Only the output at the last item is used, so the last block has one query per row.
    """
    n = g.reduce("Sum", g("Cast", g("GreaterOrEqual", codes, g.constant(0)), to=g.onnx.TensorProto.FLOAT), 1)
    codes, n = _keep_latest(g, codes, n, encoder.limit)
    rows = g("Gather", table, codes, axis=0)  # -1 takes a row that the mask hides
    x = lower(encoder.input_norm, g, g("Flatten", rows, axis=2))  # (U T, E)
    every, last = _queries(g, encoder, codes, n)
    *before, last_block = encoder.blocks
    for block in before:
        assert isinstance(block, TransformerBlock)
        x = _block(g, block, x, every, every)
    if isinstance(last_block, TransformerBlock):
        x = _block(g, last_block, x, last, every)
    else:
        assert isinstance(last_block, AttentionPool)
        x = _attention_pool(g, last_block, x, last, every)
    return g("Mul", lower(encoder.norm, g, x), g("Min", n, g.constant(1.0)))


def _queries(g: GraphBuilder, encoder: HistoryEncoder, codes: str, n: str) -> tuple[_Queries, _Queries]:
    """Return the queries of all items of the codes (U, T), and of the last of the n (U, 1) items of each row."""
    users, width = g("Shape", codes, end=1), g("Shape", codes, start=1)
    positions = g("Range", g.constant(0), g("Squeeze", width), g.constant(1))  # (T,)
    end = g("Max", g("Sub", n, g.constant(1.0)), g.constant(0.0))
    position = g("Cast", end, to=g.onnx.TensorProto.INT64)  # (U, 1)
    starts = g("Mul", g("Range", g.constant(0), g("Squeeze", users), g.constant(1)), width)  # (U,)
    index = g("Add", starts, g("Squeeze", position, g.constant([1])))

    cos, sin = rotary_cos_sin(encoder.limit, encoder.head_width)
    tables = [g.constant(torch.cat([cos, cos], 1)), g.constant(torch.cat([-sin, sin], 1))]
    scaled = g("Mul", g("Cast", positions, to=g.onnx.TensorProto.FLOAT), g.constant(1e9))

    def causal_mask(query_position: str) -> str:
        # Padding follows the codes of a row, so a causal mask hides it too.
        return g("Min", g("Sub", query_position, scaled), g.constant(0.0))

    every = _Queries(
        rows="",
        shape=g("Shape", codes),
        angles=[g("Slice", table, g.constant([0]), width) for table in tables],
        mask=causal_mask(g("Unsqueeze", scaled, g.constant([1]))) if len(encoder.blocks) > 1 else "",
    )
    last = _Queries(
        rows=index,
        shape=g("Concat", users, g.constant([1]), axis=0),
        angles=[g("Gather", table, g.reshape(position, 1, 1), axis=0) for table in tables],
        mask=causal_mask(g("Mul", g.reshape(end, 1, 1, 1), g.constant(1e9))),
    )
    return every, last


def _heads(g: GraphBuilder, x: str, shape: str, heads: int, width: int) -> str:
    """Map (U T, heads x width) to (U, heads, T, width); `shape` is [U, T]."""
    x = g("Reshape", x, g("Concat", shape, g.constant([heads, width]), axis=0))
    return g("Transpose", x, perm=[0, 2, 1, 3])


def _rotated(g: GraphBuilder, x: str, angles: list[str]) -> str:
    """Build `attention.apply_rotary`: (a, b) cos + (-b, a) sin; `angles` include the sign."""
    left, right = g.halves(x)
    cos, sin = angles
    return g("Add", g("Mul", x, cos), g("Mul", g("Concat", right, left, axis=-1), sin))


def _attended(g: GraphBuilder, query: str, key: str, value: str, mask: str, width: int) -> str:
    """Build softmax(Q K^T / sqrt(width) + mask) V of queries (U, heads, Q, width) over T keys: (U Q, heads x width)."""
    scores = g("Mul", g("MatMul", query, g("Transpose", key, perm=[0, 1, 3, 2])), g.constant(width**-0.5))
    attended = g("MatMul", g("Softmax", g("Add", scores, mask), axis=-1), value)
    return g("Flatten", g("Transpose", attended, perm=[0, 2, 1, 3]), axis=2)


def _block(g: GraphBuilder, block: TransformerBlock, x: str, queries: _Queries, every: _Queries) -> str:
    """Build `TransformerBlock.forward` over (U T, E) at the queries: (U Q, E)."""
    heads, width = block.heads, block.out.in_features // block.heads
    normed = lower(block.attend_norm, g, x)
    query_rows = normed
    if queries.rows:
        x, query_rows = (g("Gather", items, queries.rows, axis=0) for items in (x, normed))
    weights, biases = block.query_key_value.weight.chunk(3), block.query_key_value.bias.chunk(3)
    query = _heads(g, lower_linear(g, query_rows, weights[0], biases[0]), queries.shape, heads, width)
    key = _heads(g, lower_linear(g, normed, weights[1], biases[1]), every.shape, heads, width)
    value = _heads(g, lower_linear(g, normed, weights[2], biases[2]), every.shape, heads, width)
    query, key = _rotated(g, query, queries.angles), _rotated(g, key, every.angles)
    change = lower(block.out, g, _attended(g, query, key, value, queries.mask, width))
    if block.attend_gate is not None:
        change = g("Mul", change, g("Sigmoid", lower(block.attend_gate, g, x)))
    x = g("Add", x, change)
    inner = lower(block.first, g, lower(block.layer_norm, g, x))
    change = lower(block.second, g, g("Mul", inner, g("Sigmoid", inner)))
    if block.layer_gate is not None:
        change = g("Mul", change, g("Sigmoid", lower(block.layer_gate, g, x)))
    return g("Add", x, change)


def _attention_pool(g: GraphBuilder, pool: AttentionPool, x: str, queries: _Queries, every: _Queries) -> str:
    """Build `AttentionPool.forward` over (U T, E) at the queries: (U Q, E)."""
    heads, width = pool.heads, pool.out.in_features // pool.heads
    normed = lower(pool.norm, g, x)
    weights, biases = pool.key_value.weight.chunk(2), pool.key_value.bias.chunk(2)
    key = _heads(g, lower_linear(g, normed, weights[0], biases[0]), every.shape, heads, width)
    value = _heads(g, lower_linear(g, normed, weights[1], biases[1]), every.shape, heads, width)
    query = _rotated(g, g.constant(pool.query[None]), queries.angles)  # (U, heads, Q, width)
    return lower(pool.out, g, _attended(g, query, _rotated(g, key, every.angles), value, queries.mask, width))
