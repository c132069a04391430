"""One optimiser step: rows -> loss -> gradients -> clipping -> update, eager or as one CUDA graph.

Everything that changes from step to step is read from device memory by a device counter (rows, learning
rate, weight decay, bias corrections) and written there (losses, gradient norm), so the same code runs
eagerly on a CPU and replays as a graph on a GPU without a word from the host. Where the parts of a step can
run beside each other (overlap.py), a graph holds several steps.

Ternary weights are quantised once per step, by the optimiser's own pass over them. The forward of every micro-batch
uses these codes. Between two launches anyone may change weights in any way, so each launch quantises all of them
again first: 2 reads of the weights per launch, of up to 64 steps on a GPU and of one step on a CPU. Where a captured
graph would read memory that a parameter no longer has, the step is captured again. Where modules have hooks, which
may write weights within a step, every forward quantises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitnet_ext import ops
from bitnet_ext._capture import SIDE_PRIORITY, STEP_PRIORITY, capture, capture_stream, places_of
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.nn import FrozenWeights, WeightCache, frozen_weights, resident_weights, set_backward
from bitnet_ext.ops import QuantizedWeight
from bitnet_ext.training.adam import FusedAdam
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.distributed import World, mean_over_ranks
from bitnet_ext.training.objective import MAX_PARTS, PARTS, LanguageModelLoss, LossFunction
from bitnet_ext.training.optimizer import Optimizer
from bitnet_ext.training.overlap import Overlap
from bitnet_ext.training.schedules import hyper_table

#: Columns of a step's record, unless the loss is the caller's own.
RECORD = ("loss", *PARTS, "grad_norm")

#: Steps whose rows are sent to a GPU at once: the host looks at the device once in so many steps.
BLOCK_STEPS = 64

#: Steps of a graph whose steps overlap, at most ``overlap.MAX_STEPS``. The last one updates everything before it ends,
#: which the others put off or do beside the next one; a block is a whole number of such graphs, and what it lacks is
#: made step by step. To capture 16 takes 0.2 s longer than one, and a study captures hundreds of times.
UNROLLED_STEPS = 8

#: Tokens of a step up to which a GPU takes the embedding's gradient by rows.
MAX_ROW_TOKENS = 2048


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or Inf; parameters and moments are those of the step before.

    Attributes:
        step: number of the step, from 1.
        records: float32 [n, columns], of the steps of the same call before it.
    """

    def __init__(self, step: int, names: list[str], records: Tensor) -> None:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        super().__init__(f"the gradient of {', '.join(names[:3]) or 'the model'}{more} holds NaN or Inf")
        self.step = step
        self.records = records


class TrainStep:
    """Runs optimiser steps on a device.

    Args:
        model: on `device`.
        optimizer: of the model.
        config: of the run.
        device: cpu or cuda.
        world: this process among all.
        loss_fn: the loss, instead of the terms of the configuration.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        optimizer: Optimizer,
        config: TrainConfig,
        device: torch.device,
        world: World,
        loss_fn: LossFunction | None = None,
    ) -> None:
        self.config = config
        self.optimizer = optimizer
        self.device = device
        self.world = world
        self._model = model
        set_backward(model, cast(ops.Backward, config.backward))
        self._language_model_loss = loss = LanguageModelLoss(model, config, loss_fn)
        self._loss: nn.Module = DistributedDataParallel(loss) if world.size > 1 else loss
        self._width = len(RECORD) if loss_fn is None else MAX_PARTS + 2
        self._allocate(BLOCK_STEPS if device.type == "cuda" else 1)
        self._table = torch.from_numpy(hyper_table(config)).to(device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._number = self._step  # int64 [1], of the step that is being made or captured
        # The codes of weights that the optimiser updates, and of weights that it leaves as they are.
        self._kept: list[tuple[WeightCache, list[Tensor], QuantizedWeight]] = []
        self._fixed: list[tuple[WeightCache, list[Tensor], QuantizedWeight]] = []
        self._resident: dict[WeightCache, QuantizedWeight] | None = None  # None before the first forward
        self._owners = self._find_owners()
        self._hookable = list(model.modules())
        self._has_hooks = False
        self._embedding = model.embed_tokens if self._takes_rows(model) else None
        self._launched = (0, 0)  # step before the launched ones, and how many they are
        self._graphs: list[tuple[int, torch.cuda.CUDAGraph]] = []  # and their steps, the most first
        self._places: list[object] = []  # that the graphs read and write
        self._wants_graph = config.cuda_graph and device.type == "cuda" and world.size == 1
        self._overlap: Overlap | None = None

    def _allocate(self, block_steps: int) -> None:
        """What the host and the device hand each other for a block of steps."""
        self.block_steps = block_steps
        config, device = self.config, self.device
        # Ids and targets apart, so that the rows of a step are taken in one copy.
        shape = (block_steps, 2, config.batch_size // self.world.size, config.seq_len)
        self._rows = torch.zeros(shape, dtype=torch.int64, device=device)
        # From pinned memory the rows reach the device without the host waiting for it.
        self._host_rows = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._record = torch.zeros(block_steps, self._width, device=device)
        # Filled behind the last step: a copy asked for when the steps are done would wait for the other runs' kernels.
        self._host_record = torch.zeros(block_steps, self._width, pin_memory=device.type == "cuda")
        self._recorded = torch.cuda.Event() if device.type == "cuda" else None
        self._offsets = torch.arange(block_steps, device=device)

    def _takes_rows(self, model: BitNetForCausalLM) -> bool:
        """Whether the embedding's gradient comes as rows of the step's tokens instead of a matrix of zeros.

        Not where the head adds a dense gradient to it, nor under DDP, which averages dense ones, nor where the
        optimiser moves every row by itself. On a GPU only as long as comparing all tokens
        (:func:`bitnet_ext.ops.sum_rows`) is cheaper than the zeros.
        """
        tokens = self.config.tokens_per_step
        if self._language_model_loss.loss_fn is not None:
            return False  # which may read the embedding in another way too
        few = self.device.type == "cpu" or tokens <= min(MAX_ROW_TOKENS, model.config.vocab_size)
        alone = self.world.size == 1 and model.lm_head is not None
        return few and alone and self.optimizer.takes_rows

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of a record; those of a loss of one's own are known after the first step."""
        return ("loss", *self._language_model_loss.parts, "grad_norm")

    def run(self, start: int, rows: NDArray[np.int64]) -> Tensor:
        """Runs the steps start + 1 .. start + n for rows [n, local batch, seq_len + 1], n <= block_steps.

        Returns:
            float32 [n, columns] on the CPU: see :attr:`names`, averaged over processes.

        Raises:
            NonFiniteGradientError: a gradient held NaN or Inf. On a GPU the steps after it in this call were run
                too, but changed nothing.
        """
        self.launch(start, rows)
        return self.finish()

    def launch(self, start: int, rows: NDArray[np.int64]) -> None:
        """The first half of :meth:`run`: hands the steps to the device and does not wait for them.

        Several runs share a GPU when each is launched on a stream of its own
        (:func:`bitnet_ext.training.streams_side_by_side`) before the first one is finished.
        """
        count = rows.shape[0]
        self._check_parameters()
        if self._wants_graph and not self._graphs:
            self._capture()
        self._refresh_codes()
        host_rows = torch.from_numpy(rows)
        self._host_rows[:count, 0].copy_(host_rows[..., :-1])
        self._host_rows[:count, 1].copy_(host_rows[..., 1:])
        self._rows[:count].copy_(self._host_rows[:count], non_blocking=True)
        self._position.zero_()
        self._step.fill_(start)
        left = count
        for steps, graph in self._graphs:
            for _ in range(left // steps):
                graph.replay()
            left %= steps
        for _ in range(left):
            self._make(1)
        if self._graphs:
            self.optimizer.mark_changed()  # a replay does not count
        self._host_record[:count].copy_(mean_over_ranks(self._record[:count], self.world), non_blocking=True)
        if self._recorded is not None:
            self._recorded.record(torch.cuda.current_stream(self.device))
        self._launched = (start, count)

    def finish(self) -> Tensor:
        """The second half of :meth:`run`: waits for the launched steps; their records, and what they raise."""
        start, count = self._launched
        if self._recorded is not None:
            self._recorded.synchronize()
        records = self._host_record[:count, : len(self.names)].clone()
        if not torch.isfinite(records[:, self.names.index("grad_norm")]).all():
            bad = self.optimizer.first_bad_step()
            if bad is not None:
                raise NonFiniteGradientError(bad[0] + 1, bad[1], records[: bad[0] - start])
        return records

    @contextlib.contextmanager
    def _row_gradient(self) -> Iterator[None]:
        """Within it a forward of the embedding has a sparse gradient, which is the rows of its tokens."""
        if self._embedding is None:
            yield
            return
        before, self._embedding.sparse = self._embedding.sparse, True
        try:
            yield
        finally:
            self._embedding.sparse = before

    def _keep_codes(self, first_step: FrozenWeights) -> None:
        """Keeps the codes of the first step's weights: from now on the optimiser quantises those that it updates."""
        own = {id(p) for p in self.optimizer.named.values()}
        fixed = {id(p) for p in self._loss.parameters()} - own
        for cache, group, codes in first_step.made():
            members = set(map(id, group))
            if members <= own:
                own -= members  # a weight of two caches is kept for the first
                self._kept.append((cache, group, codes))
            elif members <= fixed:
                self._fixed.append((cache, group, codes))
        self.optimizer.keep_codes([group for _, group, _ in self._kept], [codes for *_, codes in self._kept])
        self._resident = {cache: codes for cache, _, codes in [*self._kept, *self._fixed]}

    def _forget_codes(self) -> None:
        self._kept, self._fixed, self._resident = [], [], None
        self.optimizer.keep_codes([], [])

    def _refresh_codes(self) -> None:
        """Quantises all weights as they are: anyone may have changed them since the last launch."""
        self.optimizer.refresh_codes()
        if self._fixed:
            groups = [group for _, group, _ in self._fixed]
            ops.quantize_weight_groups_(groups, [codes for *_, codes in self._fixed])

    def _find_owners(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Every parameter of the model with the module and the attribute that hold it."""
        return [
            (module, name, p)
            for module in self._model.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]

    def _check_parameters(self) -> None:
        """Begins anew where the model's parameters are other objects, or elsewhere, than the step has seen them.

        Raises:
            RuntimeError: when the optimiser cannot update them any more.
        """
        for name, p in self.optimizer.named.items():
            if p.dtype != torch.float32 or p.device.type != self.device.type:
                raise RuntimeError(
                    f"TrainStep: parameter {name} must stay float32 on {self.device.type}, where the optimizer's "
                    f"moments are; got {p.dtype} on {p.device}"
                )
        self._has_hooks = self._looks_hooked()
        moved = self._graphs and self._places != self._places_of_graphs()
        replaced = any(module._parameters.get(name) is not p for module, name, p in self._owners)
        if not moved and not replaced:
            return
        present = set(map(id, self._model.parameters()))
        for name, p in self.optimizer.named.items():
            if id(p) not in present:
                raise RuntimeError(
                    f"TrainStep: parameter {name} of the model is another object than the optimizer's; "
                    "make optimizer and TrainStep after the model is complete, and change parameters in place"
                )
        self._owners = self._find_owners()
        self._hookable = list(self._model.modules())
        self._forget_codes()
        self._graphs, self._places, self._overlap = [], [], None
        self._language_model_loss.before_head = None

    def _places_of_graphs(self) -> list[object]:
        """Where everything lies that the graphs read or write and that somebody else could put elsewhere."""
        model = self._model
        tensors = [*model.parameters(), *model.buffers(), *self.optimizer.state().values()]
        return [self._has_hooks, *places_of(tensors)]

    def _looks_hooked(self) -> bool:
        """Whether code of somebody else runs between the forwards of a step."""
        modules = self._hookable
        hooked = any(m._forward_pre_hooks or m._forward_hooks for m in modules)
        if hooked or self.config.accumulation == 1:
            return hooked
        # A hook that runs in a backward can change the weights of the next micro-batch.
        return any(m._backward_pre_hooks or m._backward_hooks for m in modules) or any(
            p._backward_hooks or p._post_accumulate_grad_hooks for p in self.optimizer.named.values()
        )

    def _make(self, count: int) -> None:
        """Makes `count` steps, of which all but the last may leave work to the step that follows."""
        positions = self._position + self._offsets[:count]
        numbers = self._step + self._offsets[:count]
        rows = self._rows.index_select(0, positions)
        hyper = self._table.index_select(0, numbers)
        records = torch.empty(count, self._width, device=self.device)
        if self._overlap is not None:
            self._overlap.begin(rows[:, 0].flatten(1), hyper)
        for index in range(count):
            self._number = numbers[index : index + 1]
            self.optimizer.zero_grad()
            values = self._gradients(rows[index])
            self.optimizer.add_decay(hyper[index, 1])
            if self._overlap is None:
                norm, scale = self.optimizer.grad_norm_and_scale(self._number)
                self.optimizer.step(hyper[index], scale)
                torch.stack([*values, norm], out=records[index, : len(values) + 1])
                continue
            squares = self._overlap.squares_of_head()
            norm, scale = self.optimizer.grad_norm_and_scale(self._number, squares)
            self._overlap.update(scale, [*values, norm], records[index])
        self._record.index_copy_(0, positions, records)
        self._position += count
        self._step += count

    def _gradients(self, rows: Tensor) -> list[Tensor]:
        """Forward and backward of rows int64 [2, B, seq_len]; the step's record but for the gradient norm."""
        if self._has_hooks:  # they may write weights within the step, so every forward quantises
            return self._backward(rows, {})
        if self._resident is not None:
            return self._backward(rows, self._resident)
        with frozen_weights(self._loss) as first_step:
            values = self._backward(rows, {})
        self._keep_codes(first_step)
        return values

    def _backward(self, rows: Tensor, resident: Mapping[WeightCache, QuantizedWeight]) -> list[Tensor]:
        """The micro-batches of :meth:`_gradients`, and the mean of their values."""
        accumulation = self.config.accumulation
        sums: Tensor | None = None
        for index, micro_rows in enumerate(rows.chunk(accumulation, 1)):
            last = index == accumulation - 1
            together = last or self.world.size == 1
            with (
                contextlib.nullcontext() if together else self._loss.no_sync(),  # type: ignore[operator]
                contextlib.nullcontext() if self._overlap is None else self._overlap.gradients_apart(),
                resident_weights(resident),
                self._row_gradient(),
            ):
                loss, *parts = self._loss(micro_rows[0], micro_rows[1])
                (loss / accumulation if accumulation > 1 else loss).backward()
            values = [loss.detach(), *parts]
            if accumulation > 1:
                share = torch.stack(values) / accumulation
                sums = share if sums is None else sums + share
        return values if sums is None else list(sums.unbind())

    def _start_overlap(self, stream: torch.cuda.Stream | None) -> None:
        """Lets parts of several steps run beside each other, where the step is one that can be cut so."""
        # With a loss of one's own there is no embedding that takes rows, hence no overlap.
        head, embedding = self._model.lm_head, self._embedding
        one_by_one = self.config.accumulation > 1 or self.config.steps < UNROLLED_STEPS
        optimizer = self.optimizer if isinstance(self.optimizer, FusedAdam) else None
        if head is None or embedding is None or optimizer is None or one_by_one:
            return
        if head.weight.requires_grad and embedding.weight.requires_grad:
            self._overlap = Overlap(optimizer, head.weight, embedding.weight, stream)
            self._language_model_loss.before_head = self._overlap.before_head

    def _capture(self) -> None:
        """Captures :meth:`_make`, after a warm-up that changes neither parameters nor moments.

        Warm-up and capture are on two streams that no run beside this one captures on, and whose priorities the graphs
        keep.
        """
        stream = capture_stream(self.device, STEP_PRIORITY)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        side = capture_stream(self.device, SIDE_PRIORITY)
        with torch.cuda.stream(stream), self.optimizer.held_still():
            self._make(1)
            self._step.zero_()
            self._start_overlap(side)
            self._make(1 if self._overlap is None else 2)
            self._step.zero_()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._position.zero_()
        if torch.cuda.current_stream(self.device) == torch.cuda.default_stream(self.device):
            # No run beside this one would be stopped: a graph has memory of its own and does not take what the warm-up
            # leaves in the allocator, 20 GiB with bitnet-700m and 16,384 tokens.
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
        pool = None
        # The graph of one step is the last, so that the gradients are its own: a step that is looked at is run alone.
        for steps in (1,) if self._overlap is None else (UNROLLED_STEPS, 1):
            self.optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with capture(graph, stream, pool):
                self._make(steps)
            pool = graph.pool()
            self._graphs.append((steps, graph))
        self._places = self._places_of_graphs()
