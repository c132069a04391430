"""What a training step on one GPU does beside its chain of small kernels.

The body of a small model is a chain of some 90 kernels that wait for each other and leave the GPU nearly idle; the
output head and the embedding are most of the parameters, and updating them is bound by memory. So between the
clipping of one step and that of the next a second stream of lower priority runs, beside the chain:

    chain   rows of the next tokens | other weights, codes | body | logits, loss, their gradient | body's backward
    side    head, part of the embedding                           |              head's gradient, its squares, rest

Each element goes through the arithmetic of a step that does one thing after the other, and each sum is made in its
order: the results are the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_ext import ops
from bitnet_ext.ops.side_stream import SideStream, weight_gradient_on
from bitnet_ext.training.adam import FusedAdam
from bitnet_ext.training.optimizer import RowGradient

#: Blocks of a late update a multiprocessor: 512 of its 2,048 threads and half of its registers.
LATE_BLOCKS = 2
#: Share of the multiprocessors that the gradient of the head takes, one block with all registers each; the kernels
#: of the body's backward have the rest.
HEAD_GRADIENT_SHARE = 0.5
#: Share of the embedding's rows that are updated with the head, while the next forward runs.
EMBEDDING_SHARE = 0.25


@dataclass(frozen=True)
class _Late:
    """An update that head and embedding still wait for; it holds what the side stream reads."""

    head_grad: Tensor
    rows: RowGradient
    place: Tensor
    hyper: Tensor
    grad_scale: Tensor


class Overlap:
    """The side stream of one run, and what is pending there.

    A step calls, in this order: :meth:`before_head` between body and head, within :meth:`gradients_apart`; after
    the backward :meth:`squares_of_head`; after clipping :meth:`update`, or as the last of several the optimiser's
    own step. Nothing is pending behind a last step.

    Args:
        optimizer: of the model.
        head, embedding: the model's output matrix, and its embedding, whose gradient is sparse.
        stream: of lower priority than the chain's; None for no concurrency, as in a test on a CPU.
    """

    def __init__(
        self,
        optimizer: FusedAdam,
        head: Tensor,
        embedding: Tensor,
        stream: torch.cuda.Stream | None,
    ) -> None:
        names = {id(p): name for name, p in optimizer.named.items()}
        self.optimizer = optimizer
        self.head, self.embedding = names[id(head)], names[id(embedding)]
        self.vocab_size = embedding.shape[0]
        multiprocessors = (
            1 if stream is None else torch.cuda.get_device_properties(stream.device).multi_processor_count
        )
        self._num_blocks = LATE_BLOCKS * multiprocessors
        self._with_head = round(EMBEDDING_SHARE * embedding.shape[0])
        self.side = SideStream(stream, max(1, round(HEAD_GRADIENT_SHARE * multiprocessors)))
        self._late: _Late | None = None
        self._head_is_current: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def gradients_apart(self) -> Iterator[None]:
        """Within it a loss leaves the gradient of the head to the side stream."""
        with weight_gradient_on(self.side):
            yield

    def before_head(self) -> None:
        """Waits for the head of the step before."""
        if self._head_is_current is not None:
            torch.cuda.current_stream().wait_event(self._head_is_current)
            self._head_is_current = None

    def squares_of_head(self, slots: Tensor) -> tuple[str, Tensor]:
        """After a backward: the rest of the step before, and what the norm needs of the head; all is joined then.

        slots: int32 [V] of this step's tokens.
        """
        grad = self.optimizer.named[self.head].grad
        assert grad is not None
        with self.side.on() if self.side.has_gradient else self.side.fork():
            partials = ops.square_partials(grad)
            if self._late is not None:
                self._update_embedding(self._late, slice(self._with_head, None))
        self.optimizer.gradients(slots)  # sums up the embedding's rows before it waits
        self.side.join()
        self._late = None
        return self.head, partials

    def update(
        self,
        hyper: Tensor,
        grad_scale: Tensor,
        next_ids: Tensor,
        next_slots: Tensor,
        values: list[Tensor],
        record: Tensor,
    ) -> None:
        """The update of a step that another one follows; head and embedding are then pending.

        Args:
            hyper, grad_scale: of the step.
            next_ids, next_slots: int64 [T] and int32 [V], the tokens of the step that follows.
            values, record: scalars of the step that nobody waits for, and where they go together.
        """
        optimizer = self.optimizer
        optimizer.step_rows(next_ids, next_slots, hyper, grad_scale)
        grad, rows = optimizer.named[self.head].grad, optimizer.row_gradient
        assert grad is not None and rows is not None
        late = _Late(grad, rows, next_slots, hyper, grad_scale)
        with self.side.fork(*values):
            optimizer.step_beside(
                {self.head: grad},
                (rows, slice(0, self._with_head), next_slots) if self._with_head else None,
                hyper,
                grad_scale,
                self._num_blocks,
            )
            if self.side.stream is not None:
                self._head_is_current = self.side.stream.record_event()
            torch.stack(values, out=record)
        self._late = late
        optimizer.step(hyper, grad_scale, without=(self.head, self.embedding))

    def _update_embedding(self, late: _Late, part: slice) -> None:
        if part.start < late.place.shape[0]:
            self.optimizer.step_beside(
                {}, (late.rows, part, late.place), late.hyper, late.grad_scale, self._num_blocks
            )
