"""One optimiser step: rows -> loss -> gradients -> clipping -> update, eager or as one CUDA graph.

Everything that changes from step to step is read from device memory by a device counter (rows, learning
rate, weight decay, bias corrections) and written there (losses, gradient norm), so the same code runs
eagerly on a CPU and replays as a graph on a GPU without a word from the host.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.distributed import World, mean_over_ranks
from bitnet_ext.training.optimizer import FusedAdam
from bitnet_ext.training.schedules import hyper_table

#: Columns of a step's record.
RECORD = ("loss", "cross_entropy", "entropy", "grad_norm")

#: Steps whose rows are sent to a GPU at once: the host looks at the device once in so many steps.
BLOCK_STEPS = 64


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or Inf; the parameters of the step were not updated."""


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
        loss = LanguageModelLoss(model, config)
        self._loss: nn.Module = DistributedDataParallel(loss) if world.size > 1 else loss
        self.block_steps = BLOCK_STEPS if device.type == "cuda" else 1
        shape = (self.block_steps, config.batch_size // world.size, config.seq_len + 1)
        self._rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self._record = torch.zeros(self.block_steps, len(RECORD), device=device)
        self._table = torch.from_numpy(hyper_table(config)).to(device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._wants_graph = config.cuda_graph and device.type == "cuda" and world.size == 1

    def run(self, start: int, rows: NDArray[np.int64]) -> Tensor:
        """Runs the steps start + 1 .. start + n for rows [n, local batch, seq_len + 1], n <= block_steps.

        Returns:
            float32 [n, 4] on the CPU: see RECORD, averaged over processes.

        Raises:
            NonFiniteGradientError: on the CPU, before the update is made.
        """
        count = rows.shape[0]
        if self._wants_graph and self._graph is None:
            self._capture()
        self._rows[:count].copy_(torch.from_numpy(rows))
        self._position.zero_()
        self._step.fill_(start)
        for _ in range(count):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._body()
        return mean_over_ranks(self._record[:count].clone(), self.world).cpu()

    def _body(self) -> None:
        rows = self._rows.index_select(0, self._position)[0]
        accumulation = self.config.accumulation
        self.optimizer.zero_grad()
        sums = torch.zeros(3, device=self.device)
        for index, micro_rows in enumerate(rows.chunk(accumulation)):
            last = index == accumulation - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self._loss.no_sync():  # type: ignore[operator]
                loss, cross_entropy, entropy = self._loss(micro_rows)
                (loss / accumulation if accumulation > 1 else loss).backward()
            sums += torch.stack([loss.detach(), cross_entropy, entropy]) / accumulation
        norm, scale = self.optimizer.grad_norm_and_scale()
        if self.device.type == "cpu" and not math.isfinite(float(norm)):
            names = self.optimizer.non_finite()
            raise NonFiniteGradientError(
                f"the gradient of {', '.join(names[:3]) or 'the model'} holds NaN or Inf"
            )
        self.optimizer.step(self._table.index_select(0, self._step)[0], scale)
        self._record.index_copy_(0, self._position, torch.cat([sums, norm.reshape(1)])[None])
        self._position += 1
        self._step += 1

    def _capture(self) -> None:
        """Captures :meth:`_body`; the warm-up's effects on parameters and moments are undone."""
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
        self._position.zero_()
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._body()
        self._graph = graph
