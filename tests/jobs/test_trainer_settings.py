"""Every setting of TrainingArguments is either free or decided by something that its refusal names."""

import dataclasses

import pytest
from transformers import TrainingArguments

from memlayer.jobs.config import LearnRun
from memlayer.jobs.trainer_settings import DECIDED, FREE, OF_JOB, TYPES, check_trainer

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def test_the_tables_hold_every_setting_of_this_version_of_transformers_and_no_other():
    assert FREE | DECIDED.keys() == FIELDS
    assert not FREE & DECIDED.keys()
    assert FREE.union(*OF_JOB.values()) == TYPES.keys()


@pytest.mark.parametrize("job", OF_JOB)
def test_a_job_takes_what_it_leaves_open_and_refuses_the_rest_with_what_decides_it(job):
    assert OF_JOB[job] <= DECIDED.keys(), "what one job leaves open another decides"
    for name in sorted(FIELDS):
        if name in FREE | OF_JOB[job]:
            check_trainer(job, {name: None})
        else:
            with pytest.raises(ValueError) as refused:
                check_trainer(job, {name: None})
            assert str(refused.value) == f"trainer.{name} cannot be set in job {job}: {DECIDED[name]}"


@pytest.mark.parametrize(
    "name",
    [
        "optim",
        "weight_decay",
        "adam_beta1",
        "lr_scheduler_type",
        "resume_from_checkpoint",
        "train_sampling_strategy",
        "num_train_epochs",
        "eval_strategy",
    ],
)
def test_learning_refuses_what_would_do_nothing_or_break_the_order_of_facts(name):
    with pytest.raises(ValueError, match=f"trainer.{name} cannot be set in job learn: "):
        LearnRun(output="out", checkpoint="base", trainer={name: "x"})


def test_a_setting_that_transformers_does_not_have_is_refused_with_what_may_be_meant():
    with pytest.raises(ValueError, match=r"max_grad_nrom is no setting .* did you mean trainer\.max_grad_norm"):
        check_trainer("learn", {"max_grad_nrom": 1.0})
