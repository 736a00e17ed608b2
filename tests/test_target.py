"""What `bsprof loader` is pointed at becomes a loader, and that loader another one."""

import loaders
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from bsprof.errors import BsprofError
from bsprof.loader.target import changed, resolve
from bsprof.loader.watching import Watching
from bsprof.loading import LoaderRequest


def resolved(target, tmp_path, **arguments):
    return resolve(LoaderRequest(target=target, arguments=arguments), tmp_path)


def values(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("name", ["loader", "spawned", "by_batches", "whole", "stream", "pictures", "fussy"])
def test_a_loader_is_taken_as_it_is(name, tmp_path):
    found = resolved(f"loaders:{name}", tmp_path)
    assert found.loader is getattr(loaders, name)
    assert found.dataset is found.loader.dataset


def test_a_data_set_gets_a_loader_and_says_what_was_chosen_for_it(tmp_path):
    found = resolved("loaders:Sleepy", tmp_path, num_workers=1)
    assert (found.loader.batch_size, found.loader.num_workers) == (32, 1)
    assert isinstance(found.loader.sampler, RandomSampler)
    assert found.defaults == {"batch_size": 32}


def test_a_named_data_set_gets_a_loader(tmp_path):
    found = resolved("synthetic", tmp_path, batch_size=4, num_workers=0)
    assert next(iter(found.loader))[0].shape[0] == 4


def test_a_factory_is_called_with_what_it_takes_and_the_rest_is_applied(tmp_path):
    found = resolved("loaders:make_loader", tmp_path, num_workers=2, prefetch_factor=3)
    assert (found.loader.num_workers, found.loader.prefetch_factor, found.loader.batch_size) == (2, 3, 4)


def test_a_generator_can_be_taken_again_and_takes_no_arguments(tmp_path):
    found = resolved("loaders:numbers", tmp_path)
    assert list(found.loader) == list(found.loader) == list(range(50))
    with Watching() as watching:
        list(watching.watch(found.loader))
    assert watching.loading().settings.kind == "generator"
    with pytest.raises(BsprofError, match="is a generator and no DataLoader: it takes no num_workers"):
        resolved("loaders:numbers", tmp_path, num_workers=2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("loaders:loadr", "no 'loadr'"),
        ("nowhere:loader", "no module named 'nowhere'"),
        ("loaders:number", "'loaders:number' is a int: a DataLoader"),
        ("imagefoldr:x", "no module named 'imagefoldr'"),
        ("jepg", "unknown loader 'jepg'"),
    ],
)
def test_what_is_no_loader_is_refused_by_name(target, message, tmp_path):
    with pytest.raises(BsprofError, match=message):
        resolved(target, tmp_path)


@pytest.mark.parametrize("name", ["loader", "by_batches", "whole"])
def test_a_changed_loader_gives_the_same_batches(name):
    before = getattr(loaders, name)
    after = changed(before, {"num_workers": 2, "prefetch_factor": 1})
    assert (after.num_workers, after.prefetch_factor) == (2, 1)
    assert values(after) == values(changed(before, {"num_workers": 0}))
    assert after is not before and before.num_workers in (0, 1)


def test_a_stream_can_be_changed():
    assert [batch.tolist() for batch in changed(loaders.stream, {"batch_size": 20})] == [
        list(range(20)),
        list(range(20, 40)),
    ]


def test_without_workers_what_only_workers_have_is_dropped():
    before = DataLoader(loaders.Sleepy(), num_workers=2, prefetch_factor=4, persistent_workers=True, timeout=5)
    after = changed(before, {"num_workers": 0})
    assert (after.num_workers, after.prefetch_factor, after.persistent_workers) == (0, None, False)


def test_a_batch_size_takes_the_place_of_a_plain_batch_sampler_and_keeps_its_order():
    after = changed(loaders.by_batches, {"batch_size": 16})
    assert isinstance(after.sampler, SequentialSampler)
    assert next(iter(after)).shape[0] == 16


def test_shuffling_takes_the_place_of_the_sampler():
    assert isinstance(changed(loaders.pictures, {"shuffle": True}).sampler, RandomSampler)


def test_what_cannot_be_changed_says_so():
    with pytest.raises(BsprofError, match="a Fussy cannot be made again with num_workers=2"):
        changed(loaders.fussy, {"num_workers": 2})
    with pytest.raises(BsprofError, match=r"DataLoader refuses .*num_workers=-1"):
        changed(loaders.loader, {"num_workers": -1})


def test_the_seed_fixes_the_order(tmp_path):
    orders = []
    for _ in range(2):
        found = resolve(LoaderRequest(target="loaders:Pictures", arguments={"num_workers": 0}, seed=3), tmp_path)
        orders.append(list(found.loader.sampler))
    assert orders[0] == orders[1]
    assert torch.initial_seed() == 3
