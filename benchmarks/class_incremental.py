"""python benchmarks/class_incremental.py --digits digits.csv.gz --output runs/class_incremental.jsonl
python benchmarks/class_incremental.py --texts articles.jsonl --encoder runs/stories --output runs/classes.jsonl

Does MIST's choice of numbers help a frozen-feature classifier that learns classes task after task? A factorial of

    selector    infonce (MIST's), fisher (cross-entropy), magnitude, random: 5 % of each matrix; dense: all of it
    objective   infonce, ce: what the chosen numbers are tuned on, at the start of every task
    drop        0, 0.9: share of them that a step leaves out

with the same steps, batches and two views for all, on two hosts (SimpleCIL, RanPAC) over paired seeds, each of which
draws class order, split and views. Beside it: frozen (no tuning), and two that tune before the first task alone. Each
condition and host has the rate of one grid that comes out best on a stream of another seed or, with --gain, the lowest
that learns new classes so much better there than frozen: what was forgotten is then compared at about equal learning. A
rate at the grid's edge is marked, and what each does on that stream is printed, for most is a matter of step size.

Images are scikit-learn's digits, read from the file it ships (sklearn/datasets/data/digits.csv.gz), or, without
--digits, drawn shapes; their encoder is a perceptron, which says nothing of a vision transformer. Texts are articles
with their subjects, and their encoder is any decoder. See class_streams.py.

Every finished run is a line of --output, so the same command goes on after a kill.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from class_streams import Images, Texts, drawn_shapes, read_digits
from report import finish
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.methods.class_incremental import RanPAC, SimpleCIL
from memlayer.methods.infonce import supervised_infonce
from memlayer.methods.mist import tune
from memlayer.methods.sparse_mask import linear_weights, random_share, squared_gradients, top_share

HOSTS = ("simplecil", "ranpac")
SELECTORS, OBJECTIVES, DROPS = ("infonce", "fisher", "magnitude", "random", "dense"), ("infonce", "ce"), (0.0, 0.9)
FROZEN = ("frozen", "-", 0.0, "never")
CONDITIONS = [FROZEN, *((s, o, d, "every") for s in SELECTORS for o in OBJECTIVES for d in DROPS)]
CONDITIONS += [("infonce", "infonce", 0.9, "first"), ("dense", "infonce", 0.0, "first")]
DENSITY, BATCH, RANDOM_FEATURES = 0.05, 64, 200  # of each matrix, examples a step, and RanPAC's M
VALIDATION = 1000  # seed of the stream on which rates are chosen
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 95 %, by seeds


def main() -> None:
    options = parse_options()
    data = data_of(options)
    told = {"epochs": options.epochs, "data": data.digest}
    done = Done(options.output, told)

    def found(condition: tuple, rate: float, seed: int) -> dict:
        return done.get(condition, rate, seed, data, options.epochs)

    of = options.texts or options.digits
    figures = {"data": of.name if of else "drawn shapes", **data.told, "rows": []}
    tried = {condition: [0.0] if condition == FROZEN else sorted(options.rates) for condition in CONDITIONS}
    validation = {key: [found(key, rate, VALIDATION) for rate in rates] for key, rates in tried.items()}
    for host in HOSTS:
        enough = math.inf if options.gain is None else validation[FROZEN][0][f"{host}_new"] + options.gain / 100
        rates = {key: tried[key][chosen(host, runs, enough)] for key, runs in validation.items()}
        rows = {key: [found(key, rate, seed) for seed in range(options.seeds)] for key, rate in rates.items()}
        show(host, rows, rates, validation, tried)
        figures["rows"] += summary(host, rows, rates)
    finish("class_incremental", {**figures, "seeds": options.seeds, "gain": options.gain})


def data_of(options: argparse.Namespace) -> Images | Texts:
    if options.texts is None:
        return Images(*(read_digits(options.digits) if options.digits else drawn_shapes()))
    try:
        return Texts(options.texts, options.encoder, options.length)
    except (OSError, ValueError) as error:
        sys.exit(f"class_incremental.py: {error}")


def chosen(host: str, runs: list[dict], enough: float) -> int:
    """Of runs in the order of their rates: the first that learns new classes well enough, else the best at the end."""
    reaching = [number for number, each in enumerate(runs) if each[f"{host}_new"] >= enough]
    merits = [each[f"{host}_last"] for each in runs]
    return reaching[0] if reaching else merits.index(max(merits))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="scikit-learn's digits.csv.gz (default: drawn shapes)")
    parser.add_argument("--texts", type=Path, help="JSON Lines of articles, each with a text and its subjects")
    parser.add_argument("--encoder", type=Path, help="folder of the decoder that reads them, and its tokenizer")
    parser.add_argument("--length", type=int, default=64, help="tokens of a view of a text (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where finished runs are kept, a line each (default: nowhere)")
    parser.add_argument("--seeds", type=int, default=5, help="streams to report on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes of tuning a task (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1], help="of the tuning")
    parser.add_argument(
        "--gain", type=float, help="points of A_tt above frozen at which to compare (default: best A_T)"
    )
    options = parser.parse_args()
    if options.seeds not in T_QUANTILE:
        parser.error(f"--seeds is {options.seeds}, must be between 2 and 10")
    if options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}, must be at least 1")
    if options.length < 1:
        parser.error(f"--length is {options.length}, must be at least 1")
    if options.digits and options.texts:
        parser.error("--digits and --texts: name one")
    if bool(options.texts) != bool(options.encoder):
        parser.error("--texts and --encoder go together")
    for name in ("digits", "texts"):
        path = getattr(options, name)
        if path and not path.is_file():
            parser.error(f"--{name} is {path}: there is no such file")
    if options.encoder and not options.encoder.is_dir():
        parser.error(f"--encoder is {options.encoder}: there is no such folder")
    return options


class Done:
    """The runs that are finished, in memory and in a file."""

    def __init__(self, path: Path | None, told: dict):
        self.path, self.told, self._found = path, told, {}
        if path is None or not path.is_file():
            return
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
        if torn:  # a kill cut it short
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        for record in map(json.loads, lines):
            if record["told"] != told:
                sys.exit(f"{path} holds runs of other data or epochs: name another --output")
            self._found[tuple(record["condition"]), record["rate"], record["seed"]] = record["found"]

    def get(self, condition: tuple, rate: float, seed: int, *given) -> dict:
        key = (condition, rate, seed)
        if key not in self._found:
            self._found[key] = run(condition, rate, seed, *given)
            if self.path is not None:
                record = {"told": self.told, "condition": condition, "rate": rate, "seed": seed}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record | {"found": self._found[key]}) + "\n")
        return self._found[key]


class Stream:
    """The classes of some data in the order of a seed, each split into what is learned and what is asked."""

    def __init__(self, data: Images | Texts, seed: int):
        draws = torch.Generator().manual_seed(seed)
        self.order, self._data = torch.randperm(len(data.of_class), generator=draws).tolist(), data
        self._of_class = {}
        for label in self.order:
            mine = data.of_class[label]
            self._of_class[label] = mine[torch.randperm(len(mine), generator=draws)]

    def examples(self, classes: list[int], train: bool) -> tuple[Tensor, Tensor]:
        learned = self._data.train
        part = slice(learned) if train else slice(learned, learned + self._data.test)
        parts = [self._of_class[label][part] for label in classes]
        return torch.cat(parts), torch.cat([torch.full((len(p),), label) for p, label in zip(parts, classes)])


def run(condition: tuple, rate: float, seed: int, data: Images | Texts, epochs: int) -> dict:
    """One stream under one condition."""
    _, _, _, when = condition
    model = data.new_encoder()
    model.load_state_dict(data.encoder)
    torch.manual_seed(seed)
    stream, projection = Stream(data, seed), nn.Linear(data.width, 128)
    hosts = dict(zip(HOSTS, (SimpleCIL(), RanPAC(data.width, RANDOM_FEATURES, seed=seed)), strict=True))
    seen, found = [], {f"{host}_{kind}": [] for host in hosts for kind in ("all", "new")}
    moved: list[float] = []
    for task in range(data.tasks):
        classes = stream.order[task * data.per_task : (task + 1) * data.per_task]
        x, y = stream.examples(classes, train=True)
        if when == "every" or (when == "first" and not task):
            adapt(condition, data, model, projection, x, y, rate, epochs, seed * data.tasks + task, moved)
        seen += classes
        shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            features, (x_asked, y_asked) = model(x[shuffled]), stream.examples(seen, train=False)
            asked, of_new = model(x_asked), torch.isin(y_asked, torch.tensor(classes))
            for name, host in hosts.items():
                host.learn(features, y[shuffled])
                right = (host.predict(asked) == y_asked).float()
                found[f"{name}_all"].append(right.mean().item())
                found[f"{name}_new"].append(right[of_new].mean().item())
    with torch.no_grad():
        fresh, (x, y), (x_asked, y_asked) = SimpleCIL(), stream.examples(seen, True), stream.examples(seen, False)
        fresh.learn(model(x), y)
        recomputed = (fresh.predict(model(x_asked)) == y_asked).float().mean().item()
    scores = {f"{host}_last": found[f"{host}_all"][-1] for host in hosts}
    scores |= {f"{host}_mean": statistics.mean(found[f"{host}_all"]) for host in hosts}
    scores |= {f"{host}_new": statistics.mean(found[f"{host}_new"]) for host in hosts}
    state = model.state_dict()
    changed = sum(int((state[name] != tensor).sum()) for name, tensor in data.encoder.items())
    changed_share = changed / sum(tensor.numel() for tensor in data.encoder.values())
    step_share = statistics.mean(moved) if moved else 0.0
    return scores | {"simplecil_recomputed": recomputed, "step_share": step_share, "changed_share": changed_share}


def adapt(condition: tuple, data, model, projection, x, y, rate, epochs, seed, moved: list[float]) -> None:
    """Score, choose and tune for one task; the share of parameters that moved in each of the first steps is noted."""
    selector, objective, drop, _ = condition
    local = {label: number for number, label in enumerate(dict.fromkeys(y.tolist()))}
    y = torch.tensor([local[label] for label in y.tolist()])
    classifier = nn.Linear(data.width, data.per_task)
    last: list[Tensor] = []

    def losses(kind: str, watched: bool = False) -> Iterator[Tensor]:
        for part in torch.randperm(len(y), generator=draws).split(BATCH):
            if watched and len(moved) < 10:
                last.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
                if len(last) > 1:
                    moved.append((last[-1] != last[-2]).float().mean().item())
            both = torch.cat([data.views(x[part], draws), data.views(x[part], draws)])
            features, y_both = model(both), y[part].repeat(2)
            if kind == "infonce":
                yield supervised_infonce(projection(features), y_both)
            else:
                yield F.cross_entropy(classifier(features), y_both)

    draws = torch.Generator().manual_seed(seed)
    chosen = choose(selector, model, losses, seed)
    draws.manual_seed(seed + 1)  # so that all selectors tune on the same batches and views
    head = projection if objective == "infonce" else classifier
    head.zero_grad()
    tune(model, chosen, head, lambda: losses(objective, watched=True), epochs, rate, drop=drop, seed=seed)


def choose(selector: str, model: nn.Module, losses, seed: int) -> dict[str, Tensor]:
    weights = linear_weights(model)
    if selector == "dense":
        return {name: torch.arange(p.numel(), dtype=torch.int32) for name, p in weights.items()}
    if selector == "random":
        return random_share(weights, DENSITY, seed)
    if selector == "magnitude":
        return top_share({name: p.detach().abs() for name, p in weights.items()}, DENSITY)
    kind = "infonce" if selector == "infonce" else "ce"
    return top_share(squared_gradients(model, weights, losses(kind)), DENSITY)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t."""
    return statistics.mean(values), T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def summary(host: str, rows: dict, rates: dict) -> list[dict]:
    """For the last line: means over seeds, under the host's name."""
    names = ("host", "selector", "objective", "drop", "when", "rate")
    keys = (f"{host}_last", f"{host}_mean", f"{host}_new", "step_share", "changed_share")
    return [
        dict(zip(names, (host, *condition, rates[condition]), strict=True))
        | {key: statistics.mean(each[key] for each in found) for key in keys}
        for condition, found in rows.items()
    ]


def show(host: str, rows: dict, rates: dict, validation: dict, tried: dict) -> None:
    """A line a condition; differences in A_T are paired by seed."""
    print(f"\n{host}, in %: A_T on all classes after the last task, A_tt on new classes at their task, A their mean.")
    heads = ("A_T", "A_tt", "A", "step %", "moved %", "A_T - frozen", "A_T - random")
    print(
        f"{'selector objective drop when':33}{'rate':>7} "
        + "".join(f"{head:>13}" for head in heads)
        + "  A_tt/A_T by rate"
    )
    keys = (f"{host}_last", f"{host}_new", f"{host}_mean", "step_share", "changed_share")
    for condition, found in rows.items():
        selector, objective, drop, when = condition
        columns = [f"{100 * statistics.mean(each[key] for each in found):.1f}" for key in keys]
        for other in (FROZEN, ("random", objective, drop, when)):
            pairs = zip(found, rows.get(other, ()), strict=False)
            differences = [100 * (ours[keys[0]] - theirs[keys[0]]) for ours, theirs in pairs]
            shown = differences and other != condition
            columns.append("{:+.1f} ± {:.1f}".format(*interval(differences)) if shown else "")
        edge = "*" if rates[condition] in (tried[condition][0], tried[condition][-1]) and condition != FROZEN else " "
        by_rate = (f"{100 * each[keys[1]]:.0f}/{100 * each[keys[0]]:.0f}" for each in validation[condition])
        name = f"{selector:10}{objective:9}{drop:<5g}{when}"
        columns = "".join(f"{column:>13}" for column in columns)
        print(f"{name:33}{rates[condition]:>7g}{edge}{columns}  {' '.join(by_rate)}")
    print("* at the edge of the grid of rates; ±: 95 % interval; A_tt/A_T by rate is on the stream that chooses rates")


if __name__ == "__main__":
    main()
