"""The commands as a user runs them: output, exit status, messages."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.generate import LocalModel
from sharding.errors import UnsupportedModelError
from sharding.kernels import DeviceFacts
from sharding.model_plan import Wanted
from tests.tiny_gguf import tiny_model

PLAN_KEYS = {
    "device", "layers", "weights_bytes", "kv_bytes", "activation_bytes", "buffer_bytes",
    "total_bytes", "headroom_bytes",
}  # fmt: skip
BENCH_KEYS = {
    "test", "depth", "stages", "threads", "tok_s", "tok_s_sd", "model", "commit", "machine",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    path.write_bytes(tiny_model(context=512))
    return path


def longspan(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "serving.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_lists_what_each_device_would_hold(model: Path) -> None:
    done = longspan(
        "plan", model, "--context", 512, "--device", "1GiB", "--device", "512MiB", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan["max_context"] >= 512
    assert [set(stage) for stage in plan["stages"]] == [PLAN_KEYS, PLAN_KEYS]
    assert plan["stages"][0]["layers"][0] == 0
    assert plan["stages"][0]["layers"][1] == plan["stages"][1]["layers"][0]
    for stage in plan["stages"]:
        parts = ("weights_bytes", "kv_bytes", "activation_bytes", "buffer_bytes")
        assert sum(stage[part] for part in parts) == stage["total_bytes"]


def test_a_plan_that_does_not_fit_says_what_would(model: Path) -> None:
    done = longspan("plan", model, "--context", 10**9, "--device", "1GiB", "--json")
    assert done.returncode == 1
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    assert f"the largest that fits is {plan['max_context']}" in done.stderr
    again = longspan("plan", model, "--context", plan["max_context"], "--device", "1GiB")
    assert again.returncode == 0


def test_a_mixture_of_experts_that_auto_would_compute_on_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU it would be many times slower than whoever has a GPU expects."""
    path = tmp_path / "mixture.gguf"
    path.write_bytes(tiny_model(experts=4))
    monkeypatch.setattr("serving.generate.best_kernels", lambda: "triton")
    card = DeviceFacts("card", "GPU-1", 1 << 40)
    monkeypatch.setattr("serving.generate.device_facts", lambda kernels: card)
    with pytest.raises(UnsupportedModelError, match="use --kernels cpu"):
        LocalModel(path, 1, Wanted(), threads=1)


def test_a_plan_for_gpus_reserves_what_their_chunks_need(model: Path) -> None:
    """A chunk of thousands of tokens takes memory that a plan for 512 would have given to KV."""
    context = ("--context", 512, "--device", "4GiB", "--json")
    work = {}
    for kernels, chunk in (("cpu", 512), ("triton", 512), ("triton", 4096)):
        asked = longspan("plan", model, *context, "--kernels", kernels, "--chunk", chunk)
        work[kernels, chunk] = json.loads(asked.stdout)["stages"][0]["activation_bytes"]
    assert work["cpu", 512] < work["triton", 512] < work["triton", 4096]
    default = longspan("plan", model, *context, "--kernels", "triton")
    stage = json.loads(default.stdout)["stages"][0]
    assert stage["activation_bytes"] == work["triton", 4096]


def test_a_plan_refuses_a_model_that_could_not_be_served(tmp_path: Path) -> None:
    """A tensor that nothing here computes with is found before a cluster is asked for."""
    data = tiny_model(layers=2).replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_up.scales")
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    done = longspan("plan", path, "--context", 64, "--device", "1GiB", "--json")
    assert done.returncode == 1
    assert "tensor blk.1.ffn_up.weight is missing" in done.stderr
    assert done.stdout == ""


def test_planning_loads_neither_torch_nor_ray_nor_clients(model: Path) -> None:
    """`longspan plan` must answer at once."""
    code = (
        "import sys; from serving.cli import app\n"
        f"app(['plan', {str(model)!r}, '--context', '64', '--device', '1GiB'],"
        " standalone_mode=False)\n"
        "heavy = ('torch', 'ray', 'fastapi', 'requests', 'grafana_api')\n"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_generate_gives_the_same_tokens_over_any_number_of_stages(model: Path) -> None:
    records = []
    for stages in (1, 3):
        done = longspan(
            "generate", model, "--prompt", "the the", "--max-tokens", 8, "--stages", stages,
            "--threads", 1, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
    assert records[0]["token_ids"] == records[1]["token_ids"]
    assert set(records[0]) >= {"text", "token_ids", "prompt_tokens", "ttft_s", "tok_s"}


def test_generate_keeps_to_a_form(model: Path, tmp_path: Path) -> None:
    files = {"--json-schema": '{"enum": ["the one", "them"]}', "--grammar": 'root ::= "so " [0-9]'}
    for option, text in files.items():
        (form := tmp_path / "form").write_text(text)
        done = longspan("generate", model, "--prompt", "the", option, form, "--temperature", 1)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch('"the one"\n|"them"\n|so [0-9]\n', done.stdout)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json-schema", "nowhere"], "No such file"),
        (["--json-schema", "FORM"], "Expecting value"),
        (["--grammar", "FORM"], "expecting rule"),
        (["--grammar", "FORM", "--json-schema", "FORM"], "either"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_told_before_anything_loads(
    tmp_path: Path, options: list[str], words: str
) -> None:
    (form := tmp_path / "form").write_text("[")
    named = [str(form) if option == "FORM" else option for option in options]
    done = longspan("generate", "no-model", "--prompt", "x", *named)
    assert done.returncode == 2 and words in done.stderr


def test_generate_reads_its_prompt_from_a_file(model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the the")
    by_file = longspan("generate", model, "--prompt-file", prompt, "--max-tokens", 4, "--json")
    by_text = longspan("generate", model, "--prompt", "the the", "--max-tokens", 4, "--json")
    assert json.loads(by_file.stdout)["token_ids"] == json.loads(by_text.stdout)["token_ids"]


def test_bench_prints_a_row_for_each_length_and_depth(model: Path) -> None:
    done = longspan(
        "bench", model, "-p", "16", "-n", "4", "-d", "0,32", "-r", 1, "--threads", 1, "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["test"] for row in rows] == ["pp16", "tg4", "pp16 @ d32", "tg4 @ d32"]
    assert all(set(row) >= BENCH_KEYS and row["tok_s"] > 0 for row in rows)


WRONG = {
    "no such model": (["generate", "smolm2", "--prompt", "x"], 2, "smollm2"),
    "no such file": (["plan", "none.gguf", "--context", "1", "--device", "1GiB"], 2, "none.gguf"),
    "a size without a unit": (["plan", "MODEL", "--context", "1", "--device", "10XB"], 2, "10XB"),
    "two prompts": (["generate", "MODEL", "--prompt", "x", "--prompt-file", "y"], 2, "either"),
    "an empty prompt": (["generate", "MODEL", "--prompt", ""], 1, "empty"),
    "nothing to measure": (["bench", "MODEL", "-p", "0", "-n", "0"], 2, "nothing to measure"),
    "no number": (["bench", "MODEL", "-p", "many"], 2, "many"),
    "a context of nothing": (["serve", "MODEL", "--context", "0"], 2, "context"),
    "too many stages": (["generate", "MODEL", "--prompt", "x", "--stages", "9"], 2, "9"),
    "more threads than cores": (
        ["generate", "MODEL", "--prompt", "x", "--threads", "100000"], 2, "cores",
    ),
    "a cluster that is not there": (
        ["serve", "MODEL", "--address", "127.0.0.1:1"], 2, "no Ray cluster answers at 127.0.0.1:1",
    ),
    "keys that are not there": (["serve", "MODEL", "--api-key-file", "no.keys"], 2, "no.keys"),
    "half a scaling": (
        ["generate", "MODEL", "--prompt", "x", "--rope-scaling", "yarn"], 2, "needs rope_scale",
    ),
    "a scaling of the future": (
        ["serve", "MODEL", "--rope-scaling", "longrope", "--rope-scale", "4"], 2, "rope_scaling",
    ),
    "a KV type of the future": (
        ["plan", "MODEL", "--context", "1", "--device", "1GiB", "--kv-dtype", "int8"], 2, "fp16",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "status", "named"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_named_in_one_line(
    model: Path, arguments: list[str], status: int, named: str
) -> None:
    done = longspan(*[str(model) if word == "MODEL" else word for word in arguments])
    assert done.returncode == status, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_context_beyond_the_training_is_warned_of(model: Path) -> None:
    done = longspan("plan", model, "--context", 1000, "--device", "1GiB", "--json")
    assert done.returncode == 0
    assert "1000" in done.stderr
    assert "trained for 512" in done.stderr
    assert json.loads(done.stdout)["train_context"] == 512


def test_a_stretched_model_reads_on_without_a_warning(model: Path) -> None:
    scaled = ("--rope-scaling", "yarn", "--rope-scale", 2)
    asked = ("--prompt", "Hello world", "--max-tokens", 8, "--context", 1000)
    done = longspan("generate", model, *asked, *scaled, "--json")
    assert (done.returncode, "warning" in done.stderr) == (0, False), done.stderr
    plain = longspan("generate", model, *asked, "--json")
    assert (
        "trained for 512; if its makers say so, --rope-scaling yarn --rope-scale 2" in plain.stderr
    )
    assert len(json.loads(done.stdout)["token_ids"]) == len(json.loads(plain.stdout)["token_ids"])


def test_a_damaged_model_is_refused(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:-1000])
    done = longspan("generate", broken, "--prompt", "x")
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_model_is_not_served_and_ray_is_not_started(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:-1000])
    done = longspan("serve", broken)
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_refused_before_ray_starts(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = longspan("serve", model, "--port", port)
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "choose another --port" in done.stderr


def without_compiled_kernels(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as where no C++ compiler was when Longspan was installed."""
    script = (
        "import sys; sys.modules['sharding.kernels._cpu'] = None; "
        "from serving.cli import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_compiler_the_reference_computes_and_says_so(model: Path) -> None:
    done = without_compiled_kernels("generate", model, "--prompt", "a", "--max-tokens", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    assert "the CPU kernels were not built" in done.stderr


def test_compiled_kernels_that_are_missing_are_not_silently_replaced(model: Path) -> None:
    done = without_compiled_kernels("generate", model, "--prompt", "a", "--kernels", "cpu")
    assert done.returncode == 2
    assert "--kernels reference" in done.stderr


def test_an_unknown_kernel_set_is_refused_with_those_that_exist(model: Path) -> None:
    done = longspan("bench", model, "--kernels", "warp")
    assert done.returncode == 2
    assert "there are: auto, cpu, reference" in done.stderr
