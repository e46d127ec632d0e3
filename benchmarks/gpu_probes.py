"""What a table of kernels does not say: layers, decoding, training and fact steps, and peers, on one GPU.

Each measurement returns figures in seconds and bytes. With a dry clock all run on a CPU at sizes of a few dozen,
where a CUDA graph is left out and torch.compile stops before it makes code.

Shapes: T tokens, D model width, n half-keys, V value width.
"""

import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from clocks import Clock, free_bytes
from torch import Tensor, nn

from memlayer.decoders.attach import add_memory, memory_tables
from memlayer.layers.config import MemoryConfig
from memlayer.layers.memory import MemoryLayer, MemoryTable
from memlayer.layers.optimizer import RowAdamW
from memlayer.slots.counts import SlotCounts
from memlayer_kernels.ops import memory_lookup

REPEATS, STEP_REPEATS = 15, 5
HEADS, TOP_K, ROWS = 4, 32, 500
# Tokens of a pretraining batch, model width, half-keys, widths of values; tokens, layers and vocabulary of a decoder.
FULL = {"tokens": 32768, "width": 2048, "keys": 1024, "values": (1024, 2048), "step_tokens": 16384, "layers": 12}
DRY = {"tokens": 8, "width": 128, "keys": 8, "values": (16,), "step_tokens": 16, "layers": 2}


def measurements(clock: Clock) -> dict[str, Callable[[], dict]]:
    """All of them by name, what a first hour should know first."""
    sizes = DRY if clock.dry else FULL
    found = {}
    for value_width in sizes["values"]:
        found[f"layer beside SwiGLU, V={value_width}"] = lambda width=value_width: layer(clock, sizes, width)
    for tokens in (1, 16):
        found[f"decoding, T={tokens}"] = lambda tokens=tokens: decoding(clock, sizes, tokens)
    for with_memory in (False, True):
        name = f"training step {'with' if with_memory else 'without'} memory"
        found[name] = lambda with_memory=with_memory: training(clock, sizes, with_memory)
    for name, optimizer in (("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam)):
        found[f"fact step, {name}"] = lambda optimizer=optimizer: fact_step(clock, sizes, optimizer)
    for dtype in (torch.bfloat16, torch.float32):  # torch 2.11 has no bfloat16 gradient of embedding_bag's weights
        found[f"peers, {str(dtype)[6:]}"] = lambda dtype=dtype: peers(clock, sizes, dtype)
    return found


class SwiGLU(nn.Module):
    """The feed-forward block that a memory layer stands in for."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def make_layers(clock: Clock, sizes: dict, value_width: int) -> tuple[MemoryTable, MemoryLayer, SwiGLU]:
    """A table, its layer and the block, in bfloat16."""
    torch.manual_seed(0)
    with clock.device:
        table = MemoryTable(sizes["keys"] ** 2, value_width)
        memory = MemoryLayer(sizes["width"], table, sizes["keys"], HEADS, min(TOP_K, sizes["keys"]))
        block = SwiGLU(sizes["width"])
    return tuple(module.to(torch.bfloat16) for module in (table, memory, block))


def layer(clock: Clock, sizes: dict, value_width: int) -> dict:
    """Forward, and both ways with a dense and with a sparse gradient, beside the block; and which kernels ran."""
    table, memory, block = make_layers(clock, sizes, value_width)
    shape = sizes["tokens"], sizes["width"]
    hidden = torch.randn(shape, device=clock.device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(hidden)

    def both(module: nn.Module, *others: nn.Parameter) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(hidden), [hidden, *module.parameters(), *others], upstream)

    def sparse() -> tuple[Tensor, ...]:
        table.sparse = True
        try:
            return both(memory, table.weight)
        finally:
            table.sparse = False

    ways = {"memory": lambda: both(memory, table.weight), "memory_sparse": sparse, "swiglu": lambda: both(block)}
    ways |= {
        f"{name}_forward": without_gradient(module, hidden) for name, module in (("memory", memory), ("swiglu", block))
    }
    figures = timed(clock, ways, REPEATS)
    return figures | {"peak_bytes": peak(clock, ways["memory"]), "kernel_s": kernel_seconds(clock, ways["memory"])}


def without_gradient(module: nn.Module, hidden: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return module(hidden)

    return run


def timed(clock: Clock, ways: dict[str, Callable], repeats: int) -> dict:
    """NAME_s, on a GPU NAME_wall_s too, and the bandwidth of copies in between."""
    seconds, bandwidth = clock.medians(ways, repeats)
    return {f"{name}_s": span for name, span in seconds.items()} | {"copy_bytes_per_s": bandwidth}


def peak(clock: Clock, run: Callable) -> int | None:
    """Bytes that a run takes beyond what is held before it."""
    if clock.dry:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def kernel_seconds(clock: Clock, run: Callable) -> dict[str, float]:
    """Of the 25 longest kernels of one run."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if clock.dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as trace:
        run()
        if not clock.dry:
            torch.cuda.synchronize()
    spent = {event.key[:80]: event.self_device_time_total / 1e6 for event in trace.key_averages()}
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:25])


def decoding(clock: Clock, sizes: dict, tokens: int) -> dict:
    """One layer and the block on a few tokens: eager, compiled, and as a CUDA graph; wall is what a user waits."""
    _, memory, block = make_layers(clock, sizes, sizes["values"][0])
    hidden = torch.randn(tokens, sizes["width"], device=clock.device, dtype=torch.bfloat16)
    ways = {}
    for name, module in (("memory", memory), ("swiglu", block)):
        ways[name] = without_gradient(module, hidden)
        ways[f"{name}_compiled"] = without_gradient(
            torch.compile(module, backend="eager" if clock.dry else "inductor"), hidden
        )
        if not clock.dry:
            ways[f"{name}_graph"] = graph_of(ways[name])
    return timed(clock, ways, REPEATS)


def graph_of(run: Callable) -> Callable[[], None]:
    """Replays a CUDA graph of a run; what ran on a side stream before is the warm-up that capturing asks for."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def make_decoder(clock: Clock, sizes: dict, with_memory: bool) -> nn.Module:
    """A Llama of random weights in bfloat16, in whose middle block memory may stand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = sizes["width"]
    heads = max(1, width // 128)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=100 if clock.dry else 32000,
    )
    torch.manual_seed(0)
    with clock.device:
        model = LlamaForCausalLM(config)
        if with_memory:
            memory = MemoryConfig([sizes["layers"] // 2], num_keys=sizes["keys"], top_k=min(TOP_K, sizes["keys"]))
            add_memory(model, memory)
    return model.to(clock.device, torch.bfloat16)


def batch_of(clock: Clock, sizes: dict, model: nn.Module) -> dict[str, Tensor]:
    """Windows of 2,048 tokens."""
    length = min(2048, sizes["step_tokens"])
    shape = sizes["step_tokens"] // length, length
    tokens = torch.randint(model.config.vocab_size, shape, device=clock.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def training(clock: Clock, sizes: dict, with_memory: bool) -> dict:
    """A step of pretraining with activation checkpointing and RowAdamW."""
    model = make_decoder(clock, sizes, with_memory)
    model.train()
    model.gradient_checkpointing_enable()
    batch = batch_of(clock, sizes, model)
    for table in memory_tables(model).values() if with_memory else ():
        table.sparse = True
    optimizer = RowAdamW(model.parameters(), lr=1e-4, weight_decay=0.0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    figures = timed(clock, {"step": step}, STEP_REPEATS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return figures | {"peak_bytes": peak(clock, step), "tokens": sizes["step_tokens"], "parameters": parameters}


def fact_step(clock: Clock, sizes: dict, make_optimizer: type) -> dict:
    """A step of sparse memory finetuning on one window, and its forward pass alone."""
    try:  # the methods bring peft with them, which a machine that is lent may lack; all else here does without
        from memlayer.methods.sparse_memory import SparseMemoryFinetuner
    except ModuleNotFoundError as error:
        return {"skipped": f"{error}: carry it along in a folder on PYTHONPATH"}
    model = make_decoder(clock, sizes, with_memory=True)
    batch = batch_of(clock, {**sizes, "step_tokens": min(2048, sizes["step_tokens"])}, model)
    background = {}
    for name, table in memory_tables(model).items():
        background[name] = SlotCounts.empty(table.num_embeddings, "none")
        background[name].num_documents = 1000
    with warnings.catch_warnings():  # a tiny table has fewer slots than a step may change
        warnings.simplefilter("ignore")
        finetuner = SparseMemoryFinetuner(model, background, min(ROWS, sizes["keys"]))
        optimizer = finetuner.watch(make_optimizer(finetuner.parameters(), lr=1e-3))

        def step() -> None:
            finetuner.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        def forward() -> None:
            with torch.no_grad():
                model(**batch)

        return timed(clock, {"step": step, "forward": forward}, STEP_REPEATS)


def peers(clock: Clock, sizes: dict, dtype: torch.dtype) -> dict:
    """The lookup with both gradients, beside F.embedding_bag; and which other peers are not installed."""
    torch.manual_seed(0)
    slots_count, width, reads = sizes["keys"] ** 2, sizes["values"][0], HEADS * TOP_K
    if 6 * slots_count * width * dtype.itemsize > free_bytes(clock.device):
        return {"skipped": f"{slots_count} slots of {width} with gradients do not fit"}
    options = {"device": clock.device, "dtype": dtype}
    values = torch.randn(slots_count, width, **options, requires_grad=True)
    weights = torch.rand(sizes["tokens"], reads, **options, requires_grad=True)
    slots = torch.randint(slots_count, (sizes["tokens"], reads), device=clock.device)
    upstream = torch.randn(sizes["tokens"], width, **options)
    lookups = {
        "ours": lambda: memory_lookup(values, slots, weights),
        "embedding_bag": lambda: F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights),
    }
    ways, refused = {}, {}
    for name, lookup in lookups.items():

        def both(lookup: Callable = lookup) -> tuple[Tensor, ...]:
            return torch.autograd.grad(lookup(), (values, weights), upstream)

        ways[f"{name}_forward"] = lambda lookup=lookup: lookup().detach()
        try:
            both()
            ways[name] = both
        except (RuntimeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0]
    absent = [name for name in ("torchrec", "xformers") if importlib.util.find_spec(name) is None]
    return timed(clock, ways, REPEATS) | {"refused": refused, "not_installed": absent}
