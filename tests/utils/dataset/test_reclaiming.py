"""What no run wants any more goes from the cache, and nothing that one reads."""

from tests.utils.dataset.conftest import LengthEncoder, MeanEncoder, counts, dataset_of, filled, samples_of
from utils.dataset.cache_lock import reading
from utils.dataset.encoding import CacheJob, fill, reclaim_unwanted
from utils.dataset.references import Keep
from utils.dataset.tensor_store import TensorStore
from utils.ranks import Ranks


def shards_of(cache):
    return sum(path.stat().st_size for path in cache.rglob("*.shard"))


def test_regenerating_replaces_everything(pictures, cache):
    samples = samples_of(dataset_of(pictures), cache)
    filled(MeanEncoder(), samples, cache)
    size = shards_of(cache)
    how = {"regenerate": True}
    assert counts(filled(MeanEncoder(), samples, cache, **how)) == (6, 0, 6, 0)
    reclaim_unwanted(["vae"], CacheJob(cache, cache, Ranks(), **how))
    assert shards_of(cache) == size
    with TensorStore(cache / "vae") as store:
        assert len(store) == 6


def test_what_the_cache_takes_is_told(pictures, cache, caplog):
    with caplog.at_level("INFO"):
        filled(MeanEncoder(), samples_of(dataset_of(pictures), cache), cache)
        reclaim_unwanted(["vae"], CacheJob(cache, cache, Ranks()))
    assert f"cache: {shards_of(cache) / 2**10:.2f} KiB on disk in {cache}" in caplog.text


def test_items_that_no_run_wants_are_let_go(pictures, cache, tmp_path):
    def run(name, **keys):
        (tmp_path / name).write_text("")
        samples = samples_of(dataset_of(pictures, **keys), cache)
        job = CacheJob(cache, tmp_path / name, Ranks())
        fill(MeanEncoder(), samples, job)
        reclaim_unwanted(["vae"], job)
        with TensorStore(cache / "vae") as store:
            return len(store)

    assert run("first.toml") == 6
    assert run("second.toml", resolutions=[48]) == 12
    # The six of the first run as it was are half of what its store has; then they are more.
    assert run("first.toml", resolutions=[64]) == 18
    assert run("first.toml", resolutions=[80]) == 24
    assert run("first.toml", resolutions=[96]) == 12
    samples = samples_of(dataset_of(pictures, resolutions=[48]), cache)
    assert counts(filled(MeanEncoder(), samples, cache)) == (6, 6, 0, 0)


def test_a_short_trial_at_another_size_costs_nothing(pictures, cache, tmp_path):
    """Most of the store is unwanted during the trial, and is there when the first size comes back."""
    (tmp_path / "run.toml").write_text("")
    encoded = []
    for size in (32, 48, 64, 32):
        job = CacheJob(cache, tmp_path / "run.toml", Ranks(), keep=Keep(7, 2**30))
        encoded.append(fill(MeanEncoder(), samples_of(dataset_of(pictures, resolutions=[size]), cache), job).encoded)
        reclaim_unwanted(["vae"], job)
    assert encoded == [6, 6, 6, 0]


def test_nothing_goes_while_a_run_reads_the_cache(pictures, cache):
    """It may have been started from the same settings, as they were before they were changed and started again."""
    samples = samples_of(dataset_of(pictures), cache)
    job = CacheJob(cache, cache, Ranks())
    fill(MeanEncoder(), samples, job)
    with reading(cache), reading(cache):
        fill(MeanEncoder(), samples[:1], job)
        reclaim_unwanted(["vae"], job)
        with TensorStore(cache / "vae") as store:
            assert len(store) == len(samples)
    reclaim_unwanted(["vae"], job)
    with TensorStore(cache / "vae") as store:
        assert len(store) == 1


def test_what_an_encoder_made_that_a_run_has_no_more_is_let_go(pictures, cache, tmp_path):
    """As of masks that are left out again, unless another run has them."""
    samples = samples_of(dataset_of(pictures), cache)
    vae, text = MeanEncoder(), LengthEncoder()

    def run(name, *encoders):
        (tmp_path / name).write_text("")
        job = CacheJob(cache, tmp_path / name, Ranks())
        reclaim_unwanted([fill(encoder, samples, job).encoder for encoder in encoders], job)
        return [len(store.keys()) for encoder in (vae, text) for store in [TensorStore(cache / encoder.name)]]

    assert run("first.toml", vae, text) == [6, 6]
    assert run("second.toml", vae, text) == [6, 6]
    assert run("first.toml", vae) == [6, 6]
    assert run("second.toml", vae) == [6, 0]
