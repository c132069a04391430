"""What a training step on one GPU does beside its chain of small kernels, and what it puts off.

The body of a small model is a chain of some 90 kernels that wait for each other and leave the GPU nearly idle; the
output head and the embedding are most of the parameters, and updating them is bound by memory, which slows the chain
too. So of several steps that are made together

* the rows of the embedding are updated when something reads them: before a step those of its tokens, behind the last
  step all, each once for all the steps it waits for (:func:`bitnet_ext.ops.adam_rows_`);
* the head is updated on a second stream of lower priority, beside the chain:

    chain   rows of the next tokens | other weights, codes | body | logits, loss, their gradient | body's backward
    side    head                                                  |              head's gradient, its squares

    chain   behind the last step: other weights, codes | head
    side    all rows of the embedding

Each element goes through the arithmetic of a step that does one thing after the other, and each sum is made in its
order: the results are the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet_ext import ops
from bitnet_ext.ops.side_stream import SideStream, weight_gradient_on
from bitnet_ext.training.adam import FusedAdam

#: Blocks a multiprocessor of the head's update beside the body: 256 of its 2,048 threads, a quarter of its registers.
LATE_BLOCKS = 1
#: The same of the two updates behind the last step, which have the GPU to themselves.
LAST_BLOCKS = 2
#: Steps that can be made together: as many as :func:`bitnet_ext.ops.adam_rows_` takes.
MAX_STEPS = 16
#: Share of the multiprocessors that the gradient of the head takes, one block with all registers each; the kernels
#: of the body's backward have the rest.
HEAD_GRADIENT_SHARE = 0.5


@dataclass(frozen=True)
class _Steps:
    """The steps that are made together, and of those behind clipping the gradient of the embedding by rows.

    Attributes:
        ids, slots: int64 [S, T] of the steps' tokens, and int32 [S, V].
        hyper: float32 [S, 5].
        sums, grad_scales: a float32 [T, H] and a float32 [] a step, as far as they go.
    """

    ids: Tensor
    slots: Tensor
    hyper: Tensor
    sums: list[Tensor] = field(default_factory=list)
    grad_scales: list[Tensor] = field(default_factory=list)


class Overlap:
    """The side stream of one run, and what is pending there.

    :meth:`begin` comes before several steps. Each then calls, in this order: :meth:`before_head` between body and
    head, within :meth:`gradients_apart`; after the backward :meth:`squares_of_head`; after clipping :meth:`update`.
    Nothing is pending behind the last of them.

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
        self._vocab_size = embedding.shape[0]
        self._multiprocessors = (
            1 if stream is None else torch.cuda.get_device_properties(stream.device).multi_processor_count
        )
        self.side = SideStream(stream, max(1, round(HEAD_GRADIENT_SHARE * self._multiprocessors)))
        self._steps: _Steps | None = None
        self._head_is_current: torch.cuda.Event | None = None

    def begin(self, ids: Tensor, hyper: Tensor) -> None:
        """Before steps that are made together, at most MAX_STEPS.

        Args:
            ids: int64 [S, T], the tokens of each step.
            hyper: float32 [S, 5], of each step, see :meth:`Optimizer.step`.
        """
        assert ids.shape[0] <= MAX_STEPS, (
            f"at most {MAX_STEPS} steps can be made together, got {ids.shape[0]}"
        )
        self._steps = _Steps(ids, ops.row_slots(ids, self._vocab_size), hyper)

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

    def squares_of_head(self) -> tuple[str, Tensor]:
        """After a backward: what the norm needs of the head, a name and partial sums. All is joined then."""
        steps, grad = self._steps, self.optimizer.named[self.head].grad
        assert steps is not None and grad is not None
        with self.side.on() if self.side.has_gradient else self.side.fork():
            partials = ops.square_partials(grad)
        self.optimizer.gradients(steps.slots[len(steps.sums)])  # sums up the embedding's rows before it waits
        self.side.join()
        return self.head, partials

    def update(self, grad_scale: Tensor, values: list[Tensor], record: Tensor) -> None:
        """The update of a step. If another one follows, the head's may be pending then, and that of most rows is.

        Args:
            grad_scale: of the step.
            values, record: scalars of the step that nobody waits for, and where they go together.
        """
        steps, optimizer = self._steps, self.optimizer
        grad, rows = optimizer.named[self.head].grad, optimizer.row_gradient
        assert steps is not None and grad is not None and rows is not None
        hyper = steps.hyper[len(steps.sums)]
        steps.sums.append(rows.sums)
        steps.grad_scales.append(grad_scale)
        if len(steps.sums) == steps.ids.shape[0]:
            self._finish(steps, grad, grad_scale, values, record)
            return
        self._update_rows(steps, steps.ids[len(steps.sums)])
        with self.side.fork(grad, *values):
            self._update_head(grad, hyper, grad_scale, LATE_BLOCKS)
            if self.side.stream is not None:
                self._head_is_current = self.side.stream.record_event()
            torch.stack(values, out=record)
        optimizer.step(hyper, grad_scale, without=(self.head, self.embedding))

    def _finish(
        self, steps: _Steps, grad: Tensor, grad_scale: Tensor, values: list[Tensor], record: Tensor
    ) -> None:
        """The last update, with all that is pending. The head's leaves room too: it would fill the GPU else, and
        the rows, on the stream of lower priority, would come behind it."""
        hyper = steps.hyper[-1]
        with self.side.fork(*values):
            torch.stack(values, out=record)
            self._update_rows(steps, None)
        self.optimizer.step(hyper, grad_scale, without=(self.head, self.embedding))
        self._update_head(grad, hyper, grad_scale, LAST_BLOCKS)
        self.side.join()
        self._steps = None

    def _update_head(self, grad: Tensor, hyper: Tensor, grad_scale: Tensor, blocks: int) -> None:
        num_blocks = blocks * self._multiprocessors
        self.optimizer.step_beside(self.head, grad, hyper, grad_scale, num_blocks)

    def _update_rows(self, steps: _Steps, next_ids: Tensor | None) -> None:
        self.optimizer.step_rows(
            self.embedding,
            steps.sums,
            steps.slots,
            steps.hyper,
            steps.grad_scales,
            next_ids,
            LAST_BLOCKS * self._multiprocessors,
        )
