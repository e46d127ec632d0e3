"""AdamW for a model with memory tables: a table moves only in the rows that were read.

Parameters with a dense gradient take torch's own AdamW step. A sparse gradient (a table's) is applied to
its rows alone: a row that was not read keeps its value, its moments and its step count, so a step costs
in proportion to the reads and not to the table. A table has a sparse gradient while its ``sparse`` is True:
MemoryTrainer and methods/full.py, which build this optimizer, see to that.
"""

import torch

from memlayer_kernels.rows import adam_rows_, sparse_rows


class RowAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that also takes sparse gradients, row by row and without weight decay.

    Its dense steps are fused unless ``fused`` or ``foreach`` is given: they then take 2.0 ms
    instead of 6.9 on one thread of a processor with AVX2 (docs/lab-log.md).

    State of a table: ``exp_avg`` and ``exp_avg_sq`` of its shape in float32 or better, and ``step``, float32,
    one count per slot, so that a row's bias correction counts its own steps.

    Raises:
        ValueError: (from ``step``) a sparse gradient meets a weight decay, amsgrad or maximize.
    """

    def __init__(self, params, *args, **settings):
        super().__init__(params, *args, **({"fused": not settings.get("foreach")} | settings))
        self._step_supports_amp_scaling = False  # a GradScaler would leave it to the fused step, which sees no rows

    @torch.no_grad()
    def step(self, closure=None):
        """One step; see torch.optim.Optimizer.step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for group, _, _ in sparse:
            _refuse_what_moves_unread_rows(group)
        for _, parameter, _ in sparse:
            parameter.grad = None
        super().step()
        for group, parameter, gradient in sparse:
            self._step_rows(group, parameter, gradient)
            parameter.grad = gradient
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """See torch.optim.Optimizer.load_state_dict, which would round a bfloat16 table's float32 moments."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, state in zip(parameters, saved, strict=True):
            if state and state["step"].ndim:  # a table: counts per slot
                self.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in state.items()}

    def _step_rows(self, group: dict, table: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        state = self.state[table]
        if not state:
            dtype = torch.promote_types(table.dtype, torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(table, dtype=dtype) for _ in range(2))
            state["step"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        adam_rows_(
            table,
            *sparse_rows(gradient),
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            float(group["lr"]),
            *group["betas"],
            group["eps"],
        )


def _refuse_what_moves_unread_rows(group: dict) -> None:
    if group["weight_decay"] or group["amsgrad"] or group["maximize"]:
        raise ValueError(
            f"a sparse gradient takes no weight_decay ({group['weight_decay']}), amsgrad ({group['amsgrad']}) "
            f"or maximize ({group['maximize']}): they would move rows that were not read"
        )
