"""Which rank orthogonalises which matrix, and what has to travel for it.

Contract: every rank knows where each element of each matrix lies on every rank, so that all work out the same plan and
nothing is negotiated. A matrix belongs to the least loaded of the ranks that hold a part of it: under ZeRO-1 and 2,
where ranks hold stretches of the flat parameters, almost all lie whole with one rank and nothing is sent but those that
a border cuts; under ZeRO-3, where every rank holds a slice of everything, slices go to the owner and come back; at
ZeRO-0, where every rank holds everything, results alone are sent. Matrices that travel come first, so that no rank
waits for another's local work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from minillm.compat.deepspeed_api import Slice

Shape = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of a flattened matrix, which begin at `position` of tensor `number` of a rank."""

    start: int
    stop: int
    number: int
    position: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Matrix:
    """A matrix and its piece on each rank of the group (of size 0 where a rank has none)."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @classmethod
    def all_of(cls, shapes: Sequence[Shape], slices: Sequence[Slice], number: int) -> Iterator[Matrix]:
        """The matrices that lie end to end in a parameter, of which each rank has a slice."""
        begin = 0
        for rows, columns in shapes:
            end, pieces = begin + rows * columns, []
            for held in slices:
                start, stop = max(begin, held.start), min(end, held.stop)
                stop = max(start, stop)
                pieces.append(Piece(start - begin, stop - begin, number, held.position + start - held.start))
            yield cls((rows, columns), tuple(pieces))
            begin = end

    def holders(self) -> list[int]:
        return [rank for rank, piece in enumerate(self.pieces) if piece.size]


@dataclass(frozen=True)
class Task:
    """A matrix and the rank that orthogonalises it."""

    matrix: Matrix
    owner: int

    def sent_by(self, rank: int) -> int:
        """Elements that a rank sends to the owner."""
        missing = self.matrix.pieces[self.owner].size < self.matrix.size
        return self.matrix.pieces[rank].size if missing and rank != self.owner else 0

    def sent_to(self, rank: int) -> int:
        """Elements that the owner sends to a rank."""
        return self.matrix.pieces[rank].size if rank != self.owner else 0


Bucket = list[Task]


def share_out(matrices: Sequence[Matrix], cost: Callable[[Shape], int], limit: int) -> list[Bucket]:
    """An owner for every matrix, and buckets of at most `limit` elements a rank that are worked through in turn."""
    ranks = len(matrices[0].pieces)
    loads = [0] * ranks
    alone = [matrix for matrix in matrices if len(matrix.holders()) == 1]
    shared = [matrix for matrix in matrices if len(matrix.holders()) > 1]
    for matrix in alone:
        loads[matrix.holders()[0]] += cost(matrix.shape)
    buckets = []
    for chunk in _chunks(shared, limit * ranks):
        owners = {}
        for matrix in sorted(chunk, key=lambda matrix: -cost(matrix.shape)):
            owner = owners[id(matrix)] = min(matrix.holders(), key=lambda rank: (loads[rank], rank))
            loads[owner] += cost(matrix.shape)
        buckets.append([Task(matrix, owners[id(matrix)]) for matrix in chunk])
    for rank in range(ranks):
        own = [matrix for matrix in alone if matrix.holders() == [rank]]
        buckets += [[Task(matrix, rank) for matrix in chunk] for chunk in _chunks(own, limit)]
    return buckets


def _chunks(matrices: Sequence[Matrix], limit: int) -> Iterator[list[Matrix]]:
    chunk: list[Matrix] = []
    total = 0
    for matrix in matrices:
        if chunk and total + matrix.size > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(matrix)
        total += matrix.size
    if chunk:
        yield chunk


Span = tuple[int, int, int]  # a buffer's number, start, stop


class Exchange:
    """Carries out the buckets of `share_out` on this rank of a group.

    Args:
        group: the ranks of the pieces; None for a single process.
    """

    def __init__(self, buckets: Sequence[Bucket], group: dist.ProcessGroup | None):
        self._group = group
        rank = 0 if group is None else dist.get_rank(group)
        self._steps = [_Step(bucket, rank) for bucket in buckets]
        self._steps = [step for step in self._steps if step.concerns_me]

    def run(
        self,
        read: Callable[[int, int, int], torch.Tensor],
        orthogonalise: Callable[[torch.Tensor], torch.Tensor],
        write: Callable[[int, int, int, torch.Tensor], None],
    ) -> None:
        """A collective over the group.

        Args:
            read: elements start..stop of this rank's tensor `number`, flat.
            orthogonalise: [B, rows, columns] -> the same shape.
            write: takes the update of elements start..stop of tensor `number`, flat.
        """
        for step in self._steps:
            local = _join([read(*span) for span in step.mine] or [read(0, 0, 0)])
            buffers = [local, self._send(local, step.to_owners) if step.to_owners else local[:0]]
            own, done = _pick(buffers, step.assembled), []
            for shape, stack in zip(step.shapes, own.split(step.sizes) if step.sizes else [], strict=True):
                done.append(orthogonalise(stack.view(-1, *shape)).reshape(-1))
            results = _join(done) if done else local[:0]
            buffers = [results, self._send(results, step.back) if step.back else local[:0]]
            update, start = _pick(buffers, step.updated), 0
            for number, begin, end in step.mine:
                write(number, begin, end, update[start : start + end - begin])
                start += end - begin

    def _send(self, buffer: torch.Tensor, way: _Way) -> torch.Tensor:
        outgoing = _pick([buffer], way.sent)
        incoming = outgoing.new_empty(sum(way.receives))
        dist.all_to_all_single(incoming, outgoing, way.receives, way.sends, group=self._group)
        return incoming


@dataclass(frozen=True)
class _Way:
    """One all-to-all: spans of a buffer in the order of the ranks they go to, and elements to and from each rank."""

    sent: list[Span]
    sends: list[int]
    receives: list[int]


class _Step:
    """One bucket as this rank sees it.

    Attributes:
        mine: (tensor, start, stop) of this rank's pieces: the buffer `local`.
        to_owners, back: the all-to-alls, None where nothing is sent by anyone.
        assembled: what this rank owns, by shape, from [local, received].
        shapes, sizes: of the stacks in it.
        updated: results in the order of `local`, from [results, received].
    """

    def __init__(self, bucket: Bucket, rank: int):
        ranks = range(len(bucket[0].matrix.pieces))
        pieces = [task.matrix.pieces[rank] for task in bucket]
        self.mine = _merged((p.number, p.position, p.position + p.size) for p in pieces)
        starts = _starts(p.size for p in pieces)  # of each task's piece in `local`
        # Sorting keeps the order within a shape, so that pieces that lie end to end stay so.
        owned = sorted((n for n, task in enumerate(bucket) if task.owner == rank), key=lambda n: bucket[n].matrix.shape)
        stacks = [(shape, list(of)) for shape, of in groupby(owned, key=lambda n: bucket[n].matrix.shape)]
        self.shapes = [shape for shape, _ in stacks]
        self.sizes = [len(of) * shape[0] * shape[1] for shape, of in stacks]
        places = dict(zip(owned, _starts(bucket[n].matrix.size for n in owned)))  # in what is owned
        self.concerns_me = bool(self.mine or owned) or any(task.sent_to(r) for task in bucket for r in ranks)

        received = _starts_by_rank([[task.sent_by(r) if task.owner == rank else 0 for task in bucket] for r in ranks])
        assembled: list[Span] = []
        for n in owned:
            matrix = bucket[n].matrix
            if matrix.pieces[rank].size == matrix.size:
                assembled.append((0, starts[n], starts[n] + matrix.size))
                continue
            for r in sorted(matrix.holders(), key=lambda r: matrix.pieces[r].start):
                start = starts[n] if r == rank else received[r][n]
                assembled.append((int(r != rank), start, start + matrix.pieces[r].size))
        self.assembled = _merged(assembled)
        self.to_owners = _way(
            [[(0, starts[n], starts[n] + task.sent_by(rank)) for n, task in enumerate(bucket) if task.owner == r]
             for r in ranks],
            [sum(task.sent_by(r) for task in bucket if task.owner == rank) for r in ranks],
        ) if any(task.sent_by(r) for task in bucket for r in ranks) else None  # fmt: skip

        received = _starts_by_rank([[task.sent_to(rank) if task.owner == r else 0 for task in bucket] for r in ranks])
        self.updated = _merged(
            (0, places[n] + pieces[n].start, places[n] + pieces[n].stop) if task.owner == rank
            else (1, received[task.owner][n], received[task.owner][n] + pieces[n].size)
            for n, task in enumerate(bucket)
        )  # fmt: skip
        self.back = _way(
            [[(0, places[n] + bucket[n].matrix.pieces[r].start, places[n] + bucket[n].matrix.pieces[r].stop)
              for n in sorted(owned) if r != rank] for r in ranks],
            [sum(task.sent_to(rank) for task in bucket if task.owner == r) for r in ranks],
        ) if any(task.sent_to(r) for task in bucket for r in ranks) else None  # fmt: skip


def _way(spans: list[list[Span]], receives: list[int]) -> _Way:
    """From what goes to each rank."""
    sends = [sum(stop - start for _, start, stop in of_rank) for of_rank in spans]
    return _Way(_merged(span for of_rank in spans for span in of_rank), sends, receives)


def _starts(sizes) -> list[int]:
    """Where parts of these sizes begin that lie end to end."""
    starts, position = [], 0
    for size in sizes:
        starts.append(position)
        position += size
    return starts


def _starts_by_rank(sizes: list[list[int]]) -> list[list[int]]:
    """The same for one list a rank, the lists end to end."""
    starts = iter(_starts(size for of_rank in sizes for size in of_rank))
    return [[next(starts) for _ in of_rank] for of_rank in sizes]


def _merged(spans) -> list[Span]:
    """Spans without the empty ones, those that lie end to end joined: one copy for a whole stack of experts."""
    merged: list[Span] = []
    for number, start, stop in spans:
        if start == stop:
            continue
        if merged and merged[-1][0] == number and merged[-1][2] == start:
            merged[-1] = (number, merged[-1][1], stop)
        else:
            merged.append((number, start, stop))
    return merged


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pick(buffers: Sequence[torch.Tensor], spans: list[Span]) -> torch.Tensor:
    """Spans of flat buffers, end to end."""
    parts = [buffers[number][start:stop] for number, start, stop in spans]
    return _join(parts) if parts else buffers[0][:0]
