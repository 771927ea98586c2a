"""What a device owes to the model runner (`workers/model/backend.py`), asked of every backend that can run here."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from membership.base.enums import Device, Exactness
from membership.base.errors import ConfigError, ModelError
from tests.support.filled_bank import FilledBank, gated
from tests.support.local_exchange import LocalExchange
from workers.model.attention_plan import StepPlan, plan_step
from workers.model.backend import Attention, AttentionSpec, Backend
from workers.model.calibrations import Calibrations
from workers.model.devices import BACKENDS, open_backend
from workers.model.expert_source import ExpertWeights
from workers.model.moe import MoeLayers
from workers.protocol.messages import SeqChunk

pytestmark = pytest.mark.unit

BLOCK_SIZE, BLOCKS, LONGEST, LAYERS = 16, 40, 256, 2
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
SHAPES = {  # key/value heads, query heads per key/value head, width of keys, of values
    "grouped heads": (2, 3, 16, 16),
    "latent": (4, 1, 40, 24),
    "one head for all": (1, 8, 32, 32),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as ranks have it


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        opened = open_backend(request.param)
    except ConfigError as absent:
        pytest.skip(str(absent))
    with closing(opened):
        yield opened


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed here is small, and is shared by several cores all the same, once a backend may use them."""
    monkeypatch.setattr("workers.model.cpu.compute_threads.LEAST", 0)
    monkeypatch.setattr("workers.model.cpu.attention.CACHED", 8000)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=list(SHAPES))
def sequences(request: pytest.FixtureRequest, backend: Backend, dtype: torch.dtype) -> Sequences:
    return Sequences(backend, SHAPES[request.param], dtype)


class Sequences:
    """Random queries, keys and values of some sequences, of which steps may show any part to an attention."""

    def __init__(self, backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.heads, self.group, self.key_width, self.value_width = shape
        self.backend, self.dtype = backend, dtype
        generator = torch.Generator().manual_seed(3)

        def some(heads: int, width: int) -> Tensor:
            """[sequence, layer, head, position, width]"""
            made = torch.randn(4, LAYERS, heads, LONGEST, width, generator=generator)
            return made.to(backend.device, dtype)

        self.queries = some(self.heads * self.group, self.key_width)
        self.keys, self.values = some(self.heads, self.key_width), some(self.heads, self.value_width)
        self.scaling = self.key_width**-0.5
        self.tables = dict(enumerate(self.shuffled(7)))

    def shuffled(self, seed: int) -> list[list[int]]:
        """Blocks for each of the four sequences, none twice."""
        blocks = random.Random(seed).sample(range(BLOCKS), BLOCKS)
        return [blocks[10 * seq : 10 * seq + 10] for seq in range(4)]

    def attention(self, exactness: Exactness = Exactness.INVARIANT) -> Attention:
        spec = AttentionSpec(
            LAYERS, self.group, self.key_width, self.value_width, LONGEST, BLOCKS, BLOCK_SIZE, self.dtype
        )
        try:
            return self.backend.attention(spec, exactness, Calibrations())
        except ModelError as refused:
            if self.backend.device.type == "cpu":
                raise
            pytest.skip(f"a backend is exact or says that it is not: {refused}")

    def chunk(self, seq: int, start: int, count: int) -> SeqChunk:
        return SeqChunk(seq, start, [0] * count, self.tables[seq])

    def expected(self, seq: int, layer: int, position: int, window: int | None = None) -> Tensor:
        """[heads, width] in float64, straight from the definition."""
        first = 0 if window is None else max(0, position + 1 - window)
        keys, values = (
            kept[seq, layer, :, first : position + 1].double().repeat_interleave(self.group, 0)
            for kept in (self.keys, self.values)
        )
        query = self.queries[seq, layer, :, position].double()
        weights = torch.softmax((query[:, None] * keys).sum(-1) * self.scaling, -1)
        return (weights[..., None] * values).sum(1)


class Steps:
    """Runs steps as the runner does, and keeps what came out for each (sequence, layer, position)."""

    def __init__(self, sequences: Sequences, attention: Attention) -> None:
        self.sequences, self.attention = sequences, attention
        self.found: dict[tuple[int, int, int], Tensor] = {}
        self.done: StepPlan | None = None

    def run(
        self, chunks: Sequence[SeqChunk], *, padding: int = 0, window: int | None = None, finite: bool = True
    ) -> None:
        rows = sum(len(c.tokens) for c in chunks)
        plan = plan_step(chunks, BLOCK_SIZE, rows + padding, self.sequences.backend.device, self.done)
        self.attention.plan = plan
        for layer in range(LAYERS):
            out = self._forward(chunks, layer, padding, window)
            assert out.shape[1] == rows + padding
            assert not finite or out.isfinite().all()
            for row, (seq, position) in enumerate(_places(chunks)):
                self.found[seq, layer, position] = out[0, row]
        self.attention.plan, self.done = None, plan

    def _forward(self, chunks: Sequence[SeqChunk], layer: int, padding: int, window: int | None) -> Tensor:
        packed = []
        for kept in (self.sequences.queries, self.sequences.keys, self.sequences.values):
            parts = [kept[c.seq, layer, :, c.start : c.start + len(c.tokens)] for c in chunks]
            packed.append(functional.pad(torch.cat(parts, 1), (0, 0, 0, padding), value=9.0)[None])
        return self.attention.forward(layer, *packed, self.sequences.scaling, window)


def _places(chunks: Sequence[SeqChunk]) -> list[tuple[int, int]]:
    return [(c.seq, c.start + i) for c in chunks for i in range(len(c.tokens))]


def prefill_and_decode(steps: Steps, seqs: Sequence[int], *, cut: int, window: int | None = None) -> None:
    """To 150 tokens in chunks of `cut`, then four tokens one by one; all sequences in each step."""
    for start in range(0, 150, cut):
        steps.run([steps.sequences.chunk(s, start, min(cut, 150 - start)) for s in seqs], window=window)
    for position in range(150, 154):
        steps.run([steps.sequences.chunk(s, position, 1) for s in seqs], window=window)


@pytest.mark.parametrize("exactness", list(Exactness))
@pytest.mark.parametrize("window", [None, 24])
def test_attention_is_what_its_definition_says(sequences: Sequences, exactness: Exactness, window: int | None) -> None:
    steps = Steps(sequences, sequences.attention(exactness))
    prefill_and_decode(steps, [0, 2, 3], cut=70, window=window)
    assert len(steps.found) == 3 * LAYERS * 154
    for (seq, layer, position), found in steps.found.items():
        expected = sequences.expected(seq, layer, position, window)
        assert found.dtype == sequences.dtype
        assert (found.double() - expected).abs().max() < TOLERANCE[sequences.dtype], (seq, layer, position)


@pytest.mark.usefixtures("spread")
def test_attention_is_exact_in_any_company(sequences: Sequences) -> None:
    """Bits of a sequence that runs alone in one piece: those of others beside it, of other cuts, blocks and padding,
    on several cores."""
    alone = Steps(sequences, sequences.attention())
    prefill_and_decode(alone, [1], cut=150)
    sequences.backend.use_cores(3)
    together = Steps(sequences, sequences.attention())
    sequences.tables = dict(enumerate(sequences.shuffled(8)))
    prefill_and_decode(together, [3, 1, 0, 2], cut=37)
    again = Steps(sequences, sequences.attention())
    again.run([sequences.chunk(1, 0, 9), sequences.chunk(0, 0, 1)], padding=6)
    again.run([sequences.chunk(0, 1, 60), sequences.chunk(1, 9, 145)], padding=1)
    for steps in (together, again):
        assert all(torch.equal(found, steps.found[place]) for place, found in alone.found.items())


def test_a_step_that_runs_again_changes_nothing(sequences: Sequences) -> None:
    once, twice = (Steps(sequences, sequences.attention()) for _ in range(2))
    for start, count in ((0, 20), (20, 1), (21, 1), (22, 5), (27, 1), (28, 1)):
        chunks = [sequences.chunk(seq, start, count) for seq in (0, 1)]
        once.run(chunks)
        twice.run(chunks)
        twice.done = None  # as after an attempt that failed
        twice.run(chunks)
    assert all(torch.equal(found, twice.found[place]) for place, found in once.found.items())


def test_blocks_can_have_another_owner(sequences: Sequences) -> None:
    """Nothing of the sequence that had the blocks before is seen by the next one."""
    steps = Steps(sequences, sequences.attention())
    prefill_and_decode(steps, [0], cut=150)
    sequences.tables[1] = sequences.tables[0]
    steps.run([sequences.chunk(1, 0, 40)])
    fresh = Steps(sequences, sequences.attention())
    fresh.run([sequences.chunk(1, 0, 40)])
    assert all(torch.equal(found, steps.found[place]) for place, found in fresh.found.items())


@pytest.mark.usefixtures("spread")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # Triton's interpreter's maximum
@pytest.mark.parametrize(
    ("part", "wrong", "window"),
    [
        ("values", torch.inf, None), ("values", torch.nan, 24), ("keys", torch.nan, None), ("keys", torch.nan, 24),
        ("keys", torch.inf, None), ("keys", 3e38, None), ("queries", torch.inf, None),
    ],
)  # fmt: skip
def test_what_is_not_finite_concerns_only_those_who_see_it(
    sequences: Sequences, part: str, wrong: float, window: int | None
) -> None:
    """Not another request in the same tile or product, nor earlier tokens of its own prompt, another head, or those
    that get its blocks later. A key that is finite, and large, gives products that are not.
    """

    def found(cores: int) -> Steps:
        sequences.backend.use_cores(cores)
        steps = Steps(sequences, sequences.attention())
        for start, count in ((0, 20), (20, 130), (150, 1), (151, 1), (152, 1)):
            steps.run([sequences.chunk(s, start, count) for s in (0, 1)], window=window, finite=False)
        sequences.tables[2] = sequences.tables[1]
        for start, count in ((0, 20), (20, 1), (21, 1)):
            steps.run([sequences.chunk(s, start, count) for s in (2, 3)], window=window, finite=False)
        return steps

    right = found(1)
    getattr(sequences, part)[1, 0, 0, 60, 3] = wrong
    heads = slice(1 if part == "queries" else sequences.group)
    for cores in (1, 3):
        for (seq, layer, position), one in found(cores).found.items():
            expected, place = right.found[seq, layer, position], (seq, layer, position)
            last = 60 if part == "queries" else 59 + (window or LONGEST)
            sees = seq == 1 and layer == 0 and 60 <= position <= last
            assert torch.equal(one[heads.stop if sees else 0 :], expected[heads.stop if sees else 0 :]), place
            if sees and (part == "values" or wrong != wrong):
                assert one[heads].isnan().all(), place


def test_copied_blocks_are_the_same_tokens(sequences: Sequences) -> None:
    source, target = (Steps(sequences, sequences.attention()) for _ in range(2))
    assert source.attention.cache.block_bytes == 0
    prefill_and_decode(source, [0], cut=150)
    target.run([sequences.chunk(2, 0, 30)])
    there, here = source.attention.cache, target.attention.cache
    assert here.block_bytes == there.block_bytes > 0
    used = sequences.tables[0]
    sequences.tables[1] = [block for block in range(BLOCKS) if block not in sequences.tables[2]][:10]
    room = memoryview(bytearray(len(used) * there.block_bytes + 64))
    there.copy_out(used, room)
    here.copy_in(sequences.tables[1], room)
    source.run([sequences.chunk(0, 154, 3)])
    for kept in (sequences.queries, sequences.keys, sequences.values):
        kept[1] = kept[0]
    target.run([sequences.chunk(1, 154, 3), sequences.chunk(2, 30, 1)])
    for layer in range(LAYERS):
        for position in range(154, 157):
            assert torch.equal(source.found[0, layer, position], target.found[1, layer, position])


def test_attention_belongs_to_a_step(backend: Backend) -> None:
    sequences = Sequences(backend, SHAPES["grouped heads"], torch.float32)
    steps = Steps(sequences, sequences.attention())
    with pytest.raises(ModelError, match="outside of a step"):
        steps._forward([sequences.chunk(0, 0, 1)], 0, 0, None)


def gate(both: Tensor) -> Tensor:
    left, right = both.chunk(2, -1)
    return functional.silu(left) * right


def experts(backend: Backend, dtype: torch.dtype, count: int, hidden: int = 64, inner: int = 96) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(backend.device, dtype)

    return [ExpertWeights(matrix(2 * inner, hidden).t(), matrix(hidden, inner).t()) for _ in range(count)]


def of_expert(weights: ExpertWeights, rows: Tensor) -> Tensor:
    return gate(rows.double() @ weights.gate_up.double()) @ weights.down.double()


@pytest.mark.parametrize("exactness", list(Exactness))
def test_experts_products(backend: Backend, dtype: torch.dtype, exactness: Exactness) -> None:
    held = experts(backend, dtype, 3)
    products = backend.expert_products(gate, exactness, Calibrations())
    for weights in held:
        products.calibrate(weights)
    counts = [2, 150, 17]
    sizes = [products.padded(count) for count in counts]
    assert all(size >= count for size, count in zip(sizes, counts, strict=True))
    rows = torch.randn(sum(sizes), 64, generator=torch.Generator().manual_seed(6)).to(backend.device, dtype)
    found = products.compute(held, sizes, rows)
    assert (found.shape, found.dtype) == (rows.shape, dtype)
    parts = zip(held, rows.split(sizes), found.split(sizes), strict=True)
    for weights, given, out in parts:
        assert (out.double() - of_expert(weights, given)).abs().max() < TOLERANCE[dtype]


@pytest.mark.usefixtures("spread")
def test_experts_products_are_exact_for_any_number_of_rows(backend: Backend, dtype: torch.dtype) -> None:
    held = experts(backend, dtype, 3)
    products = backend.expert_products(gate, Exactness.INVARIANT, Calibrations())
    for weights in held:
        products.calibrate(weights)
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(6)).to(backend.device, dtype)

    def outputs(which: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
        sizes = [products.padded(len(part)) for part in parts]
        filled = [functional.pad(p, (0, 0, 0, size - len(p)), value=3.0) for p, size in zip(parts, sizes, strict=True)]
        found = products.compute([held[i] for i in which], sizes, torch.cat(filled)).split(sizes)
        return [out[: len(part)] for out, part in zip(found, parts, strict=True)]

    alone = torch.cat([outputs([1], [row[None]])[0] for row in rows])
    for count in (2, 3, 5, 8, 13, 16, 31, 64, 100, 129, 300):
        assert torch.equal(outputs([1], [rows[:count]])[0], alone[:count]), count
        assert torch.equal(outputs([1], [rows[-count:].flip(0)])[0], alone[-count:].flip(0)), count
        for cores in (1, 3):
            backend.use_cores(cores)
            beside = outputs([0, 1, 2], [rows[:7], rows[:count], rows[:1]])
            assert torch.equal(beside[1], alone[:count]), (count, cores)


class Norm(nn.Module):
    """As the models have it: computes in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden.dtype)


class Dense(nn.Module):
    """The kinds of modules that models have outside of attention and experts, a narrow router among them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(256)
        self.gate_proj, self.up_proj = nn.Linear(256, 512, bias=False), nn.Linear(256, 512, bias=True)
        self.down_proj, self.router = nn.Linear(512, 256, bias=False), nn.Linear(256, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        mixed = self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return torch.cat((hidden + mixed, torch.softmax(self.router(mixed), -1)), -1)


@pytest.mark.usefixtures("spread")
@torch.inference_mode()
def test_products_and_norms_of_a_model_can_be_made_exact(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = Dense().to(backend.device, dtype)
    rows = torch.randn(1, 300, 256).to(backend.device, dtype)
    before = model(rows)
    backend.fuse(model)
    tiles = backend.make_invariant(model, Calibrations())

    def outputs(given: Tensor) -> Tensor:
        count = given.shape[1]
        padding = tiles.padded(count) - count
        assert padding >= 0
        return model(functional.pad(given, (0, 0, 0, padding), value=3.0))[:, :count]

    alone = torch.cat([outputs(rows[:, i : i + 1]) for i in range(300)], 1)
    backend.use_cores(3)
    assert (alone.float() - before.float()).abs().max() < TOLERANCE[dtype]
    for count in (2, 3, 5, 8, 13, 16, 31, 64, 100, 129, 300):
        assert torch.equal(outputs(rows[:, :count]), alone[:, :count]), count
        assert torch.equal(outputs(rows[:, -count:].flip(1)), alone[:, -count:].flip(1)), count


class Elsewhere:
    """Routed experts that double what they get, far from the device."""

    def stays(self) -> bool:
        return False

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]"""
        assert topk_ids.shape == topk_weights.shape == (len(hidden), 2)
        return (hidden.cpu() * 2 + layer).to(hidden.device)


class TinyModel:
    """Two layers of attention and routed experts: enough of a model to be captured."""

    def __init__(self, backend: Backend) -> None:
        generator = torch.Generator().manual_seed(2)
        self.table = torch.randn(50, 3, 4, 16, generator=generator).to(backend.device)  # token, what, head, width
        spec = AttentionSpec(LAYERS, 1, 16, 16, LONGEST, BLOCKS, BLOCK_SIZE, torch.float32)
        self.attention = backend.attention(spec, Exactness.STOCK, Calibrations(None, "tiny"))
        self.moe = MoeLayers(LAYERS, 4)
        self.moe.exchange = Elsewhere()

    def step(self, plan: StepPlan) -> Tensor:
        """Hidden states [plan.padded, 64]."""
        self.attention.plan = plan
        hidden = self.table.index_select(0, plan.tokens[0])
        ids = plan.tokens[0][:, None].remainder(4).expand(-1, 2)
        out = hidden[:, 0].flatten(1)
        for layer in range(LAYERS):
            query, key, value = hidden.permute(1, 2, 0, 3)[:, None]
            seen = self.attention.forward(layer, query * (layer + 1), key, value, 0.25, None)
            out = self.moe.forward(layer, out + seen[0].flatten(1) * (plan.positions[0][:, None] + 1), ids, ids.float())
        self.attention.plan = None
        return out


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_threads_compute_on_the_gpu_of_their_rank() -> None:
    """A rank loads in a thread of its own, which begins on the first GPU."""
    found: list[object] = []

    def compute() -> None:
        backend.enter_thread()
        try:
            with torch.inference_mode():
                found.append(TinyModel(backend).step(plan_step([chunk], BLOCK_SIZE, 4, backend.device)).device)
        except Exception as error:  # noqa: BLE001 - compared below
            found.append(error)

    backend = open_backend("cuda:1")
    chunk = SeqChunk(0, 0, [3, 4, 5], [2])
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join(60)
    assert found == [torch.device("cuda:1")]


@torch.inference_mode()
def test_a_captured_step_follows_its_plan(backend: Backend) -> None:
    """Prefill, decode of one to four sequences that come and go, and contexts that grow: as without."""
    _follows_its_plan(backend, TinyModel(backend), TinyModel(backend))


@torch.inference_mode()
def test_a_captured_step_of_a_rank_with_all_experts_follows_its_plan(backend: Backend) -> None:
    """Also where the experts lie elsewhere in memory after a while, or are not all here."""
    bank = FilledBank(backend, LAYERS, 4, 64)
    model, plain = TinyModel(backend), TinyModel(backend)
    model.moe.exchange = plain.moe.exchange = LocalExchange(bank)
    model.moe.local = backend.local_experts(bank, gated, (LAYERS, 4))
    if model.moe.local is None:
        pytest.skip("rows leave no device here")
    stayed = set()

    def change(turn: int) -> None:
        stayed.add(model.moe.on_device is not None)
        if turn == 20:
            weights = bank.weights(1, 2)
            bank.put(1, 2, ExpertWeights(weights.gate_up.t().clone().t() * 2, weights.down.t().clone().t()))
        model.moe.local = None if 30 <= turn < 40 else local

    local = model.moe.local
    _follows_its_plan(backend, model, plain, change)
    assert stayed == {True, False}


def _follows_its_plan(
    backend: Backend, model: TinyModel, plain: TinyModel, change: Callable[[int], None] = lambda turn: None
) -> None:
    captured = backend.capture(model.step, model.attention, model.moe)
    blocks = {seq: list(range(10 * seq, 10 * seq + 10)) for seq in range(4)}
    length = dict.fromkeys(blocks, 0)
    order = random.Random(4)
    for turn in range(60):
        picked = order.sample(sorted(blocks), order.choice((1, 2, 3, 4)))
        many = [1 if turn % 5 else order.randint(1, 8) for _ in picked]
        chunks = [
            SeqChunk(seq, length[seq], [order.randrange(50) for _ in range(count)], blocks[seq])
            for seq, count in zip(picked, many, strict=True)
        ]
        for seq, count in zip(picked, many, strict=True):
            length[seq] = (length[seq] + count) % 150
        rows = sum(many)
        tiled = model.attention.tiled
        plan, again = (plan_step(chunks, BLOCK_SIZE, -(-rows // 4) * 4, backend.device, tiled=tiled) for _ in "ab")
        change(turn)
        for moe in (model.moe, plain.moe):
            moe.begin(rows)
        assert torch.equal(captured(plan)[:rows], plain.step(again)[:rows]), turn
        assert model.moe.take_load().tolist() == plain.moe.take_load().tolist(), turn


def test_fingerprints_distinguish_arithmetics(backend: Backend) -> None:
    names = [backend.fingerprint(kind) for kind in DTYPES]
    assert names == [backend.fingerprint(kind) for kind in DTYPES]
    assert len(set(names)) == len(DTYPES)


@pytest.mark.parametrize("stored", [*DTYPES, torch.float16], ids=str)
def test_there_is_a_type_to_compute_in(backend: Backend, stored: torch.dtype) -> None:
    chosen = backend.compute_dtype(stored)
    rows = torch.ones(2, 4, dtype=chosen, device=backend.device)
    assert (rows @ rows.t()).tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert stored == torch.float16 or chosen == stored


def test_every_device_has_a_backend() -> None:
    assert set(BACKENDS) == set(Device) - {Device.AUTO}
    assert open_backend(Device.AUTO).device.type in BACKENDS
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        open_backend("tpu")


def test_a_gpu_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_backend(Device.AUTO).device.type == "cpu"
    for wanted in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="there is none"):
            open_backend(wanted)
