"""A scan inside a Ray job: four actors, the forces of td.scan."""

import pyarrow as pa
import pytest

import tokdyn as td
from tokdyn.integrations.ray import ScanBatches, scan
from tokdyn.loading import load_tokenizer
from tokdyn.objectives import DPO
from tokdyn.testing import tiny

TEXTS = [
    {"id": f"pair-{n}", "prompt": f"Where is the {a}?", "chosen": " On the mat." + " Yes." * n, "rejected": " Here, I think."}
    for n, a in enumerate(["cat", "dog", "bird", "fish", "bread", "mouse", "horse", "cow"])
]


def model():
    return tiny("llama", vocabulary=4096), load_tokenizer("demo")


def observe(tokenizer):
    return td.probes.load(tokenizer, TEXTS[:2], types=["chosen"])


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    lm, tokenizer = model()
    found = td.scan(lm, TEXTS, observe(tokenizer), DPO(), out=tmp_path_factory.mktemp("ray") / "scan", tokenizer=tokenizer)
    return found.tokens().to_pandas()


def same(found, truth):
    """Every token's force, row by row; batches differ, and with them the order of sums: float32, √(30 · 4096) eps."""
    for n, row in enumerate(TEXTS):
        mine, theirs = found[found.id == row["id"]], truth[truth.row == n]
        assert mine.token_id.tolist() == theirs.token_id.tolist()
        apart = (mine.force_chosen.to_numpy() - theirs.force_chosen.to_numpy()).astype(float)
        assert (apart**2).sum() ** 0.5 <= 1e-4 * (theirs.force_chosen.to_numpy().astype(float) ** 2).sum() ** 0.5


def test_what_an_actor_makes_of_a_batch(truth):
    """Without Ray: the class that its actors are."""
    actor = ScanBatches(model, observe, DPO(), "tokens", ("id",), {})
    tables = [actor(pa.Table.from_pylist(part)).to_pandas() for part in (TEXTS[:3], TEXTS[3:])]
    same(pa.concat_tables(map(pa.Table.from_pandas, tables)).to_pandas(), truth)
    actor.table = "rows"
    bad = pa.Table.from_pylist([*TEXTS[:1], {"id": "odd", "prompt": "?", "chosen": None, "rejected": None}])
    rows = actor(bad).to_pylist()
    assert [row["id"] for row in rows] == ["pair-0", "odd"] and rows[1]["problem"].startswith("id=odd must have")
    actor.keep = ("key",)
    with pytest.raises(ValueError, match="no column 'key' to keep: it has id, prompt"):
        actor(bad)
    actor.stack.close()
    with pytest.raises(ValueError, match="table must be"):
        scan(None, model, observe, table="forces")


def test_four_actors(truth):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR", log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(TEXTS, override_num_blocks=4)
        found = scan(dataset, model, observe, DPO(), keep=("id",), batch_size=2, concurrency=4).to_pandas()
    finally:
        ray.shutdown()
    same(found, truth)
