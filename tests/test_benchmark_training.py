"""The benchmark of the trainings runs from beginning to end, and says what it promises."""

import json

import pytest
from conftest import ROOT, ok, run

pytestmark = pytest.mark.slow
WAYS = {"ours", "trl_default", "trl_all_threads"}
GOALS = {"lora": 4, "full": 3}


def test_toy(tmp_path):
    result = run(ROOT / "tests/benchmarks/training.py", "--toy", "--output", "toy.json", cwd=tmp_path, timeout=900)
    printed, numbers = ok(result), json.loads((tmp_path / "toy.json").read_text("utf-8"))
    assert "TOY: " in printed and "not judged (toy)" in printed and "goal: tokens per second >= 4 x" in printed

    assert set(numbers) == {"toy", "pairs", "options", "environment", "data", "matrix_product", "methods"}
    assert numbers["toy"] is True and numbers["pairs"] == 1
    data = numbers["data"]
    assert data["train_rows"] == 32 and 0 < data["trained"] < data["tokens"]
    assert data["rows_as"] == "conversations"  # TRL renders them with our template to the same tokens
    assert numbers["matrix_product"]["gflops"] > 0
    assert set(numbers["methods"]) == {"lora", "full"}
    for method, part in numbers["methods"].items():
        keys = "learning_rate steps tokens_per_second ratio nll nll_percent matrix goals runs"
        assert set(part) == set(keys.split()), method
        assert part["steps"] == dict.fromkeys(WAYS, 4), method
        speed = {way: part["tokens_per_second"][way]["median"] for way in WAYS}
        assert min(speed.values()) > 0
        best = max(speed["trl_default"], speed["trl_all_threads"])
        assert part["ratio"]["median"] == pytest.approx(speed["ours"] / best)
        # both have learned, and about as much
        nll = {way: part["nll"][way]["median"] for way in WAYS}
        assert max(nll.values()) < data["base_nll"] - 0.02, method
        assert abs(part["nll_percent"]["median"]) < 1, method
        # the formula of the docstring
        k, weights = {"lora": 4, "full": 6}[method], data["weights"]
        per_token = k * (weights["body"] + weights["head"] * data["trained"] / data["tokens"])
        assert part["matrix"]["operations_per_token"] == pytest.approx(per_token)
        gflops = per_token * speed["ours"] / 1e9
        limit = numbers["matrix_product"]["gflops"]
        assert part["matrix"]["percent"]["median"] == pytest.approx(100 * gflops / limit)
        # a toy meets and misses nothing
        assert f"tokens per second >= {GOALS[method]} x" in part["goals"]
        assert len(part["goals"]) == 3 and set(part["goals"].values()) == {None}
        # what was run
        assert [run["way"] for run in part["runs"]] == ["ours", "trl_default", "trl_all_threads"]
        for single in part["runs"]:
            keys = "pair way seed steps tokens seconds tokens_per_second nll wall_s command"
            assert set(keys.split()) <= set(single)
            assert single["tokens"] == data["tokens"] and single["steps"] == 4 and single["seed"] == 42
