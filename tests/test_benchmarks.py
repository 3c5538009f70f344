"""The benchmark for a GPU runs from beginning to end, in miniature on the CPU, and says where it cannot."""

import json

import pytest
from conftest import ROOT, ok, refused, run

GPU = ROOT / "tests/benchmarks/gpu.py"


def test_without_a_gpu_the_benchmark_says_so(tmp_path):
    errors = refused(run(GPU, cwd=tmp_path), "no CUDA GPU is visible; check the benchmark itself on the CPU: --toy")
    assert len(errors) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_in_miniature(tmp_path):
    printed = ok(run(GPU, "--toy", "--work", "work", "--output", "results.json", cwd=tmp_path, timeout=1200))
    assert "these numbers mean nothing" in printed and "reached" not in printed and "missed" not in printed
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    parts = {"methods", "memory", "scoring", "goals"}
    about = {"toy", "command", "card", "versions", "layers", "steps", "pairs", "weights", "rows"}
    assert results.keys() == parts | about and results["toy"] is True
    assert results["rows"]["rows"] == 32 and results["rows"]["trained_tokens"] < results["rows"]["tokens"]
    keys = {"name", "memory_bytes", "bf16", "matrix_product_tflops", "peak_tflops", "peak_is"}
    assert results["card"].keys() == keys

    assert results["methods"].keys() == {"qlora", "lora", "full"}
    keys = {"own", "trl_sft", "ratio", "plan", "planned_bytes", "peak_memory_bytes", "failures"}
    for name, method in results["methods"].items():
        assert method.keys() == keys and method["failures"] == {}, (name, method["failures"])
        for program in ("own", "trl_sft"):
            assert method[program].keys() == {"tokens_per_second", "median", "mfu"}
            assert len(method[program]["tokens_per_second"]) == 1 and method[program]["mfu"] > 0
        assert method["ratio"] == pytest.approx(method["own"]["median"] / method["trl_sft"]["median"])

    keys = {"card_gb", "planned_for_gb", "peak_memory_bytes", "planned_bytes", "optim"}
    assert {name: held.keys() for name, held in results["memory"].items()} == {"qlora": keys, "full": keys}
    ways = {"this project", "lm-evaluation-harness, batch size 1", "lm-evaluation-harness, batch size 4"}
    assert results["scoring"].keys() == ways
    assert all(way["nll_differs"] < 1e-4 for way in results["scoring"].values())
    assert len(results["goals"]) == 7 and all(goal["measured"] is not None for goal in results["goals"])
