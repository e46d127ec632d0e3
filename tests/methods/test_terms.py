"""What looks at the model before the first step says how far it has come."""

import pytest
import tiny
from training import examples

from memlayer.methods.features import mean_hidden_states
from memlayer.methods.neighbours import states_of
from memlayer.methods.ngram_regulariser import NGramRegulariser
from memlayer.methods.replay import Replay
from memlayer.methods.trust_region import TrustRegion

TOLD = examples(20)


@pytest.mark.parametrize(
    "look",
    [
        lambda model, heard: Replay(TOLD, tiny.PAD, batch_size=3, target="base").begin(model, heard),
        lambda model, heard: NGramRegulariser(TOLD, tiny.PAD, batch_size=3).begin(model, heard),
        lambda model, heard: TrustRegion([each["input_ids"] for each in TOLD]).begin(model, heard),
        lambda model, heard: mean_hidden_states(model, TOLD, tiny.PAD, batch_size=3, progress=heard),
        lambda model, heard: states_of(model, TOLD, heard),
    ],
    ids=["replay", "ngram", "trust_region", "features", "neighbours"],
)
def test_progress_names_every_example_once(look):
    heard = []
    look(tiny.decoder(), heard.append)
    assert len(heard) > 1
    assert sum(heard) == len({tuple(each["input_ids"]) for each in TOLD})
