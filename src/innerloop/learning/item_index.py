"""The best items of a large catalogue without looking at all of them: an index of the vectors, and when it is used.

Maximum inner product over an inverted file (Sivic and Zisserman 2003; faiss IndexIVF): k-means splits the vectors into
3 sqrt(N) lists, and a task looks at the lists whose centres it likes best. What everybody likes, popular items above
all, is near many tasks' best wherever it lies, so the 3 sqrt(N) favourites of the tasks' mean are scored for every
task: that alone cuts the lists to look at to a quarter or less. Vectors are kept as float16 for the search; what it
finds is scored again with the real ones, so every score is exact and only an item may be missed.

How many lists have to be looked at depends on the data, so it is measured: the fewest with which the tasks of the
service itself find `RECALL` of what an exact search finds. An index that needs more than a quarter of its lists isn't
used.

A graph (HNSW) took two to three times as long at the same recall, product quantisation lost too much of it, and 8 bits
instead of 16 saved 64 bytes an item but took longer. tests/benchmarks/README.md has the figures.
"""

import threading
import time
from typing import Any, Self

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.heads import Head
from innerloop.learning.ranking import best_by, top_k

_LOG = structlog.get_logger(__name__)

RECALL = 0.97
"""Share of the exact best that the tasks measured have to find; tasks that come later may find a little less."""
_FOUND = 50  # the length of the lists by which recall is measured
_TASKS = 256  # different ones, by which recall is measured
_LISTS = 3.0  # times sqrt(N)
_LARGEST_SHARE = 4  # at most one list in so many is looked at
_FEWEST_PROBES = 4
_POINTS, _ROUNDS = 32, 10  # of k-means: points a list, and how often they move
_CHUNK = 65_536  # items added before somebody is asked whether it is still wanted


class Abandoned(Exception):  # noqa: N818 - nothing is wrong
    """The index is no longer wanted."""


class ItemIndex:
    """The first items of a catalogue by their places, searched with linear parameters.

    The same vectors and seed give the same index.
    """

    def __init__(self, vectors: Tensor, *, seed: int = 0, wanted: threading.Event | None = None) -> None:
        """Index `vectors` [N, d] float32 on the CPU, N > 0. Raises Abandoned once `wanted` is cleared."""
        self._faiss: Any = _faiss()
        count, dimension = vectors.shape
        self.lists = max(1, min(count, round(_LISTS * count**0.5)))
        self.probes = self.lists
        self._favourites = torch.empty(0, dtype=torch.int64)  # [F]
        self._favourite_vectors = vectors[:0]  # [F, d]
        self._is_favourite = np.zeros(count + 1, bool)  # the last one for whatever isn't among the first `count`
        quantizer = self._faiss.IndexFlatIP(dimension)
        half, inner = self._faiss.ScalarQuantizer.QT_fp16, self._faiss.METRIC_INNER_PRODUCT
        self._index = self._faiss.IndexIVFScalarQuantizer(quantizer, dimension, self.lists, half, inner, False)  # noqa: FBT003
        clustering = self._index.cp
        clustering.niter, clustering.max_points_per_centroid, clustering.min_points_per_centroid = _ROUNDS, _POINTS, 1
        clustering.seed = seed
        self._index.train(_array(vectors))
        for first in range(0, count, _CHUNK):
            if wanted is not None and not (wanted.is_set() and threading.main_thread().is_alive()):
                raise Abandoned
            self.add(vectors[first : first + _CHUNK])

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: Tensor) -> None:
        """Take in the vectors [n, d] of the items that come next; they are found from now on."""
        if len(vectors):
            self._index.add(_array(vectors))

    def search(
        self, parameters: Tensor, vectors: Tensor, k: int, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k best items of each task as `ranking.top_k` does, here and there missing one.

        `vectors` [N, d] are those of the index. Where the lists looked at hold too little for a task it is searched
        exactly.
        """
        k = min(k, len(vectors))
        wanted = min(len(vectors), k + (0 if excluded is None else excluded.shape[1]))
        places, scores = self._found(parameters, vectors, wanted)
        short = (places >= 0).sum(1) < wanted
        if excluded is not None:
            scores[(places.unsqueeze(2) == excluded.unsqueeze(1)).any(2)] = -torch.inf
        values, columns = scores.topk(k)
        indices = places.gather(1, columns)
        if bool(short.any()):
            some = None if excluded is None else excluded[short]
            indices[short], values[short] = top_k(parameters[short], vectors, k, some)
        return indices, values

    def measure(self, tasks: Tensor, vectors: Tensor, recall: float = RECALL) -> float:
        """Look at the fewest lists (in steps of a half) with which tasks [Q, d] find `recall` of their exact best.

        Their mean says from now on what everybody likes. Returns the recall reached, which is below `recall` when a
        quarter of the lists is not enough.
        """
        first = vectors[: len(self._is_favourite) - 1]
        self._favour(top_k(tasks.mean(0, keepdim=True), first, self.lists)[0][0], first)
        exact = top_k(tasks, vectors, _FOUND)[1]
        # By score, since of equal items it doesn't matter which are found.
        least = exact[:, -1:] - 1e-5 * exact.abs().amax(1, keepdim=True)
        most = max(1, self.lists // _LARGEST_SHARE)
        self.probes, reached = min(_FEWEST_PROBES, most), 0.0
        while True:
            found = self._found(tasks, vectors, exact.shape[1])[1].topk(exact.shape[1]).values
            reached = float((found >= least).float().mean())
            if reached >= recall or self.probes == most:
                return reached
            self.probes = min(self.probes * 3 // 2, most)

    @property
    def looked_at(self) -> str:
        """How many lists of how many a search looks at, in words."""
        return f"{self.probes} of {self.lists} lists"

    @property
    def bytes_per_item(self) -> int:
        """What the index holds besides the vectors: code and number of each item."""
        return int(self._index.code_size) + 8

    def _favour(self, places: Tensor, vectors: Tensor) -> None:
        self._favourites, self._favourite_vectors = places, vectors[places]
        self._is_favourite[:] = False
        self._is_favourite[places.numpy()] = True

    def _found(self, parameters: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Places [T, k + f] that hold k good ones, each once, and their scores; -1 and -inf where there are fewer."""
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        self._index.nprobe = self.probes
        nearest = self._index.search(_array(parameters), k)[1]
        nearest[self._is_favourite[np.minimum(nearest, len(self._is_favourite) - 1)]] = -1
        places = torch.from_numpy(nearest)
        scores = (vectors[places.clamp(min=0)] @ parameters.unsqueeze(2)).squeeze(2)
        liked, columns = top_k(parameters, self._favourite_vectors, k)[::-1]
        return (
            torch.cat([places, self._favourites[columns]], 1),
            torch.cat([scores.masked_fill_(places < 0, -torch.inf), liked], 1),
        )


class ItemSearch:
    """The best items of a growing catalogue, whose vectors stay: exactly while it is small, by an index when it isn't.

    In the beginning every search is exact. Once there are more than `above` items and `_TASKS` different tasks have
    asked, an index is built and measured by another thread, while searches go on exactly. If it is good enough it
    takes over, and items that have come since are added to it before the next search. When the catalogue has doubled
    the index is built anew, and the old one serves meanwhile.

    Not on a GPU: of a million items of d = 64 an H100 finds a task's best 50 exactly in 17 us, beside more than 100 for
    the rest of its list (tests/benchmarks/README.md). A core takes milliseconds.
    """

    def __init__(self, above: int | None = None, *, seed: int = 0) -> None:
        """`above` None: always exactly."""
        self._above, self._seed = above, seed
        self._index: ItemIndex | None = None
        self._ready: ItemIndex | None = None
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._wanted.set()
        self._tasks: Tensor | None = None  # [t, d], t <= _TASKS, all different
        self._built_for = 0

    @property
    def index(self) -> ItemIndex | None:
        """The index in use."""
        return self._index

    def best(
        self, head: Head, parameters: Tensor, vectors: Tensor, k: int, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k best items of each task; everything is as in `ranking.best_by`.

        `vectors` are of the same catalogue each time: those of earlier calls unchanged, new ones behind them.
        """
        if self._above is None or len(vectors) <= self._above or not head.linear or vectors.device.type != "cpu":
            return best_by(head, parameters, vectors, k, excluded)
        self._prepare(parameters, vectors)
        if self._index is None:
            return best_by(head, parameters, vectors, k, excluded)
        self._index.add(vectors[len(self._index) :])
        return self._index.search(parameters, vectors, k, excluded)

    def wait(self) -> Self:
        """Wait for the index that is being built, if one is; it is used from the next search on."""
        if self._thread is not None:
            self._thread.join()
        return self

    def close(self) -> None:
        """Have no index built any more."""
        self._wanted.clear()

    def _prepare(self, parameters: Tensor, vectors: Tensor) -> None:
        """Take over an index that is done, or have one built when it is time."""
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._thread = None
            self._index, self._ready = self._ready, None
        if len(vectors) <= 2 * self._built_for:
            return
        known = parameters if self._tasks is None else torch.cat([self._tasks, parameters])
        first = np.unique(known.numpy(), axis=0, return_index=True)[1]
        self._tasks = known[np.sort(first)[:_TASKS]]
        if len(self._tasks) < _TASKS:
            return
        self._built_for = len(vectors)
        self._thread = threading.Thread(target=self._build, args=(vectors, self._tasks), name="item-index")
        self._tasks = None
        self._thread.start()

    def _build(self, vectors: Tensor, tasks: Tensor) -> None:
        began = time.monotonic()
        try:
            with torch.inference_mode():
                _faiss().omp_set_num_threads(1)  # the others serve
                index = ItemIndex(vectors, seed=self._seed, wanted=self._wanted)
                recall = index.measure(tasks, vectors)
        except Abandoned:
            return
        except Exception:  # noqa: BLE001 - the service goes on without
            _LOG.exception("no index of the items could be built, they are searched exactly", items=len(vectors))
            return
        good = recall >= RECALL
        self._ready = index if good else None
        _LOG.info(
            "items indexed" if good else "an index finds too little, items are searched exactly",
            items=len(index),
            looked_at=index.looked_at,
            recall=round(recall, 4),
            seconds=round(time.monotonic() - began, 1),
        )


def _array(vectors: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(vectors.numpy(), dtype=np.float32)


def _faiss() -> Any:
    """Load the library when there is an index to build: most catalogues need none."""
    import faiss  # noqa: PLC0415

    return faiss
