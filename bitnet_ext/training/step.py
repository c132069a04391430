"""One optimiser step: rows -> loss -> gradients -> clipping -> update, eager or as one CUDA graph.

Everything that changes from step to step is read from device memory by a device counter (rows, learning
rate, weight decay, bias corrections) and written there (losses, gradient norm), so the same code runs
eagerly on a CPU and replays as a graph on a GPU without a word from the host.

Ternary weights are quantised once a step, by the optimiser's own pass over them; the forward of every
micro-batch, and of evaluations in between, uses these codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.nn import WeightCache, resident_weights, set_backward, weight_caches
from bitnet_ext.ops import QuantizedWeight
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.distributed import World, mean_over_ranks
from bitnet_ext.training.optimizer import FusedAdam
from bitnet_ext.training.schedules import hyper_table

#: Columns of a step's record.
RECORD = ("loss", "cross_entropy", "entropy", "grad_norm")

#: Steps whose rows are sent to a GPU at once: the host looks at the device once in so many steps.
BLOCK_STEPS = 64


#: Tokens of a step up to which a GPU takes the embedding's gradient by rows.
MAX_ROW_TOKENS = 2048


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or Inf; parameters and moments are those of the step before.

    Attributes:
        step: number of the step, from 1.
        records: float32 [n, 4], of the steps of the same call before it.
    """

    def __init__(self, step: int, names: list[str], records: Tensor) -> None:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        super().__init__(f"the gradient of {', '.join(names[:3]) or 'the model'}{more} holds NaN or Inf")
        self.step = step
        self.records = records


class LanguageModelLoss(nn.Module):
    """Rows int64 [B, seq_len + 1] -> (objective, cross-entropy, mean predictive entropy)."""

    def __init__(self, model: BitNetForCausalLM, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        bf16 = config.precision == "bf16"
        with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16):
            hidden = self.model.hidden_states(rows[:, :-1].contiguous())
        out = ops.linear_cross_entropy(
            hidden.bfloat16() if bf16 else hidden,
            self.model.head_weight,
            rows[:, 1:].contiguous(),
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            entropy_weight=config.entropy_weight,
            diversity_weight=config.diversity_weight,
            output_l2=config.output_l2,
        )
        return out.loss, out.cross_entropy, out.entropy


class TrainStep:
    """Runs optimiser steps on a device.

    Args:
        model: on `device`.
        optimizer: of the model.
        config: of the run.
        device: cpu or cuda.
        world: this process among all.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        optimizer: FusedAdam,
        config: TrainConfig,
        device: torch.device,
        world: World,
    ) -> None:
        self.config = config
        self.optimizer = optimizer
        self.device = device
        self.world = world
        set_backward(model, cast(ops.Backward, config.backward))
        loss = LanguageModelLoss(model, config)
        self._loss: nn.Module = DistributedDataParallel(loss) if world.size > 1 else loss
        self.block_steps = BLOCK_STEPS if device.type == "cuda" else 1
        shape = (self.block_steps, config.batch_size // world.size, config.seq_len + 1)
        self._rows = torch.zeros(shape, dtype=torch.int64, device=device)
        # From pinned memory the rows reach the device without the host waiting for it.
        self._host_rows = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._record = torch.zeros(self.block_steps, len(RECORD), device=device)
        self._table = torch.from_numpy(hyper_table(config)).to(device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._kept: list[tuple[WeightCache, list[Tensor], QuantizedWeight]] = []
        self._resident: dict[WeightCache, QuantizedWeight] = {}
        self._looked_for_caches = False
        self._embedding = model.embed_tokens if self._takes_rows(model) else None
        self._launched = (0, 0)  # step before the launched ones, and how many they are
        self._graph: torch.cuda.CUDAGraph | None = None
        self._wants_graph = config.cuda_graph and device.type == "cuda" and world.size == 1

    def _takes_rows(self, model: BitNetForCausalLM) -> bool:
        """Whether the embedding's gradient comes as rows of the step's tokens instead of a matrix of zeros.

        Not where the head adds a dense gradient to it, nor under DDP, which averages dense ones. On a GPU only as
        long as comparing all tokens (:func:`bitnet_ext.ops.sum_rows`) is cheaper than the zeros.
        """
        tokens = self.config.tokens_per_step
        few = self.device.type == "cpu" or tokens <= min(MAX_ROW_TOKENS, model.config.vocab_size)
        return few and self.world.size == 1 and model.lm_head is not None

    def run(self, start: int, rows: NDArray[np.int64]) -> Tensor:
        """Runs the steps start + 1 .. start + n for rows [n, local batch, seq_len + 1], n <= block_steps.

        Returns:
            float32 [n, 4] on the CPU: see RECORD, averaged over processes.

        Raises:
            NonFiniteGradientError: a gradient held NaN or Inf. On a GPU the steps after it in this call were run
                too, but changed nothing.
        """
        self.launch(start, rows)
        return self.finish()

    def launch(self, start: int, rows: NDArray[np.int64]) -> None:
        """The first half of :meth:`run`: hands the steps to the device and does not wait for them.

        Several runs, up to the 32 streams that torch hands out, share a GPU when each is launched on a stream of
        its own before the first one is finished.
        """
        count = rows.shape[0]
        if self._wants_graph and self._graph is None:
            self._capture()
        self._check_codes()
        self._host_rows[:count].copy_(torch.from_numpy(rows))
        self._rows[:count].copy_(self._host_rows[:count], non_blocking=True)
        self._position.zero_()
        self._step.fill_(start)
        for _ in range(count):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._body()
        if self._graph is not None:
            self.optimizer.mark_changed()  # a replay does not count
        for cache, group, codes in self._kept:
            cache.put(group, codes)
        self._launched = (start, count)

    def finish(self) -> Tensor:
        """The second half of :meth:`run`: waits for the launched steps; their records, and what they raise."""
        start, count = self._launched
        records = mean_over_ranks(self._record[:count].clone(), self.world).cpu()
        if not torch.isfinite(records[:, RECORD.index("grad_norm")]).all():
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

    def _keep_codes(self) -> None:
        """Has the optimiser keep the codes of every weight up to date that the model's caches hold by now."""
        own = {id(p) for p in self.optimizer.named.values()}
        for cache in weight_caches(self._loss):
            group = cache.weights
            if group is not None and own.issuperset(map(id, group)):
                own.difference_update(map(id, group))  # a weight of two caches is kept for the first
                self._kept.append((cache, group, cache.get(group)))
        self.optimizer.keep_codes([group for _, group, _ in self._kept], [codes for *_, codes in self._kept])
        self._resident = {cache: codes for cache, _, codes in self._kept}

    def _check_codes(self) -> None:
        """Quantises again when anyone but the optimiser has changed a weight since the last call."""
        if all(cache.holds(group, codes) for cache, group, codes in self._kept):
            return
        self.optimizer.refresh_codes()
        for cache, group, codes in self._kept:
            cache.put(group, codes)

    def _body(self) -> None:
        rows = self._rows.index_select(0, self._position)[0]
        accumulation = self.config.accumulation
        self.optimizer.zero_grad()
        sums = torch.zeros(3, device=self.device)
        for index, micro_rows in enumerate(rows.chunk(accumulation)):
            last = index == accumulation - 1
            together = last or self.world.size == 1
            with (
                contextlib.nullcontext() if together else self._loss.no_sync(),  # type: ignore[operator]
                resident_weights(self._resident),
                self._row_gradient(),
            ):
                loss, cross_entropy, entropy = self._loss(micro_rows)
                (loss / accumulation if accumulation > 1 else loss).backward()
            sums += torch.stack([loss.detach(), cross_entropy, entropy]) / accumulation
        if not self._looked_for_caches:  # after the first forward they hold something
            self._looked_for_caches = True
            self._keep_codes()
        norm, scale = self.optimizer.grad_norm_and_scale(self._step)
        self.optimizer.step(self._table.index_select(0, self._step)[0], scale)
        self._record.index_copy_(0, self._position, torch.cat([sums, norm.reshape(1)])[None])
        self._position += 1
        self._step += 1

    def _capture(self) -> None:
        """Captures :meth:`_body`; the warm-up's effects on parameters and moments are undone.

        Warm-up and capture are on one stream that is this run's own: cuBLAS has a workspace a stream, and two graphs
        captured on torch's common capture stream wrote to the same one when they were replayed side by side.
        """
        state = [p.detach() for p in self.optimizer.named.values()] + list(self.optimizer.state().values())
        saved = [value.clone() for value in state]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._body()
                self._step.zero_()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        for value, before in zip(state, saved, strict=True):
            value.copy_(before)
        del saved
        self.optimizer.forget_bad_step()
        self._position.zero_()
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._body()
        self._graph = graph
