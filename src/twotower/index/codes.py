"""Vectors as codes of one byte a number, and the candidates that a search of the codes leaves.

A number of a vector is m + s (c + e): the middle m and the step s of its dimension, a whole number c of -127 to 127,
and a rounding error |e| <= 1/2. A query times s is coded in 14 bits, as two rows of 7: processors without VNNI saturate
sums of two products of 8 bits. The products are whole numbers (onnxruntime's MatMulInteger). The norms of the rounding
errors of a query and of all items bound how far they are from the scores, so that no candidate is lost.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.arrays.types import F64, Doubles, Rows, Shaped, Vectors, WholeNumbers
from twotower.index.top_k import kth_largest
from twotower.index.vector_store import norms

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BLOCK = 1 << 15
"""Items of one product."""
QUERIES = 32
"""Queries of one product: their sums for a block take 8 MiB."""
LARGEST, DIGIT, ZERO = 127, 63, 64
"""Largest code of an item; largest digit of a query, to the base 127; the code of a digit of 0."""


class CodedQueries(NamedTuple):
    """Queries as two rows of digits each, all high ones first."""

    digits: Shaped[WholeNumbers, "B2 D"]
    slack: F64[Doubles, "B"]
    """Greatest difference of two sums of codes whose scores may be in the other order, in units of a low digit."""


class Codes:
    """The codes of vectors (N, D), which are no longer needed afterwards. N D bytes."""

    def __init__(self, vectors: Shaped[Vectors, "N D"]) -> None:
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        self._step = np.maximum((high - low) / np.float32(2 * LARGEST), np.finfo(np.float32).tiny)
        middle = low + (high - low) / 2
        self._max_norm, self._norm, self._error = norms(vectors).max(), 0.0, 0.0
        self._blocks: list[tuple[int, InferenceSession]] = []
        """First position of each block, and the product with its codes."""
        for start in range(0, len(vectors), BLOCK):
            steps = (vectors[start : start + BLOCK] - middle) / self._step
            codes = np.clip(np.rint(steps), -LARGEST, LARGEST)
            self._norm = max(self._norm, norms(codes).max())
            self._error = max(self._error, norms(steps - codes).max())
            self._blocks.append((start, _product(codes.astype(np.int8).T)))
        # `steps` are rounded to float32: 2^-23 of at most 127.5, for each number.
        self._error += len(self._step) ** 0.5 * 2.0**-15

    def candidates(
        self, queries: Shaped[Vectors, "B D"], k: int, banned: list[Shaped[Rows, "_"]], threads: int
    ) -> list[Shaped[Rows, "_"]]:
        """Return positions for each query that hold its `k` best by exact scores, without its ascending banned ones."""
        found: list[Shaped[Rows, "_"]] = []
        blocks = [self._blocks[n::threads] for n in range(min(threads, len(self._blocks)))]
        with ThreadPoolExecutor(len(blocks)) as pool:
            for start in range(0, len(queries), QUERIES):
                coded = self._coded(queries[start : start + QUERIES])
                ours = banned[start : start + QUERIES]
                each = pool.map if len(blocks) > 1 else map
                shares = each(partial(self._search, coded=coded, k=k, banned=ours), blocks)
                for parts, slack in zip(zip(*shares, strict=True), coded.slack, strict=True):
                    at, sums = (np.concatenate(side) for side in zip(*parts, strict=True))
                    found.append(at[sums >= kth_largest(sums, k) - slack])
        return found

    def _coded(self, queries: Shaped[Vectors, "B D"]) -> CodedQueries:
        """Return queries (B, D) as digits."""
        scaled = queries * self._step.astype(np.float64)
        unit = np.maximum(np.abs(scaled).max(axis=1, keepdims=True) / (DIGIT * LARGEST), np.finfo(np.float64).tiny)
        numbers = scaled / unit
        whole = np.rint(numbers)
        high = np.rint(whole / LARGEST)
        digits = np.concatenate([high, whole - high * LARGEST]) + ZERO
        length = norms(numbers)
        error = self._norm * norms(numbers - whole) + self._error * length
        # Sums and scores are rounded to float32.
        error += 2.0**-20 * self._norm * length + 2.0**-22 * self._max_norm * norms(queries) / unit[:, 0]
        return CodedQueries(digits.astype(np.uint8), 2 * error)

    def _search(
        self, blocks: list[tuple[int, InferenceSession]], coded: CodedQueries, k: int, banned: list[Shaped[Rows, "_"]]
    ) -> list[tuple[Shaped[Rows, "_"], Shaped[Vectors, "_"]]]:
        """Return positions in some blocks that may be among the `k` best of each query, and their sums."""
        n = len(coded.slack)
        at = [np.empty(0, np.int64)] * n
        kept, least = [np.empty(0, np.float32)] * n, np.full(n, -np.inf)
        for start, product in blocks:
            high, low = np.split(product.run(None, {"digits": coded.digits})[0], 2)
            sums = high.astype(np.float32)
            sums *= LARGEST
            sums += low
            for query in range(n):
                ours = sums[query]
                first, last = np.searchsorted(banned[query], (start, start + len(ours)))
                ours[banned[query][first:last] - start] = -np.inf
                if least[query] == -np.inf:
                    least[query] = kth_largest(ours, k) - coded.slack[query]
                good = np.flatnonzero(ours >= max(least[query], np.finfo(np.float32).min))
                found = np.concatenate([kept[query], ours[good]])
                least[query] = max(least[query], kth_largest(found, k) - coded.slack[query])
                better = found >= least[query]
                kept[query], at[query] = found[better], np.concatenate([at[query], good + start])[better]
        return list(zip(at, kept, strict=True))


def _product(codes: Shaped[WholeNumbers, "D n"]) -> InferenceSession:
    """Return the product of digits (B, D) with codes, which onnxruntime keeps once, in the order that it reads.

    The codes are in a file while the session is made: those in the graph would stay in memory beside its own.
    """
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession, SessionOptions

    weight = TensorProto(name="codes", data_type=TensorProto.INT8, dims=codes.shape, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="codes")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["digits", "codes", "zero"], ["sums"])],
        "codes",
        [helper.make_tensor_value_info("digits", TensorProto.UINT8, [None, len(codes)])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [None, codes.shape[1]])],
        [weight, helper.make_tensor("zero", TensorProto.UINT8, [], [ZERO])],
    )
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (Path(folder) / "codes").write_bytes(codes.tobytes())
        (Path(folder) / "product.onnx").write_bytes(model.SerializeToString())
        return InferenceSession(Path(folder) / "product.onnx", options, providers=["CPUExecutionProvider"])
