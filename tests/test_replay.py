"""General text among the training rows, and forgetting measured by what no model has replayed."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, SHORT, ok, refused, run

from configs import handover, state
from configs.evaluation.candidates import not_replayed
from configs.preparation.reading import evenly
from configs.training.replay import with_replay
from configs.training.trainer import token_rows

PARAGRAPHS = [f"On day {n} the river carried {n % 7} boats past the mill, and nobody counted them." for n in range(80)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_text("\n\n".join(PARAGRAPHS), "utf-8")
    return path


@pytest.fixture(scope="module")
def rows(prepared, tokenizer):
    return token_rows(str(prepared / "data"), "train", None, tokenizer, 1024, 0.2)


def asked(text, fraction: float, seed: int = 42) -> SimpleNamespace:
    return SimpleNamespace(REPLAY_FRACTION=fraction, REPLAY_TEXT=str(text), SEED=seed)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.4])
def test_the_share_is_that_of_the_tokens(rows, text, tokenizer, fraction):
    mixed = with_replay(rows, asked(text, fraction), tokenizer)
    own, added = mixed.select(range(len(rows))), mixed.select(range(len(rows), len(mixed)))
    assert own["input_ids"] == rows["input_ids"]
    assert sum(added["length"]) / sum(mixed["length"]) == pytest.approx(fraction, abs=0.01)
    assert max(added["length"]) <= max(rows["length"])
    for row in added:
        assert row["labels"][0] == -100 and row["labels"][1:] == row["input_ids"][1:]
        assert row["trained"] == row["length"] - 1 and row["id"].startswith("replay-")
        assert tokenizer.decode(row["input_ids"][1:]) in PARAGRAPHS[1::2]
    assert len(set(mixed["id"])) == len(mixed)


def test_nothing_is_added_where_nothing_is_asked_for(rows, text, tokenizer):
    assert with_replay(rows, asked(text, 0.0), tokenizer) is rows


def test_one_seed_draws_the_same_pieces_again(rows, text, tokenizer):
    taken = [with_replay(rows, asked(text, 0.1, seed), tokenizer)["input_ids"] for seed in (1, 1, 2)]
    assert taken[0] == taken[1] != taken[2]


def test_a_text_of_one_paragraph_is_refused(rows, tmp_path, tokenizer, capsys):
    (tmp_path / "one.txt").write_text(PARAGRAPHS[0])
    with pytest.raises(SystemExit) as end:
        with_replay(rows, asked(tmp_path / "one.txt", 0.1), tokenizer)
    assert end.value.code == 2 and "one paragraph only" in capsys.readouterr().err


def test_replay_belongs_to_the_identity_of_a_run(prepared, scripts, tmp_path, text):
    values = {name: value for name, value in vars(scripts[SCRIPTS[1]]).items() if name.isupper()}
    values |= {"DATA_DIR": str(prepared / "data")}
    manifest = handover.read_manifest(values["DATA_DIR"])
    copy = tmp_path / "copy.txt"
    shutil.copy(text, copy)

    def known(fraction: float, name) -> dict:
        return state.identity("lora", {**values, "REPLAY_FRACTION": fraction, "REPLAY_TEXT": str(name)}, manifest)

    assert state.differences(known(0.1, text), known(0.1, copy)) == {}  # the same text at another place
    assert set(state.differences(known(0.1, text), known(0.2, text))) == {"replay"}
    assert set(state.differences(known(0.0, text), known(0.1, text))) == {"replay"}
    assert state.differences(known(0.0, text), known(0.0, copy)) == {}
    copy.write_text("another text\n\nwith two paragraphs")
    assert set(state.differences(known(0.1, text), known(0.1, copy))) == {"replay"}


@pytest.mark.parametrize(("number", "count"), [(5, 10), (10, 10), (19, 10), (20, 10), (999, 10), (1000, 200)])
def test_items_are_taken_evenly_however_many_there_are(number, count):
    found = evenly(iter(range(number)), count)
    assert len(found) == min(number, count) and found == sorted(set(found)) and found[0] == 0
    if number > 2 * count:
        gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
        assert max(gaps) <= 2 * min(gaps) and found[-1] >= number - 2 * max(gaps)


def test_a_share_without_a_text_is_refused(prepared, tiny):
    result = run(SCRIPTS[1], "--model_name", tiny, "--replay_fraction", "0.1", *SHORT, cwd=prepared)
    refused(result, "REPLAY_FRACTION is 0.1, but REPLAY_TEXT names no text", "--replay_text", "--replay_fraction 0")


def test_forgetting_is_measured_by_what_was_not_replayed(prepared, tiny, text, tmp_path):
    """Trained with every second paragraph of a text: the others are left. Of another text, all but those it shares."""
    work = shutil.copytree(prepared, tmp_path / "work")
    flags = ["--model_name", tiny, "--replay_fraction", "0.3", "--replay_text", text, "--use_4bit", "false"]
    said = ok(run(SCRIPTS[1], *flags, *SHORT, "--max_train_samples", "40", cwd=work))
    assert "replay: " in said
    folder = work / "outputs" / "lora_model"
    trained = json.loads((folder / "trained_rows.json").read_text())["train"]
    log = json.loads((folder / "training_log.json").read_text())
    pairs = zip(trained["id"], trained["question"], strict=True)
    replayed = [question for id, question in pairs if id.startswith("replay-")]
    assert len(trained["id"]) == log["data"]["train_rows"] == 40 + len(replayed)
    assert not_replayed(PARAGRAPHS, str(text), [folder]) == PARAGRAPHS[::2]
    other = not_replayed(["new", *PARAGRAPHS], "other.txt", [folder])
    assert other == ["new", *(p for p in PARAGRAPHS if handover.text_hash(p) not in replayed)]
    assert not_replayed(PARAGRAPHS, str(text), [work / "outputs" / "full_model"]) == PARAGRAPHS
    with pytest.raises(SystemExit):
        not_replayed([p for p in PARAGRAPHS if handover.text_hash(p) in replayed], "other.txt", [folder])
    assert (ROOT / "configs" / "comparison" / "replay.yaml").is_file()
