"""Positions decide everything: not workers, not processes, not interruptions."""

import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from labelled_shards import LABELS, RECORDS, number_of, sample_labels, write_shards

from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import ExpertRecord
from clipbench.errors import ClipbenchError, UsageError
from clipbench.training import sources as sources_module
from clipbench.training.recipe import Recipe
from clipbench.training.stream import open_stream


def tokenizer(texts):
    """ "alt 7" → 7 in kind 0, "precise 7" in kind 1."""
    parts = [text.split() for text in texts]
    return torch.tensor([[["alt", "precise"].index(kind), int(number)] for kind, number in parts])


def recipe(*shards, weights=None, workers=0, batch_size=8, seed=0, labels=LABELS, size=24, sizes=(), **changes):
    data = changes.pop("data", {})
    weights = weights or [1.0] * len(shards)
    return Recipe.model_validate(
        {
            "model": {"source": "openclip:ViT-B-16"},
            "data": {
                "sources": [{"shards": str(s), "weight": w} for s, w in zip(shards, weights, strict=True)],
                "labels": labels,
                "workers": workers,
                **data,
            },
            "augmentation": {"scale": (0.4, 1.0), "flip": 0.5},
            "resolution": {"size": size, "sizes": sizes},
            "steps": 1000,
            "batch_size": batch_size,
            "seed": seed,
            **changes,
        }
    )


def take(stream, start, count):
    return list(itertools.islice(stream.loader(start), count))


def same(one, other):
    assert one.positions.tolist() == other.positions.tolist()
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.texts, other.texts)
    assert one.labels.keys() == other.labels.keys()
    for task, label in one.labels.items():
        assert torch.equal(label.values, other.labels[task].values)
        assert torch.equal(label.valid, other.labels[task].valid)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "labelled", [7, 12, 3, 9])


def test_a_batch_is_what_the_contract_says(shards):
    stream = open_stream(recipe(shards), tokenizer)
    (batch,) = take(stream, 0, 1)
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 24, 24), torch.uint8)
    assert (batch.texts.shape, batch.texts.dtype) == ((8, 2), torch.int64)
    assert batch.positions.tolist() == list(range(8))
    assert batch.problems == []
    shapes = {"segmentation": (8, 24, 24), "depth": (8, 24, 24), "normals": (8, 3, 24, 24)}
    types = {"segmentation": torch.int64, "depth": torch.float32, "normals": torch.float32}
    for task in LABELS:
        assert (batch.labels[task].values.shape, batch.labels[task].values.dtype) == (shapes[task], types[task])
        assert (batch.labels[task].valid.shape, batch.labels[task].valid.dtype) == ((8, 24, 24), torch.bool)
    assert stream.samples == 31
    assert stream.channels == {"segmentation": 3, "depth": 1, "normals": 3}
    assert stream.experts["depth"].weights_sha256 == "bb"


def test_image_caption_and_labels_are_of_one_sample(shards):
    for batch in take(open_stream(recipe(shards), tokenizer), 0, 8):
        for i in range(len(batch)):
            number = number_of(batch.images[i])
            assert batch.texts[i, 1] == number
            classes, normals = batch.labels["segmentation"], batch.labels["normals"]
            assert set(classes.values[i].unique().tolist()) <= {0, number % 3}
            normal = normals.values[i][:, normals.valid[i]]
            assert abs(abs(normal[0].mean().item()) - np.sin(0.01 * number)) < 0.005
            # The blue of the image is its column, so is inverse depth: column/31 of 1 + number at label columns /15.
            depth = batch.labels["depth"]
            blue = batch.images[i, 2].float()
            wanted = ((blue + 0.5) / 2 - 0.5).clamp(0, 15) / 15 * (1 + number)
            inner = depth.valid[i] & (blue > 2) & (blue < 29)
            assert (depth.values[i] - wanted)[inner].abs().max() < 0.06 * (1 + number)


@pytest.mark.parametrize("sizes", [(), (16, 24, 32)])
def test_workers_change_nothing(shards, sizes):
    wanted = take(open_stream(recipe(shards, sizes=sizes, batch_size=40), tokenizer), 0, 4)
    assert len({batch.images.shape[-1] for batch in wanted}) == (3 if sizes else 1)
    for batch, other in zip(
        wanted, take(open_stream(recipe(shards, sizes=sizes, batch_size=40, workers=2), tokenizer), 0, 4), strict=True
    ):
        same(batch, other)


def test_processes_together_see_what_one_sees(shards):
    whole = take(open_stream(recipe(shards), tokenizer), 0, 5)
    for world in (2, 4):
        shares = [take(open_stream(recipe(shards), tokenizer, rank=r, world=world), 0, 5) for r in range(world)]
        for step, batch in enumerate(whole):
            for rank in range(world):
                part = batch.chunks(world)[rank]
                same(part, shares[rank][step])


@pytest.mark.parametrize("sizes", [(), (16, 24, 32)])
@pytest.mark.parametrize("start", [1, 5, 13])
def test_a_resumed_stream_goes_on_exactly(shards, sizes, start):
    whole = take(open_stream(recipe(shards, sizes=sizes), tokenizer), 0, start + 3)
    resumed = take(open_stream(recipe(shards, sizes=sizes, workers=1), tokenizer), start, 3)
    for batch, other in zip(whole[start:], resumed, strict=True):
        same(batch, other)


def test_every_sample_comes_once_an_epoch_in_another_order(shards):
    batches = take(open_stream(recipe(shards, batch_size=31), tokenizer), 0, 3)
    orders = [tuple(batch.texts[:, 1].tolist()) for batch in batches]
    assert [sorted(order) for order in orders] == [list(range(31))] * 3
    assert len(set(orders)) == 3


def test_seeds_decide(shards):
    one, other = (take(open_stream(recipe(shards, seed=seed), tokenizer), 0, 1)[0] for seed in (0, 1))
    assert one.texts.tolist() != other.texts.tolist()


def test_the_same_sample_is_cropped_anew_each_epoch(shards):
    first, second = take(open_stream(recipe(shards, batch_size=31, labels={}), tokenizer), 0, 2)
    where = [batch.texts[:, 1].tolist().index(5) for batch in (first, second)]
    assert not torch.equal(first.images[where[0]], second.images[where[1]])


def test_sources_have_their_shares(shards, tmp_path):
    other = write_shards(tmp_path / "other", [5], first=100)
    stream = open_stream(recipe(shards, other, weights=[3, 1], batch_size=32, labels={}), tokenizer)
    seen = Counter(number >= 100 for b in take(stream, 0, 64) for number in b.texts[:, 1].tolist())
    assert seen == {False: 1536, True: 512}  # two blocks of 1024
    # Within its own draws, a source is still used up before it begins again.
    numbers = [number for b in take(stream, 0, 10) for number in b.texts[:, 1].tolist() if number >= 100]
    for start in range(0, len(numbers) - 5, 5):
        assert sorted(numbers[start : start + 5]) == list(range(100, 105))


def test_captions_have_their_shares(shards):
    data = {"captions": {"alt": 1, "precise": 3}}
    stream = open_stream(recipe(shards, batch_size=100, labels={}, size=16, data=data), tokenizer)
    kinds = torch.cat([batch.texts[:, 0] for batch in take(stream, 0, 20)])
    assert 0.72 < kinds.float().mean() < 0.78
    # Kinds are no part of the order: the same sample has both, in the end.
    again = open_stream(recipe(shards, batch_size=100, labels={}, size=16), tokenizer)
    for mixed, plain in zip(take(stream, 0, 2), take(again, 0, 2), strict=True):
        assert torch.equal(mixed.texts[:, 1], plain.texts[:, 1])
        assert torch.equal(mixed.images, plain.images)


def test_a_sample_without_the_drawn_caption_gives_its_other_one(tmp_path):
    def edit(number, members):
        if number % 2:
            members["txt"] = b"  "
        else:
            members["json"] = members["json"].replace(b"precise_caption", b"p")

    shards = write_shards(tmp_path / "a", [8], edit=edit)
    stream = open_stream(recipe(shards, labels={}, data={"captions": {"alt": 1, "precise": 1}}), tokenizer)
    (batch,) = take(stream, 0, 1)
    assert batch.texts[:, 0].tolist() == [number % 2 for number in batch.texts[:, 1].tolist()]
    assert not batch.problems


def test_samples_without_a_label_are_valid_nowhere(tmp_path):
    shards = write_shards(tmp_path / "a", [8], leave_out=lambda number, expert: expert == "depth" and number % 2)
    (batch,) = take(open_stream(recipe(shards), tokenizer), 0, 1)
    for i, number in enumerate(batch.texts[:, 1].tolist()):
        assert bool(batch.labels["depth"].valid[i].any()) == (number % 2 == 0)
        assert batch.labels["normals"].valid[i].any()
    assert (batch.labels["depth"].values[~batch.labels["depth"].valid] == 0).all()


def test_pixels_of_little_confidence_do_not_count(shards):
    augmentation = {"scale": (1, 1), "ratio": (1, 1)}
    plain = recipe(shards, augmentation=augmentation, size=16)
    strict = recipe(shards, augmentation=augmentation, size=16, data={"min_confidence": {"normals": 10}})
    before, after = (take(open_stream(r, tokenizer), 0, 1)[0].labels for r in (plain, strict))
    assert before["normals"].valid[0].sum() == 15 * 16
    assert after["normals"].valid[0].sum() == 8 * 16  # κ is 50 in the lower half
    assert torch.equal(before["depth"].valid, after["depth"].valid)
    message = r"data.min_confidence.depth: .* has no confidence maps of depth"
    with pytest.raises(UsageError, match=message):
        open_stream(recipe(shards, data={"min_confidence": {"depth": 0.5}}), tokenizer)


def test_unreadable_samples_are_replaced_by_the_next_and_counted(tmp_path):
    def edit(number, members):
        if number == 3:
            members["png"] = members["png"][:60]
        if number == 4:
            members["seg.png"] = b"no png"
        if number == 5:
            members["txt"], members["json"] = b"", b"{}"

    good = write_shards(tmp_path / "good", [20])
    bad = write_shards(tmp_path / "bad", [20], edit=edit)
    (wanted,) = take(open_stream(recipe(good, batch_size=20), tokenizer), 0, 1)
    (batch,) = take(open_stream(recipe(bad, batch_size=20, workers=1), tokenizer), 0, 1)
    order = wanted.texts[:, 1].tolist()
    assert len(batch) == 20
    assert {3, 4, 5}.isdisjoint(batch.texts[:, 1].tolist())
    replaced = 0
    for i, number in enumerate(order):
        if number in (3, 4, 5):
            following = [n for n in order[i + 1 :] if n not in (3, 4, 5)]
            if following:
                assert batch.texts[i, 1] == following[0]
            replaced += 1
        else:  # nobody else has moved
            assert torch.equal(batch.images[i], wanted.images[i])
    assert replaced == 3
    text = "\n".join(batch.problems)
    assert "00000.tar" in text
    assert "truncated" in text
    assert "000000004.seg.png" in text
    assert "no caption" in text


def test_nothing_but_unreadable_samples_is_an_error_with_its_reason(tmp_path):
    shards = write_shards(tmp_path / "bad", [3], edit=lambda _, members: members.update(png=b"no image"))
    for workers in (0, 1):
        with pytest.raises(ClipbenchError, match=r"^64 samples in a row of .*bad cannot be .*: not an image"):
            take(open_stream(recipe(shards, labels={}, workers=workers), tokenizer), 0, 1)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_missing_labels_name_shards_expert_and_the_command(tmp_path):
    some = {name: RECORDS[name] for name in ("seg", "depth")}
    labelled, bare = (
        write_shards(tmp_path / "some", [3], experts=some),
        write_shards(tmp_path / "bare", [3], experts={}),
    )
    with pytest.raises(UsageError) as found:
        open_stream(recipe(labelled, bare), tokenizer)
    text = str(found.value)
    assert f"{labelled} has no labels of normals (it has: seg, depth)" in text
    assert f"{bare} has no labels; the recipe asks for those of seg, depth, normals" in text
    assert f"clipbench label --expert seg,depth,normals --input raw --output {labelled}-normals" in text
    assert f"clipbench label --expert seg,depth,normals --input {bare} --output {bare}-labelled" in text
    # Without labels in the recipe, both are shards like any other.
    assert open_stream(recipe(labelled, bare, labels={}), tokenizer).samples == 6


def test_a_manifest_alone_is_no_label(tmp_path):
    shards = write_shards(tmp_path / "a", [3], leave_out=lambda _, expert: expert == "depth")
    with pytest.raises(UsageError, match="has no labels of depth"):
        open_stream(recipe(shards), tokenizer)


def test_an_expert_of_another_task_is_refused(shards):
    with pytest.raises(UsageError, match=r"data.labels.depth: seg gives segmentation[\s\S]*For depth there are: depth"):
        open_stream(recipe(shards, labels={"depth": "seg"}), tokenizer)


def test_sources_with_other_classes_are_refused(shards, tmp_path):
    more = RECORDS["seg"].model_copy(update={"classes": ("wall", "ball", "floor")})
    other = write_shards(tmp_path / "b", [3], experts={**RECORDS, "seg": more})
    with pytest.raises(UsageError, match=r"seg has other classes in .*b than in"):
        open_stream(recipe(shards, other), tokenizer)


def test_captions_that_nobody_has_are_refused(tmp_path):
    bare = write_shards(tmp_path / "a", [3], edit=lambda _, members: members.update(json=b"{}"))
    with pytest.raises(UsageError, match=r"data.captions asks for precise, and no sample has such a caption"):
        open_stream(recipe(bare, labels={}, data={"captions": {"alt": 1, "precise": 1}}), tokenizer)


def test_no_sources_and_empty_shards_are_refused(tmp_path):
    with pytest.raises(UsageError, match="names no shards"):
        open_stream(recipe(), tokenizer)
    (tmp_path / "empty").mkdir()
    with ShardWriter(tmp_path / "empty" / "0.tar") as shard:
        shard.finish()
    with pytest.raises(UsageError, match="have no samples"):
        open_stream(recipe(tmp_path / "empty", labels={}), tokenizer)


def test_a_share_that_is_too_small_is_refused(shards, tmp_path):
    other = write_shards(tmp_path / "b", [3])
    with pytest.raises(UsageError, match="least weight"):
        open_stream(recipe(shards, other, weights=[1, 1e-9]), tokenizer)


# --- table and processes ----------------------------------------------------------------------------------------------


def test_headers_are_read_once(shards, monkeypatch):
    scans = []
    plain = sources_module.scan_shard
    monkeypatch.setattr(sources_module, "scan_shard", lambda path: scans.append(path) or plain(path))
    first = take(open_stream(recipe(shards), tokenizer), 0, 1)[0]
    assert len(scans) == 4
    same(first, take(open_stream(recipe(shards), tokenizer), 0, 1)[0])
    assert len(scans) == 4
    os.utime(shards / "00002.tar", (1, 1))
    open_stream(recipe(shards), tokenizer)
    assert len(scans) == 8


def test_a_damaged_table_is_made_again(shards, tmp_path):
    first = take(open_stream(recipe(shards), tokenizer), 0, 1)[0]
    (kept,) = (tmp_path / "cache" / "training").glob("*.npz")
    for content in (b"", b"PK\x03\x04rubbish", kept.read_bytes()[:-100]):
        kept.write_bytes(content)
        same(first, take(open_stream(recipe(shards), tokenizer), 0, 1)[0])


def test_without_a_place_for_the_table_it_works_too(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "file"))
    assert open_stream(recipe(shards), tokenizer).samples == 31


def test_many_shards_are_scanned_by_processes(tmp_path):
    shards = write_shards(tmp_path / "a", [2] * 9)
    stream = open_stream(recipe(shards, labels={}, workers=2, batch_size=18), tokenizer)
    assert sorted(take(stream, 0, 1)[0].texts[:, 1].tolist()) == list(range(18))


def test_the_manifest_tells_equal_data_from_other_data(shards, tmp_path):
    manifest = open_stream(recipe(shards), tokenizer).manifest
    assert manifest["sources"][0]["samples"] == 31
    assert manifest["experts"]["normals"]["name"] == "normals"
    assert manifest["experts"]["normals"]["weights_sha256"] == "cc"
    copy = open_stream(recipe(write_shards(tmp_path / "copy", [7, 12, 3, 9])), tokenizer).manifest
    fewer = open_stream(recipe(write_shards(tmp_path / "fewer", [7, 12, 3, 8])), tokenizer).manifest
    hashes = [m["sources"][0]["shards_sha256"] for m in (manifest, copy, fewer)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_are_left_alone(shards, workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(open_stream(recipe(shards, workers=workers), tokenizer), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_end_with_the_program(shards, tmp_path):
    """With two loaders still open."""
    script = textwrap.dedent(
        """
        import sys
        import torch
        from clipbench.training.recipe import Recipe
        from clipbench.training.stream import open_stream

        def tokenizer(texts):
            return torch.zeros(len(texts), 77, dtype=torch.int64)

        if __name__ == "__main__":
            recipe = Recipe.model_validate({
                "model": {"source": "x"}, "steps": 1000, "batch_size": 64, "resolution": {"size": 64},
                "data": {"sources": [{"shards": sys.argv[1]}], "workers": 2},
            })
            batches = open_stream(recipe, tokenizer).loader(0)
            next(batches)
            other = open_stream(recipe, tokenizer).loader(5)
            next(other)
            print("made", flush=True)
        """
    )
    (tmp_path / "script.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "script.py", str(shards)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "made\n", "")


def test_what_workers_do_can_be_sent_to_them(shards):
    """Where processes are spawned, not forked."""
    stream = open_stream(recipe(shards), tokenizer)
    batch = take(stream, 2, 1)[0]
    stream._parts = pickle.loads(pickle.dumps(stream._parts))
    same(batch, take(stream, 2, 1)[0])


def test_labels_may_be_16_bit(tmp_path):
    """And of a size that is no part of the image's."""
    fine = ExpertRecord(task="normals", source="t", weights="t", weights_sha256="cc", confidence="kappa", bits=16)
    shards = write_shards(tmp_path / "a", [4], experts={**RECORDS, "normals": fine})
    (batch,) = take(open_stream(recipe(shards, batch_size=4, size=40), tokenizer), 0, 1)
    for i, number in enumerate(batch.texts[:, 1].tolist()):
        normals = batch.labels["normals"]
        wanted = sample_labels(number)["normals"].values[0, 0]
        found = normals.values[i][:, normals.valid[i]].abs().mean(1)
        assert np.allclose(found, np.abs(wanted), atol=1e-4)


def test_loaders_are_in_a_group_of_their_own():
    """Terminals and launchers signal whole groups: a loader that died would keep the run from saving."""
    code = (
        "import os\nfrom clipbench.training.sources import quiet_worker\n"
        "before = os.getpgrp()\nquiet_worker(0)\nprint(before != os.getpgrp() == os.getpid())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
