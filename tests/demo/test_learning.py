"""Training the demo's networks in several processes, which is what several GPUs do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

# Every process learns the numbers of its own index; all together learn their mean.
LEARNER = """
import sys
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from demo.making.learning import Trainer

process = PartialState(cpu=True)
torch.manual_seed(0)
network = torch.nn.Linear(4, 1)
targets = torch.tensor([1.0, 3.0]) if process.num_processes == 1 else torch.tensor([1.0, 3.0])[process.process_index]
trainer = Trainer([network], 0.1, steps=20)
trainer.run(1, lambda: (network(torch.ones(4, dtype=torch.bfloat16)) - targets).square().mean().float(), lambda: None)
trainer.finish()
save_file(network.state_dict(), f"{sys.argv[1]}/{process.process_index}_of_{process.num_processes}.safetensors")
"""


def test_processes_learn_together_what_one_learns_of_all(tmp_path: Path) -> None:
    script, environment = tmp_path / "learner.py", os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    script.write_text(LEARNER)
    for count in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        subprocess.run([*launch, str(script), str(tmp_path)], check=True, timeout=300, env=environment)
    one, first, second = (read(tmp_path / f"{name}.safetensors") for name in ("0_of_1", "0_of_2", "1_of_2"))
    assert first == second
    assert first == pytest.approx(one, abs=0.02)  # gradients are rounded to bfloat16


def read(path: Path) -> list[float]:
    return [value for tensor in load_file(path).values() for value in tensor.flatten().tolist()]
