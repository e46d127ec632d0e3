"""Features are the mean over an example's own tokens, whatever it is padded with."""

import tiny
import torch
from training import examples

from memlayer.methods.features import mean_hidden_states


def test_features_are_the_mean_of_what_the_head_reads():
    model, told = tiny.memory_model().train(), examples(5)
    found = torch.from_numpy(mean_hidden_states(model, told, tiny.PAD, batch_size=2))
    assert found.shape == (5, tiny.WIDTH)
    assert model.training
    model.eval()
    for example, features in zip(told, found):
        out = model(torch.tensor([example["input_ids"]]), output_hidden_states=True)
        torch.testing.assert_close(out.hidden_states[-1][0].mean(0).double(), features, atol=1e-5, rtol=1e-5)  # float32
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


def test_of_no_examples_there_are_no_features():
    assert mean_hidden_states(tiny.decoder(), [], tiny.PAD).shape == (0, tiny.WIDTH)
