"""A run stops at the first score that reaches the threshold, by epochs and by steps."""

from statistics import fmean

import pytest
import tiny
import torch
from training import examples, trainer_of

from memlayer.evaluation.memorisation import memorised
from memlayer.methods.ngram_stop import NGramStop


@pytest.mark.parametrize(("unit", "every", "stops_at"), [("epochs", 1, 6), ("epochs", 2, 8), ("steps", 3, 9)])
def test_the_run_stops_at_the_first_score_that_reaches_the_threshold(tmp_path, unit, every, stops_at):
    script = iter([0.0, 0.1, 0.3, 0.9] if every == 1 else [0.1, 0.2, 0.9] if every == 2 else [0.0, 0.1, 0.2, 0.3])
    stop = NGramStop(lambda _model: next(script), 0.2, every, unit)
    trainer = trainer_of(tiny.memory_model(mode="add"), tmp_path, examples(4), callbacks=[stop], num_train_epochs=9)
    trainer.train()
    assert trainer.state.global_step == stops_at  # of 2 steps an epoch
    assert stop.scores[-1] == (stops_at, pytest.approx(0.2 if every > 1 else 0.3))


def test_texts_are_not_learned_by_heart_where_the_score_stops_the_run(tmp_path):
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(4, tiny.VOCAB, (8, 20), generator=generator).tolist()
    data = [{"input_ids": text, "answer_start": 1, "length": 20} for text in texts]
    stop = NGramStop(lambda model: fmean(each.score for each in memorised(model, texts, 6)), 0.2)
    model = tiny.memory_model(mode="add")
    trainer = trainer_of(model, tmp_path, data, callbacks=[stop], num_train_epochs=60, learning_rate=0.01)
    trainer.train()
    assert trainer.state.global_step < 60 * 4
    assert [score >= 0.2 for _step, score in stop.scores] == [False] * (len(stop.scores) - 1) + [True]
    assert sum(each.verbatim for each in memorised(model, texts, 6)) <= 1


@pytest.mark.parametrize("settings", [{"threshold": 0}, {"threshold": 1.1}, {"every": 0}, {"unit": "hours"}])
def test_a_setting_outside_its_range_is_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        NGramStop(lambda _model: 0.0, **settings)
