"""Which settings of transformers.TrainingArguments a run may make, and what decides the others.

Most of them are safe: speed, precision, logging, checkpoints. The others would be overruled, do nothing, or break what
a job promises, the order of facts for one. Names that are in neither table are refused too, so a new version of
transformers brings nothing in unseen.
"""

import difflib
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Of every job.
FREE = _set("""
    gradient_accumulation_steps average_tokens_across_devices max_grad_norm torch_empty_cache_steps full_determinism
    bf16 fp16 tf32 use_cpu torch_compile torch_compile_backend torch_compile_mode
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm include_num_input_tokens_seen report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id debug skip_memory_metrics
    save_strategy save_steps save_total_limit save_on_each_node
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
""")

# Of these jobs only.
OF_JOB = {
    "pretrain": _set("""
        adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha dataloader_drop_last train_sampling_strategy
    """),
    "pretrain_text": _set("""
        adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha eval_strategy eval_steps eval_delay eval_on_start
        per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better
    """),
    "retrofit": _set("""
        adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha dataloader_drop_last eval_strategy eval_steps eval_delay
        eval_on_start per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better
    """),
    "learn": _set(""),
}

# What decides the settings that some job or every job refuses.
_DECIDING = {
    "it follows from output": "output_dir",
    "it follows from seed": "seed data_seed",
    "it follows from job": "do_train do_eval do_predict",
    "it follows from the job's learning_rate: pretrain, retrofit or learn": "learning_rate",
    "it follows from pretrain.weight_decay, retrofit.weight_decay or learn.method": "weight_decay",
    "it follows from pretrain.warmup_steps or retrofit.warmup_steps, and learn does not warm up": "warmup_steps",
    "rates of pretrain and retrofit warm up and fall along a cosine, that of learn is constant": """
        lr_scheduler_type lr_scheduler_kwargs""",
    "the optimizer follows from the job: AdamW by rows in pretrain and retrofit, that of learn.method in learn": """
        optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon""",
    "the steps follow from pretrain.steps or pretrain.tokens, retrofit.steps or learn.steps_per_fact": """
        max_steps num_train_epochs""",
    "the batch follows from pretrain.batch_size, retrofit.batch_size, or learn.statements and learn.questions": """
        per_device_train_batch_size auto_find_batch_size""",
    "batches follow from the job: facts in the order of their file, text in an order that seed gives": """
        train_sampling_strategy dataloader_drop_last dataloader_in_order accelerator_config ignore_data_skip""",
    "it follows from the columns that batches are made of": "remove_unused_columns label_names length_column_name",
    "the loss is the plain cross entropy, by which forgetting is measured too": "label_smoothing_factor",
    "the reads of noisy inputs would choose the rows": "neftune_noise_alpha",
    "evaluations are as precise as training, and no weight is rounded for them": "bf16_full_eval fp16_full_eval",
    "Liger does not know models with memory": "use_liger_kernel liger_kernel_config",
    "nothing is generated in training": "use_cache",
    "only jobs pretrain_text and retrofit measure a validation loss while they train": """
        eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end
        metric_for_best_model greater_is_better""",
    "an evaluation measures the loss and nothing else": """
        prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics""",
    "a run goes on by itself from the newest checkpoint in its output, with all that belongs to it": """
        resume_from_checkpoint save_only_model restore_callback_states_from_checkpoint""",
    "checkpoints follow from trainer.save_strategy and trainer.save_steps": "enable_jit_checkpoint",
    "the finished output is what to publish, not the checkpoints of a run": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "it would split memory tables by rows, which memlayer cannot train; table.shards splits them by columns, and "
    "memlayer.decoders.sharding the rest in a loop of your own": "fsdp fsdp_config deepspeed parallelism_config",
    "whatever launches the processes sets it": "local_rank",
}
DECIDED = {name: reason for reason, names in _DECIDING.items() for name in names.split()}

_SETTABLE = FREE.union(*OF_JOB.values())
TYPES: dict[str, Any] = {
    name: hint for name, hint in get_type_hints(TrainingArguments).items() if name in _SETTABLE
} | {"bf16": bool | Literal["auto"]}


def check_trainer(job: str, settings: dict[str, Any]) -> None:
    """Refuse a setting that the job does not leave open.

    Raises:
        ValueError: another setting decides it, it would do nothing, or there is none of that name.
    """
    for name in settings:
        if name in FREE or name in OF_JOB[job]:
            continue
        if name in DECIDED:
            raise ValueError(f"trainer.{name} cannot be set in job {job}: {DECIDED[name]}")
        near = difflib.get_close_matches(name, sorted(FREE | OF_JOB[job]), n=1)
        hint = f"; did you mean trainer.{near[0]}?" if near else ""
        raise ValueError(f"trainer.{name} is no setting of transformers.TrainingArguments that is known here{hint}")


def check_reporters(asked: str | list[str] | None) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        ValueError: the package is missing, or there is no such tracker.
    """
    there = get_available_reporting_integrations()
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name in ("none", "all") or name in there:
            continue
        if name in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"trainer.report_to is {name!r}, but its package is not installed")
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ValueError(f"trainer.report_to is {name!r}, must be none, all or some of {known}")
